"""Build the docs site without Quarto: execute the notebooks, nbdev's processors, then Sphinx with MyST-NB.

    python tools/build_docs.py             _docs/html, offline
    python tools/build_docs.py --readme    only README.md, from nbs/index.ipynb
"""
import hashlib
import html
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import yaml
from joblib.externals.loky import get_reusable_executor

ROOT = Path(__file__).resolve().parents[1]
NBS, OUT = ROOT / "nbs", ROOT / "_proc"
SKIP = re.compile(r"^#\|\s*(slow|network|notest|eval:\s*false)", re.M)
sys.path.insert(0, str(ROOT / "tools"))


def executed(path):
    "The notebook with fresh outputs: run in this process, exported cells too."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    nb, here = read_nb(path), os.getcwd()
    skip = lambda c: c.cell_type != "code" or "nbdev_export" + "(" in c.source or SKIP.search(c.source)
    os.chdir(path.parent)
    try:
        CaptureShell(path).run_all(nb, exc_stop=True, preproc=skip)
    finally:
        os.chdir(here)
    return nb


def filters():
    """nbdev's processors, but for one: nbdev executes every cell with an import again, alone, to have names for show_doc.
    Ours takes the names from the exported module and runs the show_doc cells only."""
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults, exec_show_docs

    class show_docs(exec_show_docs):
        def begin(self):
            super().begin()
            homes = [c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in (getattr(c, "directives_", None) or {})]
            for m in homes: self.k.user_ns.update(vars(importlib.import_module(f"{get_config().lib_name}.{m}")))

        def __call__(self, cell):
            if cell.cell_type == "code" and re.search(r"^show_doc", cell.source, re.M): self.k.cell(cell)
            if self.k.exc: raise RuntimeError(f"show_doc failed: {cell.source}") from self.k.exc

    class Filters(FilterDefaults):
        def base_procs(self): return [show_docs if p is exec_show_docs else p for p in super().base_procs()]

    return Filters()


def process(path, base):
    "Execute one notebook, run nbdev's processors over it and write it to `_proc` under its page's name."
    from execnb.nbio import write_nb
    nb = executed(path)
    filters()(nb)
    front = next((c.source for c in nb.cells if c.cell_type == "raw" and c.source), "")
    name = re.search(r"^output-file:\s*(\S+)\.html", front, re.M)  # nbdev names pages without number: 00_core -> core
    dest = OUT / path.relative_to(NBS).parent / ((name[1] if name else path.stem) + ".ipynb")
    dest.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, dest)
    polish(dest, base)
    return dest


def formula(match):
    "A TeX formula as an inline picture that takes the text's colour: MathJax would come from another server."
    import io

    from matplotlib import rc_context
    from matplotlib.mathtext import math_to_image
    out = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "mathtext.fontset": "cm", "svg.hashsalt": "stratfam"}):
        depth = math_to_image(f"${match[1]}$", out, format="svg", color="#010203")
    text = out.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>|\s*\n\s*", " ", text[text.index("<svg"):], flags=re.S).replace("#010203", "currentColor")
    prefix = hashlib.sha256(match[1].encode()).hexdigest()[:6]  # glyphs have ids, and a page has many formulas
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(match[1], quote=True)}" style="vertical-align:{-depth:.1f}pt"', 1)


def pictured(src):
    "Markdown with its formulas drawn; code, and dollars that are money, stay."
    parts = re.split(r"(```.*?```|`[^`\n]*`)", src, flags=re.S)
    return "".join(p if i % 2 else re.sub(r"(?<![\\\w$])\$([^\s$](?:[^$\n]*[^\s$])?)\$(?![\d$])", formula, p) for i, p in enumerate(parts))


def _cell(c, path, seen):
    "One processed cell as Sphinx should see it, or None to drop it."
    src = "".join(c["source"])
    if c["cell_type"] == "raw":
        front = yaml.safe_load(src.strip().strip("-")) or {}
        head = f"# {front.get('title', path.stem)}\n"
        return dict(c, cell_type="markdown"), head + (f"\n> {front['description']}\n" if front.get("description") else "")
    if c["cell_type"] == "markdown": return None if src.startswith("<!-- WARNING") else (c, pictured(src))
    if "show_doc(" in src and "echo: false" in src:  # a markdown cell, so that its heading reaches contents and search
        md = "".join("".join(o["data"]["text/markdown"]) for o in c["outputs"])
        if md in seen: return None
        seen.add(md)
        return (dict(cell_type="markdown", id=c["id"], metadata={}),
                re.sub(r"^(#+ ([\w.]+)) *$", r'<a id="\2"></a>\n\n\1', md, count=1, flags=re.M))
    return (c, re.sub(r"^#\|.*\n?", "", src, flags=re.M)) if src.strip() else None


