"""Fits for tests of a study: they write down that they ran, take their time, fail on purpose, or remember what they were fitted on."""
import os
import time
from dataclasses import dataclass
from typing import Any

from stratfam.core import Decision
from stratfam.policies.base import baseline


@dataclass(frozen=True)
class Slow:
    "Takes a moment and leaves a line in the file that STUDY_LOG names; what it makes depends on its parameter and seed."
    turnover: float = 0.05
    pause: float = 0.03
    name: str = "slow"
    stochastic = True

    def config(self): return {"fit": "slow", "turnover": self.turnover}

    def fit(self, task, train, seed, progress=None):
        time.sleep(self.pause)
        if os.environ.get("STUDY_LOG"):
            with open(os.environ["STUDY_LOG"], "a") as f: f.write(f"{self.turnover!r} {seed} {train[0][0]} {train[-1][1]} {len(train)}\n")
        return baseline("random", turnover=self.turnover).fit(task, train, seed)


@dataclass(frozen=True)
class Trader:
    "Trades at random, and remembers the rows it was fitted on."
    turnover: float = 0.1
    name: str = "trader"
    stochastic = False

    def config(self): return {"fit": "trader", "turnover": self.turnover}

    def fit(self, task, train, seed, progress=None):
        return Trading(tuple(train), baseline("random", turnover=self.turnover).fit(task, train, seed))


@dataclass(frozen=True, eq=False)
class Trading:
    "The policy of `Trader`."
    rows: tuple[tuple[int, int], ...]
    inner: Any

    @property
    def spec(self): return self.inner.spec
    def reset(self, B: int, seed: int) -> Any: return self.inner.reset(B, seed)
    def act(self, obs: Any, state: Any) -> tuple[Decision, Any]: return self.inner.act(obs, state)


@dataclass(frozen=True)
class Failing:
    "Fails when asked to, as a learner may."
    fault: str = "none" # none, value, memory
    name: str = "failing"
    stochastic = False

    def config(self): return {"fit": "failing", "fault": self.fault}

    def fit(self, task, train, seed, progress=None):
        if self.fault == "value": raise ValueError("the loss is NaN")
        if self.fault == "memory": raise MemoryError("no room")
        return baseline("buy_and_hold").fit(task, train, seed)
