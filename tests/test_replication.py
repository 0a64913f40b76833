"""The re-analysis of arXiv 2209.05559: the same market as the paper's, a run that resumes, and a shipped result that renders."""
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stratfam.core import DataError, as_step, bars_from_close
from stratfam.data.download import PAPER, PRESETS
from stratfam.data.worlds import make_world
from stratfam.reporting import run_report, templates
from stratfam.validation import replication as rep
from stratfam.validation.space import Member

SHARED = Path(os.environ.get("STRATFAM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "paper_2209_05559_close5m"
needs_closes = pytest.mark.skipif(not SHARED.is_dir(), reason="the paper's closes are not here; set STRATFAM_DATA")
RULE = Member("trend", "stratfam.policies.base:Baseline", {"name": "momentum"}, {"options.bars": [24, 168], "options.entry": [0.0, 0.5, 1.0]})


def made_up(before=4_600, after=700, seed=0):
    "OHLCV bars of the ten coins around the cut."
    b = make_world("crypto_like", before + after, 10, "5m", seed).bars
    return dataclasses.replace(b, time=rep.CUT + np.arange(-before, after) * as_step("5m"), symbols=PAPER)


@pytest.fixture(scope="module")
def bars(): return made_up()


def test_a_download_gives_what_the_archive_gives(bars):
    "Bars that carry more than closes are reduced to closes first, and the coins' order is the paper's whatever the file's."
    whole, cut = rep.paper_task(bars)
    bare = bars_from_close(bars.time, bars.close, bars.symbols, "5m")
    other, same = rep.paper_task(bare)
    assert cut == same == 4_600 and not whole.bars.ohl_known and whole.bars.symbols == tuple(PRESETS["finrl-crypto-2022"].symbols)
    np.testing.assert_array_equal(whole.features.x, other.features.x, strict=True)


def test_nothing_before_the_cut_knows_what_comes_after(bars):
    close = np.array(bars.close)
    close[4_600:] *= np.exp(np.random.default_rng(0).normal(0, 0.05, (700, 10)).cumsum(axis=0))
    a, b = rep.paper_task(bars)[0], rep.paper_task(bars_from_close(bars.time, close, PAPER, "5m"))[0]
    np.testing.assert_array_equal(a.features.x[:4_600], b.features.x[:4_600], strict=True)
    assert rep.loudness(a, [(0, 4_600)]).tolist() == rep.loudness(b, [(0, 4_600)]).tolist()
    assert not np.array_equal(a.features.x[4_600:], b.features.x[4_600:])


def test_a_stopped_run_goes_on_to_the_same_result(bars, tmp_path):
    plan = [rep.Contest("ppo-cpcv", RULE, "cpcv", 3), rep.Contest("ppo-wf", RULE, "wf", 3)]
    whole = rep.replicate(bars, tmp_path / "whole", plan, backend="serial")

    class Pulled(Exception): pass
    def pull(name, status):
        if name == "ppo-wf": raise Pulled
    with pytest.raises(Pulled): rep.replicate(bars, tmp_path / "parts", plan, backend="serial", tell=pull)
    half = rep.read_result(tmp_path / "parts")
    assert list(half["contests"]) == ["ppo-cpcv"] and "Not finished: ppo-wf." in rep.findings(half)
    assert rep.beside_paper(half).loc["ppo-wf", "verdict"] == "not finished"
    again = rep.replicate(bars, tmp_path / "parts", plan, backend="serial")
    timeless = lambda r: {k: {x: v for x, v in row.items() if x != "search_seconds"} for k, row in r["contests"].items()}
    assert timeless(again) == timeless(whole)


def test_a_damaged_result_is_refused(tmp_path):
    (tmp_path / rep.RESULT).write_text("{")
    with pytest.raises(DataError, match="not readable"): rep.read_result(tmp_path)
    (tmp_path / rep.RESULT).write_text("{}")
    with pytest.raises(DataError, match="not a replication"): rep.read_result(tmp_path)


def test_the_shipped_result_says_what_it_is():
    said = rep.read_result(templates() / rep.RESULT)
    assert said["market"]["close_only"] and said["market"]["fee"] == 0.003
    assert (said["market"]["train_rows"], said["market"]["test_rows"]) == (24_999, 16_704)
    assert "stratfam replicate" in said["command"] and said["budget"] > 0 and {"ppo-cpcv", "ppo-wf"} <= set(said["contests"])
    for name, row in said["contests"].items():
        assert row["trials"] + row["failed"] <= row["trials_asked"] and row["steps"] > 0 and len(row["test"]) == row["seeds_asked"] >= 3, name
        assert row["verdict"] in ("REJECT", "NOT ENOUGH DATA") and 0.0 <= row["pbo"] <= 1.0
        for r in row["test"]: assert r["ret_cost_x4"] <= r["ret_cost_x2"] <= r["ret"] <= r["ret_cost_x0"]
    assert rep.findings(said)[0].split()[2] == str(len(said["contests"]))
    np.testing.assert_allclose(said["bystanders"]["buy_and_hold"]["vol"], rep.PUBLISHED["equal_weight"].vol, atol=1e-5)


@needs_closes
def test_it_is_the_papers_market():
    "Rows as published; the shipped result's accounts of the rules again, to the last digit."
    from stratfam.data.store import load_bars
    whole, cut = rep.paper_task(load_bars(SHARED))
    m = rep._market(whole, cut)
    assert (cut, m["train_rows"], m["test_rows"]) == (25_000, 24_999, 16_704)
    said = rep.read_result(templates() / rep.RESULT)
    assert m == said["market"]
    for rule in ("buy_and_hold", "equal_weight"):
        mine, theirs = rep.on_test(rep.baseline(rule), whole, cut)[0], said["bystanders"][rule]
        np.testing.assert_allclose([mine[k] for k in ("ret", "vol", "max_drawdown")], [theirs[k] for k in ("ret", "vol", "max_drawdown")], rtol=1e-9)
        np.testing.assert_allclose(mine["risk_off"]["ret"], theirs["risk_off"]["ret"], rtol=1e-9)


@pytest.mark.proof
def test_the_shipped_result_renders(tmp_path):
    text = run_report("replication", None, tmp_path).read_text(encoding="utf-8")
    for need in ("Close-derived features only", "What the evidence supports", "The published table and this run", "Every seed of every winner",
                 "Costs and risk-off", "Our verdicts"): assert need in text
    assert "This report failed" not in text


@pytest.mark.proof
@pytest.mark.parametrize("learner", ["ppo", "td3", "sac"])
def test_a_learner_goes_all_the_way(bars, tmp_path, learner):
    member = dataclasses.replace(rep.contender(learner, 0.001), search={"options.gamma": [0.85, 0.99]})
    row = rep.replicate(bars, tmp_path, [rep.Contest("ppo-wf", member, "wf", 2)], seeds=3, backend="serial")["contests"]["ppo-wf"]
    assert row["trials"] == 2 and row["failed"] == 0 and row["steps"] == 2_048 and len(row["test"]) == 3
    assert len({r["ret"] for r in row["test"]}) == 3, "seeds differ"
    assert all(r["risk_off"]["exposure"] <= r["exposure"] + 1e-9 for r in row["test"])


@pytest.mark.proof
def test_an_installed_copy_has_its_templates_and_results(tmp_path):
    "What setup.py puts into a wheel is found from there, and by nobody's checkout."
    lib, parts = tmp_path / "lib", (templates(), templates().parent / "results")
    build = ["-q", "egg_info", "-e", str(tmp_path), "build", "-b", str(tmp_path / "build"), "--build-lib", str(lib)]
    subprocess.run([sys.executable, "setup.py", *build], cwd=templates().parents[1], check=True, capture_output=True)
    ask = "from stratfam.reporting import templates as t; print(t())"
    run = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(lib)}, capture_output=True, text=True)
    assert run.stdout.strip() == str(lib / "stratfam" / "templates"), run.stderr
    for part in parts: assert {p.name for p in part.glob("*.*")} == {p.name for p in (lib / "stratfam" / part.name).iterdir()}
