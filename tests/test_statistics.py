"""Statistics against oracles, simulation and planted faults: what the notebook's examples cannot show."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from stratfam.core import ConfigError, DataError
from stratfam.validation import statistics as S

PER_YEAR = {"1d": 365, "1h": 365 * 24, "5m": 365 * 24 * 12}


def series(seed, T=700, loc=5e-4, scale=0.02):
    return np.clip(np.random.default_rng(seed).standard_t(4, T) * scale + loc, -0.9, None)


def frame(seed, T=500, K=6):
    x = np.random.default_rng(seed).normal(0, 0.02, (T, K))
    return pd.DataFrame(x, index=pd.date_range("2022-01-01", periods=T), columns=[f"s{i}" for i in range(K)])


@pytest.mark.parametrize("step", PER_YEAR)
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_empyrical(step, seed):
    import empyrical as emp
    x, a = series(seed), PER_YEAR[step]
    m = S.metrics(x, step)
    oracle = {"total_return": emp.cum_returns_final(x), "cagr": emp.annual_return(x, annualization=a),
              "volatility": emp.annual_volatility(x, annualization=a), "sharpe": emp.sharpe_ratio(x, annualization=a),
              "sortino": emp.sortino_ratio(x, annualization=a), "calmar": emp.calmar_ratio(x, annualization=a),
              "omega": emp.omega_ratio(x, annualization=1), "max_drawdown": emp.max_drawdown(x), "var_95": emp.value_at_risk(x),
              "cvar_95": emp.conditional_value_at_risk(x), "tail_ratio": emp.tail_ratio(x)}
    for k, v in oracle.items(): assert_allclose(m[k], v, rtol=1e-9, err_msg=k)
    assert_allclose(m["skew"], pd.Series(x).skew() * (len(x) - 2) / math.sqrt(len(x) * (len(x) - 1)), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_psr_dsr_track_record_equal_purgedcv(seed):
    import purgedcv
    x = series(seed)
    m = S.moments(x)
    assert_allclose(S.psr(x, 0.02), purgedcv.probabilistic_sharpe_ratio(x, 0.02), rtol=5e-3)
    assert_allclose(S.dsr(x, 40, 0.001), purgedcv.deflated_sharpe_ratio(x, 40, 0.001), rtol=2e-2)
    assert_allclose(S.min_track_record(S.Moments(0.1, 1, m.skew, m.kurtosis), 0.02),
                    purgedcv.min_track_record_length(0.1, 0.02, 0.05, m.skew, m.kurtosis), atol=1.0)


# F4, F14: the Sharpe ratio depends on neither capital nor split length, and its year has 365 x 24 hours
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e9), st.sampled_from(list(PER_YEAR)))
def test_sharpe_is_invariant_to_capital(seed, capital, step):
    equity = pd.Series(np.cumprod(1 + series(seed, 200)))
    assert_allclose(S.sharpe(S.returns(equity * capital), step), S.sharpe(S.returns(equity), step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("copies", [2, 5, 20])
def test_sharpe_is_invariant_to_split_length(copies):
    x = series(3, 5000)
    assert_allclose(S.sharpe(np.tile(x, copies), "5m"), S.sharpe(x, "5m"), rtol=2e-4)


@pytest.mark.parametrize("step,bars", PER_YEAR.items())
def test_annualisation_comes_from_the_step(step, bars):
    x = series(1)
    assert_allclose(S.sharpe(x, step), x.mean() / x.std(ddof=1) * math.sqrt(bars), rtol=1e-12)


def test_sharpe_of_hours_and_of_their_days_agree():
    z = []
    for seed in range(20):
        h = pd.Series(np.random.default_rng(seed).normal(1e-4, 0.005, 24 * 365), index=pd.date_range("2023", periods=24 * 365, freq="h"))
        z.append(S.sharpe(S.daily(h), "1d") - S.sharpe(h, "1h"))
    assert abs(np.mean(z)) < 0.1 and np.std(z) < 0.3


BAD = {"nan": [0.1, math.nan, 0.2], "inf": [0.1, math.inf], "empty": [], "single": [0.1], "money": [12.0, -900.0], "table": [[0.1, 0.2]]}

@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("f", [S.psr, S.min_track_record, S.newey_west, S.drawdowns, S.max_drawdown, S.ulcer, S.underwater, S.value_at_risk,
                               S.cvar, S.tail_ratio, S.omega, S.moments, S.block_length, lambda x: S.sharpe(x, "1h"),
                               lambda x: S.sharpe_se(x, "1h"), lambda x: S.sortino(x, "1h"), lambda x: S.cagr(x, "1h"),
                               lambda x: S.calmar(x, "1h"), lambda x: S.metrics(x, "1h"), lambda x: S.dsr(x, 10, 0.01),
                               lambda x: S.bootstrap_interval(x, np.mean)])
def test_untrustworthy_input_raises(f, what):
    with pytest.raises(DataError): f(BAD[what])


# F13: only labelled tables, in time order, complete
@pytest.mark.parametrize("f", [S.labelled, S.effective_trials, S.mcs, lambda t: S.spa(t, pd.Series(0.0, index=range(500))),
                               lambda t: S.step_m(t, pd.Series(0.0, index=range(500)))])
def test_tables_must_be_labelled(f):
    good = frame(0)
    holed = good.copy(); holed.iloc[7, 2] = math.nan
    twice = good.copy(); twice.columns = ["a"] * 6
    for bad in (good.to_numpy(), good.reset_index(drop=True), good.T, holed, good.iloc[::-1], good.iloc[[0, 0, 1]], twice, good.iloc[:0]):
        with pytest.raises(DataError): f(bad)


def test_a_flat_account_has_no_sharpe_and_still_a_report():
    for x in (np.zeros(50), np.full(50, 1e-3)):
        with pytest.raises(DataError, match="do not vary"): S.sharpe(x, "1h")
        m = S.metrics(x, "1h")
        assert math.isnan(m["sharpe"]) and math.isnan(m["psr"]) and m["max_drawdown"] == 0


def test_ruin_is_reported_not_crashed():
    m = S.metrics([0.1, -1.0, 0.0], "1d")
    assert m["cagr"] == -1 and m["max_drawdown"] == -1 and m["total_return"] == -1


def skewed(rng, n, T):
    "Gamma-distributed returns with skewness 1.4 and kurtosis 6, per-bar Sharpe ratio .2."
    x = rng.gamma(2.0, 1.0, (n, T))
    return (x - 2.0) / math.sqrt(2.0) + 0.2


def test_standard_errors_match_simulation():
    rng = np.random.default_rng(0)
    x = skewed(rng, 3000, 400)
    s = x.mean(1) / x.std(1, ddof=1)
    true = S.Moments(0.2, 400, math.sqrt(2.0), 6.0)
    assert_allclose(np.std(s), math.sqrt(S.sharpe_variance(true, "iid")), rtol=0.05)
    assert abs(np.std(s) / math.sqrt(S.sharpe_variance(true, "normal")) - 1) > 0.08  # the naive formula is wrong here
    e = rng.normal(0, 1, (3000, 500))
    ar = np.empty_like(e); ar[:, 0] = e[:, 0] / math.sqrt(1 - 0.09)
    for t in range(1, 500): ar[:, t] = 0.3 * ar[:, t - 1] + e[:, t]
    s = ar.mean(1) / ar.std(1, ddof=1)
    assert_allclose(np.std(s), math.sqrt(S.sharpe_variance(S.Moments(0.0, 500, autocorrelation=0.3), "ar1")), rtol=0.05)
    assert_allclose(np.mean([S.newey_west(r) for r in np.clip(ar[:300] * 0.01, -1, 1)]), np.var(s), rtol=0.2)


def test_newey_west_with_no_lags_is_mertens():
    x = series(2)
    assert_allclose(S.newey_west(x, lags=0), S.sharpe_variance(S.moments(x), "iid"), rtol=1e-2)


def test_psr_is_calibrated():
    rng = np.random.default_rng(1)
    p = [S.psr(np.clip(0.02 * (r - 0.2), -1, 1)) for r in skewed(rng, 1500, 250)]
    assert abs(np.mean(np.array(p) > 0.95) - 0.05) < 0.02


def test_expected_max_matches_simulation():
    z = np.random.default_rng(0).standard_normal((20000, 50)).max(axis=1).mean()
    assert_allclose(S.expected_max(50), z, rtol=0.02)
    assert S.expected_max(1) == 0 and S.expected_max(1.2) >= 0
    with pytest.raises(ConfigError): S.expected_max(0.5)


def test_sidak_keeps_precision_in_the_far_tail():
    assert_allclose(S.sidak(math.log1p(-1e-18), 1000), 1e-15, rtol=1e-9)
    assert S.sidak(-math.inf, 3) == 1.0


def test_adjustments_against_statsmodels_definitions():
    p = pd.Series(np.random.default_rng(0).uniform(0, 0.2, 20))
    order = np.argsort(p.to_numpy())
    holm = np.maximum.accumulate(np.minimum(1, p.to_numpy()[order] * np.arange(20, 0, -1)))
    assert_allclose(S.adjust(p, "holm")["adjusted"].to_numpy()[order], holm)
    bh = np.minimum.accumulate((p.to_numpy()[order] * 20 / np.arange(1, 21))[::-1])[::-1]
    assert_allclose(S.adjust(p, "bh")["adjusted"].to_numpy()[order], np.minimum(bh, 1))


def test_bootstrap_is_compiled_python_and_deterministic():
    u = np.random.default_rng(0).random((20, 90))
    counts = S._draw_counts(u, 5.0)
    plain = getattr(S._draw_counts, "py_func", S._draw_counts)
    assert (counts == plain(u, 5.0)).all() and (counts.sum(1) == 90).all()
    assert (S.draw_counts(90, 20, 5.0, 3) == S.draw_counts(90, 20, 5.0, 3)).all()
    assert not (S.draw_counts(90, 20, 5.0, 3) == S.draw_counts(90, 20, 5.0, 4)).all()
    many = S.draw_counts(90, 4000, 5.0, 0)
    assert_allclose(many.mean(axis=0), np.ones(90), atol=0.12)  # every row is drawn equally often
    x = frame(1, 90, 3).to_numpy()
    got = S.bootstrap_sharpes(x, counts)
    for b in range(20):
        r = x[np.repeat(np.arange(90), counts[b])]
        assert_allclose(got[b], r.mean(0) / r.std(0), rtol=1e-9)


def test_bootstrap_sees_serial_dependence():
    "Under AR(1) the block bootstrap's spread of the mean is the long-run one; a bootstrap of single days is too narrow."
    rng = np.random.default_rng(5)
    e = rng.normal(0, 0.01, 3000)
    x = np.empty(3000); x[0] = e[0]
    for t in range(1, 3000): x[t] = 0.5 * x[t - 1] + e[t]
    spread = lambda L: S.bootstrap_sharpes(x[:, None], S.draw_counts(3000, 800, L, 0)).std()
    assert_allclose(spread(30.0) / spread(1.0), math.sqrt(3.0), rtol=0.12)


def test_intervals_cover():
    hit = 0
    for seed in range(60):
        x = np.random.default_rng(seed).normal(0.001, 0.02, 300)
        iv = S.bootstrap_interval(x, lambda r: r.mean() / r.std(), reps=200, block=3.0, seed=seed)
        hit += iv.low <= 0.05 <= iv.high
    assert hit >= 52


def hansen(x, reps, seed):
    "The lower and upper SPA p-values written down again from the paper, on our own bootstrap."
    T, _ = x.shape
    counts = S.draw_counts(T, reps, max(5.0, T ** (1 / 3)), seed)
    boot = counts @ x / T
    mean, w = x.mean(0), math.sqrt(T) * boot.std(0)
    t = max(0.0, (math.sqrt(T) * mean / w).max())
    p = lambda mu: np.mean(np.maximum(0, (math.sqrt(T) * (boot - mu) / w).max(1)) > t)
    return p(np.maximum(mean, 0.0)), p(mean)


@pytest.mark.parametrize("seed", range(4))
def test_spa_agrees_with_a_second_writing_of_the_paper(seed):
    f = frame(seed)
    f["s1"] -= 0.004
    f["s2"] += 0.0012
    f["s3"] *= 4.0  # one wild strategy: without studentising it alone would set the p-value
    got = S.spa(f, pd.Series(0.0, index=f.index), reps=999)
    assert_allclose((got.lower, got.upper), hansen(f.to_numpy(), 999, 1), atol=0.05)
    assert got.lower <= got.consistent <= got.upper


def test_spa_looks_for_gains_not_losses():
    f = frame(9)
    cash = pd.Series(0.0, index=f.index)
    assert S.spa(f - 0.005, cash, reps=200).consistent > 0.5 and S.spa(f + 0.005, cash, reps=200).consistent < 0.01
    assert S.step_m(f - 0.005, cash, reps=200) == () and set(S.step_m(f + 0.005, cash, reps=200)) == set(f)


def test_seed_statistics_equal_scipy():
    from scipy.stats import mannwhitneyu, trim_mean
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 8, 13):
        a, b = rng.integers(0, 5, n).astype(float), rng.integers(0, 5, 7).astype(float)
        assert_allclose(S.iqm(a), trim_mean(a, 0.25))
        assert_allclose(S.probability_of_improvement(a, b), mannwhitneyu(a, b).statistic / (n * 7))
    with pytest.raises(DataError): S.seed_interval([1.0])
    with pytest.raises(DataError): S.iqm([1.0, math.nan])


def test_seeds_are_resampled_within_tasks():
    "Two tasks on very different scales: an unstratified bootstrap would mix them and be far wider."
    runs = np.random.default_rng(0).normal([0.0, 100.0], 0.1, (8, 2))
    iv = S.seed_interval(runs)
    assert iv.high - iv.low < 1.0


@pytest.mark.parametrize("tz", [None, "UTC", "Asia/Tokyo"])
def test_days_are_utc_days(tz):
    t = pd.date_range("2024-01-01 03:00", periods=60, freq="h", tz="UTC")
    r = pd.Series(np.linspace(-0.01, 0.01, 60), index=t.tz_localize(None) if tz is None else t.tz_convert(tz), name="x")
    d = S.daily(r)
    assert list(d.index) == list(pd.date_range("2024-01-01", periods=3)) and d.name == "x"
    assert_allclose(np.prod(1 + d), np.prod(1 + r))
    assert_allclose(d.iloc[0], np.prod(1 + r.iloc[:21]) - 1)


def test_effective_trials_limits():
    f = frame(0, 3000, 8)
    e = S.effective_trials(f)
    assert e.participation > 7.5 and e.entropy > 7.7
    same = pd.DataFrame({k: f["s0"] + 1e-9 * f[k] for k in f.columns})
    e = S.effective_trials(same)
    assert e.participation < 1.01 and e.entropy < 1.01
    with pytest.raises(DataError, match="does not vary"): S.effective_trials(f.assign(flat=0.0))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40))
def test_looks_never_spend_more_than_one_per_cent(K):
    assert sum(S.LookBudget(k, K).level(0.005) for k in range(1, 3000)) < 0.01
