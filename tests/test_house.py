"""The rules that keep the house standing: the import ladder, the notebooks' form, what may be in git."""
import ast
import re
import statistics
import sys
from configparser import ConfigParser
from pathlib import Path

import house
import pytest

LADDER = [{"core"}, {"config", "data", "risk", "weex"}, {"market"}, {"policies"}, {"validation"}, {"trading"}, {"figures"},
          {"reporting"}, {"demo"}, {"commands"}, {"cli"}]
LEVEL = {room: level for level, rooms in enumerate(LADDER) for room in rooms}
HEAVY = {"torch": {"policies.sb3", "policies.tcn"}, "stable_baselines3": {"policies.sb3", "policies.tcn"}}
DEVELOPMENT = {"fastcore", "nbdev", "execnb", "ghapi", "pytest", "hypothesis", "jupytext"}


def imports(module):
    """Every module name that a module of ours imports, at the top or inside a function; `from a import b` gives a and a.b.
    nbdev writes our own imports as relative ones; they are made absolute again."""
    package = ["stratfam", *module.split(".")[:-1]]
    for node in ast.walk(house.modules()[module]):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{a.name}" for a in node.names)


def ladder_fault(module, target, number=house.number_of, exists=lambda m: m in house.modules()):
    "Why `module` may not import `target` (both inside stratfam), or None."
    room, other = module.split(".")[0], target.split(".")[0]
    if other not in LEVEL: return None if target == "" or not exists(target) else f"{other} has no place on the ladder"
    if room != other:
        return None if LEVEL[other] < LEVEL[room] else f"{room} (level {LEVEL[room]}) imports {other} (level {LEVEL[other]})"
    if not exists(target) or target == module: return None
    return None if number(target) < number(module) else f"{module} imports the later notebook {target}"


def test_every_room_has_a_level():
    assert {m.split(".")[0] for m in house.modules()} <= set(LEVEL)


@pytest.mark.parametrize("module", sorted(house.modules()))
def test_import_ladder(module):
    inside = {n.removeprefix("stratfam").removeprefix(".") for n in imports(module) if n.split(".")[0] == "stratfam"}
    assert [f for f in (ladder_fault(module, t) for t in sorted(inside)) if f] == []


def test_the_ladder_sees_each_kind_of_fault():
    "The rule itself, on planted faults."
    number = {"data.store": 0, "data.features": 3}.get
    fault = lambda m, t: ladder_fault(m, t, number, lambda x: x.count(".") == 1)
    assert "level" in fault("core", "data.store") and "level" in fault("data.store", "risk.gate") and "level" in fault("weex.client", "config.x")
    assert "later" in fault("data.store", "data.features")
    assert fault("data.features", "data.store") is None and fault("market.account", "risk.gate") is None and fault("cli", "demo") is None


@pytest.mark.parametrize("module", sorted(house.modules()))
def test_heavy_and_development_packages_stay_where_they_belong(module):
    roots = {n.split(".")[0] for n in imports(module)}
    assert roots & DEVELOPMENT == set()
    assert [h for h, allowed in HEAVY.items() if h in roots and module not in allowed] == []


def test_commands_import_only_the_standard_library_typer_and_each_other_at_their_top():
    rooms = [m for m in house.modules() if m.split(".")[0] in ("cli", "commands")]
    assert "cli" in rooms and "commands.base" in rooms
    for module in rooms:
        tops = [n for n in house.modules()[module].body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name if isinstance(n, ast.Import) else n.module for n in tops for a in n.names}
        rest = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names}
        assert rest <= {"typer", "commands", "base", "stratfam.commands", "stratfam.commands.base"}, module


# Time, randomness and the environment enter weex/ and trading/ through core.Env alone, or a replay is not a replay.
OUTSIDE = {"time": None, "random": None, "secrets": None, "uuid": {"uuid1", "uuid4", "getnode"}, "os": {"environ", "getenv", "urandom"},
           "datetime.datetime": {"now", "utcnow", "today"}, "datetime.date": {"today"},
           "numpy.random": {"default_rng", "seed", "rand", "randn", "random", "normal", "uniform", "integers", "choice", "RandomState"}}
# (module, what it reads): why it may.
MAY_READ = {}


def outside_reads(tree):
    "Dotted names of clocks, random sources and the process environment that a tree uses."
    alias = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names: alias[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for a in node.names: alias[a.asname or a.name] = f"{node.module}.{a.name}"

    def dotted(node):
        if isinstance(node, ast.Name): return alias.get(node.id)
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            return base and f"{base}.{node.attr}"

    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute | ast.Name) else None
        if not name or "." not in name: continue
        home, last = name.rsplit(".", 1)
        if home in OUTSIDE and (OUTSIDE[home] is None or last in OUTSIDE[home]): yield name


