"Worlds: formulas, fair games, planted edges and the destruction of predictability, over many draws."
import pickle

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from stratfam.core import PRICES, Bars, ConfigError, DataError, bars_from_close, segments, select
from stratfam.data.worlds import WORLDS, ar1, bootstrap_bars, filter_sharpe, gross_sharpe, make_world, oracle_weights, placebo_bars, stylised_facts

FAIR = [n for n, w in WORLDS.items() if w.kind == "none"]
EDGED = [n for n, w in WORLDS.items() if w.kind != "none"]
SHOWN = ["momentum", "mean_reversion", "cross_sectional"]


def returns(w):
    return np.diff(np.log((w.bars if hasattr(w, "bars") else w).close), axis=0)


def score(x):
    "Mean in units of its standard error."
    x = np.asarray(x)
    return x.mean() / (x.std(ddof=1) / np.sqrt(len(x)))


def bars_with_gaps(n=3000):
    b = make_world("crypto_like", n, 3, "1h", 4).bars
    ok = np.ones(b.close.shape, bool)
    ok[:200, 2] = False
    ok[900:905] = False
    ok[1500:1503, 0] = False
    cut = {k: np.where(ok, getattr(b, k), np.nan) for k in (*PRICES, "volume")}
    return Bars(b.time, b.step, *(cut[k] for k in (*PRICES, "volume")), b.funding, ok, b.symbols)


@pytest.mark.parametrize("name", list(WORLDS))
def test_same_arguments_same_bits_and_other_seed_other_bars(name):
    a, b, c = (make_world(name, 400, 3, "4h", seed, "perp") for seed in (5, 5, 6))
    for k in (*PRICES, "volume", "funding"): assert_array_equal(getattr(a.bars, k), getattr(b.bars, k))
    assert_array_equal(a.truth.mu, b.truth.mu)
    assert not np.array_equal(a.bars.close, c.bars.close)


@pytest.mark.parametrize("name", list(WORLDS))
def test_a_world_survives_pickling(name):
    w = make_world(name, 300, 2, "1d", 1, **({"hours": 96.0} if name == "drift_burst" else {}))
    again = pickle.loads(pickle.dumps(w))
    assert_array_equal(again.bars.close, w.bars.close)
    assert again.params == w.params and not again.truth.mu.flags.writeable


def test_volatility_of_a_gbm_is_vol_at_every_bar_length():
    for step, per_year, T in (("5m", 105_120, 40_000), ("1h", 8760, 20_000), ("1d", 365, 8000)):
        r = returns(make_world("gbm", T, 3, step, 2, vol=0.6, correlation=0.5))
        assert_allclose(r.std(axis=0) * np.sqrt(per_year), np.full(3, 0.6), rtol=4 / np.sqrt(2 * T))
        assert_allclose(np.corrcoef(r.T)[np.triu_indices(3, 1)], np.full(3, 0.5), atol=4 / np.sqrt(T))


def test_highs_and_lows_follow_the_reflection_principle():
    b = make_world("gbm", 60_000, 1, "1h", 9, correlation=0.0).bars
    sd = 0.8 / np.sqrt(8760)
    up, down = np.log(b.high / b.open)[:, 0] / sd, np.log(b.open / b.low)[:, 0] / sd
    for level in (0.5, 1.0, 2.0, 3.0):
        want = 2 * norm.sf(level)
        for x in (up, down): assert abs((x > level).mean() - want) < 4.5 * np.sqrt(want / 60_000) + 0.01 * want
    assert_allclose([up.mean(), down.mean()], np.full(2, np.sqrt(2 / np.pi)), rtol=0.02)
    assert_array_equal(b.open[1:], b.close[:-1])


def test_garch_variance_follows_its_recursion():
    w = make_world("garch", 5000, 2, "1h", 3, correlation=0.3)
    sd, r = w.truth.sigma, returns(w)
    z = (r + 0.5 * sd[:-1] ** 2) / sd[:-1]
    want = 0.02 * 0.64 / 8760 + (0.06 * z**2 + 0.92) * sd[:-1] ** 2
    assert_allclose(sd[1:] ** 2, want, rtol=1e-9)
    assert_allclose(z.std(axis=0), np.ones(2), atol=0.08)


