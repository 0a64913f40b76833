"""What the loop reports: bounded, never in its way, gathered, and without a secret in any sink."""
import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratfam.config import NotifySettings, Secrets, Settings
from stratfam.core import ConfigError, Env, VirtualClock
from stratfam.trading.contact import open_contact, run_redactor
from stratfam.trading.notify import (
    LEVELS, MAX_TEXT, MAX_TOPICS, AppriseChannel, Dispatcher, Guard, JsonLog, Message, Notifier, Redactor, canonical, headline, level_of, plain,
)

TOKEN = "987654321:AAcanary-token_0123456789-abcdefghijk"


class Tape:
    def __init__(self, name="tape"): self.name, self.seen = name, []
    def take(self, event): self.seen.append(event)
    def tick(self, now): self.now = now
    def close(self): self.closed = True


class Pigeon:
    name = "pigeon"
    def __init__(self): self.got, self.fault = [], None
    def send(self, message):
        if self.fault: raise self.fault
        self.got.append(message)


def gathered(**more):
    clock, pigeon = VirtualClock(), Pigeon()
    note = Notifier(pigeon, Env(clock), **more)
    return clock, pigeon, note, Dispatcher([note], Env(clock), size=100_000)


# The order path.

def test_a_listener_that_hangs_costs_the_loop_nothing():
    "A hundred thousand events into a stuck listener: no wait, a bounded queue, an exact count of what was lost."
    stuck, tape = threading.Event(), Tape()
    tape.take = lambda event: (stuck.wait(30), tape.seen.append(event))
    d = Dispatcher([tape], size=500).start()
    d.observe({"kind": "fill", "n": -1})
    while d.queue: time.sleep(0.001)  # the thread holds the first event now
    waits = []
    for n in range(100_000):
        t = time.perf_counter()
        d.observe({"kind": "fill", "n": n})
        waits.append(time.perf_counter() - t)
    assert np.percentile(waits, 99) < 1e-3 and len(d.queue) == 500
    assert not d.close(0.05), "close says that something was left behind"
    stuck.set()
    d.thread.join(10)
    assert d.close()
    assert d.counts["dropped"] == 100_000 - 500
    assert [e.get("n", e["kind"]) for e in tape.seen] == [-1, "dropped", *range(99_500, 100_000)]


@pytest.mark.parametrize("event", [None, 42, "text", object(), [1, 2], {"kind": object()}, {1: 2}, {"kind": "cycle", "positions": 7, "age_s": "x"},
                                   {"kind": "decision", "symbols": {"A": 3}}, {"kind": "order", "client_id": {}, "order_id": [], "symbol": {}},
                                   {"kind": "state", "state": np.nan}, {"kind": "error", "error": Exception()}, {"kind": "\ud800"}])
def test_no_event_disturbs_the_loop_or_the_next_event(event, tmp_path):
    c = open_contact(Settings(notify=NotifySettings(log=tmp_path / "e.jsonl", metrics_port=9, level="debug")), Env(VirtualClock()))
    c.observe(event)
    c.observe({"kind": "cycle", "equity": 5.0})
    c.pump()
    assert c.metrics.registry.get_sample_value("stratfam_equity_usdt") == 5.0
    assert c.close() == []
    assert json.loads((tmp_path / "e.jsonl").read_text().splitlines()[-1])["equity"] == 5.0


def test_each_failure_is_counted_and_told_once():
    said, tape = [], Tape()
    class Bad(Tape):
        def take(self, event): raise KeyError(event["n"]) if event["n"] % 2 else OSError("full")
        def tick(self, now): raise ValueError
    d = Dispatcher([Bad("bad"), tape], Env(VirtualClock()), complain=said.append)
    for n in range(100): d.observe({"n": n})
    for _ in range(5): d.pump()
    assert d.counts["failed bad"] == 105 and len(said) == 3 and len(tape.seen) == 100
    d.complain = lambda text: 1 / 0
    d._try(tape, lambda: {}[0])
    assert d.counts["failed complaint"] == 1