def polish(path, base):
    "Front matter becomes a heading, absolute doc links become relative ones, directives go."
    nb = json.loads(path.read_text(encoding="utf-8"))
    cells, seen, up = [], set(), "../" * (len(path.relative_to(OUT).parts) - 1)
    for old in nb["cells"]:
        kept = _cell(old, path, seen)
        if kept is None: continue
        c, src = kept
        src = re.sub(r"\]\(" + re.escape(base) + r"([\w/]+\.html)", lambda m: f"]({up}{m[1]}", src)
        src = re.sub(r"\[`([^`]+)`\]\([^)]*#(?:\w+\.)?_\w+\)", r"`\1`", src)  # private names have no place on a page
        src = re.sub(r"(\]\([^)\s]*\.html#\w+)\.\w+\)", r"\1)", src)  # a method's place is its class
        src = src.replace('href="SOURCE/', f'href="{up}source/')
        src = re.sub(r"\[`([^`]+)`\]\(((?:\.\./)*[\w/]+\.html#[\w.]+)\)", r'<a href="\2"><code>\1</code></a>', src)
        c["source"] = src.splitlines(True)
        c.pop("has_sd", None)
        c.get("metadata", {}).pop("language", None)
        cells.append(c)
    nb["cells"] = cells
    path.write_text(json.dumps(nb, indent=1), encoding="utf-8")


def measured_lines():
    "What the README says of speed: rows with a peer that met their goal or missed it, from the committed measurement."
    found = ROOT / "docs" / "benchmarks.json"
    said = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {"machine": {}, "rows": []}
    beside = [r for r in said["rows"] if r.get("peer") and r.get("ratio") and "axis" not in r]
    if not beside: return "`make bench` measures every speed beside its peers in one run; `python tools/benchmarks.py` writes the page of the docs."
    best = {}
    for r in beside: best.setdefault(r["command"], []).append(r)
    rows = [r for mine in best.values() for r in sorted(mine, key=lambda r: -r["ratio"])[:3]]
    num = lambda v: f"{v:,.3g}" if abs(v) < 1000 else f"{v:,.0f}"
    cell = lambda v: str(v).replace("|", "\\|")
    line = lambda r: (f"| {cell(r['name'])} | {num(r['value'])} {cell(r['unit'])} | {cell(r['peer'])} {r['peer_version'] or ''} | {num(r['ratio'])}x "
                      f"| `{r['command']}` |")
    m = said["machine"]
    where = f"{m.get('processor', 'one machine')}, {m.get('cores', '?')} cores, {m.get('measured', '')}"
    return "\n".join([f"Side by side in one run ({where}); the docs page *Benchmarks* has all rows, the missed goals too.", "",
                      "| what | here | beside | ratio | command |", "|---|---:|---|---:|---|", *map(line, rows)])


def write_readme(index):
    "README.md from the processed index notebook."
    out = ["<!-- Generated from nbs/index.ipynb by `make readme`: edit that notebook. -->"]
    for c in json.loads(index.read_text(encoding="utf-8"))["cells"]:
        src = re.sub(r'<a href="[^"]*"><code>(.*?)</code></a>', r"`\1`", "".join(c["source"]).strip())
        src = re.sub(r"(!\[[^\]]*\]\()(?!http)", r"\1nbs/", src).replace("MEASURED", measured_lines())  # pictures lie beside the notebook
        if c["cell_type"] == "markdown": out.append(src)
        elif src:
            out.append(f"```python\n{src}\n```")
            for o in c["outputs"]:
                text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")).rstrip()
                if text: out.append("\n".join("    " + line for line in text.splitlines()))
    (ROOT / "README.md").write_text("\n\n".join(out) + "\n", encoding="utf-8")


