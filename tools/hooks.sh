#!/usr/bin/env bash
# Install this clone's git hooks. Nothing outside the clone is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
git config --local include.path ../.gitconfig # the notebook merge driver
hook=$(git rev-parse --git-path hooks)/pre-commit
mkdir -p "$(dirname "$hook")"
cat > "$hook" <<'HOOK'
#!/usr/bin/env bash
# Clean and export, lint; stop the commit when that changed a file that is being committed.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
PATH=$PWD/.venv/bin:$PATH
before=$(git diff -- nbs stratfam | git hash-object --stdin)
nbdev_clean && nbdev_export
ruff check -q .
after=$(git diff -- nbs stratfam | git hash-object --stdin)
[ "$before" = "$after" ] || { echo "Notebooks were cleaned or exported just now: look at git diff, add, commit again." >&2; exit 1; }
HOOK
chmod +x "$hook"
echo "Installed: $hook and the notebook merge driver."
