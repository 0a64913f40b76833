"""trading.public: paper money at public prices does what it does on the same stored bars, sees no price before its time, and survives."""
import dataclasses
import json
import subprocess
import sys
import time
from decimal import Decimal as D
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stratfam.commands.trade  # noqa: F401  the command registers itself
from stratfam.commands.base import run
from stratfam.core import Env, ObservationSpec, StratfamError, VirtualClock
from stratfam.data.store import load_bars
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.policies.base import Rule, save
from stratfam.risk.limits import limits_from
from stratfam.trading import public as room
from stratfam.trading.feed import Feed
from stratfam.trading.journal import Journal, MemoryStore, open_journal, read_journal
from stratfam.trading.loop import Loop, Setup
from stratfam.trading.permit import FOREVER, Permit
from stratfam.trading.public import Seen, pieces, public_paper
from stratfam.trading.simulate import Moody
from stratfam.trading.venues import paper_venue
from stratfam.weex.client import OrderRequest, WeexAPIClient
from stratfam.weex.exchange import Exchange, advance_to, check
from stratfam.weex.gateway import FaultPlan, InProcessTransport
from stratfam.weex.server import ReplayClock, Server

NAMES, HOUR, START = ("BTCUSDT", "ETHUSDT"), 3_600_000, 200
RULE = Rule(ObservationSpec(("return_24", "volatility_24")), "momentum", (("bars", 24), ("entry", 0.3)), short=True)
LIMITS = limits_from(stop_loss=0.02, take_profit=0.04, trailing=0.03)


def world(T=300, seed=5, step="1h", funding=0.0003):
    return dataclasses.replace(make_world("regime_vol", T, 2, step, market="perp", seed=seed, vol=1.5, funding=funding).bars, symbols=NAMES)


def looping(venue, env, journal=None, events=None, **more):
    costs = Costs(taker=0.0008, maker=0.0008, slippage_bps=1.0)
    setup = Setup("public", NAMES, "1h", RULE.spec.names, LIMITS, costs, rows=150, **{"poll_s": 3599.0, **more})
    return Loop(setup, RULE, venue, journal or Journal(MemoryStore()), env, Permit(LIMITS, "paper", FOREVER),
                observers=[events.append] if events is not None else ())


def seen_by(events):
    "What must be equal: decisions, orders and fills, without the venue's own numbers."
    drop = ("order_id", "venue")
    return [{k: v for k, v in e.items() if k not in drop and not (k == "id" and e["kind"] == "fill")}
            for e in events if e["kind"] in ("decision", "order", "fill")]


def on_stored_bars(bars, hours, **more):
    venue, events = paper_venue(bars), []
    venue.env.clock.advance(START * 3600 + 1800)
    looping(venue, venue.env, events=events, **more).run(venue.now_ms() + hours * HOUR)
    return events, venue


def on_public_bars(bars, hours, path=None, feeding=False, **more):
    events = []
    with Server(Exchange(bars), speed=0) as server:
        server.clock.advance(START * 3600 + 1800)
        env = Env(server.clock, np.random.Generator(np.random.PCG64(0)))
        venue = public_paper(WeexAPIClient(env=env, base_url=server.url, budgets={}), NAMES, "1h", path=path)
        feed = Feed(venue, NAMES, "1h", base_url=server.ws + "/contract").start() if feeding else None
        try: looping(venue, env, events=events, **more).run(venue.now_ms() + hours * HOUR)
        finally: feed and feed.close()
    return events, venue


def test_the_same_session_as_on_stored_bars(tmp_path):
    """Orders, fills, fees, funding, equity: equal to the last digit, over HTTP, from public data without a key."""
    bars = world()
    mine, venue = on_public_bars(bars, 48, tmp_path / "account")
    theirs, other = on_stored_bars(bars, 48)
    assert [e for e in mine + theirs if e["kind"] == "error"] == []
    assert seen_by(mine) == seen_by(theirs)
    fills = [e for e in mine if e["kind"] == "fill"]
    assert len(fills) > 10 and {f["purpose"] for f in fills} >= {"ENTRY", "EXIT", "STOP"}
    account = lambda v: v.exchange.users["paper-key"]["accounts"]["contract"]
    assert account(venue).wallet == account(other).wallet
    paid = lambda v: [(b[2], b[3]) for b in account(v).bills if b[4] == "position_funding"]
    assert paid(venue) == paid(other) and len(paid(venue)) > 5
    check(venue.exchange)


