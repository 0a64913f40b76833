"""The ledger under several writers, kills, torn files and awkward families."""
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from stratfam.core import ACCEPT, ConfigError, DataError, Env, ExportError, StratfamError, VirtualClock
from stratfam.validation.ledger import Ledger, salvage
from stratfam.validation.statistics import LookBudget
from stratfam.validation.verdict import judge

BTC = ["BTC"]


def days(n=400, start="2022-01-01", seed=0, loc=0.0):
    return pd.Series(np.random.default_rng(seed).normal(loc, 0.02, n), index=pd.date_range(start, periods=n))


@pytest.fixture
def book(tmp_path):
    with Ledger(tmp_path / "ledger.db", Env(VirtualClock())) as b: yield b


def filled(path, n=12):
    with Ledger(path, Env(VirtualClock())) as b:
        for i in range(n): b.record({"i": i}, BTC, "1d", ret=days(60, seed=i))
        b.look(BTC, "2022", "2023", "t")
    with closing(sqlite3.connect(path)) as db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def content(path):
    with closing(sqlite3.connect(path)) as db: return db.execute("SELECT * FROM ledger ORDER BY id").fetchall()


WRITER = textwrap.dedent("""
    import sys, numpy as np, pandas as pd
    from stratfam.validation.ledger import Ledger
    path, who, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    book = Ledger(path)
    ret = pd.Series(np.random.default_rng(who).normal(0, .01, 90), index=pd.date_range("2022", periods=90))
    for i in range(n):
        unit = book.record({"who": who, "i": i}, ["BTC"], "1d", ret=ret)
        look = book.look(["BTC"], "2022", "2023")
        print(unit, look.number, flush=True)
""")


def test_several_writers_lose_nothing(tmp_path):
    path, n = tmp_path / "ledger.db", 15
    jobs = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(w), str(n)], stdout=subprocess.PIPE, text=True) for w in range(3)]
    out = [line.split() for j in jobs for line in j.communicate(timeout=120)[0].splitlines()]
    assert all(j.returncode == 0 for j in jobs)
    with Ledger(path) as b:
        assert len(b) == 2 * 3 * n
        f = b.family(BTC, "2022", "2023")
        assert set(f.daily) == {u for u, _ in out} and f.daily.shape[1] == 3 * n
        assert sorted(int(k) for _, k in out) == list(range(1, 3 * n + 1)) and f.looks == 3 * n  # every look has its own number


def test_a_kill_loses_only_what_was_not_confirmed(tmp_path):
    path = tmp_path / "ledger.db"
    for round_ in range(2):
        job = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(round_), "100000"], stdout=subprocess.PIPE, text=True)
        seen = [job.stdout.readline().split()[0] for _ in range(20)]
        time.sleep(0.013)
        job.send_signal(signal.SIGKILL)
        rest = job.communicate()[0].splitlines()
        seen += [line.split()[0] for line in rest if len(line.split()) == 2]
        with Ledger(path) as b: assert set(seen) <= set(b.family(BTC, "2022", "2023").daily)


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_byte_is_noticed_or_harmless(tmp_path, seed):
    path = filled(tmp_path / "ledger.db")
    before, raw = content(path), bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    raw[rng.integers(0, len(raw))] ^= int(rng.integers(1, 256))
    path.write_bytes(raw)
    try:
        Ledger(path).close()
    except ExportError as e:
        assert "damaged" in str(e) or "not a ledger" in str(e)
    else:
        assert content(path) == before  # the byte was in free space


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5, 0.2, 0.01])
def test_a_cut_file_is_refused_and_salvaged(tmp_path, keep):
    path = filled(tmp_path / "ledger.db", 40)
    raw = path.read_bytes()
    path.write_bytes(raw[:int(len(raw) * keep)])
    with pytest.raises(ExportError, match="damaged"): Ledger(path)
    kept, lost = salvage(path, tmp_path / "new.db")
    with Ledger(tmp_path / "new.db") as b:
        assert len(b) == kept + 1 and lost >= 1
        assert b.family(["OTHER"], "1990", "1991").counted == lost


