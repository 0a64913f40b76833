"""The AI log: one record for every order, through faults and crashes, and never an order because of a record (F18)."""
import json
import math
import os
import signal
import sqlite3
import time
from collections import Counter
from decimal import Decimal as D
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weex_canned import GOLDEN, ME

from stratfam.config import NotifySettings, Settings
from stratfam.core import Bars, Env, VirtualClock
from stratfam.risk.gate import Reason
from stratfam.trading.ailog import (
    BACKLOG, DONE, GIVEN_UP, HELD, VOID, WAITING, AiLog, AiLogError, _fit, explain, record_of, upload_client,
)
from stratfam.trading.contact import open_contact
from stratfam.trading.notify import Dispatcher
from stratfam.weex.client import OrderRequest, WeexAPIClient
from stratfam.weex.exchange import Exchange, add_user
from stratfam.weex.gateway import FaultPlan, InProcessTransport
from stratfam.weex.wire import ACK, REFUSED, Ambiguous, NotSent, Outcome, RateLimited

START = np.datetime64("2024-01-01T00", "ns")
FAULTS = ("timeout_before", "timeout_after", "reset_after", "error_before", "error_after", "html", "truncated", "wrong_type", "empty", "rate_limit",
          "rate_limit_bare", "refused", "skew")


class Venue:
    "The simulated exchange, a trading client, and what the loop would report."
    def __init__(self, faults=None, **user):
        t = START + np.arange(60) * np.timedelta64(1, "h")
        close = 40_000 + 100.0 * (np.arange(60)[:, None] % 7)
        volume, ok = np.full((60, 1), 50.0), np.ones((60, 1), bool)
        bars = Bars(t, "1h", close, close + 20, close - 20, close, volume, np.zeros((60, 1)), ok, ("BTCUSDT",), "perp")
        self.x = Exchange([bars])
        add_user(self.x, GOLDEN["key"], GOLDEN["secret"], GOLDEN["passphrase"], usdt=100_000, **user)
        self.clock = VirtualClock(int(START.astype("i8")) + 3 * 3600 * 10**9)
        self.env = Env(self.clock, np.random.default_rng(4), InProcessTransport(self.x, self.clock, faults))
        self.client = WeexAPIClient("contract", ME, self.env, budgets={})
        self.placed = 0

    @property
    def logs(self): return list(self.x.users[GOLDEN["key"]]["logs"])
    @property
    def orders(self): return [o for o in self.x.orders.values() if not o["closing"]]

    def order(self, n, **more):
        "Place one order without faults and report it as the loop does."
        plan = self.env.transport.faults
        plan.on = False
        got = self.client.place(OrderRequest("BTCUSDT", "BUY", D("0.01"), f"sf{n:04}", "LONG", "MARKET"))
        plan.on = True
        self.placed += 1
        assert got.kind == ACK
        bar = f"bar {n // 2}"
        return [decision(bar), {"kind": "order", "time": self.env.iso(), "bar": bar, "symbol": "BTCUSDT", "side": "BUY", "quantity": "0.01",
                                "purpose": "ENTRY", "client_id": f"sf{n:04}", "order_id": got.payload.order_id, "outcome": "ACK"} | more]


def decision(bar="bar 0", **more):
    wish = {"weight": 0.5, "confidence": 0.8, "target": 0.25, "held": 0.0, "reasons": ["VOLATILITY"], "features": {"m": 1.5}}
    return {"kind": "decision", "bar": bar, "policy": "ppo-0001", "input": "ab" * 32, "symbols": {"BTCUSDT": wish}} | more


ORDER = {"kind": "order", "symbol": "BTCUSDT", "side": "BUY", "quantity": "1", "client_id": "a", "order_id": "1", "outcome": "ACK"}


# Against the simulated exchange.

