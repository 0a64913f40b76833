"""The search under kill -9, on every backend, on other terms; what it keeps, and what it refuses."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from stratfam.core import ConfigError, DataError, StratfamError, digest
from stratfam.data.worlds import make_world
from stratfam.risk.limits import limits_from
from stratfam.validation import search as room
from stratfam.validation.ledger import Ledger
from stratfam.validation.runner import open_task, share_task, unpack_outcome
from stratfam.validation.search import BENCHMARKS, Design, first_rows, load_study, search, trials_table, whole_task
from stratfam.validation.space import build_fit, members_data, members_from
from stratfam.validation.study import Job

HERE = Path(__file__).resolve().parent
SLOW = members_from([{"name": "slow", "fit": "study_fits:Slow", "search": {"turnover": {"low": 0.01, "high": 0.2, "log": True}}},
                     {"name": "trend", "fit": "stratfam.policies.base:Baseline", "fixed": {"name": "momentum"},
                      "search": {"options.bars": [5, 10, 20, 40, 80]}}])
DESIGN = Design(trials=6, batch=3, seeds=2, groups=4, test=2, embargo="2d")


def make_task(members=SLOW, bars=700):
    bars = make_world("gbm", bars, 2, "1d", seed=4).bars
    return whole_task(bars, members, limits_from(max_drawdown=None, daily_loss=None), names=("return_1",))


def same(a, b):
    "Two studies found the same, to the last bit."
    drop = lambda ts: [{k: v for k, v in dataclasses.asdict(t).items() if k != "seconds"} for t in ts]
    x, y = a.evidence(list(a.fits)), b.evidence(list(b.fits))
    return (drop(a.trials) == drop(b.trials) and x.trials.ret.equals(y.trials.ret) and x.cost.equals(y.cost) and x.seeds.equals(y.seeds)
            and all(x.paths[k].equals(y.paths[k]) for k in x.paths))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The uninterrupted search, in this process."
    folder = tmp_path_factory.mktemp("alone")
    with Ledger(folder / "ledger.db") as book:
        found = search(SLOW, make_task(), DESIGN, folder / "study", book, "one", backend="serial")
        return found, len(book)


# Kill -9 ---------------------------------------------------------------------------------------------------------------

DRIVER = """
import sys, test_study as t
from pathlib import Path
folder = Path(sys.argv[1])
with t.Ledger(folder / "ledger.db") as book: t.search(t.SLOW, t.make_task(), t.DESIGN, folder / "study", book, "one", 2, "loky")
"""


def start(folder):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
           "STUDY_LOG": str(folder / "log")}
    with open(folder / "stderr", "a") as err:
        return subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], env=env, start_new_session=True, stderr=err)


def results(folder): return {p.parent.name + p.stem for p in (folder / "study" / "results").glob("*/*.npz") if not p.name.startswith(".")}


def kill_when(folder, n):
    "Run until n results are there, then kill the coordinator and its workers without warning; the results at that moment."
    p, limit = start(folder), time.monotonic() + 240
    while len(results(folder)) < n and p.poll() is None and time.monotonic() < limit: time.sleep(0.002)
    assert p.poll() is None, (folder / "stderr").read_text()
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    return results(folder)


def test_killed_anywhere_it_goes_on_to_the_same_result_and_does_nothing_twice(alone, tmp_path):
    found, rows = alone
    log, marks = tmp_path / "log", []
    for n in (5, 18):
        there = kill_when(tmp_path, n)
        marks.append((there, len(log.read_text().splitlines())))
    p = start(tmp_path)
    assert p.wait(timeout=300) == 0, (tmp_path / "stderr").read_text()
    again = load_study(tmp_path / "study")
    assert same(found, again)
    with Ledger(tmp_path / "ledger.db") as book: assert len(book) == rows
    names = {}
    for key, fit in again.fits.items():
        if key.startswith("slow"):
            for w in again.desk.works(key, fit, range(2)).values():
                names[f"{fit.turnover!r} {w.seed} {w.train[0][0]} {w.train[-1][1]} {len(w.train)}"] = again.desk.name(w)[:34]
    lines = log.read_text().splitlines()
    assert set(lines) == set(names) and len(names) == 3 * 6 * 2
    for there, at in marks:
        redone = [line for line in lines[at:] if names[line] in there]
        assert redone == [], "a finished job was done again"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_coordinator_that_was_killed(tmp_path):
    def children(pid):
        found = set()
        for f in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(f.read_text().rpartition(")")[2].split()[1]) == pid and b"popen_loky" in (f.parent / "cmdline").read_bytes(): found.add(f)
        return found
    p, limit = start(tmp_path), time.monotonic() + 240
    while len(results(tmp_path)) < 3 and p.poll() is None and time.monotonic() < limit: time.sleep(0.01)
    workers = children(p.pid)
    assert len(workers) == 2
    p.kill(); p.wait()
    limit = time.monotonic() + 60
    while (left := [f for f in workers if f.exists()]) and time.monotonic() < limit: time.sleep(0.1)
    assert left == []


def test_interrupted_between_the_ledger_and_the_papers(alone, tmp_path, monkeypatch):
    "Trials are in the ledger, trials.json is not yet: the second run writes neither of them twice."
    found, rows = alone
    real, calls = room.write_atomic, []
    def torn(path, text):
        if Path(path).name == "trials.json":
            calls.append(path)
            if len(calls) == 1: raise KeyboardInterrupt
        return real(path, text)
    monkeypatch.setattr(room, "write_atomic", torn)
    with Ledger(tmp_path / "ledger.db") as book:
        with pytest.raises(KeyboardInterrupt): search(SLOW, make_task(), DESIGN, tmp_path / "study", book, "one", backend="serial")
        with pytest.raises(ConfigError, match="has not finished"): load_study(tmp_path / "study")
        again = search(SLOW, make_task(), DESIGN, tmp_path / "study", book, "one", backend="serial")
        assert len(book) == rows and same(found, again)


# The same bits everywhere ----------------------------------------------------------------------------------------------

PPO = members_from([{"name": "ppo", "fit": "stratfam.policies.sb3:SB3Fit", "fixed": {"algo": "PPO", "steps": 1500, "accounts": 8, "episode": 40},
                     "search": {"options.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}}])


@pytest.mark.parametrize("jobs", [2, 3])
def test_processes_and_none_give_the_same_bits(jobs, alone, tmp_path):
    with Ledger(tmp_path / "l.db") as book: assert same(alone[0], search(SLOW, make_task(), DESIGN, tmp_path / "s", book, "one", jobs, "loky"))


def test_learners_are_the_same_in_every_process(tmp_path):
    design, task = Design(cv="kcv", trials=2, batch=1, seeds=2, groups=3, embargo="2d"), make_task(PPO, 400)
    found = []
    for jobs, backend in ((1, "serial"), (2, "loky")):
        with Ledger(tmp_path / f"{backend}.db") as book: found.append(search(PPO, task, design, tmp_path / backend, book, "one", jobs, backend))
    assert same(*found)
    assert found[0].trials[-1].rising in (True, False) and found[0].evidence().trials.ret.iloc[:, -1].std() > 0


@pytest.mark.proof
def test_a_cluster_of_two_machines_gives_the_same_bits(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}})
        assert len([n for n in ray.nodes() if n["Alive"]]) == 2
        with Ledger(tmp_path / "l.db") as book: assert same(alone[0], search(SLOW, make_task(), DESIGN, tmp_path / "s", book, "one", 2, "ray"))
        with Ledger(tmp_path / "p.db") as book:
            design, task = Design(cv="kcv", trials=2, batch=1, seeds=2, groups=3, embargo="2d"), make_task(PPO, 400)
            found = [search(PPO, task, design, tmp_path / b, book, f"ppo {b}", 2, b) for b in ("ray", "loky")]
        assert same(*found)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_order_of_workers_does_not_matter(alone, tmp_path, monkeypatch):
    from stratfam.validation import runner
    monkeypatch.setattr(runner, "perform", lambda source, works, *a: ((i, runner.do_work(source, works[i])) for i in reversed(range(len(works)))))
    with Ledger(tmp_path / "l.db") as book: assert same(alone[0], search(SLOW, make_task(), DESIGN, tmp_path / "s", book, "one"))


# Failures --------------------------------------------------------------------------------------------------------------

FEW = Design(trials=4, batch=4, seeds=1, groups=4, embargo="2d")

def fails(fault): return members_from([{"name": "bad", "fit": "study_fits:Failing", "search": {"fault": ["none", fault]}}])


def test_a_failed_trial_is_counted_and_named(tmp_path):
    members = fails("value")
    with Ledger(tmp_path / "l.db") as book:
        found = search(members, make_task(members), FEW, tmp_path / "s", book, "one", backend="serial")
        assert {t.outcome for t in found.trials if t.member == "bad"} == {"done", "failed"}, "two configurations exist, so two were tried"
        bad = next(t for t in found.trials if t.outcome == "failed")
        assert bad.error == "ValueError: the loss is NaN" and trials_table(found).loc[bad.key, "error"] == bad.error
        bars = found.task.bars
        family = book.family(bars.symbols, bars.time[0], bars.time[-1])
        assert (family.daily.shape[1], family.counted) == (4, 1) and "1 failed" in family.explain()


def test_what_is_the_machines_fault_stops_the_study_and_is_not_kept(tmp_path):
    members = fails("memory")
    with Ledger(tmp_path / "l.db") as book:
        with pytest.raises(MemoryError): search(members, make_task(members), FEW, tmp_path / "s", book, "one", backend="serial")
    kept = [unpack_outcome(p.read_bytes()) for p in (tmp_path / "s/results").rglob("*.npz")]
    assert not any(o.error for o in kept) and not (tmp_path / "s/finished.json").exists()


def test_pruning_looks_at_its_batch_alone(tmp_path):
    design = dataclasses.replace(DESIGN, prune=0.5, seeds=3)
    with Ledger(tmp_path / "l.db") as book: found = search(SLOW, make_task(), design, tmp_path / "s", book, "one", backend="serial")
    out = [t for t in found.trials if t.outcome == "pruned"]
    assert [t.seeds for t in out] == [1] * len(out) and len(out) in (1, 2) and all(t.key.startswith("slow") for t in out)
    assert {t.seeds for t in found.trials if t.member == "slow" and t.outcome == "done"} == {3}
    bars = found.task.bars
    with Ledger(tmp_path / "l.db") as book: family = book.family(bars.symbols, bars.time[0], bars.time[-1])
    assert (family.trials["outcome"] == "pruned").sum() == len(out) and family.counted == 0


def test_one_search_at_a_time_in_a_folder(tmp_path):
    from stratfam.validation.runner import only_coordinator
    with Ledger(tmp_path / "l.db") as book, only_coordinator(tmp_path / "s"), pytest.raises(StratfamError, match="another search"):
        search(SLOW, make_task(), DESIGN, tmp_path / "s", book, "one", backend="serial")


@pytest.mark.parametrize("change", [{"seeds": 3}, {"groups": 5}, {"trials": 7}, {"target": 1.0}, {"embargo": "3d"}, {"seed": 1}, {"looks": 2}])
def test_a_study_cannot_be_continued_on_other_terms(alone, change):
    found, _ = alone
    with Ledger(found.folder.parent / "ledger.db") as book, pytest.raises(ConfigError, match="other terms"):
        search(SLOW, make_task(), dataclasses.replace(DESIGN, **change), found.folder, book, "one", backend="serial")


def test_a_study_cannot_be_continued_on_other_bars_or_members(alone):
    found, _ = alone
    with Ledger(found.folder.parent / "ledger.db") as book:
        for members, task in ((SLOW, make_task(bars=701)), (SLOW[:1], make_task())):
            with pytest.raises(ConfigError, match="other terms"): search(members, task, DESIGN, found.folder, book, "one", backend="serial")


def test_a_damaged_result_is_refused_by_name(alone, tmp_path):
    import shutil
    found, _ = alone
    shutil.copytree(found.folder, tmp_path / "copy")
    victim = sorted((tmp_path / "copy" / "results").rglob("*.npz"))[0]
    victim.write_bytes(victim.read_bytes()[:-40])
    with pytest.raises(DataError, match="Delete the file"):
        load_study(tmp_path / "copy").evidence()


# What is kept ----------------------------------------------------------------------------------------------------------

def test_a_shared_market_is_the_same_market(tmp_path):
    for world in ("gbm", "crypto_like"):
        for market in ("spot", "perp"):
            task = whole_task(make_world(world, 800, 3, seed=2, market=market, funding=1e-4 if market == "perp" else 0.0).bars, SLOW)
            again = open_task(share_task(task, tmp_path))
            assert digest(again) == digest(task) and not again.bars.close.flags.writeable
            cut = first_rows(again, 600)
            assert digest(cut) == digest(first_rows(task, 600)) and len(cut.bars) == 600 and cut.label_end.max() == 599


def test_every_seed_and_every_benchmark_is_in_the_ledger(alone):
    found, _ = alone
    with Ledger(found.folder.parent / "ledger.db") as book:
        units = book.recorded("one")
        rows = book._rows("trial")
    assert {u for u, _ in units} >= {t.unit for t in found.trials}
    slow = [t for t in found.trials if t.member == "slow"]
    for t in slow:
        mine = [r for r in rows if r["mean"] == t.unit]
        assert sorted(str(r["seed"]) for r in mine) == ["0", "1", "None"] and all(r["study"] == "one" and r["ret"] for r in mine)
    assert sum(r["seed"] is None for r in rows) == len(found.trials) == 6 + len(BENCHMARKS)


def test_a_score_does_not_hang_on_the_best_seed(alone):
    found, _ = alone
    t = next(t for t in found.trials if t.member == "slow")
    cv = found.evidence([t.key])
    from stratfam.validation.statistics import iqm
    from stratfam.validation.study import path_sharpes
    assert t.score == pytest.approx(iqm(path_sharpes(cv.paths[t.key].to_numpy().T, found.task.bars.step)), abs=1e-12)
    assert Job(t.key, 0, 0) in found.desk.works(t.key, found.fits[t.key], [0])


def test_walk_forward_says_nothing_about_its_first_window(tmp_path):
    with Ledger(tmp_path / "l.db") as book:
        found = search(SLOW, make_task(), dataclasses.replace(DESIGN, cv="wf", groups=5), tmp_path / "s", book, "one", backend="serial")
    cv, (a, b) = found.evidence(), (int(found.folds.test[0, 0]), int(found.folds.test[-1, 1]))
    assert a > 100 and len(cv.trials.ret) == b - a and cv.trials.ret.index[0] == found.task.bars.time[a]


@pytest.mark.parametrize(("row", "says"), [
    ({"name": "x"}, "needs a name and a fit"), ({"name": "x", "fit": "nowhere:Fit"}, "cannot be used as a fit"),
    ({"name": "x", "fit": "study_fits:Slow", "fixed": {"turnovr": 1.0}}, "Did you mean 'turnover'"),
    ({"name": "x", "fit": "study_fits:Slow", "search": {"turnover": {"low": 2.0, "high": 1.0}}}, "low < high"),
    ({"name": "x", "fit": "study_fits:Slow", "sarch": {}}, "Did you mean 'search'")])
def test_a_space_that_cannot_work_is_refused_before_anything_runs(row, says):
    with pytest.raises(ConfigError, match=says): [build_fit(m.fit, m.fixed) for m in members_from([row])]


def test_spaces_survive_a_file():
    assert members_data(members_from(json.loads(json.dumps(members_data(SLOW))))) == members_data(SLOW)
