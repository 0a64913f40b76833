"""The gate under adversarial wishes and states: the risk invariants of every decision, by their ids (R1..R15)."""
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit
from test_kernel import case

from stratfam.core import KERNEL, STOP, TARGET, Decision, hold, lots_in
from stratfam.market.account import LIMIT_EXIT, TIME_EXIT, Costs, logged, new_log, new_state, pack_market, run
from stratfam.market.backtest import arena, backtest_weights, decide_accounts, frame_bars, step_accounts
from stratfam.risk.gate import (ACTIVE, CONTEXT, GATE, HALTED, ON, REDUCING, SENSE, Reason, RiskManager, gate, gate_state, measure, no_inputs,
                                pack_senses, slot_state, work_space)
from stratfam.risk.limits import LIMITS, SYMBOL, Lots, limits_from, pack_rules

INF, NAN = float("inf"), float("nan")
N = 3


@njit(**KERNEL)
def decide_all(sym, lims, g, slots, sense, context, corr, on, t, equity, W, C, signals, work):
    "One gate decision for each of K independent accounts."
    for i in range(len(g)): gate(sym[i], lims[i], g[i], slots, i, sense, context, corr, on[i], i, t[i], equity[i], W, C, i, signals, work)


def pick(rng, shape, *values):
    return rng.choice(np.array(values, "f8"), shape)


def draw_limits(rng, K):
    lim = np.zeros(K, LIMITS)
    off = lambda x, none, chance=0.5: np.where(rng.random(K) < chance, x, none)
    lim["spot"] = rng.random(K) < 0.4
    lim["max_leverage"] = np.where(lim["spot"] > 0, 1.0, pick(rng, K, 0.5, 1.0, 3.0, 20.0))
    lim["max_weight"] = pick(rng, K, 0.0, 0.1, 0.7, 1.0, 20.0)
    lim["max_gross"] = off(rng.uniform(0, 3, K), lim["max_leverage"])
    lim["max_corr_gross"] = off(rng.uniform(0, 2, K), INF)
    lim["max_turnover"] = off(rng.uniform(0, 2, K), INF)
    lim["min_trade"] = pick(rng, K, 0.0, 0.001, 0.05)
    lim["min_confidence"] = pick(rng, K, 0.0, 0.5)
    lim["max_spread"], lim["max_jump"], lim["max_age"] = 0.002, off(3.0, INF), 1.0
    lim["target_vol"], lim["regime_cut"], lim["drawdown_cut"] = off(0.5, NAN), pick(rng, K, 0.0, 0.5, 1.0), pick(rng, K, 0.0, 0.7, 1.0)
    lim["kelly"], lim["stop_loss"], lim["take_profit"] = off(0.5, NAN, 0.3), off(0.05, NAN), off(0.1, NAN)
    lim["allow_flip"], lim["max_bars"], lim["take_fraction"] = rng.random(K) < 0.6, INF, 1.0
    lim["trailing"], lim["max_drawdown"], lim["daily_loss"] = NAN, off(0.2, INF), off(0.05, INF)
    lim["losing_streak"], lim["liq_distance"], lim["max_bad_outputs"] = INF, 2.0, off(3.0, INF)
    lim["reserve"], lim["maintenance"] = pick(rng, K, 0.0, 0.0012, 0.05), np.where(lim["spot"] > 0, 0.0, 0.005)
    return lim