@pytest.mark.parametrize("seed", range(12))
def test_every_order_gets_its_record_through_a_swarm_of_faults_and_restarts(seed, tmp_path):
    "Half of all uploads meet a fault, the process restarts now and then; in the end each order has its record and there is not one order more."
    v = Venue(FaultPlan(seed, dict.fromkeys(FAULTS, 0.5 / len(FAULTS))))
    rng, told, events = np.random.default_rng(seed), [], []
    def opened(): return AiLog(tmp_path / "ailog.db", upload_client(v.client).upload_ai_log, v.env, ME.redact, report=told.append)
    log = opened()
    for n in range(20):
        for event in v.order(n):
            events.append(event)
            log.take(event)
            if rng.random() < 0.3: log.take(event)
        for _ in range(3):
            v.clock.advance(float(rng.exponential(5)))
            log.tick(v.clock.monotonic())
        if rng.random() < 0.2:  # a crash: nothing is closed, the journal tells everything once more
            log.db.close()
            log = opened()
            log.backfill(events)
    v.env.transport.faults.calm()
    v.env.transport.faults.on = False
    for _ in range(200):
        v.clock.advance(30)
        log.tick(v.clock.monotonic())
    assert log.totals() == {HELD: 0, WAITING: 0, DONE: 20, GIVEN_UP: 0, VOID: 0} and told == []
    assert len(v.orders) == v.placed == 20, "F18: a record never makes an order"
    got = Counter(str(r["orderId"]) for r in v.logs)
    assert set(got) == {str(o["id"]) for o in v.orders}
    assert all(len(r["explanation"]) <= 1000 and r["model"] == "ppo-0001" and r["stage"] == "Decision Making" for r in v.logs)
    lost = sum(v.env.transport.faults.counts[k] for k in ("timeout_after", "reset_after", "error_after", "html", "truncated", "wrong_type", "empty"))
    assert len(v.logs) - 20 <= lost, "a record is sent again only when its answer was lost"
    assert all(r == {**r, "explanation": next(q for q in v.logs if q["orderId"] == r["orderId"])["explanation"]} for r in v.logs)


def test_without_faults_each_record_is_sent_exactly_once_and_oldest_first(tmp_path):
    v = Venue()
    log = AiLog(tmp_path / "ailog.db", upload_client(v.client).upload_ai_log, v.env)
    for n in range(30): log.backfill(v.order(n))
    for _ in range(200):
        v.clock.advance(1)
        log.tick(v.clock.monotonic())
    assert [str(r["orderId"]) for r in v.logs] == [str(o["id"]) for o in v.orders] and len(v.logs) == 30


def test_an_account_off_the_allow_list_is_given_up_with_words_and_revived(tmp_path):
    v, told = Venue(ai_log=False), []
    log = AiLog(tmp_path / "ailog.db", upload_client(v.client).upload_ai_log, v.env, report=told.append)
    log.backfill(v.order(1))
    for _ in range(40):
        v.clock.advance(30)
        log.tick(v.clock.monotonic())
    row, = log.rows(GIVEN_UP)
    assert row["tries"] == 5 and "PermissionDenied" in row["note"] and "Insufficient permissions" in told[0]["error"] and len(told) == 1
    v.x.users[GOLDEN["key"]]["ai_log"] = True
    assert log.revive() == 1
    log.tick(v.clock.monotonic() + 1000)
    assert log.totals()[DONE] == 1 == len(v.logs)


def test_the_demo_account_has_no_ai_log_and_says_so(tmp_path):
    v = Venue()
    demo = WeexAPIClient("contract", ME, v.env, demo=True, budgets={})
    c = open_contact(Settings(notify=NotifySettings(log=None, ai_log=tmp_path / "a.db")), v.env, client=demo)
    assert "The demo account has no 'ai_log'" in c.missing[0] and c.ai_log is None


