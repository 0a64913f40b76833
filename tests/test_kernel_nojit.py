"""The compiled rooms as plain Python (NUMBA_DISABLE_JIT=1), so that coverage can see inside them: which lines do the kernel's tests reach?"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = ["test_kernel.py::test_kernel_equals_oracle", "test_gate_fuzz.py::test_bounds_are_inclusive", "test_gate_fuzz.py::test_unsound_equity_halts",
         "test_gate_fuzz.py::test_a_loss_of_exactly_the_limit_is_a_breach", "test_faults_market.py"]
SCRIPT = """
import json, sys
from pathlib import Path
import coverage
root, tests = Path(sys.argv[1]), sys.argv[2:]
files = {name: str(root / "stratfam" / name) for name in ("market/account.py", "risk/gate.py")}
seen = coverage.Coverage(include=list(files.values()), data_file=None)
seen.start()
import runner
said = {t: runner.attempt(root, t) for t in tests}
seen.stop()
lines = {name: seen.analysis2(path) for name, path in files.items()}
print(json.dumps(dict(codes={t: c for t, (c, _) in said.items()}, said="".join(s[-800:] for c, s in said.values() if c),
                      share={n: 1 - len(a[3]) / len(a[1]) for n, a in lines.items()}, missing={n: a[3] for n, a in lines.items()})))
"""


@pytest.mark.proof
def test_plain_python_reaches_the_kernel_and_the_gate():
    "The same tests pass without the compiler, and they execute nearly every line of the kernel and of the gate's compiled part."
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"NUMBA_DISABLE_JIT": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE / "mutants"), str(HERE)])
    done = subprocess.run([sys.executable, "-c", SCRIPT, HERE.parent, *TESTS], capture_output=True, text=True, env=env, check=True, cwd=HERE)
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["codes"].values()) == {0}, found["said"]
    assert found["share"]["market/account.py"] >= 0.98, found["missing"]["market/account.py"]
    assert found["share"]["risk/gate.py"] >= 0.86, found["missing"]["risk/gate.py"]  # RiskManager's Python face has its tests in the notebook
