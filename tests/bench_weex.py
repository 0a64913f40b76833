"""Speed of the WEEX rooms: signing, the client in process, the exchange's books, and its server under a generator in a second process.

`stratfam bench weex` prints the rows. Rates over sockets share the machine with their generator and with whatever else runs, so each
comes with the server's own CPU time per request, which a busy neighbour does not change."""
import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from decimal import Decimal

import numpy as np

from stratfam.core import Env, VirtualClock
from stratfam.weex.client import ACK, Credentials, OrderRequest, WeexAPIClient
from stratfam.weex.exchange import Exchange, Market, add_user, cancel, check, place
from stratfam.weex.gateway import InProcessTransport, signature
from stratfam.weex.server import Server
from stratfam.weex.wire import build_request

COMMAND = "stratfam bench weex"
KEYS = ("weex_test_key_0000000000000001", "test-secret-not-real-0123456789abcdef", "testpass123")
ORDER = {"symbol": "BTCUSDT", "side": "BUY", "positionSide": "LONG", "type": "LIMIT", "timeInForce": "GTC", "quantity": "0.01", "price": "69000",
         "newClientOrderId": "my-order-0001"}
SECONDS, CONNECTIONS = 3.0, 32
REQUESTS = {"balance": ("/capi/v3/account/balance", "GET", b""),
            "order": ("/capi/v3/order", "POST", b'{"symbol":"BTCUSDT","side":"BUY","positionSide":"LONG","type":"MARKET","quantity":"0.0010",'
                                                b'"newClientOrderId":"bench-1"}')}


def row(name, value, unit, goal, ok, peer=None, version=None, ratio=None):
    return dict(name=name, value=round(value, 1), unit=unit, peer=peer, peer_version=version, ratio=ratio and round(ratio, 2), goal=goal, ok=bool(ok),
                command=COMMAND)


def micros(call, n=3000):
    "Median microseconds of one call, after a warm-up."
    for _ in range(n // 15): call()
    took = []
    for _ in range(n):
        start = time.perf_counter_ns()
        call()
        took.append(time.perf_counter_ns() - start)
    return statistics.median(took) / 1000


def theirs():
    "(microseconds, version) of ccxt building and signing the same request."
    try: import ccxt
    except ImportError: return None, None
    if not hasattr(ccxt, "weex"): return None, None
    ex = ccxt.weex(dict(zip(("apiKey", "secret", "password"), KEYS)))
    return micros(lambda: ex.sign("capi/v3/order", ["contractPrivate"], "POST", dict(ORDER)), 1000), ccxt.__version__


def venue():
    m = Market("BTCUSDT", "BTC", last=690_000, live=True)
    x = Exchange(markets=[m], slippage=0.0, keep=10_000)
    return x, add_user(x, *KEYS, usdt=10**9)["contract"], m


def signing():
    me = Credentials(*KEYS)
    ours = micros(lambda: build_request("POST", "https://api-contract.weex.com", "/capi/v3/order", None, ORDER, me, "1700000000000"))
    peer, version = theirs()
    return row("build and sign a request, median", ours, "us", "< 100", ours < 100, "ccxt", version, peer and peer / ours)


def round_trips(n=4000):
    "Orders through the client, the signature check and the books, there and back, in this process; the clock is its CPU time."
    x, _, _ = venue()
    clock = VirtualClock(1_700_000_000_000_000_000)
    c = WeexAPIClient(credentials=Credentials(*KEYS), env=Env(clock, np.random.default_rng(0), InProcessTransport(x, clock)), budgets={})
    pair = [OrderRequest("BTCUSDT", side, Decimal("0.01"), "bench-1", "LONG") for side in ("BUY", "SELL")]
    start = time.process_time()
    good = sum(c.place(pair[i % 2]).kind == ACK for i in range(n))
    rate = n / (time.process_time() - start)
    check(x)
    return row("order round trips through the client, in process", rate, "1/s", ">= 4,000", rate >= 4000 and good == n)


def books(seconds=1.5):
    """Orders per second by direct calls, best of three rounds: a third market opens, a third market closes (each filled, with
    fee, bill and position), a third limit orders that rest and are cancelled; the cancels are not counted. "On one core" is
    meant literally: the clock is the process's own CPU time."""
    best = 0.0
    for _ in range(3):
        x, a, m = venue()
        orders, start = 0, time.process_time()
        while time.process_time() - start < seconds / 3:
            for _ in range(200):
                place(x, a, m, 1, 1, 10, client="a")
                cancel(x, place(x, a, m, 1, 1, 10, price=680_000, client="b"))
                place(x, a, m, -1, 1, 10, client="c")
            orders += 600
        best = max(best, orders / (time.process_time() - start))
        check(x)
    return row("exchange: orders by direct calls, one core", best, "1/s", ">= 50,000", best >= 50_000)


async def _fire(port, seconds, target, method, body):
    "The generator: signed requests over keep-alive connections, as fast as they are answered."
    import aiohttp
    times, bad, secret = [], 0, KEYS[1].encode()
    end = time.perf_counter() + seconds

    async def one(session):
        nonlocal bad
        while (t := time.perf_counter()) < end:
            stamp = str(time.time_ns() // 10**6)
            headers = {"ACCESS-KEY": KEYS[0], "ACCESS-PASSPHRASE": KEYS[2], "ACCESS-TIMESTAMP": stamp, "Content-Type": "application/json",
                       "ACCESS-SIGN": signature(secret, stamp, method, target, body)}
            async with session.request(method, f"http://127.0.0.1:{port}{target}", headers=headers, data=body or None) as r:
                raw = await r.read()
                bad += r.status != 200 or b'success":false' in raw
            times.append(time.perf_counter() - t)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(one(session) for _ in range(CONNECTIONS)))
        return len(times) / (time.perf_counter() - start), sorted(times)[int(len(times) * 0.99)] * 1e3, bad


def over_http():
    "Signed requests per second, their 99th percentile, and the server's CPU time of each: the generator is a second process."
    x, _, _ = venue()
    rows = []
    with Server(x, speed=0) as server:
        for name in ("balance", "order"):
            for seconds in (0.5, SECONDS):  # a warm-up, then the measurement
                before, cpu = server.door.gateway.requests, time.process_time()
                fire = [sys.executable, __file__, "--fire", name, str(server.port), str(seconds)]
                out = subprocess.run(fire, capture_output=True, text=True, check=True)
                cpu, served = time.process_time() - cpu, server.door.gateway.requests - before
            rate, p99, bad = json.loads(out.stdout)
            what = f"server: signed {name} requests, {CONNECTIONS} connections"
            rows += [row(what, rate, "1/s", ">= 1,500", rate >= 1500 and not bad), row(f"{what}, 99th percentile", p99, "ms", "< 50", p99 < 50),
                     row(f"{what}, CPU time of the server", 1e6 * cpu / served, "us", "reported", not bad)]
    check(x)
    return rows


def bench() -> list[dict]:
    "The rows of `stratfam bench weex`."
    return [signing(), round_trips(), books(), *over_http()]


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--fire", nargs=3, metavar=("REQUEST", "PORT", "SECONDS"), help="be the generator of an HTTP row")
    if (fire := cli.parse_args().fire): print(json.dumps(asyncio.run(_fire(int(fire[1]), float(fire[2]), *REQUESTS[fire[0]]))))
    else:
        for r in bench(): print(f"{'ok ' if r['ok'] else 'LOW'} {r['name']:<75} {r['value']:>10,.1f} {r['unit']:<4} goal {r['goal']}")