def test_heston_variance_has_its_stationary_law():
    v = np.stack([make_world("heston", 400, 1, "1d", s).truth.sigma[[0, -1], 0] ** 2 * 365 for s in range(600)])
    sd = 2.5 * 0.8 / np.sqrt(16.0)
    for k in (0, 1):  # at the first bar and at the last
        assert abs(v[:, k].mean() - 0.64) < 4 * sd / np.sqrt(600) and abs(v[:, k].std() / sd - 1) < 0.25


def test_merton_compensates_its_jumps_exactly():
    rng = np.random.default_rng(0)
    rate, m, d, var = 150 / 365, -0.02, 0.03, 0.64 / 365
    smooth = var - rate * (m * m + d * d)
    n = rng.poisson(rate, 2_000_000)
    shock = np.sqrt(smooth) * rng.standard_normal(len(n)) + n * m + np.sqrt(n) * d * rng.standard_normal(len(n))
    fair = np.exp(shock - 0.5 * smooth - rate * np.expm1(m + 0.5 * d * d))
    assert abs(score(fair - 1)) < 4
    r = np.concatenate([returns(make_world("merton", 2000, 1, "1d", s, intensity=150.0, jump_mean=0.0, jump_sd=0.06)) for s in range(80)])
    assert abs(score(np.expm1(r[:, 0]))) < 4 and abs(r.std() / np.sqrt(var) - 1) < 0.03
    assert r.mean() < -0.5 * var * 0.8  # the log drift is negative, as a martingale's must be


def test_regimes_have_their_ratio_and_their_length():
    w = make_world("regime_vol", 20_000, 1, "1h", 1, ratio=3.0, days=10.0)
    sd, s = w.truth.sigma[:, 0], w.truth.regime
    assert_allclose([sd[s == k][0] / sd[s == 0][0] for k in (1, 2)], [3.0, 9.0])
    assert abs((np.diff(s) != 0).mean() * 240 - 1) < 0.35
    assert abs(np.std(returns(w)[s[:-1] == 2, 0]) / sd[s == 2][0] - 1) < 0.05


@pytest.mark.parametrize("name", FAIR)
def test_a_fair_game_is_fair(name):
    "Mean, autocorrelation, variance ratio and a trend rule, over 150 draws: none is different from zero."
    stats = []
    for seed in range(150):
        w = make_world(name, 500, 2, "1d", 1000 + seed, "perp")
        x = np.diff(w.bars.close, axis=0) / w.bars.close[:-1]
        x = x / w.truth.sigma[:-1].mean(axis=0)
        rule = np.zeros(w.bars.close.shape)
        rule[10:] = np.sign(w.bars.close[10:] - w.bars.close[:-10])
        block = x[:490].reshape(49, 10, 2).sum(axis=1)
        stats.append([x.mean(), (x[1:] * x[:-1]).mean(), (x[5:] * x[:-5]).mean(), (block**2).mean() / 10 - (x[:490] ** 2).mean(),
                      (x[1:, 0] * x[:-1, 1]).mean(), gross_sharpe(w.bars, rule)])
        assert w.truth.sharpe == 0 and (w.truth.mu == 0).all() and (oracle_weights(w) == 0).all()
    assert (np.abs([score(c) for c in np.array(stats).T]) < 4).all()


@pytest.mark.parametrize("name", [n for n in FAIR if "premium" in WORLDS[n].params])
def test_a_premium_rewards_holding_as_stated(name):
    got = [gross_sharpe(w.bars, oracle_weights(w)) for w in (make_world(name, 2000, 3, "1d", s, premium=1.5) for s in range(40))]
    want = make_world(name, 10, 3, "1d", 0, premium=1.5).truth.sharpe
    assert want > 1.5 and abs(np.mean(got) - want) < 4 * np.std(got) / np.sqrt(40)


