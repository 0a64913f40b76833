"""Rules by hand, random turnover, saved policies under attack, and learners that repeat themselves; what they learn: test_learning.py."""
import dataclasses
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from stratfam.core import ConfigError, ExportError, Features, ObservationSpec, Scaler, digest
from stratfam.data.features import build
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.market.backtest import walk
from stratfam.market.env import Actions
from stratfam.policies.base import (BASELINES, Fit, Network, RandomRule, Task, baseline, forward, load, next_rows, read_about, save, symbols_seen,
                                    task_arena, unpack)
from stratfam.policies.sb3 import ALGORITHMS, SB3Fit
from stratfam.risk.limits import limits_from


@pytest.fixture(scope="module")
def task():
    bars = make_world("gbm", n_bars=1500, n_symbols=3, seed=1).bars
    return Task(bars, build(bars, ("return_1", "return_24", "volatility_24", "rsi")), limits_from(max_drawdown=None, daily_loss=None, min_trade=0.01))


def network(spec, N=3, seed=0, **more):
    rng = np.random.default_rng(seed)
    sizes = [spec.size(N), 16, N]
    layers = tuple((rng.normal(0, 0.3, s).astype("f4"), rng.normal(0, 0.1, s[1]).astype("f4")) for s in zip(sizes, sizes[1:]))
    return Network(spec, Actions(), layers, spread=np.full(N, 0.3), **more)


def test_unpack_undoes_every_layout():
    rng = np.random.default_rng(0)
    fields = ("weight", "cash", "unrealised", "drawdown", "since_trade")
    for _ in range(100):
        N, W, F, chosen = (int(rng.integers(1, 6)) for _ in range(4))
        spec = ObservationSpec([f"f{i}" for i in range(F)], W, account=tuple(rng.permutation(fields)[:chosen]))
        D = spec.size(N)
        if spec.size(1) == spec.size(0): continue
        seen = unpack(spec, np.arange(D, dtype="f4")[None])
        assert symbols_seen(spec, D) == N and seen.x.shape == (1, W, N, F)
        flat = np.concatenate([seen.x.ravel(), *[getattr(seen, a).ravel() for a in spec.account]])
        assert (flat == np.arange(D)).all()


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_walks_is_plain_data_and_pickles(name, task, tmp_path):
    fit = baseline(name)
    assert isinstance(fit, Fit) and json.loads(json.dumps(fit.config())) == fit.config() and pickle.loads(pickle.dumps(fit)) == fit
    policy = fit.fit(task, [(0, 1000)], 3)
    again = load(save(policy, tmp_path / name))
    a = task_arena(task)
    one, two = (walk(p, a, task.features, [(0, 900), (900, 1500)], 5) for p in (policy, again))
    for x, y in zip(one, two): assert (x.equity == y.equity).all()
    assert digest(policy) == digest(again)
    if name != "cash": assert len(one[0].trades) > 0


def test_momentum_by_hand(task):
    "The rule's weights against a loop over the bars."
    policy, a = baseline("momentum", bars=24, entry=1.0).fit(task), task_arena(task)
    got = walk(policy, a, task.features, [(200, 400)])[0]
    r, v = (task.features.x[:, :, task.features.names.index(k)].astype("f8") for k in ("return_24", "volatility_24"))
    held = np.zeros(3, bool)
    for i, t in enumerate(range(200, 399)):
        held = (r[t] > v[t] * np.sqrt(24)) | (held & (r[t] > 0) & (np.abs(r[t]) <= v[t] * np.sqrt(24)))
        if i + 1 < 199: assert ((got.weight[i + 1] > 0) == held).all()


def test_momentum_reads_a_window_where_the_feature_is_missing(task):
    only = Task(task.bars, Features(task.features.x[:, :, :1], ("return_1",), task.features.warmup), task.limits)
    a, b = (walk(baseline("momentum").fit(t), task_arena(t), t.features, [(100, 1500)])[0] for t in (task, only))
    assert baseline("momentum").fit(only).spec.window == 24
    assert np.mean((a.weight > 0) == (b.weight > 0)) > 0.99


