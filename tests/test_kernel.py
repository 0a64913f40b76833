"""The compiled kernel and gate against the slow oracle, on random markets, wishes and limits; R1..R15 on every step."""
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_oracle import Oracle

from stratfam.core import Bars, as_step
from stratfam.market.account import CAUSES, Costs, logged, new_log, new_state, pack_market, run
from stratfam.market.backtest import arena, decide_accounts, step_accounts
from stratfam.risk.gate import STATES, no_inputs, pack_senses, work_space
from stratfam.risk.limits import Lots, limits_from, pack_rules

DAY0 = np.datetime64("2023-01-01T20:00", "ns")


def market(rng, T, N, perp, wild, missing):
    "Bars with gaps, touching levels, missing rows and (perp) partly unknown funding."
    tick = 0.5
    close = 100 + tick * np.round(np.cumsum(rng.normal(0, wild, (T, N)), axis=0) / tick)
    close = np.maximum(close, 5 * tick)
    gap = tick * np.round(rng.normal(0, wild / 2, (T, N)) / tick) * (rng.random((T, N)) < 0.3)
    open_ = np.maximum(np.vstack([close[:1], close[:-1]]) + gap, tick)
    high = np.maximum(open_, close) + tick * rng.integers(0, 4, (T, N))
    low = np.maximum(np.minimum(open_, close) - tick * rng.integers(0, 4, (T, N)), tick / 2)
    ok = rng.random((T, N)) >= missing
    ok[0] = True
    o, h, l, c = (np.where(ok, x, np.nan) for x in (open_, high, low, close))
    funding = np.where(rng.random((T, N)) < 0.3, np.nan, rng.normal(0, 1e-3, (T, N))) if perp else np.zeros((T, N))
    time = DAY0 + np.arange(T) * np.timedelta64(1, "h")
    return Bars(time, "1h", o, h, l, c, np.where(ok, rng.uniform(0, 50, (T, N)), np.nan), funding, ok, tuple(f"S{n}" for n in range(N)),
                "perp" if perp else "spot")


def some(rng, value, chance=0.5):
    return value if rng.random() < chance else None


def random_limits(rng, perp, symbols):
    lev = float(rng.choice([1.0, 2.0, 5.0, 20.0])) if perp else 1.0
    return limits_from(
        max_leverage=lev, max_weight=float(rng.choice([0.3, 1.0, 20.0])), max_gross=some(rng, 0.8), max_corr_gross=some(rng, 0.5),
        max_turnover=some(rng, 0.4), min_trade=float(rng.choice([0.0, 0.05])), min_confidence=float(rng.choice([0.0, 0.5])),
        max_spread=0.002, max_jump=some(rng, 2.0), target_vol=some(rng, 0.5), regime_cut=float(rng.choice([0.0, 0.5])),
        drawdown_cut=float(rng.choice([0.0, 0.7])), kelly=some(rng, 0.5, 0.3), allow_flip=bool(rng.random() < 0.7),
        allowed=some(rng, symbols[:1], 0.2), stop_loss=some(rng, float(rng.choice([0.0001, 0.01, 0.05])), 0.7),
        take_profit=some(rng, 0.03, 0.7), trailing=some(rng, 0.04, 0.4), max_bars=some(rng, int(rng.integers(1, 6)), 0.3),
        take_fraction=float(rng.choice([1.0, 0.5])), max_drawdown=some(rng, float(rng.choice([0.05, 0.3])), 0.7),
        daily_loss=some(rng, float(rng.choice([0.02, 0.1])), 0.7), daily_loss_halts=bool(rng.random() < 0.3),
        losing_streak=some(rng, 2, 0.4), cooldown_bars=3, lock_bars=int(rng.integers(0, 4)), max_bad_outputs=some(rng, 4, 0.5))


def random_inputs(rng, T, N):
    given = {}
    if rng.random() < 0.5: given["volatility"] = rng.choice([0.2, 0.8, np.nan, 0.0], (T, N), p=[0.5, 0.4, 0.05, 0.05])
    if rng.random() < 0.5: given["regime"] = rng.choice([0.0, 0.4, 1.0, np.nan], T)
    if rng.random() < 0.5: given["spread"] = rng.choice([0.001, 0.01, np.nan], (T, N), p=[0.8, 0.1, 0.1])
    if rng.random() < 0.5: given["age"] = rng.choice([0.0, 1.0, 3.0], (T, N), p=[0.8, 0.1, 0.1])
    if rng.random() < 0.5: given["jump"] = rng.exponential(1.0, (T, N))
    if rng.random() < 0.5:
        A = rng.normal(size=(N, 3))
        C = A @ A.T + 0.1 * np.eye(N)
        d = np.sqrt(np.diag(C))
        given["correlation"] = (C / np.outer(d, d))[None]
    return given


