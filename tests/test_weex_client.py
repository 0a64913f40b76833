"""weex.client against everything that can go wrong between two machines."""
import io
import json
import os
import re
import socket
import struct
import threading
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from decimal import Decimal as D
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weex_canned import CHANGES, FIXTURES, GOLDEN, MARKETS, ME, READS, RECORDED, SECRETS, SETTINGS, calls, client, order

from stratfam.core import ConfigError, Env, Response, VirtualClock
from stratfam.weex import client as weex
from stratfam.weex import wire
from stratfam.weex.client import ACK, REFUSED, UNKNOWN, Ambiguous, Malformed, NotSent, Outcome, SandboxBreach
from stratfam.weex.wire import RateLimiter, RequestsTransport, Throttled, WeexError, WireLog, build_request


# The recordings: every call of every dialect reads its recorded answer.

@pytest.mark.parametrize(("market", "name", "call"), calls(READS), ids=lambda v: v if isinstance(v, str) else "")
def test_recorded_reads_parse(market, name, call):
    c = client(**MARKETS[market])
    got = call(c)
    assert got and not isinstance(got, Outcome), f"{name}: {got!r}"


@pytest.mark.parametrize(("market", "name", "call"), calls(CHANGES, SETTINGS), ids=lambda v: v if isinstance(v, str) else "")
def test_recorded_changes_are_acknowledged(market, name, call):
    c = client(**MARKETS[market])
    got = call(c)
    assert got.kind == ACK, got


def test_every_private_endpoint_of_the_tables_has_a_method_or_a_reason():
    "A documented endpoint nobody calls is a hole; these are named on purpose."
    reached = {(m, urlsplit(u).path) for market, _, call in calls(READS, CHANGES, SETTINGS) for c in [client(**MARKETS[market])]
               for _ in [call(c)] for m, u, _, _ in c.transport.sent}
    idle = {n for t in (weex.CONTRACT_V3, weex.SPOT_V3, weex.CONTRACT_V2) for n, e in t.items() if (e.method, e.path) not in reached}
    assert idle == {"trades", "index_klines", "mark_klines", "symbol_price", "open_interest", "ping", "coins", "last_price",
                    "bills", "funding_bills", "transfers", "tickers", "index", "accounts",  # through read(name, ...)
                    "margin_mode"}  # V2 does not read it back, so its outcome is never ACK and it is not in the table of calls


def test_a_read_by_name_carries_its_parameters_where_the_method_wants_them():
    c = client("spot", spoil=lambda *a: Response(200, {}, b"[]"))
    assert c.read("bills", limit=5) == [] == c.read("trades", symbol="BTCUSDT")
    assert [(m, u.partition("?")[2], b) for m, u, _, b in c.transport.sent] == [("POST", "", b'{"limit":5}'), ("GET", "symbol=BTCUSDT", b"")]


def test_ids_are_exact_as_numbers_and_as_text():
    raw = RECORDED["replies"]["GET /capi/v3/order"]
    for form in (737185556881998184, "737185556881998184"):
        c = client(spoil=lambda key, answer, headers, form=form: Response(200, {}, json.dumps(raw | {"orderId": form}).encode()))
        assert c.order("737185556881998184").order_id == "737185556881998184"
    c = client(spoil=lambda *a: Response(200, {}, b'{"orderId":737185556881998184.0,"symbol":"X"}'))
    with pytest.raises(Malformed): c.order("737185556881998184")


# Signing, against an independent implementation.

@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["GET", "POST", "DELETE"]), st.dictionaries(st.from_regex(r"[a-zA-Z]{1,12}", fullmatch=True),
       st.one_of(st.integers(0, 10**18), st.text(st.characters(codec="utf-8"), max_size=20)), max_size=5), st.integers(10**12, 10**13 - 1))
