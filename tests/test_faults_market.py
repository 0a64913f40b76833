"""Faults found in earlier backtests of this kind, each turned into a test: F3, F4, F7, F14 of the field study."""
import numpy as np
import pandas as pd
import pytest

from stratfam.core import Bars, DataError, Decision, Features, ObservationSpec, bars_per_year
from stratfam.market.account import Costs, decide, new_log, new_state
from stratfam.market.backtest import (annual_sharpe, arena, backtest, backtest_frame, backtest_weights, decide_accounts, frame_bars,
                                      step_accounts, walk)
from stratfam.policies.base import Task, baseline
from stratfam.risk import gate as gate_module
from stratfam.risk.gate import STATES, RiskManager, no_inputs, work_space
from stratfam.risk.limits import Lots, limits_from
from stratfam.validation.statistics import sharpe

LOOSE = dict(max_drawdown=None, daily_loss=None)


def bars(T=400, N=2, step="1h", drift=0.0, seed=0, market="spot"):
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(drift, 0.005, (T, N)), axis=0))
    open_ = np.vstack([close[:1], close[:-1]])
    spread = 1 + np.abs(rng.normal(0, 0.001, (T, N)))
    time = pd.date_range("2023-01-01", periods=T, freq=step).to_numpy()
    zero, ok = np.zeros((T, N)), np.ones((T, N), bool)
    return Bars(time, step, open_, np.maximum(open_, close) * spread, np.minimum(open_, close) / spread, close, zero + 9, zero, ok,
                tuple(f"S{n}" for n in range(N)), market)


def no_features(b): return Features(np.zeros((len(b), len(b.symbols), 0)), (), 0)


@pytest.mark.parametrize("name", ["buy_and_hold", "equal_weight"])
def test_f3_a_benchmark_has_the_sign_of_its_market(name):
    for drift in (0.001, -0.001):
        b = bars(drift=drift)
        policy = baseline(name).fit(Task(b, no_features(b), limits=limits_from(**LOOSE), costs=Costs()))
        ret = backtest(policy, b, no_features(b), limits_from(**LOOSE)).ret
        assert np.sign(sharpe(ret, b.step)) == np.sign(drift) and np.sign(np.prod(1 + ret) - 1) == np.sign(drift)


def test_f4_sharpe_does_not_know_the_capital():
    b, rng = bars(market="perp"), np.random.default_rng(1)
    W = np.where(rng.random((400, 2)) < 0.1, rng.uniform(-0.5, 0.5, (400, 2)), np.nan)
    small, large = (backtest_weights(W, arena(b, limits_from(stop_loss=0.01, **LOOSE), lots=Lots(1e-9), capital=c)) for c in (1e4, 1e5))
    np.testing.assert_allclose(large.ret, small.ret, rtol=1e-7, atol=1e-12, strict=True)
    np.testing.assert_allclose(annual_sharpe(large), annual_sharpe(small), rtol=1e-7)
    np.testing.assert_allclose(large.fee.sum(), 10 * small.fee.sum(), rtol=1e-7)


def test_f4_sharpe_does_not_know_the_length_of_a_split():
    "The same behaviour for ten times as long has the same Sharpe, not sqrt(10) of it; halves of it average to the whole."
    one = np.random.default_rng(2).normal(0.001, 0.01, 5000)
    for n in (2, 10): np.testing.assert_allclose(sharpe(np.tile(one, n), "1h"), sharpe(one, "1h"), rtol=1e-3)
    parts = [sharpe(one[i::5], "1h") for i in range(5)]
    assert abs(np.mean(parts) - sharpe(one, "1h")) < 0.5 * np.std(parts)


