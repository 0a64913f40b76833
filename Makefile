# Every target sets up .venv first (tools/setup.sh: one stamp, so later runs start at once).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV ?= .venv
export VENV
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
# Two workers; the tests of one file stay together, because they share fixtures. WORKERS=0 runs everything in one process.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -q --durations=5
# pytest answers 5 when it collected nothing: fine for a room that has no such tests yet.
NONE_OK := || [ $$? -eq 5 ]
TUTORIALS := $(wildcard nbs/tutorials/*.ipynb nbs/explore/*.ipynb)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv: Python 3.11+ is all it needs
	@tools/setup.sh dev,notify

setup-all:
	@tools/setup.sh dev,notify,docs,ray

demo: setup ## the whole pipeline to an HTML report; DATA=folder uses your bars, OPEN=1 opens the report
	$(BIN)/stratfam demo $(if $(DATA),--data '$(DATA)') $(if $(OPEN),--open) $(if $(QUICK),--quick)

test: setup ## notebooks against the package (with coverage), notebooks as they are, tests/; under 15 minutes
	$(PYTEST) --nb-exported nbs --ignore=nbs/tutorials --ignore=nbs/explore -n $(WORKERS) --cov=stratfam --cov-report=term:skip-covered
	$(PYTEST) nbs --ignore=nbs/tutorials --ignore=nbs/explore -n $(WORKERS)
	$(PYTEST) tests -m "not proof and not bench and not soak" -n $(WORKERS) --dist loadfile

proof: setup-all ## planted bugs, many seeds, learning, tutorials, the docs site; under 25 minutes
	$(PYTEST) tests -m proof -n $(WORKERS) --dist loadfile $(NONE_OK)
	$(if $(TUTORIALS),$(PYTEST) $(TUTORIALS) --nb-flags slow)
	$(MAKE) --no-print-directory docs

docs: setup-all ## the documentation site, offline, in _docs/html
	$(PY) -W ignore tools/build_docs.py

docs-test: setup-all ## every page of the built site in a headless Chromium, at phone and desktop width (run `make docs` first)
	@test -f _docs/html/index.html || { echo "no site yet: run make docs"; exit 1; }
	@command -v chromium chromium-browser google-chrome >/dev/null || $(PY) -m playwright install --with-deps chromium
	$(PYTEST) tests/test_docs_site.py

readme: setup ## README.md from nbs/index.ipynb
	$(PY) -W ignore tools/build_docs.py --readme

picture: setup ## the README's picture, from the newest run of the demo (or RUN=folder)
	cp "$${RUN:-$$(ls -d reports/runs/*-demo-* | tail -n 1)}/validation_results.png" nbs/images/demo.png

# DATA=folder of bars; without it the settings' folder, STRATFAM_DATA or the local store (fill it: stratfam data download BTCUSDT ETHUSDT --step 1h).
BARS = $(if $(DATA),'$(DATA)')
POLICY ?= models/btc

train-btc: setup ## train branch B's baseline on BTCUSDT by the hour; saved in models/btc, resumable after Ctrl-C
	$(BIN)/stratfam train baseline $(BARS) --symbols BTCUSDT --step 1h --out models/btc

train-ensemble: setup ## train branch B's ensemble on BTCUSDT and ETHUSDT; members chosen out of fold; saved in models/ensemble
	$(BIN)/stratfam train ensemble $(BARS) --symbols BTCUSDT,ETHUSDT --step 1h --out models/ensemble

infer-safe: setup ## what POLICY (default models/btc) says of the newest closed bars, through the gate; sends nothing
	$(BIN)/stratfam infer '$(POLICY)' $(BARS)

backtest: setup ## walk POLICY (default models/btc), a rule or a CSV of weights; writes a page
	$(BIN)/stratfam backtest '$(POLICY)' $(BARS) --report

export: setup ## clean the notebooks, then write stratfam/ from them
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

lint: setup ## ruff on the exported code, tests and tools
	$(BIN)/ruff check .

drift: setup ## committed notebooks are clean, stratfam/ is what they export, README.md is current
	tools/drift.sh

hooks: setup ## git: merge driver for notebooks, drift check before each commit
	tools/hooks.sh

bench: setup ## speed against peers, side by side in one run (about ten minutes; STRATFAM_PEERS=python of an environment with peers)
	$(BIN)/stratfam bench all

soak: setup ## long runs until stopped: SOAK_SECONDS=600 by default
	SOAK_SECONDS=$${SOAK_SECONDS:-600} $(PYTEST) tests -m soak -s $(NONE_OK)

lock: setup-all ## constraints.txt from what is installed now (after a tested upgrade)
	tools/lock.sh

clean: ## remove everything that can be made again, the environment included
	rm -rf $(VENV) _proc _docs .pytest_cache .ruff_cache .hypothesis .coverage build stratfam.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup setup-all demo train-btc train-ensemble infer-safe backtest test proof docs docs-test readme picture export lint drift hooks \
	bench soak lock clean
