"""A venue that answers every endpoint with a recorded reply, and every call a client has, for the tests of weex.client."""
import json
from decimal import Decimal as D
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from stratfam.core import Env, Response, VirtualClock
from stratfam.weex import symbols  # noqa: F401  adds its methods to the client
from stratfam.weex.client import Credentials, OrderRequest, WeexAPIClient

FIXTURES = Path(__file__).parent / "fixtures/weex"
RECORDED = json.loads((FIXTURES / "replies.json").read_text())
GOLDEN = json.loads((FIXTURES / "golden_vectors.json").read_text())
ME = Credentials(GOLDEN["key"], GOLDEN["secret"], GOLDEN["passphrase"])
SECRETS = (GOLDEN["key"], GOLDEN["secret"], GOLDEN["passphrase"])


class Canned:
    "A transport that answers from the recordings; `spoil` may replace an answer, or raise."
    def __init__(self, spoil=None): self.spoil, self.sent = spoil, []

    def send(self, method, url, headers, body):
        self.sent.append((method, url, dict(headers), body))
        key = f"{method} {urlsplit(url).path}"
        known = key in RECORDED["replies"]
        answer = Response(200 if known else 400, {}, json.dumps(RECORDED["replies"].get(key, RECORDED["refusals"][1]), ensure_ascii=False).encode())
        return answer if self.spoil is None else self.spoil(key, answer, headers)


def client(market="contract", spoil=None, **kwargs):
    "A client of the recorded venue on a clock that moves only when somebody sleeps."
    env = Env(VirtualClock(1_775_758_733_006_000_000), np.random.default_rng(7), Canned(spoil))
    return WeexAPIClient(market, ME, env, **{"budgets": {}, **kwargs})


def order(market="contract", **more):
    side = {} if market == "spot" else {"position_side": "LONG"}
    return OrderRequest(**{"symbol": "BTCUSDT", "side": "BUY", "quantity": D("0.01"), "client_id": "my-order-0001", "type": "LIMIT",
                           "price": D(69000), **side, **more})


