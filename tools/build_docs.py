"""Build the docs site without Quarto: execute the notebooks, nbdev's processors, then Sphinx with MyST-NB.

    python tools/build_docs.py             _docs/html, offline
    python tools/build_docs.py --readme    only README.md, from nbs/index.ipynb
"""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

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


def _cell(c, path, seen):
    "One processed cell as Sphinx should see it, or None to drop it."
    src = "".join(c["source"])
    if c["cell_type"] == "raw":
        front = yaml.safe_load(src.strip().strip("-")) or {}
        head = f"# {front.get('title', path.stem)}\n"
        return dict(c, cell_type="markdown"), head + (f"\n> {front['description']}\n" if front.get("description") else "")
    if c["cell_type"] == "markdown": return None if src.startswith("<!-- WARNING") else (c, src)
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
        src = re.sub(r"\[`([^`]+)`\]\(((?:\.\./)*[\w/]+\.html#[\w.]+)\)", r'<a href="\2"><code>\1</code></a>', src)
        c["source"] = src.splitlines(True)
        c.pop("has_sd", None)
        c.get("metadata", {}).pop("language", None)
        cells.append(c)
    nb["cells"] = cells
    path.write_text(json.dumps(nb, indent=1), encoding="utf-8")


def write_readme(index):
    "README.md from the processed index notebook."
    out = ["<!-- Generated from nbs/index.ipynb by `make readme`: edit that notebook. -->"]
    for c in json.loads(index.read_text(encoding="utf-8"))["cells"]:
        src = re.sub(r'<a href="[^"]*"><code>(.*?)</code></a>', r"`\1`", "".join(c["source"]).strip())
        src = re.sub(r"(!\[[^\]]*\]\()(?!http)", r"\1nbs/", src)  # pictures lie beside the notebook
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
    learn = [p for p in pages if p.startswith(("tutorials/", "explore/"))]
    rooms = [p for p in pages if p not in learn and p != "index"]
    toc = lambda caption, names: "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n" + "\n".join(names) + "\n```\n" if names else ""
    nb = json.loads(index.read_text(encoding="utf-8"))
    text = (toc("Tutorials", learn) + toc("Rooms", rooms)).splitlines(True)
    nb["cells"].append(dict(cell_type="markdown", metadata={}, source=text, id="contents"))
    index.write_text(json.dumps(nb, indent=1), encoding="utf-8")


def main(readme_only):
    from nbdev.config import get_config
    os.chdir(ROOT)
    cfg = get_config()
    cfg["renderer"] = "docrender.TableRenderer"
    base = cfg["doc_host"] + cfg["doc_baseurl"].rstrip("/") + "/"  # nbdev_export wrote this into _modidx.py
    shutil.rmtree(OUT, ignore_errors=True)
    if not readme_only:
        for p in sorted(NBS.rglob("*.ipynb")):
            if p.name != "index.ipynb" and not any(s[0] in "._" for s in p.relative_to(NBS).parts):
                process(p, base)
                print("processed", p.relative_to(NBS), flush=True)
    index = process(NBS / "index.ipynb", base)
    write_readme(index)
    if readme_only: return
    write_contents(index)
    for extra in NBS.rglob("images"): shutil.copytree(extra, OUT / extra.relative_to(NBS), dirs_exist_ok=True)
    shutil.copy(ROOT / "docs" / "conf.py", OUT / "conf.py")
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", str(OUT), str(ROOT / "_docs" / "html")], check=True)
    print("docs:", ROOT / "_docs" / "html" / "index.html")


if __name__ == "__main__":
    main("--readme" in sys.argv)
