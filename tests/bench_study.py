"""The search beside the bare work it schedules, measured in one run: `bench()` returns the rows, `python tests/bench_study.py` prints them.

Overhead is what a job costs beyond the work itself: handing it to a process, bringing its outcome home, writing it down, and its share
of the ledger. It is measured on jobs that do next to nothing, on loky with two workers, as elapsed time a job minus the seconds that
the jobs themselves took, spread over the workers. Scaling is measured on policy fits of real size.
"""
import json
import os
import tempfile
import time
from pathlib import Path

from stratfam.data.worlds import make_world
from stratfam.policies.base import baseline
from stratfam.risk.limits import limits_from
from stratfam.validation.ledger import Ledger
from stratfam.validation.runner import Results, Work, finish, perform, place, work_key
from stratfam.validation.search import Design, search, whole_task
from stratfam.validation.space import members_from

COMMAND = "python tests/bench_study.py"
SPACE = members_from([{"name": "dice", "fit": "stratfam.policies.base:Baseline", "fixed": {"name": "random"},
                       "search": {"options.turnover": {"low": 0.01, "high": 0.2}}}])


def row(name, value, unit, goal, ok, ratio=None):
    return dict(name=name, value=value, unit=unit, peer=None, peer_version=None, ratio=ratio, goal=goal, ok=bool(ok), command=COMMAND)


def market(bars, names=("return_1",)):
    made = make_world("gbm", bars, 2, "1h", seed=1).bars
    return whole_task(made, SPACE, limits_from(max_drawdown=None, daily_loss=None), names=names)


def warm(source, jobs=2):
    "Processes started, code loaded and compiled."
    list(perform(source, [Work(baseline("random"), (), ((50, 120),), s) for s in range(4 * jobs)], "loky", jobs))


def scheduler_row(n=300):
    "Jobs of a few milliseconds through two processes, each outcome written."
    with tempfile.TemporaryDirectory() as folder:
        task = market(600)
        source = place(task, folder, "loky", 2)
        warm(source)
        works = [Work(baseline("random"), (), ((50, 120),), s) for s in range(n)]
        spent = []
        start = time.perf_counter()
        finish(Results(Path(folder) / "results"), source, [(work_key(w, "m", "c"), w) for w in works], "loky", 2,
               lambda key, outcome, old: spent.append(outcome.seconds))
        each = 1000 * (time.perf_counter() - start - sum(spent) / 2) / n
    return row(f"scheduler overhead a job, loky, 2 workers, {n} jobs", each, "ms", "< 20 ms", each < 20)


def search_row(trials=20, seeds=5):
    "A whole search: asking, jobs, results, ledger, papers; the ledger keeps every trial and seed."
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.db") as book:
        task = market(2_500)
        warm(place(task, Path(folder) / "study" / "market", "loky", 2))
        design, n = Design(cv="kcv", groups=3, trials=trials, seeds=seeds, batch=trials, embargo="2d"), trials * seeds + 3
        start = time.perf_counter()
        found = search(SPACE, task, design, Path(folder) / "study", book, "bench", 2, "loky")
        took, work = time.perf_counter() - start, sum(t.seconds for t in found.trials)
        each = 1000 * (took - work / 2) / n
    return row(f"scheduler and ledger overhead a job of a whole search, loky, {n} jobs", each, "ms", "< 20 ms", each < 20)


def scaling_row():
    "Twelve trainings of PPO, by one worker and by two."
    from stratfam.policies.sb3 import SB3Fit
    with tempfile.TemporaryDirectory() as folder:
        task = market(6_000, ("return_1", "return_24", "rsi", "volatility_24"))
        source = place(task, folder, "loky", 2)
        works = [Work(SB3Fit("PPO", steps=30_000), ((200, 4_000),), ((4_500, 5_900),), s) for s in range(12)]
        list(perform(source, works[:2], "serial")); list(perform(source, works[:4], "loky", 2))
        elapsed = {}
        for jobs in (1, 2):
            start = time.perf_counter()
            list(perform(source, works, "loky", jobs))
            elapsed[jobs] = time.perf_counter() - start
    gain = elapsed[1] / elapsed[2]
    return row(f"two workers against one, 12 fits of PPO, {os.cpu_count()} cores", gain, "x", ">= 1.6x", gain >= 1.6, gain)


def bench() -> list[dict]:
    "All rows."
    return [scheduler_row(), search_row(), scaling_row()]


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
