"""Inner folds against the judge's definition, members' books, calibration, selectors, forests; F8, F11 and F12 for what this branch fits."""
import dataclasses
import json
import pickle

import numpy as np
import pytest

from stratfam.core import ConfigError, DataError, Features, ObservationSpec, Scaler, digest
from stratfam.data.features import build, fit_scaler
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs, new_state
from stratfam.market.backtest import walk
from stratfam.market.observe import observe, scaled
from stratfam.policies.base import BASELINES, Fit, Task, baseline, combined, declared, narrow, outcome_rows, outcomes, task_arena
from stratfam.policies.ensemble import (Blend, CalibratedFit, EnsembleFit, calibration_error, fit_calibration, hits, inner_folds, intervals_of,
                                        reliability, votes_for, walked)
from stratfam.policies.family import FAMILY, calibrated, family_fit
from stratfam.policies.regime import InformedFit, RouterFit
from stratfam.policies.sb3 import SB3Fit
from stratfam.policies.supervised import CorrelationFilter, ForecastFit, Importance, SelectedFit, samples
from stratfam.risk.limits import limits_from
from stratfam.validation.splits import CombinatorialPurgedCV, train_by_definition
from stratfam.validation.study import cross_validate

NAMES = ("return_1", "return_24", "volatility_24", "rsi")
LIMITS = limits_from(max_drawdown=None, daily_loss=None, min_trade=0.01)


@pytest.fixture(scope="module")
def task():
    bars = make_world("momentum", n_bars=2600, n_symbols=3, seed=1, edge=12.0, half_life=6.0).bars
    return Task(bars, build(bars, NAMES), LIMITS, Costs(2e-4, 2e-4, 0.0))


def changed_after(task, cut, seed=5):
    "The same task up to row `cut`; every later bar, feature and label is another."
    rng, bars, x = np.random.default_rng(seed), task.bars, task.features.x.copy()
    x[cut:] = rng.normal(size=x[cut:].shape)
    cols = {k: getattr(bars, k).copy() for k in ("open", "high", "low", "close")}
    for v in cols.values(): v[cut:] *= np.random.default_rng(seed).uniform(2.0, 3.0, v[cut:].shape)
    return dataclasses.replace(task, bars=dataclasses.replace(bars, **cols), features=Features(x, task.features.names, task.features.warmup))


# Cutting the train rows -----------------------------------------------------------------------------------------------

def test_inner_folds_are_the_judges_definition():
    "Row by row, on random intervals, label ends, look-backs and embargoes."
    rng, bars = np.random.default_rng(0), make_world("gbm", n_bars=120, n_symbols=1, seed=1).bars
    features = Features(np.zeros((120, 1, 1), "f4"), ("x",), 0)
    tried = 0
    for _ in range(300):
        cuts = np.sort(rng.choice(np.arange(2, 119), 3, replace=False))
        train = [(0, int(cuts[0])), (int(cuts[1]), int(cuts[2]))]
        ends = np.minimum(np.arange(120) + rng.integers(0, 9, 120), 119)
        for a, b in train: ends[a:b] = np.minimum(ends[a:b], b - 1)
        back, embargo, k = int(rng.integers(0, 8)), int(rng.integers(0, 12)), int(rng.integers(2, 5))
        task = Task(bars, features, label_end=ends, lookback=back)
        try: folds = inner_folds(task, train, k, embargo)
        except DataError as e:
            assert "nothing left" in str(e) or "cannot be cut" in str(e)
            continue
        rows = [i for a, b in train for i in range(a, b)]
        assert sorted(i for f in folds for a, b in f.test for i in range(a, b)) == rows
        for f in folds:
            got = [i for a, b in f.train for i in range(a, b)]
            assert got == train_by_definition(f.test, ends, back, embargo, train)
            tried += 1
    assert tried > 300


def test_intervals_never_glue_across_a_seam():
    mask = np.ones(10, bool)
    mask[4] = False
    assert intervals_of(mask, [(0, 3), (3, 8)]) == [(0, 3), (3, 4), (5, 8)]