def test_a_contact_uploads_with_its_own_budget_and_an_order_pays_nothing(tmp_path):
    "A hundred records wait; the trading client's limiter and connection see none of them."
    v = Venue()
    v.client = WeexAPIClient("contract", ME, v.env)
    c = open_contact(Settings(notify=NotifySettings(log=None, ai_log=tmp_path / "a.db")), v.env, client=v.client)
    for n in range(40):
        for e in v.order(n): c.observe(e)
        v.clock.advance(2)
    assert {k: w.limit for k, w in upload_client(v.client).limiter.windows.items()} == {"ip": 5, "uid": 5}
    used = {k: w.used for k, w in v.client.limiter.windows.items()}
    before = v.clock.monotonic()
    for _ in range(100):
        c.pump()
        assert v.clock.monotonic() == before, "an upload never sleeps on the loop's clock"
        v.clock.advance(2)
        before = v.clock.monotonic()
    assert {k: w.used for k, w in v.client.limiter.windows.items()} == used
    assert c.ai_log.totals()[DONE] == 40 == len(v.logs) and c.close() == []


def test_an_upload_that_hangs_never_holds_an_order(tmp_path):
    import threading
    stuck = threading.Event()
    log = AiLog(tmp_path / "a.db", lambda *a: (stuck.wait(20), Outcome(ACK))[1], Env())
    d = Dispatcher([log], size=100_000).start()
    began = time.perf_counter()
    for n in range(500): d.observe(ORDER | {"client_id": f"c{n}", "order_id": str(n + 1)})
    assert time.perf_counter() - began < 1.0
    stuck.set()
    assert d.close(30)


class Entry(NamedTuple):
    "As the journal has them."
    kind: str
    key: str
    body: dict
    time_ms: int


def test_the_journal_fills_in_what_a_crash_or_a_full_queue_lost(tmp_path):
    "Orders that were never told, told before, found later or never sent: after a start from the journal each has its record, once."
    v = Venue()
    wanted = Settings(notify=NotifySettings(log=None, ai_log=tmp_path / "a.db"))
    c = open_contact(wanted, v.env, client=v.client, symbols=("BTCUSDT",), policy="ppo-0001")
    told = v.order(0)
    for e in told: c.observe(e)
    c.pump()
    assert c.close() == []
    entries = [Entry("start", "0", {"symbols": ["BTCUSDT"]}, 1)]
    for n in (0, 1, 2):
        order = told[1] if n == 0 else v.order(n)[1] if n == 1 else {"client_id": "sf0002", "order_id": ""}
        entries += [Entry("decision", str(n), {"bar_ms": 3_600_000 * (n + 1), "weight": [0.5], "confidence": [0.8], "held": [0], "target": [20],
                                               "reasons": [["VOLATILITY"]], "input": "ab12"}, 2),
                    Entry("intent", order["client_id"], {"symbol": "BTCUSDT", "purpose": "ENTRY", "side": "BUY", "quantity": "0.01", "lots": 10,
                                                         "bar_ms": 3_600_000 * (n + 1)}, 3),
                    Entry("outcome", order["client_id"], {"outcome": "UNKNOWN", "order_id": "", "error": "timeout"}, 4),
                    Entry("end", order["client_id"], {"end": "never_sent", "filled": 0}, 5) if n == 2 else
                    Entry("outcome", order["client_id"], {"outcome": "ACK", "order_id": order["order_id"]}, 5)]
    again = open_contact(wanted, v.env, client=v.client, symbols=("BTCUSDT",), policy="ppo-0001")
    for _ in range(2): again.backfill(entries)
    for _ in range(20):
        v.clock.advance(2)
        again.pump()
    assert again.ai_log.totals() == {HELD: 0, WAITING: 0, DONE: 2, GIVEN_UP: 0, VOID: 1}
    assert [r["orderId"] for r in v.logs] == [o["id"] for o in v.orders] and len(v.logs) == 2
    assert all(r["model"] == "ppo-0001" for r in v.logs)
    assert "+20 lots; held before: +0 lots" in v.logs[1]["explanation"] and "bar 1970-01-01T02:00" in v.logs[1]["explanation"]
    again.backfill([Entry("decision", "x", None, 1), object()])  # trouble is reported, not raised
    assert any("could not be filled" in e.get("error", "") for d in again.dispatchers.values() for e in d.queue) and again.close() == []


