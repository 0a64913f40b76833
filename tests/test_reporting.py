"""The shipped templates, rendered: complete folders, self-contained pages, honest stamps, nothing left behind by a failure."""
import dataclasses
import json
import re
from pathlib import Path
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from stratfam import cli, figures, reporting # noqa: F401 - cli registers the commands
from stratfam.core import ConfigError, Env, ExportError, StratfamError, VirtualClock

TEMPLATES = ("validation", "demo", "train", "backtest", "paper_trading")
FILES = ["report.html", "report.ipynb", "result.json", "run", "validation_positions.csv", "validation_results.png", "validation_trades.csv"]


class Assets(HTMLParser):
    "Everything a page would fetch, and whether its tags are closed."
    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        names = {"img": ["src", "srcset"], "script": ["src"], "link": ["href"], "iframe": ["src"], "image": ["xlink:href"], "source": ["src"]}
        self.fetched += [at[n] for n in names.get(tag, []) if at.get(n) and not at[n].startswith(("data:", "#"))]
        if tag not in {"meta", "br", "img", "hr", "input", "link"}: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag: self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def check_page(text):
    "A page asks nothing of any other file and is well formed."
    page = Assets()
    page.feed(text)
    assert page.fetched == [] and page.open == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|require\.js|MathJax", text)
    for need in ("viewport", "prefers-color-scheme: dark", "@media print"): assert need in text


