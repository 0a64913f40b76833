"""Planted bugs: every one in `mutants/kernel.py` must be caught by the test named beside it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.kernel import MUTANTS

HERE = Path(__file__).parent


def outcomes(jobs):
    "Results of `jobs`, two processes side by side."
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    parts = [jobs[i::2] for i in range(2)]
    runs = [subprocess.Popen([sys.executable, HERE / "mutants" / "runner.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
            for _ in parts]
    for run, part in zip(runs, parts):
        run.stdin.write(json.dumps(part))
        run.stdin.close()
    found = [json.loads(line) for run in runs for line in run.stdout]
    assert [run.wait() for run in runs] == [0] * len(runs)
    return {r["name"]: r for r in found}


def test_the_list_is_sound():
    names = [m[0] for m in MUTANTS]
    assert len(MUTANTS) >= 25 and len(set(names)) == len(names)
    for name, file, old, new, test in MUTANTS:
        text, (path, function) = (HERE.parent / "stratfam" / file).read_text(), test.split("::")
        assert text.count(old) == 1 and old != new, f"{name}: {file} does not read {old!r} exactly once; update the list"
        assert f"def {function}(" in (HERE / path).read_text(), f"{name}: there is no test {test}"


@pytest.mark.proof
def test_every_planted_bug_is_caught():
    healthy = outcomes([("healthy " + t, "", "", "", t) for t in sorted({m[4] for m in MUTANTS})])
    sick = {n: r["said"] for n, r in healthy.items() if r["code"] != 0}
    assert sick == {}, "these tests must pass without a bug"
    missed = {n: r["said"] for n, r in outcomes(MUTANTS).items() if r["code"] != 1}
    assert missed == {}