def test_a_replay_gives_the_same_messages():
    "On a virtual clock everything is a function of the events."
    def run():
        clock, pigeon, _, d = gathered(level="info")
        rng = np.random.default_rng(3)
        for _ in range(2000):
            kind = ("fill", "order", "error", "state")[rng.integers(4)]
            d.observe({"kind": kind, "symbol": f"S{rng.integers(5)}", "error": f"e{rng.integers(9)}", "state": "HALTED", "outcome": "UNKNOWN"})
            clock.advance(float(rng.random()))
            if rng.random() < 0.3: pigeon.fault = None if pigeon.fault else OSError("away")
            d.pump()
        d.close()
        return pigeon.got
    first = run()
    assert first == run() and 4 < len(first) < 400


# Messages.

ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=9),
                   lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), x, max_size=4), max_leaves=12)
EVENT = st.dictionaries(st.sampled_from("kind time level state error where symbol side outcome positions cause n".split()),
                        ANY | st.sampled_from(("order", "state", "error", "HALTED", "UNKNOWN")), max_size=9)


RAW = st.dictionaries(st.sampled_from("kind time_ms bar_ms text end id lots symbols weight confidence held target reasons state".split()),
                      ANY | st.sampled_from(("order", "decision", "cycle", "state", "error", "HALTED (KILL)")) | st.just(1767618000000), max_size=9)


@settings(max_examples=300, deadline=None)
@given(RAW, st.lists(st.text(max_size=3), max_size=2))
def test_any_raw_event_becomes_canonical_once(event, symbols):
    once = canonical(event, symbols, "p")
    assert event.keys() <= once.keys()
    assert json.dumps(plain(canonical(once, symbols, "p"))) == json.dumps(plain(once))


@settings(max_examples=300, deadline=None)
@given(EVENT)
def test_any_event_becomes_one_line_and_plain_json(event):
    assert level_of(event) in LEVELS
    line = headline(event)
    assert len(line) <= 300 and "\n" not in line
    json.dumps(plain(event), allow_nan=False).encode()


def test_a_thousand_errors_make_one_message_and_lose_no_count():
    clock, pigeon, note, d = gathered()
    for n in range(1000): d.observe({"kind": "error", "where": "bars", "error": f"timeout {n}"})
    for _ in range(100):
        d.pump()
        clock.advance(1)
    assert len(pigeon.got) == 1 and pigeon.got[0].text.count("\n") == 0 and "(x1000)" in pigeon.got[0].text
    assert not note.waiting


