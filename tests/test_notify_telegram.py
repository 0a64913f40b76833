"""The bot against a fake Bot API on a real socket: faults, strangers, stale messages, and a token that appears nowhere."""
import json
import logging
import threading
import time
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratfam.config import NotifySettings, Secrets, Settings
from stratfam.core import ConfigError, Env, Response, SystemClock, VirtualClock
from stratfam.trading.contact import open_contact
from stratfam.trading.notify import Dispatcher, Message, Notifier
from stratfam.trading.telegram import Asks, Board, Bot, BotApi, QuietHttp, TelegramChannel, TelegramError

TOKEN = "123456789:AAcanary-token-of-the-bot_0123456789abc"
CHAT = 4200042001


class BotServer:
    "Telegram's side: updates that wait, messages that were said, and faults to come, per method."
    def __init__(self):
        self.lock, self.updates, self.said, self.faults, self.asked, self.n = threading.Lock(), [], [], {}, [], 0

    def write(self, text, chat=CHAT, ago=0.0, **more):
        with self.lock:
            self.n += 1
            self.updates.append({"update_id": self.n, "message": {"chat": {"id": chat}, "date": int(time.time() - ago), "text": text} | more})

    def answer(self, path, body):
        with self.lock:
            if path.split("/")[1] != f"bot{TOKEN}": return 401, {}, b'{"ok":false,"error_code":401,"description":"Unauthorized"}'
            method = path.rsplit("/", 1)[1]
            self.asked.append((method, body))
            if self.faults.get(method): return self.faults[method].pop(0)
            result = {"username": "desk_bot"}
            if method == "sendMessage": self.said.append((body["chat_id"], body["text"]))
            if method == "getUpdates": self.updates = result = [u for u in self.updates if u["update_id"] >= (body.get("offset") or 0)]
            return 200, {}, json.dumps({"ok": True, "result": result}).encode()