def test_declared_reaches_as_far_as_the_widest_fit(task):
    wide = declared(task, [ForecastFit("ridge", 24, 5), InformedFit(ForecastFit("ridge", 6), memory=50), baseline("cash")])
    assert wide.label_end[100] == 124 and wide.lookback == task.features.warmup + 49
    assert (wide.label_end == outcome_rows(task.bars, 24)).all() and declared(task, []).lookback == task.lookback


def test_outcomes_by_hand_and_across_a_gap(task):
    ok = task.bars.ok.copy()
    ok[700, 1] = False
    cut = {k: np.where(ok, getattr(task.bars, k), np.nan) for k in ("open", "high", "low", "close", "volume", "funding")}
    bars = dataclasses.replace(task.bars, ok=ok, **cut)
    y = outcomes(bars, 4)
    for t in (0, 500, 694, 695, 696, 699, 700, 701, 2595, 2596):
        for n in range(3):
            clear = t + 4 < 2600 and ok[t:t + 5, n].all()
            assert np.isfinite(y[t, n]) == clear
            if clear: assert y[t, n] == np.log(bars.close[t + 4, n] / bars.open[t + 1, n])


@pytest.mark.parametrize("horizon, window", [(1, 1), (24, 1), (7, 4)])
def test_no_label_and_no_window_leaves_its_interval(task, horizon, window):
    "Whatever the task declares: prices and features outside the train intervals may be anything."
    train = [(300, 900), (1000, 1500)]
    scaler = fit_scaler(task.features, train, NAMES)
    one = samples(task, train, NAMES, scaler, window, horizon)
    x = task.features.x.copy()
    inside = np.zeros(2600, bool)
    for a, b in train: inside[a:b] = True
    x[~inside] = 77.0
    cols = {k: np.where(inside[:, None], getattr(task.bars, k), getattr(task.bars, k) * 9.0) for k in ("open", "high", "low", "close")}
    other = dataclasses.replace(task, bars=dataclasses.replace(task.bars, **cols), features=Features(x, NAMES, task.features.warmup))
    two = samples(other, train, NAMES, scaler, window, horizon)
    assert (one.x == two.x).all() and (one.y == two.y).all() and len(one.y) > 1000


# One observation for many ---------------------------------------------------------------------------------------------

def test_narrow_equals_what_the_member_alone_would_see(task):
    rng, ring = np.random.default_rng(0), task_arena(task)
    st = new_state(4, 3, 1000.0)
    st.slots["lots"] = rng.integers(0, 10**6, (4, 3))
    t = np.array([400, 900, 901, 2599])
    for _ in range(100):
        specs = []
        for _ in range(3):
            names = tuple(rng.permutation(NAMES)[:rng.integers(0, 5)])
            F, scaler = len(names), None
            if F and rng.random() < 0.7: scaler = Scaler(rng.normal(size=F), rng.uniform(0.01, 2, F), rng.uniform(1, 10))
            account = tuple(rng.permutation(("weight", "cash", "unrealised", "drawdown", "since_trade"))[:rng.integers(1, 6)])
            specs.append(ObservationSpec(names, int(rng.integers(1, 9)), scaler, account))
        whole = combined(specs)
        seen = observe(whole, scaled(whole, task.features), ring.market, ring.rules, st, t)
        for s in specs:
            alone = observe(s, scaled(s, task.features), ring.market, ring.rules, st, t)
            assert (narrow(whole, s, seen) == alone).all()
    F = len(whole.names)
    with pytest.raises(ConfigError, match="cannot be cut"): narrow(dataclasses.replace(whole, scaler=Scaler(np.zeros(F), np.ones(F))), specs[0], seen)


@pytest.mark.parametrize("name", BASELINES)
def test_an_ensemble_of_one_is_that_one(task, name):
    p = baseline(name).fit(task, (), 3)
    one, two = (walk(q, task_arena(task), task.features, [(50, 1200)], 5)[0] for q in (p, Blend(combined([p.spec]), (p,), [1.0])))
    assert np.abs(one.equity / two.equity - 1).max() < 1e-6