def draw(rng, K):
    "K adversarial situations of N symbols: limits, memory, holdings, senses, wishes."
    lim, sym = draw_limits(rng, K), np.zeros((K, N), SYMBOL)
    sym["lot"], sym["allowed"] = pick(rng, (K, N), 1e-6, 0.001, 0.1, 1.0), rng.random((K, N)) < 0.9
    sym["min_qty"], sym["min_notional"] = pick(rng, (K, N), 0.0, 0.2), pick(rng, (K, N), 0.0, 5.0)
    sense, context = np.zeros((K, N), SENSE), np.zeros(K, CONTEXT)
    sense["mark"] = np.where(rng.random((K, N)) < 0.03, pick(rng, (K, N), NAN, 0.0, -1.0, INF), np.exp(rng.normal(3, 2, (K, N))))
    sense["ok"] = rng.random((K, N)) < 0.95
    sense["volatility"] = pick(rng, (K, N), 0.1, 0.5, 2.0, 0.0, -1.0, NAN, INF)
    sense["spread"], sense["age"] = pick(rng, (K, N), 0.0, 0.001, 0.002, 0.003, NAN), pick(rng, (K, N), 0.0, 0.0, 1.0, 1.5, INF, NAN)
    sense["jump"] = pick(rng, (K, N), 0.0, 1.0, 3.0, 9.0, NAN)
    context["regime"], context["verdict_ok"] = pick(rng, K, 0.0, 0.5, 1.0, 2.0, -1.0, NAN), rng.random(K) < 0.7
    corr = rng.uniform(-1, 1, (K, N, N))
    corr[rng.random((K, N, N)) < 0.02] = NAN
    corr = (corr + corr.transpose(0, 2, 1)) / 2
    corr[:, range(N), range(N)] = 1.0
    on = np.zeros(K, ON)
    for k in ON.names: on[k] = rng.random(K) < 0.5
    equity = np.where(rng.random(K) < 0.02, 1e-6, np.exp(rng.normal(7, 2, K)))
    g, slots = gate_state(K, 1.0), slot_state(K, N)
    g["state"], g["kill"] = rng.choice([0, 0, 0, 1, 2], K), rng.random(K) < 0.03
    g["flatten"] = np.where((g["state"] > 0) & (rng.random(K) < 0.3), int(Reason.DRAWDOWN), 0)
    g["peak"] = equity * pick(rng, K, 1.0, 1.0, 1.1, 1.5)
    t = rng.integers(0, 100, K)
    g["cooldown_until"], slots["lock"] = np.where(rng.random(K) < 0.1, t + rng.integers(0, 2, K), -9), np.where(rng.random((K, N)) < 0.1, 100, -9)
    good = np.where(np.isfinite(sense["mark"]) & (sense["mark"] > 0), sense["mark"], 10.0)
    held = np.floor(rng.uniform(0, 1.5, (K, N)) * (equity * lim["max_leverage"])[:, None] / N / good / sym["lot"])
    side = np.where(lim["spot"][:, None] > 0, 1, rng.choice([-1, 1], (K, N)))
    slots["lots"] = np.where(rng.random((K, N)) < 0.5, 0, np.minimum(held, 1e12)).astype(np.int64) * side
    wild = pick(rng, (K, N), NAN, INF, -INF, -0.0, 0.0, 1e308, -1e308, 5e-324, 1e6)
    W = np.where(rng.random((K, N)) < 0.15, wild, rng.normal(0, 1, (K, N)) * pick(rng, (K, N), 0.1, 1.0, 10.0))
    C = pick(rng, (K, N), 1.0, 0.8, 0.5, 0.3, 0.0, NAN, INF, -1.0)
    return lim, sym, g, slots, sense, context, corr, on, t, equity, W, C


