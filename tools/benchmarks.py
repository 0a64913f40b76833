"""Measure everything and write docs/benchmarks.json, which the documentation shows: `python tools/benchmarks.py` (about ten quiet minutes)."""
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def machine():
    "What the figures depend on."
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    versions = {n: importlib.metadata.version(n) for n in ("numpy", "numba", "torch")}
    return {"processor": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version(), **versions,
            "measured": f"{datetime.now(UTC):%Y-%m-%d}"}


def main():
    out = subprocess.run([sys.executable, "-m", "stratfam.cli", "bench", "all", "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    said = {"machine": machine(), "rows": json.loads(out.stdout)}
    target = ROOT / "docs" / "benchmarks.json"
    target.with_suffix(".tmp").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    os.replace(target.with_suffix(".tmp"), target)
    print(f"{len(said['rows'])} rows in {target.relative_to(ROOT)}")


if __name__ == "__main__": main()