def test_members_keep_their_books_and_lose_them_with_a_stop(task):
    "A rule that says 'stay' is not diluted bar by bar; after a stop its book is closed."
    p = baseline("buy_and_hold").fit(task)
    pair = Blend(combined([p.spec]), (p, baseline("cash").fit(task)), [0.5, 0.5])
    way = walked(pair, task, [(0, 500)])
    assert np.abs(way.weight - 0.5 / 3).max() < 0.05 and np.abs(way.runs[0].weight[1:-1] - way.weight[1:]).max() < 1e-4
    assert len(way.runs[0].trades) == 3
    state = pair.reset(1, 0)
    see = lambda held: np.array([held], "f4")
    d, state = pair.act(see([0.0, 0.0, 0.0]), state)
    d, state = pair.act(see([0.18, 0.0, 0.15]), state)      # prices moved the first and third, a stop closed the second
    assert state.books[0, 0].tolist() == pytest.approx([0.36, 1 / 3, 0.30], rel=1e-5) and state.books[1].max() == 0.0
    rule = baseline("momentum").fit(task)
    alone = Blend(combined([rule.spec]), (rule,), [1.0])
    assert rule.spec.names == ("return_24", "volatility_24")
    obs = lambda move, sd, held: np.array([[move, sd] * 3 + held], "f4")
    d, state = alone.act(obs(0.1, 0.001, [0, 0, 0]), alone.reset(1, 0))
    assert (d.weight > 0).all()
    d, state = alone.act(obs(0.001, 0.01, [0.3, 0.0, 0.3]), state)      # not an entry: who still holds stays, who was stopped is out
    assert (d.weight[0] > 0).tolist() == [True, False, True]


@dataclasses.dataclass(frozen=True, eq=False)
class Says:
    "A policy that always answers the same."
    spec: ObservationSpec
    weight: tuple
    confidence: tuple
    def reset(self, B, seed): return None
    def act(self, obs, state):
        from stratfam.core import Decision
        return Decision(np.tile(self.weight, (len(obs), 1)), np.tile(self.confidence, (len(obs), 1))), state


def test_a_broken_member_holds_and_does_not_spoil_the_rest():
    spec = ObservationSpec((), account=("weight",))
    good, bad = Says(spec, (0.6, -0.2), (0.9, 0.8)), Says(spec, (np.nan, np.inf), (2.0, 0.5))
    d, _ = (b := Blend(spec, (good, bad), [0.5, 0.5])).act(np.array([[0.2, 0.0]], "f4"), b.reset(1, 0))
    assert np.allclose(d.weight, [[0.4, -0.1]]) and np.allclose(d.confidence, [[0.45, 0.4]])
    shape = Says(spec, (0.1,), (0.5,))
    d, _ = (b := Blend(spec, (good, shape), [0.5, 0.5])).act(np.array([[0.0, 0.0]], "f4"), b.reset(1, 0))
    assert np.allclose(d.weight, [[0.3, -0.1]])


def test_votes_are_bounded_and_sum_to_one_or_nothing():
    rng = np.random.default_rng(0)
    for _ in range(200):
        s = rng.normal(size=rng.integers(1, 8))
        keep = int(rng.integers(1, len(s) + 1))
        for kind in ("mean", "vote", "sharpe"):
            v = votes_for(kind, s, keep)
            assert (v >= 0).all() and (v > 0).sum() <= keep and (abs(v.sum() - 1) < 1e-12 or (v == 0).all() and kind == "sharpe" and s.max() <= 0)
            assert set(np.flatnonzero(v)) <= set(np.argsort(-s, kind="stable")[:keep])


# Confidence -----------------------------------------------------------------------------------------------------------

def test_hits_by_hand(task):
    policy = baseline("momentum", entry=0.5).fit(task)
    way = walked(policy, task, [(100, 400), (500, 520)])
    c, r = hits(way, task.bars, 3)
    n = k = 0
    for row, stop, w in zip(way.row, way.stop, way.weight):
        for s in range(3):
            if w[s] == 0 or np.isnan(w[s]) or row + 3 >= stop: continue
            n += 1
            k += np.sign(w[s]) * np.log(task.bars.close[row + 3, s] / task.bars.open[row + 1, s]) > 0
    assert (len(c), int(r.sum())) == (n, k) and n > 100