def bare(world):
    "The same world with everything optional left out."
    optional = ("verdict", "quality", "trials", "pbo", "logits", "selection", "dsr", "seeds", "stress", "maintenance", "regimes", "confidence",
                "learning", "basis", "orders", "decisions")
    return dataclasses.replace(world, paths={}, **dict.fromkeys(optional))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "Every template over the same made-up run."
    out, env = tmp_path_factory.mktemp("runs"), Env(clock=VirtualClock())
    run = figures.sample_run(bars=900)
    return {t: reporting.run_report(t, None, out, env, run) for t in TEMPLATES}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_makes_a_complete_self_contained_folder(rendered, template):
    made = rendered[template]
    assert re.fullmatch(r"20231114T221320Z-sample-[0-9a-f]{8}", made.parent.name)
    assert sorted(p.name for p in made.parent.iterdir()) == FILES
    text = made.read_text(encoding="utf-8")
    check_page(text)
    assert text.index("REJECT") < text.index("<svg"), "the verdict comes before the first curve"
    assert "SYNTHETIC DATA" in text and text.count("<figcaption>") >= 12 and "An Exception was encountered" not in text
    result = json.loads((made.parent / "result.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert [w["decision"] for w in result["worlds"]] == ["REJECT", "ACCEPT"] and result["synthetic"] is True
    assert (made.parent / "validation_results.png").read_bytes()[:4] == b"\x89PNG"
    assert pd.read_csv(made.parent / "validation_trades.csv")["synthetic"].all()


def test_a_saved_run_renders_again_from_its_folder(rendered, tmp_path):
    again = reporting.run_report("validation", {"run": str(rendered["validation"].parent / "run")}, tmp_path, Env(clock=VirtualClock()))
    assert again.parent.name == rendered["validation"].parent.name, "same run, template and time: same digest in the name"
    assert again.read_bytes() == rendered["validation"].read_bytes()


def test_the_index_lists_every_run_and_survives_a_damaged_one(rendered):
    out = rendered["demo"].parents[1]
    (out / "broken").mkdir()
    (out / "broken" / "result.json").write_text("{")
    text = reporting.write_index(out).read_text()
    check_page(text)
    assert text.count("/report.html") == len(TEMPLATES) + 1 and "result.json is not JSON" in text


def test_what_was_not_measured_is_said_in_words():
    w = bare(figures.sample_run(bars=300).worlds[0])
    for name in ("paths", "pbo", "selection", "dsr", "seeds", "stress", "regimes", "reliability", "learning", "basis", "orders", "decisions"):
        assert "[not measured]" in repr(getattr(figures, f"{name}_figure")(w)), name
    assert "No verdict was asked for" in reporting.verdict_box(w).code and "not checked" in reporting.quality_table(w).code


@pytest.mark.parametrize("bars", [50, 61, 700])
def test_short_and_lost_accounts_are_drawn(bars):
    w = figures.sample_run(bars=bars).worlds[0]
    b = w.backtests["ppo"]
    first, none = np.eye(1, bars)[0], np.zeros(bars)
    lost = dataclasses.replace(b, equity=none, ret=-first, price_pnl=-b.capital * first, fee=none, slippage=none,
                               trades=b.trades.iloc[:0], gate_events=b.gate_events.iloc[:0])
    ruined = dataclasses.replace(w, backtests={**w.backtests, "ppo": lost})
    for name in ("equity", "months", "rolling", "returns", "pnl", "gate", "turnover", "positions", "regimes"):
        for world in (w, ruined): assert getattr(figures, f"{name}_figure")(world).code.startswith("<figure")
    assert figures.results_picture(ruined)[:4] == b"\x89PNG"


def test_every_figure_stands_in_a_template():
    "Nothing is drawn by the room that no page shows, and no page draws what the room does not have."
    text = "".join(p.read_text(encoding="utf-8") for p in reporting.templates().glob("*.ipynb"))
    drawn = {n for n in vars(figures) if n.endswith("_figure")}
    assert drawn == set(re.findall(r"fig\.(\w+_figure)\(", text)) and len(drawn) >= 19


def test_the_data_page_needs_no_run(tmp_path, monkeypatch):
    from stratfam.data.store import save_bars
    from stratfam.data.worlds import make_world
    bars = make_world("crypto_like", n_bars=400, n_symbols=2, step="1h", seed=3).bars
    save_bars(bars, tmp_path / "bars")
    save_bars(bars[50:], tmp_path / "venue")
    monkeypatch.chdir(tmp_path)
    page = reporting.run_report("data", {"folder": "bars", "venue": "venue"}, "runs")
    text = page.read_text(encoding="utf-8")
    check_page(text)
    for need in ("Coverage and prices", "Data quality", "Stylised facts", "basis, basis points", "SYN2USDT"): assert need in text
    assert json.loads((page.parent / "result.json").read_text())["template"] == "data"


def test_no_text_of_a_run_can_end_the_script_of_the_index(tmp_path):
    run = figures.sample_run(bars=300)
    bad = "</script><script>alert(1)</script>"
    reporting.write_results(dataclasses.replace(run, command=bad), tmp_path / "x")
    text = reporting.write_index(tmp_path).read_text()
    assert "alert(1)" in text and "<script>alert" not in text and text.count("</script>") == 3
    data = re.search(r'id="lines">(.*?)</script>', text, re.S)[1]
    assert json.loads(data)["x"]["command"] == bad


def test_colours_can_be_told_apart_without_colour():
    "The lines differ in brightness or in their dashes, the marks in their shape."
    dashes = [str(dash) for _, dash in figures.LINES]
    assert len(set(dashes)) == len(dashes) and "-" not in dashes
    assert len({shape for shape, *_ in figures.MARKS.values()}) == len(figures.MARKS)


def contrast(a, b):
    "WCAG contrast of two #rrggbb colours."
    def light(c):
        v = [int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in v)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    hi, lo = sorted((light(a), light(b)), reverse=True)
    return (hi + 0.05) / (lo + 0.05)


def test_text_has_contrast_on_both_grounds():
    full = lambda c: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:])
    for theme in reporting.COLOURS.split("@media"):
        colour = {k: full(v) for k, v in re.findall(r"--(\w+): (#\w+)", theme)}
        for name in ("ink", "soft", "good", "bad", "wait"):
            for ground in ("bg", "card"): assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)


