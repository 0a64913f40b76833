"""weex.stream: the book against a model, the thread against real sockets, and what a broken line does."""
import json
import socket
import threading
import time
from decimal import Decimal as D

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import WebSocketException
from weex_canned import GOLDEN, ME, RECORDED

from stratfam.core import Env, SystemClock, VirtualClock
from stratfam.weex.client import SandboxBreach, WeexAPIClient
from stratfam.weex.stream import MAX_FRAME, SILENCE_S, Bad, Denied, Ready, Resync, Send, Stream, StreamCore, Update, channel, open_socket


def level(side, i): return [str(D(100) - i if side == "b" else D(101) + i), None]


CHANGE = st.tuples(st.sampled_from("ba"), st.integers(0, 20), st.integers(0, 5))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(CHANGE, max_size=6), min_size=1, max_size=30), st.sets(st.integers(0, 29), max_size=3),
       st.sets(st.integers(0, 29), max_size=2))
def test_a_book_equals_the_model_or_says_that_it_does_not(steps, lost, doubled):
    "Whatever is lost or doubled: every published book equals the truth, and after a loss comes a Resync before the next book."
    core, truth, number, blind = StreamCore(), {"b": {}, "a": {}}, 100, False
    core.subscribe(["X@depth15"], 0.0)
    core.feed('{"result":true,"id":1}')
    frame = lambda e, u0, u1, d: json.dumps({"e": e, "E": 1, "s": "X", "U": u0, "u": u1, "d": "x", "b": d["b"], "a": d["a"]})
    everything = lambda: {s: [[str(p), str(q)] for p, q in truth[s].items()] for s in "ba"}
    core.feed(frame("depthSnapshot", 0, number, everything()))
    for i, step in enumerate(steps):
        change = {"b": [], "a": []}
        for side, at, quantity in step:
            price = D(100) - at if side == "b" else D(101) + at
            change[side].append([str(price), str(quantity)])
            if quantity: truth[side][price] = D(quantity)
            else: truth[side].pop(price, None)
        before, number = number, number + 1 + i % 3
        if i in lost:
            blind = True
            continue
        events = [e for _ in range(2 if i in doubled else 1) for e in core.feed(frame("depth", before, number, change))]
        if blind or i in doubled: assert any(isinstance(e, Resync) for e in events)
        for e in events:
            if isinstance(e, Update):
                assert not blind and (dict(e.data.bids), dict(e.data.asks)) == ({p: truth["b"][p] for p in sorted(truth["b"])[::-1][:15]},
                                                                                 {p: truth["a"][p] for p in sorted(truth["a"])[:15]})
        if blind or i in doubled:  # the venue answers the new subscription with a snapshot
            asked = [json.loads(e.text) for e in events if isinstance(e, Send)]
            assert [a["method"] for a in asked] == ["UNSUBSCRIBE", "SUBSCRIBE"]
            assert core.feed(frame("depth", number, number, {"b": [], "a": []})) == []
            core.feed(json.dumps({"result": True, "id": asked[1]["id"]}))
            got = core.feed(frame("depthSnapshot", 0, number, everything()))
            assert isinstance(got[0], Update)
            blind = False
    assert core.trouble(10.0) == ""


def test_recorded_frames_are_understood():
    core = StreamCore()
    core.wanted = ["ETHUSDT@ticker", "ETHUSDT@trade", "ETHUSDT@kline_1h_LAST_PRICE", "ETHUSDT@depth15", "orders", "fill", "positions", "account"]
    core.opened(0.0)
    kinds = [type(e).__name__ for f in RECORDED["frames"] if "event" not in f or f["event"] == "ping" for e in core.feed(json.dumps(f))]
    assert "Bad" not in kinds and kinds.count("Update") == 8  # all but the spot book ticker and the depth change without its snapshot
    spot = StreamCore("spot")
    spot.wanted = ["ETHUSDT@bookTicker"]
    spot.opened(0.0)
    u, = spot.feed(json.dumps(next(f for f in RECORDED["frames"] if f.get("e") == "bookTicker")))
    assert (u.data.bid, u.data.ask) == (D("2227.39"), D("2227.40"))


def test_a_refused_subscription_names_its_channels():
    core = StreamCore()
    core.subscribe(["ASDF@ticker", "B@ticker"], 0.0)
    got = core.feed('{"result":false,"id":"1","msg":"INVALID_ARGUMENT: invalid symbol"}')
    assert got == [Denied(("ASDF@ticker", "B@ticker"), "INVALID_ARGUMENT: invalid symbol")]
    assert core.trouble(60.0) == ""


def test_silence_and_unanswered_subscriptions_are_trouble():
    core = StreamCore()
    core.subscribe(["X@ticker"], 0.0)
    assert core.trouble(10.0) == "" and "X@ticker" in core.trouble(16.0)
    core.feed('{"result":true,"id":1}', 20.0)
    assert core.trouble(20.0 + SILENCE_S) == "" and "silent" in core.trouble(21.0 + SILENCE_S)
    core.feed('{"event":"ping","time":"1"}', 500.0)
    assert core.trouble(501.0) == ""


