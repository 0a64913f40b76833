"""The lab tried on itself: fast paths against the slow ones, luck refused, skill found, stopped runs resumed, the committed result read back."""
import dataclasses
import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from stratfam import reporting
from stratfam.core import ACCEPT, ConfigError, DataError
from stratfam.market.account import Costs
from stratfam.validation import agents, lab
from stratfam.validation.verdict import decide, draws, measure

RESULT = reporting.templates().parent / "results" / "lab.json"
MARKET = {m.name: m for m in (*lab.NO_EDGE, *lab.OTHERS, *lab.PLANTED)}


def table(T, K, seed, sharpe=0.0, rho=0.5):
    rng = np.random.default_rng(seed)
    x = rho**0.5 * rng.standard_normal((T, 1)) + (1 - rho) ** 0.5 * rng.standard_normal((T, K))
    return 0.02 * (x + np.asarray(sharpe) / 365**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_the_shared_bootstrap_gives_the_verdicts_own_p_values(seed):
    x = table(500, 200, seed, np.where(np.arange(200) % 7 == 0, 4.0, 0.0))
    hold, moved = table(500, 1, 99 + seed)[:, 0], np.where(np.arange(200) % 5 == 1, 3, 100)
    t = lab.table_of(x, hold)
    boots = lab.Boots(t, seed, lab.RULE)
    for size in (10, 50):
        c = lab.columns(size)
        got = lab.judge_family(t, boots, c, moved)
        e = measure(np.ascontiguousarray(x[:, c]), {"hold": hold}, 0, moved[c] >= lab.RULE.min_changes, seed=seed)
        p = max(e.cash.p, e.alpha["hold"].p)
        assert p < 0.01, "the case must reach both bootstraps"
        assert_allclose(got.score[0], -np.log10(p) if e.second_half_z > 0.5 else 0.0, rtol=1e-8)
        assert_allclose(got.n_star, e.cash.n_star, rtol=1e-8)
        assert (got.decision == 1) == (decide(e, lab.RULE.level, 2.0) == ACCEPT) and got.pick == c[e.pick]


def test_fifty_strategies_that_all_lose_money_are_never_accepted():
    c = lab.columns(50)
    for seed in range(20):
        spread = np.random.default_rng(1000 + seed).uniform(-3.0, -0.05, 200)
        t = lab.table_of(table(730, 200, seed, spread, 0.0), table(730, 1, 50 + seed)[:, 0])
        assert lab.judge_family(t, lab.Boots(t, seed, lab.RULE), c, np.full(200, 100)).decision != 1


def test_a_configuration_that_never_trades_is_counted_and_not_picked():
    x = table(400, 200, 1)
    x[:, lab.columns(10)[3]] = 0.0
    t = lab.table_of(x, table(400, 1, 2)[:, 0])
    got = lab.judge_family(t, lab.Boots(t, 0, lab.RULE), lab.columns(10), np.full(200, 100))
    assert np.isfinite(got.score).all() and got.pick != lab.columns(10)[3]
    r = lab.resampled(x, draws(400, lab.RULE, 0))
    assert np.isneginf(r.largest[:, lab.columns(10)[3]]).all()
    with pytest.raises(DataError, match="changes its position often enough"):
        lab.judge_family(t, lab.Boots(t, 0, lab.RULE), lab.columns(10), np.zeros(200))


def test_the_least_threshold_is_the_least():
    rng = np.random.default_rng(3)
    for _ in range(200):
        s, w, level = rng.integers(0, 9, 30).astype(float), rng.uniform(0.1, 1.0, 30), rng.uniform(0.01, 0.6)
        share = lambda t, s=s, w=w: w[s >= t].sum() / w.sum()
        t = lab._least(s, w, level)
        assert share(t) <= level + 1e-12
        assert share(np.nextafter(t, -np.inf)) > level - 1e-12


def test_coins_are_thrown_again_every_ten_days_and_know_nothing_of_each_other():
    side = lab.coin_signals((5000, 3), 1)
    assert_array_equal(np.unique(side), [-1, 1])
    assert 0.045 < (side[:, 1:] != side[:, :-1]).mean() < 0.055  # half of the throws change the side
    assert abs(np.corrcoef(side[:, :, 0])[np.triu_indices(200, 1)]).mean() < 0.06


def test_cells_are_named_by_all_they_depend_on():
    cell = lab.Cell(lab.NO_EDGE[0], (2,), 0, 25)
    others = [dataclasses.replace(cell, first=25), dataclasses.replace(cell, years=(1, 2)), lab.Cell(lab.NO_EDGE[1], (2,), 0, 25),
              dataclasses.replace(cell, market=dataclasses.replace(cell.market, fee=0.001))]
    names = [lab.cell_name(c) for c in (cell, *others)] + [lab.cell_name(cell, rule=dataclasses.replace(lab.RULE, level=0.004))]
    assert len(set(names)) == len(names) and lab.cell_name(cell) == names[0]


def test_the_plan_is_balanced_and_covers_each_draw_once():
    cells = lab.plan_cells((*lab.NO_EDGE, *lab.PLANTED), {"none": 100, "planted": 60}, dict.fromkeys(("none", "planted"), 30), longest={"placebo": 2})
    for m in lab.NO_EDGE:
        seeds = [s for c in cells if c.market == m and max(c.years) == 2 and c.first < 1_000_000 for s in range(c.first, c.first + c.count)]
        assert sorted(seeds) == list(range(100)), m.name
    assert not [c for c in cells if c.market.name == "placebo" and max(c.years) > 2]
    assert [c.market for c in cells[:10]] == [*lab.NO_EDGE]


def test_draws_that_are_made_again_count_once_and_the_younger_are_right(tmp_path):
    cell, stricter = lab.Cell(MARKET["gbm"], (2,), 0, 2), dataclasses.replace(lab.RULE, reject_z=0.0)
    lab.run_lab(tmp_path, [cell])
    lab.run_lab(tmp_path, [cell], rule=stricter)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    (rows,) = lab.load_lab(tmp_path)
    assert rows.seed.tolist() == [0, 1]
    with np.load(tmp_path / lab.cell_name(cell, rule=stricter)) as young, np.load(tmp_path / lab.cell_name(cell)) as old:
        assert_array_equal(rows.decision[:, 1], young["decision"][:, 0])
        assert (young["decision"] != old["decision"]).any(), "the two must differ for this to prove anything"


def test_an_edge_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="rising values around"): lab.edge_for("momentum", (30.0,), (3.0, 8.0), range(1))


