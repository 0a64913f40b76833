"""Kernel, gate and sweep beside vectorbt and a bare loop, measured in one run: `rows()` returns them, `python tests/bench_kernel.py` prints JSON.

vectorbt runs in its own environment: STRATFAM_PEERS names a Python that has it. Without one its rows say why they were skipped.
Times are medians of interleaved rounds, in processor seconds of one thread, ours and vectorbt's alike, so that a busy neighbour takes
less from either; the row on two threads is by the wall clock.
The semantics that coincide with vectorbt: all-in longs at the next open, a fee each side, stop and target from the entry price
(vectorbt's `stop_entry_price="fillprice"`; its default is the close), stop before target. What differs: where an exit signal meets its
stop in one bar, the signal fills first here, at the open, where it comes first in time, and vectorbt lets the stop rule; a target fills
here only when traded through; the sweep sells what is left at the end, vectorbt marks it.
`without_ties` takes the few such signals away (26 of a million bars), and then all trades are equal.
"""
import contextlib
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from numba import njit

from stratfam.core import Bars, Decision
from stratfam.market.account import CAUSES, Costs, logged, new_log, new_state, pack_market, run
from stratfam.market.backtest import FLAT, HOLD, LONG, arena, sweep
from stratfam.risk.gate import RiskManager, no_inputs, pack_senses, work_space
from stratfam.risk.limits import Lots, limits_from, pack_rules

COMMAND = "STRATFAM_PEERS=<python with vectorbt> python tests/bench_kernel.py"
PEER = Path(__file__).parent / "peers" / "vectorbt_kernel.py"
OPEN = dict(max_drawdown=None, daily_loss=None)


def row(name, value, unit, goal, ok, ratio=None, peer=None, version=None):
    return dict(name=name, value=value, unit=unit, peer=peer, peer_version=version, ratio=ratio, goal=goal, ok=ok, command=COMMAND)


def market(T, N=1, seed=0, kind="spot"):
    "A random walk without gaps between close and open."
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.002, (T, N)), 0))
    open_ = np.vstack([close[:1], close[:-1]])
    high = np.maximum(open_, close) * (1 + np.abs(rng.normal(0, 0.001, (T, N))))
    low = np.minimum(open_, close) * (1 - np.abs(rng.normal(0, 0.001, (T, N))))
    time_ = np.datetime64("2015-01-01", "ns") + np.arange(T) * np.timedelta64(5, "m")
    zero, names = np.zeros((T, N)), tuple(f"S{i}" for i in range(N))
    return Bars(time_, "5m", open_, high, low, close, zero + 1, zero, zero == 0, names, kind)


@njit(cache=True)
def crosses(close, fast, slow):
    "Signal codes (B,T) at each close: LONG where the fast mean rises above the slow one, FLAT where it falls below."
    T, sums = len(close), np.zeros(len(close) + 1)
    for t in range(T): sums[t + 1] = sums[t] + close[t]
    out = np.zeros((len(fast), T), np.int8)
    for b in range(len(fast)):
        f, s, was = fast[b], slow[b], False
        for t in range(s - 1, T):
            up = (sums[t + 1] - sums[t + 1 - f]) / f > (sums[t + 1] - sums[t + 1 - s]) / s
            if t >= s and up != was: out[b, t] = LONG if up else FLAT
            was = up
    return out


@njit(cache=True)
def bare_loop(o, h, l, c, codes, fee, stop, target):
    "The least a backtest of this rule can do: no gate, no margin, no funding, no book-keeping. Final cash and trades."
    cash, qty, entry, trades, order = 1e4, 0.0, 0.0, 0, 0
    for t in range(len(c)):
        if order == 1 and qty == 0.0:
            qty, entry = cash / (o[t] * (1 + fee)), o[t]
            cash = 0.0
        elif order == 2 and qty > 0.0:
            cash, qty, trades = qty * o[t] * (1 - fee), 0.0, trades + 1
        if qty > 0.0:
            if l[t] <= entry * (1 - stop):
                cash, qty, trades = qty * min(o[t], entry * (1 - stop)) * (1 - fee), 0.0, trades + 1
            elif h[t] > entry * (1 + target):
                cash, qty, trades = qty * entry * (1 + target) * (1 - fee), 0.0, trades + 1
        order = codes[t]
    return cash + qty * c[-1] * (1 - fee), trades


