"""The splitters against their definition, against planted bugs, and against two other libraries."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stratfam.validation.splits as sp
from stratfam.core import ConfigError, DataError, Fold, bars_from_close

QUICK = settings(derandomize=True, max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---- random markets -------------------------------------------------------------------------------------------------

@st.composite
def markets(draw, most=70):
    "Rows, label ends of varying length inside segments (some touching, some with gaps), look-back, embargo."
    n = draw(st.integers(6, most))
    segments, at = [], draw(st.integers(0, 3))
    while at < n:
        stop = min(n, at + draw(st.integers(1, n)))
        segments.append((at, stop))
        at = stop + draw(st.integers(0, 4))
    if not segments: segments = [(0, n)]
    longest = draw(st.integers(0, 6))
    reach = draw(st.lists(st.integers(0, longest), min_size=n, max_size=n))
    ends = np.arange(n)
    for a, b in segments: ends[a:b] = np.minimum(ends[a:b] + reach[a:b], b - 1)
    return n, ends, draw(st.integers(0, 6)), draw(st.integers(0, 7)), segments


@st.composite
def splitters(draw):
    kind = draw(st.sampled_from(["cpcv", "kfold", "walk"]))
    if kind == "walk": return sp.WalkForward(draw(st.integers(1, 5)), draw(st.sampled_from([None, "3h", "9h"])), draw(st.booleans()))
    k = draw(st.integers(2, 7))
    return sp.PurgedKFold(k) if kind == "kfold" else sp.CombinatorialPurgedCV(k, draw(st.integers(1, k - 1)))


def expected_edges(n, k):
    "The remainder rule, written the way numpy.array_split states it."
    return [0, *np.cumsum([len(part) for part in np.array_split(np.arange(n), k)]).tolist()]


def plan(cv, n, segments):
    "Blocks of each split, and the rows it may train on, straight from the words of the documentation."
    usable = [i for a, b in segments for i in range(a, b)]
    if isinstance(cv, sp.WalkForward):
        if cv.train is None:
            edges = expected_edges(len(usable), cv.n_folds + 1)[1:]
            window = usable[edges[0]] - usable[0]
        else:
            window = int(cv.train[:-1])
            first = sum(i < usable[0] + window for i in usable)
            edges = [first + e for e in expected_edges(len(usable) - first, cv.n_folds)]
        groups = [usable[a:b] for a, b in zip(edges, edges[1:])]
        return [([g], range(max(0, g[0] - window) if cv.rolling else 0, g[0])) for g in groups]
    import itertools
    edges = expected_edges(len(usable), cv.n_groups)
    groups = [usable[a:b] for a, b in zip(edges, edges[1:])]
    return [([groups[g] for g in c], range(n)) for c in itertools.combinations(range(cv.n_groups), getattr(cv, "n_test", 1))]


def short_of_rows(cv, segments):
    "Fewer usable rows than groups."
    usable = [i for a, b in segments for i in range(a, b)]
    if not isinstance(cv, sp.WalkForward): return len(usable) < cv.n_groups
    if cv.train is None: return len(usable) < cv.n_folds + 1
    return sum(i >= usable[0] + int(cv.train[:-1]) for i in usable) < cv.n_folds


def disagreement(cv, market):
    "None when every split equals the definition, else what differs. Refusals must be deserved."
    n, ends, lookback, embargo, segments = market
    usable = sum(b - a for a, b in segments)
    try: folds = cv.folds(n, ends, lookback, pd.Timedelta(hours=embargo), segments, step="1h")
    except DataError as e:
        if "cannot be cut" in str(e): return None if short_of_rows(cv, segments) else f"refused {usable} rows"
        want = [sp.train_by_definition([(g[0], g[-1] + 1) for g in blocks], ends, lookback, embargo, segments, allowed)
                for blocks, allowed in plan(cv, n, segments)]
        return None if not all(want) else "refused a market in which every split has train rows"
    splits = plan(cv, n, segments)
    if len(splits) != len(folds): return f"{len(folds)} splits, expected {len(splits)}"
    for s, (fold, (blocks, allowed)) in enumerate(zip(folds, splits)):
        want = sp.train_by_definition([(g[0], g[-1] + 1) for g in blocks], ends, lookback, embargo, segments, allowed)
        if sp.rows_of(fold.test).tolist() != [q for g in blocks for q in g]: return f"split {s}: test rows {fold.test}"
        if sp.rows_of(fold.train).tolist() != want: return f"split {s}: train {fold.train}, expected {want}"
        for a, b in (*fold.train, *fold.test):
            if not any(x <= a and b <= y for x, y in segments): return f"split {s}: [{a}, {b}) leaves its segment"
    return None


@QUICK
@given(splitters(), markets())
def test_equal_to_the_definition(cv, market):
    assert disagreement(cv, market) is None


@pytest.mark.proof
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(splitters(), markets(120))
def test_equal_to_the_definition_at_length(cv, market):
    assert disagreement(cv, market) is None


# ---- planted bugs ---------------------------------------------------------------------------------------------------

def no_purge(m):
    m.setattr(sp, "_kept_before", lambda line, start: sp._runs_below(np.arange(line.n), 0, np.array(line.segments), start, start))
    m.setattr(sp, "_reach", lambda line, tests: np.array([b[-1][1] - 1 for b in tests]) + line.embargo)


def window_from_first_label_end(m):
    real = sp._runs_below
    def kept(line, start):
        limit = int(line.label_end[start]) - line.lookback
        return real(line.label_end, line.longest, np.array(line.segments), start, limit)
    m.setattr(sp, "_kept_before", kept)


def purge_over_the_whole_span(m):
    real = sp.make_folds
    def make(line, blocks, combos, low, high):
        folds = real(line, blocks, combos, low, high)
        keep, at = [], [0]
        for s, c in enumerate(combos):
            first, last = blocks[c[0], 0], blocks[c[-1], 1]
            iv = folds.train[folds.train_at[s]:folds.train_at[s + 1]]
            keep.append(iv[(iv[:, 1] <= first) | (iv[:, 0] >= last)])
            at.append(at[-1] + len(keep[-1]))
        if not np.diff(at).all(): raise DataError("leaves no row to train on")
        return sp.Folds(line, combos, folds.path, folds.test, folds.test_at, np.concatenate(keep), np.array(at))
    m.setattr(sp, "make_folds", make)


def no_embargo(m):
    m.setattr(sp, "_reach", lambda line, tests: np.array([max(line.label_end[a:b].max() for a, b in t) for t in tests]) + line.lookback)


def embargo_inside_the_purge(m):
    "Counted from the last test row, so that a long label swallows it."
    def reach(line, tests):
        last = np.array([max(line.label_end[a:b].max() for a, b in t) for t in tests])
        return np.maximum(last + line.lookback, np.array([t[-1][1] - 1 for t in tests]) + line.embargo)
    m.setattr(sp, "_reach", reach)


def tail_bars_in_no_fold(m):
    m.setattr(sp, "cut_groups", lambda n, k: np.arange(k + 1) * (n // k))


def no_lookback_before(m):
    m.setattr(sp, "_kept_before", lambda line, start: sp._runs_below(line.label_end, line.longest, np.array(line.segments), start, start))


def no_lookback_after(m):
    m.setattr(sp, "_reach", lambda line, tests: np.array([max(line.label_end[a:b].max() for a, b in t) for t in tests]) + line.embargo)


def intervals_over_a_gap(m):
    real = sp.timeline
    def loose(index, label_end, lookback, embargo, segments=None, step=None):
        return real(index, label_end, lookback, embargo, [(segments[0][0], segments[-1][1])], step)
    m.setattr(sp, "timeline", loose)


def embargo_after_the_last_block_only(m):
    real = sp._reach
    def reach(line, tests):
        out = np.array([max(line.label_end[a:b].max() for a, b in t) for t in tests]) + line.lookback
        out[-1] = real(line, tests)[-1]
        return out
    m.setattr(sp, "_reach", reach)


BUGS = [no_purge, window_from_first_label_end, purge_over_the_whole_span, no_embargo, embargo_inside_the_purge, tail_bars_in_no_fold,
        no_lookback_before, no_lookback_after, intervals_over_a_gap, embargo_after_the_last_block_only]


def fixed_markets(count=120):
    "A plain list of random cases, so that a planted bug is judged on the same ones each time."
    rng, out = np.random.default_rng(7), []
    for _ in range(count):
        n = int(rng.integers(25, 60))
        gap = int(rng.integers(8, n - 8))
        segments = [(0, gap), (gap + int(rng.integers(0, 3)), n)] if rng.random() < 0.5 else [(0, n)]
        ends = np.arange(n)
        for a, b in segments: ends[a:b] = np.minimum(ends[a:b] + rng.integers(0, 5, b - a), b - 1)
        k = int(rng.integers(3, 7))
        out.append((sp.CombinatorialPurgedCV(k, int(rng.integers(1, k))), (n, ends, int(rng.integers(0, 4)), int(rng.integers(0, 6)), segments)))
    return out


def caught(cases):
    return sum(disagreement(cv, market) is not None for cv, market in cases)


def test_the_harness_is_silent_without_a_bug():
    assert caught(fixed_markets()) == 0


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.__name__)
def test_planted_bug_is_caught(bug, monkeypatch):
    bug(monkeypatch)
    assert caught(fixed_markets()) >= 3


# ---- every row added back is refused --------------------------------------------------------------------------------

@QUICK
@given(splitters(), markets(40))
def test_check_folds_accepts_exactly_the_definition(cv, market):
    "The second, independent statement of the rule: ours pass, and any one purged row put back is refused."
    n, ends, lookback, embargo, segments = market
    args = n, ends, lookback, pd.Timedelta(hours=embargo), segments, "1h"
    try: folds = cv.folds(*args)
    except DataError: return
    line = sp.timeline(*args)
    for fold in folds[:6]:
        sp._refuse_leaks(fold, line, "ours")
        train, test = sp.rows_of(fold.train), sp.rows_of(fold.test)
        complete = sp.train_by_definition([(a, b) for a, b in fold.test], ends, lookback, embargo, segments)
        for back in sorted(set(line.rows.tolist()) - set(train.tolist()) - set(test.tolist()) - set(complete)):
            rows = np.sort(np.append(train, back))
            mask = np.zeros(n, bool)
            mask[rows] = True
            with pytest.raises(DataError): sp._refuse_leaks(Fold(sp._runs(mask, line.seg), fold.test), line, "spoilt")


@pytest.mark.parametrize("k", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("n", [60, 500])
def test_every_shuffled_split_is_refused(n, k):
    from sklearn.model_selection import KFold, ShuffleSplit
    ends = np.arange(n)  # labels without length: only the shape can give it away
    for seed in range(5):
        for cv in (KFold(k, shuffle=True, random_state=seed), ShuffleSplit(3, test_size=1 / k, random_state=seed)):
            with pytest.raises(DataError, match="shuffled split is refused|not in time order"): sp.check_folds(cv, n, ends, 0, "0h")


def test_check_folds_takes_time_series_split_once_purged():
    from sklearn.model_selection import TimeSeriesSplit
    ends = sp.label_ends(100, 3)
    with pytest.raises(DataError, match="train row"): sp.check_folds(TimeSeriesSplit(4), 100, ends, 2, "0h")
    assert len(sp.check_folds(TimeSeriesSplit(4, gap=5), 100, ends, 2, "0h")) == 4
    with pytest.raises(DataError, match="train row"): sp.check_folds(TimeSeriesSplit(4, gap=4), 100, ends, 2, "0h")


# ---- coverage and paths ---------------------------------------------------------------------------------------------

@QUICK
@given(st.integers(2, 8), st.data())
def test_all_bars_are_tested_equally_often(k, data):
    p, n = data.draw(st.integers(1, k - 1)), data.draw(st.integers(3 * k, 90))
    folds = sp.CombinatorialPurgedCV(k, p).folds(n, np.arange(n), 0, "0h")
    seen = np.zeros(n, int)
    for _, test in folds.split(): seen[test] += 1
    assert set(seen) == {math.comb(k - 1, p - 1)} and len(folds) == math.comb(k, p)
    assert folds.n_paths == sp.CombinatorialPurgedCV(k, p).n_paths == math.comb(k - 1, p - 1)


@QUICK
@given(markets(), st.integers(3, 6), st.data())
def test_paths_use_every_interval_once(market, k, data):
    n, ends, _, _, segments = market
    p = data.draw(st.integers(1, k - 1))
    try: folds = sp.CombinatorialPurgedCV(k, p).folds(n, ends, 0, "0h", segments)
    except DataError: return
    number = iter(range(10_000))
    values = [[np.full(b - a, next(number), float) for a, b in f.test] for f in folds]
    paths = sp.assemble_paths(folds, values)
    assert paths.shape == (math.comb(k - 1, p - 1), n)
    inside = np.zeros(n, bool)
    for a, b in segments: inside[a:b] = True
    assert np.array_equal(np.isfinite(paths), np.broadcast_to(inside, paths.shape))
    assert set(paths[np.isfinite(paths)]) == set(range(next(number)))
    assert np.isfinite(paths).sum() == sum(len(v) for parts in values for v in parts)


def test_assemble_paths_refuses_what_does_not_fit():
    folds = sp.CombinatorialPurgedCV(4, 2).folds(40, np.arange(40), 0, "0h")
    values = [[np.zeros(b - a) for a, b in f.test] for f in folds]
    with pytest.raises(DataError, match="5 lists of values for 6 folds"): sp.assemble_paths(folds, values[:5])
    with pytest.raises(DataError, match="found 1 arrays"): sp.assemble_paths(folds, [values[0][:1], *values[1:]])
    with pytest.raises(DataError, match="filled twice"): sp.assemble_paths([folds[0], folds[0]], [values[0], values[0]])
    with pytest.raises(DataError, match="no path ids"): sp.assemble_paths([Fold([(0, 5)], [(6, 9)])], [[np.zeros(3)]])


def test_paths_equal_skfolio():
    from skfolio.model_selection import CombinatorialPurgedCV as Peer
    for n_groups, n_test in ((6, 2), (7, 3), (8, 4)):
        ours = sp.CombinatorialPurgedCV(n_groups, n_test).folds(10 * n_groups, np.arange(10 * n_groups), 0, "0h")
        assert np.array_equal(ours.path, Peer(n_groups, n_test).get_path_ids())


# ---- oracles --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_groups, n_test, horizon, embargo", [(6, 2, 0, 0), (6, 2, 3, 0), (6, 2, 3, 4), (8, 4, 2, 1), (10, 2, 0, 5)])
def test_train_rows_equal_skfolio(n_groups, n_test, horizon, embargo):
    "Where definitions coincide: fixed horizon, no look-back, groups that divide the rows."
    from skfolio.model_selection import CombinatorialPurgedCV as Peer
    n = 12 * n_groups
    ours = sp.CombinatorialPurgedCV(n_groups, n_test).folds(n, sp.label_ends(n, horizon), 0, pd.Timedelta(hours=embargo), step="1h")
    for (train, test), (peer_train, peer_test) in zip(ours.split(), Peer(n_groups, n_test, horizon, embargo).split(np.zeros((n, 1)))):
        assert np.array_equal(train, peer_train) and np.array_equal(test, np.concatenate(peer_test))


@QUICK
@given(st.integers(30, 80), st.integers(2, 6), st.integers(0, 4), st.data())
def test_train_rows_equal_purgedcv(n, k, embargo, data):
    "Labels of any length, no look-back. purgedcv's windows are closed at both ends, so its embargo is one bar shorter."
    from purgedcv import CombinatorialPurgedCV as Peer
    p = data.draw(st.integers(1, k - 1))
    ends = np.minimum(np.arange(n) + np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))), n - 1)
    time = pd.Series(pd.date_range("2024-01-01", periods=n + 1, freq="1h"))
    peer = Peer(k, p, prediction_times=time[:n], evaluation_times=time.iloc[ends + 1].reset_index(drop=True),
                embargo=pd.Timedelta(hours=embargo - 1) if embargo else None)
    try: ours = sp.CombinatorialPurgedCV(k, p).folds(time[:n].to_numpy(), ends, 0, pd.Timedelta(hours=embargo))
    except DataError:
        assert any(len(train) == 0 for train, _ in peer.split(np.zeros((n, 1))))
        return
    got = peer.split(np.zeros((n, 1)))
    if embargo == 1: return  # a zero-length closed window: purgedcv treats a zero embargo as none
    for (train, test), (peer_train, peer_test) in zip(ours.split(), got):
        assert np.array_equal(train, peer_train) and np.array_equal(test, peer_test)


# ---- F2: the index cannot turn the embargo off ----------------------------------------------------------------------

def test_every_kind_of_index_drops_the_same_rows():
    n, cv = 120, sp.CombinatorialPurgedCV(6, 2)
    ends = sp.label_ends(n, 2)
    utc = pd.date_range("2024-03-01", periods=n, freq="1h", tz="UTC")
    bars = bars_from_close(utc.tz_localize(None).to_numpy(), np.full((n, 1), 5.0), ["BTC"], "1h")
    same = [(utc, None), (utc.tz_localize(None), None), (utc.tz_convert("Asia/Tokyo"), None), (utc.tz_convert("Europe/Berlin"), None),
            (n, "1h"), (pd.RangeIndex(n), "1h"), (np.arange(n), "1h"), (utc.tz_localize(None).to_numpy("datetime64[s]"), None),
            (pd.DataFrame({"x": 0.0}, index=utc), None), (bars, None), (list(utc), None)]
    first = cv.folds(utc, ends, 3, "6h")
    for index, step in same:
        folds = cv.folds(index, ends, 3, "6h", step=step)
        assert np.array_equal(folds.train, first.train) and np.array_equal(folds.test, first.test)
    assert sum(len(t) for t, _ in first.split()) < sum(len(t) for t, _ in cv.folds(utc, ends, 3, "0h").split())
    for index in (n, pd.RangeIndex(n), np.arange(n)):
        with pytest.raises(ConfigError, match="no bar length"): cv.folds(index, ends, 3, "6h")
    for index in (utc.asi8, np.arange(n) + 5, np.arange(n) * 0.5, [str(i) for i in range(n)]):
        with pytest.raises(DataError, match="neither times nor row numbers"): cv.folds(index, ends, 3, "6h", step="1h")
    for index in (utc[::-1], utc.delete(40), utc.tz_convert("Europe/Berlin").tz_localize(None)[:0].append(utc.tz_localize(None)[[0, 0]])):
        with pytest.raises(DataError): cv.folds(index, ends[:len(index)], 3, "6h")
    with pytest.raises(ConfigError, match="leave step out"): cv.folds(utc, ends, 3, "6h", step="5m")


@pytest.mark.parametrize("embargo", [24, 0, 1.5, np.int64(3), True, -pd.Timedelta("1h"), pd.NaT, "1", "h", "-1h", "1M", None])
def test_an_embargo_without_a_unit_is_refused(embargo):
    with pytest.raises((ConfigError, DataError)): sp.PurgedKFold(3).folds(60, np.arange(60), 0, embargo, step="1h")


def test_embargo_rounds_up():
    hour = np.timedelta64(3600, "s")
    assert [sp.duration_bars(d, hour) for d in ("1s", "60m", "61m", "1d")] == [1, 1, 2, 24]


def test_gaps_of_bars_are_respected():
    close = np.full((60, 1), 5.0)
    close[20:25] = np.nan
    bars = bars_from_close(pd.date_range("2024-01-01", periods=60, freq="1h").to_numpy(), close, ["BTC"], "1h")
    folds = sp.CombinatorialPurgedCV(4, 2).folds(bars, sp.label_ends(60, 2, [(0, 20), (25, 60)]), 1, "2h")
    assert all(b <= 20 or a >= 25 for f in folds for a, b in (*f.train, *f.test))
    assert sorted({int(r) for f in folds for r in sp.rows_of(f.test)}) == [*range(20), *range(25, 60)]
    with pytest.raises(DataError, match="inside its segment"): sp.PurgedKFold(3).folds(bars, sp.label_ends(60, 2), 1, "2h")


def test_label_ends_and_lookback_are_required():
    for missing in ({"lookback": 0, "embargo": "0h"}, {"label_end": np.arange(9), "embargo": "0h"}, {"label_end": np.arange(9), "lookback": 0}):
        with pytest.raises(TypeError): sp.PurgedKFold(3).folds(9, **missing)
    for ends in (np.arange(9.0), np.arange(8), np.arange(9) - 1, np.arange(9) + 1, 3):
        with pytest.raises(DataError): sp.PurgedKFold(3).folds(9, ends, 0, "0h")
    for lookback in (-1, 1.0, True, "5"):
        with pytest.raises(ConfigError): sp.PurgedKFold(3).folds(9, np.arange(9), lookback, "0h")


def test_bad_splitters_and_segments_are_refused():
    cpcv = sp.CombinatorialPurgedCV
    for make, args in ((sp.PurgedKFold, (1,)), (sp.PurgedKFold, (2.0,)), (cpcv, (4, 4)), (cpcv, (4, 0)), (cpcv, (60, 30)), (sp.WalkForward, (0,))):
        with pytest.raises(ConfigError): make(*args)
    for segments in ([(0, 5), (4, 9)], [(5, 9), (0, 5)], [(0, 0)], [(0, 10)], []):
        with pytest.raises(DataError): sp.PurgedKFold(2).folds(9, np.arange(9), 0, "0h", segments)
    with pytest.raises(ConfigError, match="at least one bar"): sp.WalkForward(2, train="0h").folds(9, np.arange(9), 0, "0h", step="1h")
    with pytest.raises(DataError, match="fewer groups or more bars"): sp.WalkForward(2, train="9h").folds(9, np.arange(9), 0, "0h", step="1h")


def test_folds_behave_as_a_sequence():
    folds = sp.CombinatorialPurgedCV(5, 2).folds(50, np.arange(50), 0, "0h")
    assert len(folds) == 10 and folds[-1] == folds[9] == list(folds)[9] and folds[2:4] == [folds[2], folds[3]]
    assert repr(folds) == "Folds(10 splits of 50 rows, 4 paths)"
    with pytest.raises(IndexError): folds[10]
