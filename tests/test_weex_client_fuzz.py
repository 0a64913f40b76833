"""Mutated bodies and frames: only typed errors, no crash, no hang, no order that nobody asked for."""
import json
import random
import time

import pytest
from weex_canned import CHANGES, MARKETS, READS, RECORDED, SETTINGS, calls, client

from stratfam.core import ConfigError, DataError, Response
from stratfam.weex.client import ACK, REFUSED, UNKNOWN, Outcome
from stratfam.weex.stream import Bad, Denied, Ready, Resync, Send, StreamCore, Update
from stratfam.weex.wire import WeexError

ODD = [None, True, False, 0, -1, 10**40, 737185556881998184, "", "0", "-1", "NaN", "Infinity", "1e999999999", "1e30", "x" * 600, "\ud800", "é",
       [], {}, [[]], {"code": -1}, "LONG", "SELL", "FILLED", 1.5, -0.0, 1e308, "9" * 400, "2023-01-01", "00000", "429", "1_0", {"a": {"b": []}}]
TOKENS = [b"null", b"true", b"[", b"]", b"{", b"}", b'"', b"\\", b"\xff", b"\x00", b"1e9999999", b"NaN", b"<html>", b"9" * 60, b"-", b",", b":",
          b"\\u0000"]


def places(x, at=()):
    "Every place inside a JSON value."
    yield at
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for k, v in items: yield from places(v, (*at, k))


def changed(x, at, what, rng):
    "`x` with the value at one place replaced, removed or doubled."
    if not at: return what
    x = dict(x) if isinstance(x, dict) else list(x)
    k, rest = at[0], at[1:]
    if rest: x[k] = changed(x[k], rest, what, rng)
    elif rng.random() < 0.25: del x[k]
    elif isinstance(x, list) and rng.random() < 0.3: x += [x[k]] * rng.choice([1, 200])
    else: x[k] = what
    return x


def mutated(value, rng):
    "Bytes that resemble the JSON of `value`."
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at = rng.choice(list(places(value)))
        value = changed(value, at, rng.choice(ODD), rng)
    try: body = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError): body = b"{}"
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        i = rng.randrange(len(body) + 1)
        kind = rng.randrange(4)
        if kind == 0: body = body[:i]
        elif kind == 1: body = body[:i] + rng.choice(TOKENS) + body[i:]
        elif kind == 2: body = body[:i] + bytes([rng.randrange(256)]) + body[i + 1:]
        else: body = body + body[i:]
    return body


ALL = calls(READS, CHANGES, SETTINGS)


def fuzz_bodies(seed, n):
    "`n` mutated replies to calls chosen at random; returns how each ended."
    rng, ends, left = random.Random(seed), {}, n

    def spoil(key, good, headers):
        nonlocal left
        left -= 1
        value = RECORDED["replies"].get(key, {}) if rng.random() < 0.8 else rng.choice(RECORDED["refusals"])
        status = rng.choice([200] * 8 + [400, 401, 404, 418, 429, 500, 502, 302, 204])
        wait = rng.choice(["1", "x", "-1", "1e999", "9" * 30, "Thu, 99 Foo", "Thu, 09 Apr 2026 18:28:53 GMT"])
        return Response(status, {"retry-after": wait} if rng.random() < 0.1 else {}, mutated(value, rng))

    while left > 0:
        market, name, call = rng.choice(ALL)
        c = client(**MARKETS[market], spoil=spoil, attempts=2)
        changing = name in CHANGES or name in SETTINGS
        try: got = call(c)
        except (WeexError, DataError, ConfigError) as e:
            assert not changing, (name, e)  # a change reports, it does not raise
            assert isinstance(e, WeexError), (name, e)
            end = type(e).__name__
        else:
            end = got.kind if isinstance(got, Outcome) else "value"
            assert changing == isinstance(got, Outcome) and end in (ACK, REFUSED, UNKNOWN, "value")
        sent = [s for s in c.transport.sent if s[0] != "GET" and not s[1].endswith(("/income", "/bills"))]
        assert len(sent) <= (2 if changing else 0), (name, sent)  # two: the one re-signed retry
        assert len({s[3] for s in sent}) <= 1
        ends[end] = ends.get(end, 0) + 1
    return ends


def fuzz_frames(seed, n):
    "`n` mutated frames to cores of both dialects."
    rng, ends = random.Random(seed), {}
    wanted = {"v3": ["ETHUSDT@ticker", "ETHUSDT@trade", "ETHUSDT@kline_1h_LAST_PRICE", "ETHUSDT@depth15", "orders", "fill", "positions", "account"],
              "v2": ["kline.LAST_PRICE.cmt_btcusdt.MINUTE_1", "orders"]}
    for i in range(n):
        if i % 500 == 0:
            core = StreamCore(dialect=rng.choice(["v3", "v3", "v3", "v2"]))
            core.wanted = wanted[core.dialect]
            core.opened(0.0)
        frame = mutated(rng.choice(RECORDED["frames"]), rng)
        events = core.feed(frame if rng.random() < 0.5 else frame.decode("utf-8", "replace"), float(i))
        for e in events:
            assert isinstance(e, Send | Ready | Denied | Resync | Bad | Update)
            if isinstance(e, Send): assert len(e.text) < 2000 and json.loads(e.text).keys() & {"method", "event"}
            ends[type(e).__name__] = ends.get(type(e).__name__, 0) + 1
        assert isinstance(core.trouble(float(i)), str)
        assert len(core.pending) + len(core.books) + len(core.last_bar) + len(core.version) < 1600
    return ends


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bodies(seed):
    start = time.monotonic()
    ends = fuzz_bodies(seed, 2500)
    assert {"ACK", "UNKNOWN", "REFUSED", "value", "Malformed"} <= ends.keys()
    assert time.monotonic() - start < 60


def test_mutated_frames():
    ends = fuzz_frames(1, 10_000)
    assert {"Send", "Resync", "Bad", "Update"} <= ends.keys()


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(100, 120))
def test_two_hundred_thousand(seed):
    "20 seeds of 6,000 bodies and 4,000 frames."
    fuzz_bodies(seed, 6000)
    fuzz_frames(seed, 4000)
