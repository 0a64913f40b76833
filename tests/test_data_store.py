"""The data store against broken files, odd clocks, full disks and brute-force definitions."""
import os
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratfam.core import ConfigError, DataError, StratfamError, StratfamWarning, bars_digest, select
from stratfam.data import store
from stratfam.data.store import align, inventory, load_bars, quality, quality_of, quality_report, read_file, read_funding, resample, save_bars

DATA = Path(os.environ.get("STRATFAM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no market data at {DATA}: set STRATFAM_DATA")
HOUR = 3_600_000
T0 = pd.Timestamp("2023-01-31", tz="UTC")


def table(n=6, start=T0, freq="h", seed=0):
    "n good rows as a file would hold them."
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    open_ = np.concatenate([[100.0], close[:-1]])
    time = pd.date_range(start, periods=n, freq=freq, unit="ms").asi8
    return pd.DataFrame({"timestamp": time, "open": open_, "high": np.maximum(open_, close) * 1.01, "low": np.minimum(open_, close) * 0.99,
                         "close": close, "volume": rng.uniform(1, 9, n).round(3)})


def frame(n=6, start=T0, freq="h", seed=0):
    "The same as `read_file` would return it."
    t = table(n, start, freq, seed)
    return t.drop(columns="timestamp").set_axis(pd.DatetimeIndex(pd.to_datetime(t["timestamp"], unit="ms", utc=True)).as_unit("ns").rename("time"))


def put(t, path):
    {".csv": t.to_csv, ".parquet": t.to_parquet}[path.suffix](path, index=False)
    return path


def change(row, **values):
    def edit(t):
        for k, v in values.items():
            if isinstance(v, str): t[k] = t[k].astype(str)
            t.loc[row, k] = v
        return t
    return edit


BROKEN = {
    "missing column": (lambda t: t.drop(columns="low"), "missing column 'low'", "Bars need"),
    "no time": (lambda t: t.drop(columns="timestamp"), "missing column 'timestamp'", "header"),
    "a column twice": (lambda t: t.assign(Close=1.0), "the column 'close' twice", "Remove or rename"),
    "text in a number": (change(2, open="1o1.5"), "open is '1o1.5', expected a number", "Correct or remove"),
    "NaN price": (change(2, close=np.nan), "close is NaN", "counts as missing"),
    "infinite price": (change(2, high=np.inf), "high is NaN or infinite", "counts as missing"),
    "negative price": (change(2, low=-1.0), "low is zero or negative", "counts as missing"),
    "zero price": (change(2, open=0.0), "open is zero or negative", "counts as missing"),
    "high below low": (change(2, high=1.0), "high is below open, low or close", "counts as missing"),
    "low above close": (change(2, low=1e3, high=2e3), "low is above open or close", "counts as missing"),
    "negative volume": (change(2, volume=-1.0), "volume is NaN, infinite or negative", "counts as missing"),
    "NaN volume": (change(2, volume=np.nan), "volume is NaN, infinite or negative", "counts as missing"),
    "duplicate": (lambda t: t.assign(timestamp=t["timestamp"].where(t.index != 2, t["timestamp"][1])), "is a duplicate", "Keep one"),
    "backwards": (lambda t: t.iloc[[0, 3, 1, 2, 4, 5]].reset_index(drop=True), "time runs backwards", "Sort the file"),
    "off the grid": (lambda t: t.assign(timestamp=t["timestamp"] + np.where(t.index == 2, 7, 0)), "lies off the 1h grid", "Correct or remove"),
    "wrong unit in one row": (lambda t: t.assign(timestamp=np.where(t.index == 2, t["timestamp"] * 1000, t["timestamp"])),
                              "is in microseconds, the rows before it in milliseconds", "Convert"),
    "not a time": (lambda t: t.assign(timestamp=np.where(t.index == 2, 20230131, t["timestamp"])), "timestamp is 20230131", "Correct or remove"),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, name, ending):
    edit, what, cure = BROKEN[name]
    path = put(edit(table()), tmp_path / f"BTCUSDT-1h.{ending}")
    with pytest.raises(DataError) as e: read_file(path)
    text = str(e.value)
    assert str(path) in text and what in text and cure in text and "\n" not in text
    if name not in ("missing column", "no time", "a column twice"): assert ("line 4" if ending == "csv" else "row 2") in text
    with pytest.raises(DataError): load_bars(tmp_path)


def test_wrong_bar_length(tmp_path):
    for freq, found in (("5min", "5m"), ("D", "1d")):
        path = put(table(freq=freq), tmp_path / "BTCUSDT-1h.parquet")
        with pytest.raises(DataError, match=f"bars are {found} apart, expected 1h"): read_file(path)
    assert len(read_file(path, step="1d")) == 6


def test_two_bars_around_a_gap_are_no_wrong_length(tmp_path):
    assert len(read_file(put(table().iloc[[0, 3]], tmp_path / "BTCUSDT-1h.parquet"))) == 2


@pytest.mark.parametrize("times, what", [
    (["2023-01-31 00:00+01:00", "2023-01-31 01:00+02:00"], "mixed time zones"),
    (["2023-01-31 00:00+01:00", "2023-01-31 01:00"], "mixed time zones"),
    (["2023-01-31 00:00", "2023-01-31 01:00Z"], "mixed time zones"),
    (["31/01/2023 00:00", "31/01/2023 01:00"], "expected ISO"),
    (["2023-01-31 00:00", ""], "timestamp is"),
    (["1970-01-01 00:00", "1970-01-01 01:00"], "between 2009 and 2100"),
    (["3000-01-01 00:00", "3000-01-01 01:00"], "between 2009 and 2100"),
])
def test_written_times_are_refused(tmp_path, times, what):
    path = put(table(2).assign(timestamp=times), tmp_path / "BTCUSDT-1h.csv")
    with pytest.raises(DataError, match=what): read_file(path)


@pytest.mark.parametrize("make", [
    lambda t: t, lambda t: t // 1000, lambda t: t * 1000, lambda t: t * 10**6, lambda t: t.astype("f8"), lambda t: t.astype(str),
    lambda t: pd.to_datetime(t, unit="ms"), lambda t: pd.to_datetime(t, unit="ms", utc=True),
    lambda t: pd.to_datetime(t, unit="ms", utc=True).dt.tz_convert("Asia/Tokyo"),
    lambda t: pd.to_datetime(t, unit="ms").dt.strftime("%Y-%m-%dT%H:%M:%SZ"), lambda t: pd.to_datetime(t, unit="ms").astype(str),
    lambda t: pd.to_datetime(t, unit="ms", utc=True).dt.tz_convert("America/New_York").astype(str),
], ids=["ms", "s", "us", "ns", "float", "digits", "naive", "utc", "tokyo", "iso-z", "iso", "iso-offset"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_every_way_to_write_a_time_means_the_same(tmp_path, make, ending):
    t = table()
    path = put(t.assign(timestamp=make(t["timestamp"])), tmp_path / f"BTCUSDT-1h.{ending}")
    pd.testing.assert_index_equal(read_file(path).index, frame().index)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_an_empty_time_in_a_typed_column(tmp_path, unit):
    t = pd.to_datetime(table()["timestamp"], unit="ms").dt.as_unit(unit)
    path = put(table().assign(timestamp=t.where(t.index != 2)), tmp_path / "BTCUSDT-1h.parquet")
    with pytest.raises(DataError, match="row 2: timestamp is empty"): read_file(path)


def test_a_file_without_a_symbol_in_its_name(tmp_path):
    put(table(), tmp_path / "my own data.csv")
    with pytest.raises(DataError, match="my own data.csv: .*is not a symbol.* Rename the file"): load_bars(tmp_path)


def test_other_peoples_files(tmp_path):
    t = table()
    freq = t.rename(columns={"timestamp": "date"}).assign(date=pd.to_datetime(t["timestamp"], unit="ms", utc=True))
    freq.to_feather(tmp_path / "BTC_USDT-1h.feather")
    freq.to_feather(tmp_path / "ETH_USDT_USDT-1h-futures.feather")
    freq.to_feather(tmp_path / "ETH_USDT_USDT-8h-mark.feather")
    freq.iloc[[0]].assign(open=1e-4).to_feather(tmp_path / "ETH_USDT_USDT-8h-funding_rate.feather")
    frame().to_parquet(tmp_path / "SOLUSDT_1h.parquet")
    t.rename(columns=str.title).to_csv(tmp_path / "XRP-USDT-1h.csv.gz", index=False)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert load_bars(tmp_path).symbols == ("BTCUSDT", "SOLUSDT", "XRPUSDT")
    perp = load_bars(tmp_path, ["ETHUSDT"], market="perp")
    np.testing.assert_allclose(perp.close[:, 0], t["close"], strict=True)
    np.testing.assert_allclose(perp.funding[:, 0], np.zeros(6))
    with pytest.raises(ConfigError, match="Did you mean 'SOLUSDT'"): load_bars(tmp_path, ["SOLUSD"])


def test_empty_and_cut_files(tmp_path):
    path = put(table(50), tmp_path / "BTCUSDT-1h.parquet")
    whole = path.read_bytes()
    for cut in (1, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cut short"): load_bars(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"): load_bars(tmp_path)
    put(table().iloc[:0], path)
    with pytest.raises(DataError, match="no row"): read_file(path)
    path.unlink()
    with pytest.raises(DataError, match="no bar files"): load_bars(tmp_path)
    (tmp_path / "BTCUSDT-1h.csv").write_text("timestamp,open,high,low,close,volume\n")
    with pytest.raises(DataError, match="no row"): load_bars(tmp_path)
    (tmp_path / "BTCUSDT-1h.csv").write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(DataError): load_bars(tmp_path)
    (tmp_path / "BTCUSDT-1h.csv").unlink()
    (tmp_path / "BTCUSDT-1h.feather").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="cut short"): load_bars(tmp_path)


def test_a_flipped_bit_never_becomes_a_price(tmp_path):
    bars = align({"BTCUSDT": frame(200)}, "1h")
    path = save_bars(bars, tmp_path)[0]
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        try: assert bars_digest(load_bars(tmp_path)) == bars_digest(bars)
        except StratfamError: refused += 1
    assert refused > 0.8 * len(range(0, len(whole), 37))


def test_one_coin_with_missing_bars_stays_aligned():
    "F10: every present bar keeps the values of its own hour, whatever else is missing."
    a, b = frame(40, seed=1), frame(40, start=T0 + pd.Timedelta("3h"), seed=2)
    holed = b.drop(b.index[[5, 6, 20]])
    bars = align({"A": a, "B": holed}, "1h")
    assert len(bars) == 43 and bars.ok[:, 1].sum() == 37
    for t, close in holed["close"].items():
        row = int((t - T0) / pd.Timedelta("1h"))
        assert bars.close[row, 1] == close and bars.time[row] == t.to_datetime64()
    assert np.isnan(bars.close[~bars.ok]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 25), max_size=10)), min_size=1, max_size=4), st.booleans())
