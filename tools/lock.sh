#!/usr/bin/env bash
# constraints.txt from the environment at hand: exact versions, no local suffix (torch's +cpu), not ourselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -m uv pip freeze -q -p "$(command -v python)" | grep -vE '^-e |^stratfam|^pip==' | sed -E 's/\+[a-z0-9.]+$//' > constraints.txt.new
mv constraints.txt.new constraints.txt
wc -l constraints.txt
