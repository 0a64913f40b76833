"""Faults of a well-known study framework, each by the number it has in our notes: planted here, they must be seen or impossible."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
import study_fits

from stratfam.core import DataError, Env, Trials, VirtualClock, bars_per_year, digest
from stratfam.data.features import build
from stratfam.data.store import align
from stratfam.data.worlds import make_world
from stratfam.market.backtest import walk
from stratfam.policies.base import Task, baseline, load, read_about, task_arena
from stratfam.policies.sb3 import SB3Fit
from stratfam.risk.limits import limits_from
from stratfam.validation.ledger import Ledger
from stratfam.validation.pbo import pbo
from stratfam.validation.runner import Mapped, Work, do_work, share_task
from stratfam.validation.search import Design, first_rows, load_study, search, study_folds, warm_segments, whole_task
from stratfam.validation.space import members_from
from stratfam.validation.splits import CombinatorialPurgedCV, check_folds, label_ends
from stratfam.validation.statistics import clean, labelled, sharpe
from stratfam.validation.study import cross_validate, path_sharpes
from stratfam.validation.validate import refit, seal, unseal, validate

LOOSE = limits_from(max_drawdown=None, daily_loss=None, stop_loss=None, take_profit=None)


def market(n=900, N=2, step="1h", **more):
    bars = make_world("gbm", n, N, step, seed=8, **more).bars
    return Task(bars, build(bars, ("return_1", "return_24", "volatility_24")), LOOSE)


def dates(n): return pd.date_range("2024-01-01", periods=n, freq="h")


# F1: returns averaged over time, S blocks of no rows, every logit NaN, and "PBO = 0 %" -----------------------------------

@pytest.mark.parametrize("rows", [2, 10, 13])
def test_f1_too_few_rows_are_refused(rows):
    with pytest.raises(DataError): pbo(pd.DataFrame(np.random.default_rng(0).normal(size=(rows, 50)), dates(rows)), S=14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_f1_nan_is_never_a_pass(bad):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(500, 20)), dates(500))
    frame.iloc[300, 7] = bad
    for f in (pbo, labelled, lambda x: Trials(x, {k: {} for k in x}, "1h"), lambda x: clean(x[7])):
        with pytest.raises(DataError): f(frame)


# F2: an index of row numbers turned the embargo into nothing ----------------------------------------------------------------

def test_f2_the_embargo_drops_the_same_rows_whatever_the_index():
    n, ends = 600, label_ends(600, 3)
    times = pd.date_range("2022-02-02", periods=n, freq="5min")
    kinds = [times, times.tz_localize("UTC"), times.tz_localize("Asia/Tokyo"), pd.DataFrame(index=times)]
    folds = [CombinatorialPurgedCV(5, 2).folds(k, ends, 10, "2h") for k in kinds]
    folds.append(CombinatorialPurgedCV(5, 2).folds(n, ends, 10, "2h", step="5m"))
    assert all([f.train for f in g] == [f.train for f in folds[0]] for g in folds)
    bare = CombinatorialPurgedCV(5, 2).folds(times, ends, 10, "0h")
    dropped = [sum(b - a for a, b in x.train) - sum(b - a for a, b in y.train) for x, y in zip(bare, folds[0])]
    assert max(dropped) == 28 and min(dropped) == 0, "24 rows of five minutes, 14 beyond what the look-back takes, behind each of two blocks"


def test_f2_row_numbers_without_a_bar_length_raise():
    from stratfam.core import ConfigError
    with pytest.raises(ConfigError): CombinatorialPurgedCV(5, 2).folds(pd.RangeIndex(600), label_ends(600, 3), 10, "2h")


# F7: folds that are not neighbours were glued, and held positions earned the jump between them --------------------------------

def test_f7_no_path_earns_the_jump_across_a_seam():
    task = market()
    close = task.bars.close.copy()
    folds = CombinatorialPurgedCV(6, 2).folds(task.bars, task.label_end, task.features.warmup, "2h", warm_segments(task))
    edges = sorted({iv[0] for f in folds for iv in f.test})[1:]
    factor = np.ones(len(close))
    for k, at in enumerate(edges): factor[at:] *= 3.0 if k % 2 else 1 / 3.0
    moved = {k: getattr(task.bars, k) * factor[:, None] for k in ("open", "high", "low", "close")}
    bars = dataclasses.replace(task.bars, **moved)
    jumpy = Task(bars, build(bars, task.features.names), LOOSE)
    cv = cross_validate({"hold": baseline("buy_and_hold"), "trader": study_fits.Trader(0.2)}, jumpy, folds)
    assert cv.paths["hold"].abs().to_numpy().max() < 0.2 and cv.paths["trader"].abs().to_numpy().max() < 0.2, "each jump is 200 %"
    for a, b in sorted({iv for f in folds for iv in f.test}):
        one = walk(baseline("buy_and_hold").fit(jumpy), task_arena(jumpy), jumpy.features, [(a, b)])[0]
        assert one.ret[0] == 0.0 and (one.weight[0] == 0).all() and (one.weight[-1] == 0).all()


def test_f7_a_learner_never_steps_across_a_seam():
    from stratfam.core import ObservationSpec
    from stratfam.market.env import BatchEnv, Reward, actions_for
    task = market()
    a = task_arena(task)
    env = BatchEnv(a, task.features, ObservationSpec(("return_1",), 1), [(50, 200), (500, 650)], actions_for(a), Reward(), 16, 40, 0)
    env.reset(0)
    rng = np.random.default_rng(0)
    for _ in range(400):
        before = env.t.copy()
        _, _, end, cut = env.step(rng.uniform(0, 1, (16, 2)).astype("f4"))
        on = ~(end | cut)
        assert (env.t[on] == before[on] + 1).all() and all(50 <= t < 200 or 500 <= t < 650 for t in env.t)


# F8: the stored agent was the last split's, trained on 60 % of the rows --------------------------------------------------------

TRADERS = members_from([{"name": "trader", "fit": "study_fits:Trader", "search": {"turnover": {"low": 0.05, "high": 0.3}}}])


def judged(folder, seed=1):
    bars = make_world("gbm", 900, 2, "1d", seed=seed).bars
    design, env = Design(trials=3, batch=3, seeds=1, groups=4, embargo="2d"), Env(VirtualClock())
    task = seal(whole_task(bars, TRADERS, LOOSE, names=("return_1", "return_6")), design.holdout, folder / "s")
    with Ledger(folder / "l.db", env) as book:
        search(TRADERS, task, design, folder / "s", book, "one", backend="serial")
        return validate(folder / "s", book, env)


def test_f8_the_saved_model_is_the_refit_on_all_rows_and_the_verdict_names_it(tmp_path):
    j = judged(tmp_path)
    model, every = load(tmp_path / "s" / "model", trust=True), tuple(warm_segments(j.found.task))
    assert tuple(tuple(int(x) for x in r) for r in model.rows) == every and every[-1][1] == len(j.found.task.bars)
    assert all(sum(b - a for a, b in f.train) < sum(b - a for a, b in every) for f in j.found.folds)
    assert read_about(tmp_path / "s" / "model")["digest"] == j.verdict.digests["model"] == digest(refit(j.found, j.pick))
    assert j.verdict.digests["model"] != digest(j.found.fits[j.pick].fit(j.found.task, j.found.folds[-1].train, 0))


def test_f8_the_study_never_saw_the_hold_out(tmp_path):
    j = judged(tmp_path)
    whole, cut = unseal(tmp_path / "s")
    assert len(j.found.task.bars) == cut == int(0.85 * len(whole.bars)) and digest(first_rows(whole, cut)) == digest(j.found.task)
    assert max(f.test[-1][1] for f in j.found.folds) <= cut and j.found.task.label_end.max() < cut


# F9: shuffled and overlapping splits ---------------------------------------------------------------------------------------------

def test_f9_shuffled_and_overlapping_splits_are_refused():
    from sklearn.model_selection import KFold, ShuffleSplit, TimeSeriesSplit
    n, ends = 300, label_ends(300, 1)
    for bad in (KFold(5, shuffle=True, random_state=0), ShuffleSplit(3, random_state=0)):
        with pytest.raises(DataError, match="shuffled"): check_folds(bad, n, ends, 0, "0h", step="1h")
    with pytest.raises(DataError, match="overlap"): check_folds([(np.arange(200), np.arange(150, 300))], n, ends, 0, "0h", step="1h")
    with pytest.raises(DataError, match="purge"): check_folds(TimeSeriesSplit(4), n, label_ends(n, 5), 10, "0h", step="1h")
    rows = np.random.default_rng(0).permutation(300)
    with pytest.raises(DataError, match="time order"): Trials(pd.DataFrame({"a": np.zeros(300)}, dates(300)[rows]), {"a": {}}, "1h")


# F10: coins glued by row number: one missing bar shifted a coin against the others -------------------------------------------------

def test_f10_a_missing_bar_shifts_nothing():
    whole = make_world("gbm", 700, 2, "1h", seed=3).bars
    frames = {s: pd.DataFrame({k: getattr(whole, k)[:, i] for k in ("open", "high", "low", "close", "volume")},
                              pd.DatetimeIndex(whole.time, tz="UTC")) for i, s in enumerate(whole.symbols)}
    frames[whole.symbols[1]] = frames[whole.symbols[1]].drop(frames[whole.symbols[1]].index[400])
    bars = align(frames, whole.step, "spot", {})
    there = np.arange(700) != 400
    assert np.array_equal(bars.close[:, 0], whole.close[:, 0]) and np.array_equal(bars.close[there, 1], whole.close[there, 1])
    assert not bars.ok[400, 1] and np.isnan(bars.close[400, 1])
    task = Task(bars, build(bars, ("return_1",)), LOOSE)
    folds = study_folds(task, Design(groups=4, embargo="2h"))
    assert not any(a <= 400 < b for f in folds for a, b in (*f.train, *f.test)), "no fold holds the row in which a coin is missing"
    cv = cross_validate({"hold": baseline("buy_and_hold")}, task, folds)
    at = cv.trials.ret.index.get_loc(pd.Timestamp(bars.time[400]))
    assert cv.trials.ret["hold"].iloc[at] == 0.0


# F11: scalers, selectors and models see train rows alone ---------------------------------------------------------------------------

@pytest.mark.parametrize("fit", [SB3Fit("PPO", steps=600, accounts=4, episode=30), SB3Fit("SAC", steps=200, accounts=4, episode=30,
                                 options=(("learning_starts", 50),))], ids=["ppo", "sac"])
def test_f11_what_lies_outside_the_train_rows_changes_nothing(fit):
    task, train = market(500), ((60, 200), (300, 400))
    other = make_world("gbm", 500, 2, "1h", seed=99).bars
    far = np.ones(500, bool)
    for a, b in train: far[a - 26:b + 2] = False
    mixed = {k: np.where(far[:, None], getattr(other, k), getattr(task.bars, k)) for k in ("open", "high", "low", "close", "volume")}
    x = np.where(far[:, None, None], 1e3, task.features.x).astype("f4")
    changed = Task(dataclasses.replace(task.bars, **mixed), dataclasses.replace(task.features, x=x), LOOSE, inputs=None)
    one, two = fit.fit(task, train, 0), fit.fit(changed, train, 0)
    assert digest(one.spec) == digest(two.spec), "the scaler has seen rows outside the train set"


# F12: results that depend on how fast the machine was --------------------------------------------------------------------------------

def test_f12_a_slow_machine_finds_the_same(tmp_path):
    task = market(400)
    source = Mapped(str(share_task(task, tmp_path)))
    fast, slow = (do_work(source, Work(study_fits.Slow(0.1, pause), ((50, 200),), ((250, 390),), 3)) for pause in (0.0, 0.3))
    assert fast.same(slow) and slow.seconds > fast.seconds + 0.2


# F13: T x N and N x T -------------------------------------------------------------------------------------------------------------------

def test_f13_only_labelled_frames():
    x = np.random.default_rng(0).normal(0, 0.01, (600, 8))
    frame = pd.DataFrame(x, dates(600), [f"c{k}" for k in range(8)])
    pbo(frame, 8)
    for bad in (x, x.T, frame.T, frame.reset_index(drop=True), pd.DataFrame(x.T, index=frame.columns, columns=frame.index)):
        with pytest.raises(DataError): pbo(bad, 8)
        with pytest.raises(DataError): labelled(bad)
    with pytest.raises(DataError): Trials(frame.T, {}, "1h")


# F14: a year of 365 days of 24 hours, read from the bars ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("step", "per_year"), [("5m", 105_120), ("1h", 8_760), ("1d", 365)])
def test_f14_the_year_comes_from_the_bars(step, per_year):
    task = market(700, step=step)
    folds = CombinatorialPurgedCV(4, 2).folds(task.bars, task.label_end, task.features.warmup, "0h", warm_segments(task))
    cv = cross_validate({"hold": baseline("buy_and_hold")}, task, folds)
    assert bars_per_year(task.bars.step) == per_year
    r = cv.paths["hold"].iloc[:, 0].to_numpy()
    assert cv.seeds["sharpe"].iloc[0] == pytest.approx(r.mean() / r.std(ddof=1) * per_year ** 0.5)
    assert sharpe(r, step) == pytest.approx(path_sharpes(r[None], task.bars.step)[0])


def test_a_study_that_was_read_back_is_the_study(tmp_path):
    j = judged(tmp_path)
    again = load_study(tmp_path / "s")
    assert again.evidence().trials.ret.equals(j.found.evidence().trials.ret) and again.trials == j.found.trials
