"""trading.feed: whatever happens to the stream, a bar from the feed is the bar that REST would have given; and trading goes on without it."""
import dataclasses
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from stratfam.core import Env, ObservationSpec, SystemClock
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.policies.base import Rule
from stratfam.risk.limits import limits_from
from stratfam.trading.feed import Buffer, Feed
from stratfam.trading.journal import Journal, MemoryStore
from stratfam.trading.loop import Loop, Setup
from stratfam.trading.permit import FOREVER, Permit
from stratfam.trading.venues import PAPER, WeexVenue, closed_bars, paper_venue
from stratfam.weex.client import WeexAPIClient
from stratfam.weex.exchange import Exchange, add_user, advance_to
from stratfam.weex.gateway import FaultPlan
from stratfam.weex.push import Hub
from stratfam.weex.replies import kline_from
from stratfam.weex.rest import kline_rows
from stratfam.weex.server import Server
from stratfam.weex.stream import Resync, Send, StreamCore, Update

NAMES, HOUR = ("BTCUSDT", "ETHUSDT"), 3_600_000
FAULTS = {"stream_drop": 0.01, "stream_gap": 0.05, "stream_silence": 0.01, "stream_duplicate": 0.05, "stream_reorder": 0.05}


def world(T, seed=1, step="1h", gaps=0.0, **more):
    bars = dataclasses.replace(make_world("regime_vol", T, 2, step, market="perp", seed=seed, vol=1.5, **more).bars, symbols=NAMES)
    if not gaps: return bars
    ok = np.random.default_rng(seed).random(bars.ok.shape) > gaps
    ok[0] = True
    cut = {k: np.where(ok, getattr(bars, k), np.nan) for k in ("open", "high", "low", "close", "volume", "funding")}
    return dataclasses.replace(bars, ok=ok, **cut)


