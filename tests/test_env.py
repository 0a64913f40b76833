"""The environment against the backtest, on markets with gaps, shorts, leverage, stops and liquidations."""
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from stable_baselines3.common.env_checker import check_env

from stratfam.core import Bars, DataError, Decision, Features, ObservationSpec
from stratfam.data.worlds import make_world
from stratfam.market.account import Costs
from stratfam.market.backtest import arena, walk
from stratfam.market.env import Actions, BatchEnv, CryptoEnv, Reward, actions_for, episode_starts, to_weights
from stratfam.market.observe import log_returns
from stratfam.risk.gate import HALTED
from stratfam.risk.limits import Lots, limits_from


def holes(bars, seed, n=12):
    "The same bars with some of them never published."
    rng, ok = np.random.default_rng(seed), bars.ok.copy()
    for t in rng.integers(50, len(bars) - 5, n): ok[t:t + rng.integers(1, 4), rng.integers(len(bars.symbols))] = False
    cut = {k: np.where(ok, getattr(bars, k), np.nan) for k in ("open", "high", "low", "close", "volume", "funding")}
    return Bars(bars.time, bars.step, **cut, ok=ok, symbols=bars.symbols, market=bars.market)


def simple_features(bars, back=20):
    "One-bar and `back`-bar returns, NaN until `back` bars after a gap."
    r = np.nan_to_num(log_returns(bars))
    x = np.stack([r, np.cumsum(r, 0) - np.concatenate([np.zeros((back, r.shape[1])), np.cumsum(r, 0)[:-back]])], axis=2).astype("f4")
    age = np.zeros(bars.ok.shape, int)
    for t in range(len(bars)): age[t] = np.where(bars.ok[t], age[t - 1] + 1 if t else 1, 0)
    x[age <= back] = np.nan
    return Features(x, ("r1", "rb"), back)


def setting(market, seed, N=3, T=1500, **limits):
    bars = holes(make_world("merton", n_bars=T, n_symbols=N, seed=seed, market=market, vol=2.0).bars, seed)
    lots = Lots(step=0.001, min_notional=5.0)
    return arena(bars, limits_from(**limits), Costs(taker=1e-3, slippage_bps=3), lots, 20_000.0), simple_features(bars)


class Net:
    "A fixed nonlinear function of the observation."
    def __init__(self, spec, actions, N, seed):
        self.spec, self.actions = spec, actions
        self.m = np.random.default_rng(seed).normal(0, 0.3, (spec.size(N), N)).astype("f4")
        self.m[:spec.window * N * len(spec.names)] *= 200.0  # Returns are small

    def raw(self, obs):
        y = np.tanh(np.array([o @ self.m for o in obs], "f4"))
        return (np.nan_to_num(y + 1) / 2 * len(self.actions.levels) * 0.9999).astype(int) if self.actions.levels else y

    def reset(self, B, seed): return None

    def act(self, obs, state):
        w = to_weights(self.actions, self.raw(obs))
        return Decision(w, np.ones_like(w)), state


MARKETS = {"free": ("spot", dict(max_drawdown=None, daily_loss=None)),
           "spot": ("spot", dict(stop_loss=0.03, take_profit=0.05, max_drawdown=0.6)),
           "perp": ("perp", dict(max_leverage=5.0, max_weight=3.0, stop_loss=0.04, max_drawdown=0.9, daily_loss=0.2, lock_bars=5)),
           "wild": ("perp", dict(max_leverage=20.0, max_weight=20.0, max_drawdown=None, daily_loss=None)),
           "gated": ("spot", dict(target_vol=0.8, max_jump=4.0, max_corr_gross=0.7, min_trade=0.05, losing_streak=2, cooldown_bars=10,
                                  max_drawdown=0.5, trailing=0.05, max_bars=48))}


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("name", MARKETS)
def test_walking_env_equals_walk_to_the_bit(name, kind):
    market, limits = MARKETS[name]
    for seed in range(3):
        a, f = setting(market, seed, **limits)
        spec = ObservationSpec(("r1", "rb"), 4)
        net = Net(spec, actions_for(a, kind, (0.5, 1.0), each=1.0), 3, seed)
        intervals = [(0, 700), (700, 1100), (1200, 1203), (1300, 1301)]
        want = walk(net, a, f, intervals)
        env = BatchEnv(a, f, spec, intervals, net.actions, Reward("log"), walking=True)
        obs, paid = env.reset(), np.zeros(4)
        assert env.alive[:2].all() and not env.alive[3]
        while env.alive.any():
            live = env.alive.copy()
            obs, reward, _, _ = env.step(net.raw(obs))
            paid += reward
            for b in np.flatnonzero(live): assert env.state.acct["equity"][b] == want[b].equity[env.t[b] - intervals[b][0]]
        assert env.t.tolist() == [j - 1 for _, j in intervals]
        assert (env.state.slots["lots"] == 0).all()
        assert sum(len(w.trades) for w in want) > 5
        final = np.array([w.equity[-1] for w in want])
        if (final > 1.0).all(): np.testing.assert_allclose(paid, np.log(final / a.capital), rtol=0, atol=1e-9)