def test_ten_thousand_different_errors_stay_bounded():
    clock, pigeon, note, d = gathered()
    for n in range(10_000): d.observe({"kind": "error", "where": "".join(chr(97 + n // 26**i % 26) for i in range(4)), "error": "x" * 400})
    d.pump()
    assert len(note.waiting) <= MAX_TOPICS + len(LEVELS)
    clock.advance(3)
    d.pump()
    assert len(pigeon.got) == 1 and len(pigeon.got[0].text) <= MAX_TEXT


def test_a_channel_that_is_away_for_an_hour_gets_it_all_at_once_afterwards():
    clock, pigeon, note, d = gathered()
    pigeon.fault = ConnectionError("away")
    for n in range(3600):
        d.observe({"kind": "error", "where": "bars", "error": f"{n}"})
        clock.advance(1)
        d.pump()
    assert 10 < note.counts["failed"] < 40, "the pauses grow"
    pigeon.fault = None
    clock.advance(301)
    d.pump()
    assert len(pigeon.got) == 1 and "(x3600)" in pigeon.got[0].text


def test_a_halt_does_not_wait_and_severity_filters():
    clock, pigeon, note, d = gathered(level="error")
    d.observe({"kind": "order", "outcome": "REFUSED"})
    d.observe({"kind": "fill"})
    d.pump()
    clock.advance(60)
    d.pump()
    assert pigeon.got == []
    d.observe({"kind": "state", "state": "HALTED"})
    d.pump()
    assert [m.level for m in pigeon.got] == ["critical"]
    with pytest.raises(ConfigError, match="level 'loud'"): Notifier(pigeon, Env(), level="loud")


# Secrets.

CANARIES = {"weex_api_key": "canary-key-0001", "weex_api_secret": 'canary"se/cret+\\0002=', "weex_passphrase": "canarypass0003",
            "telegram_token": TOKEN, "telegram_chats": "4200042001,-1004200042",
            "apprise_urls": "json://canaryuser:canary-pass-0004@127.0.0.1:9/canary-path-0005"}


def spellings(word):
    import base64
    from urllib.parse import quote
    return {word, quote(word, safe=""), json.dumps(word)[1:-1], base64.b64encode(word.encode()).decode()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_canaries_reach_no_sink(tmp_path, caplog, capfd):
    "Every secret, in every spelling and every field, through every sink; zero bytes of it come out."
    class Leaky:
        "Telegram that repeats the address in its errors and answers, and a peer that listens to messages."
        def __init__(self): self.heard, self.n = [], 0
        def send(self, method, url, headers, body):
            from stratfam.core import Response
            self.n += 1
            self.heard.append(json.loads(body).get("text", ""))
            if self.n % 3 == 0: raise OSError(f"cannot reach {url}")
            return Response(500 if self.n % 3 == 1 else 200, {}, json.dumps({"ok": self.n % 3 != 1, "result": [], "description": url}).encode())

    def uploaded(*fields): raise RuntimeError(" ".join(map(str, fields)) + json.dumps(CANARIES))

    caplog.set_level(logging.DEBUG)
    from stratfam.trading.ailog import AiLog
    clock, leaky = VirtualClock(), Leaky()
    s = Settings(notify=NotifySettings(log=tmp_path / "e.jsonl", level="debug", metrics_port=9), secrets=Secrets(**CANARIES))
    c = open_contact(s, Env(clock), f"paper {CANARIES['weex_api_key']}", telegram=leaky)
    c.ai_log = AiLog(tmp_path / "ailog.db", uploaded, Env(clock), c.redact, report=c.observe)
    c._behind("ai log", c.ai_log)
    c._behind("broken", type("Broken", (Tape,), {"take": lambda self, e: (_ for _ in ()).throw(RuntimeError(str(e)))})("broken"))
    words = [w for v in CANARIES.values() for w in (v, *v.split(",")) for w in spellings(w)] + TOKEN.split(":")[1:]
    words += ["canaryuser", "canary-pass-0004", "canary-path-0005"]
    for i, word in enumerate(words):
        c.observe({"kind": "error", "time": word, "where": word, "error": f"at {word}!", word: {word: [word]}, "level": word})
        c.observe({"kind": word, "symbol": word, "error": RuntimeError(word)})
        c.observe({"kind": "decision", "bar": word, "policy": word, "input": word, "symbols": {word: {"weight": 1.0, "features": {word: 1.0}}}})
        c.observe({"kind": "order", "client_id": f"c{i}", "order_id": i + 1, "bar": word, "symbol": word, "purpose": word, "outcome": "ACK"})
        c.observe({"kind": "cycle", "state": word, "positions": {word: 1.0}, "bar": word, "equity": 1.0})
        c.pump()
        clock.advance(400)
    for _ in range(20):
        c.bot.step()
        clock.advance(60)
    seen = [repr(c.redact), repr(c.bot.api), c.board.name, *c.missing]
    assert c.close() == []
    assert len(leaky.heard) > 50 and len((tmp_path / "e.jsonl").read_text().splitlines()) > 200
    out = capfd.readouterr()
    text = "\n".join([*seen, *leaky.heard, caplog.text, out.out, out.err, *(p.read_bytes().decode(errors="replace") for p in tmp_path.iterdir())])
    assert "order" in text and "***" in text
    assert [w for w in words if w in text] == []
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {"0o600"}


def test_metrics_and_status_do_not_carry_secrets_either():
    known = Secrets(telegram_token=TOKEN, weex_api_key=CANARIES["weex_api_key"])
    c = open_contact(Settings(notify=NotifySettings(log=None, metrics_port=9), secrets=known), Env(VirtualClock()))
    import prometheus_client
    c.observe({"kind": "error", "where": TOKEN, "error": CANARIES["weex_api_key"]})
    c.observe({"kind": "cycle", "state": "ACTIVE", "bar": TOKEN, "positions": {TOKEN: 1.0}})
    c.pump()
    text = prometheus_client.generate_latest(c.metrics.registry).decode() + c.board.status() + c.board.positions()
    assert "***" in text and TOKEN not in text and CANARIES["weex_api_key"] not in text


def test_a_guard_redacts_whatever_a_library_logs(caplog):
    guard, log = Guard(Redactor(TOKEN)), logging.getLogger("stratfam.test.chatty")
    log.addFilter(guard)
    caplog.set_level(logging.DEBUG, log.name)
    log.debug("POST %s", f"/bot{TOKEN}/x")
    log.debug("%d", "not a number")
    try: raise OSError(TOKEN)
    except OSError: log.exception("failed for %s", TOKEN)
    assert TOKEN not in caplog.text and caplog.text.count("***") == 2 and "cannot be formatted" in caplog.text


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(max_size=10), st.text(max_size=10))
def test_any_secret_disappears_from_text_json_and_urls(secret, before, after):
    from urllib.parse import quote
    r = Redactor(secret)
    for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1]): assert form not in r(f"{before}{form}{after}") or form in "***"


# Files.

def test_the_log_rotates_and_a_full_disk_is_counted(tmp_path):
    log = JsonLog(tmp_path / "e.jsonl", max_bytes=2000, backups=2)
    for n in range(200): log.take({"kind": "fill", "n": n})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.jsonl", "e.jsonl.1", "e.jsonl.2"]
    assert all(p.stat().st_mode & 0o777 == 0o600 and p.stat().st_size <= 2000 for p in tmp_path.iterdir())
    log.file.handler.stream.close()
    log.take({"kind": "fill"})
    assert log.lost == 1


def test_parts_that_cannot_be_opened_are_named_and_missing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "ailog.db").write_bytes(b"not a database" * 100)
    s = Settings(notify=NotifySettings(log=tmp_path / "file" / "e.jsonl", ai_log=tmp_path / "ailog.db"),
                 secrets=Secrets(telegram_token=TOKEN, telegram_chats="me", apprise_urls="nosuchservice-at-all"))
    c = open_contact(s, Env(VirtualClock()))
    assert [m.split(" is off")[0] for m in c.missing] == ["the log", "Telegram", "apprise", "the AI log"]
    c.observe({"kind": "cycle", "equity": 1.0})
    assert c.pump() > 0 and c.close() == []


def test_a_taken_port_does_not_stop_the_start():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        c = open_contact(Settings(notify=NotifySettings(log=None, metrics_port=other.server_port))).start()
        assert "Choose another notify.metrics_port" in c.missing[0]
        assert c.close() == []


def test_redactor_of_a_run_knows_short_passphrases_and_spares_small_numbers():
    r = run_redactor(Settings(secrets=Secrets(weex_passphrase="pw", telegram_chats="42")))
    assert r("pw 42") == "*** 42"


# Optional packages.

def test_nothing_optional_is_imported_before_it_is_wanted():
    code = ("import sys, stratfam.trading.contact\n"
            "found = {m.split('.')[0] for m in sys.modules} & {'telegram', 'apprise', 'prometheus_client', 'structlog', 'httpx', 'torch'}\n"
            "assert not found, found")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("package", "part"), [("apprise", "apprise"), ("prometheus_client", "metrics")])
