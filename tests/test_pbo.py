"""PBO against its definition, against purgedcv, against planted bugs; and everything it must refuse."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stratfam.validation.pbo as pb
from stratfam.core import ConfigError, DataError, Trials

QUICK = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def frame(ret, start="2022-01-01"):
    return pd.DataFrame(ret, index=pd.date_range(start, periods=len(ret), freq="1h", tz="UTC"), columns=[f"c{j}" for j in range(ret.shape[1])])


def family(seed, T, N, kind):
    "Returns of several kinds: noise, large means, duplicated columns, idle columns, idle stretches, tiny scale."
    rng = np.random.default_rng(seed)
    ret = rng.normal(0, 0.01, (T, N))
    if kind == "means": ret += rng.normal(0, 0.05, N)
    if kind == "copies": ret[:, rng.integers(0, N, N // 2)] = ret[:, :1]
    if kind == "idle": ret[:, rng.integers(0, N)] = 0.0
    if kind == "stretches": ret[: T // 2, rng.integers(0, N)] = 0.0
    if kind == "constant": ret[: T // 2, rng.integers(0, N)] = 0.003
    if kind == "tiny": ret *= 1e-9
    if kind == "heavy": ret = 0.01 * rng.standard_t(2, (T, N))
    return ret


KINDS = ["noise", "means", "copies", "idle", "stretches", "constant", "tiny", "heavy"]


def disagreement(ret, S, remainder="spread", edges=None):
    "Largest difference from the definition, in tolerances: 1e-12 for logits, a relative 1e-8 for Sharpe ratios."
    edges = pb.block_edges(len(ret), S, remainder) if edges is None else edges
    o, want = pb.pbo(frame(ret), S, remainder), pb.cscv_by_definition(ret, edges)
    gap = np.abs(np.column_stack([o.logits, o.is_sharpe, o.oos_sharpe]) - want)
    return float((gap / np.array([1e-12, 1e-8, 1e-8]) / np.maximum(1.0, np.abs(want) * [0, 1, 1])).max())


@QUICK
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([2, 4, 6]), st.integers(0, 9), st.sampled_from(KINDS), st.data())
def test_equal_to_the_definition(seed, N, S, extra, kind, data):
    assert disagreement(family(seed, 12 * S + extra, N, kind), S, data.draw(st.sampled_from(pb.REMAINDERS))) <= 1


@QUICK
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([2, 4, 6, 8]), st.integers(10, 25), st.sampled_from(KINDS))
def test_equal_to_purgedcv(seed, N, S, rows, kind):
    from purgedcv import probability_of_backtest_overfitting as peer
    ret = family(seed, rows * S, N, kind)
    theirs, ours = peer(ret.T, S), pb.pbo(frame(ret), S, ties="<0")
    np.testing.assert_allclose(ours.logits[::-1], theirs.logits, rtol=0, atol=1e-12, strict=True)
    assert abs(ours.pbo - theirs.pbo) <= 1e-12
    performance = np.column_stack([ours.is_sharpe, ours.oos_sharpe])[::-1]
    np.testing.assert_allclose(performance, theirs.is_oos_performance, rtol=1e-8, atol=1e-12, strict=True)
    if np.isfinite(ours.slope) and ours.is_sharpe.std() > 1e-6: np.testing.assert_allclose(ours.slope, theirs.slope, rtol=1e-6, atol=1e-9)


def test_equal_to_purgedcv_at_full_size_and_with_a_remainder():
    from purgedcv import probability_of_backtest_overfitting as peer
    for T in (320, 327):  # purgedcv spreads the remainder too
        ret = family(3, T, 6, "noise")
        theirs, ours = peer(ret.T, 12), pb.pbo(frame(ret), 12, "spread", "<0")
        np.testing.assert_allclose(ours.logits[::-1], theirs.logits, rtol=0, atol=1e-12, strict=True)
        assert ours.pbo == theirs.pbo


def test_drop_first_equals_dropping_the_rows_beforehand():
    ret = family(4, 173, 8, "noise")
    dropped, cut, spread = pb.pbo(frame(ret), 8, "drop_first"), pb.pbo(frame(ret[173 % 8:]), 8), pb.pbo(frame(ret), 8)
    assert np.array_equal(dropped.logits, cut.logits) and dropped.rows == 168 and spread.rows == 173
    assert not np.array_equal(dropped.is_sharpe, spread.is_sharpe)


@QUICK
@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from([2, 4, 6]), st.sampled_from(KINDS))
def test_company_of_pbo(seed, N, S, kind):
    "Loss, line and dominance, each recomputed the plain way."
    ret = family(seed, 15 * S + 3, N, kind)
    o, edges = pb.pbo(frame(ret), S), pb.block_edges(15 * S + 3, S)
    import itertools
    block = np.repeat(np.arange(S), np.diff(edges))
    every = np.array([[pb.sharpe(x) for x in ret[~np.isin(block, c)].T] for c in itertools.combinations(range(S), S // 2)])
    assert o.prob_loss == np.mean(o.oos_sharpe < 0) and len(o.logits) == math.comb(S, S // 2)
    assert o.chosen.sum() == len(o.logits) and set(o.chosen.index) == {f"c{j}" for j in range(N)}
    grid = o.dominance.index.to_numpy()
    slack = 1e-9 * max(1.0, np.abs(every).max())
    for name, x in (("chosen", o.oos_sharpe), ("every", every.ravel())):
        low, high = ((x[:, None] <= grid + d).mean(axis=0) for d in (-slack, slack))
        assert ((o.dominance[name] >= low - 1e-12) & (o.dominance[name] <= high + 1e-12)).all()
        area = np.maximum(grid - x[:, None], 0).mean(axis=0)
        np.testing.assert_allclose(o.dominance[name + "_area"], area, rtol=1e-8, atol=slack)
    if o.first_order: assert o.second_order and o.oos_sharpe.mean() > every.mean() - slack
    if o.second_order: assert o.oos_sharpe.mean() > every.mean() - slack
    if o.is_sharpe.std() > 1e-6:
        slope, intercept = np.polyfit(o.is_sharpe, o.oos_sharpe, 1)
        np.testing.assert_allclose([o.slope, o.intercept], [slope, intercept], rtol=1e-6, atol=1e-8)
        assert -1e-12 <= o.r2 <= 1 + 1e-12


def test_dominance_of_known_distributions():
    grid = np.array([0.0, 1.0, 2.0])
    def bins(values):
        count, total = np.zeros(4), np.zeros(4)
        pb._drop(np.array(values), grid, count, total)
        return count, total
    assert bins([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0])[0].tolist() == [2, 2, 2, 1]
    better, worse, wider, same = bins([1.0, 2.0]), bins([0.0, 1.0]), bins([0.0, 3.0]), bins([1.0, 2.0])
    assert pb._dominance(grid, better, worse)[1:] == (True, True)
    assert pb._dominance(grid, worse, better)[1:] == (False, False)
    assert pb._dominance(grid, same, better)[1:] == (False, False)
    calm, wild = bins([1.5, 1.6]), wider
    assert pb._dominance(grid, calm, wild)[1:] == (False, True)
    assert pb._dominance(grid, wild, calm)[1:] == (False, False)


# ---- planted bugs ---------------------------------------------------------------------------------------------------

def spread_ignored(m): m.setattr(pb, "block_edges", lambda T, S, remainder="spread": T // S * np.arange(S + 1))
def no_shift_back(m): wrap_walk(m, lambda total, square, size, shift: (total, square, size, shift * 0))
def unequal_blocks_counted_equal(m): wrap_walk(m, lambda t, q, n, s: (t, q, n + (np.arange(len(n)) == 0), s))
def first_block_twice(m): wrap_walk(m, lambda t, q, n, s: (np.concatenate([t[:1], t[:-1]]), np.concatenate([q[:1], q[:-1]]), n, s))


def wrap_walk(m, change):
    real = pb._walk
    m.setattr(pb, "_walk", lambda total, square, size, shift, *rest: real(*change(total, square, size, shift), *rest))


@pytest.mark.parametrize("bug", [spread_ignored, no_shift_back, unequal_blocks_counted_equal, first_block_twice], ids=lambda b: b.__name__)
def test_planted_bug_is_caught(bug, monkeypatch):
    cases = [(family(seed, 12 * S + seed % 7, 6, KINDS[seed % 3]), S) for seed in range(12) for S in (4, 6)]
    edges = [pb.block_edges(len(r), S) for r, S in cases]
    caught = lambda: sum(disagreement(r, S, edges=e) > 1 for (r, S), e in zip(cases, edges))
    assert caught() == 0
    bug(monkeypatch)
    assert caught() >= 3


# ---- invariances ----------------------------------------------------------------------------------------------------

def test_scale_and_column_order_do_not_matter():
    ret = family(9, 400, 12, "noise")
    first = pb.pbo(frame(ret), 8)
    for other in (ret * 250.0, ret[:, ::-1]):
        again = pb.pbo(frame(np.ascontiguousarray(other)), 8)
        assert again.pbo == first.pbo and again.prob_loss == first.prob_loss
        np.testing.assert_allclose(again.slope, first.slope, rtol=1e-9)


def test_memory_layout_does_not_matter():
    ret = family(9, 400, 12, "copies")
    by_row, by_column = frame(ret), frame(ret)
    by_row = pd.DataFrame(np.ascontiguousarray(ret), index=by_row.index, columns=by_row.columns, copy=False)
    by_column = pd.DataFrame(np.asfortranarray(ret), index=by_row.index, columns=by_row.columns, copy=False)
    assert np.array_equal(pb.pbo(by_row, 8).logits, pb.pbo(by_column, 8).logits)


def test_identical_configurations_are_all_at_the_median():
    same = np.repeat(family(1, 200, 1, "noise"), 5, axis=1)
    o = pb.pbo(frame(same), 6)
    assert (o.logits == 0).all() and o.pbo == 1.0 and pb.pbo(frame(same), 6, ties="<0").pbo == 0.0
    assert not o.first_order and not o.second_order


def test_large_mean_keeps_its_digits():
    ret = family(2, 240, 5, "noise") * 1e-4 + 3.0
    o, want = pb.pbo(frame(ret), 6), pb.cscv_by_definition(ret, pb.block_edges(240, 6))
    np.testing.assert_allclose(o.logits, want[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(o.oos_sharpe, want[:, 2], rtol=1e-9)


def test_trials_and_frame_give_the_same():
    f = frame(family(0, 200, 4, "noise"))
    trials = Trials(f, {k: {"n": 1} for k in f.columns}, "1h")
    assert np.array_equal(pb.pbo(trials, 6).logits, pb.pbo(f, 6).logits)


@pytest.mark.proof
def test_noise_gives_one_half():
    values = [pb.pbo(frame(family(seed, 2000, 50, "noise"))).pbo for seed in range(200)]
    assert abs(np.mean(values) - 0.5) < 0.04 and 0.12 < np.std(values) < 0.24


# ---- refusals: F1, F13 ----------------------------------------------------------------------------------------------

GOOD = family(0, 200, 4, "noise")


@pytest.mark.parametrize("bad, match", [
    (GOOD, "labelled DataFrame, found ndarray"), (GOOD.tolist(), "found list"), (None, "found NoneType"),
    (frame(GOOD).T, "is transposed"), (pd.DataFrame(GOOD), "bar times down"), (pd.DataFrame(GOOD.T), "bar times down"),
    (frame(GOOD[:0]), "empty"), (frame(GOOD[:, :0]), "empty"), (frame(GOOD[:, :1]), "at least two columns"),
    (frame(np.where(np.arange(800).reshape(200, 4) == 7, np.nan, GOOD)), "'c3' has a non-finite return"),
    (frame(np.where(np.arange(800).reshape(200, 4) == 7, np.inf, GOOD)), "non-finite"),
    (frame(GOOD[:95]), "95 rows are too few for S=10"), (frame(GOOD[:10]), "10 rows are too few"),
    (frame(GOOD)[::-1], "time order"), (pd.concat([frame(GOOD), frame(GOOD)]), "unique"), (frame(GOOD).set_axis(list("aabc"), axis=1), "same key"),
    (frame(GOOD).astype(object), "dtype object"), (frame(GOOD).astype(str), "expected net simple returns as numbers"),
])
def test_bad_input_raises(bad, match):
    with pytest.raises(DataError, match=match): pb.pbo(bad, 10)


@pytest.mark.parametrize("S", [0, -2, 1, 7, 26, 8.0, "8", True])
def test_bad_S_raises(S):
    with pytest.raises(ConfigError, match="even number of blocks"): pb.pbo(frame(GOOD), S)


def test_unknown_conventions_raise():
    with pytest.raises(ConfigError, match="Did you mean 'spread'"): pb.pbo(frame(GOOD), 8, "spraed")
    with pytest.raises(ConfigError, match="tie convention"): pb.pbo(frame(GOOD), 8, ties="<")


def test_the_result_cannot_be_changed():
    o = pb.pbo(frame(GOOD), 8)
    with pytest.raises(AttributeError): o.pbo = 0.0
    with pytest.raises(ValueError): o.logits[0] = 9.0
    assert repr(o).startswith("Overfitting(pbo=")
