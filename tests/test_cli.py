"""Commands from outside: exit codes, one line for a refusal, strict JSON, nothing on stdout that a pipe would choke on."""
import json
import os
import subprocess
import sys

import pytest

from stratfam import cli  # noqa: F401 - registers the commands
from stratfam.commands import machine
from stratfam.commands.base import run


@pytest.fixture
def stratfam(tmp_path, monkeypatch, capsys):
    "Run a command line in an empty folder; gives (code, stdout, stderr)."
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("STRATFAM_")]: monkeypatch.delenv(name)
    def call(*args):
        code = run(list(args))
        return code, *capsys.readouterr()
    return call


@pytest.mark.parametrize(("args", "code", "says"), [
    (["dmo"], 2, "Did you mean 'demo'?"),
    (["report", "--templat", "x"], 2, "--template"),
    (["data", "chek"], 2, "Did you mean 'check'?"),
    (["data", "worlds", "momentm"], 1, "Did you mean 'momentum'?"),
    (["data", "check", "nowhere"], 1, "no such folder"),
    (["data", "download", "--preset", "majors1h"], 1, "Did you mean 'majors-1h'?"),
    (["config", "check", "--set", "limits.max_leverage=21"], 1, "less than or equal to 20"),
    (["config", "check", "--set", "secrets.weex_api_key=a"], 1, "must not stand here"),
    (["config", "check", "--config", "none.toml"], 1, "no such settings file"),
    (["report", "nowhere"], 1, "no saved run here"),
    (["report", "--template", "validaton", "--sample"], 1, "Did you mean 'validation'?"),
    (["report", "--sample", "--param", "x"], 2, "expected name=value"),
    (["report"], 1, "give its folder"),
])
def test_a_refusal_is_one_line_with_the_right_code(stratfam, args, code, says):
    got, out, err = stratfam(*args)
    assert (got, out) == (code, "") and says in err and err.count("\n") == 1 and err.startswith("stratfam: ")


def test_a_bug_is_one_line_and_a_traceback_only_with_debug(stratfam, monkeypatch):
    monkeypatch.setattr(machine, "settings", lambda *_: 1 / 0)
    code, out, err = stratfam("config", "show")
    assert code == 1 and err.count("\n") == 1 and "ZeroDivisionError" in err and "--debug" in err
    with pytest.raises(ZeroDivisionError): run(["config", "show", "--debug"])


def test_settings_printed_are_settings_read(stratfam, tmp_path):
    code, out, _ = stratfam("config", "show", "--set", "limits.stop_loss=off", "--set", "data.symbols=BTCUSDT")
    (tmp_path / "stratfam.toml").write_text(out)
    code, again, _ = stratfam("config", "show", "--json")
    assert code == 0 and json.loads(again)["limits"]["stop_loss"] is None and json.loads(again)["data"]["symbols"] == ["BTCUSDT"]


@pytest.mark.parametrize("args", [["doctor", "--json"], ["config", "show", "--json"], ["config", "schema"], ["config", "check", "--json"],
                                  ["data", "worlds", "--json"], ["data", "worlds", "gbm", "--bars", "100", "--json"]])
def test_json_is_strict(stratfam, args):
    code, out, _ = stratfam(*args)
    assert code == 0 and json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_a_made_world_is_read_back_and_checked(stratfam, tmp_path):
    assert stratfam("data", "worlds", "momentum", "--bars", "200", "--save", "w")[0] == 0
    code, out, _ = stratfam("data", "list", "w", "--json")
    assert code == 0 and [(r["bars"], r["exchange"]) for r in json.loads(out)] == [(200, "synthetic")] * 3
    code, out, _ = stratfam("data", "check", "w", "--json")
    assert code == 0 and {r["missing"] for r in json.loads(out)} == {0}


def leaves():
    "Every command that does something, with its words."
    import typer.main

    from stratfam.commands.base import app
    def walk(c, words):
        if not hasattr(c, "commands"): yield tuple(words), c
        for n, child in getattr(c, "commands", {}).items(): yield from walk(child, [*words, n])
    return dict(walk(typer.main.get_command(app), []))


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_every_command_has_help_with_an_example_and_can_answer_in_json(stratfam, words):
    code, out, _ = stratfam(*words, "--help")
    assert code == 0 and "Example: stratfam" in out
    assert "--json" in out or words == ("config", "schema")


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_an_example_can_be_copied(stratfam, words):
    "It stands on one line, and names options that its command has."
    code, out, _ = stratfam(*words, "--help")
    line = next(x.strip() for x in out.splitlines() if "Example: stratfam" in x)
    assert line.removeprefix("Example: stratfam ").split()[:len(words)] == list(words)
    assert {x for x in line.split() if x.startswith("--")} <= {o for p in leaves()[words].params for o in p.opts}


@pytest.mark.parametrize("words", [[], ["data"], ["weex"], ["config"]])
def test_a_bare_group_lists_its_commands(stratfam, words):
    code, out, err = stratfam(*words)
    assert code == 0 and "Commands:" in out and err == ""


def test_a_reader_that_leaves_is_no_fault(tmp_path):
    said = subprocess.run(f"{sys.executable} -m stratfam.cli config schema | head -1", shell=True, capture_output=True, text=True, check=False,
                          cwd=tmp_path)
    assert (said.stdout, said.stderr) == ("{\n", "")


def test_a_shell_can_complete_commands():
    env = {**os.environ, "_STRATFAM_COMPLETE": "complete_bash", "COMP_WORDS": "stratfam conf", "COMP_CWORD": "1"}
    said = subprocess.run([sys.executable, "-m", "stratfam.cli"], capture_output=True, text=True, env=env, check=False)
    assert said.stdout.split() == ["config"] and said.stderr == ""


def test_into_a_pipe_nothing_is_coloured(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("STRATFAM_")}
    for more in ({"NO_COLOR": "1"}, {"FORCE_COLOR": ""}):
        line = [sys.executable, "-m", "stratfam.cli", "doctor"]
        said = subprocess.run(line, capture_output=True, text=True, env={**env, **more}, cwd=tmp_path, check=False)
        assert "\x1b" not in said.stdout + said.stderr and "numpy" in said.stdout


def test_runs_are_listed_and_compared(stratfam, tmp_path):
    from stratfam.figures import sample_run
    from stratfam.reporting import write_results
    for name, seed in (("a", 1), ("b", 2)): write_results(sample_run(seed, 300), tmp_path / "reports" / "runs" / name)
    code, out, _ = stratfam("runs", "--json")
    assert code == 0 and [r["run"] for r in json.loads(out)] == ["b", "a"] and (tmp_path / "reports" / "runs" / "index.html").is_file()
    code, out, _ = stratfam("runs", "a", "b", "--json")
    lines = {r["line"]: (r["a"], r["b"]) for r in json.loads(out)}
    assert code == 0 and "Real bars (made up): sharpe" in lines and all(x != y for x, y in lines.values())
    assert stratfam("runs", "a", "a")[:2] == (0, "The two runs say the same.\n")
    code, _, err = stratfam("runs", "a", "bb")
    assert code == 1 and "Did you mean 'b'?" in err


def test_the_top_of_the_program_loads_nothing_heavy():
    heavy = "numpy pandas numba torch matplotlib pydantic rich papermill ccxt"
    code = f"import sys, stratfam.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
