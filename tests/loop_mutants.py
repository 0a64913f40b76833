"""Bugs to plant in journal, mirror, plan, permit, desk and loop: where, what is written instead, and the weather that finds it."""
import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass, field

from stratfam.trading.simulate import Weather

LOST = ("timeout_after", "timeout_before", "error_after")  # Answers that do not come


@dataclass(frozen=True)
class Bug:
    "A planted bug, and the schedule that should find it."
    name: str
    patches: tuple  # (module, attribute, text, what is written instead); text None = the value itself
    kinds: tuple  # Of the weather
    rate: float = 0.3
    bars: int = 20
    limits: dict = field(default_factory=dict)
    die: tuple | None = None
    symbols: int = 2

    def weather(self, seed): return Weather(seed, self.kinds, self.rate, self.bars, self.symbols)


def bug(name, module, attribute, text, instead, kinds, *more, **how):
    "A bug of one place, or of a place and `more` places that would cover for it."
    return Bug(name, ((module, attribute, text, instead), *more), kinds, **how)


BUGS = [
    # What is sent, and what becomes of it
    bug("settles_at_once", "desk", "SETTLE_S", None, 0.0, ("late",)),
    bug("no_answer_is_a_no", "desk", "Desk._leave", "if got.kind == REFUSED and isinstance(got.error, NotSent):", "if got.kind != ACK:", LOST),
    bug("refusal_is_believed", "desk", "Desk._leave", "isinstance(got.error, NotSent)", "True", ("misread",)),
    bug("exits_taken_for_new_ones", "desk", "Desk.line", "if not taken(key): break", "break", ("refused", "soft_refusal")),
    bug("room_is_not_asked_for", "desk", "Desk._leave",
        'if not w.reduces and not still(w): return self._over(line, "never_sent", "no room any more")', "pass", LOST),
    bug("lost_orders_stay_lost", "desk", "Desk._find_lost", "for o in orders:", "for o in ():", ("disk", "crash")),
    bug("entries_leave_without_the_disk", "desk", "Desk.submit", "pairs = [(w, l) for w, l in pairs if w.reduces]", "pass", ("disk",),
        ("loop", "Loop._fits", "or self.desk.drift or self.desk.unwritten", "or self.desk.drift")),
    bug("sends_before_it_writes", "desk", "Desk.submit",
        "self.unsent = {l.id for _, l in pairs}\n    with self.together():\n        for w, l in pairs: self._leave(w, l, still)",
        "pass", ("gap",), ("desk", "Desk.submit", 'self.point("before-intents")',
        'self.point("before-intents"); self.unsent = {l.id for _, l in pairs}; [self._leave(w, l, still) for w, l in pairs]')),
    bug("late_orders_leave", "desk", "Desk._leave",
        'if self.venue.now_ms() > line.body["expires_ms"]: return self._over(line, "never_sent", "too late")',
        "pass", ("slow",), limits={"stop_loss": 0.03, "take_profit": 0.02}),
    bug("time_runs_out_while_asking", "desk", "Desk._leave", "if not w.reduces and not still(w):",
        'if self.venue.now_ms() > line.body["expires_ms"]: return self._over(line, "never_sent", "")\n    if not w.reduces and not still(w):',
        ("timeout_before", "late", "banned", "rate_limit", "error_before"), ("desk", "Desk._leave",
        'if self.venue.now_ms() > line.body["expires_ms"]: return self._over(line, "never_sent", "too late")', "pass"), bars=30),
    bug("misread_fills_are_a_strangers", "desk", "Desk._may_be_ours", "l.outcome != ACK", "l.outcome == UNKNOWN", ("misread", "hidden_order"),
        rate=0.6),
    bug("one_stop_however_large", "plan", "protection", "out += parts(Want(s, purpose, -side * lots, trigger), grid)",
        "out.append(Want(s, purpose, -side * lots, trigger))", ("caps",)),
    bug("one_order_however_large", "plan", "parts", "whole, rest = divmod(abs(w.lots), most)", "whole, rest = 0, abs(w.lots)", ("caps",)),
    bug("half_an_exit", "desk", "Desk.submit", "if x.reduces else parts(x, grids[x.symbol])[:1]", "[:1]", ("caps",)),
    bug("ends_say_nothing_of_waiting_fills", "desk", "Desk._over", "line.done if filled is None else filled", "line.filled", ("disk",)),
    bug("refused_at_once", "desk", "Desk._resolve", "elif listing is not None and line.outcome == REFUSED and self.age(line) >= LAG_S:",
        "elif line.outcome == REFUSED:", ("misread", "hidden_order"), rate=0.6),
    bug("ends_before_its_fills", "desk", "Desk._finish", "return\n    end =", "pass\n    end =", ("late_fills", "partial_fill")),
    # What is read
    bug("fills_twice", "desk", "Desk._book_fills", 'if f.fill_id in self.journal.book.seen["fill"] or f.fill_id in waiting: continue', "pass",
        ("gap",)),
    bug("bills_twice", "desk", "Desk._book_bills", "if b.bill_id in booked or b.bill_id in waiting or", "if", ("deposit",)),
    bug("bills_never", "desk", "Desk._book_bills", "for b in bills:", "for b in ():", ("gap",)),
    bug("old_money_believed", "desk", "Desk._agreed", 'if self.odd and not ("cash" in self.drift and abs(odd - was) <= near):', "if False:",
        ("stale_reply",)),
    bug("failed_read_is_a_read", "desk", "Desk.reconcile", "self.clean, self.keys = False,", "self.clean, self.keys = True,", ("error_before",
        "html")),
    bug("nothing_ever_moves", "desk", "Desk._unmoved", "self.rest != face(snap) or", "", ("gap",)),
    bug("a_face_without_its_wallet", "desk", "face", "(snap.wallet, tuple(", "(0, tuple(", ("gap",)),
    bug("first_difference_is_taken", "desk", "Desk._settled", "if self.drift[s] < TRIES or", "if", ("stale_reply", "hidden_order"),
        ("desk", "Desk._settled", "return self.drift[s] >= 4 * TRIES or", "return True or")),
    bug("taken_over_the_wrong_way", "desk", "Desk._adopt", '"BUY" if gap > 0 else "SELL"', '"SELL" if gap > 0 else "BUY"', ("inherited",)),
    bug("nobodys_fill_closes_nothing", "desk", "Desk._book_fills", 'why = "EXTERNAL" if purpose == "EXTERNAL" else', "why =", ("person",)),
    bug("the_venues_names_are_not_read", "desk", "Desk._names", "for o in listing or () if o.client_id", "for o in ()", LOST),
    bug("leverage_hides_a_stranger", "desk", "Desk.block", 'if symbol not in self.blocked or self.blocked[symbol] == "LEVERAGE" != why:',
        "if symbol not in self.blocked:", ("inherited", "leverage_refused", "timeout_before"), rate=0.6),
    # Stops
    bug("stops_are_not_placed", "desk", "Desk.protect", "sent = self.submit([w for w in place if", "sent = self.submit([w for w in () if",
        ("refused",)),
    bug("old_stops_stay", "desk", "Desk.protect", "for o in cancel:", "for o in ():", ("refused",)),
    bug("stops_doubled", "desk", "Desk.protect", "for w in place if w not in lost", "for w in wants if w not in lost", ("refused",)),
    bug("stop_without_its_size", "desk", "Desk._call", 'quantity = Decimal(line.body["quantity"])',
        'quantity = Decimal(line.body["quantity"]) / (2 if w.purpose == "STOP" and w.lots % 2 == 0 else 1)', ("refused",)),
    bug("old_stop_goes_first", "desk", "Desk.protect", "sent = self.submit(",
        "[self.venue.cancel(o) for o in cancel]; cancel = []; sent = self.submit(", ("gap",)),
    bug("old_stop_goes_though_the_new_one_failed", "desk", "Desk.protect", "if o.order_id and (o.symbol, kind_of(o)) not in failed and",
        "if o.order_id and", ("refused",), rate=0.1, bars=30, limits={"trailing": 0.02}),
    bug("stop_between_two_ticks", "plan", "on_tick", 'return on_grid(Decimal(f"{level:.12g}"), grid.tick, up=side > 0)',
        'return Decimal(f"{level:.12g}")', ("gap",)),
    bug("stop_rounded_away", "plan", "on_tick", "grid.tick, up=side > 0", "grid.tick * 100, up=side < 0", ("gap",), limits={"stop_loss": 0.01,
        "trailing": None}),
    bug("stops_do_not_trail", "mirror", "Mirror.mark", "mark_one(", "continue; mark_one(", ("gap",), limits={"trailing": 0.02}),
    bug("stop_level_does_not_count", "plan", "match_protection",
        "key = lambda symbol, purpose, side, lots, trigger: (symbol, purpose, side, lots, trigger)",
        "key = lambda symbol, purpose, side, lots, trigger: (symbol, purpose, side, lots)", ("gap",), limits={"trailing": 0.02}),
    bug("no_way_out_at_the_third_refusal", "desk", "Desk.protect", "self.leave({w.symbol for w in lost} | beyond, bar_ms)", "pass", ("refused",
        "soft_refusal", "jump"),
        rate=0.6, limits={"stop_loss": 0.01}),
    # What is planned
    bug("busy_lots_sold_again", "plan", "reductions", "- (busy or {}).get(s, 0)", "", LOST),
    bug("flips_stop_short", "plan", "reductions", "keep = 0 if L * P < 0 else min(abs(L), abs(P))", "keep = min(abs(L), abs(P))", ("partial_fill",),
        limits={"allow_flip": True}),
    bug("flips_over_a_rest", "loop", "Loop._fits", "if m.lots[n] * w.lots < 0: return False", "pass", ("partial_fill",), limits={"allow_flip": True}),
    bug("each_entry_for_itself", "plan", "worst_notional", "growing.get(s, 0)", "0", ("jump",),
        ("plan", "entries", "f = linear_room(gross, want * (1.0 + room.reserve), cap) if room.equity > 0 else 0.0", "f = 1.0"), rate=0.6),
    bug("shorts_make_room", "plan", "worst_notional", "abs(int(held[n]))", "int(held[n])", ("gap",), ("plan", "entries",
        "np.sum(np.abs(held) * size)",
        "np.sum(held * size)")),
    bug("room_at_old_prices", "loop", "Loop._wants", "room = Room(m.value(price) - float(np.nansum(fees)), s.limits.position.max_leverage,",
        "room = Room(m.value(price), 1.3 * s.limits.position.max_leverage,", ("gap",)),
    # When
    bug("any_price_will_do", "loop", "Loop._wants", "(np.abs(mid / self.closes - 1.0) <= s.band)", "True", ("jump",),
        ("loop", "Loop._fits", "if not abs(self.mid[n] / self.closes[n] - 1.0) <= self.setup.band: return False", "pass")),
    bug("any_age_will_do", "loop", "Loop._fresh", "self.env.clock.monotonic() - self.asked[which] > self.setup.fresh_s", "np.isnan(self.mid[which])",
        ("late", "timeout_before")),
    bug("closed_symbols_are_entered", "desk", "Desk.against", "if symbol in self.blocked: return self.blocked[symbol]", "pass", ("person",
        "leverage_refused")),
    bug("no_look_before_a_decision", "loop", "Loop._turn", "elif late <= s.ttl_s: return False", "elif late <= s.ttl_s: self.cycle(close_ms)",
        ("error_before", "html"), ("loop", "Loop._turn", "if late <= s.ttl_s and self.desk.clean and len", "if late <= s.ttl_s and len"),
        ("desk", "Desk.against", 'if not self.clean or self.drift: return "UNRECONCILED"', "pass"),
        ("loop", "Loop._turn", "(missing or not self.desk.clean)", "missing"),
        ("loop", "Loop._fits", "or not self.desk.clean or self.desk.drift or", "or"), rate=0.6),
    bug("decides_however_late", "loop", "Loop._turn", "if late <= s.ttl_s and self.desk.clean and len", "if self.desk.clean and len", ("crash",),
        ("loop", "Loop._ttl_left", "max(0, close_ms + int(self.setup.ttl_s * 1000) - self.venue.now_ms())", "300_000"),
        ("loop", "Loop.start", "% s.step_ms > s.ttl_s * 1000", "% s.step_ms > s.step_ms"), bars=30),
    bug("clocks_are_not_compared", "loop", "Loop._turn", "if self._close() != self.synced_ms:", "if False:", ("clock",)),
    bug("the_same_close_again", "loop", "Loop.moment", '"bar_ms": self.bar_ms', '"bar_ms": self.bar_ms - 3_600_000', ("gap",),
        die=("after-send ENTRY", 2)),
    bug("old_wishes_live_on", "mirror", "Mirror.decide", 'self.state.slots["pending"] = self.state.slots["lots"]', "pass", ("gap", "refused",
        "soft_refusal"), bars=30, symbols=1),
    bug("holes_are_no_reason", "loop", "Loop.think", "wish.weight[0, ~whole] = np.nan", "pass", ("gap",)),
    # Halts
    bug("kill_forgotten", "loop", "Loop.halt", 'self.desk.note([("note", "halt", {"reason": reason}), self.moment()])',
        'self.desk.note([("note", "halt", {"reason": reason})])', ("chat",), die=("before-send FLATTEN", 1)),
    bug("halted_and_holding", "loop", "Loop.poll", 'if self.mirror.gate["state"] == HALTED and', "if False and", ("chat",),
        ("loop", "Loop.halt", "self.desk.flatten(self.bar_ms)", "pass")),
    bug("halted_entries_wait", "desk", "Desk.flatten", 'if o.client_id.startswith(OURS) and not o.trigger:', "if False:", ("chat", "operator",
        "gap")),
    bug("halted_in_name_only", "mirror", "Mirror.kill", 'self.gate["state"], self.gate["cause"] = 1, HALTED, int(Reason.KILL)',
        'self.gate["cause"], self.gate["bad_run"] = 1, int(Reason.KILL), 0', ("chat", "operator")),
    bug("refused_keys_go_unnoticed", "loop", "Loop.poll", "self._check_keys()", "pass", ("keys",)),
    bug("resumed_in_memory_only", "loop", "Loop.resume", '("note", "resume", {"reason": reason, "was": was}), self.moment()',
        '("note", "resume", {"reason": reason, "was": was})',
        ("operator", "chat", "crash")),
    bug("resumed_without_the_disk", "loop", "Loop.resume", "self.mirror.restore(before)", "pass", ("operator", "chat", "disk")),
    bug("no_reset_at_a_resume", "mirror", "Mirror.reset", "self.state.gate[:] = gate_state(1, equity)",
        'self.gate["kill"] = self.gate["state"] = self.gate["cause"] = 0',
        ("operator", "chat")),
    bug("resume_forgets_the_day", "mirror", "Mirror.reset", 'self.gate["day"] = day', "pass", ("operator", "chat")),
    bug("day_by_the_wrong_clock", "mirror", "Mirror.decide", "close_ms // 86_400_000, ", "(close_ms - self.step_ms) // 86_400_000, ", ("gap",)),
    # Money
    bug("deposits_are_profit", "mirror", "Mirror.credit", "if transfer: self.shift(amount)", "pass", ("deposit", "withdrawal")),
    bug("funding_moves_the_peak", "desk", "moves_money", 'return kind.startswith(("deposit", "withdraw", "transfer"))', "return True", ("gap",)),
    bug("fees_are_income", "mirror", "Mirror.book", "rate = fee /", "rate = -fee /", ("gap",)),
    bug("shorts_count_as_longs", "mirror", "Mirror.value", "np.sum(self.lots[held] *", "np.sum(np.abs(self.lots[held]) *", ("gap",)),
    bug("equity_of_the_bar_before", "loop", "Loop.cycle", 'self.closes = rows["mark"][-1].copy()', 'self.closes = rows["mark"][-2].copy()',
        ("jump",)),
    bug("found_money_is_profit", "mirror", "Mirror.unexplained", "self.shift(max(0.0, self.odd) - before)", "pass", ("mystery",), bars=30),
    # Memory
    bug("a_new_peak_at_each_start", "mirror", "Mirror.restore", 'fill_records(self.state.gate, [found["gate"]])', "pass", ("crash",)),
    bug("stops_forgotten_at_a_start", "mirror", "Mirror.restore", 'fill_records(self.state.pos[0, n:n + 1], [found["pos"][i]])', "pass", ("crash",)),
    bug("locks_forgotten_at_a_start", "mirror", "Mirror.restore", 'fill_records(self.state.slots[0, n:n + 1], [found["slots"][i]])',
        'self.state.slots[0, n]["lots"] = found["slots"][i]["lots"]', ("crash",), limits={"lock_bars": 2, "stop_loss": 0.01}),
    bug("no_lock_after_a_stop", "mirror", "Mirror.book", 's["lock"] = t + int(lim["lock_bars"])', "pass", ("gap",), limits={"lock_bars": 2,
        "stop_loss": 0.01}),
    bug("closed_symbols_forgotten", "desk", "Desk.recover", '{**book.state.get("blocked", {}), **later}', "{}", ("person", "doubled", "crash")),
    bug("closed_at_the_next_decision_only", "desk", "Desk._adopt", ', *_closed(s, "EXTERNAL")', "", ("inherited",), die=("before-leverage", 1)),
    bug("facts_after_the_state_forgotten", "desk", "Desk.recover", "for e in book.since_state:", "for e in ():", ("crash",)),
    bug("facts_after_the_state_twice", "journal", "Book.fold", "self.state, self.since_state = e.body, []", "self.state = e.body", ("crash",)),
    bug("reads_from_now_on", "desk", "Desk.recover", "self.since_ms = max(0, min([newest, *(l.time_ms for l in book.open.values())]) - OVERLAP_MS)",
        "self.since_ms = self.venue.now_ms()", ("crash",)),
    bug("intents_never_end", "journal", "Book.fold", "self.open.pop(e.key, None)", "pass", ("gap",)),
    # Permission
    bug("leverage_is_not_read_back", "loop", "Loop.lever", "if got.kind == ACK:", "if True:", ("leverage_refused",)),
    bug("leverage_is_not_needed", "loop", "Loop.lever", 'else: self.desk.block(x, "LEVERAGE")', "else: pass", ("leverage_refused",), rate=0.6),
    bug("a_verdict_for_ever", "loop", "Loop.think", "close_ms * 10**6 < self.permit.expires_ns", "True", ("verdict",)),
    bug("a_waiver_without_its_cap", "permit", "permit", "FOREVER, True, cap)", "FOREVER, True)", ("waiver",)),
    bug("a_waiver_with_any_leverage", "permit", "permit", "max_leverage=min(1.0, limits.position.max_leverage)",
        "max_leverage=limits.position.max_leverage", ("waiver",),
        ("permit", "permit", "max_gross=min(1.0, limits.position.max_gross or 1.0)", "max_gross=limits.position.max_gross"),
        ("permit", "permit", "FOREVER, True, cap)", "FOREVER, True)"), limits={"max_leverage": 3.0, "max_weight": 3.0}),
    bug("a_signature_in_the_log", "desk", "Desk.reconcile", 'self.emit("error", where="reconcile", text=str(e))',
        'self.emit("error", where="reconcile", text=f"{e} {self.venue.client.credentials.passphrase[:]}")', ("error_before",)),
]


def plant(monkeypatch, bug):
    "Put a bug into its modules, until the test is over."
    for module, attribute, text, instead in bug.patches:
        home = importlib.import_module(f"stratfam.trading.{module}")
        *path, name = attribute.split(".")
        owner = getattr(home, path[0]) if path else home
        was = getattr(owner, name)
        made = instead if text is None else _changed(home, was, text, instead, f"{bug.name}: {attribute}")
        monkeypatch.setattr(owner, name, made)
        for other in [m for n, m in sys.modules.items() if n.startswith("stratfam.trading.") and m is not home and not path]:
            if vars(other).get(name) is was: monkeypatch.setattr(other, name, made)


def _changed(home, was, text, instead, where):
    "A function with one passage of its source replaced; a second patch goes on from the first."
    source = getattr(was, "planted", None) or textwrap.dedent(inspect.getsource(was))
    assert source.count(text) == 1, f"{where}: {text!r} stands there {source.count(text)} times"
    source, made = source.replace(text, instead), {}
    exec(compile(source, f"<{where}>", "exec"), vars(home), made)
    out = next(iter(made.values()))
    out.planted = source
    return out
