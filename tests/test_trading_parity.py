"""F15: the backtest, the loop on the in-process exchange and the loop over HTTP make the same decisions, orders and equity."""
import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose

from stratfam.core import Env, ObservationSpec
from stratfam.data.features import build
from stratfam.data.store import load_bars
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.market.backtest import arena, walk
from stratfam.policies.base import Rule
from stratfam.risk.limits import Lots, limits_from
from stratfam.trading.journal import Journal, MemoryStore
from stratfam.trading.loop import Loop, Setup, Window
from stratfam.trading.permit import FOREVER, Permit
from stratfam.trading.venues import PAPER, WeexVenue, paper_venue
from stratfam.weex.client import WeexAPIClient
from stratfam.weex.exchange import Exchange, add_user, market_for
from stratfam.weex.server import Server

NAMES = ("BTCUSDT", "ETHUSDT")
FEATURES = ("return_24", "volatility_24")
RULE = Rule(ObservationSpec(FEATURES), "momentum", (("bars", 24), ("entry", 0.5)), short=True)
COSTS = Costs(taker=0.0008, maker=0.0008, slippage_bps=0.0)
LIMITS = limits_from(stop_loss=0.02, take_profit=0.05, daily_loss=0.03, trailing=0.03, max_bars=40)
START = 600  # Bars before the first decision


def real_bars(folder, days):
    "Hourly bars of two symbols as a perpetual without funding."
    bars = load_bars(folder / "spot1h_2021_2023", NAMES, "1h")[5000:5000 + START + 24 * days + 3]
    assert bars.ok.all(), "this slice of the data has gaps; choose another"
    return dataclasses.replace(bars, market="perp", funding=np.zeros_like(bars.close))


def fine(bars):
    "Markets whose prices have so many decimals that a stop's level is not rounded."
    return [market_for(s, float(bars.close[0, n]), price_digits=8, qty_digits=4) for n, s in enumerate(bars.symbols)]


def live(venue, env, bars, hours):
    "Decisions, fills and errors of the loop; the clock of `env` must stand in bar START."
    events = []
    setup = Setup("parity", bars.symbols, "1h", FEATURES, LIMITS, COSTS, poll_s=3599.0)
    loop = Loop(setup, RULE, venue, Journal(MemoryStore()), env, Permit(LIMITS, "paper", FOREVER), observers=[events.append])
    loop.run(venue.now_ms() + hours * 3_600_000)
    pick = lambda kind: [e for e in events if e["kind"] == kind]
    assert pick("error") == []
    return pick("decision"), pick("fill"), loop


def replay(bars, venue, feed, hours):
    "The backtest on the exchange's own prices, lots and fees."
    grid = {k: getattr(feed, k) / 10.0 ** np.array([m.price_digits for m in feed.markets]) for k in ("open", "high", "low", "close")}
    seen, grids = dataclasses.replace(bars, **grid), venue.grids(bars.symbols)
    lots = Lots(*(tuple(float(getattr(grids[s], k)) for s in bars.symbols) for k in ("step", "min_qty")))
    return walk(RULE, arena(seen, LIMITS, COSTS, lots, 10_000.0), build(seen, FEATURES), [(START, START + hours + 2)])[0], seen


def compare(decisions, fills, result, seen, symbols, step):
    "Equal equity and positions at every close, and as many fills as the backtest has."
    n = len(decisions)
    assert n >= 20
    assert_allclose([d["equity"] for d in decisions], result.equity[:n], rtol=1e-8)
    held = np.array([d["held"] for d in decisions]) * step * seen.close[START:START + n]
    assert_allclose(held / result.equity[:n, None], result.weight[:n], rtol=1e-8, atol=1e-12)
    closed = result.trades[result.trades.closed < result.time[n - 1]]
    assert len(fills) >= 2 * len(closed) > 0
    assert set(closed.exit_reason) <= {"STOP", "TARGET", "POLICY", "TIME_STOP", "LIMIT"}


def in_process(bars, hours):
    venue = paper_venue(bars, 10_000.0, slippage=0.0, markets=fine(bars))
    venue.env.clock.advance(START * 3600 + 1800)
    return (*live(venue, venue.env, bars, hours), venue)


def check(bars, hours):
    decisions, fills, _, venue = in_process(bars, hours)
    result, seen = replay(bars, venue, venue.exchange.feeds[0], hours)
    compare(decisions, fills, result, seen, bars.symbols, [float(venue.grids(NAMES)[s].step) for s in NAMES])
    return decisions, fills


def test_thirty_days_of_real_bars(market_data):
    decisions, fills = check(real_bars(market_data, 30), 30 * 24)
    assert len(decisions) == 30 * 24 and len({f["purpose"] for f in fills}) >= 3


@pytest.mark.parametrize("seed", [1, 2])
def test_synthetic_bars(seed):
    world = make_world("regime_vol", START + 80, 2, market="perp", seed=seed, vol=1.5, funding=0.0003).bars
    check(dataclasses.replace(world, symbols=NAMES), 72)


def test_over_http():
    "The same bars through a real server: the same decisions and fills, to the last digit."
    bars = dataclasses.replace(make_world("regime_vol", START + 40, 2, market="perp", seed=5, vol=1.5).bars, symbols=NAMES)
    here = in_process(bars, 24)
    x = Exchange(bars, fine(bars), slippage=0.0)
    add_user(x, "paper-key", "paper-secret", "paper-phrase", usdt=10_000)
    with Server(x, speed=0) as server:
        env = Env(server.clock)
        server.clock.advance(START * 3600 + 1800)
        venue = WeexVenue(WeexAPIClient("contract", PAPER, env, base_url=server.url, budgets={}), "paper")
        there = live(venue, env, bars, 24)
    drop = lambda events: [{k: v for k, v in e.items() if k not in ("time_ms", "id", "order_id")} for e in events]
    assert drop(here[0]) == drop(there[0]) and drop(here[1]) == drop(there[1]) and len(here[1]) > 4


def test_features_of_the_live_window_are_those_of_the_history():
    bars = dataclasses.replace(make_world("garch", 1500, 2, market="perp", seed=2).bars, symbols=NAMES)
    names = ("return_24", "volatility_24", "rsi", "macd", "atr", "bollinger_b", "drawdown_168")
    full = build(bars, names).x
    for end in (700, 1100, 1499):
        cut = build(bars[end - 519:end + 1], names).x
        assert_allclose(cut[-1], full[end], rtol=1e-5, atol=1e-6)


def test_a_window_that_missed_bars_heals_when_they_come():
    from decimal import Decimal

    from stratfam.weex.replies import Kline
    kline = lambda h: Kline(h * 3_600_000, *(Decimal(100 + h),) * 4, Decimal(1))
    w = Window(("A",), "1h", 10)
    w.move_to(10 * 3_600_000)
    w.put(0, [kline(h) for h in range(8)])
    w.move_to(12 * 3_600_000)
    assert w.needed(0) >= 4
    w.put(0, [kline(h) for h in range(12 - w.needed(0), 12)])
    assert w.bars().ok.all()
