"""The verdict against its definition, against markets with known truth, and against everything that must not be accepted."""
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm

from stratfam.core import ACCEPT, NOT_ENOUGH_DATA, REJECT, ConfigError, DataError, Env, ExportError, VirtualClock
from stratfam.core import Test as Line
from stratfam.validation.statistics import LookBudget, draw_counts
from stratfam.validation.verdict import (Rule, check_holdout, check_seeds, decide, judge, max_trials, measure, n_star, power, report,
                                         verdict_from_json, verdict_html, verdict_table, verdict_to_json, years_needed)

DAY = 1 / 365**0.5


def gaussian(rho, N, T, seed, sharpe=0.0):
    rng = np.random.default_rng(seed)
    x = rho**0.5 * rng.standard_normal((T, 1)) + (1 - rho) ** 0.5 * rng.standard_normal((T, N))
    return 0.02 * (x + DAY * np.asarray(sharpe))


def one_true(sharpe, N, T, seed):
    "t(5) returns with correlation .3; the first column has the edge."
    rng = np.random.default_rng(seed)
    x = 0.3**0.5 * rng.standard_t(5, (T, 1)) + 0.7**0.5 * rng.standard_t(5, (T, N))
    x = 0.02 * x / (5 / 3) ** 0.5
    x[:, 0] += 0.02 * sharpe * DAY
    return x


def market(T, seed, sharpe=1.0):
    return gaussian(0.0, 1, T, seed, sharpe)[:, 0]


def decisions(worlds, target=2.0, benchmarks=None):
    got = [decide(measure(x, benchmarks and benchmarks(i), seed=i), 0.005, target) for i, x in enumerate(worlds)]
    return {d: got.count(d) / len(got) for d in (ACCEPT, REJECT, NOT_ENOUGH_DATA)}


def by_hand(x, b, M, rule, seed):
    "Section 4 of the rule, one line of arithmetic after another."
    T, N = x.shape
    i = int(np.argmax(x.mean(0) / x.std(0, ddof=1)))
    counts = draw_counts(T, rule.reps, max(5.0, T ** (1 / 3)), seed)
    out = []
    for r in (x, None if b is None else x - np.array([np.cov(c, b)[0, 1] for c in x.T]) / np.var(b, ddof=1) * b[:, None]):
        if r is None: continue
        s = r[:, i].mean() / r[:, i].std(ddof=1)
        d = r[:, i] - r[:, i].mean()
        g3, g4 = (d**3).mean() / r[:, i].std() ** 3, (d**4).mean() / r[:, i].std() ** 4
        a = np.clip((d[1:] * d[:-1]).sum() / (d**2).sum(), -0.5, 0.5)
        v0 = (1 + a) / ((1 - a) * T)
        v1 = ((1 + a) / (1 - a) - (1 + a + a * a) / (1 - a * a) * g3 * s + (1 + a * a) / (1 - a * a) * (g4 - 1) / 4 * s * s) / T
        z = s / math.sqrt(max(v0, v1))
        boot = np.array([[r[np.repeat(np.arange(T), c), j].mean() / r[np.repeat(np.arange(T), c), j].std() for j in range(N)] for c in counts])
        q = np.quantile(((boot - r.mean(0) / r.std(0)) / boot.std(0)).max(1), 0.99)
        n = min(max(math.log(0.99) / math.log(norm.cdf(q)), 1), N)
        out.append((i, z, n, 1 - (1 - norm.cdf(-z)) ** (n + M)))
    return out


@pytest.mark.parametrize("seed,M", [(0, 0), (1, 7)])
def test_measure_is_the_definition(seed, M):
    rule = Rule(reps=99)
    x, b = one_true(2.0, 6, 400, seed), market(400, seed + 50)
    e = measure(x, {"hold": b}, M, rule=rule, seed=seed)
    for (i, z, n, p), arm in zip(by_hand(x, b, M, rule, seed), (e.cash, e.alpha["hold"])):
        assert e.pick == i
        assert_allclose((arm.z, arm.n_star, arm.p), (z, n, p), rtol=1e-7)