def test_signature_equals_a_second_implementation(method, params, stamp):
    "The signature covers exactly method, target and body as they are sent."
    import base64
    import hashlib
    import hmac
    query, body = (params, None) if method != "POST" else (None, params)
    r = build_request(method, "https://api-contract.weex.com", "/capi/v3/x", query, body, ME, str(stamp))
    target = r.url.removeprefix("https://api-contract.weex.com")
    assert target.isascii() and " " not in target
    mac = hmac.new(GOLDEN["secret"].encode(), f"{stamp}{method}{target}".encode() + r.body, hashlib.sha256)
    assert str(r.headers["ACCESS-SIGN"]) == base64.b64encode(mac.digest()).decode()
    assert method != "POST" or json.loads(r.body) == params


def test_signature_equals_ccxt():
    ccxt = pytest.importorskip("ccxt")
    if not hasattr(ccxt, "weex"): pytest.skip("this ccxt has no weex")
    ex = ccxt.weex({"apiKey": GOLDEN["key"], "secret": GOLDEN["secret"], "password": GOLDEN["passphrase"]})
    ex.nonce = lambda: 1700000000000
    rng, compared = np.random.default_rng(3), 0
    for _ in range(100):
        params = {f"k{i}": rng.choice(["BTCUSDT", "a:b/c", "x y", "é", "0.01"]) for i in range(rng.integers(1, 5))}
        params = {k: str(v) for k, v in params.items()}
        for method in ("GET", "POST", "DELETE"):
            theirs = ex.sign("capi/v3/order", ["contractPrivate"], method, params)
            ours = build_request(method, "https://api-contract.weex.com", "/capi/v3/order", None if method == "POST" else params,
                                 params if method == "POST" else None, ME, "1700000000000")
            same = (theirs["url"], (theirs["body"] or "").encode()) == (ours.url, ours.body)
            compared += same  # some versions of ccxt write a blank as "+", or escape letters outside ASCII
            assert not same or theirs["headers"]["ACCESS-SIGN"] == str(ours.headers["ACCESS-SIGN"])
    assert compared > 50


# Outcomes: one send per change, and the right word for what is known.

PLAIN = {"refused connection": (NotSent("x"), REFUSED), "reset": (Ambiguous("x"), UNKNOWN), "502 page": (Response(502, {}, b"<html>"), UNKNOWN),
         "500 with a code": (Response(500, {}, b'{"code":-1140,"msg":"x"}'), UNKNOWN),
         "redirect": (Response(302, {"location": "https://x"}, b""), UNKNOWN),
         "200 page": (Response(200, {}, b"<html>"), UNKNOWN),
         "empty": (Response(200, {}, b""), UNKNOWN), "number": (Response(200, {}, b"7"), UNKNOWN),
         "half": (Response(200, {}, b'{"orderId":"70234'), UNKNOWN), "400 without code": (Response(400, {}, b"{}"), UNKNOWN),
         "refusal": (Response(400, {}, b'{"code":-1140,"msg":"x"}'), REFUSED),
         "refusal with 200": (Response(200, {}, b'{"code":-1058,"msg":"x"}'), REFUSED),
         "success false": (Response(200, {}, b'{"success":false,"errorCode":"-3007","errorMessage":"x"}'), REFUSED),
         "engine fault": (Response(400, {}, b'{"code":-1000,"msg":"x"}'), UNKNOWN),
         "system error": (Response(200, {}, b'{"code":-1054,"msg":"busy"}'), UNKNOWN),
         "engine refusal": (Response(200, {}, b'{"code":-1054,"msg":"INVALID_ARGUMENT: x"}'), REFUSED),
         "429 bare": (Response(429, {"retry-after": "1"}, b""), UNKNOWN),
         "429 with code": (Response(429, {}, b'{"code":"429","msg":"Too many requests"}'), REFUSED),
         "418": (Response(418, {}, b'{"code":"429","msg":"Too many requests"}'), UNKNOWN)}


