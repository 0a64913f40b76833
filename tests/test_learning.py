"""Proof that learning works, and only where there is something to learn. Every budget and seed is stated here.

Worlds: `planted` has an edge whose sign depends on the volatility regime, so that a rule that only trends, or only reverts, earns in one regime
what it loses in the other; `noise` is a fair game. A seed draws the world and seeds the learner. Scores are log returns net of costs
over the test rows, which no learner has seen; two processes share the work."""
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from joblib import Parallel, delayed
from scipy.stats import ttest_1samp

from stratfam.core import Features, digest
from stratfam.data.features import build
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.market.backtest import backtest_weights, walk
from stratfam.policies.base import BASELINES, Task, baseline, load, read_about, save, task_arena
from stratfam.policies.sb3 import ALGORITHMS, SB3Fit
from stratfam.policies.tcn import TCNDQNFit
from stratfam.risk.limits import limits_from
from stratfam.validation.statistics import adjust, iqm, seed_interval

SEEDS = range(10)
OPEN = limits_from(max_drawdown=None, daily_loss=None, min_trade=0.02)
COSTS = Costs(2e-4, 2e-4, 0.0)
SMALL = dict(window=16, dilations=(1, 2), channels=8, account=("weight",), options=(("train_freq", 2),))


def log_return(run): return float(np.log(run.equity[-1] / run.capital))


# A conditional edge --------------------------------------------------------------------------------------------------

TRAIN, TEST = (170, 3900), (4000, 5990)
LEARNERS = {"PPO": SB3Fit("PPO", steps=60_000, shared=True, features=("return_6", "volatility_24")),
            "TCN-DQN": TCNDQNFit(steps=50_000, features=("return_1", "volatility_24"), **SMALL)}


def planted(seed):
    world = make_world("regime_flip", 6000, 3, seed=seed, market="perp", edge=40.0, half_life=0.25, days=5.0)
    return world, Task(world.bars, build(world.bars, ("return_1", "return_6", "return_24", "volatility_24")), OPEN, COSTS)


def score_all(seed):
    "Out-of-sample log returns of the truth, of both learners and of every rule, random ones with the learners' turnover too."
    world, task = planted(seed)
    a = task_arena(task)
    run = lambda policy: walk(policy, a, task.features, [TEST], seed)[0]
    runs = {k: run(fit.fit(task, [TRAIN], seed)) for k, fit in LEARNERS.items()}
    equal = {f"random like {k}": run(baseline("random", turnover=min(float(b.turnover.mean()), 0.8)).fit(task, seed=seed)) for k, b in runs.items()}
    rules = {k: run(baseline(k).fit(task, seed=seed)) for k in BASELINES}
    truth = backtest_weights(np.sign(world.truth.mu) / 3, a, start=TEST[0], stop=TEST[1])
    return {"truth": log_return(truth)} | {k: log_return(b) for k, b in {**runs, **equal, **rules}.items()}


@cache
def conditional_edge():
    return pd.DataFrame(Parallel(2)(delayed(score_all)(s) for s in SEEDS), index=SEEDS)


@pytest.mark.proof
def test_no_rule_captures_half_of_the_conditional_edge():
    s = conditional_edge()
    rules = s.drop(columns=["truth", *LEARNERS])
    assert set(BASELINES) < set(rules) and max(iqm(rules[k]) for k in rules) < 0.5 * iqm(s["truth"])


@pytest.mark.proof
@pytest.mark.parametrize("learner", LEARNERS)
def test_learners_exploit_it_out_of_sample(learner):
    "Over ten worlds the interval of the interquartile mean lies above every rule's, and so does the gain over that rule in the same world above 0."
    s = conditional_edge()
    mine, rules = seed_interval(s[learner]), s.drop(columns=["truth", *LEARNERS])
    for k in rules:
        assert mine.low > iqm(rules[k]), f"{learner} {mine} against {k} {seed_interval(rules[k])}"
        assert seed_interval(s[learner] - rules[k]).low > 0, f"{learner} against {k}, world by world"
    assert (s[learner] > rules.max(axis=1)).sum() >= 9 and mine.low > 0.25 * iqm(s["truth"])


# Nothing to learn ----------------------------------------------------------------------------------------------------

FEW = {"PPO": 20_000, "A2C": 20_000, "SAC": 4_000, "TD3": 4_000, "DDPG": 4_000}
ON_NOISE = {k: SB3Fit(k, steps=n, options=() if n > 5000 else (("learning_starts", 1000),)) for k, n in FEW.items()}
ON_NOISE |= {"PPO shared": replace(ON_NOISE["PPO"], shared=True), "TCN-DQN": TCNDQNFit(steps=20_000, **SMALL)}


def on_noise(name, seed):
    "Gross and net log return per bar of one learner on a fair game."
    bars = make_world("gbm", 3000, 2, seed=1000 + seed, market="perp").bars
    task = Task(bars, build(bars, ("return_1", "return_6", "volatility_24")), OPEN, COSTS)
    run = walk(ON_NOISE[name].fit(task, [(50, 1950)], seed), task_arena(task), task.features, [(2000, 2990)], seed)[0]
    before = np.concatenate([[run.capital], run.equity[:-1]])
    return float(np.mean(run.price_pnl / before)), log_return(run) / len(run)