def violations(lim, sym, g0, slots0, sense, context, corr, on, t, equity, W, C, g, slots):
    "Number of broken promises by id, over all K situations."
    price, before, after = sense["mark"], slots0["lots"], slots["pending"]
    tiny = 1 + 1e-9  # Lots may be one part in 1e9 generous with floating point
    up = np.abs(after) > np.abs(before)
    flip = (after * np.sign(before)) < 0
    entry = up | flip
    L = lambda k: lim[k][:, None]
    real = np.isfinite(price) & (price > 0)
    val = np.where(real, price, 0.0) * sym["lot"] / equity[:, None]
    w0, w1 = np.where(before != 0, before * val, 0.0), after * val
    stays = np.where(flip, 0.0, np.minimum(np.abs(w0), np.abs(w1)))
    more = np.abs(w1) - stays
    any_entry, slack = entry.any(1), 1e-8 * np.abs(w1).sum(1)
    costed = stays.sum(1) + more.sum(1) * (1 + lim["reserve"])
    halted = (g["state"] == HALTED) | (g0["flatten"] != 0) | (g["kill"] != 0)
    dead = lambda k: on[k][:, None] > 0
    risk = np.sqrt(np.maximum(0.0, np.einsum("ki,kij,kj->k", np.abs(w1), np.abs(np.nan_to_num(corr, nan=1.0)), np.abs(w1))))
    denied = ((~real) | (sense["ok"] == 0) | (sym["allowed"] == 0) | (t[:, None] < slots0["lock"]) | (t < g0["cooldown_until"])[:, None]
              | ~(C >= L("min_confidence")) | (dead("spread") & ~(sense["spread"] <= L("max_spread")))
              | (dead("age") & ~(sense["age"] <= L("max_age")))
              | (dead("jump") & ~(sense["jump"] <= L("max_jump"))) | (dead("verdict_ok") & (context["verdict_ok"][:, None] == 0))
              | ((L("spot") > 0) & (after < 0)))
    order = np.where(flip, np.abs(after), np.abs(after - before))
    opened = order * sym["lot"]
    liq = 1 / (lim["liq_distance"] * np.nan_to_num(lim["stop_loss"]) + lim["maintenance"] + 1e-300)
    tight = np.isfinite(lim["stop_loss"]) & (lim["spot"] == 0)
    with np.errstate(invalid="ignore", over="ignore"):
        wished = np.abs(np.where(np.isfinite(W), W, 0.0))
    return {
        "R1 leverage with costs reserved": any_entry & ~(costed <= lim["max_leverage"] * tiny),
        "R1 book cap": any_entry & ~(np.abs(w1).sum(1) <= lim["max_gross"] * tiny),
        "R1 correlated book": any_entry & (on["correlation"] > 0) & ~(risk <= lim["max_corr_gross"] + slack),
        "R2 symbol cap": entry & ~(np.abs(w1) <= L("max_weight") * tiny),
        "R5 entry without every condition": entry & denied,
        "R5 entry while not ACTIVE": entry & ((g["state"] != ACTIVE) | (g["kill"] != 0) | (g0["flatten"] != 0))[:, None],
        "R6 a non-finite wish moved a position": ~np.isfinite(W) & (after != before) & ~halted[:, None],
        "R7 halted accounts are flat": halted[:, None] & (after != 0),
        "R7 REDUCING reduces": (g["state"] == REDUCING)[:, None] & (flip | (np.abs(after) > np.abs(before))),
        "R11 flips only where allowed": flip & (L("allow_flip") == 0),
        "R11 a reduction keeps the side": ~entry & (after != 0) & (np.sign(after) != np.sign(before)),
        "R14 sized above the wish": entry & ~(np.abs(w1) <= wished * tiny),
        "R14 sized without a volatility": entry & dead("volatility") & np.isfinite(L("target_vol")) & ~(sense["volatility"] > 0),
        "R15 below the venue's minimum": (after != 0) & (order > 0) & ~((opened >= sym["min_qty"]) & (opened * price >= sym["min_notional"])),
        "R23 liquidation too near": any_entry & tight & ~(np.abs(w1).sum(1) <= liq * tiny),
        "a reduction inside the no-trade band": (order > 0) & (after != 0) & ~entry & ~(np.abs(w1 - w0) >= L("min_trade") / tiny),
        "turnover cap on entries": any_entry & ~(more.sum(1) <= lim["max_turnover"] + slack),
        "memory changed beyond its own fields": (g["peak"] != g0["peak"]) | (g["day"] != g0["day"])
        | ((g["state"] != g0["state"]) & (g["state"] != HALTED)),
    }


