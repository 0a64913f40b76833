"""Every place where a process can die, and processes that are really killed."""
import os
import signal
import threading

import numpy as np
import pytest

from stratfam.core import Env
from stratfam.trading import simulate as sim
from stratfam.trading.journal import open_journal, read_journal
from stratfam.trading.simulate import Weather, simulate
from stratfam.weex.wire import RequestsTransport

POINTS = ("before-leverage", "reconcile", "reconciled", "turn", "cycle", "decided", "before-intents", "before-commit", "after-commit", "before-send",
          "after-send", "between-fill-and-book", "before-cancel")
KINDS = ("timeout_after", "partial_fill", "gap")


def deaths(point, seeds, bars):
    "Die where this point is passed for the 1st, 2nd, 4th, ... time: early, in the middle, late."
    died = 0
    for seed in seeds:
        r = simulate(seed, under=Weather(seed, KINDS, 0.15, bars), die=(point, 2 ** (seed % 6)))
        assert r.ok, f"{point}, {2 ** (seed % 6)}: {r!r}"
        died += r.faults.get("crash", 0)
    return died


def test_each_point_once():
    "Points that a seed does not reach are reached by the twenty seeds below."
    assert sum(deaths(point, range(1), 8) for point in POINTS) >= len(POINTS) - 2


@pytest.mark.proof
@pytest.mark.parametrize("point", POINTS)
def test_each_point_twenty_times(point):
    "Cancels are rare in ten bars."
    assert deaths(point, range(int(os.environ.get("STRATFAM_CRASH_SEEDS", 20))), 10) >= (5 if point == "before-cancel" else 8)


class Far:
    "The world's clock, asked over the wire: the child has none of its own."
    def __init__(self, url):
        import requests
        self.url, self.session = url, requests.Session()

    def now_ns(self): return int(self.session.get(f"{self.url}/now").content)
    def monotonic(self): return self.now_ns() / 1e9
    def sleep(self, seconds): self.session.get(f"{self.url}/sleep/{max(0.0, seconds)}")


class World:
    "An exchange in this process, behind a socket that also tells the time."
    def __init__(self, seed):
        self.sim = sim.Simulation(Weather(seed, ("timeout_after", "refused"), 0.05, 40))
        self.sim.rng, self.lock = np.random.default_rng(seed), threading.Lock()
        self.loopback = sim.Loopback(self)

    def send(self, method, url, headers, body):
        with self.lock:
            path = url.partition("//venue")[2]
            if path.startswith("/sleep/"): self.sim.true.sleep(float(path[7:]))
            if path.startswith(("/now", "/sleep")): return sim.Response(200, {}, str(self.sim.true.now_ns()).encode())
            return self.sim.post.send(method, url, headers, body)


def child(world, path, hours):
    "One process: trade on the real file until it is killed, or for so many hours of the world's time."
    clock = Far(world.loopback.url)
    world.sim.env = Env(clock, np.random.default_rng(0), RequestsTransport(clock))
    world.sim.socket, world.sim.clock = world.loopback, clock
    world.sim.watch.blind = True  # The watchman's books are in the parent
    world.sim.disk = type("Disk", (), {"open": lambda self: open_journal(path, "kill").store})()
    while True:
        try: world.sim.boot()
        except sim.StratfamError: clock.sleep(5.0)
        else: break
    loop = world.sim.loop
    loop.policy = loop.policy.inner
    loop.run(loop.venue.now_ms() + int(hours * 3_600_000))


def spawn(world, path, hours):
    "A process of its own."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        child(world, path, hours)
        code = 0
    finally: os._exit(code)


@pytest.mark.proof
def test_fifty_processes_killed(tmp_path):
    "kill -9 at any moment, on a real file, against an exchange behind a socket: after the last start, journal and venue agree."
    kills, rng, worlds = 0, np.random.default_rng(9), 5
    for seed in range(worlds):
        world, path = World(seed), tmp_path / f"{seed}.db"
        for _ in range(int(os.environ.get("STRATFAM_KILLS", 50)) // worlds):
            pid = spawn(world, path, 40)
            timer = threading.Timer(float(rng.uniform(0.05, 1.0)), os.kill, (pid, signal.SIGKILL))
            timer.start()
            _, status = os.waitpid(pid, 0)
            timer.cancel()
            kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        with world.lock: world.sim.heal()
        _, status = os.waitpid(spawn(world, path, 2), 0)
        assert status == 0, "the last process ended with an error"
        book, entries = read_journal(path)
        account, known = world.sim.account, {e.key for e in entries if e.kind == "intent"}
        taken = [o["client"] for o in [*account.orders.values(), *account.closed] if o["client"].startswith("sf") and not o["trigger"]]
        assert len(taken) == len(set(taken)), "an order was doubled"
        assert set(taken) <= known, "an order is in no journal"
        assert {str(f[0]) for f in account.fills} <= book.seen["fill"], "a fill is in no journal"
        assert all(l.outcome == "ACK" and l.body["trigger"] for l in book.open.values()), "an intent has no end"
        held = {s: int(x["lots"]) for s, x in zip(world.sim.bars.symbols, book.state["mirror"]["slots"])}
        for e in book.since_state:
            if e.kind == "fill": held[e.body["symbol"]] += e.body["lots"] * (1 if e.body["side"] == "BUY" else -1)
        assert held == world.sim.lots()
        world.loopback.close()
    assert kills >= 0.8 * int(os.environ.get("STRATFAM_KILLS", 50)), f"only {kills} were killed in time"