def test_a_missing_package_is_a_clear_message(package, part, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    c = open_contact(Settings(notify=NotifySettings(log=None, metrics_port=9 if part == "metrics" else None), secrets=Secrets(apprise_urls="json://127.0.0.1")),
                     Env(VirtualClock()))
    c.close()
    assert [m for m in c.missing if m.startswith(part) and "pip install 'stratfam[notify]'" in m]


@contextmanager
def listening(status):
    "A service that takes JSON and answers `status()`."
    got = []
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(status())
            self.end_headers()
        def log_message(self, *args): "Silence."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server.server_port, got
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_apprise_delivers_fails_and_keeps_its_address_secret(caplog):
    caplog.set_level(logging.DEBUG)
    codes = iter([200, 500])
    with listening(lambda: next(codes)) as (port, got):
        channel = AppriseChannel([f"json://127.0.0.1:{port}/canary-path-0005"])
        channel.send(Message("error", "paper: ERROR", "bars"))
        with pytest.raises(ConnectionError): channel.send(Message("info", "t", "x"))
        assert got[0][0] == "/canary-path-0005" and got[0][1]["message"] == "bars" and got[0][1]["type"] == "failure"
        channel.close()
    assert "canary-path-0005" not in caplog.text and len(caplog.records) > 2
    assert Counter(type(f).__name__ for n in ("apprise", "urllib3.connectionpool") for f in logging.getLogger(n).filters)["Guard"] == 0


def test_structured_log_keeps_the_applications_structlog_settings(tmp_path):
    import structlog
    before = structlog.get_config()["processors"]
    JsonLog(Path(tmp_path) / "e.jsonl").take({"kind": "x"})
    assert structlog.get_config()["processors"] is before