def fuzz(blocks, K, seed=0):
    "Decisions made, decisions that entered, and the first example of each violated promise."
    rng, entered, broken = np.random.default_rng(seed), 0, {}
    for block in range(blocks):
        lim, sym, g, slots, sense, context, corr, on, t, equity, W, C = draw(rng, K)
        g0, s0 = g.copy(), slots.copy()
        decide_all(sym, lim, g, slots, sense, context, corr, on, t, equity, W, C, bool(block % 2), work_space(N))
        with np.errstate(all="ignore"):
            found = violations(lim, sym, g0, s0, sense, context, corr, on, t, equity, W, C, g, slots)
        entered += int((np.abs(slots["pending"]) > np.abs(s0["lots"])).any(1).sum())
        for what, mask in found.items():
            if mask.any():
                i = int(np.nonzero(mask)[0][0])
                parts = dict(lim=lim, sym=sym, g=g0, sense=sense, on=on, equity=equity, W=W, C=C, corr=corr, held=s0["lots"],
                             after=slots["pending"], why=slots["why"])
                broken.setdefault(what, (int(mask.sum()), {k: v[i] for k, v in parts.items()}))
    return blocks * K, entered, broken


def test_gate_fuzz():
    import numba
    blocks = 1 if numba.config.DISABLE_JIT else 10
    K = 4_000 if numba.config.DISABLE_JIT else 20_000
    n, entered, broken = fuzz(blocks, K)
    assert broken == {} and entered > n / 50


@pytest.mark.proof
def test_gate_fuzz_five_million():
    n, entered, broken = fuzz(100, 50_000, seed=1)
    assert n == 5_000_000 and broken == {} and entered > n / 50


# ---- Sizing (R14, R15) ---------------------------------------------------------------------------------------------------
WORSE = ("volatility", "drawdown", "regime", "confidence", "equity")  # What each pair of a situation differs in


def sizes(rng, K):
    "Target lots from flat of K random wishes, and of the same in one respect worse (riskier, less sure or poorer)."
    lim, sym, g, slots, sense, context, corr, on, t, equity, W, C = draw(rng, K)
    for n in range(1, N): W[:, n] = 0.0
    slots["lots"], slots["lock"], g["state"], g["flatten"], g["kill"], g["cooldown_until"] = 0, -9, 0, 0, 0, -9
    sense["mark"], sense["ok"], sym["allowed"] = np.exp(rng.normal(3, 1, (K, N))), 1.0, 1.0
    sense["volatility"], context["regime"] = rng.uniform(0.01, 2, (K, N)), rng.uniform(0, 1, K)
    C[:] = rng.uniform(0, 1, (K, N))
    for k in ("spread", "age", "jump", "verdict_ok"): on[k] = 0
    g["peak"] = equity * rng.uniform(1, 1.5, K)
    what = rng.integers(0, len(WORSE), K)
    hit = lambda name: what == WORSE.index(name)
    factor = 1 + rng.exponential(0.5, K)
    risky, murky, poor, unsure, sunk = sense.copy(), context.copy(), equity.copy(), C.copy(), g.copy()
    risky["volatility"] *= np.where(hit("volatility"), factor, 1.0)[:, None]
    murky["regime"] = np.where(hit("regime"), np.minimum(1.0, context["regime"] * factor), context["regime"])
    unsure[hit("confidence")] /= factor[hit("confidence"), None]
    poor[hit("equity")] /= factor[hit("equity")]
    sunk["peak"] = np.where(hit("drawdown"), g["peak"] * factor, g["peak"] * poor / equity)  # Poorer at the same drawdown
    other = slots.copy()
    decide_all(sym, lim, g, slots, sense, context, corr, on, t, equity, W, C, True, work_space(N))
    decide_all(sym, lim, sunk, other, risky, murky, corr, on, t, poor, W, unsure, True, work_space(N))
    return what, slots["pending"][:, 0], other["pending"][:, 0], W[:, 0]


def monotone(blocks, K, seed):
    rng, pairs, smaller = np.random.default_rng(seed), 0, np.zeros(len(WORSE), int)
    for _ in range(blocks):
        what, base, worse, wish = sizes(rng, K)
        assert np.all(np.abs(worse) <= np.abs(base)), WORSE[what[np.abs(worse) > np.abs(base)][0]]
        assert np.all(base * np.sign(np.nan_to_num(wish)) >= 0), "a size of the wrong sign"
        smaller += np.bincount(what[np.abs(worse) < np.abs(base)], minlength=len(WORSE))
        pairs += K
    assert np.all(smaller > pairs / 1000), dict(zip(WORSE, smaller))  # Each of them does bite
    return pairs


