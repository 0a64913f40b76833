"""vectorbt's side of bench_kernel, run by the Python of its own environment: reads .npy files from a folder, prints JSON on request.

Lines on standard input: `one` times `Portfolio.from_signals` once, `sweep` one chunk of parameter sets, `quit` ends.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import vectorbt as vbt

folder = Path(sys.argv[1])
load = lambda name: np.load(folder / f"{name}.npy")
RULES = dict(sl_stop=0.02, tp_stop=0.04, fees=0.001, init_cash=1e4, freq="5min", stop_entry_price="fillprice")


def one():
    started = time.process_time()
    pf = vbt.Portfolio.from_signals(close=prices["close"], open=prices["open"], high=prices["high"], low=prices["low"], price=prices["open"],
                                    entries=prices["entries"], exits=prices["exits"], **RULES)
    took = time.process_time() - started
    r = pf.trades.records
    return dict(seconds=took, final=float(pf.final_value()), trades=int((r["status"] == 1).sum()), exits=r["exit_idx"].tolist())


def sweep():
    "The first sets of the sweep, each moving average computed once; entries and exits act at the next open."
    close, count = load("sweep_close"), int(load("chunk"))
    fast, slow = load("fast")[:count].tolist(), load("slow")[:count].tolist()
    started = time.process_time()
    f, s = vbt.MA.run(close, fast, run_unique=True, short_name="f"), vbt.MA.run(close, slow, run_unique=True, short_name="s")
    shift = lambda frame: frame.vbt.signals.fshift(1)
    entries, exits = shift(f.ma_crossed_above(s)), shift(f.ma_crossed_below(s))
    extra = {k: load(f"sweep_{k}")[:, None] for k in ("open", "high", "low")}
    pf = vbt.Portfolio.from_signals(close=close[:, None], price=extra["open"], entries=entries.to_numpy(), exits=exits.to_numpy(), **extra, **RULES)
    final = np.asarray(pf.final_value())
    return dict(seconds=time.process_time() - started, sets=count, final=final.tolist())


prices = {k: load(k) for k in ("open", "high", "low", "close", "entries", "exits")}
print(json.dumps(dict(version=vbt.__version__)), flush=True)
for line in sys.stdin:
    if line.strip() == "quit": break
    print(json.dumps({"one": one, "sweep": sweep}[line.strip()]()), flush=True)
