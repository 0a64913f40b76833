"""Filtered regimes against a definition in plain numpy; smoothing shown to leak; the router's hysteresis; regimes inside and outside a policy."""
import dataclasses
import itertools

import numpy as np
import pytest

from stratfam.core import ConfigError, DataError, Features, ObservationSpec, digest
from stratfam.data.features import build
from stratfam.data.worlds import make_world
from stratfam.market.account import new_state
from stratfam.market.backtest import walk
from stratfam.market.observe import observe, scaled
from stratfam.policies.base import Task, baseline, narrow, task_arena
from stratfam.policies.ensemble import walked
from stratfam.policies.regime import (NOWHERE, InformedFit, RegimeModel, Router, RouterFit, describe_regimes, filtered, fit_regimes, informed_view,
                                      long_run, next_regime, regime_inputs, risk_rank, router_table, with_regimes)
from stratfam.policies.sb3 import SB3Fit
from stratfam.policies.supervised import ForecastFit
from stratfam.risk.limits import limits_from

NAMES = ("return_1", "return_24", "volatility_24")


@pytest.fixture(scope="module")
def world(): return make_world("regime_vol", n_bars=3000, n_symbols=2, seed=3)


@pytest.fixture(scope="module")
def task(world): return Task(world.bars, build(world.bars, NAMES), limits_from(max_drawdown=None, daily_loss=None, min_trade=0.01))


def random_model(rng, K, D, memory):
    move = rng.dirichlet(np.ones(K) * 2, K)
    return RegimeModel([f"f{d}" for d in range(D)], move, rng.normal(0, 0.5, (K, D)), rng.uniform(0.5, 2.0, (K, D)), memory)


def by_every_path(model, y):
    "P(state now | y): the sum over every sequence of states, no recursion."
    K, T = len(model.move), len(y)
    total = np.zeros(K)
    like = np.prod(np.exp(-0.5 * ((y[:, None] - model.mean) / model.sd) ** 2) / model.sd, axis=2)
    for path in itertools.product(range(K), repeat=T):
        p = (long_run(model.move) @ model.move)[path[0]] * like[0, path[0]]
        for t in range(1, T): p *= model.move[path[t - 1], path[t]] * like[t, path[t]]
        total[path[-1]] += p
    return total / total.sum()


def test_the_filter_is_the_sum_over_all_paths():
    rng = np.random.default_rng(0)
    for _ in range(30):
        K, D, memory = (int(rng.integers(a, b)) for a, b in ((2, 4), (1, 3), (1, 6)))
        model, y = random_model(rng, K, D, memory), rng.normal(0, 1.5, (memory + 3, D))
        got = filtered(model, y)
        for t in range(memory - 1, len(y)): np.testing.assert_allclose(got[t], by_every_path(model, y[t - memory + 1:t + 1]), rtol=1e-9)
        assert np.isnan(got[:memory - 1]).all()


def test_filtered_probabilities_never_see_the_future_nor_what_lies_beyond_their_memory():
    rng = np.random.default_rng(1)
    model, y = random_model(rng, 3, 2, 20), rng.normal(size=(300, 2))
    full = filtered(model, y)
    for t in (19, 20, 57, 150, 298):
        np.testing.assert_array_equal(filtered(model, y[:t + 1])[:t + 1], full[:t + 1])
        other = y.copy()
        other[t + 1:], other[:max(0, t - 19)] = 99.0, -99.0
        assert (filtered(model, other)[t] == full[t]).all()
    hole = y.copy()
    hole[100] = np.nan
    p = filtered(model, hole)
    assert np.isnan(p[100:120]).all() and (p[120] == full[120]).all() and np.isfinite(p[99]).all()


def test_smoothed_probabilities_change_when_the_future_does_and_ours_do_not():
    "F11 in small: the library's posterior of a past bar moves, the filter does not."
    from hmmlearn.hmm import GaussianHMM
    model = RegimeModel(("r",), [[0.95, 0.05], [0.05, 0.95]], [[0.0], [0.0]], [[1.0], [2.0]], memory=30)
    theirs = GaussianHMM(2, "diag", init_params="")
    theirs.startprob_, theirs.transmat_, theirs.means_, theirs.covars_ = long_run(model.move), model.move, model.mean, model.sd**2
    y = np.random.default_rng(0).normal(0, 1.4, (200, 1))
    wilder = y.copy()
    wilder[150:] *= 4.0
    assert (filtered(model, y)[29:150] == filtered(model, wilder)[29:150]).all()
    assert np.abs(theirs.predict_proba(y) - theirs.predict_proba(wilder))[:150].max() > 0.1