def test_rows_cut_off_by_another_program_are_noticed(tmp_path):
    path = filled(tmp_path / "ledger.db")
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TRIGGER no_delete")
        db.execute("DELETE FROM ledger WHERE id > 10")
        db.commit()
    with pytest.raises(ExportError, match="rows 11 to 13 are missing"): Ledger(path)
    assert salvage(path, tmp_path / "new.db") == (10, 3)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "text.db").write_text("this is not a database, however long it may be" * 50)
    with pytest.raises(ExportError, match="damaged"): Ledger(tmp_path / "text.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as db: db.execute("CREATE TABLE journal(x)")
    with pytest.raises(ExportError, match="not a ledger"): Ledger(tmp_path / "other.db")
    with pytest.raises(ConfigError): salvage(tmp_path / "absent.db", tmp_path / "n.db")
    with pytest.raises(ConfigError): salvage(tmp_path / "text.db", tmp_path / "other.db")


def test_a_full_disk_leaves_the_ledger_whole(book):
    book.record({"i": 0}, BTC, "1d", ret=days())
    book._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(StratfamError, match="Free disk space"):
        for i in range(200): book.record({"j": i}, BTC, "1d", ret=days(seed=i))
    n = len(book)
    with Ledger(book.path) as again: assert len(again) == n


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_a_read_only_folder_says_so(tmp_path):
    os.chmod(tmp_path, 0o500)
    with pytest.raises((StratfamError, OSError)): Ledger(tmp_path / "ledger.db")


def test_two_tests_never_share_a_ledger(tmp_path):
    with Ledger(tmp_path / "a.db") as a, Ledger(tmp_path / "b.db") as b:
        a.record({"x": 1}, BTC, "1d", ret=days())
        assert len(a) == 1 and len(b) == 0


# families
spans = st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda t: (t[0], t[0] + t[1]))
names = st.sets(st.sampled_from("ABCD"), min_size=1, max_size=3)

@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(names, spans), max_size=8), names, spans)
def test_a_family_is_what_overlaps(tmp_path_factory, trials, mine, span):
    day = lambda d: pd.Timestamp("2022-01-01") + pd.Timedelta(days=d)
    with Ledger(tmp_path_factory.mktemp("f") / "ledger.db") as b:
        for i, (symbols, (a, z)) in enumerate(trials):
            b.record({"i": i}, sorted(symbols), "1h" if i % 2 else "1d", "failed", start=day(a), end=day(z))
        f = b.family(sorted(mine), day(span[0]), day(span[1]))
    want = sum(bool(symbols & mine) and a < span[1] and z > span[0] for symbols, (a, z) in trials)
    assert f.counted == want and f.daily.shape[1] == 0 and len(f.trials) == want


def test_hours_days_and_people_meet_in_one_family(book):
    hours = pd.Series(np.random.default_rng(0).normal(0, 0.004, 24 * 400), index=pd.date_range("2022-01-01", periods=24 * 400, freq="h"))
    book.record({"a": 1}, ["BTC", "ETH"], "1h", ret=hours, code="x")
    book.record({"a": 1}, ["ETH"], "1d", "hand-run", ret=days())
    f = book.family(["ETH"], "2022-01-01", "2023-02-05")
    assert f.daily.shape == (400, 2)
    assert "runs by hand" in f.explain()


def test_a_repetition_is_one_trial_and_the_newest_result_speaks(book):
    for s in (1, 2): unit = book.record({"a": 1}, BTC, "1d", ret=days(seed=s))
    book.record({"a": 1}, BTC, "1d", "failed", start="2022", end="2023", note="killed")
    f = book.family(BTC, "2022", "2024")
    assert f.daily.shape[1] == 1 and f.counted == 0
    assert_allclose(f.daily[unit].to_numpy(), days(seed=2).to_numpy())
    book.record({"a": 1}, BTC, "1d", ret=days(seed=3), code="other code")
    assert book.family(BTC, "2022", "2024").daily.shape[1] == 2


