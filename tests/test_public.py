"""trading.public: paper money at public prices does what paper money on the same stored bars does, never better than the public could, and survives."""
import dataclasses
import os
from decimal import Decimal as D

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratfam.core import Env, ObservationSpec, VirtualClock
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.policies.base import Rule
from stratfam.risk.limits import limits_from
from stratfam.trading import public as room
from stratfam.trading.feed import Feed
from stratfam.trading.journal import Journal, MemoryStore, open_journal
from stratfam.trading.loop import Loop, Setup
from stratfam.trading.permit import FOREVER, Permit
from stratfam.trading.public import Seen, pieces, public_paper
from stratfam.trading.venues import paper_venue
from stratfam.weex.client import OrderRequest, WeexAPIClient
from stratfam.weex.exchange import Exchange, advance_to, check
from stratfam.weex.gateway import FaultPlan, InProcessTransport
from stratfam.weex.server import Server

NAMES, HOUR, START = ("BTCUSDT", "ETHUSDT"), 3_600_000, 200
RULE = Rule(ObservationSpec(("return_24", "volatility_24")), "momentum", (("bars", 24), ("entry", 0.3)), short=True)
LIMITS = limits_from(stop_loss=0.02, take_profit=0.04, trailing=0.03)


def world(T=300, seed=5, step="1h", funding=0.0003):
    return dataclasses.replace(make_world("regime_vol", T, 2, step, market="perp", seed=seed, vol=1.5, funding=funding).bars, symbols=NAMES)


def looping(venue, env, journal=None, events=None, run="public", **more):
    setup = Setup(run, NAMES, "1h", RULE.spec.names, LIMITS, Costs(taker=0.0008, maker=0.0008, slippage_bps=1.0), rows=150, **{"poll_s": 3599.0, **more})
    return Loop(setup, RULE, venue, journal or Journal(MemoryStore()), env, Permit(LIMITS, "paper", FOREVER),
                observers=[events.append] if events is not None else ())


def seen_by(events):
    "What must be equal: decisions, orders and fills, without the venue's own numbers."
    drop = ("order_id", "venue")
    return [{k: v for k, v in e.items() if k not in drop and not (k == "id" and e["kind"] == "fill")} for e in events if e["kind"] in ("decision", "order", "fill")]


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
    mine, venue = on_public_bars(bars, 60, tmp_path / "account")
    theirs, other = on_stored_bars(bars, 60)
    assert [e for e in mine + theirs if e["kind"] == "error"] == []
    assert seen_by(mine) == seen_by(theirs)
    fills = [e for e in mine if e["kind"] == "fill"]
    assert len(fills) > 20 and {f["purpose"] for f in fills} >= {"ENTRY", "EXIT", "STOP"}
    account = lambda v: v.exchange.users["paper-key"]["accounts"]["contract"]
    assert account(venue).wallet == account(other).wallet
    paid = lambda v: [(b[2], b[3]) for b in account(v).bills if b[4] == "position_funding"]
    assert paid(venue) == paid(other) and len(paid(venue)) > 5
    check(venue.exchange)


if __name__ == "__main__": os._exit(0)