# The file.

def test_a_full_disk_keeps_records_in_memory_and_sends_nothing_twice(tmp_path):
    asked = []
    clock = VirtualClock()
    log = AiLog(tmp_path / "a.db", lambda *a: asked.append(a[-1]) or Outcome(ACK), Env(clock))
    log.take(ORDER)
    pages = log.db.execute("PRAGMA page_count").fetchone()[0]
    log.db.execute(f"PRAGMA max_page_count = {pages}")
    for n in range(2, 60):
        try: log.take(ORDER | {"client_id": f"c{n}", "order_id": str(n), "quantity": "9" * 30})
        except AiLogError as e: assert "wait in memory" in str(e)
    assert len(log.unwritten) > 30
    class Full:
        "A disk that refuses to take an answer."
        def __init__(self, db): self.db = db
        in_transaction = False
        def execute(self, sql, *a):
            if sql.startswith("UPDATE"): raise sqlite3.OperationalError("database or disk is full")
            return self.db.execute(sql, *a)
    real = log.db
    unwritten, log.unwritten, log.db = log.unwritten, {}, Full(real)
    for t in range(1, 50):
        with pytest.raises(AiLogError, match="uploads wait for the disk"): log.tick(100.0 * t)
    assert asked == ["1"]
    log.db, log.unwritten = real, unwritten
    real.execute("PRAGMA max_page_count = 100000")
    for t in range(50, 200): log.tick(100.0 * t)
    assert sorted(asked, key=int) == [str(n) for n in range(1, 60)] and log.totals()[DONE] == 59


def test_the_backlog_is_bounded_and_counts_what_it_lost(tmp_path):
    log = AiLog(tmp_path / "a.db", lambda *a: Outcome(ACK), Env(VirtualClock()))
    log.db.execute("DROP TABLE record")
    d = Dispatcher([log], Env(VirtualClock()), size=BACKLOG + 100, complain=lambda t: None)
    log._row = lambda key, event: (key, None, HELD, "{}")
    for n in range(BACKLOG + 50): d.observe(ORDER | {"client_id": f"c{n}"})
    d.pump()
    assert len(log.unwritten) == BACKLOG and log.lost == 50 and d.counts["failed ai log"] > BACKLOG


def work(path, out):
    "What the forked child does: take forty orders, upload, and say each step in a file."
    say = lambda *words: os.write(out, (" ".join(map(str, words)) + "\n").encode())
    def upload(stage, model, inputs, output, explanation, order_id):
        say("SENT", order_id)
        return Outcome(ACK)
    log = AiLog(path, upload, Env(), gap_s=0.0)
    for n in range(1, 41):
        log.take(ORDER | {"client_id": f"c{n}", "order_id": str(n)})
        say("TOOK", n)
        log.tick(float(n))
    while log.totals()[WAITING]: log.tick(1e6)
    say("END")


def test_kill_at_any_moment_loses_no_record_that_was_taken(tmp_path):
    "Real processes, real SIGKILL at a random step; at most one record a kill is sent twice."
    path, out, rng, kills = tmp_path / "a.db", tmp_path / "out", np.random.default_rng(1), 0
    for n in range(25):
        before = len(out.read_text().splitlines()) if out.exists() else 0
        f = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        child = os.fork()
        if child == 0:
            try: work(path, f)
            finally: os._exit(0)
        os.close(f)
        stop = before + int(rng.integers(0, 70)) if n < 24 else math.inf
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if len(out.read_text().splitlines()) > stop:
                os.kill(child, signal.SIGKILL)
                kills += os.waitpid(child, 0)[1] == signal.SIGKILL
                break
            time.sleep(0.0005)
    lines = [line.split() for line in out.read_text().splitlines()]
    sent, took = Counter(x[1] for x in lines if x[0] == "SENT"), {x[1] for x in lines if x[0] == "TOOK"}
    wanted = {str(n) for n in range(1, 41)}
    db = sqlite3.connect(path)
    assert dict(db.execute("SELECT status, count(*) FROM record GROUP BY status")) == {"done": 40} and lines[-1] == ["END"]
    assert took == wanted == set(sent) and kills >= 5 and sum(sent.values()) - 40 <= kills
    assert oct(path.stat().st_mode & 0o777) == "0o600"


