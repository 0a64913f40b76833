"""The journal on a real disk: torn, truncated, flipped, locked, killed, migrated."""
import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from stratfam.trading import journal as j
from stratfam.trading.journal import Journal, JournalError, MemoryStore, SqliteStore, migrate, open_journal, read_journal

INTENT = {"symbol": "BTCUSDT", "purpose": "ENTRY", "side": "BUY", "position_side": "LONG", "lots": 5, "bar_ms": 0}


def filled(path, n=40):
    book = open_journal(path, "a")
    for i in range(n): book.append([("intent", f"id{i}", INTENT), ("fill", f"f{i}", {"client_id": f"id{i}", "lots": 5})], i)
    book.close()
    return path


def test_a_killed_writer_leaves_whole_transactions(tmp_path):
    "A process that commits pairs and is killed anywhere leaves pairs."
    code = ("import sys; from stratfam.trading.journal import open_journal\n"
            f"b = open_journal({str(tmp_path / 'j.db')!r}, 'a')\n"
            "for i in range(10**6):\n"
            f"    b.append([('intent', f'id{{i}}', {INTENT!r}), ('outcome', f'id{{i}}', {{'outcome': 'ACK', 'order_id': str(i)}})], i)\n"
            "    print(i, flush=True)\n")
    for _ in range(3):
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})
        for _ in range(5): line = p.stdout.readline()
        p.send_signal(signal.SIGKILL)
        p.wait()
        book, entries = read_journal(tmp_path / "j.db")
        kinds = [e.kind for e in entries]
        assert kinds == ["intent", "outcome"] * (len(kinds) // 2) and len(kinds) // 2 > int(line)
        open_journal(tmp_path / "j.db", "a").close()  # The lock went with the process
        (tmp_path / "j.db").unlink()
        for more in tmp_path.glob("j.db-*"): more.unlink()


@pytest.mark.parametrize("where", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_a_damaged_file_is_refused_or_reads_as_it_was(tmp_path, where):
    "Flip one byte anywhere: the journal says so, or the byte carried nothing."
    path = filled(tmp_path / "j.db")
    before = read_journal(path)[1]
    raw = bytearray(path.read_bytes())
    for shift in range(0, 4000, 397):
        bad = bytearray(raw)
        bad[(int(where * len(raw)) + shift) % len(raw)] ^= 0x5A
        path.write_bytes(bad)
        try: after = read_journal(path)[1]
        except JournalError as e:
            assert "damaged" in str(e)
            with pytest.raises(JournalError): open_journal(path, "a")
        else: assert after == before


def test_a_truncated_file_is_refused(tmp_path):
    path = filled(tmp_path / "j.db")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(JournalError, match="damaged"): open_journal(path, "a")
    path.write_bytes(b"not a database at all, but text" * 40)
    with pytest.raises(JournalError, match="damaged"): open_journal(path, "a")


def test_a_torn_write_ahead_log_loses_only_its_tail(tmp_path):
    path = tmp_path / "j.db"
    store = SqliteStore(path, "a")
    book = Journal(store)
    for i in range(5): book.append([("intent", f"id{i}", INTENT)], i)
    wal = path.with_name("j.db-wal").read_bytes()
    data = path.read_bytes()
    book.close()
    path.write_bytes(data)
    path.with_name("j.db-wal").write_bytes(wal[:-1000])
    path.with_name("j.db-shm").unlink(missing_ok=True)
    again = open_journal(path, "a")
    assert 3 <= again.book.seq < 5 and len(again.append([("intent", "id9", INTENT)], 9)) == 1
    again.close()


def test_a_full_disk_keeps_memory_and_disk_alike(tmp_path):
    book = open_journal(tmp_path / "j.db", "a")
    book.append([("intent", "id0", INTENT)], 0)
    book.store.db.execute("PRAGMA max_page_count=6")
    with pytest.raises(JournalError, match="not written"): book.append([("note", "x", {"text": "x" * 100_000})], 1)
    book.store.db.execute("PRAGMA max_page_count=100000")
    book.append([("intent", "id1", INTENT)], 2)
    book.close()
    assert [e.key for e in read_journal(tmp_path / "j.db")[1]] == ["id0", "id1"]


def test_an_older_schema_is_copied_and_changed_a_newer_one_is_left_alone(tmp_path):
    path = filled(tmp_path / "j.db", 3)
    db = sqlite3.connect(path)
    migrate(db, path, 1, {1: "ALTER TABLE entry ADD COLUMN extra TEXT;"}, 2)
    assert db.execute("SELECT value FROM meta WHERE name='schema'").fetchone() == ("2",)
    db.close()
    assert len(read_journal(path.with_name("j.db.schema1.bak"))[1]) == 6
    with pytest.raises(JournalError, match="newer version"): open_journal(path, "a")


def test_reading_needs_no_lock(tmp_path):
    book = open_journal(tmp_path / "j.db", "a")
    book.append([("intent", "id0", INTENT)], 0)
    assert list(read_journal(tmp_path / "j.db")[0].open) == ["id0"]
    book.append([("end", "id0", {"end": "filled"})], 1)
    assert read_journal(tmp_path / "j.db")[0].open == {}
    book.close()
    with pytest.raises(JournalError, match="no journal"): read_journal(tmp_path / "other.db")


def test_any_prefix_of_a_journal_is_a_journal():
    "Crash after any commit: the next process reads a book that is consistent with the venue's side of the story."
    store = MemoryStore()
    book = Journal(store)
    for i in range(6):
        book.append([("intent", f"id{i}", INTENT)], i)
        book.append([("outcome", f"id{i}", {"outcome": "ACK", "order_id": str(i)})], i)
        book.append([("fill", f"f{i}", {"client_id": f"id{i}", "lots": 5}), ("end", f"id{i}", {"end": "filled"})], i)
    for cut in range(len(store.rows) + 1):
        part = j.read_book(store.rows[:cut])
        assert len(part.open) == len({r[3] for r in store.rows[:cut] if r[2] == "intent"} - {r[3] for r in store.rows[:cut] if r[2] == "end"})
    broken = [*store.rows[:3], *store.rows[4:]]
    with pytest.raises(JournalError): j.read_book(broken)
    row = list(store.rows[2])
    row[4] = json.dumps({"client_id": "id0", "lots": 6})
    with pytest.raises(JournalError): j.read_book([*store.rows[:2], tuple(row), *store.rows[3:]])