@pytest.mark.parametrize("turnover", [0.01, 0.1, 0.4])
def test_random_turnover_is_the_one_asked_for(task, turnover):
    flat = Task(task.bars, task.features, task.limits, Costs(0.0, 0.0, 0.0))
    runs = walk(RandomRule(ObservationSpec((), account=("weight",)), turnover), task_arena(flat), flat.features, [(0, 1500)] * 8, 1)
    assert np.mean([b.turnover.mean() for b in runs]) == pytest.approx(turnover, rel=0.1)
    assert len({b.equity[-1] for b in runs}) == 8


def test_labels_end_at_the_next_bar_and_never_across_a_gap(task):
    ok = task.bars.ok.copy()
    ok[700] = False
    cut = {k: np.where(ok, getattr(task.bars, k), np.nan) for k in ("open", "high", "low", "close", "volume", "funding")}
    ends = next_rows(dataclasses.replace(task.bars, ok=ok, **cut))
    assert ends[698:702].tolist() == [699, 699, 701, 702] and ends[-1] == 1499


def test_forward_is_the_same_alone_and_in_company():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 80, 4)
        layers = [(rng.normal(size=s).astype("f4"), rng.normal(size=s[1]).astype("f4")) for s in zip(sizes, sizes[1:])]
        x = rng.normal(size=(17, sizes[0])).astype("f4")
        for kind in ("tanh", "relu"):
            y, z = forward(layers, kind, x), x.astype("f8")
            assert (np.concatenate([forward(layers, kind, r[None]) for r in x]) == y).all()
            for k, (w, b) in enumerate(layers):
                z = z @ w + b
                if k < 2: z = np.tanh(z) if kind == "tanh" else np.maximum(z, 0)
            np.testing.assert_allclose(y, z, rtol=1e-3, atol=1e-3)


# Saved policies ------------------------------------------------------------------------------------------------------

def test_a_loaded_network_decides_bit_for_bit(tmp_path):
    spec = ObservationSpec(("a", "b"), 5, Scaler([0.1, 1e-300], [0.3, 2.0], 7.0))
    net = network(spec)
    again = load(save(net, tmp_path / "net", {"score": float("nan"), "nested": {"x": [1, 2.5, None, True]}}))
    obs = np.random.default_rng(1).normal(size=(100, spec.size(3))).astype("f4")
    for k in ("weight", "confidence"): assert (getattr(net.act(obs, None)[0], k) == getattr(again.act(obs, None)[0], k)).all()
    about = read_about(tmp_path / "net")
    assert about["digest"] == digest(net) and np.isnan(about["about"]["score"]) and about["about"]["nested"] == {"x": [1, 2.5, None, True]}
    assert {"stratfam", "python", "numpy", "numba"} <= about["versions"].keys()


def test_every_flipped_byte_is_noticed(tmp_path):
    folder = save(network(ObservationSpec(("a",))), tmp_path / "net")
    rng = np.random.default_rng(0)
    for path in folder.iterdir():
        raw = path.read_bytes()
        for at in rng.integers(0, len(raw), 60):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1:])
            try: same = digest(load(folder)) == digest(network(ObservationSpec(("a",))))
            except ExportError: same = True
            assert same, f"{path.name} byte {at}"
        path.write_bytes(raw)
    assert digest(load(folder)) == digest(network(ObservationSpec(("a",))))