def write_contents(index):
    "The site's table of contents, at the end of its first page."
    pages = sorted(str(p.relative_to(OUT).with_suffix("")) for p in OUT.rglob("*.ipynb"))
    guides = sorted(p.stem for p in OUT.glob("*.md"))
    numbered = lambda p: next((n.stem for n in (NBS / p).parent.glob(f"*{Path(p).name}.ipynb")), p)
    learn = sorted((p for p in pages if p.startswith(("tutorials/", "explore/"))), key=lambda p: (p.startswith("explore"), numbered(p)))
    rooms = [p for p in pages if p not in learn and p != "index"]
    toc = lambda caption, names: "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n" + "\n".join(names) + "\n```\n" if names else ""
    nb = json.loads(index.read_text(encoding="utf-8"))
    text = (toc("Tutorials", learn) + toc("Guides", guides) + toc("Rooms", rooms)).splitlines(True)
    for c in nb["cells"]: c["source"] = [line.replace("MEASURED", measured_lines()) for line in c["source"]]
    nb["cells"].append(dict(cell_type="markdown", metadata={}, source=text, id="contents"))
    index.write_text(json.dumps(nb, indent=1), encoding="utf-8")


def command_page():
    "Every command with its help, from the program itself."
    import typer.main
    import stratfam.cli  # noqa: F401  registers the commands
    from stratfam.commands.base import app
    out = ["# Commands", "", "Every command answers `--help`; those that print a result print JSON with `--json`. Exit codes: 0 done or ACCEPT,",
           "1 error, 2 usage, 3 REJECT, 4 NOT ENOUGH DATA (3 and 4 from `validate` only).", ""]
    def walk(command, names):
        import click
        context = click.Context(command, info_name=" ".join(names), terminal_width=100, max_content_width=100)
        if hasattr(command, "commands"):
            if len(names) > 1: out.extend([f"## {' '.join(names)}", "", command.help or "", ""])
            for name, child in command.commands.items(): walk(child, [*names, name])
        else: out.extend([f"{'##' if len(names) == 2 else '###'} {' '.join(names)}", "", "```text", command.get_help(context), "```", ""])
    walk(typer.main.get_command(app), ["stratfam"])
    (OUT / "commands.md").write_text("\n".join(out), encoding="utf-8")


def growth_plot(rows, axis, path):
    "Seconds against size on log-log axes; the fitted exponents by name."
    from matplotlib.figure import Figure
    fig, slopes = Figure(figsize=(6, 3.4), layout="constrained"), {}
    ax = fig.subplots()
    for name, style in zip(dict.fromkeys(r["name"] for r in rows), ("o-", "s--", "^:")):
        x, y = zip(*((r["size"], r["value"]) for r in rows if r["name"] == name))
        if len(x) > 2:
            u, v = [math.log(a) for a in x], [math.log(a) for a in y]
            mu, mv = sum(u) / len(u), sum(v) / len(v)
            slopes[name] = sum((a - mu) * (b - mv) for a, b in zip(u, v)) / sum((a - mu) ** 2 for a in u)
        ax.loglog(x, y, style, color="#0072B2", label=name)
    ax.set_xlabel(f"{axis} (log)"); ax.set_ylabel("seconds (log)"); ax.legend(frameon=False); ax.grid(alpha=0.2, which="both")
    fig.savefig(path, dpi=110, metadata={"Software": None})
    return slopes


def bench_page():
    "The last committed measurement: ratios beside peers, and how cost grows."
    found = ROOT / "docs" / "benchmarks.json"
    out = ["# Benchmarks", "", "Measured side by side in one run by `stratfam bench all`; `python tools/benchmarks.py` writes what this page shows.",
           ""]
    said = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {"machine": {}, "rows": []}
    said = {"machine": {}, "rows": said} if isinstance(said, list) else said
    if not said["rows"]: out += ["No measurement is committed yet."]
    else: out += ["Machine: " + ", ".join(f"{k} {v}" for k, v in said["machine"].items()) + ".", ""]
    plain, growth = [r for r in said["rows"] if "axis" not in r], [r for r in said["rows"] if "axis" in r]
    num = lambda v: "" if v is None else f"{v:,.3g}" if abs(v) < 1000 else f"{v:,.0f}"
    cell = lambda v: str(v or "").replace("|", "\\|")
    if plain:
        out += ["## Beside others", "", "A ratio above 1 is ours ahead; goals were set before measuring, and a missed one is shown as missed.", "",
                "| what | measured | peer | ratio | goal | |", "|---|---:|---|---:|---|---|"]
        line = lambda r: [cell(r["name"]), f"{num(r['value'])} {r['unit']}", f"{cell(r['peer'])} {cell(r['peer_version'])}", num(r["ratio"]),
                          cell(r["goal"]), "met" if r["ok"] else "**missed**"]
        out += ["| " + " | ".join(line(r)) + " |" for r in plain] + [""]
    if growth:
        out += ["## How cost grows", "", "The slope on log-log axes is the exponent: 1 is linear; less means that a fixed cost is shared.", ""]
    (OUT / "images").mkdir(exist_ok=True)
    for axis in dict.fromkeys(r["axis"] for r in growth):
        rows = [r for r in growth if r["axis"] == axis]
        slopes = growth_plot(rows, axis, OUT / "images" / f"growth_{axis}.png")
        said_of = "; ".join(f"{n}: {v:.2f}" for n, v in slopes.items()) or "two points, no fit"
        sizes = ", ".join(f"{r['size']:,}: {r['value']:.3g} s" for r in rows)
        out += [f"### {axis}", "", f"![Seconds against {axis}](images/growth_{axis}.png)", "", f"Fitted exponent: {said_of}. {sizes}.", ""]
    (OUT / "benchmarks.md").write_text("\n".join(out), encoding="utf-8")


