"""PBO beside purgedcv, measured in one run: `bench()` returns the rows, `python tests/bench_pbo.py [--full]` prints them as JSON.

purgedcv needs about two and a half minutes for S=16, T=25,000, N=50. `--full` pays that price; otherwise it is timed on a few
of the 12,870 halves, through its own loop at a smaller S over the same 25,000 x 50 returns, and scaled by the number of
halves: each half costs it two Sharpe ratios of T/2 rows for every configuration, whatever S is.
"""
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

COMMAND = "python tests/bench_pbo.py"
ROWS, SMALL, LARGE, S = 25_000, 50, 1000, 16


def frame(n_configs, rows=ROWS):
    ret = np.random.default_rng(0).normal(0.0, 0.01, (rows, n_configs))
    return pd.DataFrame(ret, index=pd.date_range("2015-01-01", periods=rows, freq="1h"), columns=[f"c{j}" for j in range(n_configs)])


def seconds(work, rounds):
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def row(name, value, unit, goal, ok, peer=None, ratio=None):
    version = importlib.metadata.version(peer) if peer else None
    return dict(name=name, value=value, unit=unit, peer=peer, peer_version=version, ratio=ratio, goal=goal, ok=bool(ok), command=COMMAND)


def peak_megabytes(n_configs):
    "Highest resident memory of a fresh process that builds the frame and asks for PBO."
    code = ("import resource, bench_pbo as b; from stratfam.validation.pbo import pbo; "
            f"pbo(b.frame({n_configs}), b.S); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout)


def bench(full: bool = False) -> list[dict]:
    "Time against purgedcv, growth with the number of configurations, and memory."
    from purgedcv import probability_of_backtest_overfitting as peer

    from stratfam.validation.pbo import pbo
    small, large = frame(SMALL), frame(LARGE)
    check = pbo(small.iloc[:24_000], 4, ties="<0"), peer(small.iloc[:24_000].to_numpy().T, 4)
    assert abs(check[0].pbo - check[1].pbo) < 1e-12
    matrix = np.ascontiguousarray(small.to_numpy().T)
    pbo(small, S)
    ours, theirs = float("inf"), float("inf")
    peer_S = S if full else 8
    for _ in range(1 if full else 5):
        ours = min(ours, seconds(lambda: pbo(small, S), 5))
        theirs = min(theirs, seconds(lambda: peer(matrix, peer_S), 1))
        ours = min(ours, seconds(lambda: pbo(small, S), 5))
    theirs *= math.comb(S, S // 2) / math.comb(peer_S, peer_S // 2)
    how = "measured in full" if full else f"scaled by halves from its S={peer_S}"
    wide = seconds(lambda: pbo(large, S), 5)
    memory = peak_megabytes(LARGE)
    return [row(f"PBO, S=16, T=25,000, N=50 (purgedcv {how})", ours, "s", ">= 4,000x", theirs / ours >= 4000, "purgedcv", theirs / ours),
            row("PBO, N=1,000 against our own N=50", wide / ours, "ratio", "<= 25", wide / ours <= 25),
            row("PBO, N=1,000, peak resident memory of the process", memory, "MB", "< 1,024 MB", memory < 1024)]


if __name__ == "__main__":
    print(json.dumps(bench("--full" in sys.argv[1:]), indent=2))
