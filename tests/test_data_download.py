"""Downloads through ccxt itself, from a local exchange that pages, repeats, refuses, drops connections and dies."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratfam.core import ConfigError, DataError, Env, VirtualClock
from stratfam.data.download import OfflineError, add_span, connect, download, missing_spans, pages
from stratfam.data.store import file_note, load_bars, read_funding, save_bars

HOUR, MINUTE = 3_600_000, 60_000
START = 1_700_006_400_000 # 2023-11-15 00:00 UTC
COINS = ("BTC", "ETH", "MATIC")


def candle(i, coin):
    "Bar i of a coin, a pure function of both."
    p = (COINS.index(coin) + 1) * 100 + i % 17
    return [START + i * HOUR, f"{p}", f"{p + 2}", f"{p - 2}", f"{p + 1}", f"{i + 1}", START + (i + 1) * HOUR - 1, "0", 1, "0", "0", "0"]


class Exchange:
    "State of the local exchange; `faults` maps the n-th bar request (from 0) to what goes wrong."
    def __init__(self):
        self.now, self.page, self.faults, self.requests, self.asked = START + 240 * HOUR + 30 * MINUTE, 50, {}, [], 0
        self.absent, self.listed, self.overlap, self.ignores_since, self.everything_fails = set(), 0, 0, False, None
        self.broken = {}

    def bars(self, coin, q):
        newest = (self.now - START) // HOUR # Still open
        rows = [self.broken.get(i, candle(i, coin)) for i in range(self.listed, newest + 1) if i not in self.absent]
        if self.ignores_since: return rows[-self.page:]
        since, until = int(q.get("startTime", 0)), int(q.get("endTime", 1 << 60))
        first = next((k for k, r in enumerate(rows) if r[0] >= since), len(rows))
        return [r for r in rows[max(0, first - self.overlap):] if r[0] <= until][: min(self.page, int(q.get("limit", 500)))]

    def funding(self, q):
        t = range(START, self.now + 1, 8 * HOUR)
        row = lambda x: {"symbol": q["symbol"], "fundingTime": x + 7, "fundingRate": "0.0001", "markPrice": "1"}
        return [row(x) for x in t if x + 7 >= int(q.get("startTime", 0))][:20]

    def binance_symbols(self):
        spot = [{"symbol": f"{c}USDT", "status": "BREAK" if c == "MATIC" else "TRADING", "baseAsset": c, "quoteAsset": "USDT", "filters": [],
                 "permissions": ["SPOT"]} for c in COINS]
        return spot, [s | {"contractType": "PERPETUAL", "marginAsset": "USDT", "pair": s["symbol"], "deliveryDate": 4133404800000} for s in spot]

    def weex_symbols(self):
        spot = [{"symbol": f"{c}USDT", "status": "TRADING", "baseAsset": c, "quoteAsset": "USDT", "tickSize": "0.01", "stepSize": "0.001",
                 "enableTrade": True} for c in COINS]
        perp = [{"symbol": f"{c}USDT", "baseAsset": c, "quoteAsset": "USDT", "marginAsset": "USDT", "pricePrecision": "2", "quantityPrecision": "3",
                 "contractVal": "1", "enableTrade": True} for c in COINS]
        return spot, perp

    def answer(self, path, q):
        if path.endswith("/coins"): return []
        if "xchangeInfo" in path:
            spot, perp = self.weex_symbols() if "weex" in path else self.binance_symbols()
            return {"symbols": perp if "fapi" in path or "capi" in path else spot, "serverTime": self.now}
        if path.endswith("/time"): return {"serverTime": self.now}
        if path.endswith("undingRate"): return self.funding(q)
        return self.bars(q["symbol"].removesuffix("USDT"), q)


def handler(exchange):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): "Say nothing."

        def send(self, status, body, headers=()):
            self.send_response(status)
            for k, v in {"Content-Type": "application/json", "Content-Length": str(len(body)), **dict(headers)}.items(): self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            url = urlsplit(self.path)
            q = {k: v[0] for k, v in parse_qs(url.query).items()}
            fault = exchange.everything_fails
            if "lines" in url.path:
                exchange.requests.append((url.path, q))
                fault = fault or exchange.faults.get(exchange.asked)
                exchange.asked += 1
            if fault == "429": return self.send(429, b'{"code":-1003,"msg":"Too many requests"}', {"Retry-After": "17"})
            if fault == "503": return self.send(503, b"<html>busy</html>", {"Content-Type": "text/html"})
            if fault == "451": return self.send(451, b'{"code":0,"msg":"Service unavailable from a restricted location"}')
            if fault == "drop": return self.connection.close()
            if fault == "half":
                self.send_response(200); self.send_header("Content-Length", "5000"); self.end_headers()
                self.wfile.write(b'[[17000'); return self.connection.close()
            if fault == "html": return self.send(200, b"<html>one moment please</html>", {"Content-Type": "text/html"})
            if fault == "shape": return self.send(200, b'{"surprise": 1}')
            self.send(200, json.dumps(exchange.answer(url.path, q)).encode())
    return Handler


@pytest.fixture
def exchange():
    e = Exchange()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(e))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    e.url = f"http://127.0.0.1:{server.server_port}"
    yield e
    server.shutdown()
    server.server_close()


def line(exchange, name="binance", market="spot"):
    "ccxt, pointed at the local exchange."
    ex = connect(name, market)
    ex.rateLimit = 0.1
    if name == "binance": ex.urls["api"] |= {"public": f"{exchange.url}/api/v3", "fapiPublic": f"{exchange.url}/fapi/v1"}
    else: ex.urls["api"] |= {"public": f"{exchange.url}/weex", "contract": f"{exchange.url}/weex"}
    return ex


@pytest.fixture
def env(): return Env(clock=VirtualClock(), rng=np.random.default_rng(0))


def get(exchange, env, folder, symbols=("BTCUSDT",), start="2023-11-15", end=None, name="binance", market="spot", **more):
    "Download hourly bars from the local exchange."
    return download(line(exchange, name, market), symbols, "1h", start, end, folder, market, env, **more)


def expected(coin, rows): return [float(candle(i, coin)[4]) for i in rows]


def test_paging_without_the_unfinished_bar(exchange, env, tmp_path):
    seen = []
    report = get(exchange, env, tmp_path, ["BTC/USDT", "ETHUSDT"], progress=lambda *a: seen.append(a))
    bars = load_bars(tmp_path)
    assert bars.symbols == ("BTCUSDT", "ETHUSDT") and len(bars) == 240 and bars.ok.all()
    assert bars.close[:, 1].tolist() == expected("ETH", range(240))
    assert report.table["new"].tolist() == [240, 240] and report.table["pages"].tolist() == [5, 5] and not len(report.gaps)
    assert "No gaps" in str(report) and file_note(tmp_path / "BTCUSDT-1h.parquet")["exchange"] == "binance"
    assert seen[4][0] == "BTCUSDT" and seen[4][1] == seen[4][2]
    assert [int(q["startTime"]) for _, q in exchange.requests[:5]] == [START + i * 50 * HOUR for i in range(5)]


def test_a_bar_ends_when_the_exchange_says_so(exchange, env, tmp_path):
    exchange.now = START + 10 * HOUR - 1
    assert get(exchange, env, tmp_path).table["bars"][0] == 9
    exchange.now += 1
    assert get(exchange, env, tmp_path).table["bars"][0] == 10


@pytest.mark.parametrize("fault, least", [("429", 17), ("503", 0.7), ("drop", 0.7), ("half", 0.7), ("html", 0.7)])
def test_one_failure_is_survived(exchange, env, tmp_path, fault, least):
    exchange.faults = {2: fault}
    report = get(exchange, env, tmp_path)
    assert load_bars(tmp_path).close[:, 0].tolist() == expected("BTC", range(240))
    assert report.table["retries"].tolist() == [1] and least <= env.clock.monotonic() < 25


def test_many_failures_end_the_run_and_keep_what_came(exchange, env, tmp_path):
    exchange.faults = dict.fromkeys(range(3, 99), "503")
    with pytest.raises(DataError, match="binance refused: .*503.* Try again later"): get(exchange, env, tmp_path)
    assert len(load_bars(tmp_path)) == 150 and exchange.asked == 9
    exchange.faults = {}
    exchange.requests.clear()
    report = get(exchange, env, tmp_path)
    assert load_bars(tmp_path).close[:, 0].tolist() == expected("BTC", range(240))
    assert report.table["new"].tolist() == [90] and int(exchange.requests[0][1]["startTime"]) == START + 150 * HOUR


def test_a_refusal_for_ever_is_not_repeated(exchange, env, tmp_path):
    exchange.everything_fails = "451"
    with pytest.raises(DataError, match="binance refused: .*restricted location.* another exchange"):
        get(exchange, env, tmp_path)
    assert env.clock.monotonic() == 0


def test_an_answer_that_is_no_answer(exchange, env, tmp_path):
    exchange.faults = dict.fromkeys(range(1, 99), "html")
    with pytest.raises(DataError, match="sent no JSON but '<html>one moment please") as e: get(exchange, env, tmp_path)
    assert "\n" not in str(e.value) and len(load_bars(tmp_path)) == 50


def test_an_answer_of_another_shape(exchange, env, tmp_path):
    exchange.faults = {1: "shape"}
    with pytest.raises(DataError, match="answer that cannot be read") as e: get(exchange, env, tmp_path)
    assert "\n" not in str(e.value) and len(load_bars(tmp_path)) == 50


def test_a_kill_in_the_middle_costs_only_the_tail(exchange, env, tmp_path):
    "Ctrl-C after three pages; the next run asks for the rest alone."
    def stop(symbol, done, total):
        if done == 150 * HOUR: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): get(exchange, env, tmp_path, progress=stop)
    assert len(load_bars(tmp_path)) == 150
    exchange.requests.clear()
    get(exchange, env, tmp_path)
    assert int(exchange.requests[0][1]["startTime"]) == START + 150 * HOUR and len(exchange.requests) == 2
    assert load_bars(tmp_path).close[:, 0].tolist() == expected("BTC", range(240))


def test_a_later_run_fetches_what_is_new_and_what_lies_before(exchange, env, tmp_path):
    ask = lambda start, end=None: get(exchange, env, tmp_path, start=start, end=end).table["new"][0]
    assert ask("2023-11-20", "2023-11-21") == 24
    assert ask("2023-11-20", "2023-11-21") == 0
    assert ask("2023-11-19", "2023-11-21 02:00") == 26
    assert ask("2023-11-15", "2023-11-16") == 24 # Leaves a hole that is known not to be asked for yet
    exchange.now += 3 * HOUR
    assert ask("2023-11-15") == 243 - 24 - 26 - 24
    assert load_bars(tmp_path).close[:, 0].tolist() == expected("BTC", range(243))


def test_gaps_overlaps_and_late_listing(exchange, env, tmp_path):
    exchange.absent, exchange.listed, exchange.overlap = {60, 61, 100, 150}, 5, 3
    report = get(exchange, env, tmp_path)
    bars = load_bars(tmp_path)
    rows = [i for i in range(5, 240) if i not in exchange.absent]
    assert bars.close[bars.ok].tolist() == expected("BTC", rows)
    assert report.gaps["bars"].tolist() == [2, 1, 1] and report.gaps["start"][0] == pd.Timestamp(START + 60 * HOUR, unit="ms", tz="UTC")
    assert report.table[["gaps", "missing", "note"]].values.tolist() == [[3, 4, "nothing served before the first bar"]]
    assert "3 gaps, the longest:" in str(report)


def test_bars_that_are_published_late_are_asked_for_again(exchange, env, tmp_path):
    exchange.absent = {237, 239}
    assert get(exchange, env, tmp_path).table["bars"][0] == 238
    exchange.absent = set()
    report = get(exchange, env, tmp_path)
    assert report.table["new"][0] == 1 and report.gaps["bars"].tolist() == [1] # 239 came; 237 lies behind a bar that was there


def test_an_exchange_that_ignores_since(exchange, env, tmp_path):
    exchange.ignores_since = True
    report = get(exchange, env, tmp_path)
    assert load_bars(tmp_path).close[:, 0].tolist() == expected("BTC", range(191, 240)) and report.table["pages"][0] == 1
    assert report.table["note"][0] == "nothing served before the first bar"


def test_impossible_rows_are_left_out_and_counted(exchange, env, tmp_path):
    bad = candle(7, "BTC")
    bad[2] = "1"
    exchange.broken = {7: bad, 9: [*candle(9, "BTC")[:4], None, *candle(9, "BTC")[5:]]}
    report = get(exchange, env, tmp_path)
    assert report.table[["faulty", "missing"]].values.tolist() == [[2, 2]] and (~load_bars(tmp_path).ok).sum() == 2


@pytest.mark.parametrize("change, text", [
    ({"symbols": ["ETHUSDT", "MATCIUSDT"]}, "Did you mean 'MATICUSDT'"), ({"step": "7m"}, "bar length '7m'"),
    ({"market": "futures"}, "Unknown market"), ({"symbols": []}, "no symbol"),
    ({"start": "2030-01-01"}, "no finished 1h bar"), ({"exchange": "binanze"}, "Did you mean 'binance'")])
def test_names_are_refused_before_anything_is_fetched(exchange, env, tmp_path, change, text):
    good = {"exchange": line(exchange), "symbols": ["BTCUSDT"], "step": "1h", "start": "2023-11-15", "folder": tmp_path, "env": env}
    with pytest.raises(ConfigError, match=text): download(**good | change)
    assert not exchange.requests and not list(tmp_path.iterdir())


def test_nothing_served_is_an_error_and_delisted_coins_are_served(exchange, env, tmp_path):
    exchange.listed = 100
    with pytest.raises(DataError, match="served no bar of BTCUSDT"): get(exchange, env, tmp_path, end="2023-11-15 02:00")
    assert not list(tmp_path.iterdir())
    exchange.listed = 0
    assert get(exchange, env, tmp_path, ["MATICUSDT"]).table["bars"][0] == 240


def test_gaps_can_be_asked_for_again(exchange, env, tmp_path):
    exchange.absent = {60, 61, 100}
    get(exchange, env, tmp_path)
    exchange.absent = {100}
    assert get(exchange, env, tmp_path).table["new"][0] == 0
    assert get(exchange, env, tmp_path, refill=True).table[["new", "missing"]].values.tolist() == [[2, 1]]


def test_two_exchanges_do_not_mix(exchange, env, tmp_path):
    get(exchange, env, tmp_path)
    with pytest.raises(DataError, match="holds data of binance, expected weex"):
        get(exchange, env, tmp_path, name="weex")
    save_bars(load_bars(tmp_path), tmp_path)
    with pytest.raises(DataError, match="does not say which exchange"): get(exchange, env, tmp_path)


@pytest.mark.parametrize("name", ["binance", "weex"])
def test_perpetuals_with_funding(exchange, env, tmp_path, name):
    exchange.page = 100
    report = get(exchange, env, tmp_path, ["BTC/USDT:USDT"], name=name, market="perp")
    bars = load_bars(tmp_path, market="perp")
    assert bars.close[:, 0].tolist() == expected("BTC", range(240)) and report.table["funding"][0] == 31 and report.table["note"][0] == ""
    paid = np.flatnonzero(bars.funding[:, 0])
    assert paid.tolist() == list(range(7, 240, 8)) and len(read_funding(tmp_path / "BTCUSDT-funding.parquet")) == 31
    np.testing.assert_allclose(bars.funding[paid, 0], np.full(30, 1e-4))
    if name == "weex":
        paths = {p for p, _ in exchange.requests}
        assert paths == {"/weex/capi/v3/market/historyKlines"}
        assert all(int(q["endTime"]) <= exchange.now and int(q["endTime"]) - int(q["startTime"]) <= 99 * HOUR for _, q in exchange.requests)
    exchange.now += 8 * HOUR
    again = get(exchange, env, tmp_path, name=name, market="perp")
    assert again.table[["new", "funding"]].values.tolist() == [[8, 32]]


def test_weex_spot_serves_its_latest_bars_only(exchange, env, tmp_path):
    exchange.ignores_since, exchange.page = True, 120
    report = get(exchange, env, tmp_path, name="weex")
    assert load_bars(tmp_path).close[:, 0].tolist() == expected("BTC", range(121, 240)) and "nothing served before" in report.table["note"][0]


def test_offline_is_one_line_and_quick(env, tmp_path):
    ex = connect("binance")
    ex.urls["api"]["public"] = "http://127.0.0.1:9/api/v3"
    with pytest.raises(OfflineError) as e: download(ex, ["BTCUSDT"], "1h", "2023-11-15", folder=tmp_path, env=env)
    text = str(e.value)
    assert "no answer from 127.0.0.1:9" in text and "DATA=" in text and "\n" not in text and isinstance(e.value, DataError)
    assert env.clock.monotonic() < 2 and not list(tmp_path.iterdir())


def test_the_network_may_go_away_half_way(exchange, env, tmp_path):
    exchange.faults = dict.fromkeys(range(2, 99), "drop")
    with pytest.raises(OfflineError, match="no answer from 127.0.0.1"): get(exchange, env, tmp_path)
    assert len(load_bars(tmp_path)) == 100 and exchange.asked == 8


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_spans_are_sets_of_points(pieces, a, b):
    covered = []
    for start, n in pieces: covered = add_span(covered, (start, start + n))
    points = {x for start, n in pieces for x in range(start, start + n)}
    assert {x for p, q in covered for x in range(p, q)} == points
    assert all(p[1] < q[0] for p, q in zip(covered, covered[1:])) and all(p < q for p, q in covered)
    left = missing_spans(covered, a, b)
    assert [x for p, q in left for x in range(p, q)] == [x for x in range(a, b) if x not in points]


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 200)), st.integers(1, 30), st.integers(0, 9), st.integers(0, 100), st.integers(1, 200))
def test_pages_deliver_every_row_once_whatever_the_page(times, size, overlap, start, n):
    rows = [[t] for t in sorted(times)]
    def ask(since):
        first = next((k for k, r in enumerate(rows) if r[0] >= since), len(rows))
        return rows[max(0, first - overlap):][: size + overlap]
    got = list(pages(ask, (start, start + n), 1, size))
    assert [r[0] for part, _ in got for r in part] == [t for t in sorted(times) if start <= t < start + n]
    assert add_span([s for _, s in got][:-1], got[-1][1]) == [(start, start + n)]