# cells of the published tables: N = 50, two years
@pytest.mark.parametrize("rho,median", [(0.0, 48), (0.5, 31), (0.9, 5.9)])
def test_effective_trials_of_known_families(rho, median):
    counts = draw_counts(730, 999, 730 ** (1 / 3), 0)
    got = np.median([n_star(gaussian(rho, 50, 730, s), counts) for s in range(60)])
    assert_allclose(got, median, rtol=0.12)


def test_denser_grids_are_almost_free():
    "Momentum look-backs 5..100 on one price: four times as many of them are hardly more chances."
    rng, got = np.random.default_rng(0), []
    for _ in range(12):
        r = rng.normal(0, 0.03, 900)
        p = np.r_[0, np.cumsum(r)]
        t = np.arange(120, 850)
        dense = np.column_stack([np.sign(p[t] - p[t - lb]) * r[t] for lb in range(5, 101, 3)])
        counts = draw_counts(730, 499, 9.0, 0)
        got.append(n_star(np.ascontiguousarray(dense), counts) / n_star(np.ascontiguousarray(dense[:, ::4]), counts))
    assert np.median(got) < 2.5  # a raw count says 3.6


def test_false_accepts_are_rare():
    got = decisions(gaussian(0.5, 50, 730, 1000 + s) for s in range(300))
    assert got[ACCEPT] <= 4 / 300
    assert abs(got[REJECT] - 0.30) < 0.09


def test_power_is_what_was_promised():
    got = decisions(one_true(3.0, 50, 730, 2000 + s) for s in range(200))
    assert abs(got[ACCEPT] - 0.67) < 0.10 and got[REJECT] <= 0.01
    got = decisions(one_true(2.0, 50, 730, 3000 + s) for s in range(200))
    assert abs(got[ACCEPT] - 0.22) < 0.09 and got[REJECT] <= 0.06


def test_losers_are_never_accepted():
    slope = np.linspace(-3, 0, 50)
    got = decisions(gaussian(0.3, 50, 730, 4000 + s, slope) for s in range(200))
    assert got[ACCEPT] == 0 and abs(got[REJECT] - 0.61) < 0.2


def test_leverage_on_the_market_is_not_accepted():
    accepted = {"cash": 0, "market": 0}
    for s in range(100):
        b = market(1460, 5000 + s, 2.5)  # a market so good that cash is beaten in most draws
        x = np.linspace(0.5, 3, 20) * b[:, None] + gaussian(0.0, 20, 1460, 9000 + s) * 0.05
        e = measure(x, {"hold": b}, seed=s)
        accepted["cash"] += e.cash.p <= 0.005
        accepted["market"] += decide(e, 0.005, 2.0) == ACCEPT
    assert accepted["cash"] > 60 and accepted["market"] <= 2


def test_random_market_timing_is_not_accepted():
    accepted = 0
    for s in range(60):
        rng, b = np.random.default_rng(s), market(730, 6000 + s)
        on = (np.cumsum(rng.standard_normal((730, 30)) * 0.3, axis=0) > 0).astype(float)
        accepted += decide(measure(np.ascontiguousarray(on * b[:, None]), {"hold": b}, seed=s), 0.005, 2.0) == ACCEPT
    assert accepted <= 2


def test_alpha_beside_a_market_is_found():
    got = []
    for s in range(40):
        b = market(1460, 7000 + s)
        x = b[:, None] + one_true(4.0, 30, 1460, s)
        got.append(decide(measure(x, {"hold": b}, seed=s), 0.005, 2.0) == ACCEPT)
    assert np.mean(got) > 0.85


def test_a_dead_edge_is_stopped_by_the_second_half():
    x = gaussian(0.3, 20, 730, 1)
    x[:365, 0] += 0.02 * 9 * DAY
    x[365:, 0] -= 0.02 * 1 * DAY
    e = measure(x)
    assert e.pick == 0 and e.cash.p <= 0.005 and e.second_half_z < 0.5
    assert decide(e, 0.005, 2.0) != ACCEPT


@pytest.mark.proof
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_false_accepts_stay_below_one_per_cent(rho):
    got = decisions(gaussian(rho, 50, 730, 10_000 + s) for s in range(1000))
    assert got[ACCEPT] <= 0.013


