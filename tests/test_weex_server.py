"""The simulated exchange over real sockets: requests, streams, faults, restarts, both dialects."""
import asyncio
import json
import threading
import time
from decimal import Decimal

import aiohttp
import numpy as np
import pytest

from stratfam.core import Bars, Env
from stratfam.weex.client import ACK, REFUSED, Credentials, NotSent, OrderRequest, WeexAPIClient
from stratfam.weex.exchange import Exchange, add_user, check
from stratfam.weex.gateway import FaultPlan, Limits, signature
from stratfam.weex.server import Server, serve
from stratfam.weex.stream import PRIVATE, Bad, Denied, Resync, Stream, Update, channel

KEY, SECRET = "weex_a", b"secret"


def venue(hours=200):
    t = np.datetime64("2024-01-01T00", "ns") + np.arange(hours) * np.timedelta64(1, "h")
    c = (100 + np.arange(hours) % 7.0)[:, None]
    x = Exchange(Bars(t, "1h", c, c + 1, c - 1, c, c * 0 + 10, c * 0, np.ones(c.shape, bool), ("SOL/USDT:USDT",), "perp"), slippage=0.0)
    add_user(x, KEY, SECRET.decode(), "pass")
    return x


def until(condition, seconds=5.0):
    "Wait for something that another thread does."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def headers(method, target, body=b"", at_ms=None):
    stamp = str(at_ms or time.time_ns() // 10**6)
    return {"ACCESS-KEY": KEY, "ACCESS-PASSPHRASE": "pass", "ACCESS-TIMESTAMP": stamp, "Content-Type": "application/json",
            "ACCESS-SIGN": signature(SECRET, stamp, method, target, body)}


def ask(server, method, target, body=b"", at_ms=None, timeout=5):
    async def once():
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as s:
            url = aiohttp.client.URL(server.url + target, encoded=True)
            async with s.request(method, url, data=body or None, headers=headers(method, target, body, at_ms)) as r:
                return r.status, await r.text()
    return asyncio.run(once())


def order(client="o-1", kind="MARKET", quantity="1.00", price="90"):
    return json.dumps({"symbol": "SOLUSDT", "side": "BUY", "positionSide": "LONG", "type": kind, "quantity": quantity, "price": price,
                       "newClientOrderId": client}).encode()


def test_raw_query_and_raw_body_are_what_is_signed():
    with Server(venue(), speed=0) as s:
        assert ask(s, "POST", "/capi/v3/order", order("a:b/c", "LIMIT"))[0] == 200
        status, text = ask(s, "DELETE", "/capi/v3/order?origClientOrderId=a%3Ab%2Fc")
        assert status == 200 and json.loads(text)["origClientOrderId"] == "a:b/c"
        body = ' {"symbol" : "SOLUSDT", "marginType":"ISOLATED","note":"\u00e9\u4e2d"} '.encode()
        assert ask(s, "POST", "/capi/v3/account/marginType", body)[0] == 200


def test_the_old_dialect_and_its_errors():
    with Server(venue(), speed=0) as s:
        body = b'{"symbol":"cmt_solusdt","client_oid":"k1","size":"1","type":"1","order_type":"0","match_price":"1"}'
        assert json.loads(ask(s, "POST", "/capi/v2/order/placeOrder", body)[1])["client_oid"] == "k1"
        status, text = ask(s, "POST", "/capi/v2/order/placeOrder", body.replace(b'"size":"1"', b'"size":"0.001"'))
        assert status == 400 and json.loads(text)["code"] == "40015" and "stepSize '0.01'" in text
        assert json.loads(ask(s, "GET", "/capi/v2/account/assets", at_ms=1_700_000_000_000)[1])["code"] == "40008"


def test_strict_time_and_limits():
    x = venue()
    with Server(x, speed=0, strict=True, limits=Limits()) as s:
        assert "-1046" in ask(s, "GET", "/capi/v3/account/balance")[1]  # the real clock is not the replay's
        at = x.now // 10**6
        statuses = [ask(s, "GET", "/capi/v3/account/balance", at_ms=at)[0] for _ in range(52)]
        assert statuses == [200] * 50 + [429] * 2


def test_lost_answers_and_a_dropped_connection():
    plan = FaultPlan().force("timeout_after", "order", "POST").force("reset_after", "order", "POST").force("truncated", "balance")
    with Server(venue(), speed=0, faults=plan, hang=0.3) as s:
        for client in ("lost-1", "lost-2"):
            with pytest.raises(aiohttp.ClientError): ask(s, "POST", "/capi/v3/order", order(client))
        with pytest.raises(json.JSONDecodeError): json.loads(ask(s, "GET", "/capi/v3/account/balance")[1])
        history = json.loads(ask(s, "GET", "/capi/v3/order/history")[1])
        assert {o["clientOrderId"] for o in history} == {"lost-1", "lost-2"}


def test_books_survive_restarts_of_the_server():
    x = venue()
    for i in range(4):
        with Server(x, speed=0) as s:
            assert ask(s, "POST", "/capi/v3/order", order(f"o-{i}"))[0] == 200
            s.advance(3600)
            assert len(json.loads(ask(s, "GET", "/capi/v3/order/history")[1])) == i + 1
            s.call(lambda: check(x))
        assert x.sinks == []
    port = s.port
    with Server(x, speed=0, port=port) as s: assert s.port == port and ask(s, "GET", "/capi/v3/market/time")[0] == 200


def test_streams_over_a_socket():
    async def watch(s):
        frames = []
        async with aiohttp.ClientSession() as session:
            path = "/contract/v3/ws/private"
            async with session.ws_connect(s.ws + path, headers=headers("", "/v3/ws/private")) as mine, \
                       session.ws_connect(s.ws + "/contract/v3/ws/public") as public:
                await mine.send_str('{"id":1,"method":"SUBSCRIBE","params":["orders"]}')
                await public.send_str('{"id":2,"method":"SUBSCRIBE","params":["SOLUSDT@kline_1h_LAST_PRICE"]}')
                frames += [json.loads((await mine.receive()).data), *[json.loads((await public.receive()).data) for _ in range(2)]]
                await asyncio.to_thread(ask, s, "POST", "/capi/v3/order", order())
                frames.append(json.loads((await asyncio.wait_for(mine.receive(), 5)).data))
                await asyncio.to_thread(s.advance, 3600)
                frames += [json.loads((await asyncio.wait_for(public.receive(), 5)).data) for _ in range(2)]
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(s.ws + path, headers=headers("", "/v3/ws/wrong"))
        return frames

    with Server(venue(), speed=0) as s: frames = asyncio.run(watch(s))
    assert [f.get("e") for f in frames] == [None, None, "klineSnapshot", "orders", "kline", "kline"]
    assert frames[3]["d"][0]["status"] == "FILLED" and frames[5]["d"][0]["t"] - frames[4]["d"][0]["t"] == 3_600_000


def test_a_server_ends_at_once_and_the_next_one_takes_up_its_state():
    "With a stream open and a request hanging on purpose; our own client and stream go through the restart."
    x, plan = venue(), FaultPlan().force("timeout_before", "balance")
    me = Credentials(KEY, SECRET.decode(), "pass")
    with Server(x, speed=0, faults=plan, hang=30.0) as s:
        c = WeexAPIClient(credentials=me, env=Env(), base_url=s.url, budgets={})
        stream = Stream(c, ["fill"], private=True, base_url=f"{s.ws}/contract").start()
        until(lambda: s.hub.sessions)
        asked = []
        threading.Thread(target=lambda: asked.append(c.balance()), daemon=True).start()
        until(lambda: plan.counts["timeout_before"])
        start = time.monotonic()
    assert time.monotonic() - start < 2.0
    first = c.place(OrderRequest("SOLUSDT", "BUY", Decimal(1), "down-1", "LONG"))
    assert (first.kind, type(first.error)) == (REFUSED, NotSent)  # nobody listens: nothing was sent
    with Server(x, speed=0, port=s.port) as again:
        until(lambda: again.hub.sessions and again.hub.sessions[-1].channels, 10)
        assert c.place(OrderRequest("SOLUSDT", "BUY", Decimal(1), "up-1", "LONG")).kind == ACK
        seen = []
        until(lambda: seen.extend(stream.poll()) or any(isinstance(e, Update) for e in seen))
        assert [e.reason for e in seen if isinstance(e, Resync)][-1] == "connected" and stream.connections == 2
        stream.stop()
        assert [p.quantity for p in c.positions()] == [1]
        until(lambda: asked, 10)  # the read that the first server never answered was asked again


def test_the_old_stream_speaks_to_our_client():
    with Server(venue(), speed=0) as s:
        c = WeexAPIClient(credentials=Credentials(KEY, SECRET.decode(), "pass"), env=Env(), base_url=s.url, dialect="v2", budgets={})
        names = [channel(c, "kline", "SOLUSDT", "1h"), channel(c, "depth", "SOLUSDT")]
        public, private = (Stream(c, n, private=p, base_url=f"{s.ws}/contract").start() for n, p in ((names, False), (PRIVATE["v2"], True)))
        until(lambda: sum(len(x.channels) for x in s.hub.sessions) == 6)
        s.advance(3600)
        assert c.place(OrderRequest("SOLUSDT", "BUY", Decimal(1), "old-1", "LONG")).kind == ACK
        seen, told = [], []
        until(lambda: seen.extend(public.poll()) or sum(isinstance(e, Update) for e in seen) >= 3)
        until(lambda: told.extend(private.poll()) or {"orders", "trade", "position", "account"} <= {getattr(e, "channel", "") for e in told})
        for stream in (public, private): stream.stop()
    bars = [e for e in seen if isinstance(e, Update)]
    assert {(e.channel, e.symbol) for e in bars} == {("kline_1h", "SOLUSDT")} and bars[0].data.open_ms < bars[-1].data.open_ms
    assert not any(isinstance(e, Denied | Bad) for e in seen + told)


def test_a_stream_fault_drops_the_line():
    async def watch(s):
        async with aiohttp.ClientSession() as session, session.ws_connect(s.ws + "/contract/v3/ws/public") as public:
            await public.send_str('{"id":2,"method":"SUBSCRIBE","params":["SOLUSDT@ticker"]}')
            return [(await asyncio.wait_for(public.receive(), 5)).type for _ in range(2)]

    plan = FaultPlan().force("stream_drop")
    with Server(venue(), speed=0, faults=plan) as s: kinds = asyncio.run(watch(s))
    assert kinds == [aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.CLOSE] and plan.counts == {"stream_drop": 1}


def test_a_replay_runs_at_its_speed():
    x = venue()
    start = x.now
    with Server(x, speed=36_000.0) as s:
        time.sleep(0.5)
        now = json.loads(ask(s, "GET", "/capi/v3/market/time")[1])["serverTime"]
    assert 4 <= (now - start // 10**6) / 3_600_000 < 120 and x.feeds[0].event > 8


def test_serve_says_when_the_port_is_open():
    port = []
    threading.Thread(target=serve, args=(venue(),), kwargs={"port": 0, "ready": lambda s: port.append(s)}, daemon=True).start()
    for _ in range(100):
        if port: break
        time.sleep(0.05)
    assert ask(port[0], "GET", "/capi/v3/market/time")[0] == 200