@pytest.mark.proof
def test_twenty_days_of_real_bars(market_data):
    "The same on what BTC and ETH have done, with funding every eight hours."
    bars = load_bars(market_data / "spot1h_2021_2023", NAMES, "1h")[5000:5000 + START + 24 * 20 + 3]
    due = (bars.time.astype("i8") // (HOUR * 10**6) % 8 == 7)[:, None]
    bars = dataclasses.replace(bars, market="perp", funding=np.where(due, 1e-4, 0.0) * np.ones_like(bars.close))
    clock = VirtualClock(int(bars.time[START].astype("i8")) + 1800 * 10**9)
    env = Env(clock, np.random.Generator(np.random.PCG64(0)))
    data = WeexAPIClient(env=Env(clock, env.rng, InProcessTransport(Exchange(bars), clock)), budgets={})
    venue, mine = public_paper(data, NAMES, "1h"), []
    looping(venue, env, events=mine).run(venue.now_ms() + 480 * HOUR)
    theirs, other = on_stored_bars(bars, 480)
    assert seen_by(mine) == seen_by(theirs) and len([e for e in mine if e["kind"] == "fill"]) > 100
    wallet = lambda v: v.exchange.users["paper-key"]["accounts"]["contract"].wallet
    assert wallet(venue) == wallet(other)


def test_bars_by_stream_change_nothing():
    bars = world()
    plain, _ = on_public_bars(bars, 12)
    assert seen_by(on_public_bars(bars, 12, feeding=True)[0]) == seen_by(plain) != []


# Public prices that move inside the bar: the venue plays five-minute bars and shows hours that grow.

class Room:
    "A paper account on public hours that grow by five minutes at a time, on a virtual clock."
    def __init__(self, seed=1, T=600, path=None, faults=None, funding=0.0, **more):
        self.bars = world(T, seed, "5m", funding)
        self.public, self.faults = Exchange(self.bars), faults
        self.clock = VirtualClock(int(self.bars.time[60].astype("i8")) + 10**9)
        self.path, self.more, self.n = path, more, 0
        self.open()

    def open(self):
        "As a new process finds it."
        env = Env(self.clock, np.random.Generator(np.random.PCG64(0)), InProcessTransport(self.public, self.clock, self.faults))
        self.data = WeexAPIClient(env=env, budgets={}, attempts=1)
        self.venue = public_paper(self.data, NAMES, "1h", path=self.path, **self.more)
        self.venue.sync()

    def order(self, side="BUY", position="LONG", symbol="BTCUSDT", quantity="1"):
        self.n += 1
        return self.venue.place(OrderRequest(symbol, side, D(quantity), f"o{self.n}", position), False)

    def protect(self, level, position="LONG", symbol="BTCUSDT", kind="STOP_MARKET"):
        self.n += 1
        side = "SELL" if position == "LONG" else "BUY"
        return self.venue.protect(OrderRequest(symbol, side, D(1), f"p{self.n}", position, kind, trigger=D(str(level))))

    def wait(self, minutes, every=5):
        "Time passes, and somebody looks at the account now and then."
        for _ in range(int(minutes / every)):
            self.clock.advance(every * 60)
            self.venue.snapshot()

    def public_range(self, since_ms, until_ms, symbol=0):
        "The lowest and highest price that became public between two moments: finished five-minute bars, and the open of the present one."
        t = self.bars.time.astype("i8") // 10**6
        at, last = (t + 300_000 > since_ms) & (t + 300_000 <= until_ms), np.searchsorted(t, until_ms, "right") - 1
        pick = lambda v: np.append(v[at, symbol], self.bars.open[last, symbol])
        return pick(self.bars.low).min(), pick(self.bars.high).max()


def test_an_order_meets_the_price_that_is_public_when_it_comes():
    "Nobody has looked for an hour; the order is filled at the best ask of now, not at one of then."
    r = Room()
    asks = []
    for _ in range(8):
        r.clock.advance(3300)
        asks.append(r.data.best("BTCUSDT").ask)
        assert r.order().kind == "ACK"
    assert [f.price for f in r.venue.fills(0)] == asks and len(set(asks)) == 8
    assert r.order(quantity="0.5").kind == "ACK" and r.venue.close_all("BTCUSDT").kind == "ACK"
    assert r.venue.fills(0)[-1].price == r.data.best("BTCUSDT").bid and r.venue.snapshot().positions == ()
    check(r.venue.exchange)


def test_a_quote_finer_than_the_grid_is_never_better_on_it(monkeypatch):
    r = Room()
    fine = dataclasses.replace(r.data.best("BTCUSDT"), bid=D("100.15123"), ask=D("100.15127"))
    monkeypatch.setattr(r.data, "best", lambda symbol: fine)
    assert r.order().kind == "ACK" and r.order("SELL").kind == "ACK"
    tick = D(1).scaleb(-r.venue.exchange.markets["contract"]["BTCUSDT"].price_digits)
    buy, sell = (f.price for f in r.venue.fills(0))
    assert sell <= fine.bid < fine.ask <= buy and buy - sell <= 2 * tick


@pytest.mark.parametrize("forming", [True, False])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.proof) for n in range(1, 6))])
def test_a_stop_is_met_by_prices_after_it_only(seed, forming):
    """Stops and targets at random moments and levels, many of them inside the range that the hour had had before they came.

    None fires without a public price beyond its level after it came; one whose level is a new extreme of its bar fires at the next look.
    The same at a venue that shows a bar only when it is over, where less can be known."""
    r, rng, fired, quiet = Room(seed, T=1500), np.random.default_rng(seed), 0, 0
    page = r.data.kline_page
    if not forming: r.data.kline_page = lambda *a, **k: [b for b in page(*a, **{**k, "limit": k["limit"] + 1}) if b.open_ms + HOUR <= r.data.now_ms()]
    for _ in range(40):
        r.wait(int(rng.integers(1, 11)) * 5)
        assert r.order().kind == "ACK"
        last, placed = float(r.data.best("BTCUSDT").bid), r.venue.now_ms()
        bar = page("BTCUSDT", "1h", limit=1)[0]
        kind = ["STOP_MARKET", "TAKE_PROFIT_MARKET"][int(rng.integers(2))]
        down = kind == "STOP_MARKET"
        level = last * (1 + float(rng.uniform(0.0005, 0.006)) * (-1 if down else 1))
        assert r.protect(round(level, 3), kind=kind).kind == "ACK"
        fresh = level < bar.low if down else level > bar.high
        r.wait(int(rng.integers(1, 7)) * 5)
        low, high = r.public_range(placed, r.venue.now_ms())
        gone = not r.venue.snapshot().positions
        fired, quiet = fired + gone, quiet + (not gone)
        if gone: assert low <= level if down else high > level
        elif fresh and forming: assert low > level - 0.001 if down else high <= level + 0.001
        if gone: assert abs(float(r.venue.fills(0)[-1].price) / level - 1) < 0.03
        elif r.venue.snapshot().positions: assert r.order("SELL").kind == "ACK"
        assert r.venue.snapshot().orders == ()
    assert fired > (5 if forming else 0) and quiet > 5
    check(r.venue.exchange)