def test_failed_then_done_is_done(book):
    book.record({"a": 1}, BTC, "1d", "failed", start="2022", end="2023")
    assert book.family(BTC, "2022", "2024").counted == 1
    book.record({"a": 1}, BTC, "1d", ret=days())
    f = book.family(BTC, "2022", "2024")
    assert f.counted == 0 and f.daily.shape[1] == 1 and f.trials["outcome"].tolist() == ["done"]


def test_seeds_and_folds_are_parts_only_when_the_whole_is_there(book):
    book.open_study("s", BTC, "2022", "2024")
    for seed in range(5):
        for fold in ("0", "1"): book.record({"net": 1}, BTC, "1d", ret=days(100), seed=seed, fold=fold, study="s")
    f = book.family(BTC, "2022", "2024")
    assert (f.counted, f.daily.shape[1]) == (5, 0)       # five seeds, each without a whole series
    for seed in range(5): book.record({"net": 1}, BTC, "1d", ret=days(seed=seed), seed=seed, study="s")
    assert book.family(BTC, "2022", "2024").daily.shape[1] == 5
    mean = book.record({"net": 1}, BTC, "1d", ret=days(seed=9), study="s")
    f = book.family(BTC, "2022", "2024")
    assert list(f.daily) == [mean] and f.counted == 0
    for seed in (7, 8): book.record({"net": 1}, BTC, "1d", "hand-run", ret=days(seed=seed), seed=seed)  # picking a lucky seed by hand is a search
    assert book.family(BTC, "2022", "2024").daily.shape[1] == 3


def test_short_series_are_counted_not_glued(book):
    long = [book.record({"i": i}, BTC, "1d", ret=days(400, seed=i)) for i in range(3)]
    warm = book.record({"warm": 1}, BTC, "1d", ret=days(380, "2022-01-21"))
    book.record({"short": 1}, BTC, "1d", ret=days(200))
    f = book.family(BTC, "2022-01-01", "2023-02-05")
    assert set(f.daily) == {*long, warm} and f.counted == 1 and len(f.daily) == 380
    assert np.isfinite(f.daily.to_numpy()).all() and f.daily.index[0] == pd.Timestamp("2022-01-21")
    exact = book.family(BTC, "2022-01-01", "2023-02-05", days=days(400).index)
    assert set(exact.daily) == set(long) and exact.counted == 2
    part = book.family(BTC, "2022-02-01", "2022-03-01")
    assert part.daily.shape == (28, 5) and part.counted == 0


def test_looks_are_numbered_by_family(book):
    assert [book.look(BTC, "2022", "2023").number for _ in range(3)] == [1, 2, 3]
    assert book.look(["ETH"], "2022", "2023").number == 1
    assert book.look(["ETH", "BTC"], "2022-12-31", "2024").number == 5
    assert book.look(BTC, "2023", "2024").number == 2  # met only the last one
    assert book.family(BTC, "2022", "2023").looks == 4


def test_the_same_question_is_the_same_look(book):
    first = book.look(BTC, "2022", "2023", token="q")
    book.look(BTC, "2022", "2023", token="r")
    assert book.look(BTC, "2022", "2023", token="q") == first and len(book) == 2
    assert book.look(BTC, "2022", "2023").number == 3 and book.look(BTC, "2022", "2023").number == 4  # without a token each is new
    assert book.open_holdout(BTC, "2022", "2023", "m") == book.open_holdout(BTC, "2022", "2023", "m") == 1
    assert book.open_holdout(BTC, "2022-12-01", "2023-03-01", "n") == 2


