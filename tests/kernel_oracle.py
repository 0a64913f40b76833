"""The slow, obvious second opinion on the kernel and the gate: plain Python floats, one account, no shortcuts.

Written from the rules (DESIGN.md sections 3 and 4), not from the kernel: positions are dictionaries, every bar takes
the full path, and each rule is a few lines in the order in which the rules are stated. Tests drive both with the same
markets, wishes and limits and compare them to 1e-9.
"""
import math
from dataclasses import dataclass, field

NAN = float("nan")


def finite(x):
    return x is not None and math.isfinite(x)


def whole(x):
    "Lots in x lots: the nearest whole number if that is not more than there is (one part in 1e9), else one fewer."
    if not finite(x) or x <= 0:
        return 0
    near = math.floor(x + 0.5)
    return int(near if near <= x * (1 + 1e-9) else near - 1)


@dataclass
class Position:
    lots: int = 0
    entry: float = 0.0
    stop: float = NAN
    target: float = NAN
    best: float = 0.0
    opened: int = 0
    trip: float = 0.0
    lock: int = -10**18
    cause: str = "POLICY"


@dataclass
class Oracle:
    limits: object  # risk.limits.Limits
    costs: object  # market.account.Costs
    lot: list
    min_qty: list
    min_notional: list
    allowed: list
    perp: bool
    capital: float
    default_funding: float = 0.0
    cash: float = 0.0
    equity: float = 0.0
    peak: float = 0.0
    day: int = -10**18
    day_base: float = 0.0
    state: str = "ACTIVE"
    cause: str = ""
    flatten: str = ""
    cooldown: int = -10**18
    streak: int = 0
    bad_run: int = 0
    fees: float = 0.0
    slip: float = 0.0
    funding: float = 0.0
    insurance: float = 0.0
    trades: int = 0
    liquidations: int = 0
    fills: list = field(default_factory=list)

    def __post_init__(self):
        self.cash = self.equity = self.peak = self.day_base = self.capital
        self.pos = [Position() for _ in self.lot]
        self.pending = [0] * len(self.lot)

    # ---- fills -----------------------------------------------------------------------------------------------------
    def price(self, ref, qty, volume, maker):
        if maker:
            return ref
        s = self.costs.slippage_bps / 1e4 + self.impact(qty, volume)
        return ref * (1 + s) if qty > 0 else max(0.0, ref * (1 - s))

    def impact(self, qty, volume):
        if self.costs.impact == 0:
            return 0.0
        return self.costs.impact * (math.sqrt(min(1.0, abs(qty) / volume)) if volume > 0 else 1.0)

    def tighten(self, p, side, level):
        if finite(level) and (not finite(p.stop) or side * level > side * p.stop):
            p.stop = level

    def fill(self, t, n, lots, ref, cause, bar):
        p, x = self.pos[n], self.limits.exits
        qty = lots * self.lot[n]
        maker = cause == "TARGET"
        price = self.price(ref, qty, bar["volume"], maker)
        rate = self.costs.maker if maker else self.costs.taker
        if cause == "LIQUIDATION":
            rate += self.costs.liquidation_fee
        fee = rate * abs(qty) * price
        self.cash -= qty * price + fee
        self.fees += fee
        self.slip += qty * (price - ref)
        before = p.lots
        p.lots = before + lots
        self.fills.append((t, n, lots, cause, price))
        if before == 0 or (before > 0) == (lots > 0):  # opens or adds
            side = 1 if lots > 0 else -1
            p.entry = (abs(before) * p.entry + abs(lots) * price) / (abs(before) + abs(lots))
            p.trip -= fee
            if before == 0:
                p.opened, p.stop, p.best = t, NAN, price
                p.target = p.entry * (1 + side * x.take_profit) if x.take_profit is not None else NAN
            elif finite(p.target):
                p.target = p.entry * (1 + side * x.take_profit)
            if x.stop_loss is not None:
                self.tighten(p, side, p.entry * (1 - side * x.stop_loss))
            if x.trailing is not None:
                self.tighten(p, side, price * (1 - side * x.trailing))
        else:
            p.trip += -qty * (price - p.entry) - fee
            if p.lots == 0:
                self.trades += 1
                self.streak = self.streak + 1 if p.trip < 0 else 0
                a = self.limits.account
                if a.losing_streak is not None and self.streak >= a.losing_streak:
                    self.cooldown, self.streak = t + a.cooldown_bars, 0
                p.trip, p.stop, p.target = 0.0, NAN, NAN

    # ---- one bar ---------------------------------------------------------------------------------------------------
    def opens(self, bars):
        return [b["open"] if b["ok"] else b["mark"] for b in bars]

    def worth(self, prices):
        return self.cash + sum(p.lots * lot * x for p, lot, x in zip(self.pos, self.lot, prices) if p.lots)

    def gross(self, prices):
        return sum(abs(p.lots) * lot * x for p, lot, x in zip(self.pos, self.lot, prices) if p.lots)

    def extreme(self, n, bars):
        b = bars[n]
        return b["mark"] if not b["ok"] else (b["low"] if self.pos[n].lots > 0 else b["high"])

    def stop_fraction(self, n, bars):
        "How far along the way from the open to the adverse extreme the stop lies; None when it is not reached."
        p, b = self.pos[n], bars[n]
        if not p.lots or not b["ok"] or not finite(p.stop):
            return None
        side, x = (1 if p.lots > 0 else -1), self.extreme(n, bars)
        if side * (x - p.stop) > 0:
            return None
        return 0.0 if x == b["open"] else max(0.0, (p.stop - b["open"]) / (x - b["open"]))

    def stop_price(self, n, bars):
        p, b = self.pos[n], bars[n]
        return b["open"] if (b["open"] - p.stop) * (1 if p.lots > 0 else -1) <= 0 else p.stop

    def liquidate(self, t, bars, at):
        o = self.opens(bars)
        for n, p in enumerate(self.pos):
            f = self.stop_fraction(n, bars)
            if p.lots and f is not None and f < at:
                self.fill(t, n, -p.lots, self.stop_price(n, bars), "STOP", bars[n])
        for n, p in enumerate(self.pos):
            if p.lots:
                self.fill(t, n, -p.lots, o[n] + at * (self.extreme(n, bars) - o[n]), "LIQUIDATION", bars[n])
                p.lock = t + self.limits.account.lock_bars
            self.pending[n] = 0
        self.liquidations += 1
        if self.cash < 0:
            self.insurance -= self.cash
            self.cash = 0.0

    def liquidation_fraction(self, bars):
        "Where on the common adverse path equity stops exceeding maintenance margin, counting the stops taken before; None = nowhere."
        mm, o = self.costs.maintenance, self.opens(bars)
        held = [n for n, p in enumerate(self.pos) if p.lots]
        stops = {n: self.stop_fraction(n, bars) for n in held}
        marks = sorted({f for f in stops.values() if f is not None and f <= 1.0})
        cash, edges = self.cash, [0.0, *[f for f in marks if f > 0.0], 1.0]
        if 0.0 in marks:  # a stop at the very open is still in the book there
            value = cash + sum(self.pos[n].lots * self.lot[n] * o[n] for n in held)
            if not value > mm * sum(abs(self.pos[n].lots) * self.lot[n] * o[n] for n in held):
                return 0.0
            cash, held = self._take(held, stops, 0.0, bars, cash)
        for left, right in zip(edges, edges[1:]):
            def slack(f, held=held, cash=cash):
                q = [(self.pos[n].lots * self.lot[n], o[n] + f * (self.extreme(n, bars) - o[n])) for n in held]
                return cash + sum(a * x for a, x in q) - mm * sum(abs(a) * x for a, x in q)
            if not slack(left) > 0:
                return left
            if not slack(right) > 0:
                a, b = slack(0.0), slack(1.0)
                return -a / (b - a)
            cash, held = self._take(held, stops, right, bars, cash)
        return None

    def _take(self, held, stops, at, bars, cash):
        for n in held:
            if stops[n] == at:
                q = self.pos[n].lots * self.lot[n]
                x = self.price(self.stop_price(n, bars), -q, bars[n]["volume"], False)
                cash += q * x - self.costs.taker * abs(q) * x
        return cash, [n for n in held if stops[n] != at]

    def advance(self, t, bars):
        "Play one bar: a list of dictionaries, one per symbol."
        x, mm = self.limits.exits, self.costs.maintenance
        lock = self.limits.account.lock_bars
        o = self.opens(bars)
        if self.perp and self.gross(o) > 0 and not self.worth(o) > mm * self.gross(o):
            self.liquidate(t, bars, 0.0)
        for n, p in enumerate(self.pos):  # gaps
            if p.lots and bars[n]["ok"] and finite(p.stop) and (bars[n]["open"] - p.stop) * (1 if p.lots > 0 else -1) <= 0:
                self.fill(t, n, -p.lots, bars[n]["open"], "STOP", bars[n])
                p.lock, self.pending[n] = t + lock, 0
        for n, p in enumerate(self.pos):  # reductions
            if p.lots == self.pending[n]:
                continue
            if not bars[n]["ok"]:
                self.pending[n] = p.lots
                continue
            want = self.pending[n]
            if p.lots and (want == 0 or (want > 0) != (p.lots > 0)):
                self.fill(t, n, -p.lots, o[n], p.cause, bars[n])
            elif abs(want) < abs(p.lots):
                self.fill(t, n, want - p.lots, o[n], p.cause, bars[n])
        more = {n: self.pending[n] - p.lots for n, p in enumerate(self.pos) if self.pending[n] != p.lots}
        if more:  # entries, scaled to the leverage that the opens allow
            want = 0.0
            for n, d in more.items():  # what buying all of it would cost; a short is reckoned alike
                q, s = abs(d) * self.lot[n], self.costs.slippage_bps / 1e4
                want += q * o[n] * (1 + s + self.impact(q, bars[n]["volume"])) * (1 + self.costs.taker)
            room = self.limits.position.max_leverage * max(self.worth(o), 0.0) - self.gross(o)
            f = 1.0 if want <= room else max(0.0, room / want)
            for n, d in more.items():
                k = (whole(f * abs(d)) if f < 1 else abs(d)) * (1 if d > 0 else -1)
                q = abs(k) * self.lot[n]
                if k and q >= self.min_qty[n] and q * o[n] >= self.min_notional[n]:
                    self.fill(t, n, k, o[n], "POLICY", bars[n])
                self.pending[n] = self.pos[n].lots
        if self.perp:
            at = self.liquidation_fraction(bars)
            if at is not None and (self.cash < 0 or any(p.lots for p in self.pos)):  # an exit too dear leaves a debt: the venue's
                self.liquidate(t, bars, at)
        for n, p in enumerate(self.pos):  # inside the bar: stop before target
            b = bars[n]
            if not p.lots or not b["ok"]:
                continue
            side = 1 if p.lots > 0 else -1
            worst, best = (b["low"], b["high"]) if side > 0 else (b["high"], b["low"])
            if finite(p.stop) and side * (worst - p.stop) <= 0:
                self.fill(t, n, -p.lots, self.stop_price(n, bars), "STOP", b)
                p.lock, self.pending[n] = t + lock, 0
            elif finite(p.target) and side * (best - p.target) > 0:
                part = abs(p.lots) if x.take_fraction >= 1 else whole(x.take_fraction * abs(p.lots))
                level, p.target = p.target, (p.target if x.take_fraction >= 1 else NAN)
                if part:
                    self.fill(t, n, -side * part, level, "TARGET", b)
                    self.pending[n] = p.lots
        for n, p in enumerate(self.pos):  # the bar's end
            b = bars[n]
            if not p.lots or not b["ok"]:
                continue
            side = 1 if p.lots > 0 else -1
            if x.trailing is not None:
                p.best = max(p.best, b["high"]) if side > 0 else min(p.best, b["low"])
                self.tighten(p, side, p.best * (1 - side * x.trailing))
            if self.perp:
                q = p.lots * self.lot[n]
                pay = q * b["mark"] * b["funding"] if finite(b["funding"]) else abs(q) * b["mark"] * self.default_funding
                self.cash -= pay
                self.funding += pay
        self.equity = self.worth([b["mark"] for b in bars])

    # ---- the decision at the close -----------------------------------------------------------------------------------
    def measure(self, day):
        a, e = self.limits.account, self.equity
        if day > self.day:
            self.day, self.day_base = day, e
            if self.state == "REDUCING" and self.cause == "DAILY_LOSS":
                self.state, self.cause = "ACTIVE", ""
        self.peak = max(self.peak, e) if finite(e) else self.peak
        sound = finite(e) and e > 0
        if not sound or (a.max_drawdown is not None and self.peak - e >= a.max_drawdown * self.peak):
            if self.state != "HALTED":
                self.state, self.cause = "HALTED", "DRAWDOWN"
        elif self.state == "ACTIVE" and a.daily_loss is not None and self.day_base - e >= a.daily_loss * self.day_base:
            self.state, self.cause = ("HALTED" if a.daily_loss_halts else "REDUCING"), "DAILY_LOSS"
        self.flatten = self.cause if self.state != "ACTIVE" else ""

    def decide(self, t, day, wishes, confidence, bars, seen, signals):
        """Target lots for the next open. `seen`: dict of optional inputs (volatility, regime, correlation, spread, age, jump)."""
        self.measure(day)
        a, N = self.limits.account, len(self.pos)
        bad = all(not finite(w) for w in wishes)
        if not signals:
            self.bad_run = self.bad_run + 1 if bad else 0
            if a.max_bad_outputs is not None and self.bad_run >= a.max_bad_outputs and self.state != "HALTED":
                self.state, self.cause = "HALTED", "BAD_OUTPUT"
        if self.flatten or self.state == "HALTED":
            for n, p in enumerate(self.pos):
                self.pending[n], p.cause = 0, "LIMIT" if self.flatten else "POLICY"
            self._time_stops(t)
            return
        e, dd = self.equity, (self.peak - self.equity) / self.peak
        held = [p.lots * self.lot[n] * bars[n]["mark"] / e if p.lots else 0.0 for n, p in enumerate(self.pos)]
        goal = [self.wish(t, n, wishes[n], held[n], confidence[n], bars[n], seen, dd) for n in range(N)]
        keep, inc, done = [], [], {}
        for n, (g, h) in enumerate(zip(goal, held)):  # what does not grow is settled first; what is left alone stays in the book
            k, alone = reduce_only(g, h), abs(g - h) < self.limits.position.min_trade
            if g == k or alone:
                done[n] = self.to_lots(n, g, h, self.pos[n].lots, e, bars[n]["mark"]) if finite(wishes[n]) else self.pos[n].lots
                k = h if done[n] == self.pos[n].lots else g
            keep.append(k)
            inc.append(0.0 if n in done else abs(g) - abs(k))
        f = self.room(keep, inc, seen)
        for n, p in enumerate(self.pos):
            p.cause = "POLICY"
            if n in done:
                self.pending[n] = done[n]
                continue
            g = goal[n]
            if f < 1:
                g = math.copysign(abs(keep[n]) + f * inc[n], g)
                if g * held[n] < 0 and abs(g - held[n]) < self.limits.position.min_trade:
                    g = 0.0
            self.pending[n] = self.to_lots(n, g, held[n], p.lots, e, bars[n]["mark"])
        self._time_stops(t)

    def _time_stops(self, t):
        x = self.limits.exits
        for n, p in enumerate(self.pos):
            if p.lots and not self.flatten and x.max_bars is not None and t - p.opened + 1 >= x.max_bars:
                self.pending[n], p.cause = 0, "TIME_STOP"

    def wish(self, t, n, w, w0, c, bar, seen, dd):
        if not finite(w):
            return w0
        lim, x = self.limits.position, self.limits.exits
        if reduce_only(w, w0) != w:
            fine = (bar["ok"] and finite(bar["mark"]) and bar["mark"] > 0 and self.allowed[n] and (self.perp or w >= 0)
                    and self.state == "ACTIVE" and t >= self.pos[n].lock and t >= self.cooldown and c >= lim.min_confidence)
            for name, cap in (("age", lim.max_age), ("spread", lim.max_spread), ("jump", lim.max_jump)):
                if name in seen:
                    fine = fine and seen[name][n] <= (math.inf if cap is None else cap)
            if not fine:
                return reduce_only(w, w0)
        if "volatility" in seen and lim.target_vol is not None:
            v = seen["volatility"][n]
            w *= min(1.0, lim.target_vol / v) if v > 0 else 0.0
        if "regime" in seen and lim.regime_cut > 0:
            r = seen["regime"]
            w *= 1 - lim.regime_cut * (r if 0 <= r <= 1 else 1.0)
        if lim.drawdown_cut > 0 and dd > 0:
            w *= 1 - lim.drawdown_cut * min(1.0, dd / self.limits.account.max_drawdown if self.limits.account.max_drawdown is not None else dd)
        if lim.kelly is not None:
            b = x.take_profit / x.stop_loss if x.take_profit is not None and x.stop_loss is not None else 1.0
            cap = lim.kelly * max(0.0, c - (1 - c) / b) / (x.stop_loss if x.stop_loss is not None else 1.0)
            w = max(-cap, min(cap, w))
        w = max(-lim.max_weight, min(lim.max_weight, w))
        if w * w0 < 0 and not lim.allow_flip:
            w = 0.0
        return w

    def room(self, keep, inc, seen):
        lim, B, inc_sum = self.limits.position, sum(map(abs, keep)), sum(inc)
        def linear(base, more, cap):
            if cap is None or more <= 0 or base + more <= cap:
                return 1.0
            return max(0.0, (cap - base) / more)
        f = linear(B, inc_sum, lim.max_gross if lim.max_gross is not None else lim.max_leverage)
        if "correlation" in seen and lim.max_corr_gross is not None:
            C, cap = seen["correlation"], lim.max_corr_gross
            def risk(s):
                x = [abs(k) + s * i for k, i in zip(keep, inc)]
                r = [[abs(v) if finite(v) else 1.0 for v in row] for row in C]
                return math.sqrt(sum(r[i][j] * x[i] * x[j] for i in range(len(x)) for j in range(len(x))))
            if risk(1.0) > cap:
                lo, hi = 0.0, 1.0
                for _ in range(200):
                    mid = (lo + hi) / 2
                    lo, hi = (mid, hi) if risk(mid) <= cap else (lo, mid)
                f = min(f, lo if risk(0.0) < cap else 0.0)
        reserve = (1 + self.costs.taker) * (1 + self.costs.slippage_bps / 1e4) - 1
        f = min(f, linear(B, inc_sum * (1 + reserve), lim.max_leverage))
        x, a = self.limits.exits, self.limits.account
        if self.perp and x.stop_loss is not None and a.liq_distance > 0:
            f = min(f, linear(B, inc_sum, 1 / (a.liq_distance * x.stop_loss + self.costs.maintenance)))
        return min(f, linear(0.0, inc_sum, lim.max_turnover))

    def to_lots(self, n, goal, w0, held, equity, price):
        if goal == 0:
            return 0
        if abs(goal - w0) < self.limits.position.min_trade:
            return held
        if not (finite(price) and price > 0):
            return held
        side = 1 if goal > 0 else -1
        same = held * side > 0
        target = side * whole(abs(goal) * equity / price / self.lot[n])
        if same and abs(target) < abs(held) and abs(goal) >= abs(w0):
            target = held
        order = abs(target - held) if same or held == 0 else abs(target)
        if order == 0:
            return target
        q = order * self.lot[n]
        if q < self.min_qty[n] or q * price < self.min_notional[n]:
            return held if same else 0
        return target


def reduce_only(w, w0):
    return min(max(w, 0.0), w0) if w0 >= 0 else max(min(w, 0.0), w0)
