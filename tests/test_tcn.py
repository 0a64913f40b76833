"""The convolution against its textbook form, the Q-network's algebra, and the TCN-DQN as a `Fit`: saved, interrupted, blind to the future."""
import dataclasses
import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from gymnasium.spaces import MultiDiscrete

from stratfam.core import ConfigError, DataError, Features, ObservationSpec, digest
from stratfam.data.features import build
from stratfam.data.worlds import make_world
from stratfam.market.backtest import walk
from stratfam.market.env import observation_space
from stratfam.policies.base import Fit, Task, load, save, task_arena
from stratfam.policies.sb3 import SB3Fit, symbol_columns, unroll
from stratfam.policies.tcn import (TCN, DuelingNet, TCNDQNFit, TCNExtractor, advantages, cone, conv_network, double_target, dueling, receptive_field,
                                   training_env)
from stratfam.risk.limits import limits_from
from stratfam.validation.splits import PurgedKFold
from stratfam.validation.study import cross_validate

SHORT = TCNDQNFit(steps=8192, window=16, dilations=(1, 2), channels=8, sizes=(0.5, 1.0))


@pytest.fixture(scope="module")
def task():
    bars = make_world("gbm", n_bars=1500, n_symbols=3, seed=1, market="perp").bars
    return Task(bars, build(bars, ("return_1", "volatility_24")), limits_from(max_drawdown=None, daily_loss=None, min_trade=0.01))


def textbook(net, x):
    "Every bar of the window, the past filled with zeros; float64."
    conv = lambda v, c, d: torch.nn.functional.conv1d(torch.nn.functional.pad(v, (d * (c.kernel_size[0] - 1), 0)), c.weight, c.bias, dilation=d)
    for b in net.blocks: x = torch.relu(torch.relu(conv(torch.relu(conv(x, b.one, b.stage.dilation)), b.two, b.stage.dilation)) + b.skip(x))
    return x


SHAPES = [(2, (1,)), (3, (1, 2)), (2, (1, 2, 4, 8)), (4, (1, 3, 6)), (3, (2, 4)), (5, (1, 1, 5)), (2, (3,)), (3, (1, 2, 4, 8))]