@contextmanager
def telegram():
    "The fake on a loopback port."
    api = BotServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got = api.answer(self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if got == "hang": return time.sleep(1.5)
            if got == "drop": return self.connection.close()
            status, headers, body = got
            self.send_response(status)
            for k, v in headers.items(): self.send_header(k, v)
            if "Content-Length" not in headers: self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return self.wfile.write(body)
        def log_message(self, *args): "Silence."

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api.url = f"http://127.0.0.1:{server.server_port}"
    try: yield api
    finally:
        server.shutdown()
        server.server_close()


def bot_for(api, env=None, token=TOKEN, **more):
    said = []
    env = env or Env()
    bot = Bot(BotApi(token, QuietHttp(1.0), api.url), [CHAT, -77], Asks(), Board(env, "paper"), env, wait_s=0, complain=said.append, **more)
    return bot, said


TOO_FAST = (429, {}, b'{"ok":false,"error_code":429,"description":"Too Many Requests: retry after 17","parameters":{"retry_after":17}}')
FAULTS = [TOO_FAST, (429, {"Retry-After": "9"}, b"slow down"), (500, {}, b""), (502, {}, b"<html>bad gateway</html>"), (200, {}, b'{"ok":tr'),
          (200, {}, b"[]"), (200, {}, b'{"ok":true}'), (200, {}, b'{"ok":true,"result":7}'), (200, {}, b"[" * 100_000),
          (302, {"Location": "/x"}, b""),
          (200, {"Content-Length": "999"}, b'{"ok":true'), (200, {}, b"\xff\xfe"), "drop", "hang"]


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_delays_a_command_and_loses_nothing(fault, caplog):
    caplog.set_level(logging.DEBUG)
    with telegram() as api:
        bot, _ = bot_for(api)
        assert bot.step() == 0.0
        api.faults["getUpdates"] = [fault]
        api.write("/halt now")
        pause = bot.step()
        assert pause == {0: 17.0, 1: 9.0}.get(FAULTS.index(fault), 2.0) and bot.asks.take() == []
        assert bot.step() == 0.0
        assert [(a.kind, a.reason) for a in bot.asks.take()] == [("halt", "now")]
        assert [c for c, _ in api.said] == [CHAT]
    assert TOKEN not in caplog.text and TOKEN.split(":")[1] not in caplog.text


def test_pauses_grow_and_a_refused_token_ends_the_bot_with_words():
    with telegram() as api:
        bot, said = bot_for(api)
        api.faults["getMe"] = [(500, {}, b"")] * 8
        assert [bot.step() for _ in range(8)] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
        assert bot.step() == 0.0
        bot, said = bot_for(api, token="123456789:another-token-altogether-000")
        bot.start()
        bot.thread.join(10)
        assert not bot.thread.is_alive() and "the token is refused" in said[0] and "another-token" not in said[0]


def test_strangers_get_nothing_and_are_counted():
    with telegram() as api:
        bot, _ = bot_for(api)
        for chat in (666, -4200042001, "4200042001", 4200042001.5, True, None, [CHAT], {"id": CHAT}): api.write("/halt", chat=chat)
        bot.step()
        assert api.said == [] and bot.asks.take() == [] and bot.counts["strangers"] == 8 and bot.counts["failed"] == 0
        assert {m for m, _ in api.asked} == {"getMe", "getUpdates"}


def test_only_the_chat_that_asked_can_confirm_once_and_in_time():
    with telegram() as api:
        clock = VirtualClock(time.time_ns())
        bot, _ = bot_for(api, Env(clock))
        def code(): return api.said[-1][1].split("/confirm ")[1][:4]
        api.write("/flatten")
        bot.step()
        good = code()
        api.write(f"/confirm {good}", chat=-77)
        bot.step()
        assert bot.asks.take() == []
        api.write(f"/confirm {good}")
        api.write(f"/confirm {good}")
        bot.step()
        assert [a.kind for a in bot.asks.take()] == ["flatten"] and "Nothing to confirm" in api.said[-1][1]
        api.write("/flatten")
        bot.step()
        clock.advance(61)
        api.write(f"/confirm {code()}", ago=-61)
        bot.step()
        assert bot.asks.take() == [] and "too old" in api.said[-1][1]


def test_messages_from_before_the_start_are_ignored_and_a_stale_halt_is_obeyed():
    "A flatten typed into a dead bot is refused with a word; a halt is obeyed however old, made durable, and says when it was sent."
    with telegram() as api:
        for text in ("/flatten", "/confirm 1234", "/status"): api.write(text, ago=3600)
        api.write("/halt", ago=80_000)
        killed = []
        bot, _ = bot_for(api, engage=killed.append)
        bot.step()
        assert [a.kind for a in bot.asks.take()] == ["halt"] and len(killed) == 1
        assert [("too late" in t, "It was sent at" in t) for _, t in api.said] == [(True, False)] * 3 + [(False, True)]
        again, _ = bot_for(api)  # acknowledged only by the next poll: a crash here delivers it once more
        again.step()
        assert [a.kind for a in again.asks.take()] == ["halt"]
        again.step()
        third, _ = bot_for(api)
        third.step()
        assert third.asks.take() == []


def test_a_command_that_waited_out_a_long_outage_is_stale_too():
    with telegram() as api:
        clock = VirtualClock(time.time_ns())
        bot, _ = bot_for(api, Env(clock))
        clock.advance(1800)
        api.write("/flatten", ago=-60)  # sent a minute after the start, seen half an hour later
        bot.step()
        assert "too late" in api.said[-1][1] and not bot.pending


def test_a_kill_file_that_cannot_be_written_does_not_stop_the_halt():
    def full(reason): raise OSError("no space left")
    with telegram() as api:
        bot, _ = bot_for(api, engage=full)
        api.write("/halt")
        bot.step()
        assert [a.kind for a in bot.asks.take()] == ["halt"] and bot.counts["kill file failed"] == 1 and "HALT handed" in api.said[0][1]


def test_an_answer_that_cannot_be_delivered_does_not_undo_the_halt():
    with telegram() as api:
        bot, _ = bot_for(api)
        api.faults["sendMessage"] = [(403, {}, b'{"ok":false,"error_code":403,"description":"Forbidden: bot was blocked by the user"}')]
        api.write("/halt")
        assert bot.step() == 0.0
        assert len(bot.asks.take()) == 1 and bot.counts["unanswered"] == 1


FIELDS = ["update_id", "message", "chat", "id", "date", "text", "from"]
JUNK = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=12) | st.just(CHAT),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), x, max_size=5), max_leaves=20)