# structure
def days(T): return pd.date_range("2022-01-01", periods=T)


def table(x): return pd.DataFrame(x, index=days(len(x)), columns=[f"c{i:02d}" for i in range(x.shape[1])])


def good(seed=0, T=730): return table(one_true(5.0, 12, T, seed))


def hold(T=730): return {"hold": pd.Series(market(T, 77), index=days(T))}


OK = tuple(Line(k, 1.0, 0.0, True, "passed") for k in Rule().required)
MOVES = {f"c{i:02d}": 100 for i in range(60)}


def test_a_full_accept_and_its_file():
    v, pick = judge(good(), hold(), changes=MOVES, checks=OK, reported=[report("pbo", 0.2)], env=Env(VirtualClock()), digests={"model": "ab"})
    assert (v.decision, pick) == (ACCEPT, "c00") and v.digests["model"] == "ab"
    assert (v.created, v.expires) == ("2023-11-14T22:13:20Z", "2023-12-14T22:13:20Z")
    back = verdict_from_json(verdict_to_json(v))
    assert back == v and verdict_to_json(back) == verdict_to_json(v)
    assert "ACCEPT" in verdict_table(v) and "pbo" in verdict_html(v)
    same, _ = judge(good(), hold(), changes=MOVES, checks=OK, reported=[report("pbo", 0.2)], env=Env(VirtualClock()), digests={"model": "ab"})
    assert same == v


def test_not_finite_values_survive_the_file():
    v, _ = judge(good(), hold(), changes=MOVES)
    text = verdict_to_json(v)
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    back = verdict_from_json(text)
    for a, b in zip(v.tests, back.tests):
        assert (a.name, a.passed, a.meaning) == (b.name, b.passed, b.meaning)
        assert_allclose(a.value, b.value, rtol=0)


@pytest.mark.parametrize("edit", [lambda t: t.replace("REJECT", "ACCEPT"), lambda t: t[:-40], lambda t: t.replace("verdict/1", "verdict/9"),
                                  lambda t: t.replace('"passed": false', '"passed": true', 1), lambda t: "[]", lambda t: "null", lambda t: "",
                                  lambda t: t.replace("2023-12-14", "2033-12-14")])
def test_a_changed_file_is_refused(edit):
    v, _ = judge(table(gaussian(0.5, 10, 1460, 0, -3.0)), env=Env(VirtualClock()))
    text = verdict_to_json(v)
    assert v.decision == REJECT and edit(text) != text
    with pytest.raises(ExportError): verdict_from_json(edit(text))


@pytest.mark.parametrize("left_out", Rule().required)
def test_every_required_check_is_required(left_out):
    some = [t for t in OK if t.name != left_out]
    v, _ = judge(good(), hold(), changes=MOVES, checks=some)
    assert v.decision == NOT_ENOUGH_DATA and left_out in v.next_step
    line = next(t for t in v.tests if t.name == left_out)
    assert line.passed is False and "NOT RUN" in line.meaning
    v, _ = judge(good(), hold(), changes=MOVES, checks=some, not_applicable={left_out: "a reason"})
    assert v.decision == ACCEPT
    v, _ = judge(good(), hold(), changes=MOVES, checks=[*some, Line(left_out, -1.0, 0.0, False, "Failed.")])
    assert v.decision == REJECT and left_out in v.next_step


def test_benchmarks_and_changes_are_required_too():
    assert judge(good(), None, changes=MOVES, checks=OK)[0].decision == NOT_ENOUGH_DATA
    assert judge(good(), hold(), checks=OK)[0].decision == NOT_ENOUGH_DATA
    assert judge(good(), None, checks=OK, not_applicable={"benchmarks": "synthetic", "changes": "synthetic"})[0].decision == ACCEPT


def test_extra_checks_gate_as_well():
    extra = Line("stress", -1.0, 0.0, False, "Dies in a crash.")
    assert judge(good(), hold(), changes=MOVES, checks=[*OK, extra])[0].decision == REJECT


