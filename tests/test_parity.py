"""F15: the backtest, the loop on the in-process exchange and the loop over HTTP make the same decisions, orders and equity."""
import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose

from stratfam.core import Env, ObservationSpec
from stratfam.data.features import FEATURES as FEATURE_TABLE, build
from stratfam.data.store import load_bars
from stratfam.data.worlds import make_world
from stratfam.market import backtest as kernel
from stratfam.market.account import CAUSES, Costs, logged
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
HOUR = 3_600_000
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


def replayed(bars, venue, hours, monkeypatch):
    "The backtest on the exchange's own prices, lots and fees: its result and every fill of the kernel."
    feed, kept = venue.exchange.feeds[0], []
    grid = {k: getattr(feed, k) / 10.0 ** np.array([m.price_digits for m in feed.markets]) for k in ("open", "high", "low", "close")}
    seen, grids = dataclasses.replace(bars, **grid), venue.grids(bars.symbols)
    lots = Lots(*(tuple(float(getattr(grids[s], k)) for s in bars.symbols) for k in ("step", "min_qty")))
    monkeypatch.setattr(kernel, "logged", lambda log: kept.append(logged(log)) or kept[-1])
    result = walk(RULE, arena(seen, LIMITS, COSTS, lots, 10_000.0), build(seen, FEATURES), [(START, START + hours + 2)])[0]
    return result, kept[0], seen


# A price that is beyond the stop before the stop rests: the loop leaves at market (FLATTEN) at the price the kernel stops at.
PURPOSE = {"STOP": ("STOP", "FLATTEN"), "TARGET": ("TARGET",), "POLICY": ("ENTRY", "EXIT"), "TIME_STOP": ("EXIT",), "LIMIT": ("EXIT",)}


