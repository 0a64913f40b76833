"""Speed of the WEEX client: `run()` returns rows of {name, value, unit, peer, peer_version, ratio, goal, ok, command}."""
import json
import statistics
import time
from decimal import Decimal

import numpy as np

from stratfam.core import Env, Response, VirtualClock
from stratfam.weex.client import Credentials, OrderRequest, WeexAPIClient
from stratfam.weex.wire import build_request

COMMAND = "python tests/bench_weex_client.py"
KEYS = ("weex_test_key_0000000000000001", "test-secret-not-real-0123456789abcdef", "testpass123")
ORDER = {"symbol": "BTCUSDT", "side": "BUY", "positionSide": "LONG", "type": "LIMIT", "timeInForce": "GTC", "quantity": "0.01", "price": "69000",
         "newClientOrderId": "my-order-0001"}


def micros(call, n=3000):
    "Median microseconds of one call, after a warm-up."
    for _ in range(200): call()
    took = []
    for _ in range(n):
        start = time.perf_counter_ns()
        call()
        took.append(time.perf_counter_ns() - start)
    return statistics.median(took) / 1000


class Instant:
    "A venue that acknowledges at once."
    def send(self, method, url, headers, body):
        told = json.loads(body)["newClientOrderId"]
        said = {"orderId": "702345678901234567", "clientOrderId": told, "success": True, "errorCode": "", "errorMessage": ""}
        return Response(200, {}, json.dumps(said).encode())


def peer():
    "(microseconds, version) of ccxt building and signing the same request."
    try: import ccxt
    except ImportError: return None, None
    if not hasattr(ccxt, "weex"): return None, None
    ex = ccxt.weex(dict(zip(("apiKey", "secret", "password"), KEYS)))
    return micros(lambda: ex.sign("capi/v3/order", ["contractPrivate"], "POST", dict(ORDER)), 1000), ccxt.__version__


def bench():
    "The rows."
    me = Credentials(*KEYS)
    ours = micros(lambda: build_request("POST", "https://api-contract.weex.com", "/capi/v3/order", None, ORDER, me, "1700000000000"))
    theirs, version = peer()
    c = WeexAPIClient(credentials=me, env=Env(VirtualClock(), np.random.default_rng(0), Instant()), budgets={})
    order = OrderRequest("BTCUSDT", "BUY", Decimal("0.01"), "my-order-0001", "LONG", "LIMIT", Decimal(69000))
    rate = 1e6 / micros(lambda: c.place(order))
    return [dict(name="build and sign a request", value=round(ours, 1), unit="us", peer="ccxt", peer_version=version,
                 ratio=None if theirs is None else round(theirs / ours, 2), goal=100.0, ok=ours < 100.0, command=COMMAND),
            dict(name="orders through the client, in process, instant venue", value=round(rate), unit="1/s", peer=None, peer_version=None,
                 ratio=None, goal=4000.0, ok=rate >= 4000.0, command=COMMAND)]


if __name__ == "__main__": print(json.dumps(bench(), indent=1))