@pytest.mark.parametrize("name", EDGED)
def test_the_truth_is_the_conditional_mean(name):
    "Realised returns regressed on mu: slope 1; and nothing is left for the past to explain."
    slopes, left = [], []
    for seed in range(60):
        w = make_world(name, 1500, 3, "1d", seed, edge=3.0, **({"hours": 96.0, "per_year": 40.0} if name == "drift_burst" else {}))
        s, x = (w.truth.mu / w.truth.sigma)[:-1], (w.bars.close[1:] / w.bars.close[:-1] - 1) / w.truth.sigma[:-1]
        slopes.append((s * x).sum() / (s * s).sum())
        e = x - s
        left.append((e[1:] * e[:-1]).mean())
    assert abs(np.mean(slopes) - 1) < 4 * np.std(slopes) / np.sqrt(60) and np.std(slopes) / np.sqrt(60) < 0.1
    assert abs(score(left)) < 4


@pytest.mark.parametrize("name", EDGED)
def test_without_edge_nothing_is_planted(name):
    w = make_world(name, 300, 3, "4h", 1, edge=0.0)
    assert w.truth.sharpe == 0 and (w.truth.mu == 0).all()


@pytest.mark.proof
@pytest.mark.parametrize("name", EDGED)
@pytest.mark.parametrize("edge, symbols, step", [(1.0, 2, "1d"), (3.0, 4, "4h"), (5.0, 3, "1d")])
def test_the_oracle_earns_what_the_formula_says(name, edge, symbols, step):
    more = {"hours": 96.0, "per_year": 40.0} if name == "drift_burst" else {"half_life": 5.0} if name == "mean_reversion" else {}
    draws = [make_world(name, 3000, symbols, step, seed, "perp", edge=edge, **more) for seed in range(120)]
    got, want = [gross_sharpe(w.bars, oracle_weights(w)) for w in draws], draws[0].truth.sharpe
    assert name == "decaying" or abs(want - edge) < 1e-9
    assert abs(np.mean(got) - want) < 4 * np.std(got) / np.sqrt(120) + 0.01 * want


def test_hidden_states_start_in_their_stationary_law():
    first = np.array([ar1(np.random.default_rng(s).standard_normal((3, 1)), 0.95)[:, 0] for s in range(3000)])
    assert_allclose(first.std(axis=0), np.ones(3), atol=0.06)


def test_the_truth_belongs_to_the_next_bar():
    "A drift that changes within days: mu of the bar before or after explains the return less."
    fit = {k: [] for k in (-1, 0, 1)}
    for seed in range(40):
        w = make_world("momentum", 3000, 2, "1d", seed, edge=6.0, half_life=0.6)
        x, mu = w.bars.close[1:] / w.bars.close[:-1] - 1, w.truth.mu[:-1]
        for k in fit: fit[k].append((x[1:-1] * mu[1 + k:len(mu) - 1 + k]).sum() / (mu**2).sum())
    mean = {k: np.mean(v) for k, v in fit.items()}
    assert abs(mean[0] - 1) < 0.1 and mean[-1] < 0.6 and mean[1] < 0.6


def test_the_filter_formula_holds_for_a_drift_as_large_as_the_noise():
    rng, phi, v = np.random.default_rng(0), 0.9, 0.5
    s = np.sqrt(v) * ar1(rng.standard_normal((60_000, 1)), phi)
    x = np.vstack([np.zeros((1, 1)), s[:-1] + rng.standard_normal((59_999, 1))])
    pnl = (kalman(x, 1.0, v, phi, v * (1 - phi**2), 0.0)[:-1] * x[1:])[:, 0]
    assert_allclose(pnl.mean() / pnl.std(), filter_sharpe(1.0, 1, v, phi, v * (1 - phi**2)), rtol=0.03)


def kalman(x, sd, v, phi, q, c):
    "(T,N) one-step estimates of the drift after each bar, from returns alone: the textbook recursion."
    s, P, out = np.zeros(x.shape[1]), v, np.zeros_like(x)
    for t in range(len(x)):
        K = (phi * P + c) / (P + 1.0)
        s, P = phi * s + K * (x[t] / sd - s), phi * phi * P + q - K * K * (P + 1.0)
        out[t] = s
    return out