def test_unknown_names_are_refused_before_anything_is_made(tmp_path):
    run = figures.sample_run(bars=300)
    with pytest.raises(ConfigError, match="Did you mean 'run'"): reporting.run_report("validation", {"rnu": "x"}, tmp_path / "a", run=run)
    with pytest.raises(ConfigError, match="Did you mean 'demo'"): reporting.run_report("dmo", None, tmp_path / "a", run=run)
    with pytest.raises(ConfigError, match="give its folder"): reporting.run_report("demo", None, tmp_path / "a")
    with pytest.raises(ExportError, match="no saved run here"): reporting.run_report("demo", {"run": str(tmp_path)}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(reporting, "_execute", stop)
    with pytest.raises(KeyboardInterrupt): reporting.run_report("demo", None, tmp_path, run=figures.sample_run(bars=300))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line_and_leaves_no_folder(tmp_path, monkeypatch):
    import errno
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("stratfam.core.os.replace", full)
    run = figures.sample_run(bars=300)
    with pytest.raises(StratfamError, match="No space left on device"): reporting.save_run(run, tmp_path / "saved")
    assert not (tmp_path / "saved" / "run.json").exists()


def test_a_run_with_something_unknown_is_refused_by_place(tmp_path):
    run = figures.sample_run(bars=300)
    odd = dataclasses.replace(run.worlds[0], facts={"source": object()})
    with pytest.raises(ExportError, match=r"worlds\.0\.facts\.source: a object"):
        reporting.save_run(dataclasses.replace(run, worlds=(odd,)), tmp_path)


def test_a_foreign_type_in_a_saved_run_is_refused(tmp_path):
    folder = reporting.save_run(figures.sample_run(bars=300), tmp_path / "saved")
    index = json.loads((folder / "run.json").read_text())
    index["run"]["worlds"][0]["$type"] = "Popen"
    (folder / "run.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="Unknown saved type 'Popen'"): reporting.load_run(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A router with calibrated rules, trained, walked and paper-traded through the commands on made-up bars; the saved worlds of the three pages."
    import os

    from stratfam.commands.base import run
    from stratfam.data.store import save_bars
    from stratfam.data.worlds import make_world
    home, here = tmp_path_factory.mktemp("trained"), Path.cwd()
    save_bars(make_world("crypto_like", n_bars=4000, n_symbols=2, step="1h", seed=8).bars, home / "bars", exchange="synthetic")
    os.chdir(home)
    try:
        assert run(["train", "router", "bars", "--out", "model", "--report"]) == 0
        assert run(["backtest", "model", "bars", "--report", "--venue-bars", "bars"]) == 0
        assert run(["train", "ridge", "bars", "--out", "ridge", "--report"]) == 0
        assert run(["trade", "ridge", "--data", "bars", "--run", "session", "--bars", "200"]) == 0
        assert run(["report", "session", "--data", "bars"]) == 0
    finally: os.chdir(here)
    pages = sorted((home / "reports" / "runs").glob("*/report.html"))
    saved = [reporting.load_run(p.parent / "run") for p in pages]
    return {f"{r.name} {r.worlds[0].title}": (p, r) for p, r in zip(pages, saved)}


def of(trained, word): return next(v for k, v in trained.items() if word in k)


@pytest.mark.proof
def test_the_page_of_a_real_training_shows_regimes_learning_and_confidence_out_of_fold(trained):
    page, run = of(trained, "Training of router")
    w = run.worlds[0]
    assert set(w.regimes) == {"regime", "route"} and w.regimes["route"].nunique() > 1 and run.synthetic
    assert len(w.regimes) == len(w.backtests[w.pick])
    page, run = of(trained, "Training of ridge")
    w, text = run.worlds[0], page.read_text(encoding="utf-8")
    assert set(w.learning["name"]) == {"explained"} and w.learning["training"].nunique() >= 2
    assert w.confidence["stated"].between(0, 1).all() and abs((w.confidence["stated"] - w.confidence["right"]).mean()) < 0.1
    assert "share that was right" in text and "the hold-out was not opened" in text and "SYNTHETIC DATA" in text
    assert w.backtests[w.pick].time[-1] < np.datetime64("2030") and run.command.startswith("stratfam train ridge bars")


@pytest.mark.proof
def test_the_page_of_a_real_backtest_shows_bands_and_costs(trained):
    page, run = of(trained, "Backtest of model")
    w, text = run.worlds[0], page.read_text(encoding="utf-8")
    assert len(w.regimes) == len(w.backtests["model"]) and "Regimes and routing" in text and "The judged policy knows no regimes" not in text
    assert list(w.stress["factor"]) == [0, 1, 2, 4] and w.stress["sharpe"].is_monotonic_decreasing
    assert w.facts["data venue"] == w.facts["trading venue"] == "synthetic" and len(w.basis) == len(w.backtests["model"])
    assert float(w.basis.abs().max().max()) == 0.0 and "Trading venue over data venue" in text
    assert run.settings.startswith("[data]") and set(run.digests) == {"model", "data", "code", "config"}
    assert "<h1>Backtest of model</h1>" in text and ": Backtest of model</h3>" not in text


@pytest.mark.proof
def test_the_page_of_a_session_is_its_journal(trained):
    page, run = of(trained, "session")
    w, text = run.worlds[0], page.read_text(encoding="utf-8")
    b = w.backtests[w.pick]
    assert len(b) >= 199 and len(w.orders) and "paper trading sends no money" in text
    np.testing.assert_allclose(b.capital + (b.price_pnl - b.fee - b.funding).sum(), b.equity[-1])
    twin, d = w.backtests["backtest of the same bars"], w.decisions
    assert run.synthetic and w.facts["trading venue"] == "paper" and w.facts["data venue"] == "synthetic"
    assert len(d) == len(b) - 1 == len(twin) - 1 and d["asked"].sum() == d["same"].sum() > 100, "one path from bars to decisions"
    np.testing.assert_allclose(d["gap_bps"].iloc[-1], 3.0 * b.turnover[:-1].sum(), rtol=0.1) # 12 basis points assumed, 9 paid
    assert "Only a session whose journal" not in text and "wishes" in text and w.orders["shortfall_bps"].notna().any()


@pytest.mark.proof
def test_a_session_of_another_policy_is_seen(trained, tmp_path):
    "The comparison itself: the backtest of a rule that wishes otherwise does not agree with the session."
    from stratfam.commands.session import decisions_of, seen_by, twin_of
    from stratfam.policies.base import Rule
    from stratfam.risk.limits import Lots
    from stratfam.core import ObservationSpec
    from stratfam.trading.history import history_of
    from stratfam.trading.journal import read_journal
    home = of(trained, "session")[0].parents[3]
    s, entries = history_of(home / "session"), read_journal(home / "session" / "journal.db")[1]
    other = Rule(ObservationSpec(("return_24", "volatility_24")), "mean_reversion", (("bars", 24), ("entry", 0.5)))
    again, wish = twin_of(other, seen_by(entries)._replace(setup=dataclasses.replace(seen_by(entries).setup, features=other.spec.names)),
                          s.account, Lots())
    d = decisions_of(entries, s.account, again, wish)
    assert d["same"].sum() < 0.9 * d["asked"].sum() and d["apart"].max() > 0.1


STUDY = """[[member]]
name = "ppo"
fit = "stratfam.policies.sb3:SB3Fit"
fixed = {algo = "PPO", steps = 6000, episode = 24, accounts = 8, features = ["return_1", "return_24"]}
search = {"options.learning_rate" = {low = 2e-4, high = 3e-3, log = true}}
"""


@pytest.mark.proof
def test_the_page_of_a_study_shows_how_the_pick_learned_and_how_sure_it_was(tmp_path, monkeypatch):
    from stratfam.commands.base import run
    from stratfam.data.store import save_bars
    from stratfam.data.worlds import make_world
    monkeypatch.chdir(tmp_path)
    save_bars(make_world("crypto_like", n_bars=3000, n_symbols=1, step="1h", seed=8).bars, "bars", exchange="synthetic")
    Path("space.toml").write_text(STUDY)
    line = ["search", "bars", "--space", "space.toml", "--cv", "kcv", "--groups", "3", "--trials", "1", "--seeds", "2", "--batch", "1",
            "--backend", "serial", "--validate", "--venue-bars", "bars"]
    assert run(line) in (3, 4)
    page = next(Path("reports/runs").glob("*/report.html"))
    w, text = reporting.load_run(page.parent / "run").worlds[0], page.read_text(encoding="utf-8")
    assert w.pick.startswith("ppo") and set(w.learning["name"]) == {f"{w.pick}: reward"} and set(w.learning["seed"]) == {0, 1}
    assert w.learning.groupby("seed")["step"].nunique().min() > 5 and w.learning["step"].max() <= 7000
    assert w.confidence is not None and w.confidence["stated"].between(0, 1).all() and "share that was right" in text
    assert w.facts["data venue"] == "synthetic" and float(w.basis.abs().max().max()) == 0.0 and "seeds, one thin line each" in text


@pytest.mark.proof
def test_a_report_of_a_finished_study_renders_in_twenty_seconds(tmp_path):
    """Processor time of the whole rendering, the kernel included. Cores that are shared count the same work up to twice; so the bound is
    20 seconds or, where that is more, ten times what a process takes to load what every report needs, measured before and after."""
    import resource
    import subprocess
    import sys
    import time
    used = lambda: time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    def loading():
        start = used()
        subprocess.run([sys.executable, "-c", "import stratfam.figures, matplotlib.figure"], check=True)
        return used() - start

    run, before = figures.sample_run(bars=25_000), loading()
    start = used()
    reporting.run_report("validation", None, tmp_path, run=run)
    spent = used() - start
    assert spent < max(20.0, 10 * min(before, loading())), f"{spent:.1f} s of processor time"


@pytest.mark.proof
def test_the_index_sorts_and_compares_by_clicks(tmp_path):
    import os
    import shutil
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make docs-test")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)): reporting.write_results(figures.sample_run(seed, 300), tmp_path / name)
    page = reporting.write_index(tmp_path).as_uri()
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as p:
        try: browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as e: pytest.skip(f"no Chromium to be started ({str(e).splitlines()[0]})")
        tab, faults = browser.new_page(viewport={"width": 390, "height": 800}), []
        tab.on("pageerror", lambda e: faults.append(str(e)))
        tab.goto(page)
        shown = lambda: [float(x) for x in tab.eval_on_selector_all("table.sort tbody tr", "r => r.map(x => x.cells[7].dataset.v)")]
        tab.click("th:has-text('Sharpe')")
        assert shown() == sorted(shown())
        tab.click("th:has-text('Sharpe')")
        assert shown() == sorted(shown(), reverse=True) and len(set(shown())) == 3
        for name in "abc": tab.check(f"input[value={name}]")
        assert tab.eval_on_selector_all("input:checked", "all => all.map(x => x.value)").__len__() == 2
        head = tab.eval_on_selector_all("#compare thead th, #compare tr:first-child th", "all => all.map(x => x.textContent)")
        assert head[:3] == ["", "b", "c"] and tab.locator("#compare .differs").count() > 10
        assert tab.locator("#compare img").count() == 2 and faults == []
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
        browser.close()


def test_made_up_bars_are_stamped_wherever_they_come_from(tmp_path):
    from stratfam.data.store import save_bars
    from stratfam.data.worlds import make_world
    from stratfam.demo import bars_in
    bars = make_world("gbm", n_bars=300, n_symbols=1, step="1h", seed=1).bars
    save_bars(bars, tmp_path / "made_up", exchange="synthetic")
    save_bars(bars, tmp_path / "real", exchange="kraken")
    assert (bars_in(tmp_path / "made_up").synthetic, bars_in(tmp_path / "real").synthetic) == (True, False)