@contextlib.contextmanager
def vectorbt(folder):
    "A function that asks vectorbt's process, and its version; None where there is no such Python."
    python = os.environ.get("STRATFAM_PEERS")
    if not python:
        yield None, "STRATFAM_PEERS names no Python with vectorbt"
        return
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
    with subprocess.Popen([python, PEER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as p:
        def ask(what):
            p.stdin.write(what + "\n")
            p.stdin.flush()
            return json.loads(p.stdout.readline())
        version = json.loads(p.stdout.readline())["version"]
        yield ask, version
        p.stdin.write("quit\n")


def without_ties(bars, codes, go):
    "The signals without those exits whose bar also reaches the position's stop or target."
    _, _, log = go(codes)
    fills = logged(log)
    entry, leave = fills["price"][fills["lots"] > 0], fills[fills["after"] == 0]
    t, entry = leave["t"], entry[:len(leave)]
    tie = (CAUSES.index("POLICY") == leave["cause"]) & ((bars.low[t, 0] <= entry * 0.98) | (bars.high[t, 0] >= entry * 1.04))
    codes = codes.copy()
    codes[t[tie] - 1] = HOLD
    return codes


def one_asset(bars):
    "The compiled `run` of one account over all bars; a function that returns seconds, account and fills."
    T, costs = len(bars), Costs(slippage_bps=0.0)
    mkt = pack_market(bars, costs)
    rules = pack_rules(limits_from(stop_loss=0.02, take_profit=0.04, **OPEN), bars.symbols, Lots(1e-12), costs.reserve)
    seen, work, C = pack_senses(no_inputs(1), mkt.bars["mark"], mkt.bars["ok"]), work_space(1), np.ones((T, 1))
    out = np.zeros((T, 6)), np.zeros((T, 1), np.int64), np.zeros((T, 1), np.int64)

    def go(codes):
        W = np.where(codes == LONG, 1.0, np.where(codes == FLAT, 0.0, np.nan))[:, None]
        st, log = new_state(1, 1, 1e4), new_log(20_000)
        started = time.process_time()
        run(*mkt, rules.sym, rules.lim, *st, 0, 0, T, *seen, W, C, True, work, log, *out)
        return time.process_time() - started, st, log
    return go, without_ties(bars, crosses(bars.close[:, 0].copy(), np.array([50]), np.array([200]))[0], go)


def one_rows(rounds=7, T=1_000_000):
    bars = market(T)
    go, codes = one_asset(bars)
    plain = [np.ascontiguousarray(getattr(bars, k)[:, 0]) for k in ("open", "high", "low", "close")]
    bare = lambda: bare_loop(*plain, codes, 0.001, 0.02, 0.04)
    go(codes), bare()
    with tempfile.TemporaryDirectory() as folder:
        late = np.concatenate([[0], codes[:-1]])
        for name, x in dict(zip(("open", "high", "low", "close"), plain), entries=late == LONG, exits=late == FLAT).items():
            np.save(Path(folder) / f"{name}.npy", x)
        with vectorbt(folder) as (ask, version):
            if ask: ask("one")
            ours, floor, theirs = [], [], []
            for _ in range(rounds):
                took, st, log = go(codes)
                ours.append(took)
                started = time.process_time()
                cash, trades = bare()
                floor.append(time.process_time() - started)
                if ask: theirs.append(ask("one"))
    ours, floor = median(ours), median(floor)
    equity, closed = float(st.acct["equity"][0]), int(st.acct["trades"][0])
    same = closed == trades and abs(equity / cash - 1) < 1e-3  # The loop sells its last position; the kernel marks it
    rows = [row("1,000,000 bars, stop and target: kernel with gate against a bare loop without", ours, "s", "reported", same, floor / ours)]
    what = "1,000,000 bars, one asset, signals with stop, target and fees"
    if not ask: return [*rows, row(what, ours, "s", f">= 5x ({version})", None, peer="vectorbt")]
    other = median(r["seconds"] for r in theirs)
    last = theirs[-1]
    fills = logged(log)
    ends = fills["t"][fills["after"] == 0]
    agree = closed == last["trades"] and abs(equity / last["final"] - 1) <= 1e-9 and np.array_equal(ends, last["exits"][:closed])
    apart = abs(equity / last["final"] - 1)
    return [*rows, row(what, ours, "s", ">= 5x", bool(other / ours >= 5 and agree), other / ours, "vectorbt", version),
            row(f"the same: final equity apart (all {closed:,} closed trades equal: {agree})", apart, "relative", "<= 1e-9", bool(agree),
                peer="vectorbt", version=version)]


def sweep_arena(T):
    bars = market(T)
    return bars, arena(bars, limits_from(stop_loss=0.02, take_profit=0.04, **OPEN), Costs(slippage_bps=0.0), Lots(1e-12), 1e4)


def pairs(count):
    rng = np.random.default_rng(0)
    fast = rng.integers(5, 100, count)
    return fast, fast + rng.integers(20, 200, count)


def swept(bars, a, fast, slow, threads=1):
    "Signals and totals of all parameter sets, and the seconds they took by the wall clock and of processors."
    wall, cpu = time.perf_counter(), time.process_time()
    out = sweep(crosses(bars.close[:, 0].copy(), fast, slow), a, threads=threads)
    return time.perf_counter() - wall, time.process_time() - cpu, out


def sweep_rows(sets=1000, T=100_000, chunk=200, rounds=3):
    (bars, a), (fast, slow) = sweep_arena(T), pairs(sets)
    swept(bars, a, fast[:2], slow[:2])
    one, two, lone, theirs = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for k in ("open", "high", "low", "close"):
            np.save(Path(folder) / f"sweep_{k}.npy", getattr(bars, k)[:, 0])
            np.save(Path(folder) / f"{k}.npy", getattr(bars, k)[:9, 0])
        none = np.zeros(9, bool)
        for k, x in dict(fast=fast, slow=slow, chunk=chunk, entries=none, exits=none).items(): np.save(Path(folder) / f"{k}.npy", x)
        with vectorbt(folder) as (ask, version):
            if ask: ask("sweep")
            for _ in range(rounds):
                took, cpu, single = swept(bars, a, fast, slow)
                one.append(took)
                lone.append(cpu)
                took, _, double = swept(bars, a, fast, slow, 2)
                two.append(took)
                if ask: theirs.append(ask("sweep"))
    gain, memory = median(one) / median(two), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    what = f"{sets:,} parameter sets x {T:,} bars, signals included"
    rows = [row("the sweep on two threads: speed over one, bit-identical", gain, "x", ">= 1.35", bool(gain >= 1.35 and single.equals(double))),
            row("the sweep: peak resident memory of this process", memory, "MB", "< 1,024 MB", memory < 1024)]
    if not ask: return [row(what, median(lone), "s", f">= 12x ({version})", None, peer="vectorbt"), *rows]
    other = median(r["seconds"] for r in theirs) * sets / chunk
    ratio, what = other / median(lone), f"{what} (vectorbt: {chunk} sets, scaled)"
    return [row(what, median(lone), "s", ">= 12x", bool(ratio >= 12), ratio, "vectorbt", version), *rows]


def full_gate(B, N, T, persistence=0.95, seed=1):
    "A function that walks B accounts of N symbols through T bars with every rule of the gate on; returns seconds and the accounts."
    bars, rng = market(T, N, seed, "perp"), np.random.default_rng(0)
    mkt, C = pack_market(bars), np.ones((T, N))
    W = rng.normal(0, 0.3, (T, N))
    for t in range(1, T): W[t] = persistence * W[t - 1] + (1 - persistence**2) ** 0.5 * W[t]
    corr = np.full((1, N, N), 0.5)
    np.fill_diagonal(corr[0], 1.0)
    given = dict(volatility=np.full((T, N), 0.5), regime=np.full(T, 0.3), correlation=corr, spread=np.full((T, N), 1e-4), age=np.zeros((T, N)),
                 jump=np.zeros((T, N)), verdict_ok=np.ones(T, bool))
    seen, work = pack_senses(no_inputs(N, **given), mkt.bars["mark"], mkt.bars["ok"]), work_space(N)
    limits = limits_from(stop_loss=0.05, take_profit=0.1, target_vol=0.6, regime_cut=0.5, drawdown_cut=0.5, max_corr_gross=0.8, max_turnover=2.0,
                         max_jump=9.0, max_bars=10_000, **OPEN)
    rules = pack_rules(limits, bars.symbols, Lots(1e-6), 0.001, "perp", 0.005)
    none = np.zeros((0, 6)), np.zeros((0, N), np.int64), np.zeros((0, N), np.int64)

    def go():
        st, log = new_state(B, N, 1e6), new_log(0)
        started = time.process_time()
        for b in range(B): run(*mkt, rules.sym, rules.lim, *st, b, 0, T, *seen, W, C, False, work, log, *none)
        return time.process_time() - started, st
    return go


def account_rows(B=64, N=10, T=2000):
    rows = []
    for persistence, goal in ((0.95, 1e6), (0.0, None)):
        go = full_gate(B, N, T, persistence)
        go()
        took, st = median(go()[0] for _ in range(7)), go()[1]
        funded, fills = float(st.acct["equity"].min()), st.acct["fills"].mean() / T
        assert funded > 1e4 and st.acct["liquidations"].sum() == 0, "an empty account would be fast for the wrong reason"
        rows.append(row(f"{B} accounts x {N} symbols, full gate, {fills:.1f} fills a step", B * T / took, "account-steps/s",
                        ">= 1,000,000" if goal else "reported", bool(B * T / took >= goal) if goal else True))
    return rows


def decide_row(N=20, calls=2000):
    rm, rng = RiskManager(limits_from(stop_loss=0.05, target_vol=0.6), tuple(f"S{i}" for i in range(N)), 1e5, market="perp"), np.random.default_rng(0)
    wish, inputs = Decision(rng.normal(0, 0.1, (1, N)), np.ones((1, N))), no_inputs(N, volatility=np.full((1, N), 0.5))
    held, mark, took = np.zeros(N, np.int64), np.full(N, 100.0), []
    for t in range(calls):
        started = time.process_time()
        rm.decide(wish, held, mark, 1e5, inputs, t, 1)
        took.append(time.process_time() - started)
    micro = median(took) * 1e6
    return row(f"RiskManager.decide, one account, {N} symbols", micro, "microseconds", "< 200", bool(micro < 200))


def exponent(sizes, seconds): return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth_rows():
    "Fitted exponents of cost in bars, symbols and accounts; 1 is linear."
    base, rows = dict(B=8, N=10, T=2000), []
    for key, name, sizes in (("T", "bars", (2000, 8000, 32_000)), ("N", "symbols, N from 10 to 40", (10, 20, 40)), ("B", "accounts", (8, 32, 128))):
        seconds = []
        for size in sizes:
            go = full_gate(**{**base, key: size})
            go()
            seconds.append(median(go()[0] for _ in range(3)))
        e = exponent(sizes, seconds)
        rows.append(row(f"growth of cost in {name}", e, "exponent", "<= 1.2", bool(e <= 1.2)))
    return rows


def bench() -> list[dict]:
    "Every measurement, in order."
    return [*one_rows(), *sweep_rows(), *account_rows(), decide_row(), *growth_rows()]


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