def test_the_committed_result_says_what_its_counts_say():
    kept = json.loads(RESULT.read_text())
    assert json.loads(lab.bars_met(kept).to_json(orient="records")) == kept["bars"]
    met = {b["bar"]: b["met"] for b in kept["bars"]}
    assert met["false accepts, main cell"] and met["losers"]
    main = lab.rates(kept["records"]).query("rule == 'verdict' and size == 50 and years == 2 and kind in ('none', 'market')")
    assert len(main) == 11 and (main["draws"] >= 1000).all() and (main["upper"] <= 0.02).all()
    assert {r["world"] for r in kept["records"] if r["kind"] == "planted"} == set(lab.SHAPES)


@pytest.mark.proof
def test_a_small_lab_with_fixed_seeds(tmp_path):
    "Luck is refused, skill is found, and single tests do neither: 25 draws a market, on two processes, stopped and resumed."
    names = ("garch", "coins", "losers", "momentum, Sharpe 3", "cross_sectional, Sharpe 3")
    cells = [lab.Cell(MARKET[n], (2,), first, 13 - first // 13) for n in names for first in (0, 13)]
    lab.run_lab(tmp_path, cells[:3], jobs=1)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")}
    lab.run_lab(tmp_path, cells, jobs=2)
    assert before == {n: (tmp_path / n).read_bytes() for n in before} and len(before) == 3
    with np.load(tmp_path / lab.cell_name(cells[-1])) as kept:
        assert_allclose(kept["score"], lab.run_cell(cells[-1])["score"], rtol=1e-9, atol=1e-12, strict=True) # Sums of one thread or two
    got = lab.rates(lab.summary(tmp_path)["records"]).query("size == 50").set_index(["market", "rule"])
    rate = got["rate"]
    assert (got["draws"] == 25).all()
    for market in names[:3]: assert got["accepted"][market, "verdict"] <= 1, market
    assert got["accepted"]["losers", "verdict"] == 0 and rate["losers", "pbo"] > 0.5
    assert rate["garch", "best"] > 0.6 and rate["coins", "best"] > 0.8
    for market in names[3:]: assert got["power"][market, "verdict"] > 0.3 and got["rejected"][market, "verdict"] == 0


@pytest.mark.proof
def test_a_leak_of_one_day_is_found_at_once():
    "The same fair game with signals that have seen the next close: the verdict accepts every draw, so the lab would show it."
    c = lab.columns(50)
    for seed in range(3):
        bars = lab.make_world("garch", lab.WARMUP + 730, 3, "1d", seed, market="perp").bars
        way = lab.rule_signals(bars.close)
        early = np.concatenate([way[:, 2:], way[:, -1:], way[:, -1:]], axis=1)
        x = lab.family_returns(bars, np.ascontiguousarray(early), Costs(taker=0.0006, maker=0.0006))
        t = lab.table_of(x, np.diff(bars.close, axis=0)[lab.WARMUP - 1:].mean(axis=1))
        assert lab.judge_family(t, lab.Boots(t, seed, lab.RULE), c, np.full(200, 100)).decision == 1


@pytest.mark.proof
def test_learners_find_a_planted_edge_and_are_not_believed_on_noise(tmp_path):
    "Two real learners and a rule on one draw of each market; the members that learn earn on the planted one, out of sample."
    names = ("ppo, shared", "ridge", "trend")
    agents.run_agents(tmp_path, 1, names=names)
    kept = agents.agents_summary(tmp_path)
    said = {r["market"]: r for r in kept["records"]}
    assert list(said) == ["gbm", "garch", "momentum"] and kept["draws"] == 3
    assert min(said["momentum"]["true"][k] for k in ("ppo, shared", "ridge")) > 2.0, said["momentum"]["true"]
    assert said["momentum"]["nominal"]["best"] == [1, 1] and said["momentum"]["rejected"] == 0.0
    for fair in ("gbm", "garch"): assert said[fair]["nominal"]["verdict"] == [0, 0]


@pytest.mark.proof
@pytest.mark.parametrize("world", lab.SHAPES)
def test_planted_edges_earn_what_they_state(world):
    for target, edge in zip((1.0, 3.0), (lab.EDGES[world][0], lab.EDGES[world][2])):
        true = lab.true_sharpes(lab.planted(world, edge), range(500, 540))[lab.columns(50)].max()
        assert abs(true - target) < 0.5, (world, target, true)  # forty draws of two years: a standard error of 0.11