def test_sizing_is_monotone():
    assert monotone(2, 20_000, 0) == 40_000


@pytest.mark.proof
def test_sizing_is_monotone_for_a_million_pairs():
    assert monotone(40, 25_000, 1) == 1_000_000


def test_lots_equal_exact_arithmetic():
    rng = np.random.default_rng(0)
    for step in ("0.1", "0.001", "0.3", "1e-8", "7"):
        for n in (*range(1, 60), *map(int, rng.integers(1, 10**6, 300))):
            exact = Decimal(step) * n
            assert lots_in(float(exact), float(step)) == n  # Every float of n lots holds n lots
            assert lots_in(float(exact) * (1 - 1e-6), float(step)) == int(Decimal(float(exact) * (1 - 1e-6)) / Decimal(step))


# ---- Single rules, at their edges ------------------------------------------------------------------------------------------
def asked(weight, inputs=None, t=0, confidence=1.0, capital=1000.0, price=10.0, lots=None, market="perp", **limits):
    "Target lots of one wish from flat, and the reasons."
    weights = np.atleast_2d(weight).astype("f8")
    n = weights.shape[1]
    rm = RiskManager(limits_from(**limits), tuple("ABCDEF"[:n]), capital, lots or Lots(0.001), market, 0.0, 0.005)
    wish = Decision(weights, np.full(weights.shape, confidence))
    got = rm.decide(wish, np.zeros(n, np.int64), np.full(n, price), capital, inputs or no_inputs(n), t, 0)
    return got.lots, got.why


@pytest.mark.parametrize("limit, state", [("max_drawdown", HALTED), ("daily_loss", REDUCING)])
def test_a_loss_of_exactly_the_limit_is_a_breach(limit, state):
    rules = pack_rules(limits_from(**{"max_drawdown": None, "daily_loss": None, limit: 0.25}), ["A"])
    for equity, expected in ((75.0, state), (75.00001, ACTIVE)):  # 100 - 75 = 0.25 * 100 without rounding
        g = gate_state(1, 100.0)
        measure(rules.lim[0], g[0], 1, 100.0)
        measure(rules.lim[0], g[0], 1, equity)
        assert g["state"][0] == expected and (g["flatten"][0] != 0) == (expected != ACTIVE)


@pytest.mark.parametrize("equity", [0.0, -1.0, NAN, INF, -INF])
def test_unsound_equity_halts(equity):
    rules, g = pack_rules(limits_from(max_drawdown=None, daily_loss=None), ["A"]), gate_state(1, 100.0)
    measure(rules.lim[0], g[0], 1, equity)
    assert g["state"][0] == HALTED and g["flatten"][0] == Reason.DRAWDOWN


def test_bounds_are_inclusive():
    at = dict(spread=np.full((1, 1), 0.002), age=np.ones((1, 1)), jump=np.full((1, 1), 3.0))
    rules = dict(max_spread=0.002, max_age=1.0, max_jump=3.0, min_confidence=0.5)
    assert asked(0.5, no_inputs(1, **at), confidence=0.5, **rules)[0][0] > 0
    for name, bit in (("spread", Reason.SPREAD), ("age", Reason.DATA), ("jump", Reason.JUMP)):
        for bad in (at[name] * 1.001, np.full((1, 1), NAN)):
            lots, why = asked(0.5, no_inputs(1, **{**at, name: bad}), **rules)
            assert lots[0] == 0 and why[0] == bit
    assert asked(0.5, confidence=0.4999, **rules)[1][0] == Reason.CONFIDENCE