def test_align_is_a_lookup_by_time(spec, close_only):
    frames = {}
    for n, (shift, holes) in enumerate(spec):
        f = frame(30, start=T0 + pd.Timedelta(hours=shift), seed=n)
        f = f.drop(f.index[sorted(h for h in holes if 0 < h < 29)])
        frames[f"S{n}"] = f[["close"]] if close_only else f
    bars = align(frames, "1h")
    assert bars.time[0] == min(f.index[0] for f in frames.values()).to_datetime64()
    assert bars.time[-1] == max(f.index[-1] for f in frames.values()).to_datetime64()
    for n, f in enumerate(frames.values()):
        want = np.array([f["close"].get(pd.Timestamp(t, tz="UTC"), np.nan) for t in bars.time])
        np.testing.assert_array_equal(bars.close[:, n], want)
        np.testing.assert_array_equal(bars.ok[:, n], np.isfinite(want))


def test_a_long_grid_keeps_its_last_bar():
    f = frame(24_000)
    assert align({"A": f}, "1h").ok[-1, 0] and len(align({"A": f}, "1h")) == 24_000


def test_different_minutes_do_not_share_a_grid():
    with pytest.raises(DataError, match="do not share a 1h grid"): align({"A": frame(), "B": frame(start=T0 + pd.Timedelta("30min"))}, "1h")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 11), st.integers(30, 80), st.sets(st.integers(0, 80), max_size=8), st.sampled_from(["2h", "4h", "1D"]))