@pytest.mark.parametrize("fault", PLAIN)
@pytest.mark.parametrize(("market", "name", "call"), calls(CHANGES), ids=lambda v: v if isinstance(v, str) else "")
def test_a_change_is_sent_once_and_ends_in_the_right_word(fault, market, name, call):
    answer, kind = PLAIN[fault]

    def spoil(key, good, headers):
        if isinstance(answer, Exception): raise answer
        return answer
    c = client(**MARKETS[market], spoil=spoil)
    got = call(c)
    assert got.kind == kind, (fault, got)
    assert len(c.transport.sent) == 1 and isinstance(got.error, WeexError)


@pytest.mark.parametrize("fault", [f for f in PLAIN if f not in ("refusal", "refusal with 200", "success false", "engine refusal", "418", "number")])
def test_a_read_is_asked_again(fault):
    answer, tries = PLAIN[fault][0], []

    def spoil(key, good, headers):
        tries.append(key)
        if len(tries) > 2: return good
        if isinstance(answer, Exception): raise answer
        return answer
    c = client(spoil=spoil)
    assert c.balance()["USDT"].total == D("5696.49288823")
    assert len(tries) == 3 and c.env.clock.monotonic() > 0


def test_a_read_gives_up_and_raises():
    def spoil(key, good, headers): raise Ambiguous("reset")
    c = client(spoil=spoil)
    with pytest.raises(Ambiguous): c.positions()
    assert len(c.transport.sent) == 4


def test_a_setting_counts_only_when_it_is_read_back():
    state = RECORDED["replies"]["GET /capi/v3/account/symbolConfig"][0]

    def told(**now):
        def spoil(key, good, headers): return good if key.startswith("POST") else Response(200, {}, json.dumps([state | now]).encode())
        return client(spoil=spoil)
    assert told(crossLeverage="7").set_leverage("DOGEUSDT", 7).kind == ACK
    assert told(crossLeverage="20").set_leverage("DOGEUSDT", 7).kind == UNKNOWN
    assert told(isolatedLongLeverage="7").set_leverage("DOGEUSDT", 7, "ISOLATED").kind == UNKNOWN  # one side of two
    assert told(marginType="CROSSED").set_margin_mode("DOGEUSDT", "ISOLATED").kind == UNKNOWN


def test_an_answer_to_another_request_is_not_believed():
    always = lambda key: client(spoil=lambda *a: Response(200, {}, json.dumps(RECORDED["replies"][key]).encode()))
    assert always("POST /capi/v3/order").place(order(client_id="mine-2")).kind == UNKNOWN
    assert always("POST /capi/v3/order").cancel("7").kind == UNKNOWN
    with pytest.raises(Malformed): always("GET /capi/v3/order").order("7")
    with pytest.raises(Malformed): always("GET /capi/v3/market/premiumIndex").funding_now("BTCUSDT")


@pytest.mark.parametrize("skew_ms", [-90_000, -31_000, 31_000, 3_600_000])
def test_an_expired_timestamp_is_signed_again_once_with_the_same_client_id(skew_ms):
    def spoil(key, good, headers):
        now = c.env.clock.now_ns() // 10**6 + skew_ms
        if key.endswith("/time"): return Response(200, {}, json.dumps({"serverTime": now}).encode())
        if abs(int(headers["ACCESS-TIMESTAMP"]) - now) > 30_000: return Response(400, {}, b'{"code":-1046,"msg":"expired"}')
        return good
    c = client(spoil=spoil)
    assert c.place(order()).kind == ACK
    orders = [s for s in c.transport.sent if s[0] == "POST"]
    assert len(orders) == 2 and orders[0][3] == orders[1][3] and orders[0][2]["ACCESS-SIGN"] != orders[1][2]["ACCESS-SIGN"]
    assert c.cancel("702345678901234567").kind == ACK and len(c.transport.sent) == 8  # the offset is remembered