@pytest.mark.parametrize("module", sorted(m for m in house.modules() if m.split(".")[0] in ("weex", "trading")))
def test_time_and_randomness_come_from_env(module):
    found = sorted(set(outside_reads(house.modules()[module])))
    assert [n for n in found if (module, n) not in MAY_READ] == [], f"{module}: read these through core.Env, or list them in MAY_READ with a reason"


@pytest.mark.parametrize("code", ["import time\ntime.sleep(1)", "from time import monotonic as m\nm()", "import datetime as d\nd.datetime.now()",
                                  "from datetime import datetime\ndatetime.utcnow()", "import numpy as np\nnp.random.default_rng()",
                                  "import uuid\nuuid.uuid4()", "import os\nos.environ['A']", "import random\nrandom.random()"])
def test_outside_reads_are_seen(code):
    assert list(outside_reads(ast.parse(code)))


def test_generator_types_are_not_randomness():
    assert list(outside_reads(ast.parse("import numpy as np, os\nx: np.random.Generator\nos.path.join('a')"))) == []


# The notebooks' form.
PROOF = re.compile(r"\bassert\b|\bassert_\w+\(|\btest_(eq|ne|fail|is|stdout|warns)\(|\bexpect_fail\(|\bshow_doc\(")


def words(cells): return sum(len(re.findall(r"[A-Za-z0-9]+", c.source)) for c in cells if c.kind == "markdown")
def only_imports(c): return all(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(c.source).body)
def has_imports(c): return any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(c.source).body)
def asserts(c): return bool(PROOF.search(c.source))


def form_faults(name, cells):
    "Everything wrong with the form of an exporting notebook."
    code = [c for c in cells if c.kind == "code"]
    exports = [c for c in code if c.exports and not only_imports(c)]
    hidden = [c for c in code if "hide" in c.directives]
    length = sum(len(c.lines) for c in exports)
    stem = re.sub(r"^\d+[a-z]?_", "", Path(name).stem)
    wanted = ".".join([*Path(name).parts[:-1], stem])
    homes = [c.directives["default_exp"].strip() for c in code if "default_exp" in c.directives]
    if homes != [wanted]: yield f"default_exp is {homes}, expected {wanted!r} once"
    if cells[0].kind != "markdown" or not re.match(rf"# {stem}\n\n> \S", cells[0].source):
        yield f"cell 0 must be '# {stem}', a blank line, '> summary'"
    if len(cells) > 120: yield f"{len(cells)} cells, at most 120: split the room"
    if len(hidden) > max(2, len(cells) / 10): yield f"{len(hidden)} hidden cells of {len(cells)}, at most 10 %"
    middle = statistics.median(len(c.lines) for c in exports) if exports else 0
    if middle > 15: yield f"the median export cell has {middle:g} lines, at most 15: one idea a cell"
    for c in exports:
        if len(c.lines) > 50: yield f"export cell of {len(c.lines)} lines, at most 50: {c.lines[0]}"
    if words(cells) < 2 * length: yield f"{words(cells)} words of prose for {length} exported lines, at least 2 a line: say why"
    if "nbdev_export()" not in cells[-1].source or "hide" not in cells[-1].directives: yield "last cell must be the hidden nbdev_export()"
    for c in exports:
        if has_imports(c): yield f"imports share an export cell with code: {c.lines[0]}"
    lessons = [c for c in code if not c.exports and not {"hide", "default_exp"} & c.directives.keys() and c.source]
    for c in code:
        if re.search(r"^\s*from \.", c.source, re.M): yield f"relative import, write `from stratfam...`: {c.lines[0]}"
        if "import *" in c.source: yield f"import *: {c.lines[0]}"
        if "test_close(" in c.source: yield f"test_close passes on unequal lengths, use assert_allclose: {c.lines[0]}"
    for i, c in enumerate(lessons):
        if only_imports(c): continue
        if not any(asserts(near) for near in lessons[i:i + 2]): yield f"an example proves nothing, assert its result: {c.lines[0]}"


@pytest.mark.parametrize("name", sorted(house.exporting()))
def test_notebook_form(name):
    assert list(form_faults(name, house.exporting()[name])) == []