def test_an_impossible_bar_is_survived():
    model = RegimeModel(("r",), [[0.99, 0.01], [0.01, 0.99]], [[0.0], [0.0]], [[0.01], [0.02]], memory=3)
    p = filtered(model, np.array([[0.0], [1e8], [0.0], [-1e8], [0.0]]))
    assert np.isfinite(p[2:]).all() and np.allclose(p[2:].sum(axis=1), 1.0)


@pytest.mark.parametrize("K", [2, 3])
def test_states_are_ordered_repeatable_and_read_from_train_rows_alone(task, K):
    train = [(100, 900), (1000, 2000)]
    model = fit_regimes(task.features, train, K, seed=5)
    assert (np.diff(model.sd[:, 0]) > 0).all() and digest(model) == digest(fit_regimes(task.features, train, K, seed=5))
    x = task.features.x.copy()
    x[900:1000], x[2000:] = 5.0, 7.0
    assert digest(fit_regimes(Features(x, NAMES, 24), train, K, seed=5)) == digest(model)
    x[1500:2000] = 3.0
    assert digest(fit_regimes(Features(x, NAMES, 24), train, K, seed=5)) != digest(model)
    assert np.isclose(describe_regimes(model)["share"].sum(), 1.0)


def test_the_fit_finds_the_chain_it_was_drawn_from():
    rng = np.random.default_rng(0)
    state, r = 0, np.empty(8000)
    for t in range(8000):
        if rng.random() < (0.02, 0.05)[state]: state = 1 - state
        r[t] = rng.normal(0, (0.004, 0.02)[state])
    features = Features(np.repeat(r[:, None, None], 2, axis=1), ("return_1",), 0)
    model = fit_regimes(features, [(0, 8000)], 2)
    np.testing.assert_allclose(model.sd[:, 0], [0.004, 0.02], rtol=0.1)
    np.testing.assert_allclose(np.diag(model.move), [0.98, 0.95], atol=0.02)


def test_too_little_or_nothing_to_fit_is_said(task):
    with pytest.raises(DataError, match="too few"): fit_regimes(task.features, [(0, 150)], 3)
    flat = Features(np.zeros_like(task.features.x), NAMES, 0)
    with pytest.raises(DataError, match="does not move"): fit_regimes(flat, [(0, 1000)], 2)
    with pytest.raises(ConfigError, match="Unknown feature"): fit_regimes(task.features, [(0, 1000)], 2, ("retrun_1",))


def test_the_rank_is_what_the_gate_expects(task):
    from stratfam.market.observe import gate_inputs
    rank = risk_rank(fit_regimes(task.features, [(0, 2000)], 3), task.features)
    inputs = gate_inputs(task.bars, limits_from(regime_cut=0.5), regime=rank)
    assert inputs.present[1] and np.nanmin(rank) >= 0.0 and np.nanmax(rank) <= 1.0


# Inside a policy ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("window", [1, 4])
def test_a_live_policy_computes_the_very_features_it_was_trained_on(task, window):
    fit = InformedFit(ForecastFit("ridge", 6, window), regimes=3, memory=30)
    made = fit.fit(task, [(50, 2000)])
    more, ring = with_regimes(made.model, task.features), task_arena(task)
    st, t = new_state(5, 2, 1000.0), np.array([200, 201, 1500, 2500, 2999])
    st.slots["lots"] = np.random.default_rng(0).integers(0, 10**6, (5, 2))
    inside = observe(made.policy.spec, scaled(made.policy.spec, more), ring.market, ring.rules, st, t)
    outer, view = informed_view(made, observe(made.spec, scaled(made.spec, task.features), ring.market, ring.rules, st, t))
    assert (narrow(outer, made.policy.spec, view) == inside).all()
    assert made.spec.window == fit.window