def test_the_whole_bar_would_have_been_wrong(monkeypatch):
    "The planted bug: the bar's whole range is held against an order that came in its middle."
    def whole(seen, rows, interval, now_ms, newest_ms):
        from stratfam.trading.public import Piece
        return [Piece(*row[:1], now_ms, *row[1:]) for row in rows if row[0] >= seen.open_ms], Seen(rows[-1][0], *rows[-1][2:], rows[-1][4])
    monkeypatch.setattr(room, "pieces", whole)
    with pytest.raises(AssertionError):
        for seed in range(3): test_a_stop_is_met_by_prices_after_it_only(seed, True)


def test_a_bar_shown_late_would_have_been_wrong(monkeypatch):
    "The planted bug: a bar that was not there yet when the order came counts with its whole range."
    monkeypatch.setattr(room, "_newest", lambda x, m: 0)
    with pytest.raises(AssertionError):
        for seed in range(3): test_a_stop_is_met_by_prices_after_it_only(seed, False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=6), st.data())
def test_pieces_of_a_bar_are_the_bar(prices, data):
    "Looks at any moments: pieces join, hold every extreme that is new since the look before, and nothing from before it."
    ticks = [(i * HOUR, p) for i, bar in enumerate(prices) for p in bar]
    first = data.draw(st.integers(0, len(ticks) - 1))
    looks = sorted(data.draw(st.sets(st.integers(first, len(ticks) - 1), max_size=6)) - {first} | {len(ticks) - 1} - {first})
    def rows(k):
        "Public bars after tick `k`."
        bars = {}
        for at, p in ticks[:k + 1]: bars.setdefault(at, []).append(p)
        return [(at, v[0], max(v), min(v), v[-1]) for at, v in bars.items()]
    at, _, h, l, c = rows(first)[-1]
    seen, before = Seen(at, h, l, c, c), first
    for k in looks:
        was = seen
        found, seen = pieces(seen, rows(k), "1h", ticks[k][0] + 1)
        new = [p for _, p in ticks[before + 1:k + 1]]
        if found:
            assert min(p.low for p in found) >= min(new + [was.last]) and max(p.high for p in found) <= max(new + [was.last])
            assert found[-1].close == ticks[k][1]
        for p in found: assert p.low <= min(p.open, p.close) and p.high >= max(p.open, p.close)
        for bar in {a for a, _ in ticks[before + 1:k + 1]} - {was.open_ms}:
            mine, theirs = next(p for p in found if p.bar_ms == bar), next(r for r in rows(k) if r[0] == bar)
            assert (mine.open, mine.high, mine.low, mine.close) == theirs[1:]
        before = k


