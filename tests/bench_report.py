"""How long a report of a finished study takes, from its saved run to the page: `bench()` returns the rows.

Processor time counts the notebook's own process too. It is what a busy machine does not change; wall time is the rest of the truth.
"""
import json
import resource
import tempfile
import time
from pathlib import Path

from stratfam.figures import sample_run
from stratfam.reporting import run_report, save_run

BARS = 25_000


def used():
    "Processor seconds of this process and of those it waited for."
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def bench() -> list[dict]:
    "All rows."
    with tempfile.TemporaryDirectory() as folder:
        place = save_run(sample_run(bars=BARS), Path(folder) / "run")
        cpu, wall = used(), time.perf_counter()
        page = run_report("validation", {"run": str(place)}, Path(folder) / "runs")
        cpu, wall, size = used() - cpu, time.perf_counter() - wall, page.stat().st_size / 1e6
    row = lambda name, value, unit, goal, ok: dict(name=name, value=value, unit=unit, peer=None, peer_version=None, ratio=None, goal=goal, ok=ok,
                                                   command="python tests/bench_report.py")
    what = f"report of a study of {BARS:,} bars"
    return [row(f"{what}, processor time", cpu, "s", "< 20 s", cpu < 20), row(f"{what}, wall time", wall, "s", "< 20 s", wall < 20),
            row(f"{what}, size of the page", size, "MB", "< 5 MB", size < 5)]


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
