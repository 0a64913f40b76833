"""`stratfam weex ...` from outside: against a local server, without a network, with wrong keys, and `serve` as a process."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from weex_canned import GOLDEN, SECRETS

from stratfam import cli  # noqa: F401 - registers the commands
from stratfam.commands.base import run
from stratfam.core import Bars
from stratfam.data.store import load_bars
from stratfam.weex.exchange import Exchange, add_user, advance_to, check, place
from stratfam.weex.server import Server

WORDS = dict(zip(("WEEX_API_KEY", "WEEX_API_SECRET", "WEEX_API_PASSPHRASE"), (GOLDEN["key"], GOLDEN["secret"], GOLDEN["passphrase"])))


def bars(market, n=400):
    t = np.datetime64("2024-01-01T00", "ns") + np.arange(n) * np.timedelta64(1, "h")
    close = np.stack([40_000 + 100.0 * np.arange(n) % 700, 2_000 + np.arange(n) % 50.0], 1)
    open_ = np.vstack([close[:1], close[:-1]])
    funding = np.where((np.arange(n) % 8 == 7)[:, None], 1e-4, 0.0) * np.ones(close.shape) * (market == "perp")
    return Bars(t, "1h", open_, np.maximum(open_, close) + 2, np.minimum(open_, close) - 2, close, np.full(close.shape, 5.0), funding,
                np.ones(close.shape, bool), ("BTCUSDT", "ETHUSDT"), market)


@pytest.fixture(scope="module")
def server():
    x = Exchange([bars("perp"), bars("spot")])
    add_user(x, *SECRETS, usdt=10_000, spot={"USDT": 5_000, "BTC": "0.5"})
    add_user(x, "weex_reader", "reader-secret", "reader-pass", read_only=True)
    advance_to(x, int(x.feeds[0].time[200]))
    a, m = x.users[SECRETS[0]]["accounts"]["contract"], x.markets["contract"]["BTCUSDT"]
    place(x, a, m, 1, 1, 200)
    with Server(x, speed=0) as s:
        seen, handle = [], s.door.gateway.handle
        s.seen = seen

        def note(method, target, headers, *rest):
            seen.append((method, target.partition("?")[0], "ACCESS-KEY" in headers))
            return handle(method, target, headers, *rest)
        s.door.gateway.handle = note
        yield s
        s.call(lambda: check(x))


@pytest.fixture
def weex(server, tmp_path, monkeypatch, capsys):
    "A command of the family, pointed at the server: (code, stdout, stderr)."
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("STRATFAM_", "WEEX_"))]: monkeypatch.delenv(name)
    for name, word in WORDS.items(): monkeypatch.setenv(name, word)
    server.seen.clear()

    def call(*args, at=server.url):
        code = run(["weex", *args, "--base-url", at])
        return code, *capsys.readouterr()
    return call


def rows(answer):
    code, out, err = answer
    assert (code, err) == (0, ""), answer
    return json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_the_doctor_finds_everything_well(weex):
    code, out, _ = weex("doctor", "BTCUSDT", "eth/usdt")
    assert code == 0 and out.count("\nok ") == 10 and "FAIL" not in out
    for words in ("answers in", "a time of its own", "2 of 2 listed", "price step 0.1, quantity step 0.0001", "may trade", "1 open", "cross 20"):
        assert words in out, words
    assert [r["check"] for r in rows(weex("doctor", "--json"))] == ["connection", "clock", "symbols", "BTCUSDT", "key", "permission", "positions",
                                                                   "BTCUSDT settings"]


def test_the_doctor_without_a_key_asks_the_public_half(weex, server, monkeypatch):
    for name in WORDS: monkeypatch.delenv(name)
    found = rows(weex("doctor", "--json"))
    assert [r["ok"] for r in found] == [True] * 4 + [None] and not any(signed for _, _, signed in server.seen)


@pytest.mark.parametrize(("words", "bad", "says"), [
    ({"WEEX_API_SECRET": "wrong-secret"}, {"key", "permission", "positions", "BTCUSDT settings"}, "-1047"),
    ({"WEEX_API_KEY": "weex_nobody"}, {"key", "permission", "positions", "BTCUSDT settings"}, "-1044"),
    ({"WEEX_API_KEY": "weex_reader", "WEEX_API_SECRET": "reader-secret", "WEEX_API_PASSPHRASE": "reader-pass"}, {"permission"}, "may not trade")])
def test_the_doctor_says_what_is_wrong_and_what_to_do(weex, monkeypatch, words, bad, says):
    for name, word in words.items(): monkeypatch.setenv(name, word)
    code, out, _ = weex("doctor", "--json")
    found = json.loads(out)
    assert code == 1 and {r["check"] for r in found if r["ok"] is False} == bad and says in out
    assert all(r["advice"] for r in found if r["check"] in ("key", "permission") and not r["ok"])
    assert not any(w in out for w in (*SECRETS[1:], "wrong-secret", "reader-secret"))


def test_symbols_and_spellings(weex, server):
    found = [(r["symbol"], r["price_step"], r["leverage"]) for r in rows(weex("symbols", "--json"))]
    assert found == [("BTCUSDT", "0.1", 400), ("ETHUSDT", "0.01", 400)]
    assert len(rows(weex("symbols", "cmt_btcusdt", "--json"))) == 1 and len(rows(weex("symbols", "--market", "spot", "--json"))) == 2
    assert len(rows(weex("symbols", "--dialect", "v2", "--json"))) == 2
    server.exchange.markets["contract"]["ETHUSDT"].tradable = False
    assert [len(rows(weex("symbols", *a, "--json"))) for a in ((), ("--all",))] == [1, 2]
    server.exchange.markets["contract"]["ETHUSDT"].tradable = True
    tried = [(r["form"], r["accepted"]) for r in rows(weex("symbols", "--spellings", "BTCUSDT", "--json"))]
    assert tried == [("contract v3", True), ("contract v2", True)]
    code, out, err = weex("symbols", "BTCUSD")
    assert code == 1 and "Did you mean 'BTCUSDT'?" in err and err.count("\n") == 1
    assert not any(signed for _, _, signed in server.seen)  # public data is asked without the key


@pytest.mark.parametrize("options", [(), ("--dialect", "v2"), ("--market", "spot")])
def test_klines_are_the_bars(weex, options):
    found = rows(weex("klines", "BTCUSDT", "--last", "3", "--json", *options))
    at = [np.datetime64(r["time"][:-6]) for r in found]
    want = [float(bars("perp").close[np.searchsorted(bars("perp").time, t), 0]) for t in at]
    assert [float(r["close"]) for r in found] == want and str(at[-1]) == "2024-01-09T07:00:00"


def test_klines_saved_are_bars_with_funding(weex, tmp_path):
    code, out, _ = weex("klines", "ETHUSDT", "--start", "2024-01-01", "--end", "2024-01-06", "--last", "2", "--save", "my")
    assert code == 0 and out.count("written: ") == 2
    got, want = load_bars(tmp_path / "my", market="perp"), bars("perp")
    n = len(got)
    assert n == 121
    np.testing.assert_allclose(got.close[:, 0], want.close[:n, 1], strict=True)
    known = np.isfinite(got.funding[:, 0])
    np.testing.assert_allclose(got.funding[known, 0], want.funding[:n, 1][known], strict=True)
    assert known.sum() > 100
    code, _, err = weex("klines", "ETHUSDT", "--market", "spot", "--start", "2024-01-01")
    assert code == 1 and "without a time range" in err


def test_balance_and_positions(weex):
    held, = rows(weex("balance", "--json"))
    assert held["asset"] == "USDT" and 9_900 < float(held["total"]) < 10_000
    assert {r["asset"]: r["total"] for r in rows(weex("balance", "--market", "spot", "--json"))} == {"BTC": "0.50000000", "USDT": "5000.00000000"}
    p, = rows(weex("positions", "--json"))
    assert (p["symbol"], p["side"], float(p["quantity"]), p["margin"]) == ("BTCUSDT", "LONG", 0.02, "CROSSED")
    assert rows(weex("positions", "ETHUSDT", "--json")) == [] and "No open position." in weex("positions", "ETHUSDT")[1]
    assert len(rows(weex("positions", "--dialect", "v2", "--json"))) == 1


def test_the_sandbox_flag_reaches_no_live_private_path(weex, server):
    "F17: whatever is asked with the flag, signed requests go to the demo paths alone."
    for args in (("balance",), ("positions",), ("doctor",)):
        for flag in ("--sandbox", "--demo"): assert weex(*args, flag)[0] == 0
    signed = {path for _, path, signed in server.seen if signed}
    assert signed == {"/capi/v3/sim/balance", "/capi/v3/sim/position/allPosition"}
    assert rows(weex("balance", "--sandbox", "--json"))[0]["asset"] == "SUSDT" and rows(weex("positions", "--sandbox", "--json")) == []
    for impossible in (("--market", "spot"), ("--dialect", "v2")):
        code, _, err = weex("balance", "--sandbox", *impossible)
        assert code == 1 and "WEEX offers no" in err
    assert all(path.startswith("/capi/v3/sim/") for _, path, is_signed in server.seen if is_signed)


def test_keys_come_from_an_owner_only_file_or_the_environment(weex, tmp_path, monkeypatch):
    for name in WORDS: monkeypatch.delenv(name)
    code, _, err = weex("balance")
    assert code == 1 and "WEEX_API_KEY" in err and err.count("\n") == 1
    f = tmp_path / "weex.toml"
    f.write_text("".join(f'{n} = "{w}"\n' for n, w in zip(("key", "secret", "passphrase"), SECRETS)))
    f.chmod(0o644)
    assert "chmod 600" in weex("balance", "--keys", "weex.toml")[2]
    f.chmod(0o600)
    assert weex("balance", "--keys", "weex.toml")[0] == 0
    for name, word in zip(("API_KEY", "API_SECRET", "PASSPHRASE"), SECRETS): monkeypatch.setenv(f"STRATFAM_SECRETS_WEEX_{name}", word)
    assert weex("balance")[0] == 0
    assert weex("balance", "--key", "x")[0] == 2  # no option takes a key


def test_an_exchange_that_is_not_there_is_one_clear_line(weex):
    for args in (("symbols",), ("klines", "BTCUSDT"), ("balance",), ("positions",)):
        code, out, err = weex(*args, at="http://127.0.0.1:9")
        assert (code, out) == (1, "") and err.count("\n") == 1 and "http://127.0.0.1:9 cannot be reached" in err and "weex serve" in err
    code, out, err = weex("doctor", at="http://127.0.0.1:9")
    assert code == 1 and err == "" and "FAIL  connection" in out and out.count("not asked") == 7
    code, _, err = weex("balance", at="http://example.com")
    assert code == 1 and "only over https" in err


def test_the_log_and_the_output_show_no_secret(weex, tmp_path, server, monkeypatch):
    text = ""
    for args in (("doctor",), ("balance",), ("positions", "--sandbox"), ("balance", "--market", "spot")):
        for _, out, err in [weex(*args, "--log", "weex_api.log")]: text += out + err
    monkeypatch.setenv("WEEX_API_SECRET", "canary-that-is-wrong")
    for args in (("balance",), ("doctor",)):
        for _, out, err in [weex(*args, "--log", "weex_api.log", "--json")]: text += out + err
    log = (tmp_path / "weex_api.log").read_text()
    assert log.count("\n") > 20 and (tmp_path / "weex_api.log").stat().st_mode & 0o077 == 0
    for word in (*SECRETS, "canary-that-is-wrong"): assert word not in text + log


def listen(*args, cwd, env):
    "`stratfam weex serve` as a process, and what it said when its port was open."
    process = subprocess.Popen([sys.executable, "-m", "stratfam.cli", "weex", "serve", *args, "--port", "0", "--json"], cwd=cwd, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # A shell's background jobs ignore it
    said = ""
    while not said.endswith("}\n"):
        said += (line := process.stdout.readline())
        if not line: pytest.fail(f"serve ended with {process.wait(5)}: {process.stderr.read()}")
    return process, json.loads(said)


def test_serve_replays_a_folder_or_a_world_until_stopped(weex, tmp_path, monkeypatch, capsys):
    for name in WORDS: monkeypatch.delenv(name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = run(["data", "worlds", "momentum", "--bars", "300", "--symbols", "2", "--save", str(tmp_path / "bars")])
    assert code == 0
    capsys.readouterr()
    for args, symbol, synthetic in ((("--world", "crypto_like", "--count", "900", "--symbols", "BTCUSDT"), "BTCUSDT", True),
                                    (("bars", "--history", "100", "--speed", "3600", "--faults", "0.01", "--limits"), "SYN2USDT", False)):
        process, said = listen(*args, cwd=tmp_path, env=env)
        try:
            assert said["synthetic"] is synthetic and symbol in said["symbols"] and said["keys"] == "weex-sim.toml"
            assert (tmp_path / "weex-sim.toml").stat().st_mode & 0o777 == 0o600
            assert symbol in [r["symbol"] for r in rows(weex("symbols", "--json", at=said["url"]))]
            assert symbol in [r["symbol"] for r in rows(weex("symbols", "--market", "spot", "--json", at=said["url"]))]
            if synthetic:
                assert [r["ok"] for r in rows(weex("doctor", symbol, "--keys", "weex-sim.toml", "--json", at=said["url"]))] == [True] * 8
                assert len(rows(weex("klines", symbol, "--last", "0", "--json", at=said["url"]))) == 500
            else:
                first = rows(weex("klines", symbol, "--last", "0", "--json", at=said["url"]))
                time.sleep(2)
                assert len(rows(weex("klines", symbol, "--last", "0", "--json", at=said["url"]))) > len(first) >= 100
        finally: process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize(("args", "says"), [
    (("--world", "crypto_lik"), "Did you mean 'crypto_like'?"), (("nowhere",), "no such folder"),
    (("--world", "gbm", "--count", "10"), "--history 500"), (("--world", "gbm", "nowhere"), "give one of the two")])
def test_serve_refuses_in_one_line(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    for name, word in WORDS.items(): monkeypatch.setenv(name, word)
    code = run(["weex", "serve", *args])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "") and says in err and err.count("\n") == 1, err


def test_a_taken_port_is_one_clear_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, word in WORDS.items(): monkeypatch.setenv(name, word)
    assert run(["weex", "serve", "--world", "gbm", "--count", "600", "--port", str(server.port)]) == 1
    assert "choose another port" in capsys.readouterr().err