T0, T1 = 1_700_000_000_000, 1_700_003_600_000
ID = "702345678901234567"
READS = {  # name: (markets, call); c = contract V3, 2 = contract V2, s = spot
    "server_time": ("c2s", lambda c: c.server_time()), "symbols": ("c2s", lambda c: c.symbols()), "api_symbols": ("c2s", lambda c: c.api_symbols()),
    "available": ("c2s", lambda c: c.get_available_symbols()), "formats": ("c2s", lambda c: c.test_symbol_format("BTCUSDT")),
    "ticker": ("cs", lambda c: c.ticker("ETHUSDT")), "ticker2": ("2", lambda c: c.ticker("BTCUSDT")),
    "best": ("c2s", lambda c: c.best("BTCUSDT")), "depth": ("c2s", lambda c: c.depth("BTCUSDT")),
    "page": ("c2s", lambda c: c.kline_page("BTCUSDT", "1m")),
    "history": ("c2", lambda c: c.kline_page("BTCUSDT", "1m", T0, T1)), "funding": ("c2", lambda c: c.funding_page("ETHUSDT", T0, T1)),
    "now": ("c", lambda c: c.funding_now("ETHUSDT")), "now2": ("2", lambda c: c.funding_now("BTCUSDT")),
    "balance": ("c2s", lambda c: c.balance()), "positions": ("c2", lambda c: c.positions()), "position": ("c", lambda c: c.positions("DOGEUSDT")),
    "position2": ("2", lambda c: c.positions("BTCUSDT")), "may_trade": ("cs", lambda c: c.may_trade()),
    "fees": ("c", lambda c: c.fee_rates("DOGEUSDT")),
    "settings": ("c", lambda c: c.settings("DOGEUSDT")), "settings2": ("2", lambda c: c.settings("BTCUSDT")),
    "order": ("c", lambda c: c.order("737185556881998184")), "order2": ("2", lambda c: c.order("5716595202300")),
    "order_s": ("s", lambda c: c.order("736800333186991070")), "open": ("c2s", lambda c: c.open_orders("DOGEUSDT")),
    "orders": ("c", lambda c: c.order_history(1775758733006, 1775758733006, "DOGEUSDT")),
    "orders2": ("2", lambda c: c.order_history(1716595200000, 1716595200000, "BTCUSDT")),
    "orders_s": ("s", lambda c: c.order_history(1775666888520, 1775666888520, "DOGEUSDT")),
    "fills": ("c", lambda c: c.fills(1775732228692, 1775732228692, "DOGEUSDT")), "fills2": ("2", lambda c: c.fills(1716712170527, 1716712170527)),
    "fills_s": ("s", lambda c: c.fills(1775672947953, 1775672947953, "DOGEUSDT")), "bills": ("c", lambda c: c.bills(1789214411964, 1789214411964)),
    "trigger_log": ("c", lambda c: c.trigger_history(1775732228695, 1775732228695)),
    "trigger_log2": ("2", lambda c: c.trigger_history(1716595200000, 1716595200000)),
    "triggers": ("c2", lambda c: c.open_triggers()), "find_s": ("s", lambda c: c.find_order("082007092f624a18bb7af2ab42e7c8e8", "DOGEUSDT", T0)),
    "find": ("c", lambda c: c.find_order("857e1482-3225-44ce-bc0a-947714c5cabc", "DOGEUSDT", c.now_ms() - 1000)),
}
CHANGES = {
    "place": ("c", lambda c: c.place(order())), "place2": ("2", lambda c: c.place(order(client_id="smt_1767855388624"))),
    "place_s": ("s", lambda c: c.place(order("spot", client_id="c4551206d34641efbeb64abaa066946d"))),
    "exit": ("c", lambda c: c.place(order(side="SELL", type="MARKET", price=None), urgent=True)),
    "stop": ("c2", lambda c: c.place(order(side="SELL", type="STOP_MARKET", price=None, trigger=D(60000), client_id="algo-20240201-1"))),
    "cancel": ("c", lambda c: c.cancel(ID)), "cancel_2": ("2", lambda c: c.cancel("596476148997685805")),
    "cancel_s": ("s", lambda c: c.cancel("736775987680772200")),
    "cancel_id": ("c", lambda c: c.cancel(client_id="my-order-0001")), "many": ("c", lambda c: c.cancel_many([ID])),
    "many_s": ("s", lambda c: c.cancel_many([ID])), "many_2": ("2", lambda c: c.cancel_many(["596471064624628269"])),
    "all": ("c2s", lambda c: c.cancel_all("BTCUSDT")), "close": ("c2", lambda c: c.close_positions()),
    "cancel_stop": ("c", lambda c: c.cancel_trigger("702345678901234700")), "cancel_stop2": ("2", lambda c: c.cancel_trigger("596476148997685805")),
    "cancel_stops": ("c2", lambda c: c.cancel_triggers()), "tpsl": ("c2", lambda c: c.place_tpsl("BTCUSDT", "STOP_LOSS", "LONG", D(1), D(2), "tp-1")),
    "move_tpsl": ("c2", lambda c: c.modify_tpsl("812345678901234900", D(3))),
    "margin": ("c2", lambda c: c.adjust_margin("7", D("1.5"))), "log": ("c2", lambda c: c.upload_ai_log("stage", "model", {}, {}, "why", ID)),
}
SETTINGS = {"leverage": ("c", lambda c: c.set_leverage("DOGEUSDT", 20)), "leverage2": ("2", lambda c: c.set_leverage("BTCUSDT", 20)),
            "mode": ("c", lambda c: c.set_margin_mode("DOGEUSDT", "CROSSED"))}
MARKETS = {"c": {}, "2": {"dialect": "v2"}, "s": {"market": "spot"}}


def calls(*tables):
    "(market letter, name, call) of every call that a market has."
    return [(m, name, call) for table in tables for name, (markets, call) in table.items() for m in markets]