@pytest.mark.parametrize("name, half_life", [("momentum", 30.0), ("mean_reversion", 10.0)])
def test_a_kalman_filter_earns_what_is_called_attainable(name, half_life):
    got = []
    for seed in range(80):
        w = make_world(name, 3000, 2, "1d", seed, edge=3.5, half_life=half_life)
        sd, phi, v = 0.8 / np.sqrt(365), 0.5 ** (1 / half_life), 3.5**2 / 365 / (2 - 2 * 3.5**2 / 365)
        share = v * (1 + phi) / (1 - phi)
        q, c = v * (1 - phi * phi), -(1 - phi) * share if name == "mean_reversion" else 0.0
        x = np.vstack([np.zeros((1, 2)), returns(w) + 0.5 * sd * sd])
        got.append(gross_sharpe(w.bars, kalman(x, sd, v, phi, q, c)))
        assert_allclose(filter_sharpe(365, 2, v, phi, q, c), w.truth.attainable, rtol=1e-9)
    assert abs(np.mean(got) - w.truth.attainable) < 4 * np.std(got) / np.sqrt(80)
    assert w.truth.attainable < 0.75 * w.truth.sharpe


@pytest.mark.parametrize("name", SHOWN)
def test_an_edge_can_be_stated_as_seen_from_prices(name):
    w = make_world(name, 200, 3, "4h", 1, edge=1.5, seen_by="prices")
    assert_allclose(w.truth.attainable, 1.5, rtol=1e-3)
    assert w.truth.sharpe > 1.7


def test_an_impossible_edge_is_refused_with_its_ceiling():
    with pytest.raises(ConfigError, match="the most is 2.0"): make_world("mean_reversion", 100, 1, "1h", half_life=30.0, edge=3.0)
    with pytest.raises(ConfigError, match="prices alone can show"): make_world("momentum", 100, 1, "1d", half_life=1.0, edge=8.0, seen_by="prices")
    with pytest.raises(ConfigError, match="too large for bars of 1d"): make_world("momentum", 100, 1, "1d", edge=14.0)


def test_a_cross_sectional_edge_is_invisible_to_the_market():
    w = make_world("cross_sectional", 500, 5, "1d", 1)
    assert_allclose(w.truth.mu.sum(axis=1), np.zeros(500), atol=1e-15)
    assert np.abs(w.truth.mu).max() > 1e-3


def test_a_decaying_edge_decays_and_a_regime_edge_rests():
    w = make_world("decaying", 4000, 20, "1d", 1, half_life=5.0, life=0.25)
    size = (w.truth.mu**2).mean(axis=1)
    assert_allclose(size[:400].mean() / size[2000:2400].mean(), 16.0, rtol=0.3)  # half the Sharpe twice over: a quarter of it, squared
    w = make_world("regime_conditional", 4000, 2, "4h", 1)
    assert (w.truth.mu[w.truth.regime == 0] == 0).all() and (w.truth.mu[w.truth.regime == 1] != 0).all()
    assert_allclose(w.truth.sigma[w.truth.regime == 1].mean() / w.truth.sigma[w.truth.regime == 0].mean(), 2.0)


def test_bursts_run_one_way_and_end():
    w = make_world("drift_burst", 8760, 2, "1h", 3, edge=3.0)
    on = w.truth.regime == 1
    assert 0.03 < on.mean() < 0.1 and (w.truth.mu[~on] == 0).all() and (w.truth.mu[on] != 0).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], on, [0]])))
    full = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b - a == 24]
    assert len(full) > 5
    for a, b in full:
        m = w.truth.mu[a:b, 0]
        assert (np.sign(m) == np.sign(m[0])).all() and (np.diff(np.abs(m)) > 0).all() and (np.diff(w.truth.sigma[a:b, 0]) > 0).all()