def test_resample_equals_the_definition(shift, n, holes, step):
    f = frame(n, start=T0 + pd.Timedelta(hours=shift))
    f = f.drop(f.index[sorted(h for h in holes if 0 < h < n - 1)])
    other = frame(n, start=T0 + pd.Timedelta(hours=shift), seed=3)
    fine = align({"A": f, "FULL": other}, "1h", "perp", {"FULL": pd.Series(1e-4, index=other.index + pd.Timedelta("1h"))})
    k, whole = int(pd.Timedelta(step) / pd.Timedelta("1h")), other.resample(step).count()["close"]
    starts = [t for t, c in whole.items() if c == k]
    if not starts:
        with pytest.raises(DataError, match="no complete bar|edge in UTC"): resample(fine, step)
        return
    coarse = resample(fine, step)
    assert [pd.Timestamp(t, tz="UTC") for t in coarse.time] == starts
    for i, t in enumerate(starts):
        part = f[(f.index >= t) & (f.index < t + pd.Timedelta(step))]
        assert coarse.ok[i, 0] == (len(part) == k)
        if len(part) == k:
            want = [part["open"].iloc[0], part["high"].max(), part["low"].min(), part["close"].iloc[-1], part["volume"].sum()]
            np.testing.assert_allclose([getattr(coarse, c)[i, 0] for c in store.FIELDS], want, rtol=1e-12)
        np.testing.assert_allclose(coarse.funding[i, 1], k * 1e-4, rtol=1e-9)
    assert np.isnan(coarse.funding[:, 0]).all()


