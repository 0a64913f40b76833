"""ccxt's own `weex` class, unmodified except for its urls, trades a scripted day on the server over loopback."""
import asyncio

import numpy as np
import pytest

from stratfam.core import Bars
from stratfam.weex.exchange import Exchange, add_user, available, check, equity, money, scaled
from stratfam.weex.server import Server

ccxt = pytest.importorskip("ccxt")
KEYS = {"apiKey": "weex_test_key_0000000000000001", "secret": "test-secret-not-real-0123456789abcdef", "password": "testpass123"}
RECENT = tuple(int(v) for v in ccxt.__version__.split(".")) >= (4, 5, 90)
PERP, SPOT, HOUR = "BTC/USDT:USDT", "BTC/USDT", 3600


def bars(market):
    t = np.datetime64("2024-01-01T00", "ns") + np.arange(30) * np.timedelta64(1, "h")
    close = np.stack([40_000 + 100.0 * np.arange(30) % 700, 2_000 + 3.0 * np.arange(30)], 1)
    open_ = np.vstack([close[:1], close[:-1]])
    funding = np.where((np.arange(30) % 8 == 7)[:, None], 1e-4, 0.0) * np.ones(close.shape) * (market == "perp")
    names = ("BTC/USDT:USDT", "ETH/USDT:USDT") if market == "perp" else ("BTC/USDT", "ETH/USDT")
    high, low = np.maximum(open_, close) + 20, np.minimum(open_, close) - 20
    return Bars(t, "1h", open_, high, low, close, np.full(close.shape, 50.0), funding, np.ones(close.shape, bool), names, market)


def venue():
    x = Exchange([bars("perp"), bars("spot")])
    add_user(x, KEYS["apiKey"], KEYS["secret"], KEYS["password"], usdt=10_000, spot={"USDT": 5_000})
    return x


def pointed(cls, server, **more):
    ex = cls({**KEYS, "enableRateLimit": False, **more})
    ex.urls["api"].update({k: server.url for k in ("public", "private", "contract", "contractPrivate")})
    ex.urls["api"]["ws"] = {"spot": f"{server.ws}/spot/v3/ws", "contract": f"{server.ws}/contract/v3/ws"}
    if hasattr(ex, "session") and hasattr(ex.session, "trust_env"): ex.session.trust_env = False
    return ex


@pytest.fixture
def server():
    with Server(venue(), speed=0, hang=0.2) as s: yield s