SOURCE_STYLE = """pre { line-height: 1.4; font-size: 13px; overflow-x: auto } body { margin: 1rem; font-family: system-ui } a { color: inherit }
:target { background: #ffe9a8 }"""

def write_sources(site):
    "The exported modules as pages with line anchors: what the `source` links point at."
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    light, dark = (HtmlFormatter(style=s, lineanchors="L", linenos="inline") for s in ("default", "github-dark"))
    night = f"body {{ background: #0d1117; color: #e6edf3 }} :target {{ background: #4d3b00 }} {dark.get_style_defs('.highlight')}"
    style = f"{SOURCE_STYLE} {light.get_style_defs('.highlight')} @media (prefers-color-scheme: dark) {{ {night} }}"
    package = ROOT / "stratfam"
    for path in sorted(package.rglob("*.py")):
        if path.stem == "_modidx": continue
        dest = site / "source" / path.relative_to(package).with_suffix(".html")
        dest.parent.mkdir(parents=True, exist_ok=True)
        name, up = ".".join(["stratfam", *path.relative_to(package).with_suffix("").parts]), "../" * len(dest.relative_to(site).parts[:-1])
        body = highlight(path.read_text(encoding="utf-8"), PythonLexer(), light)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">' \
               f'<title>{name}</title><style>{style}</style>'
        top = f'<p><a href="{up}index.html">stratfam</a> / {name}</p>'
        dest.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{top}{body}</body></html>', encoding="utf-8")


def settings():
    "nbdev's settings with our renderer, and the prefix that its links carry."
    from nbdev.config import get_config
    os.chdir(ROOT)
    cfg = get_config()
    cfg["renderer"] = "docrender.TableRenderer"
    return cfg["doc_host"] + cfg["doc_baseurl"].rstrip("/") + "/"  # nbdev_export wrote this into _modidx.py


def process_one(path):
    "One notebook in a worker process; None, or what failed."
    try: process(path, settings())
    except Exception as e: return f"{path.relative_to(NBS)}: {type(e).__name__}: {e}"  # noqa: BLE001  named at the end, all at once
    finally: get_reusable_executor().shutdown(wait=True, kill_workers=True)  # A notebook's own workers would idle for five minutes


def main(readme_only):
    base = settings()
    shutil.rmtree(OUT, ignore_errors=True)
    ours = lambda p: p.name != "index.ipynb" and not any(s[0] in "._" for s in p.relative_to(NBS).parts)
    todo = [] if readme_only else [p for p in sorted(NBS.rglob("*.ipynb")) if ours(p)]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        failed = []
        # Through its module: a notebook that runs in a worker takes the name __main__ for itself.
        for p, error in zip(todo, pool.map(importlib.import_module("build_docs").process_one, todo)):
            print("FAILED" if error else "processed", p.relative_to(NBS), flush=True)
            if error: failed.append(error)
    index = process(NBS / "index.ipynb", base)
    write_readme(index)
    if readme_only: return
    for guide in sorted((ROOT / "docs").glob("*.md")): shutil.copy(guide, OUT / guide.name)
    for extra in NBS.rglob("images"): shutil.copytree(extra, OUT / extra.relative_to(NBS), dirs_exist_ok=True)
    command_page()
    bench_page()
    write_contents(index)
    shutil.copy(ROOT / "docs" / "conf.py", OUT / "conf.py")
    shutil.copytree(ROOT / "docs" / "_static", OUT / "_static")
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    site = ROOT / "_docs" / "html"
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", str(OUT), str(site)], check=True)
    write_sources(site)
    print("docs:", site / "index.html")
    if failed: sys.exit("These notebooks failed and have no page:\n" + "\n".join(failed))


if __name__ == "__main__":
    main("--readme" in sys.argv)