def test_unknown_correlation_counts_as_one():
    known = np.array([[[1.0, 1.0], [1.0, 1.0]]])
    matrices = known, known * [[1.0, NAN], [NAN, 1.0]], np.full_like(known, NAN)
    same = [asked([0.5, -0.5], no_inputs(2, correlation=C), max_corr_gross=0.4) for C in matrices]
    assert same[0][0].tolist() == [20_000, -20_000] and same[0][1][0] & Reason.CORRELATION
    assert all((s[0] == same[0][0]).all() for s in same)
    opposed = asked([0.5, -0.5], no_inputs(2, correlation=known * [[1.0, -1.0], [-1.0, 1.0]]), max_corr_gross=0.4)
    assert (opposed[0] == same[0][0]).all(), "a short of what moves the other way is the same bet"


def test_liquidation_stays_two_stops_away():
    lots, why = asked(20.0, max_leverage=20.0, max_weight=20.0, stop_loss=0.05, liq_distance=2.0)
    weight = lots[0] * 0.001 * 10.0 / 1000.0
    assert 1 / (2 * 0.05 + 0.005) * (1 - 1e-4) < weight <= 1 / (2 * 0.05 + 0.005) and why[0] & Reason.LIQUIDATION


def test_a_reduction_left_alone_keeps_its_room():
    "0.5 held, 0.46 wished, band 0.05: the 0.04 stays, and nobody else may use it."
    rm = RiskManager(limits_from(min_trade=0.05), ("A", "B"), 1000.0, Lots(0.001), "spot", 0.0)
    got = rm.decide(Decision(np.array([[0.46, 0.6]]), np.ones((1, 2))), np.array([50_000, 0]), np.array([10.0, 10.0]), 1000.0, no_inputs(2), 0, 0)
    assert got.lots.tolist() == [50_000, 50_000]


@pytest.mark.parametrize("mark", [NAN, INF, 0.0, -3.0])
def test_nothing_grows_beside_a_position_without_a_price(mark):
    rm = RiskManager(limits_from(), ("A", "B"), 1000.0, Lots(0.001), "spot", 0.0)
    for wish, after in ((NAN, 10_000), (0.3, 10_000), (0.0, 0)):
        got = rm.decide(Decision(np.array([[wish, 0.5]]), np.ones((1, 2))), np.array([10_000, 0]), np.array([mark, 10.0]), 1000.0, no_inputs(2), 0, 0)
        assert got.lots[0] == after and (got.lots[1] == 0) == (after != 0), "only the exit frees the book"


def test_an_order_that_the_open_makes_too_small_is_dropped():
    "100 quote at the close, 45 at the open: below the venue's minimum of 50."
    prices = {"open": [10, 10, 4.5], "high": [10, 10, 5], "low": [10, 10, 4.5], "close": [10, 10, 5.0]}
    p = pd.DataFrame(prices, index=pd.date_range("2023", periods=3, freq="1h"))
    a = arena(frame_bars(p), limits_from(), Costs(), Lots(0.01, 0.0, 50.0), 1000.0)
    wish = np.array([[NAN], [0.1], [NAN]])
    assert backtest_weights(wish, a, flat_end=False).trades.empty
    assert len(backtest_weights(wish, arena(a.bars, a.limits, a.costs, Lots(0.01, 0.0, 44.0), 1000.0), flat_end=False).trades) == 1


# ---- The whole kernel: R1 at the open, R6 -----------------------------------------------------------------------------------
def built(seed):
    "A random case of the oracle test, walked half way: everything a bar needs."
    rng, bars, limits, costs, lots, W, C, given_, signals = case(seed)
    limits = limits_from(limits, max_bad_outputs=None)
    T, n = W.shape
    market, state, log = pack_market(bars, costs), new_state(1, n, 1000.0), new_log(20 * T * n)
    rules = pack_rules(limits, bars.symbols, lots, costs.reserve, bars.market, costs.maintenance)
    seen = pack_senses(no_inputs(n, **given_), market.bars["mark"], market.bars["ok"])
    blank = np.zeros((0, 6)), np.zeros((0, n), np.int64), np.zeros((0, n), np.int64)
    half = T // 2
    run(*market, rules.sym, rules.lim, *state, 0, 0, half, *seen, W, C, signals, work_space(n), log, *blank)
    return rng, market, rules, seen, state, half, n