def test_a_day_of_futures(server):
    ex, x = pointed(ccxt.weex, server), server.exchange
    a = x.users[KEYS["apiKey"]]["accounts"]["contract"]
    assert {PERP, SPOT, "ETH/USDT:USDT"} <= set(ex.load_markets())
    assert ex.market(PERP)["precision"] == {"amount": 0.0001, "price": 0.1} and ex.market(PERP)["taker"] == 0.0008
    assert ex.fetch_time({"type": "swap"}) == x.now // 10**6
    server.advance(3 * HOUR)
    rows = ex.fetch_ohlcv(PERP, "1h", limit=10)
    assert [r[4] for r in rows] == [40_000.0, 40_100.0, 40_200.0, rows[-1][1]] and rows[0][0] == 1704067200000
    assert len(ex.fetch_ohlcv(PERP, "4h", limit=10)) == 1
    window = ex.fetch_ohlcv(PERP, "1h", since=rows[1][0], params={"historical": True, "until": rows[2][0]})
    assert window == rows[1:3]
    assert ex.fetch_order_book(PERP)["asks"][0][0] == pytest.approx(rows[-1][4] * 1.0001, abs=0.11)
    assert ex.fetch_ticker(PERP)["last"] == rows[-1][4] and int(ex.fetch_funding_rate(PERP)["info"]["collectCycle"]) == 480
    assert ex.fetch_balance({"type": "swap"})["USDT"]["total"] == 10_000

    if RECENT: ex.set_margin_mode("cross", PERP)  # older versions take the reply's "success" for an error
    assert ex.set_leverage(10, PERP, {"marginMode": "cross"})["crossLeverage"] == "10"
    assert ex.fetch_leverage(PERP)["longLeverage"] == 10
    with pytest.raises(ccxt.InvalidOrder, match="-3313"): ex.set_leverage(1000, PERP)

    # a limit order rests, is seen, is cancelled
    o = ex.create_order(PERP, "limit", "buy", 0.01, 39_000, {"clientOrderId": "my-order-0001"})
    assert [r["id"] for r in ex.fetch_open_orders(PERP)] == [o["id"]] and ex.fetch_balance({"type": "swap"})["USDT"]["used"] > 0
    assert ex.cancel_order(None, PERP, {"clientOrderId": "my-order-0001"})["status"] == "canceled"
    assert ex.fetch_canceled_orders(PERP)[0]["clientOrderId"] == "my-order-0001"
    with pytest.raises(ccxt.InvalidOrder, match="-3200"): ex.cancel_order(o["id"], PERP)
    with pytest.raises(ccxt.InsufficientFunds): ex.create_order(PERP, "market", "buy", 100)
    x.markets["contract"]["BTCUSDT"].step = 10
    with pytest.raises(ccxt.BadRequest, match="stepSize '0.0010'"): ex.create_order(PERP, "limit", "buy", 0.0015, 39_000)
    a_pair = [ex.create_order(PERP, "limit", "buy", 0.01, price)["id"] for price in (38_000, 38_100)]
    assert len(ex.cancel_orders(a_pair, PERP)) == 2 and ex.fetch_open_orders(PERP) == []

    # a market order with stop and target, then eight hours with a funding payment
    o = ex.create_order(PERP, "market", "buy", 0.02, None, {"stopLoss": {"triggerPrice": 38_000}, "takeProfit": {"triggerPrice": 45_000}})
    filled = ex.fetch_order(o["id"], PERP)
    assert (filled["status"], filled["filled"]) == ("closed", 0.02)
    assert {r["type"] for r in ex.fetch_open_orders(PERP, params={"trigger": True})} == {"market"}
    p = ex.fetch_position(PERP)
    assert (p["side"], p["contracts"], p["leverage"], p["marginMode"]) == ("long", 0.02, 10, "cross") and p["entryPrice"] == filled["average"]
    server.advance(8 * HOUR)
    bill = [b for b in ex.fetch_ledger("USDT", params={"type": "swap"}) if b["info"]["incomeType"] == "position_funding"]
    assert len(bill) == 1 and bill[0]["direction"] == "out"
    assert [f["fundingRate"] for f in ex.fetch_funding_rate_history(PERP)] == [1e-4]

    # a trigger order protects, a reduce-only order closes a part, closePositions the rest
    stop = ex.create_order(PERP, "market", "sell", 0.02, None, {"stopLossPrice": 37_000})
    assert stop["id"] in {r["id"] for r in ex.fetch_open_orders(PERP, params={"trigger": True})}
    ex.cancel_order(stop["id"], PERP, {"trigger": True})
    ex.create_order(PERP, "market", "sell", 0.005, None, {"reduceOnly": True})
    assert ex.fetch_position(PERP)["contracts"] == 0.015
    assert ex.close_position(PERP)["id"]
    assert ex.fetch_positions() == [] and ex.fetch_open_orders(PERP, params={"trigger": True}) == []

    fills = ex.fetch_my_trades(PERP)
    assert sorted(f["amount"] for f in fills) == [0.005, 0.015, 0.02]
    realised = sum(scaled(f["info"]["realizedPnl"], 12) - scaled(f["info"]["commission"], 12) for f in fills)
    paid = sum(scaled(b["info"]["income"], 12) for b in bill)
    server.call(lambda: check(x))
    assert a.wallet == equity(a) == available(a) == scaled("10000", 12) + realised + paid
    assert ex.fetch_balance({"type": "swap"})["info"][0]["balance"] == money(a.wallet)


def test_a_short_and_a_stop(server):
    ex, x = pointed(ccxt.weex, server), server.exchange
    server.advance(HOUR)
    ex.create_order("ETH/USDT:USDT", "market", "sell", 0.5, None, {"stopLoss": {"triggerPrice": 2_025}})
    assert ex.fetch_position("ETH/USDT:USDT")["side"] == "short"
    server.advance(12 * HOUR)
    assert ex.fetch_positions() == []
    closed = ex.fetch_closed_orders("ETH/USDT:USDT")
    assert {o["info"]["type"] for o in closed} == {"MARKET", "STOP_MARKET"}
    server.call(lambda: check(x))