def test_what_remains_different_from_stored_bars():
    "A stop inside the hour: stored hours know it at their end, public ones when it happens; the level is the same."
    r = Room(2)
    hours = dataclasses.replace(r.bars, market="perp")
    assert r.order().kind == "ACK"
    level = round(float(r.data.best("BTCUSDT").bid) * 0.995, 3)
    assert r.protect(level).kind == "ACK"
    while r.venue.snapshot().positions: r.wait(5)
    fill = r.venue.fills(0)[-1]
    assert fill.time_ms % HOUR != 0 and fill.time_ms <= r.venue.now_ms()
    low, _ = r.public_range(fill.time_ms - 300_001, fill.time_ms)
    assert low <= level and float(fill.price) <= level and float(fill.price) >= min(level, low) * 0.9998
    assert len(hours) == len(r.bars)


# Funding.

def test_funding_is_charged_on_what_was_held_then_even_when_it_is_told_late(monkeypatch):
    r = Room(3, funding=0.0003)
    told, held_back = r.data.funding_page, [True]
    monkeypatch.setattr(r.data, "funding_page", lambda *a, **k: [] if held_back[0] else told(*a, **k))
    while r.venue.now_ms() % (8 * HOUR) < 7.6 * HOUR: r.clock.advance(600)
    assert r.order(quantity="2").kind == "ACK"
    while r.venue.now_ms() % (8 * HOUR) > HOUR / 10: r.wait(5)
    assert r.order("SELL", quantity="2").kind == "ACK"
    since = r.venue.now_ms() - 6 * HOUR
    assert [b for b in r.venue.funding(since) if b.kind == "position_funding"] == []
    assert r.order(quantity="0.5").kind == "ACK"
    r.wait(15)
    held_back[0] = False
    r.wait(20)
    rates = {f.time_ms: f.rate for f in told("BTCUSDT", since, r.venue.now_ms())}
    bills = [b for b in r.venue.funding(since) if b.kind == "position_funding"]
    due = [t for t in rates if t % (8 * HOUR) == 0]
    assert len(due) == 1 and len(bills) == len([t for t in rates if t > r.venue.fills(0)[0].time_ms])
    price = r.bars.close[np.searchsorted(r.bars.time.astype("i8") // 10**6, due[0]) - 1, 0]
    assert abs(float(bills[0].amount) + 2 * price * float(rates[due[0]])) < 0.02
    check(r.venue.exchange)


def test_a_rate_nobody_publishes_is_not_zero(monkeypatch):
    "After an hour of grace the stated default is charged, once every eight hours, to whichever side is held."
    r = Room(4)
    monkeypatch.setattr(r.data, "funding_page", lambda *a, **k: [])
    assert r.order("SELL", "SHORT").kind == "ACK"
    r.wait(26 * 60, every=30)
    bills = [b for b in r.venue.funding(r.venue.now_ms() - 30 * HOUR) if b.kind == "position_funding"]
    assert len(bills) == 3 and all(b.amount < 0 for b in bills)
    assert abs(float(bills[0].amount) / float(r.data.best("BTCUSDT").bid) + 1e-4) < 1e-5
    check(r.venue.exchange)


# Restarts, disks, networks.

def test_a_restart_finds_the_account(tmp_path):
    "Positions, orders, leverage and money; what happened while nobody was there happens at the next look, from where we left."
    r = Room(6, path=tmp_path / "account")
    r.venue.leverage("BTCUSDT", 3)
    assert r.order().kind == "ACK"
    assert r.protect(round(float(r.data.best("BTCUSDT").bid) * 0.99, 3)).kind == "ACK"
    before = r.venue.snapshot()
    r.open()
    assert dataclasses.replace(r.venue.snapshot(), time_ms=0) == dataclasses.replace(before, time_ms=0)
    while not (low := r.bars.low[:np.searchsorted(r.bars.time.astype("i8"), r.clock.now_ns()), 0][60:].min()) < float(before.orders[0].trigger):
        r.clock.advance(3600)
    r.clock.advance(7200)
    r.open()
    assert r.venue.snapshot().positions == () and low < float(before.orders[0].trigger)
    assert r.venue.fills(0)[-1].time_ms < r.venue.now_ms() - HOUR, "stamped when it happened"
    check(r.venue.exchange)


def test_what_is_not_on_disk_did_not_happen(tmp_path, monkeypatch):
    r = Room(7, path=tmp_path / "account")
    assert r.order().kind == "ACK"
    def full(path, raw): raise room.StratfamError("no space left on device")
    with monkeypatch.context() as m:
        m.setattr(room, "write_atomic", full)
        got = r.order()
        assert (got.kind, type(got.error).__name__) == ("REFUSED", "NotSent")
        assert [p.quantity for p in r.venue.snapshot().positions] == [D(1)]
    assert r.order().kind == "ACK" and [p.quantity for p in r.venue.snapshot().positions] == [D(2)]
    r.open()
    assert [p.quantity for p in r.venue.snapshot().positions] == [D(2)]


class Crash(BaseException):
    "The process ends here."


@pytest.mark.parametrize("at", [4, 9, *(pytest.param(n, marks=pytest.mark.proof) for n in (2, 3, 5, 6, 7, 8, 11, 13))])
@pytest.mark.parametrize("before", [True, False])
def test_killed_around_a_write(at, before, tmp_path, monkeypatch):
    "The process dies before or after the `at`-th write of the account's file; the next one finds journal and account agreeing, or makes them."
    public = Exchange(world())
    clock = VirtualClock(int(public.feeds[0].time[START]) + 1800 * 10**9)
    env = Env(clock, np.random.Generator(np.random.PCG64(0)))
    client = lambda: WeexAPIClient(env=Env(clock, env.rng, InProcessTransport(public, clock)), budgets={})
    writes, real = [0], room.write_atomic
    def deadly(path, raw):
        writes[0] += 1
        if writes[0] == at and before: raise Crash
        real(path, raw)
        if writes[0] == at: raise Crash
    monkeypatch.setattr(room, "write_atomic", deadly)
    end, crashes, events = clock.now_ns() // 10**6 + 16 * HOUR, 0, []
    while True:
        v = public_paper(client(), NAMES, "1h", path=tmp_path / "account")
        journal = open_journal(tmp_path / "journal.db", v.account)
        loop = looping(v, env, journal, events)
        try: loop.run(end)
        except Crash:
            crashes += 1
            continue
        finally: journal.close()
        break
    assert crashes == 1
    check(v.exchange)
    lots = lambda: {p.symbol: p.quantity * (1 if p.side == "LONG" else -1) for p in v.snapshot().positions}
    assert lots() == {s: D(int(n)) * loop.mirror.grids[s].step for s, n in zip(NAMES, loop.mirror.lots) if n}
    ours = [o.client_id for o in v.orders(0) if o.type == "MARKET"]
    assert len(ours) == len(set(ours)) > 3, "nothing doubled"
    assert [e for e in events if e.get("purpose") == "EXTERNAL"] == [] and loop.desk.clean
    assert not loop.desk.open.keys() - {o.client_id for o in v.orders(0)}, "nothing lost"
    wallet = v.exchange.users["paper-key"]["accounts"]["contract"].wallet / 1e12
    held = sum(int(n) * float(loop.mirror.grids[x].step) * float(e) for x, n, e in zip(NAMES, loop.mirror.lots, loop.mirror.pos["entry"]) if n)
    assert abs(float(loop.mirror.account["cash"]) + held - wallet) < 1e-6, "our books say what the account says"


def test_a_session_in_bad_weather_ends_well(tmp_path):
    "Every fault of the network between us and the public venue: no crash, no wrong position, and it converges when the weather clears."
    kinds = ("refused", "timeout_before", "timeout_after", "reset_after", "error_before", "html", "truncated", "wrong_type", "empty", "rate_limit",
             "swapped_reply")
    plan = FaultPlan(3, dict.fromkeys(kinds, 0.02))
    public = Exchange(world())
    clock = VirtualClock(int(public.feeds[0].time[START]) + 1800 * 10**9)
    env = Env(clock, np.random.Generator(np.random.PCG64(0)))
    data = WeexAPIClient(env=Env(clock, env.rng, InProcessTransport(public, clock, plan)), budgets={})
    events, plan.on = [], False
    venue = public_paper(data, NAMES, "1h", path=tmp_path / "account")
    loop = looping(venue, env, events=events, poll_s=600.0)
    start = clock.now_ns() // 10**6
    loop.start()
    plan.on = True
    while venue.now_ms() < start + 30 * HOUR: clock.sleep(loop.guarded())
    plan.calm()
    while venue.now_ms() < start + 33 * HOUR: clock.sleep(loop.guarded())
    assert sum(plan.counts.values()) > 50 and len([e for e in events if e["kind"] == "fill"]) > 4
    assert loop.desk.clean and not loop.desk.drift and loop.desk.blocked == {}
    assert [e for e in events if e.get("purpose") == "EXTERNAL"] == []
    check(venue.exchange)


def old_quote(self, symbol, patience_ms=0):
    m = self.x.markets["contract"][symbol]
    last = self.__dict__.setdefault("first", {}).setdefault(symbol, m.last)
    m.bids, m.asks = [[last - 1, room.DEEP]], [[last + 1, room.DEEP]]


def forgetful(self):
    if self.saved is None or self.path is None or not self.path.exists(): kept(self)
    self.saved = room.frozen_account(self.x, self.more())


kept = room.PublicExchange.save


@pytest.mark.parametrize("where, name, bug, proof", [
    (room.PublicExchange, "quote", old_quote, lambda tmp, mp: test_an_order_meets_the_price_that_is_public_when_it_comes()),
    (room.PublicExchange, "save", forgetful, lambda tmp, mp: test_a_restart_finds_the_account(tmp)),
    (room, "held_at", lambda a, m, pos, t: a.positions[m.symbol, pos]["lots"] if (m.symbol, pos) in a.positions else 0,
     lambda tmp, mp: test_funding_is_charged_on_what_was_held_then_even_when_it_is_told_late(mp)),
    (room, "LATE_MS", 10**12, lambda tmp, mp: test_a_rate_nobody_publishes_is_not_zero(mp)),
], ids=["old price", "not written", "funding on today's position", "unknown funding is free"])
def test_planted_bugs_are_seen(where, name, bug, proof, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, IndexError)): proof(tmp_path, monkeypatch)


# The command, and real processes.

def test_the_command(tmp_path, monkeypatch, capsys):
    "`trade --live-bars`: the account beside the journal, both needed to go on; the feed says how the bars came."
    monkeypatch.setattr("stratfam.trading.loop.install_signals", lambda loop: None)
    save(RULE, tmp_path / "policy")
    folder = tmp_path / "run"
    x = Exchange(world())
    advance_to(x, int(x.feeds[0].time[START]) + 1800 * 10**9)
    with Server(x, speed=1.0) as server:
        server.clock.advance(0)
        go = ["trade", str(tmp_path / "policy"), "--live-bars", "--public-url", server.url, "--symbols", ",".join(NAMES), "--step", "1h",
              "--run", str(folder), "--bars", "0", "--set", "notify.log=off", "--json"]
        assert run(go) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["state"] == "ACTIVE" and "bars: stream 0, rest 0" in said.err
        assert (folder / "account").read_bytes().startswith(b"stratfam paper account 1 ")
        assert run(go) == 0, "again, on the same account"
        capsys.readouterr()
        (folder / "account").unlink()
        assert run(go) == 1 and "has a journal but no account file" in capsys.readouterr().err
        assert run([*go[:4], "http://127.0.0.1:9", *go[5:9], "--run", str(tmp_path / "other")]) == 1
        assert "stratfam: " in capsys.readouterr().err


def child(url, folder, until_ms):
    "A process that trades minute bars at ten times the speed until it is killed, or the time has come."
    rng, clock = np.random.Generator(np.random.PCG64(0)), ReplayClock(time.time_ns(), SPEED)
    data = WeexAPIClient(env=Env(clock, rng), base_url=url, budgets={})
    venue = public_paper(data, NAMES, "1m", path=Path(folder) / "account", every_s=1.0)
    journal = open_journal(Path(folder) / "journal.db", venue.account)
    limits = limits_from(stop_loss=0.01, take_profit=0.01)
    setup = Setup("killed", NAMES, "1m", ("return_1",), limits, Costs(taker=0.0008, slippage_bps=1.0), rows=48, window=24, ttl_s=50.0, poll_s=10.0)
    with Feed(venue, NAMES, "1m", base_url=url.replace("http", "ws") + "/contract"):
        loop = Loop(setup, Moody(3, False, 0.5), venue, journal, Env(clock, rng), Permit(limits, "paper", FOREVER))
        loop.run(int(until_ms))
        while loop.desk.open.keys() - {o.client_id for o in venue.snapshot().orders} or not loop.desk.clean: clock.sleep(loop.guarded())
    lots = {p.symbol: str(p.quantity if p.side == "LONG" else -p.quantity) for p in venue.snapshot().positions}
    mine = {s: str(D(int(n)) * loop.mirror.grids[s].step) for s, n in zip(NAMES, loop.mirror.lots) if n}
    check(venue.exchange)
    ids = [o.client_id for o in venue.orders(0) if o.type == "MARKET"]
    print(json.dumps({"lots": {k: str(D(v).normalize()) for k, v in lots.items()}, "mine": {k: str(D(v).normalize()) for k, v in mine.items()},
                      "orders": len(ids), "doubled": len(ids) - len(set(ids))}))


SPEED = 10.0


@pytest.mark.proof
def test_a_real_process_is_killed(tmp_path):
    "kill -9 while it trades, twice; the last process ends by itself, and journal and account agree."
    x = Exchange(world(T=400, step="1m", seed=9))
    advance_to(x, int(x.feeds[0].time[100]))
    rng, end, kills = np.random.default_rng(1), x.now // 10**6 + 12 * 60_000, 0
    with Server(x, speed=SPEED) as server:
        server.clock.advance(0)
        while True:
            process = subprocess.Popen([sys.executable, __file__, server.url, str(tmp_path), str(end)], stdout=subprocess.PIPE, text=True)
            if kills == 2: break
            wanted, deadline = (kills + 1) * 2, time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and decisions(tmp_path) < wanted: time.sleep(0.05)
            time.sleep(float(rng.uniform(0, 1.0)))
            process.kill()
            process.wait(10)
            kills += 1
            end = max(end, server.call(lambda: x.now) // 10**6 + 4 * 60_000)
        out, _ = process.communicate(timeout=300)
    found = json.loads(out.splitlines()[-1])
    assert process.returncode == 0 and found["lots"] == found["mine"] and found["doubled"] == 0 and found["orders"] > 4
    entries = read_journal(tmp_path / "journal.db")[1]
    assert [e for e in entries if e.kind == "fill" and e.body["purpose"] == "EXTERNAL"] == []
    assert len([e for e in entries if e.kind == "start"]) == 3


def decisions(folder):
    try: return read_journal(folder / "journal.db")[0].counts["decision"]
    except StratfamError: return 0


if __name__ == "__main__": child(*sys.argv[1:])
