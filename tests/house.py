"""What the house tests read: the notebooks, the exported modules and the files in git."""
import ast
import json
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT / "stratfam", ROOT / "nbs"
HAND_WRITTEN = {"__init__", "_modidx"}


@dataclass(frozen=True)
class Cell:
    "One cell, its directives apart from its source."
    kind: str  # "code" or "markdown"
    directives: dict  # name -> rest of the line
    source: str  # without directives
    outputs: tuple
    count: object  # execution_count

    @property
    def lines(self): return [line for line in self.source.splitlines() if line.strip()]
    @property
    def exports(self): return "export" in self.directives


def _cell(raw):
    source = "".join(raw["source"])
    found = dict(re.findall(r"^#\|\s*(\w+):?[ \t]*(.*)$", source, re.M)) if raw["cell_type"] == "code" else {}
    return Cell(raw["cell_type"], found, re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip(),
                tuple(map(str, raw.get("outputs", ()))), raw.get("execution_count"))


@cache
def notebooks():
    "{path inside nbs: its cells} of every notebook; scratch copies of editors are left out."
    paths = [p for p in sorted(NBS.rglob("*.ipynb")) if not any(s[0] in "._" for s in p.relative_to(NBS).parts)]
    return {p.relative_to(NBS).as_posix(): [_cell(c) for c in json.loads(p.read_text(encoding="utf-8"))["cells"]] for p in paths}


def exporting():
    "The notebooks that make a module."
    return {name: cells for name, cells in notebooks().items() if any("default_exp" in c.directives for c in cells)}


@cache
def modules():
    "{dotted name inside stratfam: syntax tree} of every exported module."
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.stem not in HAND_WRITTEN]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def number_of(module):
    "The number in a module's notebook name (00_store -> 0), its place inside its package; -1 where it has none."
    folder, _, stem = module.rpartition(".")
    for name in notebooks():
        m = re.fullmatch(r"(?:(\d+)[a-z]?_)?(.*)", Path(name).stem)
        if (".".join(Path(name).parts[:-1]), m[2]) == (folder, stem): return int(m[1] or -1)
    return -1


def tracked():
    "Every file git knows here."
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [p for p in out.decode().split("\0") if p and (ROOT / p).is_file()]