def test_placebo_keeps_everything_but_the_sign():
    b = bars_with_gaps()
    p = placebo_bars(b, 3)
    assert_array_equal(p.ok, b.ok)
    assert_array_equal(p.volume, b.volume)
    assert segments(p) == segments(b)
    r, q = (np.diff(np.log(x.close), axis=0) for x in (b, p))
    good = np.isfinite(r) & (np.abs(r) > 1e-3)
    undone = q + np.log(np.cosh(r))  # without the martingale correction: r with a sign
    assert_allclose(np.abs(undone[good]), np.abs(r[good]), rtol=1e-6)
    sign = np.where(good, np.sign(undone) * np.sign(r), np.nan)
    both = np.isfinite(sign).sum(axis=1) > 1
    assert (np.nanmin(sign[both], axis=1) == np.nanmax(sign[both], axis=1)).all()  # one coin for all symbols
    assert 0.45 < np.nanmean(sign > 0) + 0.5 * np.isnan(sign).mean() < 0.55
    assert_allclose(np.nanmean(np.log(p.high / p.low)), np.nanmean(np.log(b.high / b.low)), rtol=0.01)


def ar_bars(phi, T=4000, seed=0):
    "Closes whose returns are strongly autocorrelated: something to destroy."
    rng = np.random.default_rng(seed)
    r = np.zeros((T, 2))
    for t in range(1, T): r[t] = phi * r[t - 1] + 0.01 * rng.standard_normal(2)
    time = np.datetime64("2022-01-01", "ns") + np.arange(T) * np.timedelta64(3600, "s")
    return bars_from_close(time, 100 * np.exp(np.cumsum(r, axis=0)), ("A", "B"), "1h")


@pytest.mark.parametrize("phi", [0.4, -0.4])
@pytest.mark.parametrize("redraw", [placebo_bars, bootstrap_bars])
def test_redrawing_destroys_what_could_be_predicted(redraw, phi):
    b = ar_bars(phi)
    x = returns(b)
    assert abs(np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1] - phi) < 0.06
    lags = []
    for seed in range(30):
        p = redraw(b, seed)
        assert not p.ohl_known and p.symbols == b.symbols
        y = returns(p)
        lags.append([np.corrcoef(y[k:, 0], y[:-k, 0])[0, 1] for k in (1, 2, 3)] + [np.expm1(y).mean() / y.std()])
    assert (np.abs(np.mean(lags, axis=0)) < 4 / np.sqrt(30 * 4000) + 2e-3).all()


@pytest.mark.parametrize("redraw", [placebo_bars, bootstrap_bars])
def test_redrawing_takes_off_the_trend_and_turns_gaps_too(redraw):
    rng, T = np.random.default_rng(2), 3000
    gap, body = 0.002 + 0.004 * rng.standard_normal((2, T, 2))
    close = 100 * np.exp(np.cumsum(gap + body, axis=0) - 0.004 * np.arange(T)[:, None] + 0.001 * np.arange(T)[:, None])
    open_ = close / np.exp(body)
    time = np.datetime64("2022-01-01", "ns") + np.arange(T) * np.timedelta64(3600, "s")
    b = Bars(time, "1h", open_, np.maximum(open_, close), np.minimum(open_, close), close,
             np.ones((T, 2)), np.zeros((T, 2)), np.ones((T, 2), bool), ("A", "B"))
    assert score(np.expm1(returns(b))[:, 0]) > 8
    drawn = [redraw(b, s) for s in range(20)]
    assert abs(score([np.expm1(returns(p)).mean() for p in drawn])) < 4
    assert abs(np.mean([np.expm1(returns(p)).mean() for p in drawn])) < 1e-4
    if redraw is placebo_bars:
        was, now = (np.log(x.open[1:] / x.close[:-1]) for x in (b, drawn[0]))
        assert_allclose(np.abs(now), np.abs(was), atol=1e-12)
        assert 0.4 < (np.sign(was) == np.sign(now)).mean() < 0.6


