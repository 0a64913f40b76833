"""What the documentation says exists: every name and command in the guides, and the pieces that write the site."""
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import build_docs  # noqa: E402
import docrender  # noqa: E402


def resolved(name):
    "Import the longest module of a dotted name, then walk its attributes."
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try: found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError: continue
        for a in parts[i:]: found = getattr(found, a)
        return found
    raise ImportError(name)


def commands():
    "Every command line the program knows, without options."
    import typer.main

    import stratfam.cli  # noqa: F401
    from stratfam.commands.base import app
    def walk(c, names):
        yield " ".join(names)
        for n, child in getattr(c, "commands", {}).items(): yield from walk(child, [*names, n])
    return set(walk(typer.main.get_command(app), ["stratfam"]))


def options():
    "The options of every command."
    import typer.main

    from stratfam.commands.base import app
    def walk(c, names):
        yield " ".join(names), {o for p in c.params for o in p.opts}
        for n, child in getattr(c, "commands", {}).items(): yield from walk(child, [*names, n])
    return dict(walk(typer.main.get_command(app), ["stratfam"]))


GUIDES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.name)
def test_every_name_a_guide_uses_exists(guide):
    text, known = guide.read_text(encoding="utf-8"), commands()
    names = set(re.findall(r"`(stratfam(?:\.\w+)+)`", text))
    lines = set(re.findall(r"`(stratfam [a-z]+(?: [a-z]+(?![\w/]))*)", text))
    assert (names or lines) and [n for n in names if resolved(n) is None] == []
    groups = {c.rpartition(" ")[0] for c in known}
    wrong = [x for x in lines if x not in known and not any(x.startswith(c + " ") and c not in groups for c in known)]
    assert wrong == []
    for line in set(re.findall(r"`(stratfam [^`]+)`", text)):
        owner = max((c for c in known if line.startswith(c)), key=len)
        assert set(re.findall(r"--[a-z-]+", line)) <= options()[owner] | {"--help"}, line


def test_a_name_that_does_not_exist_is_seen():
    with pytest.raises((ImportError, AttributeError)): resolved("stratfam.core.Bear")
    with pytest.raises(ImportError): resolved("stratfamily.core")


def test_tables_show_only_what_is_there():
    from stratfam.core import known
    from stratfam.validation.verdict import Rule
    text = docrender.TableRenderer(known)._repr_markdown_()
    assert "| default |" not in text and "| `kind` | `str` | What is looked up" in text and "None" not in text
    rule = docrender.TableRenderer(Rule)._repr_markdown_()
    assert "| `level` | `float` | `0.005` |" in rule and "-> None" not in rule


def test_source_links_have_lines():
    from stratfam.core import Bars, lots_in
    for sym, first in ((Bars, "class Bars"), (lots_in, "def lots_in")):
        page, line = docrender.source_place(sym)
        assert page == "core.html"
        near = (ROOT / "stratfam" / "core.py").read_text(encoding="utf-8").splitlines()[line - 1:line + 3]
        assert any(first in x for x in near)
    assert docrender.source_place(len) is None


def test_source_pages_are_whole(tmp_path):
    build_docs.write_sources(tmp_path)
    text = (tmp_path / "source" / "core.html").read_text(encoding="utf-8")
    lines = len((ROOT / "stratfam" / "core.py").read_text(encoding="utf-8").rstrip("\n").splitlines())
    assert f'L-{lines}"' in text and "../index.html" in text and "http" not in re.sub(r"https?://[^\s<]*", "", text)
    assert (tmp_path / "source" / "validation" / "splits.html").is_file()


def test_the_benchmark_page_shows_misses_and_growth(tmp_path, monkeypatch):
    plain = {"name": "speed | of x", "value": 1234.5, "unit": "1/s", "peer": "other", "peer_version": "1.0", "ratio": 2.5, "goal": ">= 3x",
             "ok": False}
    growth = [{**plain, "name": "walk", "axis": "bars", "size": n, "value": 1e-6 * n**1.5, "unit": "s", "peer": None} for n in (10, 100, 1000)]
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    monkeypatch.setattr(build_docs, "OUT", tmp_path)
    build_docs.bench_page()
    assert "No measurement" in (tmp_path / "benchmarks.md").read_text()
    (tmp_path / "docs" / "benchmarks.json").write_text(json.dumps({"machine": {"cores": 2}, "rows": [plain, *growth]}))
    build_docs.bench_page()
    text = (tmp_path / "benchmarks.md").read_text()
    assert "**missed**" in text and "cores 2" in text and "walk: 1.50" in text
    assert (tmp_path / "images" / "growth_bars.png").read_bytes()[1:4] == b"PNG"


def test_the_command_page_holds_every_command(tmp_path, monkeypatch):
    monkeypatch.setattr(build_docs, "OUT", tmp_path)
    build_docs.command_page()
    text = (tmp_path / "commands.md").read_text(encoding="utf-8")
    assert [c for c in commands() if c.count(" ") and f"# {c}\n" not in text] == []
