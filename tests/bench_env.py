"""The environment and PPO, measured in one run: `bench()` returns the rows, `python tests/bench_env.py` prints them as JSON.

Processor seconds of this process, so a busy neighbour distorts less. FinRL_Crypto is not a dependency: its steps per second
are those measured once on the development machine (see the rows' names), so their ratios compare different runs."""
import json
import time

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from stratfam.core import Features, ObservationSpec
from stratfam.data.worlds import make_world
from stratfam.market.backtest import arena
from stratfam.market.env import BatchEnv, CryptoEnv
from stratfam.policies.base import Task, task_arena
from stratfam.policies.sb3 import SB3Fit
from stratfam.risk.limits import limits_from

COMMAND = "python tests/bench_env.py"
N, F, T = 10, 11, 8000
FULL_GATE = dict(stop_loss=0.05, take_profit=0.1, trailing=0.08, target_vol=1.0, max_jump=10.0, max_corr_gross=1.0, max_turnover=2.0,
                 min_trade=0.005, losing_streak=5, cooldown_bars=5, drawdown_cut=0.5)
NAMES = tuple(f"f{i}" for i in range(F))


def row(name, value, unit, goal, ok, peer=None, version=None, ratio=None):
    return dict(name=name, value=value, unit=unit, peer=peer, peer_version=version, ratio=ratio, goal=goal, ok=bool(ok), command=COMMAND)


def cpu_seconds(work, rounds=7):
    "Best of `rounds`, processor time."
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def market(limits):
    x = np.random.default_rng(0).normal(size=(T, N, F)).astype("f4")
    return arena(make_world("gbm", n_bars=T, n_symbols=N, seed=1).bars, limits_from(**limits)), Features(x, NAMES, 0)


def stepping_row(window, goal, finrl):
    "Random actions, every weight changed at every bar; episodes of 250 bars keep the accounts funded."
    a, features = market(FULL_GATE)
    env = BatchEnv(a, features, ObservationSpec(NAMES, window), [(200, T)], B=64, episode=250)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 64, N)).astype("f4")
    fills = env.state.acct["fills"].sum()
    speed = 64 * 500 / cpu_seconds(lambda: [env.step(actions[i % 50]) for i in range(500)])
    assert env.state.acct["fills"].sum() > fills and np.isfinite(env.step(actions[0])[0]).all()
    return row(f"steps/s, 64 accounts x {N} symbols x {F} features, window {window}, full gate, observations written", speed, "steps/s",
               f">= {goal:,}", speed >= goal, "FinRL_Crypto CryptoEnvCCXT (noted earlier)", "495a428", speed / finrl)


def one_account_row():
    a, features = market({})
    env = CryptoEnv(a, features, ObservationSpec(NAMES), [(200, T)], episode=250)
    action = np.random.default_rng(0).uniform(-1, 1, (50, N)).astype("f4")
    def run():
        env.reset(seed=0)
        for i in range(900):
            if any(env.step(action[i % 50])[2:4]): env.reset()
    return row("steps/s of CryptoEnv, one account", 900 / cpu_seconds(run), "steps/s", "reported", True)


def training_row():
    "PPO as the library ships it on eight of our own environments, and ours: steps a processor second only, not yet reward."
    a, features = market({})
    task, spec, steps = Task(a.bars, features, a.limits), ObservationSpec(NAMES), 32_768
    def library():
        torch.set_num_threads(1)
        env = DummyVecEnv([lambda: CryptoEnv(task_arena(task), features, spec, [(200, T)]) for _ in range(8)])
        PPO("MlpPolicy", env, seed=0, device="cpu").learn(steps)
    ours, theirs = (cpu_seconds(w, 2) for w in (lambda: SB3Fit("PPO", steps=steps).fit(task, [(200, T)], 0), library))
    return row("PPO training, environment steps/s", steps / ours, "steps/s", "reported; judged by time to a reward", True,
               "stable-baselines3 defaults on DummyVecEnv of 8 CryptoEnv", "2.9.2", theirs / ours)


def bench() -> list[dict]:
    "All rows."
    return [stepping_row(1, 500_000, 24_468), stepping_row(50, 200_000, 5_262), one_account_row(), training_row()]


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