def test_training_rows_stay_inside_the_train_set():
    a, f = setting("spot", 1, T=4000)
    train = [(0, 900), (1500, 2600), (3900, 4000)]
    env = BatchEnv(a, f, ObservationSpec(("r1",), 3), train, B=32, episode=40, seed=3)
    allowed = {t for i, j in train for t in range(i, j)}
    rng, seen = np.random.default_rng(0), set()
    for _ in range(600):
        env.step(rng.uniform(-1, 1, (32, 3)))
        seen |= set(env.t.tolist())
        assert a.bars.ok[env.t].all()
    assert seen <= allowed and len(seen) > 1000 and len(seen & set(range(3900, 4000))) > 0


def test_episode_starts_equal_their_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        good = rng.random(60) < 0.9
        cuts = np.sort(rng.choice(61, 4, replace=False))
        intervals, L = [(int(cuts[0]), int(cuts[1])), (int(cuts[2]), int(cuts[3]))], int(rng.integers(1, 9))
        want = [s for i, j in intervals for s in range(i, j) if s + L < j and good[s:s + L + 1].all()]
        if want: assert episode_starts(good, intervals, L).tolist() == want
        else:
            with pytest.raises(DataError, match="longest"): episode_starts(good, intervals, L)


@pytest.mark.parametrize("reward", ["log", "volatility", "sharpe", "drawdown"])
def test_rewards_are_finite_and_repeat(reward):
    "F5: the same actions from the same start earn the same."
    a, f = setting("perp", 2, **MARKETS["wild"][1])
    run = []
    for _ in range(2):
        env = BatchEnv(a, f, ObservationSpec(("rb",), 2), [(0, 1500)], reward=Reward(reward, None), B=8, episode=30, seed=9)
        rng = np.random.default_rng(1)
        run.append(np.array([env.step(rng.uniform(-1, 1, (8, 3)))[1].copy() for _ in range(400)]))
    assert np.isfinite(run[0]).all() and (run[0] == run[1]).all() and run[0].std() > 0


def test_the_control_changes_no_difference_between_actions():
    a, f = setting("spot", 4)
    total = {}
    for control in (0.0, 1.0):
        for action in (-1.0, 1.0):
            env = BatchEnv(a, f, ObservationSpec(("rb",)), [(0, 1500)], reward=Reward("log", control=control), B=4, episode=50, seed=2)
            total[control, action] = np.array([env.step(np.full((4, 3), action, "f4"))[1].copy() for _ in range(50)])
    np.testing.assert_allclose(total[0, 1] - total[0, -1], total[1, 1] - total[1, -1], atol=1e-12)
    assert np.abs(total[1, 1]).sum() < 0.5 * np.abs(total[0, 1]).sum()


def test_a_halted_account_terminates_and_starts_again():
    a, f = setting("perp", 0, max_leverage=10.0, max_weight=10.0, max_drawdown=0.1, daily_loss=None)
    env = BatchEnv(a, f, ObservationSpec(("rb",)), [(0, 1500)], B=16, episode=200, seed=0)
    halts, rng = 0, np.random.default_rng(0)
    for _ in range(300):
        _, _, terminated, truncated = env.step(rng.choice([-1.0, 1.0], (16, 3)))
        assert not (terminated & truncated).any()
        halts += int(terminated.sum())
        assert (env.state.acct["equity"][terminated] == a.capital).all() and (env.state.gate["state"][terminated] != HALTED).all()
    assert halts > 5


def test_account_streams_do_not_depend_on_how_many_run():
    a, f = setting("spot", 5)
    few, many = (BatchEnv(a, f, ObservationSpec(("rb",)), [(0, 1500)], B=B, episode=20, seed=4) for B in (2, 32))
    for _ in range(100):
        few.step(np.ones((2, 3), "f4")); many.step(np.ones((32, 3), "f4"))
        assert (few.t == many.t[:2]).all() and (few.state.acct["equity"] == many.state.acct["equity"][:2]).all()


def test_the_observation_handed_out_before_stays_intact():
    a, f = setting("spot", 6)
    env = BatchEnv(a, f, ObservationSpec(("rb",)), [(0, 1500)], B=4, episode=10)
    obs = env.reset(0)
    for _ in range(30):
        kept, nxt = obs.copy(), env.step(np.zeros((4, 3), "f4"))[0]
        assert (obs == kept).all() and nxt is not obs
        obs = nxt


def test_the_action_is_never_changed():
    "F6"
    a, f = setting("spot", 6)
    env = BatchEnv(a, f, ObservationSpec(("rb",)), [(0, 1500)], B=4, episode=10)
    for dtype in ("f4", "f8"):
        action = np.full((4, 3), 7.0, dtype)
        env.step(action)
        assert (action == 7.0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("market", ["spot", "perp"])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_check_env_has_nothing_to_say(market, kind):
    a, f = setting(market, 7)
    env = CryptoEnv(a, f, ObservationSpec(("r1", "rb"), 3), [(0, 1500)], actions=actions_for(a, kind), episode=40)
    check_env(env)
    check_gymnasium(env, skip_render_check=True)


@pytest.mark.parametrize("each", [None, 0.3, 1.0])
@pytest.mark.parametrize("short", [False, True])
def test_weights_stay_inside_the_book(each, short):
    rng = np.random.default_rng(0)
    for N in (1, 2, 7):
        actions = Actions(2.5, each, short)
        w = to_weights(actions, rng.normal(0, 2, (200, N)))
        assert (np.abs(w).sum(axis=1) <= 2.5 + 1e-12).all() and (short or (w >= 0).all())
        assert (np.abs(w) <= 2.5 * (min(1.0, 2 / N) if each is None else each) + 1e-12).all()
