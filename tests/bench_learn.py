"""How soon a learner gets there: wall time to a stated reward out of sample, and one update of the TCN-DQN, each beside its peer in one run.

`bench()` returns the rows, `python tests/bench_learn.py` prints them as JSON (about four minutes on a quiet machine).

**Time to a reward.** The planted world of test_learning.py; the reward is twice what the best listed rule earns on the test rows. Both learners see
the same features, account fields, episodes and rewards of the same environment and stop at the first evaluation that reaches it; they are evaluated
after every update, off the clock. Ours is `SB3Fit("PPO", shared=True)` as it comes; the peer is SB3's PPO as it comes, on a DummyVecEnv of
eight `CryptoEnv`. Steps a second would say nothing: they can be bought with larger batches that teach less.

**Update.** The same numbers in, the same Q-values out (checked), the same loss and optimiser; what differs is that pytorch-tcn computes every bar
of the window. Processor seconds of one thread, taken in turns. It runs in its own environment: STRATFAM_PEERS_TCN (or STRATFAM_PEERS) names a
Python that has it; without one the row says so.
"""
import contextlib
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium.spaces import MultiDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from stratfam.core import ObservationSpec
from stratfam.data.features import build
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.market.backtest import walk
from stratfam.market.env import CryptoEnv, observation_space
from stratfam.policies.base import BASELINES, Network, Task, baseline, task_arena
from stratfam.policies.sb3 import ALGORITHMS, SB3Fit, actor_of, isolated, scaled_spec, training_env
from stratfam.policies.tcn import DoubleDQN, DuelingPolicy, TCNExtractor
from stratfam.risk.limits import limits_from
from stratfam.validation.statistics import iqm

COMMAND = "STRATFAM_PEERS_TCN=<python with pytorch-tcn> python tests/bench_learn.py"
PEER = Path(__file__).parent / "peers" / "pytorch_tcn_update.py"
TRAIN, TEST = [(170, 3900)], [(4000, 5990)]


def row(name, value, unit, goal, ok, ratio=None, peer=None, version=None):
    return dict(name=name, value=value, unit=unit, peer=peer, peer_version=version, ratio=ratio, goal=goal, ok=ok, command=COMMAND)


# Time to a reward ----------------------------------------------------------------------------------------------------

class Reached(Exception):
    pass


class Clock(BaseCallback):
    "Wall time of a training up to its first evaluation of at least `goal`; the clock stands still while it evaluates."
    def __init__(self, score, goal, limit):
        super().__init__()
        self.score, self.goal, self.limit, self.wall, self.best = score, goal, limit, 0.0, -np.inf

    def _on_training_start(self): self.since = time.perf_counter()
    def _on_step(self): return True

    def _on_rollout_start(self):
        self.wall += time.perf_counter() - self.since
        self.best = max(self.best, self.score(self.model))
        if self.best >= self.goal or self.num_timesteps >= self.limit: raise Reached
        self.since = time.perf_counter()


def timed(model, score, goal, limit):
    "Seconds, steps and whether the goal was reached."
    clock = Clock(score, goal, limit)
    with contextlib.suppress(Reached): model.learn(10 * limit, clock, log_interval=None)
    return clock.wall, model.num_timesteps, clock.best >= goal


def reward_row(seeds=range(5), limit=400_000):
    bars = make_world("regime_flip", 6000, 3, seed=0, market="perp", edge=40.0, half_life=0.25, days=5.0).bars
    task = Task(bars, build(bars, ("return_6", "return_24", "volatility_24")), limits_from(max_drawdown=None, daily_loss=None, min_trade=0.02),
                Costs(2e-4, 2e-4, 0.0))
    a, fit = task_arena(task), SB3Fit("PPO", shared=True, features=("return_6", "volatility_24"))
    earn = lambda policy: float(np.log(walk(policy, a, task.features, TEST)[0].equity[-1] / task.capital))
    spec, goal = scaled_spec(fit, task, TRAIN), 2 * max(earn(baseline(k).fit(task)) for k in BASELINES)

    def score(model):
        layers, head, spread = actor_of(model)
        return earn(Network(spec, envs.batch.actions, layers, "tanh", head, spread))

    found = {"ours": [], "theirs": []}
    fit.fit(replace(task, budget=1), TRAIN) # Compiles what is not in the cache yet
    for seed in seeds:
        with isolated():
            envs = training_env(fit, task, TRAIN, spec, "continuous", ALGORITHMS["PPO"].accounts, seed)
            found["ours"].append(timed(fit._model(envs, seed), score, goal, limit))
            make = partial(CryptoEnv, a, task.features, spec, TRAIN, actions=envs.batch.actions, reward=fit.reward)
            eight = DummyVecEnv([partial(make, seed=8 * seed + i) for i in range(8)])
            found["theirs"].append(timed(PPO("MlpPolicy", eight, seed=seed, device="cpu"), score, goal, limit))
    ours, theirs = (iqm([wall for wall, _, _ in found[k]]) for k in ("ours", "theirs"))
    reached = all(ok for _, _, ok in found["ours"])
    steps = {k: round(median(n for _, n, _ in v)) for k, v in found.items()}
    return row(f"PPO: wall time to a net log return of {goal:.2f} out of sample, IQM over {len(seeds)} seeds ({steps['ours']:,} steps, "
               f"peer {steps['theirs']:,})", ours, "s", ">= 5x sooner", bool(reached and theirs >= 5 * ours), theirs / ours,
               "stable-baselines3 PPO defaults on DummyVecEnv of 8 CryptoEnv", "2.9.2")


