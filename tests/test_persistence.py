"""Every kind of saved policy: the same decisions bit for bit in another process, attacks on the folder, work that survives an interruption."""
import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stratfam import cli  # noqa: F401 - registers the commands
from stratfam.commands.base import run, settings
from stratfam.commands.family import closed_bars, task_for
from stratfam.core import ExportError, digest
from stratfam.data.features import build
from stratfam.data.store import save_bars
from stratfam.data.worlds import make_world
from stratfam.market.backtest import walk
from stratfam.policies.base import Remembered, Task, baseline, load, origin, read_about, save, task_arena, task_digest
from stratfam.policies.ensemble import CalibratedFit, EnsembleFit, walked
from stratfam.policies.family import latest, remembering
from stratfam.policies.regime import InformedFit, RouterFit
from stratfam.policies.sb3 import SB3Fit
from stratfam.policies.supervised import ForecastFit, Trees
from stratfam.risk.limits import limits_from

NAMES = ("return_1", "return_24", "volatility_24")
TRAIN = [(50, 1400)]


@pytest.fixture(scope="module")
def task():
    bars = make_world("crypto_like", n_bars=2000, n_symbols=2, seed=2).bars
    return Task(bars, build(bars, NAMES), limits_from(max_drawdown=None, daily_loss=None, min_trade=0.01))


PPO = SB3Fit("PPO", steps=2048)
FITS = {"rule": baseline("momentum"), "random": baseline("random"), "network": PPO, "ridge": ForecastFit("ridge", 6),
        "boosting": ForecastFit("boosting", 6, options=(("rounds", 6),)), "isotonic": CalibratedFit(ForecastFit("ridge", 6), folds=2),
        "ensemble": EnsembleFit((PPO, ForecastFit("ridge", 6), baseline("momentum")), "mean"),
        "router": RouterFit({"calm": ForecastFit("ridge", 6), "wild": baseline("mean_reversion")}, regimes=2, memory=40),
        "enhanced": InformedFit(PPO, regimes=2, memory=40),
        "all at once": CalibratedFit(InformedFit(EnsembleFit((ForecastFit("ridge", 6), RouterFit({"calm": baseline("momentum")}, 2, memory=30)),
                                                             "sharpe", folds=2, ahead=2), regimes=2, memory=40), folds=2)}


@pytest.fixture(scope="module")
def made(task, tmp_path_factory):
    "Every policy and the folder it was saved in."
    root = tmp_path_factory.mktemp("saved")
    out = {}
    for name, fit in FITS.items():
        policy = fit.fit(task, TRAIN, 3)
        out[name] = policy, save(policy, root / name.replace(" ", "_"), origin(fit, task, TRAIN, 3))
    return out


@pytest.mark.parametrize("name", FITS)
def test_a_loaded_policy_decides_bit_for_bit(made, task, name):
    policy, folder = made[name]
    again = load(folder)
    assert digest(again) == digest(policy) and type(again) is type(policy)
    a = task_arena(task)
    one, two = (walk(p, a, task.features, [(1450, 1600), (1600, 1999)], 5) for p in (policy, again))
    for x, y in zip(one, two): assert (x.equity == y.equity).all() and (x.weight == y.weight).all()


