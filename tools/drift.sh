#!/usr/bin/env bash
# What is committed is what the notebooks say: clean notebooks, an up-to-date package, a current README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { printf '\n%s\n' "$1" >&2; exit 1; }
nbdev_clean
git diff --exit-code -- nbs || fail "Notebooks were committed unclean. Cure: make export, then commit."
nbdev_export
git diff --exit-code -- stratfam || fail "stratfam/ is not what the notebooks export. Cure: make export, then commit."
new=$(git ls-files --others --exclude-standard -- stratfam nbs)
[ -z "$new" ] || fail "Left out of git: $new"
python -W ignore tools/build_docs.py --readme
git diff --exit-code -- README.md || fail "README.md is not what nbs/index.ipynb says. Cure: make readme, then commit."