def test_untrustworthy_tables_raise():
    f = good()
    holed = f.copy(); holed.iloc[3, 3] = math.nan
    hours = f.copy(); hours.index = pd.date_range("2022", periods=730, freq="h")
    for bad in (holed, f.T, f.to_numpy(), f.iloc[::-1], hours, f.iloc[:0]):
        with pytest.raises(DataError): judge(bad)
    with pytest.raises(DataError, match="exactly the days"): judge(f, {"hold": hold()["hold"].iloc[1:]})
    with pytest.raises(DataError, match="does not vary"): judge(f, {"cash": pd.Series(0.0, index=f.index)})
    with pytest.raises(DataError, match="position changes"): judge(f, changes={"c00": 9})
    with pytest.raises(ConfigError): judge(f, target_sharpe=0.0)
    with pytest.raises(ConfigError): judge(f, target_sharpe=math.nan)
    with pytest.raises(ConfigError): judge(f, counted_only=-1)
    with pytest.raises(ConfigError, match="Did you mean 'c00'"): judge(f, candidates=["c000"])
    with pytest.raises(ConfigError, match="Did you mean 'seeds'"): judge(f, not_applicable={"seed": "x"})


def test_short_histories_say_not_enough_data():
    for T in (364, 100, 30, 12):
        v, _ = judge(good(T=T), hold(T), changes=MOVES, checks=OK)
        assert v.decision == NOT_ENOUGH_DATA and "365 days" in v.next_step
    assert judge(good(T=365), hold(365), changes=MOVES, checks=OK)[0].decision == ACCEPT


def test_idle_and_rarely_trading_columns_are_counted_and_not_picked():
    f = good()
    f["c05"] = 0.0
    moves = MOVES | {"c00": 29}
    v, pick = judge(f, hold(), changes=moves, checks=OK)
    lines = {t.name: t.value for t in v.tests}
    assert pick != "c00" and lines["candidates"] == 10 and lines["counted_only"] == 2 and lines["trials"] == 12
    v, pick = judge(f, hold(), changes=dict.fromkeys(f, 0), checks=OK)
    assert pick is None and v.decision == NOT_ENOUGH_DATA and "nothing to judge" in v.next_step


def test_counted_trials_and_looks_make_it_harder():
    x = one_true(3.0, 20, 730, 5)
    p = [measure(x, counted_only=M).cash.p for M in (0, 10, 1000)]
    assert p[0] < p[1] < p[2]
    lines = lambda k, K=0: next(t for t in judge(table(x), looks=LookBudget(k, K))[0].tests if t.name == "sharpe_p")
    assert_allclose([lines(1).threshold, lines(3).threshold, lines(2, 12).threshold], [0.005, 0.005 / 9, 0.005 / 12])


def test_choosing_among_fewer_keeps_the_whole_correction():
    f = good()
    e = measure(f.to_numpy())
    v, pick = judge(f, hold(), changes=MOVES, checks=OK, candidates=["c03", "c04"])
    assert pick in ("c03", "c04") and v.decision != ACCEPT
    assert_allclose(next(t.value for t in v.tests if t.name == "n_star"), e.cash.n_star)


def test_the_order_of_columns_does_not_matter():
    f = good()
    a, pa = judge(f, hold(), changes=MOVES, checks=OK)
    b, pb = judge(f[f.columns[::-1]], hold(), changes=MOVES, checks=OK)
    assert pa == pb
    for s, t in zip(a.tests, b.tests): assert_allclose(s.value, t.value, rtol=1e-6, atol=1e-12)


def test_scale_does_not_matter():
    x, b = one_true(2.5, 10, 730, 3), market(730, 4)
    for k in (1e-4, 10.0): assert_allclose(measure(x * k, {"b": b}).cash.p, measure(x, {"b": b}).cash.p, rtol=1e-6)


def test_copies_of_the_benchmark_have_no_alpha():
    b = market(730, 0, 3.0)
    e = measure(np.column_stack([b, 2 * b, 0.5 * b]), {"hold": b})
    assert e.alpha["hold"].z == 0 and e.alpha["hold"].p >= 0.5


