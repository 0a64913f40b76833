"""Bugs to plant in the loop: where, what is written there, what is written instead, and the weather that finds it."""
import importlib
import inspect
import textwrap

MUTANTS = [  # name, module, attribute, text, instead, weather
    ('settles_at_once', 'desk', 'SETTLE_S', None, 0.0, ('late',)),
    ('no_answer_is_a_no', 'desk', 'Desk._leave',
     'if got.kind == REFUSED and isinstance(got.error, NotSent):',
     'if got.kind != ACK:', ('timeout_after', 'timeout_before', 'error_after')),
    ('refusal_is_believed', 'desk', 'Desk._leave', 'isinstance(got.error, NotSent)', 'True', ('misread',)),
    ('exits_taken_for_new_ones', 'desk', 'Desk.line', 'if not taken(key): break', 'break', ('refused', 'soft_refusal')),
    ('room_is_not_asked_for', 'desk', 'Desk._leave',
     'if not w.reduces and not still(w): return self._over(line, "never_sent", "no room any more")',
     'pass', ('timeout_before', 'error_after')),
    ('lost_orders_stay_lost', 'desk', 'Desk._find_lost', 'waiting = {', 'orders = []; waiting = {', ('disk', 'crash')),
    ('fills_twice', 'desk', 'Desk._book_fills', 'if f.fill_id in self.journal.book.seen["fill"] or f.fill_id in waiting: continue', 'pass', ('gap',)),
    ('bills_twice', 'desk', 'Desk._book_bills', 'if b.bill_id in known_ids or', 'if', ('deposit',)),
    ('old_money_believed', 'desk', 'Desk._agreed',
     'if self.odd and not ("cash" in self.drift and abs(odd - was) <= near):',
     'if False:', ('stale_reply',)),
    ('stops_are_not_placed', 'desk', 'Desk.protect', 'sent = self.submit([w for w in place if', 'sent = self.submit([w for w in () if', ('refused',)),
    ('old_stops_stay', 'desk', 'Desk.protect', 'for o in cancel:', 'for o in ():', ('refused',)),
    ('stops_doubled', 'desk', 'Desk.protect', 'for w in place if w not in lost', 'for w in wants if w not in lost', ('refused',)),
    ('stop_without_its_size', 'desk', 'Desk._call',
     'quantity = Decimal(line.body["quantity"])',
     'quantity = Decimal(line.body["quantity"]) / (2 if w.purpose == "STOP" and w.lots % 2 == 0 else 1)', ('refused',)),
]


def plant(monkeypatch, module, attribute, text, instead):
    "Put a bug into a module, until the test is over."
    home = importlib.import_module(f"stratfam.trading.{module}")
    *path, name = attribute.split(".")
    owner = getattr(home, path[0]) if path else home
    if text is None: return monkeypatch.setattr(owner, name, instead)
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(text) == 1, f"{attribute}: {text!r} stands there {source.count(text)} times"
    made = {}
    exec(compile(source.replace(text, instead), f"<{attribute}>", "exec"), vars(home), made)
    monkeypatch.setattr(owner, name, next(iter(made.values())))