def test_another_process_decides_the_same_without_torch_sklearn_or_hmmlearn(made, task, tmp_path):
    "One process loads everything saved and answers fixed observations; the fitters' libraries stay out of it."
    obs = {n: np.random.default_rng(1).normal(0, 0.05, (7, p.spec.size(2))).astype("f4") for n, (p, _) in made.items()}
    np.savez(tmp_path / "obs.npz", **obs)
    code = ("import sys, json, hashlib, numpy as np\nfrom stratfam.policies.base import load\n"
            "folders, obs, out = json.loads(sys.argv[1]), np.load(sys.argv[2]), {}\n"
            "for n, f in folders.items():\n    p = load(f); d, _ = p.act(obs[n], p.reset(7, 4))\n"
            "    out[n] = hashlib.sha256(d.weight.tobytes() + d.confidence.tobytes()).hexdigest()\n"
            "heavy = [m for m in ('torch', 'sklearn', 'hmmlearn', 'stable_baselines3') if m in sys.modules]\nprint(json.dumps([out, heavy]))")
    folders = json.dumps({n: str(f) for n, (_, f) in made.items()})
    done = subprocess.run([sys.executable, "-c", code, folders, str(tmp_path / "obs.npz")], check=True, capture_output=True, text=True)
    got, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    for n, (p, _) in made.items():
        d, _ = p.act(obs[n], p.reset(7, 4))
        assert got[n] == hashlib.sha256(d.weight.tobytes() + d.confidence.tobytes()).hexdigest(), n


@pytest.mark.parametrize("name", ["boosting", "router", "all at once"])
def test_every_flipped_byte_is_noticed(made, name):
    policy, folder = made[name]
    rng = np.random.default_rng(0)
    for path in folder.iterdir():
        raw = path.read_bytes()
        for at in rng.integers(0, len(raw), 25):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1:])
            try: assert digest(load(folder)) == digest(policy), f"{path.name} byte {at} went unnoticed"
            except ExportError as e: assert str(folder) in str(e)
        path.write_bytes(raw)
    assert digest(load(folder)) == digest(policy)


def rewrite(folder, edit):
    "Change a saved policy and make its digests right again, as an attacker would."
    body = json.loads((folder / "policy.json").read_text())
    body.pop("sha256")
    edit(body)
    (folder / "policy.json").write_text(json.dumps({**body, "sha256": digest(json.dumps(body, sort_keys=True))}))


def test_a_forest_that_would_loop_forever_or_read_elsewhere_is_refused(made, tmp_path):
    "Well-formed files with right digests, but a tree that points back, and one that points out."
    policy, _ = made["boosting"]
    for child in (0, 10**9, -5):
        folder = save(policy, tmp_path / f"tree{child}")
        path = next(folder.glob("*.npz"))
        with np.load(path) as z: arrays = {k: z[k].copy() for k in z.files}
        model = json.loads((folder / "policy.json").read_text())["policy"]["fields"]["model"]["fields"]
        arrays[model["left"]["array"]][0] = child
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        path.write_bytes(buffer.getvalue())
        sha = hashlib.sha256(buffer.getvalue()).hexdigest()
        rewrite(folder, lambda b, sha=sha: b["arrays"].update(sha256=sha))
        with pytest.raises(ExportError, match="does not fit"): load(folder)
    with pytest.raises(Exception, match="hang together"): Trees(0.0, [0], [0, -1], [0.0, 0.0], [1, 0], [7, 0], [0.0, 1.0])


@pytest.mark.parametrize("reference", ["os:system", "subprocess:Popen", "stratfam.policies.base:importlib", "stratfam.policies.regime:Router.act"])
def test_a_member_of_an_ensemble_cannot_be_foreign_code(made, tmp_path, reference):
    policy, _ = made["ensemble"]
    folder = save(policy, tmp_path / "e")
    rewrite(folder, lambda b: b["policy"]["fields"]["members"]["tuple"][0].update({"class": reference}))
    with pytest.raises(ExportError): load(folder)


