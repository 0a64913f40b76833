"""Measure and write docs/benchmarks.json, which the documentation and the README show.

    python tools/benchmarks.py               everything beside its peers, about ten minutes; wants a quiet machine
    python tools/benchmarks.py --quick       growth of cost alone, three sizes an axis, half a minute: marked as such, not to be committed
    python tools/benchmarks.py pbo scaling   these alone; rows of the others are kept from the last measurement
"""
import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "benchmarks.json"


def machine():
    "What the figures depend on."
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    versions = {n: importlib.metadata.version(n) for n in ("numpy", "numba", "torch")}
    return {"processor": cpu, "cores": os.cpu_count(), "load at start": round(os.getloadavg()[0], 1), "system": platform.system(),
            "python": platform.python_version(), **versions, "measured": f"{datetime.now(UTC):%Y-%m-%d}"}


def measured(name):
    "The rows of one benchmark, or of `all`."
    out = subprocess.run([sys.executable, "-m", "stratfam.cli", "bench", name, "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout)


def quick():
    "How cost grows, from small sizes timed once."
    ask = "import json, bench_scaling; print(json.dumps(bench_scaling.bench(quick=True)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    out = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(out.stdout.splitlines()[-1])


def kept(names):
    "Rows of the last measurement that are not measured now."
    if not names or not TARGET.is_file(): return []
    again = {f"stratfam bench {n}" for n in names}
    return [r for r in json.loads(TARGET.read_text(encoding="utf-8"))["rows"] if r["command"] not in again]


def write(rows, facts, target=TARGET):
    "Replace the file whole."
    target.with_suffix(".tmp").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(target.with_suffix(".tmp"), target)
    print(f"{len(rows)} rows in {target}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", help="benchmarks by name; default: all")
    p.add_argument("--quick", action="store_true", help="growth alone, small sizes, once")
    p.add_argument("--out", type=Path, default=TARGET, help="where the JSON goes")
    a, facts = p.parse_args(argv), machine()
    if a.quick: return write(quick(), {**facts, "note": "quick: small sizes, timed once"}, a.out)
    write([*kept(a.names), *(r for n in a.names or ["all"] for r in measured(n))], facts, a.out)


if __name__ == "__main__": main()