@settings(max_examples=300, deadline=None)
@given(st.lists(JUNK, max_size=5) | JUNK)
def test_no_update_whatever_its_shape_ends_the_bot(result):
    "Only a text that begins with /halt may halt; anything else leaves no request, and the next good command is obeyed."
    class Script:
        def send(self, method, url, headers, body):
            if url.endswith("getMe"): return Response(200, {}, b'{"ok": true, "result": {"username": "b"}}')
            return Response(200, {}, json.dumps({"ok": True, "result": self.now}).encode())
    clock, script = VirtualClock(), Script()
    bot = Bot(BotApi(TOKEN, script), [CHAT], Asks(), Board(Env(clock)), Env(clock))
    script.now = result
    assert 0.0 <= bot.step() <= 60.0
    bot.offset, script.now = None, [{"update_id": 1, "message": {"chat": {"id": CHAT}, "date": clock.now_ns() // 10**9, "text": "/halt"}}]
    bot.asks.take()
    assert bot.step() == 0.0 and [a.kind for a in bot.asks.take()] == ["halt"]


def test_rubbish_that_cannot_be_acknowledged_does_not_spin():
    with telegram() as api:
        bot, _ = bot_for(api)
        api.write("/help")
        bot.step()
        api.updates = []
        api.faults["getUpdates"] = [(200, {}, json.dumps({"ok": True, "result": rubbish}).encode()) for rubbish in ([{}], [{"update_id": 1}], [3])]
        assert [bot.step() for _ in range(3)] == [1.0, 1.0, 1.0] and bot.counts["malformed"] == 3


def test_messages_wait_as_long_as_telegram_asks_and_each_chat_stands_alone():
    with telegram() as api:
        clock, env = VirtualClock(), None
        env = Env(clock)
        notes = [Notifier(TelegramChannel(BotApi(TOKEN, QuietHttp(1.0), api.url), chat, i), env) for i, chat in enumerate((CHAT, -77))]
        ds = [Dispatcher([n], env) for n in notes]
        api.faults["sendMessage"] = [TOO_FAST]
        for _ in range(1000):
            for d in ds: d.observe({"kind": "state", "state": "HALTED", "cause": "DRAWDOWN"})
        for d in ds: d.pump()
        assert [c for c, _ in api.said] == [-77]
        clock.advance(16)
        ds[0].pump()
        assert len(api.said) == 1
        clock.advance(2)
        ds[0].pump()
        assert [c for c, _ in api.said] == [-77, CHAT] and "(x1000)" in api.said[1][1]


def test_the_token_is_in_no_text_of_ours(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    seen = []
    with telegram() as api:
        one = BotApi(TOKEN, QuietHttp(0.5), api.url)
        api.faults["sendMessage"] = [(400, {}, json.dumps({"ok": False, "description": f"bad url /bot{TOKEN}/x"}).encode()), *FAULTS]
        for _ in range(1 + len(FAULTS)):
            try: TelegramChannel(one, CHAT).send(Message("error", "t", "x"))
            except TelegramError as e: seen += [repr(e), str(e), repr(vars(e)), "".join(traceback.format_exception(e))]
        seen += [repr(one), repr(vars(one))]
        assert len(seen) > 50
    for transport in (QuietHttp(0.5),):
        with pytest.raises(TelegramError) as gone: BotApi(TOKEN, transport, api.url).call("getMe")  # nobody listens there any more
        seen.append(str(gone.value))
    for bad in ("", TOKEN + "\n", f"{TOKEN}/../x", None):
        with pytest.raises(ConfigError) as refused: BotApi(bad)
        seen.append(str(refused.value))
    with pytest.raises(ConfigError): BotApi(TOKEN, None, "http://telegram.example")  # never in the clear to another machine
    out = capfd.readouterr()
    text = "\n".join(seen) + caplog.text + out.out + out.err
    assert TOKEN not in text and TOKEN.split(":")[1] not in text


def test_an_endless_answer_ends():
    class Drip(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(200):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.02)
            except OSError: self.close_connection = True
        def log_message(self, *args): "Silence."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(TelegramError, match="no answer"): BotApi(TOKEN, QuietHttp(0.2, SystemClock()), f"http://127.0.0.1:{server.server_port}").call("getMe")
    assert time.monotonic() - began < 3
    server.shutdown()
    server.server_close()


def test_kill_switch_by_chat_end_to_end_with_threads(tmp_path):
    "A contact with its threads: the loop's side sees the halt within a second and the chat hears of the new state."
    with telegram() as api:
        s = Settings(notify=NotifySettings(log=tmp_path / "e.jsonl", gather_s=0.0), secrets=Secrets(telegram_token=TOKEN, telegram_chats=str(CHAT)))
        c = open_contact(s, title="paper", telegram=QuietHttp(2.0), telegram_base=api.url).start()
        c.bot.wait_s = 0
        c.observe({"kind": "cycle", "state": "ACTIVE", "equity": 10_000.0, "positions": {"BTCUSDT": 0.1}})
        api.write("/halt the market is mad")
        assert c.asks.bell.wait(10)
        ask, = c.asks.take()
        assert (ask.kind, ask.reason) == ("halt", "the market is mad") and str(CHAT) not in ask.by
        c.observe({"kind": "state", "before": "ACTIVE", "state": "HALTED", "cause": "KILL", "reason": ask.reason})
        end = time.monotonic() + 10
        while not any("HALTED" in t for _, t in api.said) and time.monotonic() < end: time.sleep(0.02)
        api.write("/status")
        while not any("state: HALTED" in t for _, t in api.said) and time.monotonic() < end: time.sleep(0.02)
        assert c.close() == []
        assert any("paper: CRITICAL" in t for _, t in api.said) and any("equity: 10,000.00" in t for _, t in api.said)
    assert TOKEN not in (tmp_path / "e.jsonl").read_text() and str(CHAT) not in (tmp_path / "e.jsonl").read_text()
