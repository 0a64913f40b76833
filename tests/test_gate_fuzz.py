"""The gate under adversarial wishes and states: the risk invariants of every decision, by their ids (R1..R15)."""
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit
from test_kernel import DAY0, case

from stratfam.core import KERNEL, Decision, hold, lots_in
from stratfam.market.account import LIMIT_EXIT, STOP, TIME_EXIT, Costs, logged, new_log, new_state, pack_market, run
from stratfam.market.backtest import decide_accounts, step_accounts
from stratfam.risk.gate import (ACTIVE, CONTEXT, GATE, HALTED, ON, REDUCING, SENSE, SLOT, Reason, RiskManager, gate, gate_state, measure, no_inputs,
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
    sym["lot"], sym["min_qty"], sym["min_notional"] = pick(rng, (K, N), 1e-6, 0.001, 0.1, 1.0), pick(rng, (K, N), 0.0, 0.2), pick(rng, (K, N), 0.0, 5.0)
    sym["allowed"] = rng.random((K, N)) < 0.9
    sense, context = np.zeros((K, N), SENSE), np.zeros(K, CONTEXT)
    sense["mark"] = np.where(rng.random((K, N)) < 0.03, pick(rng, (K, N), NAN, 0.0, -1.0, INF), np.exp(rng.normal(3, 2, (K, N))))
    sense["ok"] = rng.random((K, N)) < 0.95
    sense["volatility"] = pick(rng, (K, N), 0.1, 0.5, 2.0, 0.0, -1.0, NAN, INF)
    sense["spread"], sense["age"] = pick(rng, (K, N), 0.0, 0.001, 0.002, 0.003, NAN), pick(rng, (K, N), 0.0, 0.0, 1.0, 1.5, INF, NAN)
    sense["jump"] = pick(rng, (K, N), 0.0, 1.0, 3.0, 9.0, NAN)
    context["regime"], context["verdict_ok"] = pick(rng, K, 0.0, 0.5, 1.0, 2.0, -1.0, NAN), rng.random(K) < 0.7
    corr = rng.uniform(-1, 1, (K, N, N))
    corr = (corr + corr.transpose(0, 2, 1)) / 2
    corr[:, range(N), range(N)] = 1.0
    corr[rng.random((K, N, N)) < 0.02] = NAN
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


def violations(lim, sym, g0, slots0, sense, context, on, t, equity, W, C, g, slots):
    "Number of broken promises by id, over all K situations."
    price, before, after = sense["mark"], slots0["lots"], slots["pending"]
    tiny = 1 + 1e-9
    up = np.abs(after) > np.abs(before)
    flip = (after * np.sign(before)) < 0
    entry = up | flip
    L = lambda k: lim[k][:, None]
    real = np.isfinite(price) & (price > 0)
    val = np.where(real, price, 0.0) * sym["lot"] / equity[:, None]
    w0, w1 = np.where(before != 0, before * val, 0.0), after * val
    stays = np.where(flip, 0.0, np.minimum(np.abs(w0), np.abs(w1)))
    more = np.abs(w1) - stays
    any_entry = entry.any(1)
    costed = stays.sum(1) + more.sum(1) * (1 + lim["reserve"])
    halted = (g["state"] == HALTED) | (g0["flatten"] != 0) | (g["kill"] != 0)
    dead = lambda k: on[k][:, None] > 0
    risk = np.sqrt(np.maximum(0.0, np.einsum("ki,kij,kj->k", np.abs(w1), np.nan_to_num(CORR[0], nan=1.0), np.abs(w1))))
    denied = ((~real) | (sense["ok"] == 0) | (sym["allowed"] == 0) | (t[:, None] < slots0["lock"]) | (t < g0["cooldown_until"])[:, None]
              | ~(C >= L("min_confidence")) | (dead("spread") & ~(sense["spread"] <= L("max_spread"))) | (dead("age") & ~(sense["age"] <= L("max_age")))
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
        "R1 correlated book": any_entry & (on["correlation"] > 0) & ~(risk <= lim["max_corr_gross"] * tiny + 1e-12),
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
        "an order inside the no-trade band": (order > 0) & (after != 0) & ~(np.abs(W - w0) >= L("min_trade") * (1 - 1e-9)) & np.isfinite(W) & ~entry,
        "turnover cap on entries": any_entry & ~(more.sum(1) <= lim["max_turnover"] * tiny),
        "memory changed beyond its own fields": (g["peak"] != g0["peak"]) | (g["day"] != g0["day"]) | ((g["state"] != g0["state"]) & (g["state"] != HALTED)),
    }


CORR = [None]  # The correlations of the block in hand


def fuzz(blocks, K, seed=0):
    "Decisions made, decisions that entered, and the first example of each violated promise."
    rng, entered, broken = np.random.default_rng(seed), 0, {}
    for block in range(blocks):
        lim, sym, g, slots, sense, context, corr, on, t, equity, W, C = draw(rng, K)
        CORR[0] = corr
        g0, s0 = g.copy(), slots.copy()
        decide_all(sym, lim, g, slots, sense, context, corr, on, t, equity, W, C, bool(block % 2), work_space(N))
        with np.errstate(all="ignore"):
            found = violations(lim, sym, g0, s0, sense, context, on, t, equity, W, C, g, slots)
        entered += int((np.abs(slots["pending"]) > np.abs(s0["lots"])).any(1).sum())
        for what, mask in found.items():
            if mask.any():
                i = int(np.nonzero(mask)[0][0])
                broken.setdefault(what, (int(mask.sum()), dict(lim=lim[i], held=s0["lots"][i], after=slots["pending"][i], why=slots["why"][i], W=W[i], C=C[i],
                                                               sense=sense[i], sym=sym[i], equity=equity[i], g=g0[i], on=on[i])))
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
