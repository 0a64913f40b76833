"""How cost grows: with bars, symbols, accounts, trials and workers. `bench()` returns the rows, `python tests/bench_scaling.py` prints them.

Each row carries `axis` and `size` beside what every benchmark row carries, so that the page of the documentation can draw them
on log-log axes and fit an exponent: 1 is linear, below 1 a cost shared, above 1 a cost to be wary of."""
import json
import os
import time

import numpy as np

from stratfam.core import Features, ObservationSpec
from stratfam.data.worlds import make_world
from stratfam.market.backtest import arena, backtest_weights
from stratfam.market.env import BatchEnv
from stratfam.policies.base import Task, baseline
from stratfam.validation.pbo import pbo
from stratfam.validation.splits import CombinatorialPurgedCV
from stratfam.validation.study import cross_validate

COMMAND = "python tests/bench_scaling.py"


def best(work, rounds=3):
    "Best of some rounds, wall clock."
    found = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - start)
    return found


def row(name, axis, size, value):
    return dict(name=name, axis=axis, size=int(size), value=value, unit="s", peer=None, peer_version=None, ratio=None, goal=None, ok=True,
                command=COMMAND)


def walked(T, N):
    "One account with new wishes at every bar, through the whole gate and the ledger of fills."
    a = arena(make_world("gbm", n_bars=T, n_symbols=N, seed=1).bars)
    wish = np.random.default_rng(0).uniform(0, 1 / N, (T, N))
    return lambda: backtest_weights(wish, a)


def stepped(B):
    "A hundred steps of B accounts."
    T, names = 2000, ("a", "b", "c")
    x = Features(np.random.default_rng(0).normal(size=(T, 2, 3)).astype("f4"), names, 0)
    env = BatchEnv(arena(make_world("gbm", n_bars=T, n_symbols=2, seed=1).bars), x, ObservationSpec(names, 8), [(200, T)], B=B, episode=250)
    wish = np.random.default_rng(0).uniform(-1, 1, (B, 2)).astype("f4")
    return lambda: [env.step(wish) for _ in range(100)]


def judged(N):
    "PBO of N trials."
    import pandas as pd
    ret = pd.DataFrame(np.random.default_rng(0).normal(0, 0.01, (2000, N)), pd.date_range("2015-01-01", periods=2000), [f"c{k}" for k in range(N)])
    return lambda: pbo(ret, 12)


def studied(jobs):
    "Fifteen splits of a policy that looks at every bar."
    from stratfam.data.features import build
    bars = make_world("crypto_like", n_bars=3000, n_symbols=2, seed=1).bars
    task = Task(bars, build(bars, ("return_1",)))
    folds = CombinatorialPurgedCV(6, 2).folds(bars, task.label_end, 64, "2d")
    fits = {f"momentum {n}": baseline("momentum", bars=n) for n in range(8, 40, 8)}
    return lambda: cross_validate(fits, task, folds, jobs=jobs)


def bench(quick=False):
    "Every axis in turn; each work is run once before it is timed. `quick` leaves the large sizes out and times once."
    cores = [n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]
    axes = [("backtest of one symbol", "bars", (3_000, 10_000, 30_000, 100_000, 300_000), lambda n: walked(n, 1)),
            ("backtest of 5,000 bars", "symbols", (1, 2, 4, 8, 16, 32), lambda n: walked(5000, n)),
            ("100 steps of the environment", "accounts", (1, 4, 16, 64, 256, 1024), stepped),
            ("PBO, 12 blocks of 2,000 days", "trials", (10, 30, 100, 300, 1000), judged),
            ("study of 4 configurations", "workers", cores, studied)]
    rows = []
    for name, axis, sizes, make in axes:
        for n in sizes[:3] if quick else sizes:
            work = make(n)
            work()
            rows.append(row(name, axis, n, best(work, 1 if quick else 3)))
    return rows


if __name__ == "__main__": print(json.dumps(bench(), indent=1))
