"""The simulated exchange's books under random traffic: they conserve to the tick after every step, and planted bugs are seen."""
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratfam.core import NO_EXIT, Bars, VirtualClock, bar_exit, digest
from stratfam.weex.exchange import (
    Broken, Exchange, Market, Refusal, add_user, adjust_margin, advance_to, available, cancel, check, end_algo, equity, money, place, place_algo,
    scaled, set_depth, set_leverage, set_mode, share,
)
from stratfam.weex.gateway import FAULTS, FaultPlan, Gateway, InProcessTransport, Limits, NoAnswer, Refused, Reset, signature, swarm

HOUR = 3600 * 10**9


def random_bars(rng, steps, names=("BTC/USDT:USDT", "SOL/USDT:USDT"), market="perp", wild=0.03):
    "A random walk on the tick grid with gaps between bars, missing bars and funding that is sometimes unknown."
    t = np.datetime64("2024-01-01T00", "ns") + np.arange(steps) * np.timedelta64(1, "h")
    shape = (steps, len(names))
    close = np.array([40_000.0, 100.0])[:len(names)] * np.exp(np.cumsum(rng.normal(0, wild, shape), 0))
    open_ = np.vstack([close[:1], close[:-1]]) * np.exp(rng.normal(0, wild / 3, shape))
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(0, wild / 2, shape)))
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(0, wild / 2, shape)))
    ok = rng.random(shape) > 0.05
    ok[0] = True
    funding = np.where(rng.random(shape) < 0.1, np.nan, rng.normal(0, 2e-4, shape) * (rng.random(shape) < 0.3)) * (market == "perp")
    cut = lambda v: np.where(ok, v, np.nan)
    return Bars(t, "1h", cut(open_), cut(high), cut(low), cut(close), cut(np.full(shape, 30.0)), funding, ok, names, market)