def test_weeks_start_on_monday_and_bad_steps_are_refused():
    bars = align({"A": frame(24 * 20)}, "1h")
    assert [pd.Timestamp(t).day_name() for t in resample(bars, "1w").time] == ["Monday", "Monday"]
    with pytest.raises(ConfigError, match="not a multiple"): resample(bars, "90m")
    with pytest.raises(DataError, match="no complete bar"): resample(bars[:24], "2d")
    thin = align({"A": frame(48)[["close"]]}, "1h")
    assert not resample(thin, "1d").ohl_known


@settings(max_examples=80, deadline=None)
@given(st.sets(st.integers(0, 20), min_size=2, max_size=20), st.sampled_from([1, 4, 8, 12]), st.integers(0, 59_000))
def test_funding_equals_the_definition(events, hours, late_ms):
    "8-hour payments of which some are absent; bars of 1, 4, 8 and 12 hours."
    due, late = np.array(sorted(events)) * 8, pd.Timedelta(late_ms // 2, unit="ms")
    rates = pd.Series(np.arange(1, len(due) + 1) * 1e-5, index=[T0 + pd.Timedelta(hours=int(h)) + late for h in due])
    rates.attrs["interval"] = "8h"
    end = np.arange(-24, 200, hours)
    got = store.spread_funding(rates, (T0.to_datetime64() + end * np.timedelta64(1, "h")), np.timedelta64(hours, "h").astype("m8[ns]"))
    for e, r in zip(end, got):
        inside = [h for h in range(-80, 400, 8) if e - hours < h <= e] # payments due in the bar
        if all(h in due for h in inside) and due[0] - 8 <= e - hours and e < due[-1] + 8:
            np.testing.assert_allclose(r, sum(1e-5 * (list(due).index(h) + 1) for h in inside), atol=1e-15)
        else: assert np.isnan(r)


def test_perpetuals_come_back_as_they_were(tmp_path):
    bars = align({"A": frame(30), "B": frame(20, seed=4)}, "1h", "perp",
                 {"A": pd.Series([1e-4, -2e-4], index=[T0 + pd.Timedelta("8h"), T0 + pd.Timedelta("16h")])})
    assert 0 < np.isnan(bars.funding[:, 0]).sum() < 30
    save_bars(bars, tmp_path, exchange="test")
    assert bars_digest(load_bars(tmp_path, market="perp")) == bars_digest(bars)
    assert set(inventory(tmp_path)["exchange"]) == {"test"}
    with pytest.raises(DataError, match="holds perp bars only"): load_bars(tmp_path)
    spot = align({"A": frame(5)}, "1h")
    save_bars(spot, tmp_path)
    assert bars_digest(load_bars(tmp_path)) == bars_digest(spot)
    assert load_bars(tmp_path, ["A"], market="perp").ok.sum() == 30


def test_funding_files_are_checked(tmp_path):
    path = tmp_path / "A-funding.parquet"
    good = pd.DataFrame({"timestamp": table(3, freq="8h")["timestamp"], "rate": [1e-4, 2e-4, -1e-4]})
    good.to_parquet(path)
    np.testing.assert_allclose(read_funding(path), good["rate"])
    for bad, what in ((good.assign(rate=[1e-4, np.nan, 0]), "row 1: rate is nan"), (good.assign(rate=[1e-4, 1.0, 0]), "expected a fraction"),
                      (good.iloc[[0, 0, 1]], "row 1: timestamp does not increase"), (good.drop(columns="rate"), "missing column 'rate'")):
        bad.to_parquet(path)
        with pytest.raises(DataError, match=what): read_funding(path)


def test_choosing_is_strict(tmp_path):
    put(table(), tmp_path / "BTCUSDT-1h.parquet")
    put(table(freq="5min"), tmp_path / "BTCUSDT-5m.parquet")
    with pytest.raises(ConfigError, match="holds bars of 5m and 1h"): load_bars(tmp_path)
    assert len(load_bars(tmp_path, step="5m")) == 6
    with pytest.raises(ConfigError, match="none of 4h"): load_bars(tmp_path, step="4h")
    put(table(), tmp_path / "BTC_USDT-1h.csv")
    with pytest.raises(DataError, match="both hold BTCUSDT 1h"): load_bars(tmp_path, step="1h")
    for call, error, text in ((lambda: load_bars(tmp_path, market="prep"), ConfigError, "Did you mean 'perp'"),
                              (lambda: load_bars(tmp_path, faults="ignore"), ConfigError, "Known: raise, drop"),
                              (lambda: load_bars(tmp_path, step="5m", start="soon"), ConfigError, "is not a time"),
                              (lambda: load_bars(tmp_path, step="5m", start="2023-02-01", end="2023-01-01"), ConfigError, "does not lie before"),
                              (lambda: load_bars(tmp_path, ["Ethereum!"], "5m"), ConfigError, "is not a symbol"),
                              (lambda: load_bars(tmp_path / "x"), DataError, "no such folder")):
        with pytest.raises(error, match=text): call()


def test_wide_tables(tmp_path):
    wide = pd.DataFrame({"timestamp": table()["timestamp"], "BTCUSDT": table()["close"], "ETHUSDT": table(seed=1)["close"], "split": ["a"] * 6})
    path = put(wide, tmp_path / "close2-1h.parquet")
    bars = load_bars(tmp_path)
    assert bars.symbols == ("BTCUSDT", "ETHUSDT") and not bars.ohl_known and np.isnan(bars.volume).all()
    with pytest.raises(ConfigError, match="say which with symbol="): read_file(path)
    with pytest.raises(ConfigError, match="Did you mean 'ETHUSDT'"): read_file(path, "ETHUSD")
    put(wide.assign(ETHUSDT=["1", "x", "1", "1", "1", "1"]), path)
    with pytest.raises(DataError, match="row 1: ETHUSDT is 'x'"): load_bars(tmp_path)
    put(wide, path)
    put(table(), tmp_path / "SOLUSDT-1h.parquet")
    with pytest.raises(DataError, match="closes alone"): load_bars(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    "A real file-size limit, met in the middle of a write: the old bars stay, no temporary file remains."
    small = align({"A": frame(50)}, "1h")
    save_bars(small, tmp_path)
    before = (tmp_path / "A-1h.parquet").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 2000, hard))
    try:
        with pytest.raises(StratfamError, match="could not be written") as e: save_bars(align({"A": frame(5000)}, "1h"), tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "old file" in str(e.value) and "\n" not in str(e.value)
    assert (tmp_path / "A-1h.parquet").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["A-1h.parquet"]


def test_what_is_written_is_checked_first(tmp_path):
    bad = frame()
    bad.iloc[2, 3] = np.nan
    with pytest.raises(DataError, match="close is NaN"): store.write_symbol(bad, tmp_path, "A", "1h")
    assert not list(tmp_path.iterdir())


def test_faulty_rows_can_be_left_out_and_are_counted(tmp_path):
    t = change(2, high=1.0)(table(8))
    t = pd.concat([t, t.iloc[[5]]])
    put(t, tmp_path / "AUSDT-1h.csv")
    with pytest.warns(StratfamWarning, match="2 faulty rows left out; the first: 2023-01-31 02:00 UTC high is below"):
        bars = load_bars(tmp_path, faults="drop")
    assert bars.ok[:, 0].tolist() == [True, True, False, True, True, True, True, True]
    q = quality(*quality_of(tmp_path)).loc["AUSDT"]
    assert (q["duplicates"], q["ohlc"], q["missing"]) == (1, 1, 1)
    assert "1 duplicate rows, 1 impossible rows, 1 missing bars" in quality_report(*quality_of(tmp_path))


def test_quality_of_a_clean_series():
    q = quality(align({"A": frame(500)}, "1h")).loc["A"]
    assert (q[["gaps", "missing", "longest", "duplicates", "ohlc", "outliers", "spikes", "stale", "stale_longest", "zero_volume"]] == 0).all()
    assert "Nothing to remark" in quality_report(align({"A": frame(500)}, "1h"))
    assert quality(align({"A": frame(1), "B": frame(9)}, "1h"))["bars"].tolist() == [1, 9]


@real
def test_the_shared_folders_are_read_as_they_are():
    hourly = load_bars(DATA / "spot1h_2021_2023")
    assert len(hourly) == 24_000 and len(hourly.symbols) == 14
    q = quality(hourly)
    assert (q["gaps"] == 5).all() and (q["missing"] == 12).all() and q["spikes"].sum() == 0
    btc = pd.read_parquet(DATA / "spot1h_2021_2023" / "BTCUSDT-1h.parquet")
    one = select(hourly, ["BTCUSDT"])
    np.testing.assert_array_equal(one.close[one.ok[:, 0], 0], btc["close"])
    with pytest.raises(ConfigError, match="5m and 1h"): load_bars(DATA / "spot5m_2024jan_sep")
    paper = load_bars(DATA / "paper_2209_05559_close5m")
    assert paper.close.shape == (41_704, 10) and not paper.ohl_known and (~paper.ok).sum() == 10


@real
def test_five_minutes_add_up_to_the_hours_on_disk():
    fine = load_bars(DATA / "spot5m_2024jan_sep", ["BTCUSDT", "UNIUSDT"], "5m", end="2024-03-01")
    hour, mine = load_bars(DATA / "spot5m_2024jan_sep", ["BTCUSDT", "UNIUSDT"], "1h", end="2024-03-01"), resample(fine, "1h")
    assert (mine.time == hour.time).all() and mine.ok.all()
    for c in ("open", "high", "low", "close"): np.testing.assert_array_equal(getattr(mine, c), getattr(hour, c))
    np.testing.assert_allclose(mine.volume, hour.volume, rtol=1e-9)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300) | st.text(alphabet="0123456789,.-\n:TZ abo", max_size=300).map(str.encode))
def test_rubbish_is_refused_and_never_crashes(tmp_path, content):
    for name in ("A-1h.csv", "A-1h.parquet", "A-1h.feather"):
        for p in tmp_path.iterdir(): p.unlink()
        (tmp_path / name).write_bytes(b"timestamp,close\n" + content if name.endswith("csv") else content)
        try: assert load_bars(tmp_path).ok.any()
        except StratfamError as e: assert "\n" not in str(e)
