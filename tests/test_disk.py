"""Sixty ways in which a disk fails under a running loop; after each, journal and venue agree again, or the start is refused with a cure."""
import shutil
import sqlite3

import pytest

from stratfam.trading import journal as j
from stratfam.trading import simulate as sim
from stratfam.trading.journal import JournalError, open_journal, read_journal
from stratfam.trading.simulate import FileDisk, Weather

HOUR = 3600 * 10**9


def lived(tmp_path, seed, hours=8):
    "A loop that has traded for some hours on a real file."
    s = sim.Simulation(Weather(seed, ("partial_fill", "timeout_after"), 0.05, 16), disk=FileDisk(tmp_path / "j.db"))
    s.live_until(s.true.now_ns() + hours * HOUR)
    return s


def ends_well(s):
    "Go on, heal, and look."
    s.live_until(s.true.now_ns() + 3 * HOUR)
    s.heal()
    s.live_until(s.true.now_ns() + 2 * HOUR)
    if not s.watch.broken: sim._finish(s)
    assert s.watch.broken == []


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(15))
def test_full(tmp_path, seed):
    "No space for some hours, in which a process may also end."
    s = lived(tmp_path, seed)
    s.disk.full = True
    s.live_until(s.true.now_ns() + (1 + seed % 3) * HOUR)
    if seed % 2: s.loop = None
    s.disk.full = False
    ends_well(s)


def test_a_bill_is_booked_once_while_it_cannot_be_written(tmp_path):
    s = lived(tmp_path, 3, hours=3)
    before = float(s.loop.mirror.gate["peak"])
    s.disk.full = True
    s._transfer(50, "deposit")
    for _ in range(4):
        s.loop.poll()
        s.true.sleep(20.0)
    assert float(s.loop.mirror.gate["peak"]) == pytest.approx(before + 50.0)
    s.disk.full = False
    ends_well(s)


@pytest.mark.proof
@pytest.mark.parametrize("part", [i / 20 for i in range(1, 20)] + [0.999])
def test_torn_tail(tmp_path, part):
    "The end of the write-ahead log never reached the disk: what it held is found at the venue."
    s = lived(tmp_path, int(part * 100))
    data, wal = s.disk.path.read_bytes(), s.disk.path.with_name("j.db-wal").read_bytes()
    before = len(s.disk.rows)
    s.loop = None
    s.disk.store.close()
    s.disk.store = None
    s.disk.path.write_bytes(data)
    s.disk.path.with_name("j.db-wal").write_bytes(wal[:int(len(wal) * part)])
    s.disk.path.with_name("j.db-shm").unlink(missing_ok=True)
    s.disk.open()
    s.watch.kept = None  # What the tail held of peak and day is in no venue's list: it is lost
    assert len(s.disk.rows) < before
    if s.disk.rows: ends_well(s)


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(10))
def test_locked(tmp_path, seed):
    "A second process holds the file: no start until it lets go, and the venue's stops rest meanwhile."
    s = lived(tmp_path, 20 + seed)
    s.loop = None
    s.disk.store.close()
    other = open_journal(s.disk.path, "simulation")
    s.disk.store = None
    with pytest.raises(JournalError, match="another process"): s.disk.open()
    s.live_until(s.true.now_ns() + HOUR)
    assert s.loop is None
    other.close()
    ends_well(s)


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(15))
def test_old_schema(tmp_path, seed, monkeypatch):
    "A file of an older program is copied, changed, and traded on."
    s = lived(tmp_path, 40 + seed)
    s.loop = None
    s.disk.store.close()
    s.disk.store = None
    monkeypatch.setattr(j, "SCHEMA", 2)
    monkeypatch.setattr(j, "MIGRATIONS", {1: "CREATE TABLE extra (name TEXT PRIMARY KEY);"})
    if seed % 3 == 0:  # The copy is kept and is what the file was
        before = [r[:] for r in read_journal(s.disk.path)[1]]
        s.disk.open()
        assert read_journal(s.disk.path.with_name("j.db.schema1.bak"))[1] == before
    ends_well(s)
    db = sqlite3.connect(s.disk.path)
    assert db.execute("SELECT value FROM meta WHERE name='schema'").fetchone() == ("2",)
    db.close()


def test_a_full_disk_and_a_dead_process(tmp_path):
    "One of each kind, quickly: full while an operator halts, and the process dies before anything could be written."
    s = lived(tmp_path, 3, hours=5)
    shutil.copy(s.disk.path, tmp_path / "copy.db")
    s.disk.full, s.switch.wish = True, "drill"
    s.live_until(s.true.now_ns() + HOUR // 2)
    assert not any(s.lots().values()), "the exits did not leave"
    s.loop, s.disk.full = None, False
    ends_well(s)