def test_f7_no_jump_across_seams():
    "Intervals far apart, prices 60 % apart: each starts flat at the capital, moves by its own bars alone and ends in cash."
    b = bars(T=600, drift=0.002)
    policy = baseline("equal_weight").fit(Task(b, no_features(b), limits=limits_from(**LOOSE), costs=Costs()))
    a, intervals = arena(b, limits_from(**LOOSE)), [(0, 150), (290, 300), (400, 600)]
    parts = walk(policy, a, no_features(b), intervals)
    for r, (i, j) in zip(parts, intervals):
        assert r.equity[0] == a.capital and r.ret[0] == 0.0, "nothing was held before the first bar"
        alone = walk(policy, a, no_features(b), [(i, j)])[0]
        np.testing.assert_array_equal(r.equity, alone.equity)
        np.testing.assert_allclose(a.capital * np.cumprod(1 + r.ret), r.equity, rtol=1e-12, strict=True)
        widest = np.nanmax(np.abs(np.log(b.close[i + 1:j] / b.close[i:j - 1])))
        assert np.abs(r.ret).max() <= 1.01 * widest + 0.003 < 0.05, "no return beyond the largest move of a bar, and costs"
        assert r.weight[-1].sum() == 0.0 and set(r.trades["exit_reason"]) == {"END"}
        np.testing.assert_allclose(r.equity[-1], a.capital + r.trades["pnl"].sum(), rtol=1e-12)  # The last exit is paid
        sold = r.trades["qty"] * r.trades["exit"]
        assert (r.trades["fee"] > sold * a.costs.taker).all()
    joined = np.concatenate([r.ret for r in parts])
    assert np.abs(joined).max() < 0.05 < b.close[290, 0] / b.close[149, 0] - 1


def test_f14_the_year_comes_from_the_index():
    "The same returns per bar on another grid: the annual figure grows with the square root of bars per year of 365 x 24 hours."
    prices = pd.DataFrame({"A": bars(N=1, drift=0.001).close[:, 0]})
    weights = pd.DataFrame({"A": np.where(np.arange(400) % 20 == 0, 0.5, np.nan)})
    found = {}
    for freq in ("1h", "4h", "1D", "5min"):
        index = pd.date_range("2023-01-01", periods=400, freq=freq)
        b = backtest_frame(prices.set_axis(index), weights.set_axis(index), **LOOSE)
        found[freq] = annual_sharpe(b)
        np.testing.assert_allclose(sharpe(b.ret, b.step), found[freq], rtol=1e-6)
    assert bars_per_year(frame_bars(prices.set_axis(pd.date_range("2023-01-01", periods=400, freq="1h"))).step) == 365 * 24
    ratios = found["1h"] / found["4h"], found["1h"] / found["1D"], found["5min"] / found["1h"]
    np.testing.assert_allclose(ratios, [2.0, 24**0.5, 12**0.5], rtol=1e-9)
    np.testing.assert_allclose(found["1D"] ** 2 / 365, (np.mean(b.ret) / np.std(b.ret, ddof=1)) ** 2, rtol=1e-6)


def test_live_and_backtest_share_one_compiled_gate():
    "`RiskManager.decide` and the kernel's `decide` name the same compiled functions, and give the same lots at every close."
    kernel = getattr(decide, "py_func", decide).__globals__
    for name in ("gate", "measure"):
        assert RiskManager.decide.__globals__[name] is kernel[name] is getattr(gate_module, name)
    b, rng, ordered = bars(T=400, N=3, market="perp"), np.random.default_rng(3), 0
    rules = limits_from(stop_loss=0.02, take_profit=0.03, target_vol=0.4, max_gross=0.9, min_trade=0.01, max_drawdown=0.02, max_leverage=3.0)
    a = arena(b, rules, Costs(), Lots(0.001), 1e4)
    rm = RiskManager(rules, b.symbols, 1e4, Lots(0.001), "perp", a.costs.reserve, a.costs.maintenance)
    st, log, work, alive = new_state(1, 3, 1e4), new_log(0), work_space(3), np.ones(1, bool)
    for t in range(400):
        rows, W, C = np.array([t]), rng.normal(0, 0.6, (1, 3)), np.ones((1, 3))
        step_accounts(*a.market, a.rules.sym, a.rules.lim, *st, rows, alive, log)
        now = no_inputs(3, **{k: a.senses.sense[k][t:t + 1] for k in ("volatility", "age")})
        live = rm.decide(Decision(W, C), st.slots["lots"][0], b.close[t], st.acct["equity"][0], now, t, int(a.market.day[t]))
        decide_accounts(a.market.day, a.rules.sym, a.rules.lim, *st, rows, alive, *a.senses, W, C, False, work)
        np.testing.assert_array_equal(live.lots, st.slots["pending"][0])
        np.testing.assert_array_equal(live.why, st.slots["why"][0])
        ordered += int((live.lots != st.slots["lots"][0]).any())
    assert ordered > 15 and rm.state == "HALTED" == STATES[st.gate["state"][0]], "the walk must see orders and a halt"