def test_informed_walks_as_its_inner_policy_on_features_with_regimes(task):
    made = InformedFit(SB3Fit("PPO", steps=2048), regimes=2, memory=30).fit(task, [(50, 2000)], 1)
    more = with_regimes(made.model, task.features)
    a = task_arena(task)
    one, two = walk(made, a, task.features, [(2100, 2600)])[0], walk(made.policy, a, more, [(2100, 2600)])[0]
    assert (one.equity == two.equity).all()


# The router -----------------------------------------------------------------------------------------------------------

def test_hysteresis_by_hand():
    p = np.array([[0.5, 0.5], [0.61, 0.39], [0.45, 0.55], [0.39, 0.61], [0.41, 0.59], [0.59, 0.41], [0.62, 0.38]])
    at, got = NOWHERE, []
    for row in p: got.append(at := next_regime(at, row, 0.6, 0.4))
    assert got == [-1, 0, 0, 1, 1, 1, 0]


def test_the_router_does_what_its_table_says(task):
    fit = RouterFit({"calm": baseline("equal_weight"), "wild": baseline("momentum")}, regimes=2, memory=40)
    made = fit.fit(task, [(50, 2000)])
    way = walked(made, task, [(2100, 2900)])
    p = filtered(made.model, regime_inputs(made.model.inputs, task.features.x, NAMES))
    at, seen = NOWHERE, []
    for t in range(2100 - 39, 2899):
        at = next_regime(at, p[t], 0.6, 0.4)
        if t >= 2100: seen.append(at)
    seen = np.array(seen)
    assert (np.abs(way.weight[seen == 0]).sum(axis=1) > 0.9).all() and (way.weight[seen == NOWHERE] == 0).all()
    assert {0, 1} <= set(seen) and (way.confidence[seen == 0] <= p[way.row[seen == 0], :1] + 1e-12).all()
    assert list(router_table(made)["policy"]) == ["equal_weight (calm)", "momentum (wild)"] and "calm -> equal_weight" in repr(made)


def test_regimes_without_a_rule_are_flat_and_wrong_rules_are_refused(task):
    made = RouterFit({"calm": baseline("equal_weight")}, regimes=2, memory=40).fit(task, [(50, 2000)])
    assert list(router_table(made)["policy"]) == ["equal_weight (calm)", "flat"]
    never = dataclasses.replace(made, rules={})
    assert (walked(never, task, [(2100, 2400)]).weight == 0).all()
    for bad in ({"rules": {"stormy": "flat"}}, {"rules": {"calm": "momentum"}}, {"enter": 0.3}, {"leave": 0.7}, {"names": ()}):
        with pytest.raises(ConfigError): dataclasses.replace(made, **bad)
    with pytest.raises(ConfigError, match="regime"): RouterFit({"stormy": baseline("cash")})


def test_a_restarted_router_finds_its_way_back(task):
    "A process that starts in the middle agrees with one that ran all along, at every bar of a long walk but a few in limbo."
    made = RouterFit({"calm": baseline("equal_weight")}, regimes=2, memory=40).fit(task, [(50, 2000)])
    spec, ring, st = made.spec, task_arena(task), new_state(1, 2, 1000.0)
    x, state, same = scaled(spec, task.features), made.reset(1, 0), []
    for t in range(2100, 2700):
        obs = observe(spec, x, ring.market, ring.rules, st, np.array([t]))
        going, state = made.act(obs, state)
        fresh, _ = made.act(obs, made.reset(1, 0))
        same.append((going.weight == fresh.weight).all())
    assert np.mean(same) > 0.97


def test_a_router_of_many_accounts_equals_each_alone(task):
    made = RouterFit({"calm": baseline("momentum"), "wild": baseline("cash")}, regimes=2, memory=40).fit(task, [(50, 2000)])
    a, iv = task_arena(task), [(2100, 2300), (2350, 2700), (2750, 2900)]
    for one, i in zip(walk(made, a, task.features, iv), iv): assert (walk(made, a, task.features, [i])[0].equity == one.equity).all()
    assert isinstance(made, Router) and isinstance(made.spec, ObservationSpec)