class Driver:
    "Random users of a random venue."
    def __init__(self, seed, steps=120):
        self.rng = rng = np.random.default_rng(seed)
        spot = random_bars(rng, steps, ("BTC/USDT",), "spot", 0.02)
        options = {"dedupe": bool(rng.random() < 0.5), "participation": None if rng.random() < 0.5 else 0.001,
                   "slippage": float(rng.choice([0, 1e-4, 3e-3]))}
        self.x = x = Exchange([random_bars(rng, steps, wild=float(rng.choice([0.005, 0.03, 0.08]))), spot], **options)
        x.markets["contract"]["XRPUSDT"] = Market("XRPUSDT", "XRP", price_digits=4, qty_digits=0, step=10)
        self.feed, self.steps, self.refusals, self.bar = x.feeds[0], steps, 0, 0
        for name in ("weex_a", "weex_b"): add_user(x, name, "s", "p", usdt=float(rng.integers(50, 5000)), spot={"USDT": 2000, "BTC": "0.01"})
        self.accounts = [a for a in x.accounts if a.kind != "spot"]
        self.coins = [a for a in x.accounts if a.kind == "spot"]
        self.depth()

    def depth(self):
        m, rng = self.x.markets["contract"]["XRPUSDT"], self.rng
        mid = 5_000 + int(rng.integers(-300, 300))
        side = lambda sign: [(mid + sign * int(d), int(rng.integers(1, 50)) * 10) for d in rng.choice(np.arange(1, 60), 5, replace=False)]
        set_depth(self.x, m, side(-1), side(1))

    def around(self, m, spread=0.03): return max(1, round(m.last * (1 + self.rng.normal(0, spread))))

    def futures_order(self):
        x, rng = self.x, self.rng
        a = self.accounts[rng.integers(len(self.accounts))]
        m = list(x.markets["contract"].values())[rng.integers(3)]
        side, pos = (int(v) for v in rng.choice([1, -1], 2))
        price = self.around(m) if rng.random() < 0.5 else 0
        held = a.positions.get((m.symbol, pos))
        budget = max(m.step, int(max(0, available(a)) * rng.random() * 8 // max(1, m.last * m.unit)) // m.step * m.step)
        lots = max(1, int(held["lots"] * rng.random() * 1.1)) if held and side != pos else budget
        client = f"c{rng.integers(40)}"
        tp, sl = (self.around(m, 0.05) if rng.random() < 0.3 else 0 for _ in range(2))
        if rng.random() < 0.1: x.partial = float(rng.random())
        try:
            if rng.random() < 0.25:
                kind = str(rng.choice(["STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET"]))
                place_algo(x, a, m, side, pos, kind, lots, self.around(m), price=0 if kind.endswith("MARKET") else self.around(m), client=client)
            else: place(x, a, m, side, pos, lots, price, str(rng.choice(["GTC", "IOC", "FOK", "POST_ONLY"])), client, tp, sl)
        finally: x.partial = None

    def spot_order(self):
        x, rng = self.x, self.rng
        a, m = self.coins[rng.integers(2)], x.markets["spot"]["BTCUSDT"]
        place(x, a, m, int(rng.choice([1, -1])), 0, int(rng.integers(1, 200)), self.around(m, 0.01) if rng.random() < 0.6 else 0,
              str(rng.choice(["GTC", "IOC", "FOK"])), f"s{rng.integers(30)}")

    def withdraw_something(self):
        a = self.x.accounts[self.rng.integers(len(self.x.accounts))]
        orders = [*a.orders.values(), *a.algos.values()]
        if not orders: return
        o = orders[self.rng.integers(len(orders))]
        if "rising" in o: end_algo(self.x, o, "CANCELED")
        else: cancel(self.x, o)

    def settings(self):
        x, rng = self.x, self.rng
        a = self.accounts[rng.integers(len(self.accounts))]
        m = list(x.markets["contract"].values())[rng.integers(3)]
        pick = rng.random()
        if pick < 0.4: set_leverage(x, a, m, *(int(rng.integers(1, 60)) if rng.random() < 0.7 else None for _ in range(3)))
        elif pick < 0.7: set_mode(x, a, m, str(rng.choice(["CROSSED", "ISOLATED"])))
        elif a.positions: adjust_margin(x, a, list(a.positions.values())[0], int(rng.integers(-10**13, 10**13)) * 10)

    def time(self):
        self.bar += 1
        advance_to(self.x, self.feed.time[0] + self.bar * HOUR)

    def step(self):
        do = self.rng.choice([self.futures_order, self.spot_order, self.withdraw_something, self.settings, self.time, self.depth],
                             p=[0.45, 0.12, 0.12, 0.06, 0.2, 0.05])
        try: do()
        except Refusal: self.refusals += 1
        check(self.x)


def from_fills(x, a):
    "The wallet and open values of a futures account, from its fills and other bills alone, in exact fractions."
    cash, open_value, size = Fraction(0), {}, {}
    for _, _, m, side, pos, lots, ticks, value, fee, _, _, _ in a.fills:
        k = (m.symbol, pos)
        assert value == lots * ticks * m.unit and fee in (share(value, m.maker), share(value, m.taker))
        size[k] = size.get(k, 0) + side * lots
        cash -= side * value + fee
        open_value[k] = m
    cash += sum(b[3] for b in a.bills if b[4] in ("deposit", "position_funding", "finish_liquidate", "order_liquidate_fee_income"))
    return cash, {k: n for k, n in size.items() if n}, open_value


def run(seed, steps=400):
    d = Driver(seed)
    for _ in range(steps):
        if d.bar >= d.steps: break
        d.step()
    for a in d.accounts:
        cash, size, markets = from_fills(d.x, a)
        assert size == {k: k[1] * p["lots"] for k, p in a.positions.items()}
        assert equity(a) == cash + sum(n * markets[k].last * markets[k].unit for k, n in size.items())
    return d


@pytest.mark.parametrize("seed", range(12))
def test_the_books_conserve_after_every_step(seed):
    d = run(seed)
    assert d.x.trades > 5 and d.refusals > 5


@pytest.mark.proof
def test_the_books_conserve_over_many_seeds():
    seen = [run(seed, 600) for seed in range(100, 300)]
    assert sum(d.x.bankrupt for d in seen) > 100 and sum(d.x.trades for d in seen) > 10_000
    assert sum(any(p["isolated"] for p in a.positions.values()) for d in seen for a in d.accounts) > 3


def test_the_driver_reaches_liquidations_and_every_kind_of_bill():
    runs = [run(seed) for seed in range(30, 44)]
    kinds = {b[4] for d in runs for a in d.x.accounts for b in a.bills}
    assert sum(d.x.bankrupt for d in runs) > 3
    assert {"deposit", "position_open_long", "position_close_short", "position_funding", "start_liquidate", "margin_move_out", "trade_in"} <= kinds


def test_the_same_seed_gives_the_same_day():
    trace = lambda d: digest([[*f[:2], f[2].symbol, *f[3:]] for a in d.x.accounts for f in a.fills], [money(equity(a)) for a in d.accounts])
    assert trace(run(3)) == trace(run(3)) != trace(run(4))


BUGS = {
    "a cent from nowhere": lambda x, a, p: setattr(a, "wallet", a.wallet + 10**10),
    "a fee not booked": lambda x, a, p: x.ledger["USDT"].update(fees=x.ledger["USDT"]["fees"] - 1),
    "a lot too many": lambda x, a, p: p.update(lots=p["lots"] + 1),
    "an open value off by a tick": lambda x, a, p: p.update(value=p["value"] - p["market"].unit),
    "margin not returned": lambda x, a, p: setattr(a, "frozen", a.frozen + 1),
    "lots claimed twice": lambda x, a, p: p.update(locked=p["locked"] + 1),
    "an order filled beyond its size": lambda x, a, p: next(iter(a.orders.values())).update(done=10**6),
    "a cancelled order in the book": lambda x, a, p: next(iter(a.orders.values())).update(status="CANCELED"),
    "an order missing from the book": lambda x, a, p: p["market"].resting.clear(),
    "coins below zero": lambda x, a, p: x.accounts[2].free.update(USDT=-1),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug):
    m = Market("BTCUSDT", "BTC", last=690_000, live=True)
    x = Exchange(markets=[m])
    a = add_user(x, "weex_a", "s", "p", usdt=1000, spot={"USDT": 5})["contract"]
    place(x, a, m, 1, 1, 100)
    place(x, a, m, 1, 1, 100, price=600_000)
    check(x)
    BUGS[bug](x, a, a.positions["BTCUSDT", 1])
    with pytest.raises(Broken): check(x)


tick = st.integers(8_000, 12_000)


@settings(max_examples=300, deadline=None)
@given(o=st.tuples(tick, tick, tick, tick), stop=tick, target=tick, side=st.sampled_from([1, -1]))
def test_an_exit_is_what_core_says(o, stop, target, side):
    "One position with a stop and a target meets any bar: it ends where, and only if, `core.bar_exit` says."
    open_, close, high, low = o[0], o[1], max(o), min(o)
    entry = 10_000
    if side * (entry - stop) <= 0 or side * (target - entry) <= 0: return
    row = np.array([[entry] * 4, [open_, high, low, close]], dtype=float).T[:, :, None] / 100
    t = np.datetime64("2024-01-01T00", "ns") + np.arange(2) * np.timedelta64(1, "h")
    v = np.ones((2, 1))
    bars = Bars(t, "1h", *row, v, v * 0, v > 0, ("SOL/USDT:USDT",), "perp")
    m = Market("SOLUSDT", "SOL", price_digits=2, qty_digits=1, maker=0, taker=0)
    x = Exchange(bars, [m], slippage=0.0)
    a = add_user(x, "weex_a", "s", "p", usdt=100_000)["contract"]
    place(x, a, m, side, side, 10, tp=target, sl=stop)
    advance_to(x, int(t[1].astype("i8")) + HOUR)
    kind, price = bar_exit(float(side), float(open_), float(high), float(low), float(stop), float(target), np.nan)
    assert (not a.positions) == (kind != NO_EXIT)
    if kind != NO_EXIT: assert a.fills[-1][6] == round(price)
    check(x)


@settings(max_examples=300, deadline=None)
@given(st.decimals(allow_nan=True, allow_infinity=True) | st.text(max_size=12) | st.integers() | st.none() | st.booleans() | st.lists(st.integers()))
def test_a_number_is_read_exactly_or_refused(value):
    try: n = scaled(value if not hasattr(value, "is_nan") else str(value), 4)
    except Refusal as e: assert e.code in (-1142, -1160)
    else: assert Fraction(n, 10**4) == Fraction(str(value)) and isinstance(n, int)


# The door: whatever arrives, the answer is a response with a code of the table, and the books stay whole.
def door(seed=0, **options):
    x = Exchange(random_bars(np.random.default_rng(seed), 50), **options)
    add_user(x, "weex_a", "secret", "pass")
    return x, VirtualClock(x.now)


def send(wire, clock, method, target, body=b""):
    stamp = str(clock.now_ns() // 10**6)
    headers = {"ACCESS-KEY": "weex_a", "ACCESS-PASSPHRASE": "pass", "ACCESS-TIMESTAMP": stamp, "Content-Type": "application/json",
               "ACCESS-SIGN": signature(b"secret", stamp, method, target, body)}
    return wire.send(method, "http://venue" + target, headers, body)


ORDER = {"symbol": "BTCUSDT", "side": "BUY", "positionSide": "LONG", "type": "LIMIT", "timeInForce": "GTC", "quantity": "0.01", "price": "39000",
         "newClientOrderId": "my-order-0001", "tpTriggerPrice": "45000", "slTriggerPrice": "30000", "reduceOnly": False}
JUNK = [None, "", "0", "-1", "1e999", "NaN", 0, -5, 1.5, True, [], {}, "BUY", "x" * 500, "\u00e9\u4e2d", "9" * 40, [[[]]], {"a": 1}]


def test_mutated_bodies_never_break_the_door():
    x, clock = door()
    wire, rng = InProcessTransport(x, clock), np.random.default_rng(5)
    paths = [p for p in Gateway(x).routes if p[0] != "GET"]
    gets = [p for p in Gateway(x).routes if p[0] == "GET"]
    codes = set()
    for i in range(3000):
        body = dict(ORDER)
        for _ in range(rng.integers(1, 4)): body[str(rng.choice(list(ORDER)))] = JUNK[rng.integers(len(JUNK))]
        raw = json.dumps(body).encode()
        if rng.random() < 0.1: raw = raw[:rng.integers(len(raw))]
        method, path = paths[rng.integers(len(paths))] if rng.random() < 0.7 else gets[rng.integers(len(gets))]
        symbol, limit = rng.choice(["BTCUSDT", "cmt_btcusdt", "", "%00"]), rng.choice(["5", "-1", "", "x"])
        query = "" if method == "POST" else f"?symbol={symbol}&limit={limit}&interval=1h"
        r = send(wire, clock, method, path + query, raw if method != "GET" else b"")
        assert r.status in (200, 400, 401, 403, 405), (method, path, r)
        answer = json.loads(r.body)
        if isinstance(answer, dict) and "code" in answer: codes.add(str(answer["code"]))
        if i % 50 == 0: clock.sleep(600)
        check(x)
    assert {"-1121", "-1141", "-1142", "-1054"} <= codes


@pytest.mark.parametrize("seed", range(6))
def test_faults_never_break_the_books(seed):
    x, clock = door(seed, dedupe=bool(seed % 2))
    plan = swarm(seed, total=0.6, kinds=FAULTS)
    wire, rng = InProcessTransport(x, clock, plan, latency=0.05), np.random.default_rng(seed)
    raised = 0
    for i in range(400):
        body = json.dumps({**ORDER, "quantity": "0.001", "type": str(rng.choice(["LIMIT", "MARKET"])), "tpTriggerPrice": "", "slTriggerPrice": "",
                           "price": str(round(float(rng.normal(39_000, 500)), 1)), "newClientOrderId": f"o-{i}"}).encode()
        what = [("POST", "/capi/v3/order", body), ("GET", "/capi/v3/openOrders", b""), ("DELETE", f"/capi/v3/order?origClientOrderId=o-{i - 2}", b""),
                ("GET", "/capi/v3/account/balance", b""), ("POST", "/capi/v3/closePositions", b"{}")]
        try: send(wire, clock, *what[rng.integers(len(what))])
        except (NoAnswer, Refused, Reset) as e:
            assert isinstance(e, OSError) and e.sent == (not isinstance(e, Refused))
            raised += 1
        clock.sleep(float(rng.exponential(120)))
        check(x)
    assert set(plan.counts) <= set(plan.rates)
    silent = {"refused", "timeout_before", "timeout_after", "reset_after"}
    assert raised == sum(n for k, n in plan.counts.items() if k in silent)


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_strikes_when_forced(kind):
    x, clock = door(1)
    plan = FaultPlan()
    wire = InProcessTransport(x, clock, plan)
    send(wire, clock, "GET", "/capi/v3/account/balance")
    a = x.users["weex_a"]["accounts"]["contract"]
    body = json.dumps({**ORDER, "type": "MARKET", "tpTriggerPrice": "", "slTriggerPrice": ""}).encode()
    if kind == "soft_refusal": body = body.replace(b"0.01", b"100000")
    leverage = b'{"symbol":"BTCUSDT","crossLeverage":"5"}'
    target = ("POST", "/capi/v3/account/leverage", leverage) if kind == "leverage_refused" else ("POST", "/capi/v3/order", body)
    plan.force(kind)
    try: r, failed = send(wire, clock, *target), None
    except (NoAnswer, Refused, Reset) as e: r, failed = None, e
    assert plan.counts == {kind: 1}
    served = {"timeout_after", "reset_after", "error_after", "html", "truncated", "wrong_type", "empty", "swapped_reply", "stale_reply",
              "delayed_state", "hidden_order", "partial_fill"}
    assert len(a.fills) == (2 if kind == "duplicate_request" else 1 if kind in served else 0)
    assert (failed is not None) == (kind in ("refused", "timeout_before", "timeout_after", "reset_after"))
    expected = {"error_before": 503, "error_after": 502, "rate_limit": 429, "rate_limit_bare": 429, "rate_limit_bad": 429, "banned": 418,
                "skew": 401, "delist": 400, "leverage_refused": 400}
    if r is not None: assert r.status == expected.get(kind, 200)
    history = json.loads(send(wire, clock, "GET", "/capi/v3/order/history").body)
    if kind == "delayed_state": assert history[0]["status"] == "PENDING" and history[0]["executedQty"] == "0"
    if kind == "hidden_order": assert history == []
    if kind == "partial_fill": assert history[0]["status"] == "CANCELED" and history[0]["executedQty"] == "0.0050"
    if kind == "soft_refusal": assert json.loads(r.body)["success"] is False
    if kind == "rate_limit_bad": assert r.headers["retry-after"] == "soon"
    clock.sleep(10.0)
    assert all(o["status"] != "PENDING" for o in json.loads(send(wire, clock, "GET", "/capi/v3/order/history").body))
    check(x)


def test_weights_and_limits():
    x, clock = door()
    wire = InProcessTransport(Gateway(x, Limits(orders=50)), clock)
    statuses = [send(wire, clock, "GET", "/capi/v3/account/balance").status for _ in range(60)]
    assert statuses == [200] * 50 + [429] * 10  # 10 weight each, 500 in ten seconds
    clock.sleep(10.0)
    assert send(wire, clock, "GET", "/capi/v3/account/balance").status == 200
    r = [send(wire, clock, "POST", "/capi/v3/order", b"{}") for _ in range(60)]
    assert [v.status for v in r].count(429) == 10 and int(r[-1].headers["retry-after"]) > 0


def test_old_orders_are_forgotten():
    m = Market("BTCUSDT", "BTC", last=690_000, live=True)
    x = Exchange(markets=[m], keep=50)
    a = add_user(x, "weex_a", "s", "p", usdt=10**7)["contract"]
    for i in range(500):
        place(x, a, m, 1, 1, 1, client=f"c{i}", sl=600_000)
        place(x, a, m, -1, 1, 1)
    assert len(x.orders) <= 101 and len(a.clients) <= 51 and len(a.fills) == 50
    check(x)