def test_pickles_are_never_loaded(tmp_path):
    "An archive whose arrays are pickles, with digests that match: refused without running it."
    import hashlib
    folder = save(network(ObservationSpec(("a",))), tmp_path / "net")
    body = json.loads((folder / "policy.json").read_text())

    class Bomb:
        def __reduce__(self): return open, (str(tmp_path / "ran"), "w")
    buffer = io.BytesIO()
    np.savez(buffer, **{f"a{i}": np.array([Bomb()], dtype=object) for i in range(5)})
    body.pop("sha256")
    body["arrays"] = {"file": "arrays-0.npz", "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    (folder / "arrays-0.npz").write_bytes(buffer.getvalue())
    (folder / "policy.json").write_text(json.dumps({**body, "sha256": digest(json.dumps(body, sort_keys=True))}))
    with pytest.raises(ExportError): load(folder)
    assert not (tmp_path / "ran").exists()


def test_foreign_code_needs_an_explicit_opt_in(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nfrom dataclasses import dataclass\n"
                                      "@dataclass(frozen=True)\nclass Own:\n    spec: int = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine
    (tmp_path / "ran").unlink()
    save(mine.Own(4), tmp_path / "own")
    del sys.modules["mine"]
    with pytest.raises(ExportError, match="trust=True"): load(tmp_path / "own")
    assert not (tmp_path / "ran").exists()
    assert load(tmp_path / "own", trust=True).spec == 4 and (tmp_path / "ran").exists()


def test_saving_again_replaces_and_leaves_no_litter(tmp_path):
    a, b = network(ObservationSpec(("a",)), seed=1), network(ObservationSpec(("a",)), seed=2)
    save(a, tmp_path / "net")
    save(b, tmp_path / "net")
    assert digest(load(tmp_path / "net")) == digest(b) and len(list((tmp_path / "net").iterdir())) == 2


def test_a_saved_network_decides_without_torch(tmp_path):
    save(network(ObservationSpec(("a",))), tmp_path / "net")
    code = (f"import sys, numpy as np\nfrom stratfam.policies.base import load\np = load({str(tmp_path / 'net')!r})\n"
            "p.act(np.zeros((1, p.spec.size(3)), 'f4'), None)\nassert 'torch' not in sys.modules and 'stable_baselines3' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


# Learners ------------------------------------------------------------------------------------------------------------

SHORT = {"PPO": 4096, "A2C": 2048, "DDPG": 2600, "TD3": 2600, "SAC": 2600}

@pytest.mark.parametrize("algo", ALGORITHMS)
def test_F11_the_same_seed_gives_the_same_bits_and_sees_train_rows_only(algo, task):
    "Two fits agree although the global generators differ, and although every row after the train set was replaced."
    fit, train = SB3Fit(algo, steps=SHORT[algo]), [(50, 800)]
    one = fit.fit(task, train, 7)
    np.random.seed(123)  # noqa: NPY002
    x = task.features.x.copy()
    x[801:] = np.random.default_rng(5).normal(size=x[801:].shape)
    cut = {k: getattr(task.bars, k).copy() for k in ("open", "high", "low", "close")}
    for v in cut.values(): v[801:] *= 3.0
    changed = Task(dataclasses.replace(task.bars, **cut), Features(x, task.features.names, task.features.warmup), task.limits)
    two = fit.fit(changed, train, 7)
    assert digest(one) == digest(two) and digest(one) != digest(fit.fit(task, train, 8))
    assert pickle.loads(pickle.dumps(one)).layers[0][0].shape == one.layers[0][0].shape


@pytest.mark.parametrize("shared", [False, True])
def test_discrete_ppo_walks(task, shared, tmp_path):
    net = SB3Fit("PPO", steps=4096, kind="discrete", sizes=(0.5, 1.0), window=3, shared=shared).fit(task, [(50, 1000)], 0)
    assert digest(load(save(net, tmp_path))) == digest(net)
    assert net.head == "choice" and len(walk(net, task_arena(task), task.features, [(1000, 1500)])[0].equity) == 500


def test_a_fit_describes_itself(task):
    fit = SB3Fit("PPO", steps=10, options=(("gamma", 0.5),))
    assert isinstance(fit, Fit) and json.loads(json.dumps(fit.config())) == fit.config() and fit.config()["gamma"] == 0.5
    assert pickle.loads(pickle.dumps(fit)) == fit and hash(fit) == hash(pickle.loads(pickle.dumps(fit)))
    with pytest.raises(ConfigError): SB3Fit("PPO", steps=0)