def random_wishes(rng, T, N, perp):
    choices = [0.0, 0.25, 0.5, 1.0, -0.5, -1.0, 3.0, np.nan, np.inf, -0.0, 1e308]
    W = rng.choice(choices, (T, N), p=[.12, .12, .15, .15, .1, .06, .05, .2, .02, .02, .01])
    return np.ascontiguousarray(W), rng.choice([1.0, 0.6, 0.2, np.nan], (T, N), p=[0.6, 0.2, 0.15, 0.05])


def case(seed):
    rng = np.random.default_rng(seed)
    T, N, perp = int(rng.integers(4, 40)), int(rng.choice([1, 1, 2, 3, 4])), bool(rng.random() < 0.5)
    bars = market(rng, T, N, perp, float(rng.choice([0.5, 2.0, 6.0])), float(rng.choice([0.0, 0.1])))
    limits = random_limits(rng, perp, bars.symbols)
    costs = Costs(taker=float(rng.choice([0.0, 0.001])), maker=float(rng.choice([0.0, 0.0002])), slippage_bps=float(rng.choice([0.0, 5.0, 50.0])),
                  impact=float(rng.choice([0.0, 0.01, 2.0])) if not np.isnan(bars.volume).any() else 0.0, maintenance=0.02, liquidation_fee=0.001)
    lots = Lots(step=float(rng.choice([0.001, 0.1])), min_qty=float(rng.choice([0.0, 0.2])), min_notional=float(rng.choice([0.0, 20.0])))
    (W, C), signals = random_wishes(rng, T, N, perp), bool(rng.random() < 0.6)
    if perp and rng.random() < 0.5:  # bold: near the margin, where liquidation and stops meet
        W = np.clip(W, -1.0, 1.0) * 20.0
        limits = limits_from(limits, max_leverage=20.0, max_weight=20.0, max_gross=None, max_corr_gross=None, max_turnover=None, max_drawdown=None,
                             daily_loss=None, liq_distance=0.0, target_vol=None, kelly=None, stop_loss=some(rng, float(rng.choice([0.02, 0.2]))))
    if signals and rng.random() < 0.6: W[rng.random(W.shape) < 0.85] = np.nan  # long silences
    return rng, bars, limits, costs, lots, W, C, random_inputs(rng, T, N), signals


def run_kernel(bars, limits, costs, lots, W, C, given, signals, capital=1000.0, step=1):
    "Series, lots held and targets at each close, fills, final state; `step` bars by one call of `run`, so that all or none can be watched."
    T, N = W.shape
    mkt, st_, log = pack_market(bars, costs), new_state(1, N, capital), new_log(20 * T * N)
    rules = pack_rules(limits, bars.symbols, lots, costs.reserve, bars.market, costs.maintenance)
    seen = pack_senses(no_inputs(N, **given), mkt.bars["mark"], mkt.bars["ok"])
    series, held, why = np.zeros((T, 6)), np.zeros((T, N), np.int64), np.zeros((T, N), np.int64)
    pending = []
    for t in range(0, T, step):
        run(*mkt, rules.sym, rules.lim, *st_, 0, t, min(t + step, T), *seen, W, C, signals, work_space(N), log, series, held, why)
        pending.append(st_.slots["pending"][0].copy())
    return series, held, np.array(pending), logged(log), st_


def run_bars(bars, limits, costs, lots, W, C, given, signals, capital=1000.0):
    "The final state when each bar is played and decided by the functions of the environment, which know no shortcut."
    a = arena(bars, limits, costs, lots, capital, no_inputs(W.shape[1], **given))
    st_, log, alive = new_state(1, W.shape[1], capital), new_log(0), np.ones(1, bool)
    for t in range(len(W)):
        step_accounts(*a.market, a.rules.sym, a.rules.lim, *st_, np.array([t]), alive, log)
        decide_accounts(a.market.day, a.rules.sym, a.rules.lim, *st_, np.array([t]), alive, *a.senses, W[t:t + 1], C[t:t + 1], signals,
                        work_space(W.shape[1]))
    return st_