@pytest.mark.parametrize("kernel, dilations", SHAPES)
@pytest.mark.parametrize("more", [0, 1, 7])
def test_the_cone_is_the_last_step_of_the_textbook_network(kernel, dilations, more):
    torch.manual_seed(kernel + more)
    window = receptive_field(kernel, dilations) + more
    net = TCN(4, window, 4, kernel, dilations).double()
    x = torch.randn(3, 4, window, dtype=torch.float64)
    torch.testing.assert_close(net(x), textbook(net, x)[..., -1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel, dilations", SHAPES)
def test_exactly_the_receptive_field_has_a_gradient(kernel, dilations):
    torch.manual_seed(0)
    field = receptive_field(kernel, dilations)
    net = TCN(2, field + 5, 16, kernel, dilations).double()
    x = torch.randn(8, 2, field + 5, dtype=torch.float64, requires_grad=True)
    net(x).square().sum().backward()
    seen = torch.nonzero(x.grad.abs().sum(dim=(0, 1)))[:, 0]
    assert (seen.min(), seen.max()) == (5, field + 4)
    with pytest.raises(ConfigError, match=f"looks {field} bars back"): cone(field - 1, kernel, dilations)


def test_dueling_and_double_on_random_numbers():
    "Advantages of mean zero whatever the stream says; the target against a loop in plain Python."
    rng = np.random.default_rng(0)
    for _ in range(50):
        B, N, L = (int(v) for v in rng.integers(1, 6, 3))
        value, adv = torch.randn(B, N, 1), torch.randn(B, N, L) * 100
        q = dueling(value, adv)
        torch.testing.assert_close(q.mean(dim=2, keepdim=True), value, rtol=1e-4, atol=1e-4)
        reward, done, online, target = torch.randn(B, 1), torch.randint(0, 2, (B, 1)).float(), torch.randn(B, N, L), torch.randn(B, N, L)
        got = double_target(reward, done, 0.7, online, target)
        for b in range(B):
            nxt = sum(float(target[b, n, max(range(L), key=lambda k: float(online[b, n, k]))]) for n in range(N))
            assert float(got[b]) == pytest.approx(float(reward[b]) + 0.7 * (1 - float(done[b])) * nxt, rel=1e-5, abs=1e-6)


def test_each_symbol_is_asked_the_same_question():
    "The answer about a symbol depends on that symbol's numbers and the account's alone, whatever its place."
    spec = ObservationSpec(("a", "b"), 6)
    space = observation_space(spec, 4)
    torch.manual_seed(0)
    extractor = TCNExtractor(space, spec, 8, 3, (1,))
    net = DuelingNet(space, MultiDiscrete([3] * 4), extractor, extractor.features_dim, [8], torch.nn.ReLU)
    obs, columns = torch.randn(5, spec.size(4)), symbol_columns(spec, 4)
    changed = obs.clone()
    own = [c for c in columns[2] if sum(c in row for row in columns) == 1]
    changed[:, own] = torch.randn(5, len(own))
    same = (net(changed) == net(obs)).all(dim=2).all(dim=0)
    assert same.tolist() == [True, True, False, True]
    moved = obs.clone()
    moved[:, columns[0]], moved[:, columns[3]] = obs[:, columns[3]], obs[:, columns[0]]
    torch.testing.assert_close(net(moved)[:, [3, 1, 2, 0]], net(obs), rtol=1e-4, atol=1e-5)


def test_columns_cover_the_observation():
    rng = np.random.default_rng(1)
    fields = ("weight", "cash", "unrealised", "drawdown", "since_trade")
    for _ in range(50):
        N, W, F, k = (int(v) for v in rng.integers(1, 5, 4))
        spec = ObservationSpec([f"f{i}" for i in range(F)], W, account=tuple(rng.permutation(fields)[:k]))
        columns = symbol_columns(spec, N)
        assert sorted(set(columns.ravel())) == list(range(spec.size(N)))
        w = (np.eye(columns.shape[1], dtype="f4"), np.zeros(columns.shape[1], "f4"))
        x = rng.normal(size=(3, spec.size(N))).astype("f4")
        assert (x @ unroll((w,), columns, spec.size(N))[0][0] == x[:, columns].reshape(3, -1)).all()


# The fit -------------------------------------------------------------------------------------------------------------

def test_F11_the_same_seed_gives_the_same_bits_and_sees_train_rows_only(task):
    "Scaler and network are equal although every row after the train set was replaced."
    train = [(50, 800)]
    one = SHORT.fit(task, train, 7)
    np.random.seed(123)  # noqa: NPY002
    torch.manual_seed(123)
    x = task.features.x.copy()
    x[801:] = np.random.default_rng(5).normal(size=x[801:].shape)
    cut = {k: getattr(task.bars, k).copy() for k in ("open", "high", "low", "close")}
    for v in cut.values(): v[801:] *= 3.0
    changed = Task(dataclasses.replace(task.bars, **cut), Features(x, task.features.names, task.features.warmup), task.limits)
    assert digest(one) == digest(SHORT.fit(changed, train, 7)) != digest(SHORT.fit(task, train, 8))


def test_saved_loaded_and_walked(task, tmp_path):
    policy = SHORT.fit(task, [(50, 1000)], 0)
    folder = save(policy, tmp_path / "net", {"fit": SHORT.config()})
    again, a = load(folder), task_arena(task)
    runs = [walk(p, a, task.features, [(1000, 1500)])[0] for p in (policy, again, pickle.loads(pickle.dumps(policy)))]
    assert all((r.equity == runs[0].equity).all() for r in runs) and len(runs[0].trades) > 0
    for f in folder.iterdir(): assert b"pickle" not in f.read_bytes() and b"torch" not in f.read_bytes().replace(b'"torch"', b"")
    code = (f"import numpy as np\nfrom stratfam.policies.base import load\np = load({str(folder)!r})\n"
            "print(p.act(np.linspace(-2, 2, p.spec.size(3), dtype='f4')[None], None)[0].weight.tobytes().hex())")
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert out == policy.act(np.linspace(-2, 2, policy.spec.size(3), dtype="f4")[None], None)[0].weight.tobytes().hex()


def test_arrays_say_what_torch_says(task):
    rng = np.random.default_rng(0)
    for i, (kernel, dilations) in enumerate(SHAPES):
        fit = dataclasses.replace(SHORT, kernel=kernel, dilations=dilations, window=64, context=i % 2 == 1)
        vec = training_env(fit, task, [(100, 800)], ObservationSpec(task.features.names, 64), "discrete", 4, 0)
        model = fit._model(vec, 1)
        net, obs = conv_network(model, vec.batch.spec, vec.batch.actions), rng.normal(size=(20, vec.batch.spec.size(3))).astype("f4")
        with torch.no_grad(): q = model.q_net(torch.as_tensor(obs))
        got = advantages(net, obs)
        np.testing.assert_allclose(got.reshape(20, 3, -1), (q - q.mean(dim=2, keepdim=True)).numpy(), rtol=1e-3, atol=1e-4)
        assert (np.vstack([advantages(net, o[None]) for o in obs]) == got).all()
        best = model.predict(obs, deterministic=True)[0]
        assert (got.reshape(20, 3, -1).argmax(axis=2) == best).all()


def test_it_is_a_fit_that_a_study_can_use(task):
    fit = dataclasses.replace(SHORT, steps=1024)
    assert isinstance(fit, Fit) and json.loads(json.dumps(fit.config())) == fit.config() and pickle.loads(pickle.dumps(fit)) == fit
    folds = PurgedKFold(3).folds(task.bars, task.label_end, task.lookback, "1d")
    cv = cross_validate({"tcn": fit}, task, folds, seeds=(0, 1))
    assert cv.trials.ret.shape == (1500, 1) and len(cv.seeds) == 2 and cv.trials.config["tcn"]["fit"] == "tcn_dqn"


# Interrupted ---------------------------------------------------------------------------------------------------------

STOPS = {"PPO": SB3Fit("PPO", steps=12_288), "PPO shared": SB3Fit("PPO", steps=12_288, shared=True), "A2C": SB3Fit("A2C", steps=4096),
         **{k: SB3Fit(k, steps=3000) for k in ("DDPG", "TD3", "SAC")}, "TCN-DQN": SHORT}


@pytest.mark.parametrize("name", STOPS)
def test_a_training_that_was_interrupted_twice_gives_the_same_bits(name, task, tmp_path):
    "Ctrl-C at 40 % and at 80 %: each time a checkpoint of plain tensors; the third call ends where an uninterrupted training ends."
    fit, train, at = STOPS[name], [(50, 1400)], iter((0.4, 0.8))
    def stop_at(share):
        def tell(p):
            if p.step >= share * p.total: signal.raise_signal(signal.SIGINT)
        return tell
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="same call goes on"): fit.fit(task, train, 3, stop_at(next(at)), checkpoint=tmp_path)
        assert isinstance(torch.load(tmp_path / "checkpoint.pt", weights_only=True), dict)
    with pytest.raises(DataError, match="another training"): fit.fit(task, train, 4, checkpoint=tmp_path)
    assert digest(fit.fit(task, train, 3, checkpoint=tmp_path)) == digest(fit.fit(task, train, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused_and_never_executed(task, tmp_path):
    class Bomb:
        def __reduce__(self): return open, (str(tmp_path / "ran"), "w")
    for raw in (b"", b"not a checkpoint", pickle.dumps(Bomb())):
        (tmp_path / "checkpoint.pt").write_bytes(raw)
        with pytest.raises(DataError, match="remove it"): SHORT.fit(task, [(50, 1400)], 0, checkpoint=tmp_path)
    torch.save({"key": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match="remove it"): SHORT.fit(task, [(50, 1400)], 0, checkpoint=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_tensorboard_is_optional(task, tmp_path):
    fit = dataclasses.replace(SHORT, steps=4096)
    try: import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install tensorboard"): fit.fit(task, [(50, 1400)], 0, tensorboard=tmp_path)
        return
    assert digest(fit.fit(task, [(50, 1400)], 0, tensorboard=tmp_path)) == digest(fit.fit(task, [(50, 1400)], 0))
    assert list(tmp_path.rglob("events.*"))