@pytest.mark.proof
def test_noise_canary():
    "On ten fair games each learner's gross gain is indistinguishable from 0, and none gains net of costs (Holm over the learners)."
    jobs = [(k, s) for k in ON_NOISE for s in SEEDS]
    found = pd.DataFrame(Parallel(2)(delayed(on_noise)(*j) for j in jobs), index=pd.MultiIndex.from_tuples(jobs), columns=["gross", "net"])
    assert set(ON_NOISE) >= set(ALGORITHMS) | {"TCN-DQN"} and (found["gross"] != 0).sum() > 0.9 * len(found)
    for k in ON_NOISE:
        band = seed_interval(found.loc[k, "gross"], confidence=1 - 0.05 / len(ON_NOISE))
        assert band.low <= 0 <= band.high, f"{k}: gross {band}"
    p = pd.Series({k: ttest_1samp(found.loc[k, "net"], 0, alternative="greater").pvalue for k in ON_NOISE})
    assert not adjust(p, "holm")["survives"].any(), p


# Everything to learn -------------------------------------------------------------------------------------------------

LEAKED = {"PPO": (SB3Fit("PPO", steps=100_000), 0.8), "PPO shared": (SB3Fit("PPO", steps=100_000, shared=True, context=True), 0.8),
          "SAC": (SB3Fit("SAC", steps=24_000), 0.8), "A2C": (SB3Fit("A2C", steps=120_000), 0.5), "TD3": (SB3Fit("TD3", steps=16_000), 0.5),
          "DDPG": (SB3Fit("DDPG", steps=16_000), 0.5),
          "TCN-DQN": (TCNDQNFit(steps=60_000, context=True, **{**SMALL, "window": 5, "dilations": (1,)}), 0.8)}


@cache
def leaked():
    "A random market of two symbols with the next return as its feature, and the best achievable net log return on the test rows."
    bars = make_world("gbm", n_bars=5000, n_symbols=2, seed=3).bars
    leak = np.full((5000, 2, 1), np.nan, "f4")
    leak[:-2, :, 0] = np.log(bars.open[2:] / bars.open[1:-1])
    task, best, wins = Task(bars, Features(leak, ("leak",), 0), OPEN, COSTS), np.zeros((5000, 2)), leak[:, :, 0].argmax(axis=1)
    best[np.arange(5000), wins] = leak[np.arange(5000), wins, 0] > 0
    return task, log_return(backtest_weights(best, task_arena(task), start=4000, stop=4990))


@pytest.mark.proof
@pytest.mark.parametrize("name", LEAKED)
def test_oracle_canary(name):
    "With the next return leaked, each learner reaches its share of the best achievable net return, out of sample."
    (task, top), (fit, share) = leaked(), LEAKED[name]
    assert log_return(walk(fit.fit(task, [(0, 3900)], 0), task_arena(task), task.features, [(4000, 4990)])[0]) > share * top


# Repeatable ----------------------------------------------------------------------------------------------------------

QUICK = {"PPO": SB3Fit("PPO", steps=8192, shared=True), "SAC": SB3Fit("SAC", steps=2600), "TCN-DQN": TCNDQNFit(steps=8192, **SMALL)}


@pytest.fixture(scope="module")
def small():
    bars = make_world("gbm", n_bars=1500, n_symbols=3, seed=1, market="perp").bars
    return Task(bars, build(bars, ("return_1", "volatility_24")), OPEN, COSTS)


@pytest.mark.parametrize("name", QUICK)
def test_F12_no_result_depends_on_the_clock(name, small, monkeypatch):
    "The same bits under clocks that stand still, run backwards or jump by years, with somebody listening to the progress or not."
    plain = digest(QUICK[name].fit(small, [(50, 1400)], 3))
    rng, heard = np.random.default_rng(0), []
    for clock in ("time", "monotonic", "perf_counter", "process_time"): monkeypatch.setattr(time, clock, lambda: float(rng.normal(0, 1e8)))
    monkeypatch.setattr(time, "time_ns", lambda: int(rng.integers(-2**60, 2**60)))
    assert digest(QUICK[name].fit(small, [(50, 1400)], 3, heard.append)) == plain and heard


@pytest.mark.parametrize("name", QUICK)
def test_F8_the_stored_policy_is_the_one_trained_on_all_rows(name, small, tmp_path):
    "What is saved is bit for bit what a second training on all train rows gives; its digest is noted beside it, for the verdict to name."
    fit, rows = QUICK[name], [(50, 1400)]
    folder = save(fit.fit(small, rows, 5), tmp_path / name, {"fit": fit.config(), "rows": rows, "seed": 5})
    again, half = digest(fit.fit(small, rows, 5)), digest(fit.fit(small, [(50, 700)], 5))
    assert digest(load(folder)) == read_about(folder)["digest"] == again != half
    assert read_about(folder)["about"]["fit"] == fit.config()