# One update ----------------------------------------------------------------------------------------------------------

B, F, W, C, KERNEL, DILATIONS, L, H = 256, 16, 64, 32, 3, (1, 2, 4, 8), 3, 64


def our_update():
    "A function that does one update and returns its processor seconds, the networks' weights, and the batch."
    torch.manual_seed(0)
    spec = ObservationSpec([f"f{i}" for i in range(F)], W, account=())
    kwargs = {"spec": spec, "channels": C, "kernel": KERNEL, "dilations": DILATIONS}
    policy = DuelingPolicy(observation_space(spec, 1), MultiDiscrete([L]), lambda _: 1e-3, net_arch=[H], features_extractor_class=TCNExtractor,
                           features_extractor_kwargs=kwargs, optimizer_kwargs={"fused": True})
    rng = np.random.default_rng(0)
    batch = SimpleNamespace(observations=rng.normal(size=(B, W * F)).astype("f4"), next_observations=rng.normal(size=(B, W * F)).astype("f4"),
                            actions=rng.integers(0, L, (B, 1)), rewards=rng.normal(size=(B, 1)).astype("f4"), dones=np.zeros((B, 1), "f4"))
    data = SimpleNamespace(**{k: torch.as_tensor(v) for k, v in vars(batch).items()})
    model = SimpleNamespace(policy=policy, q_net=policy.q_net, q_net_target=policy.q_net_target, gamma=0.8, max_grad_norm=10.0)
    start = {k: v.numpy().copy() for k, v in policy.q_net.state_dict().items()}
    with torch.no_grad(): start["q"] = policy.q_net(data.observations)[:, 0].numpy()

    def go():
        began = time.process_time()
        DoubleDQN._update(model, data)
        return time.process_time() - began
    return go, {**start, **vars(batch)}


@contextlib.contextmanager
def pytorch_tcn(folder):
    "A function that asks pytorch-tcn's process for one update, and its version; None and a reason where there is no such Python."
    python = os.environ.get("STRATFAM_PEERS_TCN") or os.environ.get("STRATFAM_PEERS")
    if not python:
        yield None, "STRATFAM_PEERS_TCN names no Python with pytorch-tcn"
        return
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
    with subprocess.Popen([python, PEER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as p:
        def ask(what):
            p.stdin.write(what + "\n")
            p.stdin.flush()
            return json.loads(p.stdout.readline())
        first = p.stdout.readline()
        if not first: yield None, f"{python} has no pytorch-tcn"
        else:
            yield ask, json.loads(first)["version"]
            p.stdin.write("quit\n")


def update_rows(rounds=30):
    name = f"TCN-DQN: one update, batch {B}, {F} features, window {W}, {C} channels, dilations {DILATIONS}"
    with isolated(), tempfile.TemporaryDirectory() as folder:
        go, numbers = our_update()
        np.savez(Path(folder) / "numbers.npz", **numbers)
        with pytorch_tcn(folder) as (ask, version):
            if ask is None: return [row(name, median(go() for _ in range(rounds)) * 1e3, "ms", f"not compared: {version}", True)]
            out = []
            for norm, what in (("none", "pytorch-tcn without norm, the same function"), ("weight_norm", "pytorch-tcn as it comes (weight norm)")):
                q = np.array(ask(f"start {norm}")["q"])
                if norm == "none": np.testing.assert_allclose(q, numbers["q"], rtol=1e-4, atol=1e-5)
                pairs = [(go(), ask("update")["seconds"]) for _ in range(rounds + 3)][3:]
                ours, theirs = (median(p[i] for p in pairs) for i in (0, 1))
                out.append(row(name, ours * 1e3, "ms", ">= 2.5x faster", theirs >= 2.5 * ours, theirs / ours, what, version))
            return out


def bench() -> list[dict]:
    "All rows."
    return [*update_rows(), reward_row()]


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
