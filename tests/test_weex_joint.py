"""One scripted day, three independent traders: ccxt's `weex`, its streaming twin, and our client, each on a server of its own over
the same bars. Each must be told the same at every step, and at the end the venue must hold the same account, to the last id and tick."""
import asyncio
import threading
import time
from decimal import Decimal as D

import pytest
from weex_canned import GOLDEN, ME

ccxt = pytest.importorskip("ccxt")
pytest.importorskip("ccxt.pro")
from test_weex_ccxt import KEYS, RECENT, bars, pointed  # noqa: E402

from stratfam.core import Env  # noqa: E402
from stratfam.weex.client import ACK, OrderRequest, WeexAPIClient  # noqa: E402
from stratfam.weex.exchange import Exchange, add_user, check, equity, money  # noqa: E402
from stratfam.weex.server import Server  # noqa: E402
from stratfam.weex.stream import PRIVATE, Stream, Update  # noqa: E402
from stratfam.weex.wire import InsufficientFunds, LeverageError, OrderNotFound, PrecisionError, UnknownSymbol  # noqa: E402

pytestmark = pytest.mark.skipif(not RECENT, reason="the day speaks ccxt 4.5.90")
HOUR, NAMES = 3600, ("BTCUSDT", "ETHUSDT")
UNIFIED = {"BTCUSDT": "BTC/USDT:USDT", "ETHUSDT": "ETH/USDT:USDT"}
PLAIN = {v: k for k, v in UNIFIED.items()} | {v.partition(":")[0]: k for k, v in UNIFIED.items()}
MODES = {"CROSSED": "cross", "ISOLATED": "isolated"}
number = lambda v: float(v or 0)