def test_calibration_is_monotone_bounded_and_shrinks_little_evidence():
    rng = np.random.default_rng(0)
    for n in (0, 1, 10, 60, 300, 5000):
        c = rng.uniform(size=n)
        r = rng.random(n) < c
        for kind in ("isotonic", "platt"):
            y = fit_calibration(c, r, kind)(np.linspace(-1, 2, 301))
            assert (np.diff(y) >= 0).all() and y.min() >= 0 and y.max() <= 1
            if n < 50: assert len(set(y)) == 1 and abs(y[0] - (r.sum() + 1) / (n + 2)) < 1e-12
    assert fit_calibration(np.full(500, 0.9), rng.random(500) < 0.3)(0.9) == pytest.approx(0.3, abs=0.06)
    back = fit_calibration(c, rng.random(5000) < 1 - c, "platt")      # the more certain, the more wrong: no slope, one number
    assert back(0.1) == back(0.9) == pytest.approx(0.5, abs=0.03)


def test_reliability_counts_everything_once_whatever_the_ties():
    rng = np.random.default_rng(0)
    for _ in range(100):
        c = np.round(rng.uniform(size=rng.integers(1, 400)), int(rng.integers(0, 3)))
        r = rng.random(len(c)) < c
        t = reliability(c, r, 7)
        assert t["count"].sum() == len(c) and len(t) <= 7 and (np.diff(t["confidence"]) > 0).all()
        assert np.isclose((t["count"] * t["right"]).sum(), r.sum()) and 0 <= calibration_error(t) <= 1


def test_calibrated_confidence_comes_true_out_of_sample():
    "Ridge on a planted market: certainty stated on unseen rows against what happened there."
    bars = make_world("momentum", n_bars=9000, n_symbols=3, seed=4, edge=12.0, half_life=6.0).bars
    task = Task(bars, build(bars, NAMES), LIMITS)
    made = CalibratedFit(ForecastFit("boosting", 4), ahead=4).fit(task, [(300, 6000)])
    cal = hits(walked(made, task, [(6100, 9000)]), bars, 4)
    assert calibration_error(reliability(*cal)) < 0.06 and len(cal[0]) > 1000
    rule = CalibratedFit(baseline("momentum", entry=0.5)).fit(task, [(300, 6000)])
    boast, sober = (calibration_error(reliability(*hits(walked(p, task, [(6100, 9000)]), bars))) for p in (rule.policy, rule))
    assert sober < 0.05 < 0.35 < boast


# Forests and selectors ------------------------------------------------------------------------------------------------

def test_a_forest_predicts_as_the_library_does_bit_for_bit_in_any_company():
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    from stratfam.policies.supervised import trees_of
    rng = np.random.default_rng(0)
    for seed in range(3):
        x = rng.normal(size=(2000, 6)).astype("f4")
        y = np.sin(3 * x[:, 0]) + x[:, 1] * (x[:, 2] > 0) + rng.normal(size=2000)
        with threadpool_limits(1):
            m = HistGradientBoostingRegressor(max_iter=20, max_leaf_nodes=12, early_stopping=False, random_state=seed).fit(x, y)
        trees, fresh = trees_of(m, x), rng.normal(0, 2, (500, 6)).astype("f4")
        np.testing.assert_allclose(trees.predict(fresh), m.predict(fresh), rtol=1e-12, atol=1e-12)
        assert (np.concatenate([trees.predict(r[None]) for r in fresh]) == trees.predict(fresh)).all()


def test_a_correlation_filter_keeps_the_first_of_a_crowd(task):
    x = task.features.x
    more = Features(np.concatenate([x, -x[:, :, :1], np.exp(x[:, :, 1:2])], axis=2), (*NAMES, "minus", "exp"), task.features.warmup)
    kept = CorrelationFilter(0.99).choose(dataclasses.replace(task, features=more), [(100, 2000)])
    assert kept == NAMES


# Every fit ------------------------------------------------------------------------------------------------------------