def test_the_lint_sees_each_fault():
    "A good notebook passes; each planted fault is named."
    md, code = (lambda t: house.Cell("markdown", {}, t, (), None)), (lambda t, **d: house.Cell("code", d, t, (), None))
    home, last = code("", default_exp="data.store"), code("import nbdev; nbdev.nbdev_export()", hide="")
    prose = md("Why this is so, in enough words to carry the line of code that follows it.")
    good = [md("# store\n\n> One line."), home, prose, code("x = 1", export=""), code("x\n"), code("assert x == 1"), last]
    faults = lambda cells: " / ".join(form_faults("data/00_store.ipynb", cells))
    swap = lambda i, c: [*good[:i], c, *good[i + 1:]]
    assert faults(good) == ""
    assert "default_exp" in faults(swap(1, code("", default_exp="store")))
    assert "cell 0" in faults(swap(0, md("# Store")))
    assert "at most 50" in faults(swap(3, code("x = 1\n" * 51, export=""))) and "median" in faults(swap(3, code("x = 1\n" * 16, export="")))
    assert "words of prose" in faults(swap(3, code("x = 1\n" * 15, export="")))
    assert "imports share" in faults(swap(3, code("import os\nx = 1", export="")))
    assert "proves nothing" in faults(swap(5, code("x + 1")))
    assert "hidden cells" in faults([*good[:-1], last, last, last]) and "last cell" in faults(good[:-1])
    assert "test_close" in faults(swap(5, code("test_close(x, 1); assert x")))
    assert "relative" in faults(swap(5, code("from .core import Bars\nassert x")))
    assert "import *" in faults(swap(5, code("from math import *\nassert x")))


@pytest.mark.parametrize("name", sorted(house.notebooks()))
def test_notebooks_are_committed_without_outputs(name):
    assert [c.source for c in house.notebooks()[name] if c.outputs or c.count is not None] == []


def test_one_module_a_notebook():
    homes = [c.directives["default_exp"].strip() for cells in house.exporting().values() for c in cells if "default_exp" in c.directives]
    assert sorted(homes) == sorted(house.modules()), "each module has one notebook and each exporting notebook its module"
    assert len(set(homes)) == len(homes)


@pytest.mark.parametrize("name", sorted(n for n in house.notebooks() if n.split("/")[0] in ("tutorials", "explore")))
def test_tutorials_export_nothing(name):
    assert name not in house.exporting()


# Exported code.
@pytest.mark.parametrize("module", sorted(house.modules()))
def test_public_names_explain_themselves(module):
    tree = house.modules()[module]
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    one_line = lambda n: isinstance(n, ast.FunctionDef) and n.lineno == n.end_lineno
    assert [n.name for n in public if not ast.get_docstring(n) and not one_line(n)] == []


@pytest.mark.parametrize("module", sorted(house.modules()))
def test_nothing_unfinished_is_exported(module):
    source = (house.PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    assert re.findall(r"\bTODO\b|\bFIXME\b|\bXXX\b|NotImplementedError|except:\s|fastmath|parallel=True", source) == []
    handlers = [n for n in ast.walk(house.modules()[module]) if isinstance(n, ast.ExceptHandler)]
    silent = [n.lineno for n in handlers if isinstance(n.body[0], ast.Pass) and n.type and ast.unparse(n.type).endswith("Exception")]
    assert silent == []


# What may be in git.
MACHINE = [r"(?<![\w.~])/(?:home|Users|root)/\w", r"(?<![\w.])/wor[k]/", r"(?<![\w.])/opt/whee[l]s", r"(?<![\w.])/tmp/(?:wt|nb|face|home)\b",
           r"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b(?![\w.-])", r"^(?:<{7}|>{7}) "]
TEXT = {".py", ".md", ".ipynb", ".ini", ".toml", ".txt", ".sh", ".yml", ".yaml", ".json", ".tpl", ".j2", ".css", ".js", ".html", ""}


@pytest.mark.parametrize("path", [p for p in house.tracked() if Path(p).suffix in TEXT])
def test_no_machine_of_ours_in_git(path):
    if path == "tests/test_house.py": pytest.skip("the patterns themselves")
    text = (house.ROOT / path).read_text(encoding="utf-8")
    assert [m[0] for p in MACHINE for m in re.finditer(p, text, re.M)] == []


def test_no_market_data_and_no_big_file_in_git():
    sizes = {p: (house.ROOT / p).stat().st_size for p in house.tracked()}
    assert [p for p, n in sizes.items() if Path(p).suffix in {".parquet", ".feather", ".db", ".sqlite", ".zip", ".pkl", ".npz"}] == []
    assert {p: n for p, n in sizes.items() if n > 600_000} == {}


def test_one_version_everywhere():
    ini = ConfigParser(delimiters=["="])
    ini.read(house.ROOT / "settings.ini", encoding="utf-8")
    version = ini["DEFAULT"]["version"]
    import stratfam
    assert stratfam.__version__ == version
    assert re.search(r"^## (\S+)", (house.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] in ("Unreleased", version)


def test_every_requirement_has_a_tested_version():
    import shlex
    ini = ConfigParser(delimiters=["="])
    ini.read(house.ROOT / "settings.ini", encoding="utf-8")
    named = {re.split(r"[<>=\[;]", r)[0].lower().replace("_", "-")
             for k, v in ini["DEFAULT"].items() if k.endswith("requirements") for r in shlex.split(v)}
    pinned = {line.split("==")[0].lower() for line in (house.ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert named - pinned == set()
