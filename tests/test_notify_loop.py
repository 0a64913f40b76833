"""The real loop on the paper exchange with everything attached: each order has its record, a halt by chat halts, trading is unchanged."""
import json
import time

import pytest

from stratfam.config import NotifySettings, Secrets, Settings
from stratfam.core import ObservationSpec, Response
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.policies.base import Rule
from stratfam.risk.limits import limits_from
from stratfam.trading.ailog import DONE
from stratfam.trading.contact import open_contact
from stratfam.trading.journal import Journal, MemoryStore

paper = pytest.importorskip("stratfam.trading.loop", reason="the loop is not in this tree")
permit = pytest.importorskip("stratfam.trading.permit", reason="the loop is not in this tree")
venues = pytest.importorskip("stratfam.trading.venues", reason="the loop is not in this tree")
TOKEN, CHAT, NAMES = "123456789:AAcanary-token-of-the-bot_0123456789abc", 4200042001, ("BTCUSDT", "ETHUSDT")


class Chat:
    "Telegram on the loop's clock."
    def __init__(self): self.updates, self.said = [], []
    def send(self, method, url, headers, body):
        name, ask, result = url.rsplit("/", 1)[1], json.loads(body), {"username": "desk_bot"}
        if name == "sendMessage": self.said.append(ask["text"])
        if name == "getUpdates": result = [u for u in self.updates if u["update_id"] >= (ask.get("offset") or 0)]
        return Response(200, {}, json.dumps({"ok": True, "result": result}).encode())


def desk(tmp_path, attached):
    "A momentum rule on two symbols of a synthetic market, an hour a bar."
    import dataclasses
    world = dataclasses.replace(make_world("regime_drift", 700, 2, market="perp", seed=3).bars, symbols=NAMES)
    limits = limits_from(stop_loss=0.02, take_profit=0.05, daily_loss=0.03)
    (tmp_path / "run").mkdir(exist_ok=True)
    rule = Rule(ObservationSpec(("return_24", "volatility_24")), "momentum", (("bars", 24), ("entry", 0.5)), short=True)
    venue, controls, contact, chat = venues.paper_venue(world, 10_000.0), permit.Controls(tmp_path / "run"), None, Chat()
    setup = paper.Setup("lesson", NAMES, "1h", ("return_24", "volatility_24"), limits, Costs(taker=0.0008, maker=0.0008), poll_s=1200)
    venue.env.clock.advance(600 * 3600 + 1800)
    if attached:
        notify = NotifySettings(log=tmp_path / "e.jsonl", ai_log=tmp_path / "ailog.db", metrics_port=9, level="info")
        contact = open_contact(Settings(notify=notify, secrets=Secrets(telegram_token=TOKEN, telegram_chats=str(CHAT))), venue.env, "paper",
                               NAMES, "momentum-1", venue.client, controls.halt, chat)
        assert contact.missing == []
    observers = [contact.observe] if attached else []
    loop = paper.Loop(setup, rule, venue, Journal(MemoryStore()), venue.env, permit.Permit(limits, "paper", permit.FOREVER), controls, observers)
    return loop, venue, contact, chat


def test_every_order_of_the_loop_has_its_record_and_the_trading_is_untouched(tmp_path):
    loop, venue, c, _ = desk(tmp_path, attached=True)
    loop.run(venue.now_ms() + 40 * 3_600_000)
    c.pump()
    plain, bare, _, _ = desk(tmp_path, attached=False)
    plain.run(bare.now_ms() + 40 * 3_600_000)
    assert loop.journal.book.chain == plain.journal.book.chain, "with us attached the loop writes the same journal, byte for byte"
    assert loop.lost_events == 0
    rows = {r["client_id"]: json.loads(r["body"]) | r for r in c.ai_log.rows()}
    lines = {e[3]: json.loads(e[4]) for e in loop.journal.store.rows if e[2] == "intent"}
    acked = {e[3] for e in loop.journal.store.rows if e[2] == "outcome" and json.loads(e[4]).get("order_id")}
    assert acked and acked <= rows.keys()
    for key in acked:
        decided = lines[key]["purpose"] in ("ENTRY", "EXIT")
        assert rows[key]["model"] == ("momentum-1" if decided else "stratfam risk rules")
        assert not decided or "Policy momentum-1 asked for weight" in rows[key]["explanation"] and "lots; held before" in rows[key]["explanation"]
    assert any(lines[k]["purpose"] == "ENTRY" for k in acked)
    for _ in range(len(rows) + 5):
        venue.env.clock.advance(2)
        c.pump()
    assert c.ai_log.totals()[DONE] == len(acked)
    of = c.metrics.registry.get_sample_value
    assert of("stratfam_cycles_total") >= 39 and of("stratfam_equity_usdt") > 0 and of("stratfam_gate_state", {"state": loop.mirror.status}) == 1.0
    assert of("stratfam_unknown_orders") == 0.0 and of("stratfam_position_lots", {"symbol": "BTCUSDT"}) == float(loop.mirror.lots[0])
    assert not any("failed" in k for d in c.dispatchers.values() for k in d.counts) and c.close() == []
    told = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    kinds = {e["event"] for e in told}
    assert [e for e in told if e["event"] == "error" and e["where"] == "loop"] == []
    assert {"cycle", "decision", "order", "fill", "state"} <= kinds


def test_a_halt_by_chat_halts_the_loop_and_the_chat_hears_of_it(tmp_path):
    loop, venue, c, chat = desk(tmp_path, attached=True)
    loop.run(venue.now_ms() + 30 * 3_600_000)
    chat.updates = [{"update_id": 1, "message": {"chat": {"id": CHAT}, "date": venue.env.clock.now_ns() // 10**9, "text": "/halt by hand"}}]
    began = time.monotonic()
    c.bot.step()
    loop.run(venue.now_ms() + 2 * 3_600_000)
    venue.env.clock.advance(5)
    c.pump()
    assert loop.mirror.status == "HALTED" and not loop.mirror.lots.any() and time.monotonic() - began < 60
    assert "HALT handed" in chat.said[0] and any("state HALTED" in t and "by hand" in t for t in chat.said[1:])
    assert c.board.status().splitlines()[1] == "state: HALTED"