def test_foreign_and_empty_folders_are_told_apart(tmp_path):
    with pytest.raises(ExportError, match="not a saved policy"): load(tmp_path)
    (tmp_path / "policy.json").write_text('{"format": "somebody-else-3"}')
    with pytest.raises(ExportError, match="somebody-else-3"): load(tmp_path)
    (tmp_path / "policy.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ExportError, match="not readable"): load(tmp_path)


def test_the_note_says_where_a_policy_comes_from_and_is_not_part_of_it(made, task):
    policy, folder = made["router"]
    found = read_about(folder)
    about = found["about"]
    assert found["digest"] == digest(policy) and about["task"] == task_digest(task) and about["train"] == ((50, 1400),)
    assert about["features"] == NAMES and about["limits"] == task.limits and about["config"] == FITS["router"].config()
    assert {"stratfam", "python", "numpy", "numba"} <= found["versions"].keys() and len(found["code"]) >= 16


# Work that survives ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Breaks:
    "A fit that is interrupted."
    name = "breaks"
    stochastic = False
    def config(self): return {"fit": "breaks"}
    def fit(self, task, train, seed=0, progress=None): raise KeyboardInterrupt


def test_an_interrupted_ensemble_goes_on_where_it_was(task, tmp_path):
    "Interrupted before its last member, then finished: what was done is not done again, and the result is the same."
    plain = EnsembleFit((ForecastFit("ridge", 6), ForecastFit("ridge", 12)), "mean")
    kept = remembering(dataclasses.replace(plain, members=(plain.members[0], Breaks())), str(tmp_path))
    with pytest.raises(KeyboardInterrupt): kept.fit(task, TRAIN)
    first = {p.name: (p / "policy.json").stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(first) == 1
    done = remembering(plain, str(tmp_path)).fit(task, TRAIN)
    assert digest(done) == digest(plain.fit(task, TRAIN))
    now = {p.name: (p / "policy.json").stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(now) == 2 and all(now[k] == v for k, v in first.items())


def test_memory_is_keyed_by_everything_that_matters(task, tmp_path):
    kept = Remembered(ForecastFit("ridge", 6), str(tmp_path))
    kept.fit(task, TRAIN, 0)
    kept.fit(task, TRAIN, 1)
    kept.fit(task, [(50, 1399)], 0)
    kept.fit(dataclasses.replace(task, lookback=99), TRAIN, 0)
    Remembered(ForecastFit("ridge", 7), str(tmp_path)).fit(task, TRAIN, 0)
    kept.fit(task, TRAIN, 0)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_memory_is_not_trusted(task, tmp_path):
    kept = Remembered(ForecastFit("ridge", 6), str(tmp_path))
    kept.fit(task, TRAIN)
    path = next(next(tmp_path.iterdir()).glob("*.npz"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ExportError, match="damaged"): kept.fit(task, TRAIN)


# The commands ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bars_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bars")
    save_bars(make_world("momentum", n_bars=2500, n_symbols=2, seed=1).bars, folder)
    return str(folder)


@pytest.mark.parametrize("name", ["rule", "ensemble", "router", "enhanced"])
def test_the_decision_at_the_newest_bar_is_the_walks(made, task, name):
    "At row 1799 of a walk the future is there and not read; with the bars cut off behind it, the same wish and the same gate."
    policy, _ = made[name]
    way = walked(policy, task, [(1500, 2000)], 5)
    short = dataclasses.replace(task, bars=task.bars[:1800], features=task.features[:1800], label_end=None)
    now = latest(policy, task_arena(short), short.features, 299, 5)
    there = int(np.flatnonzero(way.row == 1799)[0])
    assert (now.wish.weight[0] == way.weight[there]).all() and (now.wish.confidence[0] == way.confidence[there]).all()
    np.testing.assert_allclose(now.held, way.runs[0].weight[299], atol=1e-12)


def test_infer_prints_what_latest_says(bars_folder, tmp_path, capsys):
    place = str(tmp_path / "m")
    assert run(["train", "ridge", bars_folder, "--features", ",".join(NAMES), "--option", "horizon=6", "--no-calibrate", "--out", place]) == 0
    capsys.readouterr()
    assert run(["infer", place, bars_folder, "--replay", "--history", "298", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    task = task_for(closed_bars(Path(bars_folder), None, None, None), NAMES, settings())
    now = latest(load(place), task_arena(dataclasses.replace(task, capital=settings().trading.capital_usdt)), task.features, 298)
    assert [d["wish"] for d in answer["decisions"]] == now.wish.weight[0].tolist() and answer["digest"] == digest(load(place))
    assert [d["lots"] for d in answer["decisions"]] == now.lots.tolist() and answer["sent"] is False and answer["age_bars"] == 0.0


def test_an_old_bar_is_denied_entries_and_said(bars_folder, tmp_path, capsys):
    place = str(tmp_path / "hold")
    assert run(["train", "equal_weight", bars_folder, "--no-calibrate", "--out", place]) == 0
    capsys.readouterr()
    assert run(["infer", place, bars_folder, "--json"]) == 0
    old = json.loads(capsys.readouterr().out)
    assert run(["infer", place, bars_folder, "--json", "--replay"]) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert all(d["target"] == 0.0 and "DATA" in d["reasons"] for d in old["decisions"]) and old["age_bars"] > 1000
    assert all(d["target"] > 0.4 for d in fresh["decisions"]) and [d["wish"] for d in old["decisions"]] == [d["wish"] for d in fresh["decisions"]]


def test_backtest_leaves_train_rows_out_unless_asked(bars_folder, tmp_path, capsys):
    place = str(tmp_path / "m")
    assert run(["train", "ridge", bars_folder, "--features", ",".join(NAMES), "--option", "horizon=6", "--no-calibrate", "--out", place]) == 0
    capsys.readouterr()
    assert run(["backtest", place, bars_folder, "--json"]) == 0
    later = json.loads(capsys.readouterr().out)
    assert [m["policy"] for m in later["metrics"]] == ["m", "buy_and_hold", "cash"]
    assert later["metrics"][0]["bars"] == 2500 - 2125 and later["note"] == ""
    assert run(["backtest", place, bars_folder, "--json", "--start", "2020-03-01"]) == 0
    assert "were train rows" in json.loads(capsys.readouterr().out)["note"]
    assert run(["backtest", place, bars_folder, "--end", "2020-02-01"]) == 1
    assert "--start" in capsys.readouterr().err


def test_a_table_of_weights_is_walked_and_checked(bars_folder, tmp_path, capsys):
    table = tmp_path / "mine.csv"
    table.write_text("time,SYN1USDT,SYN2USDT\n2020-01-02 00:00,0.5,\n2020-02-02 00:00,0,0.2\n")
    assert run(["backtest", str(table), bars_folder, "--json"]) == 0
    got = {m["policy"]: m for m in json.loads(capsys.readouterr().out)["metrics"]}
    assert got["mine"]["trades"] >= 2 and got["cash"]["total_return"] == 0.0
    for text, says in (("time,SYN1USDT\n2020-01-02,1\n", "no column for SYN2USDT"), ("a,SYN1USDT,SYN2USDT\nx,1,1\n", "open times"),
                       ("time,SYN1USDT,SYN2USDT\n1999-01-02,1,1\n", "none of its")):
        table.write_text(text)
        assert run(["backtest", str(table), bars_folder]) == 1 and says in capsys.readouterr().err
    assert run(["backtest", "momentun", bars_folder]) == 1 and "Did you mean 'momentum'" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(bars_folder, tmp_path):
    "A training in its own process, interrupted as a user would, then run again: the policy equals one that was never interrupted."
    out = tmp_path / "ppo"
    command = [sys.executable, "-m", "stratfam.cli", "train", "ppo", bars_folder, "--features", ",".join(NAMES), "--no-calibrate", "--steps", "24000"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    line = child.stderr.readline()
    assert "%" in line, line
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=180)
    assert child.returncode == 130 and "goes on from there" in said, said
    assert not (out / "policy.json").exists() and list((out / "parts").rglob("checkpoint.pt"))
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=300, env=env)
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, timeout=300, env=env)
    assert digest(load(out)) == digest(load(tmp_path / "whole")) and not (out / "parts").exists()
