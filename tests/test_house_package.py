"""Two promises about the installed package: it starts fast, and an edited callee is never served from an old cache."""
import os
import shutil
import subprocess
import sys
import time

import house
import pytest

PROBE = '''
from numba import njit
from stratfam.core import lots_in

@njit(cache=True, error_model="numpy")
def doubled(qty, step):
    return 2 * lots_in(qty, step)

print(doubled(0.7, 0.1), sum(doubled.stats.cache_hits.values()))
'''


def run(folder, **env):
    "What the probe prints in a fresh process: its result and how many compiled functions came from the cache."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "COV_"))}
    out = subprocess.run([sys.executable, "-m", "stratfam.probe"], cwd=folder, capture_output=True, text=True, check=True,
                         env={**clean, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), **env})
    return tuple(int(v) for v in out.stdout.split())


def edit(folder, module="core.py", old="    return int(n)\n", new="    return int(n) + 1\n"):
    "Change the callee, in another module than the compiled caller."
    path = folder / "stratfam" / module
    before = path.read_text(encoding="utf-8")
    assert before.count(old) == 1
    path.write_text(before.replace(old, new), encoding="utf-8")


@pytest.fixture
def package(tmp_path):
    "A copy of the package with one compiled function that calls another module's."
    shutil.copytree(house.PACKAGE, tmp_path / "stratfam", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stratfam" / "probe.py").write_text(PROBE, encoding="utf-8")
    return tmp_path


def test_an_edited_callee_is_compiled_afresh(package):
    assert run(package) == (14, 0)
    assert run(package) == (14, 1), "the second process must be served from the cache, or this test proves nothing"
    edit(package)
    assert run(package) == (16, 0)


def test_the_trap_is_real(package):
    "With a cache folder that does not follow the sources, numba serves the old machine code: why `__init__` exists."
    fixed = {"NUMBA_CACHE_DIR": str(package / "fixed")}
    assert run(package, **fixed) == (14, 0)
    edit(package)
    assert run(package, **fixed) == (14, 1)


KERNEL_PROBE = '''
import numpy as np
from stratfam.core import bars_from_close
from stratfam.market import account
from stratfam.market.backtest import arena, backtest_weights

bars = bars_from_close(np.datetime64("2024-01-01", "ns") + np.arange(40) * np.timedelta64(1, "h"), np.full((40, 1), 100.0), ["A"], "1h")
b = backtest_weights(np.full((40, 1), 0.8), arena(bars))
print(round(100 * b.weight[20, 0]), sum(account.run.stats.cache_hits.values()))
'''


@pytest.mark.proof
def test_editing_the_gate_changes_the_kernel(package):
    "The same with the real pair: the gate halves every wish, and the kernel, unchanged and cached, must show it."
    (package / "stratfam" / "probe.py").write_text(KERNEL_PROBE, encoding="utf-8")
    assert run(package) == (80, 0)
    assert run(package) == (80, 1), "the second process must be served from the cache, or this test proves nothing"
    edit(package, "risk/gate.py", "    return f, why\n", "    return 0.5 * f, why\n")
    assert run(package) == (40, 0)


def test_help_answers_in_half_a_second():
    def once():
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-m", "stratfam.cli", "--help"], capture_output=True, text=True, check=True, cwd=house.ROOT)
        assert "demo" in out.stdout
        return time.perf_counter() - start
    assert min(once() for _ in range(3)) < 0.5