# The states of a record.

CASES = [("UNKNOWN/", HELD), ("UNKNOWN/ ACK/7", WAITING), ("UNKNOWN/ REFUSED/", VOID), ("UNKNOWN/ never_sent/", VOID), ("REFUSED/", VOID),
         ("ACK/7 REFUSED/", WAITING), ("ACK/7 UNKNOWN/", WAITING), ("filled/7", WAITING), ("UNKNOWN/ UNKNOWN/ canceled/7", WAITING),
         ("REFUSED/ UNKNOWN/", VOID), ("REFUSED/ filled/7", WAITING)]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("reports", "status"), CASES)
def test_what_a_row_becomes(reports, status, memory, tmp_path):
    "From the outcomes an order has in turn; the same when the disk refuses until the end."
    log = AiLog(tmp_path / "a.db", lambda *a: Outcome(ACK), Env(VirtualClock()))
    write = log._write
    if memory: log._write = lambda: None
    log.take(decision())
    for r in reports.split():
        outcome, order_id = r.split("/")
        log.take(ORDER | {"bar": "bar 0", "outcome": outcome, "order_id": order_id or None})
    write()
    row, = log.rows()
    assert (row["status"], row["order_id"]) == (status, "7" if status == WAITING else None)
    assert json.loads(row["body"])["model"] == "ppo-0001"


def test_one_venue_order_has_one_record_even_under_two_names(tmp_path):
    asked = []
    log = AiLog(tmp_path / "a.db", lambda *a: asked.append(a[-1]) or Outcome(ACK), Env(VirtualClock()))
    log.take(ORDER)
    log.take(ORDER | {"client_id": "b"})
    log.take(ORDER | {"client_id": "c", "order_id": None, "outcome": "UNKNOWN"})
    log.take(ORDER | {"client_id": "c"})
    for t in range(20): log.tick(10.0 * t)
    assert asked == ["1"]


def test_a_record_that_always_fails_does_not_hold_up_the_others(tmp_path):
    asked = []
    def upload(*a):
        asked.append(a[-1])
        return Outcome("UNKNOWN", None, Ambiguous("500")) if a[-1] == "1" else Outcome(ACK)
    log = AiLog(tmp_path / "a.db", upload, Env(VirtualClock()))
    for n in range(1, 6): log.take(ORDER | {"client_id": f"c{n}", "order_id": str(n)})
    for t in range(40): log.tick(700.0 * t)
    assert log.totals()[DONE] == 4 and asked[:9] == ["1"] * 5 + ["2", "3", "4", "5"]


@pytest.mark.parametrize("error", [NotSent("dns"), RateLimited("slow", wait_s=300.0), Ambiguous("timeout"), TimeoutError(), ConnectionResetError()])
def test_what_may_pass_is_tried_again_after_a_pause(error, tmp_path):
    answers = [error]
    def upload(*a):
        if not answers: return Outcome(ACK)
        e = answers.pop()
        if isinstance(e, OSError): raise e
        return Outcome(REFUSED if e.proof else "UNKNOWN", None, e)
    log = AiLog(tmp_path / "a.db", upload, Env(VirtualClock()))
    log.take(ORDER)
    log.tick(0.0)
    log.tick(4.9)
    assert log.totals()[WAITING] == 1
    log.tick(299.0)
    assert log.totals()[DONE] == (0 if isinstance(error, RateLimited) else 1)
    log.tick(332.0)
    assert log.totals()[DONE] == 1