def test_reconnecting_forgets_and_asks_again():
    core = StreamCore()
    core.subscribe(["orders", "X@depth15"], 0.0)
    order = next(f for f in RECORDED["frames"] if f.get("e") == "orders")
    assert [type(e) for e in core.feed(json.dumps(order))] == [Update]
    assert core.feed(json.dumps(order)) == []
    events = core.opened(5.0)
    assert json.loads(events[0].text)["params"] == ["orders", "X@depth15"] and events[1] == Resync("*", "connected")
    assert [type(e) for e in core.feed(json.dumps(order))] == [Update]  # a new connection numbers anew


@pytest.mark.parametrize("frame", ["", "x" * (MAX_FRAME + 1), b"\xff\xfe", "[" * 100_000, '{"e":5}', '{"result":"yes"}', '{"e":"orders","d":{}}',
                                   '{"e":"orders","v":"x","d":[]}'])
def test_a_frame_nobody_understands_is_bad_and_asks_for_a_look(frame):
    assert [type(e) for e in StreamCore().feed(frame)] == [Bad, Resync]


# The thread.

def own_client(**kwargs): return WeexAPIClient(credentials=ME, env=Env(SystemClock(), np.random.default_rng(1)), **kwargs)


def wait_for(stream, condition, seconds=8.0):
    "Poll until `condition(events so far)`."
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        seen += stream.poll()
        if condition(seen): return seen
        time.sleep(0.02)
    raise AssertionError(f"not seen within {seconds} s: {seen}")


@pytest.fixture
def echo_server():
    "A WebSocket server: acknowledges, sends a ping and an order, and drops the first connection."
    from websockets.sync.server import serve
    seen = {"paths": [], "headers": [], "frames": []}

    def handle(ws):
        seen["paths"].append(ws.request.path)
        seen["headers"].append(dict(ws.request.headers.raw_items()))
        for text in ws:
            frame = json.loads(text)
            seen["frames"].append(frame)
            if frame["method"] == "SUBSCRIBE":
                ws.send(json.dumps({"result": True, "id": frame["id"]}))
                ws.send('{"type":"ping","time":"1"}')
                ws.send(json.dumps(next(f for f in RECORDED["frames"] if f.get("e") == "orders")))
            elif frame["method"] == "PONG" and len(seen["paths"]) == 1: ws.close()
    with serve(handle, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/contract", seen
        server.shutdown()


def test_a_dropped_connection_is_made_again_and_the_consumer_is_told(echo_server):
    url, seen = echo_server
    s = Stream(own_client(), ["orders"], private=True, base_url=url).start()
    try: events = wait_for(s, lambda e: sum(isinstance(x, Update) for x in e) >= 2)
    finally: s.stop()
    assert seen["paths"][:2] == ["/contract/v3/ws/private"] * 2 and s.connections == 2 and s.thread is None
    assert [e.reason.split(":")[0] for e in events if isinstance(e, Resync)][:3] == ["connected", "disconnected", "connected"]
    assert Ready(("orders",)) in events
    assert {"ACCESS-KEY", "ACCESS-SIGN", "ACCESS-TIMESTAMP", "ACCESS-PASSPHRASE"} <= seen["headers"][0].keys()
    shown = repr(events) + repr(s) + repr(s.headers())
    for word in (GOLDEN["key"], GOLDEN["passphrase"], seen["headers"][0]["ACCESS-SIGN"]): assert word not in shown


def test_a_dead_host_is_tried_again_with_growing_pauses():
    class Recording:
        "stopping.wait remembers its pauses and gives up after some."
        def __init__(self): self.pauses = []
        def is_set(self): return len(self.pauses) >= 9
        def wait(self, seconds): self.pauses.append(seconds)
    def dead(url, headers): raise ConnectionRefusedError
    s = Stream(WeexAPIClient(env=Env(VirtualClock(), np.random.default_rng(2))), ["X@ticker"], connect=dead)
    s.stopping = Recording()
    s._run()
    p = s.stopping.pauses
    assert 1.0 <= p[0] <= 3.0 and p[4] > p[1] and 30 <= p[8] <= 90
    assert {e.reason for e in s.poll()} == {"disconnected: ConnectionRefusedError"}


def test_a_redirect_is_not_followed():
    "The handshake headers would go to another place."
    with socket.create_server(("127.0.0.1", 0)) as ls:
        ls.settimeout(5)
        port, got = ls.getsockname()[1], []

        def serve():
            for _ in range(2):
                try: conn, _ = ls.accept()
                except OSError: return
                with conn:
                    got.append(conn.recv(65536))
                    conn.sendall(f"HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:{port}/elsewhere\r\nContent-Length: 0\r\n\r\n".encode())
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises((ValueError, WebSocketException)):
            with open_socket(f"ws://127.0.0.1:{port}/v3/ws/private", {"ACCESS-KEY": "k"}): pass
        assert len(got) == 1 and b"elsewhere" not in got[0]


def test_a_consumer_who_stops_looking_costs_no_memory():
    s = Stream(own_client(), [], capacity=50)
    s.put([Ready((str(i),)) for i in range(1000)])
    events = s.poll()
    assert len(events) <= 50 and any(isinstance(e, Resync) for e in events)


def test_a_demo_client_gets_no_private_stream():
    with pytest.raises(SandboxBreach): Stream(own_client(demo=True), ["orders"], private=True)
    assert Stream(own_client(demo=True), [channel(own_client(demo=True), "depth", "BTCUSDT")]).headers() == {}