def test_wild_returns_do_not_break_it():
    rng = np.random.default_rng(0)
    x = 0.01 * rng.standard_t(1.5, (730, 20)).clip(-50, 50)
    x[:, 3] = np.where(rng.random(730) < 0.01, 0.05, 0.0)  # trades on a few days only
    e = measure(x, {"hold": market(730, 0)})
    assert 0 <= e.cash.p <= 1 and 1 <= e.cash.n_star <= 20 and math.isfinite(e.bound)


def test_rules_are_checked_and_frozen():
    for bad in ({"level": 0}, {"level": 0.5}, {"reps": 10}, {"quantile": 2}, {"min_days": 1}, {"power": math.nan}, {"reject_z": True},
                {"level": "x"}):
        with pytest.raises(ConfigError): Rule(**bad)
    with pytest.raises(dataclasses.FrozenInstanceError): Rule().level = 0.01
    v, _ = judge(good(), hold(), changes=MOVES, checks=OK, rule=Rule(level=0.01))
    assert v.digests["rule"] != judge(good(), hold(), changes=MOVES, checks=OK)[0].digests["rule"]


@pytest.mark.parametrize("n,years", [(1, (11.7, 5.2, 2.9, 1.3)), (10, (17.1, 7.6, 4.3, 1.9)), (50, (20.8, 9.2, 5.2, 2.3)),
                                     (200, (24.0, 10.7, 6.0, 2.7)), (1000, (27.6, 12.3, 6.9, 3.1))])
def test_years_of_the_published_table(n, years):
    assert_allclose([years_needed(S, n) for S in (1, 1.5, 2, 3)], years, atol=0.06)
    for S in (1, 1.5, 2, 3):
        assert_allclose(power(S, years_needed(S, n), n), 0.8, rtol=1e-9)
        assert max_trials(years_needed(S, n) * 1.0001, S) >= n > max_trials(years_needed(S, n) * 0.99, S)


def test_autocorrelation_costs_years():
    assert_allclose(years_needed(2, 50, autocorrelation=0.2), 1.5 * years_needed(2, 50))
    assert power(2, 5, 50, autocorrelation=0.2) < power(2, 5, 50)
    with pytest.raises(ConfigError): years_needed(2, 0)
    with pytest.raises(ConfigError): years_needed(-1, 5)


def test_open_checks_wait_and_failed_checks_reject():
    rest = [t for t in OK if t.name != "seeds"]
    lucky = judge(good(), hold(), changes=MOVES, checks=[*rest, check_seeds([3.0, -1.5, 0.5, 2.0, -2.0, 1.0])])[0]
    assert lucky.decision == NOT_ENOUGH_DATA and "seeds" in lucky.next_step
    assert any("seeds would decide" in t.meaning for t in lucky.tests) and "OPEN" in verdict_table(lucky)
    assert judge(good(), hold(), changes=MOVES, checks=[*rest, check_seeds([-1.0] * 5)])[0].decision == REJECT
    assert judge(good(), hold(), changes=MOVES, checks=[*rest, check_seeds([1.0, 1.1, 0.9, 1.0, 1.2])])[0].decision == ACCEPT
    rest = [t for t in OK if t.name != "holdout_sign"]
    for opening, want in ((1, ACCEPT), (2, REJECT)):
        assert judge(good(), hold(), changes=MOVES, checks=[*rest, check_holdout([0.01] * 50, opening)])[0].decision == want


def test_every_outcome_says_what_to_do():
    seen = {}
    for f, kw in ((good(), {"checks": OK}), (good(), {}), (table(gaussian(0.5, 12, 1460, 0, -3.0)), {"checks": OK}),
                  (table(gaussian(0.0, 12, 400, 1)), {"checks": OK}), (good(T=100), {"checks": OK})):
        v, _ = judge(f, hold(len(f)), changes=MOVES, **kw)
        seen[v.next_step] = v.decision
    assert len(seen) == 5 and set(seen.values()) == {ACCEPT, REJECT, NOT_ENOUGH_DATA}
    assert any("years" in s for s in seen) and any("Drop this family" in s for s in seen)