@pytest.mark.parametrize("content", [b"x", b"SQLite format 3\0" + bytes(100), b"not a database at all, but long enough to look at" * 40])
def test_a_damaged_file_is_refused_with_a_cure_and_kept(content, tmp_path):
    (tmp_path / "a.db").write_bytes(content)
    with pytest.raises(AiLogError, match="Keep the file as evidence"): AiLog(tmp_path / "a.db", None, Env())
    assert (tmp_path / "a.db").read_bytes() == content


def test_an_order_heard_of_before_its_decision_waits_for_it_a_minute_at_most(tmp_path):
    clock = VirtualClock()
    log = AiLog(tmp_path / "a.db", lambda *a: Outcome(ACK), Env(clock), gap_s=1e9)
    models = lambda: [json.loads(r["body"])["model"] for r in log.rows()]
    for key, more in (("a", {}), ("b", {"bar": "bar 9"}), ("c", {"purpose": "STOP"})):
        log.take(ORDER | {"bar": "bar 0", "client_id": key, "order_id": f"id {key}"} | more)
    assert models() == ["stratfam risk rules"], "a stop has no decision to wait for"
    log.take(decision())
    assert models() == ["stratfam risk rules", "ppo-0001"]
    clock.advance(59)
    log.tick(clock.monotonic())
    assert len(models()) == 2
    clock.advance(2)
    log.tick(clock.monotonic())
    assert len(models()) == 3 and not log.early
    log.take(ORDER | {"bar": "bar 8", "client_id": "d", "order_id": "id d"})
    log.close()
    again = AiLog(log.path, lambda *a: Outcome(ACK), Env(clock))
    assert len(again.rows()) == 4, "closing writes what waits"


# The words.

VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2000) | st.lists(st.text(max_size=40), max_size=40)
FACTS = st.dictionaries(st.sampled_from("weight confidence target held reasons features symbol purpose side quantity policy bar input".split()),
                        VALUE | st.dictionaries(st.text(max_size=60), st.floats() | st.text(max_size=9), max_size=30))


@settings(max_examples=300, deadline=None)
@given(FACTS, FACTS, FACTS)
def test_any_facts_make_a_short_plain_explanation(order, wish, about):
    text = explain(order, wish, about)
    assert 0 < len(text) <= 1000 and text.isascii() and "\n" not in text and text == explain(order, wish, about)
    table = {"symbols": {order["symbol"]: wish}} if isinstance(order.get("symbol"), str) else {}
    json.dumps(record_of(order, about | table)._asdict(), allow_nan=False)


def test_sentences_are_kept_whole_up_to_exactly_a_thousand_characters():
    half = "a" * 499 + "."
    assert _fit([half, "b" * 498 + "."]) == f"{half} {'b' * 498}." and _fit([half, "b" * 499 + "."]) == half
    assert _fit(["c" * 1000]) == "c" * 1000 and _fit(["c" * 1001]) == "c" * 996 + " ..."


def test_the_explanation_names_every_fact_and_nothing_else():
    wish = decision()["symbols"]["BTCUSDT"] | {"reasons": [r.name for r in Reason][:3]}
    text = explain(ORDER, wish, decision())
    facts = ["ppo-0001", "+0.5", "0.8", "bar 0", "+0.25", "BUY 1 BTCUSDT", "BAD_OUTPUT: The policy's answer", "KILL:", "DATA:", "m +1.5", "ab" * 32]
    assert [f for f in facts if f not in text] == []
    assert "confidence" not in explain(ORDER, {"weight": 0.5}, {}) and "digest" not in explain(ORDER, {"weight": 0.5}, {})
    assert "asked for weight hold" in explain(ORDER, {"weight": float("nan")}, {})
