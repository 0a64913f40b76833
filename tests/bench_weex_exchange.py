"""Speed of the simulated exchange: orders through the books by direct calls, signed requests over HTTP from a second process."""
import argparse
import asyncio
import json
import multiprocessing
import platform
import time

from stratfam.weex.exchange import Exchange, Market, add_user, cancel, check, place
from stratfam.weex.gateway import signature
from stratfam.weex.server import Server

KEY, SECRET, PASS = "weex_bench", "secret", "pass"
COMMAND = "python tests/bench_weex_exchange.py --json"


def venue():
    m = Market("BTCUSDT", "BTC", last=690_000, live=True)
    x = Exchange(markets=[m], slippage=0.0, keep=10_000)
    return x, add_user(x, KEY, SECRET, PASS, usdt=10**9)["contract"], m


def state_machine(seconds=1.5):
    """Orders per second by direct calls, best of three rounds: a third market opens, a third market closes (each filled, with
    fee, bill and position), a third limit orders that rest and are cancelled; the cancels are not counted. "On one core" is
    meant literally: the clock is the process's own CPU time, so that a neighbour on the machine does not change the number."""
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
    return best


async def _fire(port, seconds, connections, target, method, body):
    import aiohttp
    times, bad = [], 0
    end = time.perf_counter() + seconds
    secret = SECRET.encode()

    async def one(session):
        nonlocal bad
        while (t := time.perf_counter()) < end:
            stamp = str(time.time_ns() // 10**6)
            headers = {"ACCESS-KEY": KEY, "ACCESS-PASSPHRASE": PASS, "ACCESS-TIMESTAMP": stamp, "Content-Type": "application/json",
                       "ACCESS-SIGN": signature(secret, stamp, method, target, body)}
            async with session.request(method, f"http://127.0.0.1:{port}{target}", headers=headers, data=body or None) as r:
                raw = await r.read()
                bad += r.status != 200 or b"success\":false" in raw
            times.append(time.perf_counter() - t)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(one(session) for _ in range(connections)))
        return len(times) / (time.perf_counter() - start), sorted(times)[int(len(times) * 0.99)] * 1e3, bad


def _generator(pipe, *args): pipe.send(asyncio.run(_fire(*args)))


def over_http(seconds=4.0, connections=32):
    "Signed requests per second and their 99th percentile (ms), from a generator in a second process: a mix of orders and reads."
    x, a, m = venue()
    body = b'{"symbol":"BTCUSDT","side":"BUY","positionSide":"LONG","type":"MARKET","quantity":"0.0010","newClientOrderId":"bench-1"}'
    rows = {}
    with Server(x, speed=0) as server:
        for name, args in (("warm", (0.5, connections, "/capi/v3/account/balance", "GET", b"")),
                           ("balance", (seconds / 2, connections, "/capi/v3/account/balance", "GET", b"")),
                           ("order", (seconds / 2, connections, "/capi/v3/order", "POST", body))):
            here, there = multiprocessing.get_context("spawn").Pipe()
            p = multiprocessing.get_context("spawn").Process(target=_generator, args=(there, server.port, *args))
            p.start()
            rows[name] = here.recv()
            p.join()
    check(x)
    return rows


def row(name, value, unit, goal, ok):
    return {"name": name, "value": round(value, 1), "unit": unit, "peer": None, "peer_version": None, "ratio": None, "goal": goal, "ok": bool(ok),
            "command": COMMAND}


def bench() -> list[dict]:
    "The rows of `stratfam bench weex` that concern the exchange."
    rate = state_machine()
    rows = [row("exchange: orders by direct calls, one core", rate, "orders/s", ">= 50000", rate >= 50_000)]
    for name, (per_second, p99, bad) in over_http().items():
        if name == "warm": continue
        rows.append(row(f"server: signed {name} requests, 32 connections", per_second, "requests/s", ">= 1500", per_second >= 1500 and not bad))
        rows.append(row(f"server: signed {name} requests, 99th percentile", p99, "ms", "< 50", p99 < 50 and not bad))
    return rows


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--json", action="store_true")
    found = bench()
    if cli.parse_args().json: print(json.dumps(found, indent=1))
    else:
        print(f"Python {platform.python_version()}")
        for r in found: print(f"{'ok ' if r['ok'] else 'LOW'} {r['name']:<58} {r['value']:>10,.1f} {r['unit']:<10} goal {r['goal']}")