def test_bootstrap_keeps_marginals_clustering_and_correlation():
    b = bars_with_gaps()
    facts = stylised_facts(b)["median"]
    drawn = pd.concat([stylised_facts(bootstrap_bars(b, s))["median"] for s in range(10)], axis=1).mean(axis=1)
    assert_allclose(drawn[["annual volatility", "range / |r|"]], facts[["annual volatility", "range / |r|"]], rtol=0.1)
    assert_allclose(drawn[["correlation with others"]], facts[["correlation with others"]], atol=0.06)
    assert_allclose(drawn[["tail index"]], facts[["tail index"]], rtol=0.2)
    for lag in ("1 bar", "1 day"): assert abs(drawn[f"acf(|r|, {lag})"] / facts[f"acf(|r|, {lag})"] - 1) < 0.4 and facts[f"acf(|r|, {lag})"] > 0.08
    assert bootstrap_bars(b, 0).ok.all() and len(bootstrap_bars(b, 0, 7000)) == 7000


def test_bootstrap_of_a_perpetual_keeps_the_mean_funding():
    b = make_world("gbm", 600, 2, "1h", 1, "perp", funding=2e-4).bars
    assert_allclose(bootstrap_bars(b, 0).funding.sum(), b.funding.sum())


@pytest.mark.parametrize("call, message", [
    (dict(name="gmb"), "Did you mean 'gbm'"),
    (dict(name="gbm", volume=1), "Did you mean 'vol'"),
    (dict(name="gbm", vol=-1), "vol is -1"),
    (dict(name="gbm", vol=float("nan")), "vol is nan"),
    (dict(name="gbm", vol="high"), "expected a number"),
    (dict(name="gbm", correlation=1.0), "correlation is 1.0"),
    (dict(name="gbm", n_bars=1), "n_bars is 1"),
    (dict(name="gbm", n_bars=10.5), "n_bars is 10.5"),
    (dict(name="gbm", seed=-1), "seed is -1"),
    (dict(name="gbm", market="spto"), "Did you mean 'spot'"),
    (dict(name="gbm", step="1y"), "Unknown bar length"),
    (dict(name="gbm", premium=99), "premium is 99"),
    (dict(name="garch", alpha=0.2, beta=0.9), "a sum below 1"),
    (dict(name="garch", df=2.0), "df is 2.0"),
    (dict(name="heston", xi=9.0), "Feller"),
    (dict(name="merton", jump_sd=0.9), "of the variance"),
    (dict(name="merton", intensity=-1), "intensity is -1"),
    (dict(name="regime_vol", ratio=0.5), "ratio is 0.5"),
    (dict(name="cross_sectional", n_symbols=1), "at least 2 symbols"),
    (dict(name="momentum", half_life=0.001), "under half a bar"),
    (dict(name="momentum", seen_by="price"), "Did you mean 'prices'"),
    (dict(name="decaying", life=0), "life is 0"),
    (dict(name="drift_burst", hours=1.0), "use at least 2"),
    (dict(name="drift_burst", beta=0.7), "0 <= beta < 1/2"),
    (dict(name="crypto_like", slow=2.0), "slow is 2.0"),
    (dict(name="gbm", n_bars=200_000, step="1d", vol=5.0), "range of floating point")])
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ConfigError, match=message): make_world(**{"n_bars": 50, **call})


def test_sources_must_fit():
    b = bars_with_gaps(500)
    with pytest.raises(ConfigError, match="set step to match"): make_world("bootstrap", 500, 3, "4h", source=b)
    with pytest.raises(ConfigError, match="pass market='spot'"): make_world("bootstrap", 500, 3, "1h", 0, "perp", source=b)
    with pytest.raises(ConfigError, match="pass n_bars=500"): make_world("placebo", 400, 3, "1h", source=b)
    assert len(make_world("bootstrap", 900, 2, "1h", source=select(b, b.symbols[:2])).bars) == 900
    empty = bars_from_close(b.time, np.full((500, 1), np.nan), ("X",), "1h")
    with pytest.raises(DataError, match="X has no published bar"): placebo_bars(empty, 0)
    with pytest.raises(DataError, match="only 0 rows"): bootstrap_bars(empty, 0)