class Line:
    "The stream of an exchange without sockets or threads: the core, a session of its hub, and reconnections when the session ends."
    def __init__(self, x, faults, take, interval="1h"):
        self.x, self.hub, self.take, self.faults, self.core = x, Hub(x, faults), take, faults, StreamCore()
        self.core.wanted = [f"{s}@kline_{interval}_LAST_PRICE" for s in NAMES]
        self.session, self.connections = None, 0

    def pump(self):
        "Everything that is on its way now."
        if self.session is None:
            self.session, self.connections = self.hub.connect("/v3/ws/public", {}), self.connections + 1
            self.say(self.core.opened(0.0))
        for frame in self.session.poll(self.x.now // 10**6): self.say(self.core.feed(frame, 0.0))
        if self.session.closed:
            self.session = None
            self.take([Resync("*", "disconnected")])

    def say(self, events):
        for e in events:
            if isinstance(e, Send): self.session.receive(e.text)
        self.take([e for e in events if not isinstance(e, Send)])


def session(seed, T=400, step="1h", interval="1h", gaps=0.0, rates=FAULTS, **buffer):
    "Ask for bars at random moments of a faulty session; every answer must be what REST says at that moment."
    bars, rng, plan = world(T, seed, step, gaps), np.random.default_rng(seed), FaultPlan(seed, rates, lag=5400.0)
    x = Exchange(bars)
    b = Buffer(NAMES, interval, **buffer)
    line, counts = Line(x, plan, b.take, interval), {}
    def page(s, rows):
        raw = kline_rows(x, x.markets["contract"][s], interval, rows + 2)
        return closed_bars([kline_from(r) for r in raw], interval, x.now // 10**6)[-rows:]
    end = int(bars.time[-1].astype("i8"))
    while x.now < end:
        advance_to(x, min(end, x.now + int(rng.choice([0.05, 0.3, 1, 1, 1, 3]) * int(bars.step))))
        if rng.random() < 0.9: line.pump()
        for s in NAMES:
            if rng.random() < 0.3: continue
            rows, now = int(rng.choice([1, 3, 3, 40])), x.now // 10**6
            found, why = b.ask(s, rows, now)
            if found is None:
                asked, epoch = b.plan(s, rows, now)
                if rng.random() < 0.2: line.pump()
                whole = page(s, asked)
                if rng.random() < 0.2: line.pump()
                b.merge(s, whole, epoch)
                found = whole[-rows:]
            truth = page(s, rows)  # where bars are missing REST gives fewer than it is asked for; the feed may know some more of the older ones
            assert len(found) <= rows and found[len(found) - len(truth):] == truth, (seed, s, why)
            counts[why or "stream"] = counts.get(why or "stream", 0) + 1
    return counts, plan.counts, b, line


@pytest.mark.parametrize("seed", range(6))
def test_the_feed_says_what_rest_says(seed):
    "Drops, losses, silences, duplicates, reordered frames and reconnections, bars the venue never published, questions at any moment."
    counts, faults, b, line = session(seed, gaps=0.03 * (seed % 2))
    assert set(faults) == set(FAULTS) and line.connections > 2, "every kind of fault was met"
    assert counts["stream"] > 40 and counts["gap"] > 0 and counts["late"] > 0
    assert b.differed == 0, "nothing was sealed that was not finished"


def test_bars_made_of_shorter_ones():
    counts, *_, b, _ = session(11, T=1500, step="5m")
    assert counts["stream"] > 50 and b.differed == 0


def test_a_healthy_stream_answers_nearly_always():
    "One page to begin with, and one every day to compare."
    counts, *_ = session(3, rates={})
    asked = sum(counts.values())
    assert counts["stream"] / asked > 0.7 and counts.get("gap", 0) == 0


def lenient(self, t, e): t.sealed[e.data.open_ms] = e.time_ms, e.data


def lazy(self, symbol, rows, now_ms):
    t = self.tracks[symbol]
    return (list(t.bars.values())[-rows:], "") if t.bridged and len(t.bars) >= rows else (None, "rows")


@pytest.mark.parametrize("name, bug", [("_seal", lenient), ("ask", lazy)])
def test_planted_bugs_are_seen(name, bug, monkeypatch):
    "A bar that is taken for finished when it was last pushed before its close; an answer without the newest bars."
    monkeypatch.setattr(Buffer, name, bug)
    with pytest.raises(AssertionError):
        for seed in range(3): session(seed, proof=0)


def test_proof_finds_a_stream_that_lies():
    "With stamps that cannot be trusted the comparison with REST never lets the stream speak for long."
    class Liar(Buffer):
        def _seal(self, t, e): super()._seal(t, dataclasses.replace(e, data=dataclasses.replace(e.data, high=e.data.high + 1)))
    lies, b = 0, Liar(NAMES, "1h")
    x = Exchange(world(60))
    line = Line(x, None, b.take)
    for _ in range(50):
        advance_to(x, x.now + HOUR * 10**6)
        line.pump()
        now = x.now // 10**6
        found, _ = b.ask("BTCUSDT", 3, now)
        asked, epoch = b.plan("BTCUSDT", 3, now)
        raw = kline_rows(x, x.markets["contract"]["BTCUSDT"], "1h", asked + 2)
        lies += found is not None
        b.merge("BTCUSDT", closed_bars([kline_from(r) for r in raw], "1h", now)[-asked:], epoch)
    assert lies == 0 and b.differed >= 48


def test_a_bar_the_venue_corrects_later_is_taken_over():
    "A push that corrects a bar REST has given already makes the symbol fall back; a silent correction is found by the audit."
    x, b = Exchange(world(60)), Buffer(NAMES, "1h", audit=5)
    line = Line(x, None, b.take)
    def hour():
        advance_to(x, x.now + HOUR * 10**6)
        line.pump()
    def ask(change=0):
        now = x.now // 10**6
        found, why = b.ask("BTCUSDT", 8, now)
        if found is not None: return found, why
        asked, epoch = b.plan("BTCUSDT", 8, now)
        raw = closed_bars([kline_from(r) for r in kline_rows(x, x.markets["contract"]["BTCUSDT"], "1h", asked + 2)], "1h", now)[-asked:]
        page = [dataclasses.replace(k, volume=k.volume + change) for k in raw]
        b.merge("BTCUSDT", page, epoch)
        return page[-8:], why
    for _ in range(12): hour()
    ask()
    hour()
    assert ask()[1] == ""
    t = b.tracks["BTCUSDT"]
    old = t.bars[t.edge]
    b.take([Update("kline_1h", "BTCUSDT", dataclasses.replace(old, volume=old.volume + 1), x.now // 10**6)])
    assert ask()[1] == "gap"
    whys = []
    for _ in range(7):
        hour()
        found, why = ask(change=7)
        whys.append(why)
    assert whys == ["", "", "", "", "", "audit", "proof"] and b.differed > 0, "the audit sees that REST says something else now"


# With the loop.

RULE = Rule(ObservationSpec(("return_24", "volatility_24")), "momentum", (("bars", 24), ("entry", 0.3)), short=True)
LIMITS = limits_from(stop_loss=0.02, take_profit=0.05)


class Ticking(Feed):
    "A feed whose line is pumped by whoever asks, so that a session is the same every time."
    def __init__(self, venue, faults):
        super().__init__(venue, NAMES, "1h")
        self.line = Line(venue.exchange, faults, self.buffer.take)
    def __enter__(self):
        self.venue.feed = self
        return self
    def candles(self, *args):
        self.line.pump()
        return super().candles(*args)


def traded(feeding, hours=60):
    "Decisions and fills of a loop on paper, with a feed in front of its bars."
    venue, events = paper_venue(world(300, 5)), []
    venue.env.clock.advance(200 * 3600 + 1800)
    setup = Setup("fed", NAMES, "1h", RULE.spec.names, LIMITS, Costs(taker=0.0008, maker=0.0008, slippage_bps=0.0), rows=150, poll_s=3599.0)
    loop = Loop(setup, RULE, venue, Journal(MemoryStore()), venue.env, Permit(LIMITS, "paper", FOREVER), observers=[events.append])
    with feeding(venue) as feed: loop.run(venue.now_ms() + hours * HOUR)
    assert [e for e in events if e["kind"] == "error"] == []
    return [e for e in events if e["kind"] in ("decision", "fill", "order")], feed


@contextmanager
def nothing(venue): yield None


def test_the_loop_decides_alike_with_any_stream():
    "No feed, a healthy one, a broken one: the same decisions, orders and fills, to the last digit."
    plain, _ = traded(nothing)
    well, feed = traded(lambda v: Ticking(v, None))
    assert well == plain and feed.counts["stream"] > 100 and feed.counts["rest"] < 15
    ill, feed = traded(lambda v: Ticking(v, FaultPlan(4, FAULTS, lag=5400.0)))
    assert ill == plain and feed.counts["stream"] > 20 and feed.counts["rest"] > 20
    assert len([e for e in plain if e["kind"] == "fill"]) > 10


def test_a_dead_stream_changes_nothing():
    "Nobody answers at the stream's address: the loop trades on by REST, and the thread ends with the session."
    def dead(url, headers): raise ConnectionRefusedError("nobody there")
    plain, _ = traded(nothing)
    by_rest, feed = traded(lambda v: Feed(v, NAMES, "1h", connect=dead))
    assert by_rest == plain and feed.counts["stream"] == 0 and feed.counts["rest"] == 120
    assert feed.stream.thread is None and [t for t in threading.enumerate() if t.name.startswith("weex /v3/ws")] == []


def test_a_thread_that_dies_changes_nothing(monkeypatch):
    "Whatever goes wrong inside the thread stays there."
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_type))
    died = []
    def broken(url, headers): raise RuntimeError("a bug")
    plain, _ = traded(nothing)
    assert traded(lambda v: Feed(v, NAMES, "1h", connect=broken))[0] == plain and died == [RuntimeError]


def test_two_threads_share_a_buffer():
    "One pushes and breaks, one asks and merges: no deadlock, no exception, and what is answered is whole."
    x, b, failed = Exchange(world(120)), Buffer(NAMES, "1h", audit=10**9), []
    frames = []
    line = Line(x, None, frames.append)
    for _ in range(110):
        advance_to(x, x.now + HOUR * 10**6)
        line.pump()
    truth = [kline_from(r) for r in kline_rows(x, x.markets["contract"]["BTCUSDT"], "1h", 100)][:-1]
    done = threading.Event()
    def push():
        try:
            while not done.is_set():
                for f in frames: b.take(f)
                b.take([Resync("*", "again")])
        except Exception as e: failed.append(e)  # noqa: BLE001
    t = threading.Thread(target=push, daemon=True)
    t.start()
    end, answered, i = time.monotonic() + 0.7, 0, 40
    while time.monotonic() < end:
        i = 40 + (i - 39) % 50
        now = truth[i].open_ms + HOUR
        found, _ = b.ask("BTCUSDT", 5, now)
        answered += found is not None
        assert found is None or found == truth[i - 4:i + 1]
        asked, epoch = b.plan("BTCUSDT", 5, now)
        b.merge("BTCUSDT", truth[max(0, i + 1 - asked):i + 1], epoch)
    done.set()
    t.join(5)
    assert not t.is_alive() and failed == [] and answered > 0


def test_over_real_sockets_with_a_line_that_is_cut():
    "Thread, sockets, a served exchange: by stream, by REST while the line is down, by stream again; the same bars at every close."
    x, plan = Exchange(world(60)), FaultPlan(0)
    add_user(x, str(PAPER.key), "paper-secret", str(PAPER.passphrase))
    with Server(x, speed=0, faults=plan) as server:
        env = Env(server.clock, np.random.Generator(np.random.PCG64(0)))
        venue = WeexVenue(WeexAPIClient("contract", PAPER, env, base_url=server.url, budgets={}), "paper")
        with Feed(venue, NAMES, "1h", base_url=server.ws + "/contract") as feed:
            def hour(until):
                server.advance(3600.0)
                end = time.monotonic() + until
                edge = venue.now_ms() // HOUR * HOUR - HOUR
                while time.monotonic() < end and not all(edge in t.sealed for t in feed.buffer.tracks.values()): time.sleep(0.01)
                before = feed.counts["stream"]
                for s in NAMES: assert venue.candles(s, "1h", 3) == venue.page(s, "1h", 3)
                return feed.counts["stream"] - before
            end = time.monotonic() + 5
            while not feed.stream.connections and time.monotonic() < end: time.sleep(0.01)
            time.sleep(0.2)
            assert [hour(3) for _ in range(6)][-3:] == [2, 2, 2]
            plan.force("stream_drop")
            assert hour(0.3) < 2
            end = time.monotonic() + 8
            while feed.stream.connections < 2 and time.monotonic() < end: time.sleep(0.02)
            time.sleep(0.3)
            assert [hour(3) for _ in range(3)][-1] == 2 and feed.stream.connections == 2
    assert feed.told()["differed"] == 0 and feed.told()["rest_gap"] >= 2
    assert [t for t in threading.enumerate() if t.name.startswith("weex /v3/ws")] == []


def test_the_clock_of_the_feed_is_injected():
    "Nothing in the feed reads the machine's time: the venue's clock decides what is closed."
    venue = paper_venue(world(60))
    venue.env.clock.advance(40 * 3600 + 5)
    feed = Ticking(venue, None)
    assert feed.stream.client.env.clock is venue.env.clock and not isinstance(venue.env.clock, SystemClock)
    with feed:
        first = venue.candles("BTCUSDT", "1h", 3)
        assert close(first) == venue.now_ms() // HOUR * HOUR
        venue.env.clock.advance(3600)
        assert close(venue.candles("BTCUSDT", "1h", 3)) == close(first) + HOUR


def close(bars): return bars[-1].open_ms + HOUR
