"""Every way in which open, high, low, close, stop, target and liquidation can lie on five price levels: the rule, and the kernel's bar."""
import itertools
import math

import numpy as np
import pytest
from kernel_oracle import Oracle, Position

from stratfam.core import LIQUIDATION, NO_EXIT, STOP, TARGET, Bars, bar_exit
from stratfam.market.account import CAUSES, Costs, new_log, new_state, pack_market
from stratfam.market.backtest import step_accounts
from stratfam.risk.limits import Lots, limits_from, pack_rules

NAN = float("nan")
LEVELS = (98.0, 99.0, 100.0, 101.0, 102.0)
BARS = [(o, h, l, c) for o, h, l, c in itertools.product(LEVELS, repeat=4) if l <= min(o, c) and h >= max(o, c)]


def expected(side, o, h, l, stop, target, liq):
    "The rule for a long, in words; a short is a long in the mirror."
    if side < 0:
        kind, price = expected(1, -o, -l, -h, -stop, -target, -liq)
        return kind, -price
    hit = [(level, kind) for level, kind in ((stop, STOP), (liq, LIQUIDATION)) if level >= l]  # NaN is never hit
    if hit:
        level = max(x for x, _ in hit)  # falling from the open, the higher of two levels comes first; the stop on a tie
        return (STOP if (level, STOP) in hit else LIQUIDATION), min(o, level)
    return (TARGET, target) if h > target else (NO_EXIT, NAN)


def test_bar_exit_lattice():
    levels, cases = (*LEVELS, NAN), 0
    prices = sorted({b[:3] for b in BARS})
    for (o, h, l), stop, target, liq, side in itertools.product(prices, levels, levels, levels, (1.0, -1.0)):
        want, got = expected(side, o, h, l, stop, target, liq), bar_exit(side, o, h, l, stop, target, liq)
        assert got[0] == want[0] and (got[1] == want[1] or math.isnan(got[1]) and math.isnan(want[1])), (side, o, h, l, stop, target, liq)
        cases += 1
    assert cases == len(prices) * 6**3 * 2 == 15_120


def lattice():
    "Cases (bar, stop, target, side, order, equity per notional): an order to hold, leave or double; a thin and a fat account."
    levels = (*LEVELS, NAN)
    fat = itertools.product(range(len(BARS)), levels, levels, (1, -1), ("hold", "leave"), (1.0,))
    thin = itertools.product(range(len(BARS)), levels, (NAN, 101.0), (1, -1), ("hold", "add"), (0.025,))
    gone = itertools.product((-1,), levels, levels, (1, -1), ("hold", "leave", "add"), (1.0, 0.025))
    return [*fat, *thin, *gone]


COSTS = Costs(taker=0.001, maker=0.0002, slippage_bps=5.0, maintenance=0.005, liquidation_fee=0.002, funding_default_8h=0.0008)
LIMITS = limits_from(max_leverage=20.0, max_weight=20.0, stop_loss=0.05, take_profit=0.04, take_fraction=0.5, lock_bars=3, max_drawdown=None)
LOT, HELD, MARK = 0.1, 100, 100.0
ORDERS = {"hold": 1, "leave": 0, "add": 2}


def kernel_bars(cases):
    "All cases as accounts of one symbol: account b is at row 2b + 1, after a flat bar that gives it its mark."
    rows = np.full((2 * len(cases), 1, 4), MARK)
    for b, (bar, *_) in enumerate(cases): rows[2 * b + 1, 0] = BARS[bar] if bar >= 0 else NAN
    ok = np.isfinite(rows[:, :, 0])
    time = np.datetime64("2023-01-01", "ns") + np.arange(len(rows)) * np.timedelta64(1, "h")
    unknown = np.full(ok.shape, NAN)
    return Bars(time, "1h", *np.moveaxis(rows, 2, 0), np.where(ok, 5.0, NAN), unknown, ok, ("A",), "perp")


def play_kernel(cases):
    bars, B = kernel_bars(cases), len(cases)
    market, st, log = pack_market(bars, COSTS), new_state(B, 1, 1e4), new_log(4 * B)
    rules = pack_rules(LIMITS, bars.symbols, Lots(LOT), COSTS.reserve, "perp", COSTS.maintenance)
    side = np.array([c[3] for c in cases])
    st.slots["lots"][:, 0] = side * HELD
    st.slots["pending"][:, 0] = side * HELD * [ORDERS[c[4]] for c in cases]
    p = st.pos[:, 0]
    p["entry"] = p["best"] = p["last"] = MARK
    p["stop"], p["target"] = [c[1] for c in cases], [c[2] for c in cases]
    notional = HELD * LOT * MARK
    st.acct["equity"] = notional * np.array([c[5] for c in cases])
    st.acct["cash"] = st.acct["equity"] - side * notional
    rows = 2 * np.arange(B) + 1
    step_accounts(*market, rules.sym, rules.lim, *st, rows, np.ones(B, bool), log)
    fills = [[] for _ in cases]
    for f in log[:log[-1]["lots"]]: fills[f["b"]].append((int(f["lots"]), CAUSES[f["cause"]], float(f["price"])))
    return fills, st


def play_oracle(case):
    bar, stop, target, side, order, thin = case
    o = Oracle(LIMITS, COSTS, [LOT], [0.0], [0.0], [True], True, 1e4, COSTS.funding_default_8h / 8)
    o.equity = HELD * LOT * MARK * thin
    o.cash = o.equity - side * HELD * LOT * MARK
    o.pos[0] = Position(side * HELD, MARK, stop, target, MARK)
    o.pending[0] = side * HELD * ORDERS[order]
    prices = dict(zip(("open", "high", "low", "close"), BARS[bar] if bar >= 0 else [NAN] * 4))
    o.advance(1, [{**prices, "mark": prices["close"] if bar >= 0 else MARK, "volume": 5.0, "funding": NAN, "ok": bar >= 0}])
    return o


def test_kernel_lattice():
    cases = lattice()
    assert len(cases) > 20_000
    fills, st = play_kernel(cases)
    seen = set()
    for b, case in enumerate(cases):
        o, where = play_oracle(case), (b, case)
        assert [f[:2] for f in fills[b]] == [(f[2], f[3]) for f in o.fills], where
        assert [f[2] for f in fills[b]] == pytest.approx([f[4] for f in o.fills], rel=1e-12), where
        assert st.acct["equity"][b] == pytest.approx(o.equity, rel=1e-9, abs=1e-7) and st.slots["lots"][b, 0] == o.pos[0].lots, where
        assert (st.slots["pending"][b, 0], st.slots["lock"][b, 0] > 0) == (o.pending[0], o.pos[0].lock > 0), where
        assert st.acct["insurance"][b] == pytest.approx(o.insurance, rel=1e-9, abs=1e-9), where
        seen |= {f[1] for f in fills[b]}
    assert seen == {"STOP", "TARGET", "LIQUIDATION", "POLICY"}, "the lattice must reach every kind of fill"
