"Features: formulas against plain pandas, causality at both ends, planted leaks, runs, flat markets, scaling on train rows."
import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from stratfam.core import PRICES, Bars, ConfigError, DataError, Fold, bars_from_close, select
from stratfam.data.features import (CLOSE_ONLY, DEFAULT, FEATURES, TOLERANCE, Feature, age, build, causality_sweep, check_causal, fit_scaler,
                                    measure_warmup)
from stratfam.data.worlds import make_world

SPOT = tuple(n for n in FEATURES if n != "funding_24")
DATA = Path(os.environ.get("STRATFAM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def world(T=3000, N=2, seed=0, step="1h", name="crypto_like", **more):
    return make_world(name, T, N, step, seed, **more).bars


def changed(bars, ok=None, price=1.0, volume=1.0):
    ok = bars.ok if ok is None else ok
    cut = {k: np.where(ok, getattr(bars, k) * price, np.nan) for k in PRICES}
    return dataclasses.replace(bars, volume=np.where(ok, bars.volume * volume, np.nan), ok=ok, **cut)


def read(folder, names, step, rows):
    "The last `rows` bars of the files of a data folder, aligned by timestamp."
    if not (DATA / folder).exists(): pytest.skip(f"no real bars in {DATA / folder}; set STRATFAM_DATA to a folder that holds them")
    frames = [pd.read_parquet(DATA / folder / f"{n}USDT-{step}.parquet").set_index("timestamp") for n in names]
    ms = {"1h": 3_600_000, "5m": 300_000}[step]
    last = min(f.index[-1] for f in frames)
    grid = np.arange(last - (rows - 1) * ms, last + 1, ms)
    of = lambda k: np.stack([f[k].reindex(grid).to_numpy("f8") for f in frames], axis=1)
    ok = np.isfinite(of("close"))
    return Bars((grid * 1_000_000).astype("datetime64[ns]"), step, *(of(k) for k in (*PRICES, "volume")), np.zeros(ok.shape), ok, names)


# Formulas, written a second time without TA-Lib ---------------------------------------------------------------------------------

def wilder(x, n): return x.ewm(alpha=1 / n, adjust=False).mean()


def by_hand(b):
    "The registry's formulas in plain pandas, for symbol 0; recursions start otherwise and must agree after the warm-up."
    o, h, l, c, v = (pd.Series(getattr(b, k)[:, 0]) for k in (*PRICES, "volume"))
    ema = lambda x, n: x.ewm(span=n, adjust=False).mean()
    line = ema(c, 12) - ema(c, 26)
    signal, gain, loss = ema(line, 9), c.diff().clip(lower=0), -c.diff().clip(upper=0)
    up, down = h.diff(), -l.diff()
    tr = pd.concat([h - l, (h - c.shift()).abs(), (l - c.shift()).abs()], axis=1).max(axis=1)
    tr[0] = np.nan
    plus, minus = (wilder(m, 14) / wilder(tr, 14) for m in (up.where((up > down) & (up > 0), 0.0), down.where((down > up) & (down > 0), 0.0)))
    dx = (plus - minus).abs() / (plus + minus)
    typical, r = (h + l + c) / 3, np.log(c).diff()
    mean_dev = lambda x, n: x.rolling(n).apply(lambda w: np.abs(w - w.mean()).mean(), raw=True)
    cci = lambda x: (x - x.rolling(14).mean()) / (0.015 * mean_dev(x, 14)) / 100
    mid, sd = c.rolling(20).mean(), c.rolling(20).std(ddof=0)
    pressure, low = c - np.minimum(l, c.shift()), [tr.rolling(n).sum() for n in (7, 14, 28)]
    uo = sum(w * pressure.rolling(n).sum() / t for w, n, t in zip((4, 2, 1), (7, 14, 28), low)) / 7 * 100
    high24, low24 = h.rolling(24).max(), l.rolling(24).min()
    angle = 2 * np.pi * ((pd.Series(b.time) + pd.Timedelta("1h")).dt.hour / 24)
    return {"macd": line / c, "macd_signal": signal / c, "macd_hist": (line - signal) / c, "ema_gap": np.log(c / ema(c, 40)),
            **{f"return_{n}": np.log(c / c.shift(n)) for n in (1, 6, 24, 168)}, "drawdown_168": np.log(c / c.rolling(168).max()),
            "rsi": (100 - 100 / (1 + wilder(gain, 14) / wilder(loss, 14)) - 50) / 50, "cci": cci(typical), "cci_close": cci(c), "dx": dx,
            "adx": wilder(dx, 14), "di": plus - minus, "ultosc": (uo - 50) / 50, "stochastic": 2 * (c - low24) / (high24 - low24) - 1,
            "atr": wilder(tr, 14) / c, "bollinger_b": (c - mid) / (2 * sd), "bollinger_width": 4 * sd / mid,
            "volatility_24": r.rolling(24).std(ddof=0), "volatility_168": r.rolling(168).std(ddof=0),
            "volatility_ratio": np.log(r.rolling(24).std(ddof=0) / r.rolling(168).std(ddof=0)),
            "volume_z": (v - v.rolling(96).mean()) / v.rolling(96).std(ddof=0),
            "obv_change": (np.sign(c.diff()) * v).rolling(24).sum() / v.rolling(24).sum(), "hour_sin": np.sin(angle), "hour_cos": np.cos(angle)}


def test_every_formula_is_what_the_table_says():
    b = world(2500, seed=3)
    f, want = build(b, SPOT), by_hand(b)
    assert set(SPOT) - set(want) == {"dx_close"}
    for k, name in enumerate(SPOT):
        if name != "dx_close":
            got, ref = f.x[600:, 0, k].astype("f8"), want[name].to_numpy()[600:]
            assert_allclose(got, ref, rtol=3e-4, atol=3e-5 * np.abs(ref).max(), err_msg=name)


def test_funding_is_summed_over_a_day_of_hours():
    b = world(200, 1, market="perp", funding=1e-4)
    assert_allclose(build(b, ["funding_24"]).x[23:, 0, 0], np.full(177, 3e-4), rtol=1e-5)
    hidden = dataclasses.replace(b, funding=np.full(b.close.shape, np.nan))
    with pytest.raises(DataError, match="funding, which is unknown"): build(hidden, ["funding_24"])


# Causality ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["garch", "merton", "drift_burst", "crypto_like"])
def test_all_features_are_causal_and_their_warmups_hold(name):
    b = world(3000, 2, 5, name=name)
    assert causality_sweep(b, SPOT, seed=1).causal.all()
    assert (measure_warmup(b, SPOT, seed=1).slack >= 0).all()


@pytest.mark.parametrize("first", [0.2, 5.0])
def test_a_warmup_holds_after_a_start_inside_a_crash(first):
    "History that begins one bar before the price falls by 80 % or rises fivefold."
    b = world(2400, 1, 7)
    factor = np.where(np.arange(2400) >= 1001, first, 1.0)[:, None]
    cut = {k: getattr(b, k) * factor for k in PRICES}
    cut["open"][1001] = b.close[1000]
    cut["high"] = np.maximum(cut["high"], cut["open"])
    cut["low"] = np.minimum(cut["low"], cut["open"])
    b = dataclasses.replace(b, **cut)
    full, late = build(b, SPOT), build(b[1000:], SPOT)
    W, scale = full.warmup, np.nanstd(full.x[:, 0], axis=0)
    # Ten thousand times the usual first surprise costs a recursion its margin; nothing that a scaled observation could show.
    assert (np.abs(late.x[W:, 0] - full.x[1000 + W:, 0]) <= 2e-5 * scale + 2e-7 * np.abs(full.x[1000 + W:, 0])).all()


def roll(n, **k): return lambda c: pd.Series(np.log(c)).diff().rolling(n, **k).mean().to_numpy()


def standardised(c):
    r = np.diff(np.log(c), prepend=np.log(c[0]))
    return (r - r.mean()) / r.std()


def log_diff(c):
    return np.log(c).diff() if isinstance(c, pd.Series) else np.diff(np.log(c), prepend=np.log(c[0]))


def detrended(c):
    t = np.arange(len(c))
    return np.log(c) - np.polyval(np.polyfit(t, np.log(c), 1), t)


def lowpass(c):
    wave = np.fft.rfft(np.log(c))
    return np.log(c) - np.fft.irfft(wave * (np.arange(len(wave)) < 50), len(c))


LEAKS = {
    "centered": roll(21, center=True), "backward_mean": lambda c: roll(20)(c[::-1])[::-1],
    "next_return": lambda c: np.append(np.diff(np.log(c)), 0.0), "standardised": standardised,
    "rank": lambda c: pd.Series(c).rank(pct=True).to_numpy(),
    "back_filled": lambda c: pd.Series(np.where(np.arange(len(c)) % 7 == 6, np.log(c), np.nan)).diff(7).bfill().ffill().to_numpy(),
    "min_max": lambda c: (c - c.min()) / (c.max() - c.min()),
    "clipped": lambda c: np.clip(log_diff(c), *np.quantile(log_diff(c), [0.01, 0.99])),
    "central_gradient": lambda c: np.gradient(np.log(c)), "linear_detrend": detrended, "fft_lowpass": lowpass,
    "reversed_ema": lambda c: np.log(c / talib.EMA(np.ascontiguousarray(c[::-1]), 20)[::-1]),
    "cumulative": lambda c: np.cumsum(np.sign(log_diff(c))) / 100, "days_since_start": lambda c: np.arange(len(c)) / 1000.0,
    "expanding_z": lambda c: (log_diff(pd.Series(c)) / log_diff(pd.Series(c)).expanding().std()).to_numpy(),
    "random": lambda c: np.random.default_rng().standard_normal(len(c)), "last_price": lambda c: np.log(c / c[-1]),
    "first_price": lambda c: np.log(c / c[0]), "forward_max": lambda c: np.log(pd.Series(c[::-1]).rolling(5).max().to_numpy()[::-1] / c),
    "one_bar_late_warmup": lambda c: np.log(c / pd.Series(c).shift(26).to_numpy())}


@pytest.mark.parametrize("name", list(LEAKS))
def test_a_planted_leak_is_caught(name):
    b = world(3000, 2, 11)
    leak = Feature(name, 25, ("close",), LEAKS[name])
    table = causality_sweep(b, [], [leak])
    assert not table.causal[name]
    with pytest.raises(ConfigError, match=f"{name!r} (looks ahead|depends on where)"): check_causal(b, extra=[leak])


@pytest.mark.parametrize("name, warmup, f", [
    ("lagged", 30, lambda c: np.log(c / pd.Series(c).shift(30).to_numpy())),
    ("trailing_rank", 50, lambda c: pd.Series(log_diff(c)).rolling(50).rank(pct=True).to_numpy()),
    ("ewm", 700, lambda c: pd.Series(log_diff(c)).ewm(halflife=24).std().to_numpy()), ("sine", 0, lambda c: np.sin(np.log(c))),
    ("trailing_median", 20, lambda c: pd.Series(log_diff(c)).rolling(20).median().to_numpy())])
def test_an_honest_feature_is_not_accused(name, warmup, f):
    check_causal(world(3000, 2, 11), extra=[Feature(name, warmup, ("close",), f)])


def test_the_sweep_names_the_offending_time():
    b = world(2000, 1)
    table = causality_sweep(b, [], [Feature("peek", 0, ("close",), lambda c: np.append(c[1:], c[-1]) / c)])
    when = pd.Timestamp(table["where"].item().removesuffix(" UTC"))
    assert pd.Timestamp(b.time[0]) <= when <= pd.Timestamp(b.time[-1])


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
@settings(max_examples=15, deadline=None)
def test_runs_are_islands(seed, holes):
    "With any pattern of holes, each run of each symbol has the features it would have alone, bit for bit."
    rng = np.random.default_rng(seed)
    b = world(1500, 2, 1)
    ok = np.ones(b.ok.shape, bool)
    for _ in range(holes):
        a = int(rng.integers(0, 1490))
        ok[a:a + int(rng.integers(1, 60)), int(rng.integers(2))] = False
    if rng.random() < 0.3: ok[:int(rng.integers(1, 500)), 0] = False
    b = changed(b, ok)
    f = build(b)
    for n, s in enumerate(b.symbols):
        one, edges = select(b, [s]), np.flatnonzero(np.diff(np.concatenate([[0], ok[:, n], [0]])))
        alone = np.full((1500, len(DEFAULT)), np.nan, "f4")
        for a, z in zip(edges[::2], edges[1::2]): alone[a:z] = build(one[a:z]).x[:, 0]
        assert_array_equal(f.x[:, n], alone)
    assert (np.isfinite(f.x).all(axis=2) == (age(b) > f.warmup)).all()


def test_the_future_never_moves_a_row_of_build():
    b = world(2000, 2, 2)
    full = build(b, SPOT).x
    for e in (700, 1203, 1999): assert_array_equal(build(b[:e], SPOT).x, full[:e])


@pytest.mark.parametrize("k", [1, 2, 40])
def test_a_live_window_gives_the_same_last_row(k):
    b = world(2600, 2, 8)
    full = build(b, SPOT)
    scale = np.nanstd(full.x, axis=(0, 1))
    for t in range(1000, 2600, 97):
        live = build(b[t + 1 - full.warmup - k:t + 1], SPOT)
        assert (np.abs(live.x[-1] - full.x[t]) <= 2e-6 * scale + 2e-7 * np.abs(full.x[t])).all()


# Degenerate markets ---------------------------------------------------------------------------------------------------------------

def test_prices_and_volumes_have_no_unit():
    b = world(1500, 1, 4)
    want = build(b, SPOT).x[400:]
    for price, volume in ((1e-9, 1e12), (1e6, 1e-6), (0.37, 2.5)):
        got = build(changed(b, price=price, volume=volume), SPOT).x[400:]
        assert_allclose(got, want, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("price", [0.1, 1e-8, 63_123.45])
def test_a_market_that_stands_still_is_neutral(price):
    T, flat = 900, lambda: np.full((900, 1), price)
    times = np.datetime64("2024-01-01", "ns") + np.arange(T) * np.timedelta64(3600, "s")
    b = Bars(times, "1h", flat(), flat(), flat(), flat(), np.zeros((T, 1)), np.zeros((T, 1)), np.ones((T, 1), bool), ("X",))
    names = tuple(n for n in SPOT if not n.startswith("hour"))
    assert_allclose(build(b, names).x[400:], np.zeros((500, 1, len(names))), atol=1e-6)


def test_a_market_that_stops_in_the_middle_stays_finite():
    b = world(2500, 1, 9)
    cut = {k: np.array(getattr(b, k)) for k in (*PRICES, "volume")}
    for k in PRICES: cut[k][1200:] = b.close[1199]
    cut["volume"][1200:] = 0.0
    x = build(dataclasses.replace(b, **cut), SPOT).x[400:]
    bounded = [SPOT.index(n) for n in ("rsi", "cci", "dx", "bollinger_b", "volume_z", "obv_change", "ultosc")]
    assert np.isfinite(x).all() and np.abs(x[:, 0, bounded]).max() < 10


def test_too_little_history_is_nan_and_no_history_is_empty():
    b = world(300, 2)
    assert np.isnan(build(b).x).all() and build(b[:0]).x.shape == (0, 2, len(DEFAULT))
    assert build(b[:1], ["hour_sin"]).x.shape == (1, 2, 1)


def test_a_warmup_one_bar_short_is_refused_on_its_first_row():
    b = world(200, 1)
    late = Feature("late", 25, ("close",), lambda c: np.log(c / pd.Series(c).shift(26).to_numpy()))
    with pytest.raises(DataError, match="'late' is nan for SYN1USDT at 2020-01-02 01:00 UTC, after its warm-up of 25"): build(b, [], [late])
    assert np.isfinite(build(b, [], [dataclasses.replace(late, warmup=26)]).x[26:]).all()


@pytest.mark.parametrize("name", [n for n in SPOT if set(FEATURES[n].needs) & {"high", "low", "volume"}])
def test_closes_alone_are_refused_by_range_and_volume(name):
    b = world(50, 1)
    closes = bars_from_close(b.time, b.close, b.symbols, "1h")
    with pytest.raises(DataError, match=f"{name!r} needs .* closes alone"): build(closes, [name])


def test_close_only_features_do_not_need_more():
    b = world(800, 2)
    assert_array_equal(build(bars_from_close(b.time, b.close, b.symbols, "1h"), CLOSE_ONLY).x, build(b, CLOSE_ONLY).x)


@pytest.mark.parametrize("names, extra, message", [
    (["rsii"], [], "Did you mean 'rsi'"), ([], [], "no feature is named"), (["rsi", "rsi"], [], "named twice"),
    ([], [Feature("macd", 1, ("close",), np.log)], "exists already"), ([], [Feature("mean", 1, ("close",), np.mean)], "one number per bar")])
def test_bad_requests_are_refused(names, extra, message):
    with pytest.raises(ConfigError, match=message): build(world(500, 1), names, extra)


def test_a_feature_cannot_write_into_the_bars():
    def vandal(c):
        c[-1] = 0.0
        return c
    with pytest.raises(ValueError, match="read-only"): build(world(100, 1), [], [Feature("vandal", 0, ("close",), vandal)])


def test_registered_features_pickle_by_reference():
    for f in FEATURES.values(): assert pickle.loads(pickle.dumps(f)) == f


# Scaling -------------------------------------------------------------------------------------------------------------------------

@given(st.integers(0, 2**32 - 1), st.sampled_from(["robust", "standard"]))
@settings(max_examples=20, deadline=None)
def test_a_scaler_sees_train_rows_only(seed, kind):
    "Whatever happens to the other rows, missing ones included, and whatever their number, the scaler is the same to the bit."
    rng = np.random.default_rng(seed)
    f = build(world(2000, 2, 6), ["rsi", "return_1", "volume_z"])
    cut = np.sort(rng.choice(np.arange(350, 1900), 4, replace=False))
    train = ((int(cut[0]), int(cut[1]) + 1), (int(cut[2]) + 1, int(cut[3]) + 2))
    want = fit_scaler(f, train, kind=kind)
    inside = np.zeros(2000, bool)
    for a, b in train: inside[a:b] = True
    x = np.array(f.x)
    x[~inside] = rng.choice([np.nan, 1e9, -5.0, 0.0], (int((~inside).sum()), 2, 3))
    for other in (dataclasses.replace(f, x=x), dataclasses.replace(f, x=x[:train[1][1]])):
        got = fit_scaler(other, train, kind=kind)
        assert_array_equal(got.center, want.center)
        assert_array_equal(got.scale, want.scale)


def test_a_scaler_is_numpy_on_the_train_rows():
    f = build(world(2000, 2, 6), ["rsi", "atr", "return_24"])
    fold = Fold(((0, 900), (1200, 1500)), ((900, 1200),))
    rows = np.concatenate([f.x[300:900], f.x[1200:1500]]).reshape(-1, 3).astype("f8")
    s = fit_scaler(f, fold.train, ("return_24", "rsi"), "standard", clip=5.0)
    assert_allclose(s.center, rows[:, [2, 0]].mean(axis=0), rtol=1e-9)
    assert_allclose(s.scale, rows[:, [2, 0]].std(axis=0), rtol=1e-9)
    assert s.clip == 5.0
    assert_allclose(fit_scaler(f, fold.train).center, np.median(rows, axis=0), rtol=1e-9)


def test_a_scaler_refuses_what_it_cannot_scale():
    f = build(world(800, 1), ["rsi", "return_1"])
    with pytest.raises(DataError, match="does not lie inside"): fit_scaler(f, [(0, 801)])
    with pytest.raises(DataError, match="does not lie inside"): fit_scaler(f, [(500, 500)])
    with pytest.raises(DataError, match="hold 0 complete rows"): fit_scaler(f, [])
    with pytest.raises(ConfigError, match="Did you mean 'rsi'"): fit_scaler(f, [(0, 800)], ["rsj"])
    x = np.array(f.x)
    x[300:760, :, 1] = 0.25
    with pytest.raises(DataError, match="half of them are equal; use kind='standard'"): fit_scaler(dataclasses.replace(f, x=x), [(300, 800)])
    assert fit_scaler(dataclasses.replace(f, x=x), [(300, 800)], kind="standard").scale[1] > 0


# Real bars -------------------------------------------------------------------------------------------------------------------------

def test_features_are_causal_on_hourly_bars_with_outages():
    b = read("spot1h_2021_2023", ("BTC", "DOGE", "SOL"), "1h", 23_900)
    assert (~b.ok).any()
    b = b[:8000]
    assert (~b.ok).any()
    check_causal(b, SPOT)
    assert (measure_warmup(b, SPOT).slack >= 0).all()


@pytest.mark.proof
@pytest.mark.parametrize("coin", ["BTC", "ETH", "AAVE", "DOGE", "XRP", "NEAR"])
def test_warmups_hold_on_five_minute_bars(coin):
    b = read("spot5m_2024jan_sep", (coin,), "5m", 60_000)
    for a in range(0, 60_000, 10_000):
        assert (measure_warmup(b[a:a + 10_000], SPOT, starts=24, seed=a).slack >= 0).all()
        assert causality_sweep(b[a:a + 10_000], SPOT, cuts=4, seed=a).start.max() <= TOLERANCE