def small(steps=2048):
    "A small fit of every kind this branch adds."
    ppo = SB3Fit("PPO", steps=steps)
    return {"ridge": ForecastFit("ridge", 6), "boosting": ForecastFit("boosting", 6, options=(("rounds", 8),)),
            "filter": SelectedFit(ForecastFit("ridge", 6), (CorrelationFilter(0.8),)),
            "importance": SelectedFit(ForecastFit("ridge", 6), (Importance(2, 6, 2),)),
            "ensemble": EnsembleFit((ForecastFit("ridge", 6), baseline("momentum"), baseline("mean_reversion")), "sharpe", folds=2),
            "vote": EnsembleFit((ppo, ForecastFit("ridge", 6)), "vote", seeds=2, keep=2, folds=2, ahead=2),
            "isotonic": CalibratedFit(ForecastFit("ridge", 6), "isotonic", 3, 2), "platt": CalibratedFit(baseline("momentum"), "platt", 1, 2),
            "router": RouterFit({"calm": ForecastFit("ridge", 6), "wild": baseline("cash")}, regimes=2, memory=40),
            "informed": InformedFit(ForecastFit("ridge", 6), regimes=2, memory=40),
            "enhanced": InformedFit(ppo, regimes=2, memory=40)}


@pytest.mark.parametrize("name", small())
def test_f11_every_fit_reads_train_rows_only(task, name):
    "F11: scaler, selector, regimes, forecasts, votes and curves are equal to the bit when every later bar is another."
    fit, train = small()[name], [(50, 1500)]
    one, two = fit.fit(task, train, 3), fit.fit(changed_after(task, 1501), train, 3)
    assert digest(one) == digest(two)
    assert digest(one) != digest(fit.fit(changed_after(task, 1400), train, 3)), "the test would not see a difference"


@pytest.mark.parametrize("name", small())
def test_f12_nothing_depends_on_the_clock_or_on_global_generators(task, name, monkeypatch):
    "F12: another day, another global seed, the same bits."
    import random
    import time
    fit, train = small()[name], [(50, 1500)]
    one = fit.fit(task, train, 3)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e7)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + 1e7) * 1e9))
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    assert digest(fit.fit(task, train, 3)) == digest(one)


@pytest.mark.parametrize("name", small())
def test_every_fit_is_plain_data_pickles_and_describes_itself(name):
    fit = small()[name]
    assert isinstance(fit, Fit) and json.loads(json.dumps(fit.config())) == fit.config()
    assert pickle.loads(pickle.dumps(fit)) == fit and hash(fit) == hash(pickle.loads(pickle.dumps(fit)))


def test_f8_what_is_shipped_is_the_refit_on_all_train_rows(task):
    "F8: members were chosen out of fold, but those that trade were trained on every train row."
    train = [(50, 2000)]
    made = small()["ensemble"].fit(task, train, 3)
    again = {"ridge": ForecastFit("ridge", 6).fit(task, train, 3), "momentum": baseline("momentum").fit(task)}
    for name, member in zip(made.names, made.members): assert digest(member) == digest(again[name])
    sober = small()["isotonic"].fit(task, train, 3)
    assert digest(sober.policy) == digest(ForecastFit("ridge", 6).fit(task, train, 3))


def test_the_family_cross_validates_and_workers_agree():
    bars = make_world("momentum", n_bars=4000, n_symbols=2, seed=1, edge=12.0, half_life=6.0).bars
    task = Task(bars, build(bars, NAMES[:3]), LIMITS, Costs(2e-4, 2e-4, 0.0))
    fits = {k: small()[k] for k in ("ridge", "ensemble", "isotonic", "router")} | {"momentum": baseline("momentum")}
    wide = declared(task, list(fits.values()))
    folds = CombinatorialPurgedCV(4, 2).folds(wide.bars, wide.label_end, wide.lookback, "12h")
    one, two = (cross_validate(fits, wide, folds, seeds=(0, 1), jobs=j) for j in (1, 2))
    assert list(one.trials.ret) == list(fits) and (one.trials.ret.to_numpy() == two.trials.ret.to_numpy()).all()
    assert one.seeds.groupby("policy").size().to_dict() == {"ensemble": 1, "isotonic": 1, "momentum": 1, "ridge": 1, "router": 1}


def test_every_name_of_the_family_makes_a_fit():
    for name in FAMILY:
        fit = family_fit(name, steps=1000)
        assert isinstance(fit, Fit) and json.loads(json.dumps(calibrated(fit).config()))
    with pytest.raises(ConfigError, match="Did you mean"): family_fit("ensembel")