def test_declared_looks_come_first(book):
    book.open_study("s", BTC, "2022", "2023", looks=3)
    assert book.look(BTC, "2022", "2023") == LookBudget(1, 3)
    with pytest.raises(ConfigError, match="too late"): book.declare_looks(BTC, "2022", "2023", 9)
    with pytest.raises(ConfigError, match="too late"): book.open_study("t", BTC, "2022", "2023", looks=9)
    assert "t" not in book.show().index  # nothing half-written
    levels = [LookBudget(1, 3).level(0.005)] + [book.look(BTC, "2022", "2023").level(0.005) for _ in range(4)]
    assert_allclose(levels, [0.005 / 3] * 3 + [0.005 / 16, 0.005 / 25])
    assert_allclose(book.show()["level_spent"], sum(levels))


def test_studies_open_continue_and_close(book):
    book.open_study("s", BTC, "2022", "2023", 2.0)
    book.open_study("s", BTC, "2022", "2023", 2.0)
    assert len(book) == 1
    terms = {"name": "s", "symbols": BTC, "start": "2022", "end": "2023"}
    for other in ({"target_sharpe": 1.0}, {"end": "2024"}, {"symbols": ["ETH"]}, {"looks": 2}):
        with pytest.raises(ConfigError, match="other terms"): book.open_study(**(terms | other))
    book.close_study("s")
    for again in (lambda: book.close_study("s"), lambda: book.open_study("s", BTC, "2022", "2023"),
                  lambda: book.record({}, BTC, "1d", ret=days(), study="s")):
        with pytest.raises(ConfigError, match="closed"): again()
    with pytest.raises(ConfigError, match="Unknown study"): book.close_study("z")
    with pytest.raises(ConfigError): book.open_study("u", BTC, "2022", "2023", 0.0)


def test_unusable_trials_are_refused_not_stored(book):
    holed = days(); holed.iloc[4] = np.nan
    for bad in (holed, days().to_numpy(), days().iloc[::-1], days() - 5.0, days().iloc[:1], days().reset_index(drop=True)):
        with pytest.raises(DataError): book.record({"a": 1}, BTC, "1d", ret=bad)
    with pytest.raises(ConfigError): book.record({"a": 1}, BTC, "1d", "gone", ret=days())
    with pytest.raises(ConfigError): book.record({"a": 1}, "BTC", "1d", ret=days())
    with pytest.raises(DataError): book.record({"a": 1}, BTC, "1d", "failed")
    with pytest.raises(TypeError): book.record({"a": object()}, BTC, "1d", ret=days())
    assert len(book) == 0


def test_time_comes_from_the_environment(tmp_path):
    clock = VirtualClock()
    with Ledger(tmp_path / "l.db", Env(clock)) as b:
        b.record({"a": 1}, BTC, "1d", ret=days())
        clock.advance(3600)
        b.record({"a": 2}, BTC, "1d", ret=days())
        assert b.family(BTC, "2022", "2024").trials["time"].tolist() == ["2023-11-14T22:13:20Z", "2023-11-14T23:13:20Z"]


def test_an_idle_trial_is_stored_and_counted_by_the_verdict(book):
    book.record({"idle": 1}, BTC, "1d", ret=days() * 0.0)
    for i in range(5): book.record({"i": i}, BTC, "1d", ret=days(seed=i, loc=0.006 * (i == 0)), changes=99)
    f = book.family(BTC, "2022-01-01", "2023-02-05")
    v, pick = judge(f.daily, {"hold": days(seed=50)}, f.counted, book.look(BTC, "2022-01-01", "2023-02-05"), changes=f.changes)
    lines = {t.name: t for t in v.tests}
    assert pick == f.trials.index[1] and lines["candidates"].value == 5 and lines["counted_only"].value == 1
    assert lines["sharpe_p"].threshold == 0.005 and v.decision != ACCEPT
    again, _ = judge(f.daily, {"hold": days(seed=50)}, f.counted, book.look(BTC, "2022-01-01", "2023-02-05"), changes=f.changes)
    assert {t.name: t for t in again.tests}["sharpe_p"].threshold == 0.005 / 4


def test_an_empty_ledger_shows_an_empty_table(book):
    assert book.show().empty and book.family(BTC, "2022", "2023").explain().startswith("N + M = 0 + 0: no trial yet")
