"""How long the loop takes from a closed bar to the last order sent, and how fast a year is played."""
import dataclasses
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from stratfam.core import Env, ObservationSpec
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.policies.base import Rule
from stratfam.risk.limits import limits_from
from stratfam.trading.journal import Journal, MemoryStore, open_journal
from stratfam.trading.loop import Loop, Setup
from stratfam.trading.permit import FOREVER, Permit
from stratfam.trading.venues import PAPER, WeexVenue, paper_venue
from stratfam.weex.client import WeexAPIClient
from stratfam.weex.exchange import Exchange, add_user
from stratfam.weex.server import Server

FEATURES, START, HOUR = ("return_24", "volatility_24"), 600, 3_600_000
LIMITS = limits_from(stop_loss=0.02, take_profit=0.05, daily_loss=0.5, max_drawdown=0.9)
COINS = ("BTC", "ETH", "SOL", "XRP", "ADA", "BNB", "LTC", "DOGE",
         "DOT", "LINK", "AVAX", "ATOM", "UNI", "TRX", "XLM", "NEAR", "APT", "OP", "ARB", "FIL")


def market(symbols, hours, seed=1):
    world = make_world("regime_vol", START + hours + 5, symbols, market="perp", seed=seed, vol=1.0).bars
    return dataclasses.replace(world, symbols=tuple(f"{c}USDT" for c in COINS[:symbols]))


def momentum(): return Rule(ObservationSpec(FEATURES), "momentum", (("bars", 24), ("entry", 0.0)), short=True)


def network(bars):
    "A PPO policy of the usual size, fitted for a moment: what it wishes does not matter here, how long it takes does."
    from stratfam.data.features import build
    from stratfam.policies.base import Task
    from stratfam.policies.sb3 import SB3Fit
    return SB3Fit("PPO", steps=2048).fit(Task(bars, build(bars, FEATURES), LIMITS), [(200, START)], 0)


def stopwatch(loop):
    "Seconds spent in the venue, by wrapping each of its calls; and the moments of closes and sends."
    spent = {"venue": 0.0, "last send": 0.0}
    def timed(name, call, *a, **k):
        start = time.perf_counter()
        try: return call(*a, **k)
        finally:
            spent["venue"] += time.perf_counter() - start
            if name == "place": spent["last send"] = time.perf_counter()
    for name in ("sync", "candles", "quote", "snapshot", "fills", "orders", "funding", "leverage", "place", "protect", "cancel", "close_all"):
        setattr(loop.venue, name, partial(timed, name, getattr(loop.venue, name)))
    return spent


def measured(loop, spent):
    "From the moment the bar may be asked for to the last order sent (s), and the loop's own part of that turn (s); only turns that sent orders."
    sends, own, turn = [], [], loop._turn
    def watched():
        start, spent["venue"], spent["last send"] = time.perf_counter(), 0.0, 0.0
        done = turn()
        if spent["last send"]:
            sends.append(spent["last send"] - start)
            own.append(time.perf_counter() - start - spent["venue"])
        return done
    loop._turn = watched
    return sends, own


def loopback(hours=60, symbols=20):
    "Paper over a real socket, PPO, the journal in a file that is synced: no rate limiter, an hour passes when the loop sleeps."
    bars = market(symbols, hours)
    x = Exchange(bars)
    add_user(x, str(PAPER.key), "paper-secret", str(PAPER.passphrase), usdt=100_000)
    with Server(x, speed=0) as server, TemporaryDirectory() as tmp:
        server.clock.advance(START * 3600 + 1800)
        env = Env(server.clock)
        venue = WeexVenue(WeexAPIClient("contract", PAPER, env, base_url=server.url, budgets={}), "paper")
        setup = Setup("bench", bars.symbols, "1h", FEATURES, LIMITS, Costs(), poll_s=3599.0)
        journal = open_journal(Path(tmp) / "journal.db", venue.account)
        loop = Loop(setup, network(bars), venue, journal, env, Permit(LIMITS, "bench", FOREVER))
        sends, own = measured(loop, stopwatch(loop))
        loop.run(venue.now_ms() + hours * HOUR)
        journal.close()
    return np.array(sends[1:]), np.array(own[1:])


def year(days=365, symbols=5):
    "Seconds to play so many days of hourly bars in process, with the journal in memory."
    bars = market(symbols, 24 * days)
    venue = paper_venue(bars, 100_000.0)
    venue.env.clock.advance(START * 3600 + 1800)
    setup = Setup("year", bars.symbols, "1h", FEATURES, LIMITS, Costs(), poll_s=3599.0)
    loop = Loop(setup, momentum(), venue, Journal(MemoryStore()), venue.env, Permit(LIMITS, "bench", FOREVER))
    loop.run(venue.now_ms() + 2 * HOUR)
    start = time.perf_counter()
    loop.stopping = False
    loop.run(venue.now_ms() + (24 * days - 6) * HOUR)
    return time.perf_counter() - start, loop.journal.book.counts["decision"]


def row(name, value, unit, goal=None, ok=None):
    return {"name": name, "value": round(float(value), 2), "unit": unit, "peer": "", "peer_version": "", "ratio": None, "goal": goal, "ok": ok}


def bench():
    sends, own = (1000 * v for v in loopback())
    seconds, decisions = year()
    p = lambda v, q: float(np.percentile(v, q))
    return [row("bar close to all orders sent, 20 symbols, loopback, median", p(sends, 50), "ms"),
            row("bar close to all orders sent, 20 symbols, loopback, p99", p(sends, 99), "ms"),
            row("the loop's own share (features, PPO, gate, plan, journal), median", p(own, 50), "ms"),
            row("the loop's own share (features, PPO, gate, plan, journal), p99", p(own, 99), "ms", 50.0, p(own, 99) < 50.0),
            row(f"365 virtual days of hourly bars, 5 symbols, {decisions} decisions", seconds, "s", 60.0, seconds < 60.0)]
