"""Deterministic simulation: many seeds under faults, the same trace everywhere, planted bugs caught."""
import os
import subprocess
import sys
from collections import Counter

import pytest

from stratfam.trading import desk, simulate as sim
from stratfam.trading.simulate import KINDS, Weather, shrink, simulate, weather


def run(seeds):
    faults, bad = Counter(), []
    for seed in seeds:
        r = simulate(seed)
        faults.update(r.faults)
        if not r.ok: bad.append(repr(r))
    return faults, bad


def test_seeds_hold_every_invariant():
    faults, bad = run(range(1000, 1000 + int(os.environ.get("STRATFAM_SEEDS", 12))))
    assert bad == []
    assert len(faults) >= 12, f"only {sorted(faults)} were injected"


# Faults of the loop that are known and not mended yet. A seed that turns green fails here, and leaves this list.
OPEN = {5269: "R17: an exit sent while the disk is full, by a process that then dies, is in no journal",
        5307: "R20: two exits stay open in the journal after the venue has healed"}


@pytest.mark.proof
@pytest.mark.xfail(strict=True, reason="the loop's open faults, see OPEN")
@pytest.mark.parametrize("seed", OPEN)
def test_open_faults(seed):
    assert run([seed])[1] == []


@pytest.mark.proof
def test_many_seeds_hold_every_invariant():
    faults, bad = run(s for s in range(5000, 5000 + int(os.environ.get("STRATFAM_PROOF_SEEDS", 400))) if s not in OPEN)
    assert bad == [] and set(KINDS) - {"crash", "gap"} <= set(faults)


def test_the_same_seed_gives_the_same_trace_in_any_process():
    code = "from stratfam.trading.simulate import simulate\nprint(simulate(11, bars=10).trace, simulate(12, bars=10).trace)"
    out = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": h, "PYTHONPATH": os.getcwd()}).stdout for h in ("1", "77")}
    assert len(out) == 1 and out.pop().split() == [simulate(11, bars=10).trace, simulate(12, bars=10).trace]


def test_weather_has_three_kinds_and_thirty_bars():
    for s in range(200): assert len(weather(s).kinds) >= 3 and weather(s).bars >= 30 and weather(s).symbols >= 2


# A planted bug must be found within a few seeds of the weather that provokes it.
def doubled(self, w, line, still):
    "Resend after a timeout."
    before(self, w, line, still)
    if line.outcome == "UNKNOWN" and w.trigger is None: self._call(w, line)


before = desk.Desk._leave
STORM = ("timeout_after", "timeout_before", "error_after")


def found(kinds, rate=0.3, seeds=range(20), bars=24):
    for seed in seeds:
        r = simulate(seed, under=Weather(seed, kinds, rate, bars))
        if not r.ok: return r
    return None


def test_planted_resend_is_caught(monkeypatch):
    assert found(STORM, seeds=range(3)) is None
    monkeypatch.setattr(desk.Desk, "_leave", doubled)
    r = found(STORM)
    assert r is not None and r.broken[0].startswith(("R16", "R1:", "R18", "R5", "R20"))


def test_planted_silence_about_stops_is_caught(monkeypatch):
    monkeypatch.setattr(desk.Desk, "protect", lambda self, bar_ms: None)
    r = found(("refused",), seeds=range(6))
    assert r is not None and r.broken[0].startswith("R10")


def hasty(self, w, line, still):
    "No answer is taken for a no."
    before(self, w, line, still)
    if line.outcome == "UNKNOWN" and line.id in self.open: self._over(line, "never_sent", "no answer")


def test_planted_end_without_evidence_is_caught(monkeypatch):
    assert found(("timeout_after",), seeds=range(1)) is None
    monkeypatch.setattr(desk.Desk, "_leave", hasty)
    r = simulate(0, under=Weather(0, ("timeout_after", "gap"), 0.3, 24))
    assert not r.ok and r.broken[0].startswith("R20") and "never sent" in r.broken[0]
    smaller = shrink(r)
    assert smaller.broken[0].startswith("R20") and smaller.weather.kinds == ("timeout_after",) and smaller.weather.bars < 24


def test_crash_everywhere_is_survived():
    "Every named point, as a place to die."
    names = Counter()
    plain = sim.Simulation.point

    def note(self, name):
        names[name.split(" ")[0]] += 1
        plain(self, name)

    sim.Simulation.point = note
    try: simulate(2)
    finally: sim.Simulation.point = plain
    assert {"before-commit", "after-commit", "before-send", "after-send", "reconcile", "reconciled", "decided", "cycle"} <= set(names)