class Ccxt:
    "ccxt, unmodified except for its urls; every method answers in plain numbers."
    words = {"InsufficientFunds": "funds", "-3313": "leverage", "-3200": "gone", "-2200": "gone", "stepSize": "step", "-1121": "symbol"}

    def __init__(self, server):
        self.server, self.ex = server, self.make(server)
        self.call("load_markets")

    def make(self, server): return pointed(ccxt.weex, server)
    def call(self, name, *args): return getattr(self.ex, name)(*args)
    def close(self): return None
    def name(self, symbol): return UNIFIED[symbol]

    def refused(self, act):
        "One word for a refusal."
        try: act()
        except ccxt.ExchangeError as e: return next(v for k, v in self.words.items() if k in f"{type(e).__name__} {e}")
        return "accepted"

    def markets(self):
        return {s: (m["precision"]["price"], m["precision"]["amount"], m["maker"], m["taker"], float(m["info"]["maxLeverage"]))
                for s in NAMES for m in [self.ex.market(UNIFIED[s])]}

    def candles(self, symbol, start=None, end=None):
        page = {} if start is None else {"historical": True, "until": end}
        rows = self.call("fetch_ohlcv", self.name(symbol), "1h", start, 100, page)
        return [r for r in rows if r[0] + HOUR * 1000 <= self.server.exchange.now // 10**6 and (end is None or r[0] <= end)]

    def quotes(self, symbol):
        book, last = self.call("fetch_order_book", self.name(symbol)), self.call("fetch_ticker", self.name(symbol))["last"]
        return (*book["bids"][0], *book["asks"][0], last)

    def funding_next(self, symbol): return int(self.call("fetch_funding_rate", self.name(symbol))["info"]["nextFundingTime"])
    def funding_past(self, symbol): return [(f["timestamp"], f["fundingRate"]) for f in self.call("fetch_funding_rate_history", self.name(symbol))]

    def balance(self):
        row, = self.call("fetch_balance", {"type": "swap"})["info"]
        return tuple(float(row[k]) for k in ("balance", "availableBalance", "frozen", "unrealizePnl"))

    def margin(self, symbol, mode): self.call("set_margin_mode", MODES[mode], self.name(symbol))
    def leverage(self, symbol, x, mode="CROSSED"): self.call("set_leverage", x, self.name(symbol), {"marginMode": MODES[mode]})

    def order(self, symbol, side, held, size, client, price=None, trigger=None, kind=None, tp=None, sl=None):
        more = {"clientOrderId": client, "reduceOnly": (side == "BUY") != (held == "LONG")} if held else {"newClientOrderId": client}
        if kind: more = {"clientOrderId": client, {"stop": "stopLossPrice", "target": "takeProfitPrice", "entry": "triggerPrice"}[kind]: trigger}
        if tp: more["takeProfit"] = {"triggerPrice": tp}
        if sl: more["stopLoss"] = {"triggerPrice": sl}
        return self.call("create_order", self.name(symbol), "market" if price is None else "limit", side.lower(), size, price, more)["id"]

    def look(self, symbol, order_id):
        o = self.call("fetch_order", order_id, self.name(symbol))
        return o["id"], o["clientOrderId"], o["side"], o["filled"], number(o["average"]), o["status"] == "open"

    def open_orders(self, symbol, triggers=False):
        rows = self.call("fetch_open_orders", self.name(symbol), None, None, {"trigger": True} if triggers else {})
        return sorted((o["id"], o["clientOrderId"], o["amount"], number(o["triggerPrice"] if triggers else o["price"])) for o in rows)

    def cancel(self, symbol, order_id): self.call("cancel_order", order_id, self.name(symbol))
    def cancel_by_client(self, symbol, client): self.call("cancel_order", None, self.name(symbol), {"clientOrderId": client})
    def cancel_trigger(self, symbol, order_id): self.call("cancel_order", order_id, self.name(symbol), {"trigger": True})
    def cancel_many(self, symbol, ids): self.call("cancel_orders", ids, self.name(symbol))
    def cancel_all(self, symbol): self.call("cancel_all_orders", self.name(symbol))

    def positions(self):
        return sorted((PLAIN[p["symbol"]], p["side"], p["contracts"], p["entryPrice"], p["leverage"], p["marginMode"], p["unrealizedPnl"])
                      for p in self.call("fetch_positions"))

    def add_margin(self, symbol, amount):
        p, = [p for p in self.call("fetch_positions") if p["symbol"] == UNIFIED[symbol]]
        self.call("add_margin", UNIFIED[symbol], amount, {"positionId": p["id"]})

    def close_position(self, symbol): return self.call("close_position", UNIFIED[symbol])["id"]

    def fills(self, symbol):
        rows = self.call("fetch_my_trades", self.name(symbol), None, 100)
        return sorted((t["id"], t["order"], t["side"], t["amount"], t["price"], t["fee"]["cost"], t["fee"]["currency"], t["timestamp"]) for t in rows)

    def closed(self, symbol):
        rows = self.call("fetch_canceled_and_closed_orders", self.name(symbol), None, 100)
        return sorted((o["id"], o["clientOrderId"] or "", o["filled"], o["status"] == "closed") for o in rows)

    def funding_paid(self):
        rows = self.call("fetch_ledger", "USDT", None, 100, {"type": "swap"})
        return sorted((b["info"]["billId"], float(b["info"]["income"])) for b in rows if b["info"]["incomeType"] == "position_funding")

    def streamed(self): return None

    def spot(self):
        self.name = lambda symbol: UNIFIED[symbol].partition(":")[0]
        return self

    def coins(self):
        rows = self.call("fetch_balance", {"type": "spot"})["info"]["balances"]
        return {b["asset"]: (float(b["free"]), float(b["locked"])) for b in rows}

    def demo(self):
        self.name = UNIFIED.__getitem__
        self.ex.set_sandbox_mode(True)
        self.ex.urls["api"].update({k: self.server.url for k in ("public", "private", "contract", "contractPrivate")})
        return self

    def demo_balance(self):
        row, = self.call("fetch_balance")["info"]
        return row["asset"], float(row["balance"]), float(row["unrealizePnl"])


class Pro(Ccxt):
    "The same through ccxt.pro: coroutines in a loop of their own, with the account's fills watched from the start."
    def __init__(self, server):
        self.loop, self.seen = asyncio.new_event_loop(), {}
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        super().__init__(server)
        self.watching = asyncio.run_coroutine_threadsafe(self.watch(), self.loop)
        time.sleep(0.5)

    def make(self, server):
        async def inside(): return pointed(ccxt.pro.weex, server)
        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(10)

    def call(self, name, *args): return asyncio.run_coroutine_threadsafe(getattr(self.ex, name)(*args), self.loop).result(20)

    async def watch(self):
        while True:
            for t in await self.ex.watch_my_trades(None, None, None, {"type": "swap"}): self.seen[t["id"]] = t["amount"]

    def streamed(self): return self.seen

    def close(self):
        self.watching.cancel()
        self.call("close")
        self.loop.call_soon_threadsafe(self.loop.stop)


class Ours:
    "Our client, with its stream of the account."
    words = {InsufficientFunds: "funds", LeverageError: "leverage", OrderNotFound: "gone", PrecisionError: "step", UnknownSymbol: "symbol"}

    def __init__(self, server):
        self.server, self.c, self.seen = server, self.client(server), {}
        self.stream = Stream(self.c, PRIVATE["v3"], private=True, base_url=f"{server.ws}/contract").start()
        time.sleep(0.5)

    def client(self, server=None, **more): return WeexAPIClient(credentials=ME, env=Env(), base_url=(server or self.server).url, budgets={}, **more)
    def close(self): self.stream.stop()

    def sure(self, outcome):
        if outcome.kind != ACK: raise outcome.error
        return outcome.payload

    def refused(self, act):
        try: act()
        except tuple(self.words) as e: return self.words[type(e)]
        return "accepted"

    def markets(self):
        return {s: tuple(float(v) for v in (i.price_step, i.quantity_step, i.maker_fee, i.taker_fee, i.max_leverage))
                for s, i in self.c.get_available_symbols().items()}

    def candles(self, symbol, start=None, end=None):
        self.c.sync_clock()  # this venue's time moves by jumps
        return [[k.open_ms, *map(float, (k.open, k.high, k.low, k.close, k.volume))] for k in self.c.klines(symbol, "1h", start, end)]

    def quotes(self, symbol):
        book = self.c.depth(symbol)
        return tuple(map(float, (*book.bids[0], *book.asks[0], self.c.ticker(symbol).last)))

    def funding_next(self, symbol): return self.c.funding_now(symbol).time_ms
    def funding_past(self, symbol): return [(f.time_ms, float(f.rate)) for f in self.c.funding_history(symbol, 0, self.now())]
    def now(self): return self.server.exchange.now // 10**6

    def balance(self):
        b = self.c.balance()["USDT"]
        return tuple(map(float, (b.total, b.available, b.frozen, b.unrealized)))

    def margin(self, symbol, mode): self.sure(self.c.set_margin_mode(symbol, mode))
    def leverage(self, symbol, x, mode="CROSSED"): self.sure(self.c.set_leverage(symbol, x, mode))

    def order(self, symbol, side, held, size, client, price=None, trigger=None, kind=None, tp=None, sl=None):
        exact = lambda v: None if v is None else D(str(v))
        stem = {None: None, "stop": "STOP", "entry": "STOP", "target": "TAKE_PROFIT"}[kind]
        name = stem and (f"{stem}_MARKET" if price is None else stem) or ("MARKET" if price is None else "LIMIT")
        return self.sure(self.c.place(OrderRequest(symbol, side, exact(size), client, held, name, exact(price), trigger=exact(trigger),
                                                   take_profit=exact(tp), stop_loss=exact(sl)))).order_id

    def look(self, symbol, order_id):
        o = self.c.order(order_id)
        return o.order_id, o.client_id, o.side.lower(), float(o.filled), float(o.average), o.live

    def open_orders(self, symbol, triggers=False):
        rows = self.c.open_triggers(symbol) if triggers else self.c.open_orders(symbol)
        return sorted((o.order_id, o.client_id, float(o.quantity), float(o.trigger if triggers else o.price)) for o in rows)

    def cancel(self, symbol, order_id): self.sure(self.c.cancel(order_id))
    def cancel_by_client(self, symbol, client): self.sure(self.c.cancel(client_id=client))
    def cancel_trigger(self, symbol, order_id): self.sure(self.c.cancel_trigger(order_id))
    def cancel_many(self, symbol, ids): self.sure(self.c.cancel_many(ids))
    def cancel_all(self, symbol): self.sure(self.c.cancel_all(symbol))

    def positions(self):
        return sorted((p.symbol, p.side.lower(), float(p.quantity), float(p.entry), float(p.leverage),
                       MODES[p.margin_mode], float(p.unrealized)) for p in self.c.positions())

    def add_margin(self, symbol, amount):
        p, = self.c.positions(symbol)
        self.sure(self.c.adjust_margin(p.position_id, D(str(amount))))

    def close_position(self, symbol):
        part, = self.sure(self.c.close_positions(symbol))
        return part.payload.order_id

    def fills(self, symbol):
        return sorted((f.fill_id, f.order_id, f.side.lower(), float(f.quantity), float(f.price), float(f.fee), f.fee_asset, f.time_ms)
                      for f in self.c.fills(0, self.now(), symbol))

    def closed(self, symbol):
        rows = self.c.order_history(self.now() - 2 * 86_400_000, self.now(), symbol)
        return sorted((o.order_id, o.client_id, float(o.filled), o.status == "FILLED") for o in rows if not o.live)

    def funding_paid(self):
        rows = self.c.bills(self.now() - 2 * 86_400_000, self.now(), "position_funding")
        return sorted((b.bill_id, float(b.amount)) for b in rows)

    def streamed(self):
        for e in self.stream.poll():
            if isinstance(e, Update) and e.channel == "fill": self.seen[e.data.fill_id] = float(e.data.quantity)
        return self.seen

    def spot(self):
        self.c = self.client(market="spot")
        return self

    def coins(self): return {a: (float(b.available), float(b.frozen)) for a, b in self.c.balance().items()}

    def demo(self):
        self.c = self.client(demo=True)
        return self

    def demo_balance(self):
        b = self.c.balance()["SUSDT"]
        return b.asset, float(b.total), float(b.unrealized)


def futures_day(t, server):
    "A day of futures; yields what the trader was told."
    btc, eth = NAMES
    start = server.exchange.now // 10**6
    yield "markets", t.markets()
    server.advance(3 * HOUR)
    yield "candles", t.candles(btc)
    yield "window", t.candles(eth, start + HOUR * 1000, start + 2 * HOUR * 1000)
    yield "quotes", [t.quotes(s) for s in NAMES]
    yield "next funding", t.funding_next(btc)
    yield "balance", t.balance()
    t.margin(eth, "ISOLATED"); t.leverage(eth, 5, "ISOLATED"); t.margin(btc, "CROSSED"); t.leverage(btc, 10)
    yield "too much leverage", t.refused(lambda: t.leverage(btc, 450))

    rest = t.order(btc, "BUY", "LONG", 0.01, "day-1", price=39_000)
    yield "resting", (rest, t.look(btc, rest), t.open_orders(btc), t.balance())
    t.cancel_by_client(btc, "day-1")
    yield "gone", t.refused(lambda: t.cancel(btc, rest))
    yield "poor", t.refused(lambda: t.order(btc, "BUY", "LONG", 100, "day-2"))
    pair = [t.order(btc, "BUY", "LONG", 0.01, f"day-3{n}", price=38_000 + n) for n in range(3)]
    t.cancel_many(btc, pair[:2])
    t.cancel_all(btc)
    yield "a clean book", (pair, t.open_orders(btc))

    long = t.order(btc, "BUY", "LONG", 0.02, "day-4", tp=45_000, sl=38_000)
    short = t.order(eth, "SELL", "SHORT", 0.5, "day-5", sl=2_040)
    yield "in the market", (t.look(btc, long), t.look(eth, short), t.positions(), t.balance())
    yield "attached", [t.open_orders(s, triggers=True) for s in NAMES]
    t.add_margin(eth, 20)
    stop = t.order(btc, "SELL", "LONG", 0.02, "day-6", trigger=37_000, kind="stop")
    goal = t.order(btc, "SELL", "LONG", 0.005, "day-7", trigger=40_550, kind="target")
    entry = t.order(btc, "BUY", "LONG", 0.004, "day-8", trigger=40_580, kind="entry")
    yield "triggers", (stop, goal, entry, t.open_orders(btc, triggers=True))
    t.cancel_trigger(btc, stop)
    t.order(btc, "BUY", "LONG", 0.003, "day-9", price=39_990)
    server.advance(5 * HOUR)
    yield "after triggers and a funding payment", (t.positions(), t.balance(), t.open_orders(btc), t.open_orders(btc, triggers=True))
    yield "paid", t.funding_paid()
    server.advance(8 * HOUR)
    yield "stopped out", (t.positions(), t.balance(), t.funding_past(btc))

    t.order(btc, "SELL", "LONG", 0.003, "day-10")
    t.order(btc, "SELL", "LONG", 0.004, "day-11", price=40_590)
    server.advance(6 * HOUR)
    yield "a limit exit", (t.positions(), t.open_orders(btc))
    yield "closed by", t.close_position(btc)
    yield "flat", (t.positions(), t.balance(), [t.open_orders(s, triggers=True) for s in NAMES])
    yield "history", [(t.fills(s), t.closed(s)) for s in NAMES]
    yield "funding", t.funding_paid()
    if t.streamed() is not None:
        told = {f[0]: f[3] for s in NAMES for f in t.fills(s)}
        until = time.monotonic() + 5
        while t.streamed() != told and time.monotonic() < until: time.sleep(0.05)
        assert t.streamed() == told


def spot_day(t, server):
    btc, _ = NAMES
    buy = t.order(btc, "BUY", "", 0.05, "coin-1")
    sell = t.order(btc, "SELL", "", 0.02, "coin-2", price=round(server.exchange.markets["spot"][btc].last / 10 + 50, 1))
    again = t.order(btc, "SELL", "", 0.02, "coin-2", price=49_000.0)
    far = t.order(btc, "SELL", "", 0.01, "coin-3", price=49_000.0)
    yield "bought", (buy, sell, again == sell, t.look(btc, buy), t.open_orders(btc), t.coins())
    t.cancel(btc, far)
    yield "gone", t.refused(lambda: t.cancel(btc, far))
    yield "poor", t.refused(lambda: t.order(btc, "BUY", "", 10, "coin-4"))
    server.advance(3 * HOUR)
    yield "sold", (t.coins(), t.fills(btc), t.open_orders(btc))


def demo_day(t, server):
    btc, _ = NAMES
    t.order(btc, "BUY", "LONG", 0.01, "demo-1")
    yield "demo", (t.positions(), t.demo_balance())
    server.advance(2 * HOUR)
    t.order(btc, "SELL", "LONG", 0.01, "demo-2")
    yield "demo, flat", (t.positions(), t.demo_balance())


def books(x):
    "Everything the venue knows about its accounts, as plain values."
    plain = lambda v: v.symbol if hasattr(v, "symbol") else (v.kind if hasattr(v, "wallet") else v)
    thing = lambda d: {k: plain(v) for k, v in d.items()}
    return {a.kind: {"wallet": a.wallet, "equity": equity(a), "frozen": a.frozen, "free": a.free, "locked": a.locked, "config": a.config,
                     "totals": a.totals, "open": [thing(o) for o in a.orders.values()], "closed": [thing(o) for o in a.closed],
                     "algos": [thing(g) for g in (*a.algos.values(), *a.closed_algos)], "positions": [thing(p) for p in a.positions.values()],
                     "fills": [tuple(map(plain, f)) for f in a.fills], "bills": list(a.bills)} for a in x.accounts}


def live_a_day(trader):
    "The transcript of a trader's day, and the books it left."
    x = Exchange([bars("perp"), bars("spot")])
    add_user(x, GOLDEN["key"], GOLDEN["secret"], GOLDEN["passphrase"], usdt=10_000, spot={"USDT": 5_000})
    with Server(x, speed=0, hang=0.2) as server:
        t = trader(server)
        try:
            told = list(futures_day(t, server)) + list(spot_day(t.spot(), server)) + list(demo_day(t.demo(), server))
            server.call(lambda: check(x))
        finally: t.close()
    return told, books(x)


@pytest.fixture(scope="module")
def ours(): return live_a_day(Ours)


@pytest.mark.parametrize("peer", [Ccxt, Pro])
def test_our_client_and_ccxt_live_the_same_day(ours, peer):
    assert (KEYS["apiKey"], KEYS["secret"], KEYS["password"]) == (GOLDEN["key"], GOLDEN["secret"], GOLDEN["passphrase"])
    (said, mine), (heard, theirs) = ours, live_a_day(peer)
    assert [step for step, _ in said] == [step for step, _ in heard]
    for (step, a), (_, b) in zip(said, heard): assert a == b, step
    assert mine == theirs


def test_the_day_is_a_full_one(ours):
    "Equal accounts prove something only if the day had everything in it."
    said, mine = ours
    told, futures = dict(said), mine["contract"]
    assert (told["too much leverage"], told["poor"], told["gone"]) == ("leverage", "funds", "gone")
    kinds = {o["kind"] for o in futures["closed"]}
    assert kinds == {"LIMIT", "MARKET", "STOP_MARKET", "TAKE_PROFIT_MARKET"} and len(futures["fills"]) >= 9
    assert {b[4] for b in futures["bills"]} >= {"deposit", "position_funding", "position_open_long", "position_close_long", "position_open_short",
                                               "position_close_short", "margin_move_out", "margin_move_in"}
    assert {f[10] for f in futures["fills"]} == {True, False} and len(told["funding"]) >= 2  # maker and taker
    assert futures["wallet"] == futures["equity"] and futures["positions"] == futures["open"] == [] and money(futures["wallet"]) != "10000.00000000"
    assert len(mine["spot"]["fills"]) == 2 and len(mine["demo"]["fills"]) == 2
    paid = sum(f[9] - f[8] for f in futures["fills"]) + sum(b[3] for b in futures["bills"] if b[4] == "position_funding")
    assert futures["wallet"] == 10_000 * 10**12 + paid