def copied(state): return type(state)(*(x.copy() for x in state))


def after_one(policy, market, rules, seen, state, t, n):
    "The account after deciding at bar t as `policy` wishes and playing the next bar; its fills."
    st_, log, rows = copied(state), new_log(20 * n), np.array([t])
    W, C = policy
    step_accounts(*market, rules.sym, rules.lim, *st_, rows, np.ones(1, bool), log)
    decide_accounts(market.day, rules.sym, rules.lim, *st_, rows, np.ones(1, bool), *seen, W, C, False, work_space(n))
    decided, before = copied(st_), len(logged(log))
    step_accounts(*market, rules.sym, rules.lim, *st_, rows + 1, np.ones(1, bool), log)
    return decided, st_, logged(log)[before:]


def some_policy(rng, n):
    w = rng.choice([0.0, 0.5, 1.0, -1.0, 20.0, NAN, INF, -0.0, 1e308], (1, n))
    return w, rng.choice([0.0, 0.4, 1.0, NAN], (1, n), p=[0.2, 0.1, 0.6, 0.1])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**40))
def test_two_policies_meet_the_same_exits(seed):
    "R6: from one state, whatever two policies want, limits, states and forced exits are equal."
    rng, market, rules, seen, state, t, n = built(seed)
    still = hold(1, n)
    ways = [some_policy(rng, n), some_policy(rng, n), (still.weight, still.confidence), (np.zeros((1, n)), np.ones((1, n)))]
    ends = [after_one(w, market, rules, seen, state, t, n) for w in ways]
    memory = [k for k in GATE.names if k != "bad_run"]
    first = ends[0][0]
    for decided, _, _ in ends[1:]:
        assert all(decided.gate[k][0] == first.gate[k][0] for k in memory)
        assert (decided.slots["lots"] == first.slots["lots"]).all() and (decided.slots["lock"] == first.slots["lock"]).all()
        for cause in (TIME_EXIT, LIMIT_EXIT):
            assert ((decided.pos["cause"] == cause) == (first.pos["cause"] == cause)).all()
        forced = np.isin(first.pos["cause"], (TIME_EXIT, LIMIT_EXIT)) & (first.slots["lots"] != 0)
        assert (decided.slots["pending"][forced] == 0).all()
        assert all((decided.pos[k] == first.pos[k]).all() or np.isnan(decided.pos[k]).any() for k in ("stop", "target"))
    if market.costs["perp"][0] > 0: return  # A liquidation depends on the whole book, which the policies chose
    stops = []
    kept = [i for i in range(n) if all(d.slots["pending"][0, i] == d.slots["lots"][0, i] for d, _, _ in ends)]
    for _, _, fills in ends:
        stops.append([(f["n"], f["lots"], f["price"]) for f in fills if f["cause"] in (STOP, TARGET) and f["n"] in kept])
    assert all(s == stops[0] for s in stops)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**40))
def test_leverage_holds_at_the_open_whatever_fills(seed):
    "R1 at the fill: positions at the open, slippage included, never exceed leverage times equity there if anything was added."
    rng, market, rules, seen, state, t, n = built(seed)
    decided, _, fills = after_one(some_policy(rng, n), market, rules, seen, state, t, n)
    bar, lot = market.bars[t + 1], rules.sym["lot"]
    opens = np.where(bar["ok"] > 0, bar["open"], bar["mark"])
    lots, cash, equity = decided.slots["lots"][0].copy(), decided.acct["cash"][0], None
    value = lambda: np.where(lots != 0, lots * lot * opens, 0.0)
    for f in fills:
        growing = abs(f["after"]) > abs(lots[f["n"]])
        if equity is not None and not growing: break  # Exits inside the bar: the open is over
        if growing and equity is None: equity = cash + value().sum()  # When the first entry is sent
        lots[f["n"]] = f["after"]
        cash -= f["lots"] * lot[f["n"]] * f["price"] + f["fee"]
        assert not growing or np.abs(value()).sum() <= rules.lim["max_leverage"][0] * equity * (1 + 1e-9) + 1e-9, seed