def run_oracle(bars, limits, costs, lots, W, C, given, signals, capital=1000.0):
    T, N = W.shape
    allow = limits.position.allowed
    o = Oracle(limits, costs, [lots.step] * N, [lots.min_qty] * N, [lots.min_notional] * N, [allow is None or s in allow for s in bars.symbols],
               bars.market == "perp", capital, costs.funding_default_8h * float(bars.step / as_step("8h")))
    mark = pack_market(bars).bars["mark"]
    days = (bars.time + bars.step).astype("datetime64[D]").astype(int)
    rows, held, pending = [], [], []
    for t in range(T):
        b = [dict(open=bars.open[t, n], high=bars.high[t, n], low=bars.low[t, n], mark=mark[t, n], volume=bars.volume[t, n],
                  funding=bars.funding[t, n], ok=bool(bars.ok[t, n])) for n in range(N)]
        seen = {k: (v[0] if k == "correlation" else v[t]) for k, v in given.items()}
        o.advance(t, b)
        o.decide(t, days[t], W[t], C[t], b, seen, signals)
        rows.append((o.equity, o.fees, o.slip, o.funding))
        held.append([p.lots for p in o.pos])
        pending.append(list(o.pending))
    return np.array(rows), np.array(held), np.array(pending), o


def series_cash(series, held, args):
    "The least cash at any close."
    bars, lots = args[0], args[3]
    return float((series[:, 0] - (held * lots.step * np.nan_to_num(pack_market(bars).bars["mark"])).sum(1)).min())


def compare(seed):
    _, *args = case(seed)
    series, held, pending, fills, st_ = run_kernel(*args)
    rows, held2, pending2, o = run_oracle(*args)
    where = f"seed {seed}"
    whole, whole_held, _, whole_fills, whole_state = run_kernel(*args, step=len(args[0]))
    assert np.array_equal(whole, series) and np.array_equal(whole_held, held) and whole_fills.tobytes() == fills.tobytes(), where
    for other in (whole_state, run_bars(*args)):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(other, st_)), f"{where}: one call, many calls and single bars must agree to the bit"
    if args[0].market == "spot": assert series_cash(series, held, args) >= -1e-9 * 1000.0, f"{where}: spot cash below zero"
    np.testing.assert_array_equal(held, held2, err_msg=where)
    np.testing.assert_array_equal(pending, pending2, err_msg=where)
    np.testing.assert_allclose(series[:, [0, 2, 3, 4]], rows, rtol=1e-9, atol=1e-9, err_msg=where)
    assert [(f["t"], f["n"], f["lots"], CAUSES[f["cause"]]) for f in fills] == [f[:4] for f in o.fills], where
    np.testing.assert_allclose(fills["price"], [f[4] for f in o.fills], rtol=1e-9, err_msg=where)
    assert STATES[st_.gate["state"][0]] == o.state and int(st_.acct["trades"][0]) == o.trades, where
    total = 1000.0 + series[:, 1] - series[:, 2] - series[:, 3] - series[:, 4]  # the second book (conservation, R18)
    insured = st_.acct["insurance"][0]
    tail = series[:, 0] - total
    assert np.all((np.abs(tail) <= 1e-9 * 1000) | (np.abs(tail - insured) <= 1e-9 * 1000 * max(1.0, insured))), where


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**32))
def test_kernel_equals_oracle(seed):
    compare(seed)


@pytest.mark.proof
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**48))
def test_kernel_equals_oracle_many(seed):
    compare(seed)


def silence(seed):
    "One symbol, 300 bars, a signal now and then: what `glide` passes over, ended by every limit and protective exit."
    rng = np.random.default_rng(seed)
    perp = seed % 2 == 1
    bars = market(rng, 300, 1, perp, float(rng.choice([0.3, 1.0])), 0.02)
    rules = dict(max_drawdown=some(rng, 0.03), daily_loss=some(rng, 0.01), daily_loss_halts=bool(rng.random() < 0.2), trailing=some(rng, 0.03),
                 stop_loss=some(rng, 0.02), take_profit=some(rng, 0.03), max_bars=some(rng, 20, 0.3), lock_bars=3)
    lev = float(rng.choice([1.0, 5.0, 20.0])) if perp else 1.0
    W = np.where(rng.random((300, 1)) < 0.04, rng.choice([lev, lev / 2, 0.0, -lev], (300, 1)), np.nan)
    limits = limits_from(max_leverage=lev, max_weight=lev, liq_distance=0.0, **rules)
    return bars, limits, Costs(maintenance=0.02), Lots(0.001), W, np.ones((300, 1)), {}, True


def test_glide_equals_single_bars():
    "Long silences in one call and bar by bar, through functions that know no shortcut: equal to the last bit."
    states, causes = [], set()
    for seed in range(120):
        args = silence(seed)
        _, _, _, fills, whole = run_kernel(*args, step=300)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, run_bars(*args))), f"seed {seed}"
        states.append(STATES[whole.gate["state"][0]])
        causes |= {CAUSES[c] for c in fills["cause"]}
    assert min(states.count(s) for s in ("ACTIVE", "HALTED")) > 10
    assert causes == {"LIQUIDATION", "STOP", "TARGET", "POLICY", "TIME_STOP", "LIMIT"}, "every end of a silence must occur"