def test_a_day_of_spot(server):
    ex, x = pointed(ccxt.weex, server), server.exchange
    a = x.users[KEYS["apiKey"]]["accounts"]["spot"]
    server.advance(2 * HOUR)
    assert len(ex.fetch_ohlcv(SPOT, "1h", limit=3)) == 3 and ex.fetch_bids_asks([SPOT])[SPOT]["ask"] > 0
    buy = ex.create_order(SPOT, "market", "buy", 0.05)
    assert ex.fetch_order(buy["id"], SPOT)["filled"] == 0.05
    ask = ex.create_order(SPOT, "limit", "sell", 0.02, 40_550)
    same = ex.create_order(SPOT, "limit", "sell", 0.02, 40_550, {"newClientOrderId": ex.fetch_order(ask["id"], SPOT)["clientOrderId"]})
    assert same["id"] == ask["id"] and len(ex.fetch_open_orders(SPOT)) == 1
    low = ex.create_order(SPOT, "limit", "sell", 0.01, 49_000)
    assert ex.cancel_order(low["id"], SPOT)["status"] == "canceled"
    server.advance(5 * HOUR)
    assert ex.fetch_order(ask["id"], SPOT)["status"] == "closed"
    trades = ex.fetch_my_trades(SPOT)
    assert [t["side"] for t in trades] == ["buy", "sell"] and trades[0]["fee"]["currency"] == "BTC" and trades[1]["fee"]["currency"] == "USDT"
    balance = ex.fetch_balance()
    for coin in ("BTC", "USDT"): assert scaled(str(balance["info"]["balances"][coin != "BTC"]["free"]), 12) == a.free[coin]
    with pytest.raises(ccxt.OrderNotFound): ex.cancel_order(ask["id"], SPOT)
    server.call(lambda: check(x))


def test_wrong_secret_and_lost_answers(server):
    ex = pointed(ccxt.weex, server, timeout=1000)
    server.advance(HOUR)
    with pytest.raises(ccxt.AuthenticationError): pointed(ccxt.weex, server, secret="wrong").fetch_balance({"type": "swap"})
    ex.load_markets()
    server.door.faults.force("timeout_after", "/capi/v3/order", "POST").force("rate_limit_bare", "balance").force("error_before", "allPosition")
    with pytest.raises(ccxt.NetworkError): ex.create_order(PERP, "market", "buy", 0.01, None, {"clientOrderId": "lost-1"})
    assert ex.fetch_closed_orders(PERP)[0]["clientOrderId"] == "lost-1"
    with pytest.raises(ccxt.RateLimitExceeded): ex.fetch_balance({"type": "swap"})
    with pytest.raises(ccxt.ExchangeNotAvailable): ex.fetch_positions()
    assert len(ex.fetch_positions()) == 1


def test_sandbox(server):
    ex = pointed(ccxt.weex, server)
    if not RECENT: pytest.skip(f"ccxt {ccxt.__version__} has no weex sandbox; 4.5.90 has")
    ex.set_sandbox_mode(True)
    ex.urls["api"].update({k: server.url for k in ("public", "private", "contract", "contractPrivate")})
    x = server.exchange
    server.advance(HOUR)
    ex.create_order(PERP, "market", "buy", 0.01)
    assert ex.fetch_balance()["info"][0]["asset"] == "SUSDT"
    assert [p["contracts"] for p in ex.fetch_positions()] == [0.01] and len(ex.fetch_closed_orders(PERP)) == 1
    mine = x.users[KEYS["apiKey"]]["accounts"]
    assert mine["demo"].positions and not mine["contract"].positions and not mine["contract"].orders
    server.call(lambda: check(x))


def test_streams(server):
    async def watch():
        ex = pointed(ccxt.pro.weex, server)
        try:
            await ex.load_markets()
            book = await ex.watch_order_book(PERP)
            candle = await ex.watch_ohlcv(PERP, "1h")
            ticker = await ex.watch_ticker(PERP)
            later = asyncio.ensure_future(ex.watch_orders(PERP, params={"type": "swap"}))
            fills = asyncio.ensure_future(ex.watch_my_trades(PERP, params={"type": "swap"}))
            await asyncio.sleep(0.5)
            sent = await ex.create_order(PERP, "market", "buy", 0.01)
            orders, trades = await asyncio.wait_for(later, 5), await asyncio.wait_for(fills, 5)
            return book, candle, ticker, sent, orders, trades
        finally: await ex.close()

    pytest.importorskip("ccxt.pro")
    server.advance(2 * HOUR)
    book, candle, ticker, sent, orders, trades = asyncio.run(watch())
    last = server.exchange.markets["contract"]["BTCUSDT"].last / 10
    assert book["bids"][0][0] < last < book["asks"][0][0] and candle[-1][4] == last == ticker["last"]
    assert orders[-1]["id"] == sent["id"] == trades[-1]["order"] and orders[-1]["status"] == "closed" and trades[-1]["amount"] == 0.01