def compare(decisions, fills, bars, venue, hours, monkeypatch):
    """Bar by bar: equity, positions, reasons; order by order: bar, symbol, lots, price, fee and cause.

    The backtest ends flat at its last close; the loop does not know that it ends, so rows from there on are left out."""
    result, log, seen = replayed(bars, venue, hours, monkeypatch)
    n, step = len(decisions), [float(venue.grids(NAMES)[s].step) for s in NAMES]
    assert n == hours
    assert_allclose([d["equity"] for d in decisions], result.equity[:n], rtol=1e-8)
    held = np.array([d["held"] for d in decisions]) * step * seen.close[START:START + n]
    assert_allclose(held / result.equity[:n, None], result.weight[:n], rtol=1e-8, atol=1e-12)
    assert said(decisions) == {k: v for k, v in told(result, bars).items() if k[0] < n}
    mine = sorted((int((f["time_ms"] - (f["purpose"] in ("STOP", "TARGET"))) // HOUR - bars.time[0].astype("i8") // 10**6 // HOUR), f["symbol"], k, f)
                  for k, f in enumerate(fills))
    theirs = sorted((int(r["t"]), NAMES[r["n"]], k, r) for k, r in enumerate(log) if r["t"] < START + n)
    mine = [row for row in mine if row[0] < START + n]
    assert [(t, s, f["lots"] * (1 if f["side"] == "BUY" else -1)) for t, s, _, f in mine] == [(t, s, r["lots"]) for t, s, _, r in theirs]
    odd = [(t, s, f["purpose"], CAUSES[r["cause"]]) for (t, s, _, f), (*_, r) in zip(mine, theirs) if f["purpose"] not in PURPOSE[CAUSES[r["cause"]]]]
    assert odd == []
    assert_allclose([f["price"] for *_, f in mine], [r["price"] for *_, r in theirs], rtol=1e-9)
    assert_allclose([f["fee"] for *_, f in mine], [r["fee"] for *_, r in theirs], rtol=1e-7, atol=2e-8)
    return len(mine)


def said(decisions):
    "Reasons of the loop's gate by (row, symbol)."
    return {(t, s): set(r) for t, d in enumerate(decisions) for s, r in zip(NAMES, d["reasons"]) if r}


def told(result, bars):
    "Reasons of the backtest's gate by (row, symbol)."
    out = {}
    for e in result.gate_events.itertuples():
        if e.reason.startswith("SKIPPED"): continue
        first = int(np.searchsorted(result.time, np.datetime64(e.time)))
        for t in range(first, first + e.bars): out.setdefault((t, e.symbol), set()).add(e.reason)
    return out


def in_process(bars, hours):
    venue = paper_venue(bars, 10_000.0, slippage=0.0, markets=fine(bars))
    venue.env.clock.advance(START * 3600 + 1800)
    return (*live(venue, venue.env, bars, hours), venue)


def over_http(bars, hours):
    x = Exchange(bars, fine(bars), slippage=0.0)
    add_user(x, "paper-key", "paper-secret", "paper-phrase", usdt=10_000)
    with Server(x, speed=0) as server:
        server.clock.advance(START * 3600 + 1800)
        env = Env(server.clock)
        venue = WeexVenue(WeexAPIClient("contract", PAPER, env, base_url=server.url, budgets={}), "paper")
        return live(venue, env, bars, hours)


def same(here, there):
    "Two sessions took the same decisions and got the same fills, to the last digit."
    drop = lambda events: [{k: v for k, v in e.items() if k not in ("time_ms", "id", "order_id")} for e in events]
    assert drop(here[0]) == drop(there[0]) and drop(here[1]) == drop(there[1])
    ids = lambda loop: [row[3] for row in loop.journal.store.rows if row[2] == "intent"]
    assert ids(here[2]) == ids(there[2]) and len(ids(here[2])) > 4, "the same orders under the same client ids"


def check(bars, hours, monkeypatch):
    decisions, fills, _, venue = in_process(bars, hours)
    return decisions, fills, compare(decisions, fills, bars, venue, hours, monkeypatch)


def test_thirty_days_of_real_bars(market_data, monkeypatch):
    decisions, fills, compared = check(real_bars(market_data, 30), 30 * 24, monkeypatch)
    assert compared > 100 and {f["purpose"] for f in fills} >= {"ENTRY", "EXIT", "STOP", "TARGET"}


@pytest.mark.parametrize("seed", [1, 2])
def test_synthetic_bars(seed, monkeypatch):
    world = make_world("regime_vol", START + 80, 2, market="perp", seed=seed, vol=1.5, funding=0.0003).bars
    assert check(dataclasses.replace(world, symbols=NAMES), 72, monkeypatch)[2] > 10


def test_a_planted_difference_is_seen(monkeypatch):
    "The comparison itself: one lot, one tick or one reason too many in the loop's own account, and it fails."
    bars = dataclasses.replace(make_world("regime_vol", START + 40, 2, market="perp", seed=1, vol=1.5).bars, symbols=NAMES)
    decisions, fills, _, venue = in_process(bars, 30)
    compare(decisions, fills, bars, venue, 30, monkeypatch)
    monkeypatch.undo()
    change = lambda rows, i, **new: [*rows[:i], {**rows[i], **new}, *rows[i + 1:]]
    for f in (change(fills, 0, lots=fills[0]["lots"] + 1), change(fills, 1, price=fills[1]["price"] * (1 + 1e-7)), fills[:-1]):
        with pytest.raises(AssertionError): compare(decisions, f, bars, venue, 30, monkeypatch)
        monkeypatch.undo()
    for d in (change(decisions, 9, equity=decisions[9]["equity"] * (1 + 1e-7)), change(decisions, 9, reasons=[["KILL"], []])):
        with pytest.raises(AssertionError): compare(d, fills, bars, venue, 30, monkeypatch)
        monkeypatch.undo()


def test_over_http():
    "The same bars through a real server: the same decisions, orders and fills, to the last digit."
    bars = dataclasses.replace(make_world("regime_vol", START + 40, 2, market="perp", seed=5, vol=1.5).bars, symbols=NAMES)
    same(in_process(bars, 24), over_http(bars, 24))


@pytest.mark.proof
def test_thirty_days_of_real_bars_over_http(market_data):
    bars = real_bars(market_data, 30)
    same(in_process(bars, 30 * 24), over_http(bars, 30 * 24))


@pytest.mark.parametrize("source", ["synthetic", "real"])
def test_features_of_the_live_window_are_those_of_the_history(source, request):
    "Every feature the live loop can compute, on windows of the size it keeps, ending at many bars."
    if source == "real": bars = real_bars(request.getfixturevalue("market_data"), 40)
    else: bars = dataclasses.replace(make_world("garch", 1500, 2, market="perp", seed=2).bars, symbols=NAMES)
    rows = Setup("features", NAMES, "1h", FEATURES).rows
    names = tuple(f.name for f in FEATURE_TABLE.values() if f.warmup <= rows and "funding" not in f.needs)
    assert len(names) > 20
    full = build(bars, names).x
    for end in range(rows + 40, len(bars), 131):
        cut = build(bars[end - rows + 1:end + 1], names).x
        assert np.isfinite(cut[-1]).all()
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