class Moody:
    "Wants half of everything three times, and then fails."
    spec = ObservationSpec(("one",), window=1)
    def reset(self, B, seed): return 0
    def act(self, obs, state):
        if state == 3: raise ValueError("no opinion")
        return Decision(np.full((len(obs), 1), 0.5), np.ones((len(obs), 1))), state + 1


def test_a_policy_that_raises_is_heard():
    "Each interval keeps when its policy first raised, what it said and how often; elsewhere nothing is claimed."
    b = bars(T=40, N=1)
    ones = Features(np.ones((40, 1, 1)), ("one",), 0)
    short, long_ = walk(Moody(), arena(b, limits_from(**LOOSE)), ones, [(0, 3), (10, 40)])
    assert "POLICY_RAISED" not in set(short.gate_events["reason"])
    said = long_.gate_events.set_index("reason").loc["POLICY_RAISED"]
    assert said["time"] == b.time[13] and said["detail"] == "ValueError: no opinion" and said["symbol"] == "*"
    assert said["bars"] == 26 and (long_.gate_events.set_index("reason")["detail"].drop("POLICY_RAISED") == "").all()


@pytest.mark.parametrize("impact", [0.0, 0.05, 2.0, 10.0])
def test_spot_cash_is_never_below_zero(impact):
    "All-in orders larger than the bar's volume: what the open and the order's own impact cost is kept back, and no sale fetches less than nothing."
    b, rng = bars(T=300, N=2), np.random.default_rng(4)
    W = np.where(rng.random((300, 2)) < 0.3, rng.choice([0.0, 0.5, 1.0], (300, 2)), np.nan)
    a = arena(b, limits_from(stop_loss=0.01, **LOOSE), Costs(impact=impact, slippage_bps=50), Lots(1e-6), 5e4)
    found = backtest_weights(W, a)
    cash = found.equity * (1 - found.weight.sum(1))
    assert cash.min() >= -1e-9 * a.capital and found.equity.min() >= 0 and len(found.trades) > 3
    assert impact > 0 or cash.min() < 1e-3 * a.capital, "an account that never spends its cash would prove nothing"


def test_signals_from_a_csv(tmp_path):
    "A CSV of weights gives what the same frame gives, to the bit; times with a zone are read as UTC; misfits are named."
    prices = pd.DataFrame(bars().close, pd.date_range("2023-01-01", periods=400, freq="1h"), ["BTC", "ETH"])
    wish = pd.DataFrame({"BTC": 0.5, "ETH": [0.25, np.nan] * 20}, index=prices.index[::10])
    path = tmp_path / "signals.csv"
    wish.to_csv(path)
    by_frame = backtest_frame(prices, wish)
    assert len(by_frame.trades) > 1
    for source in (path, str(path)): np.testing.assert_array_equal(backtest_frame(prices, source).equity, by_frame.equity)
    wish.tz_localize("UTC").tz_convert("Asia/Tokyo").to_csv(path)
    np.testing.assert_array_equal(backtest_frame(prices, path).equity, by_frame.equity)
    for bad, message in ((wish.rename(columns={"ETH": "XRP"}), "XRP"), (wish[["BTC"]], "ETH"), (pd.concat([wish, wish[:1]]), "distinct"),
                         (wish.set_axis(list("ab") * 20), "index"), (wish.set_axis(wish.index + pd.Timedelta("7min")), "no bar")):
        bad.to_csv(path)
        with pytest.raises(DataError, match=message): backtest_frame(prices, path)