def test_an_expired_timestamp_of_a_right_clock_is_not_sent_again():
    "The venue may have taken the order, and the answer belong to another request: that is for its lists to say."
    def spoil(key, good, headers):
        if key.endswith("/time"): return Response(200, {}, json.dumps({"serverTime": c.env.clock.now_ns() // 10**6 + 500}).encode())
        return Response(400, {}, b'{"code":-1046,"msg":"expired"}')
    c = client(spoil=spoil)
    got = c.place(order())
    assert (got.kind, type(got.error).__name__, sum(s[0] == "POST" for s in c.transport.sent)) == (REFUSED, "TimestampExpired", 1)


def test_an_expired_timestamp_that_cannot_be_cured_is_refused():
    expired = Response(400, {}, b'{"code":-1046,"msg":"expired"}')

    def dead(key, good, headers):
        if key.endswith("/time"): raise NotSent("x")
        return expired
    c = client(spoil=dead)
    got = c.place(order())
    assert (got.kind, type(got.error).__name__, sum(s[0] == "POST" for s in c.transport.sent)) == (REFUSED, "TimestampExpired", 1)


def test_a_second_signature_that_cannot_leave_does_not_unsend_the_first_request():
    def spoil(key, good, headers):
        if not key.startswith("POST"): return good
        c.limiter.until = c.env.clock.monotonic() + 1000.0
        return Response(400, {}, b'{"code":-1046,"msg":"expired"}')
    c = client(spoil=spoil)
    got = c.place(order())
    assert (got.kind, type(got.error).__name__) == (REFUSED, "TimestampExpired")  # not NotSent, which would end the order without a look


@settings(max_examples=100, deadline=None)
@given(st.integers(-10**7, 10**7), st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=5, max_size=5))
def test_the_clock_offset_is_within_half_a_round_trip(skew_ms, trips):
    legs = iter(trips)

    def spoil(key, good, headers):
        out, back = next(legs)
        c.env.clock.advance(out)
        answer = Response(200, {}, json.dumps({"serverTime": c.env.clock.now_ns() // 10**6 + skew_ms}).encode())
        c.env.clock.advance(back)
        return answer
    c = client(spoil=spoil)
    assert abs(c.sync_clock() - skew_ms) <= 500 * max(a + b for a, b in trips) + 2


# F17: the sandbox flag.

def test_a_demo_client_reaches_no_live_private_path():
    demo = client(demo=True)
    for _, _, call in calls(READS, CHANGES, SETTINGS):
        try: call(demo)
        except (ConfigError, WeexError): continue
    private = [urlsplit(u).path for _, u, headers, _ in demo.transport.sent if "ACCESS-KEY" in headers]
    assert private and all(p.startswith("/capi/v3/sim/") for p in private)
    assert all("/market/" in urlsplit(u).path for _, u, headers, _ in demo.transport.sent if "ACCESS-KEY" not in headers)


def test_the_flag_holds_even_over_a_wrong_table():
    demo, live = client(demo=True), client()
    demo.table, live.table = weex.CONTRACT_V3, weex.DEMO
    mistakes = ((demo, lambda: demo.place(order())), (demo, demo.balance), (demo, lambda: demo.cancel("7")),
                (live, live.balance), (live, live.positions))
    for c, call in mistakes:
        with pytest.raises(SandboxBreach): call()
        assert c.transport.sent == []


def test_a_probe_is_public_and_unsigned():
    c = client()
    c.probe("/capi/v2/market/ticker", {"symbol": "cmt_btcusdt"})
    assert c.transport.sent[0][0] == "GET" and "ACCESS-KEY" not in c.transport.sent[0][2]
    for path in ("/capi/v3/order", "/capi/v3/market/../order", "/capi/v3/account/balance", "/capi/v3/market/x?y"):
        with pytest.raises(ConfigError): c.probe(path, {})


# Rate limits.

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50), st.booleans()), min_size=1, max_size=60))
def test_no_window_ever_holds_more_than_its_limit(steps):
    env = Env(VirtualClock(), np.random.default_rng(0))
    lim, log = RateLimiter(env, {"w": (100, 10.0, 30)}), []
    for pause, weight, urgent in steps:
        env.clock.advance(pause)
        lim.acquire({"w": weight}, urgent, max_wait=1e9)
        now = env.clock.monotonic()
        log.append((now, weight))
        used = sum(w for t, w in log if t > now - 10.0 + 1e-9)
        assert used <= (100 if urgent else 70)


def test_entries_leave_room_for_exits():
    c = client(budgets=None)
    kinds = []
    for i in range(45):
        c.env.clock.advance(1.0)
        kinds.append(c.place(order(client_id=f"e-{i}")))
    refused = [o for o in kinds if o.kind == REFUSED]
    assert len(refused) == 5 and all(isinstance(o.error, Throttled) for o in refused)  # 40 a minute, and nothing was sent
    for i in range(10): assert not isinstance(c.place(order(client_id=f"x-{i}", side="SELL"), urgent=True).error, Throttled)
    assert sum(s[0] == "POST" for s in c.transport.sent) == 50 and c.env.clock.monotonic() < 46


@pytest.mark.parametrize(("header", "least", "most"), [("7", 7, 8), ("0.5", 0.5, 0.6), ("Thu, 09 Apr 2026 18:28:53 GMT", 600, 700), ("soon", 1, 1.2),
                                                       ("", 1, 1.2), ("-5", 1, 1.2), ("99999999", 3600, 3961), ("1e9", 1, 1.2)])
def test_retry_after_is_honoured(header, least, most):
    tries = []

    def spoil(key, good, headers):
        tries.append(c.env.clock.monotonic())
        return Response(429, {"retry-after": header} if header else {}, b"slow down") if len(tries) == 1 else good
    c = client(spoil=spoil)
    if least > 60:
        with pytest.raises(Throttled): c.balance()
        assert least <= c.limiter.until <= most
    else:
        c.balance()
        assert least <= tries[1] - tries[0] <= most + 1.0


def test_a_ban_stops_everything_for_two_minutes():
    c = client(spoil=lambda *a: Response(418, {}, b""))
    with pytest.raises(WeexError): c.balance()
    assert len(c.transport.sent) == 1
    assert isinstance(c.place(order(), urgent=True).error, Throttled) and len(c.transport.sent) == 1


# Secrets.

def test_secrets_reach_no_log_exception_or_repr(tmp_path):
    "Key, secret, passphrase and signatures: zero bytes anywhere, with a venue that echoes our headers in every form."
    def echo(key, good, headers):
        shout = " ".join(str(v) for v in headers.values()) + " " + GOLDEN["secret"]
        turn = len(c.transport.sent) % 5
        if turn == 0: raise Ambiguous("reset")
        body = [json.dumps({"code": -1047, "msg": shout}), f"<html>{shout}</html>",
                json.dumps({"success": False, "errorMessage": shout.replace("/", "\\/")}),
                json.dumps([{"orderId": shout, "success": False, "errorMessage": shout}])][turn - 1]
        return Response((401, 200, 200, 200)[turn - 1], {"x-echo": shout}, body.encode())
    out, seen = io.StringIO(), []
    with redirect_stdout(out), redirect_stderr(out):
        for market in MARKETS:
            c = client(**MARKETS[market], spoil=echo, log=WireLog(tmp_path / "weex_api.log"), attempts=2)
            for m, _, call in calls(READS, CHANGES, SETTINGS):
                if m != market: continue
                for _ in range(3):
                    try: got = call(c)
                    except WeexError as e: seen += ["".join(traceback.format_exception(e)), repr(e), repr(vars(e))]
                    else:
                        seen.append(repr(got))
                        if isinstance(got, Outcome) and got.error: seen += ["".join(traceback.format_exception(got.error)), str(got.error)]
            seen += [repr(c), repr(ME), repr(c.transport.sent), repr(vars(c.limiter))]
    text = "".join(seen) + out.getvalue() + "".join(p.read_text() for p in tmp_path.iterdir())
    signatures = {str(s[2]["ACCESS-SIGN"]) for s in c.transport.sent if "ACCESS-SIGN" in s[2]}
    assert len(text) > 100_000 and len(signatures) > 20
    for word in (*SECRETS, *signatures): assert word not in text and word.replace("/", "\\/") not in text


@pytest.mark.parametrize("secret", ['a"b\\c', "a/b+c=", "%41%20"])
def test_awkward_secrets_are_redacted_in_every_form(secret):
    from urllib.parse import quote
    c = wire.Credentials("key-0001", secret, "pass-0001")
    for form in (secret, json.dumps(secret), json.dumps(json.dumps(secret)), quote(secret, safe="")):
        clean = c.redact(f"x {form} y")
        assert secret not in clean and json.dumps(secret)[1:-1] not in clean and quote(secret, safe="") not in clean


def test_a_full_disk_does_not_disturb_a_call(tmp_path):
    c = client(log=WireLog(tmp_path / "weex_api.log"))
    c.log.handler.stream.close()
    assert c.place(order()).kind == ACK and c.log.handler.lost == 1


# The transport over real sockets.

@contextmanager
def server(*scripts):
    "A raw TCP server: one script (bytes, or a function of the connection) per connection; records what arrives."
    seen, ls = [], socket.create_server(("127.0.0.1", 0))
    ls.settimeout(5)

    def serve():
        for script in scripts:
            try: conn, _ = ls.accept()
            except OSError: return
            with conn:
                conn.settimeout(5)
                for step in script if isinstance(script, list) else [script]:
                    data = b""
                    try:
                        while b"\r\n\r\n" not in data:
                            data += (part := conn.recv(65536))
                            if not part: raise ConnectionResetError
                        head, _, rest = data.partition(b"\r\n\r\n")
                        need = int((re.search(rb"content-length: (\d+)", head, re.I) or [0, 0])[1])
                        while len(rest) < need: rest += conn.recv(65536)
                    except OSError: break
                    seen.append(head + b"\r\n\r\n" + rest)
                    try: step(conn) if callable(step) else conn.sendall(step)
                    except OSError: break
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{ls.getsockname()[1]}", seen
    finally:
        ls.close()
        thread.join(5)


def reply(body=b"{}", status="200 OK", *headers):
    return b"".join([f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n".encode(), *headers, b"\r\n", body])


def test_the_wire_carries_exactly_the_signed_bytes():
    with server([reply(), reply(), reply()]) as (home, seen):
        t = RequestsTransport()
        for r in (build_request("DELETE", home, "/capi/v3/order", {"origClientOrderId": "a:b/c.d_e-1"}, None, ME, "1700000000000"),
                  build_request("POST", home, "/capi/v3/account/marginType", None, {"note": "é中", "x": "~!*'()"}, ME, "1700000000000"),
                  build_request("GET", home, "/api/v3/account/", None, None, ME, "1700000000000")):
            t.send(*r)
            raw = seen[-1]
            assert raw.startswith(f"{r.method} {r.url.removeprefix(home)} HTTP/1.1\r\n".encode())
            assert raw.partition(b"\r\n\r\n")[2] == r.body
            assert b"ACCESS-SIGN: " + str(r.headers["ACCESS-SIGN"]).encode() in raw
        assert len(seen) == 3


def test_redirects_cookies_proxies_and_netrc_are_ignored(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with server([reply(b"{}", "302 Found", b"Location: http://[bad\r\n", b"Set-Cookie: a=b; Path=/\r\n"), reply()]) as (home, seen):
        t = RequestsTransport()
        assert t.send("GET", home + "/x", {}, b"").status == 302
        assert t.send("GET", home + "/x", {}, b"").status == 200
        assert len(seen) == 2 and b"cookie" not in seen[1].lower() and b"authorization" not in seen[1].lower()


def test_a_mutating_call_after_idling_takes_a_new_connection():
    clock = VirtualClock()
    ports = []

    def note(conn):
        ports.append(conn.getpeername()[1])
        conn.sendall(reply())
    with server([note] * 4, [note] * 4) as (home, _):
        t = RequestsTransport(clock, idle_s=5)
        for method, pause in (("POST", 0), ("POST", 4), ("GET", 60), ("POST", 6)):
            clock.advance(pause)
            t.send(method, home + "/x", {}, b"{}" if method == "POST" else b"")
        t.close()
    assert len(ports) == 4 and ports[0] == ports[1] == ports[2] != ports[3]


def test_nothing_is_sent_twice_when_a_kept_connection_dies():
    "The server closes while the POST is on its way: exactly one POST is seen, and the outcome is Ambiguous."
    with server([reply(), lambda conn: conn.close()], [reply()]) as (home, seen):
        t = RequestsTransport()
        t.send("POST", home + "/a", {}, b"{}")
        with pytest.raises(Ambiguous): t.send("POST", home + "/b", {}, b"{}")
        assert sum(s.startswith(b"POST /b") for s in seen) == 1


def test_a_reset_while_the_body_is_written_is_ambiguous():
    "Some bytes have left, the rest cannot: the venue may act on what it has."
    ls = socket.create_server(("127.0.0.1", 0))

    def rude():
        conn, _ = ls.accept()
        conn.recv(1000)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        conn.close()
    threading.Thread(target=rude, daemon=True).start()
    with ls, pytest.raises(Ambiguous): RequestsTransport().send("POST", f"http://127.0.0.1:{ls.getsockname()[1]}/x", {}, b" " * 30_000_000)


def drip(conn):
    conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(30):
        conn.sendall(b" ")
        time.sleep(0.1)


@pytest.mark.parametrize(("name", "script"), [
    ("truncated", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}"), ("too large", reply(b" " * 3000)), ("drips", drip),
    ("endless chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b" " * 1024 + b"\r\n") * 2),
    ("bad chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), ("not HTTP", b"SSH-2.0-x\r\n\r\n"),
    ("nothing", lambda conn: conn.close()),
    ("bad gzip", reply(b"xxxx", "200 OK", b"Content-Encoding: gzip\r\n")), ("silent", lambda conn: time.sleep(1.5)),
    ("many headers", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n")])
def test_a_bad_answer_is_ambiguous(name, script):
    with server(script) as (home, seen):
        start = time.monotonic()
        t = RequestsTransport(read_s=0.5, total_s=0.8, max_body=2000)
        with pytest.raises(Ambiguous) as e: t.send("POST", home + "/capi/v3/order", {}, b"{}")
        assert len(seen) == 1 and time.monotonic() - start < 2.5
        assert e.value.__cause__ is None and e.value.__suppress_context__ or e.value.__context__ is None


def test_what_never_left_is_not_sent():
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    t = RequestsTransport(connect_s=0.5)
    for url in (f"http://127.0.0.1:{port}/x", "http://no-such-host.invalid/x"):
        with pytest.raises(NotSent): t.send("POST", url, {}, b"{}")
    with server(reply()) as (home, seen):  # a TLS handshake with a server that speaks plain HTTP
        with pytest.raises(NotSent): t.send("POST", home.replace("http:", "https:") + "/x", {}, b"{}")
        assert seen == [] or b"POST" not in seen[0]


# Credentials.

def test_a_file_that_others_may_read_is_refused(tmp_path):
    f = tmp_path / "keys.toml"
    f.write_text('key = "k"\nsecret = "s"\npassphrase = "p"\n')
    for mode in (0o644, 0o604, 0o660, 0o601):
        f.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"): wire.load_credentials(f)
    f.chmod(0o600)
    assert wire.load_credentials(f).sign(b"x") == wire.Credentials("k", "s", "p").sign(b"x")
    with pytest.raises(ConfigError, match="others could read|cannot be read"): wire.load_credentials(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="others could read"): wire.load_credentials(tmp_path / "pipe")  # and does not wait for a writer
    for junk in ("key = ", "key = 7\nsecret = 's'\npassphrase='p'", "\xff"):
        f.write_text(junk, encoding="latin-1")
        f.chmod(0o600)
        with pytest.raises(ConfigError) as e: wire.load_credentials(f)
        assert "'s'" not in str(e.value)
    assert FIXTURES.exists()
