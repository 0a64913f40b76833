#!/usr/bin/env bash
# Make .venv from nothing but Python 3.11+ and git; a second run returns at once.
#
#   tools/setup.sh [EXTRAS]     EXTRAS: comma-separated lists of settings.ini (default "dev")
#   PYTHON=/path/to/python3.12 tools/setup.sh     choose the interpreter
#   VENV=/path tools/setup.sh                     choose the environment's folder (default .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-dev}
venv=${VENV:-.venv}
py=$venv/bin/python
torch=$(grep -E '^torch==' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu
say() { printf '\033[1m%s\033[0m\n' "[set-up] $*"; }
die() { printf '[set-up] %s\n' "$@" >&2; exit 1; }

# A stamp tells which extras are installed, for exactly these files; a list that holds all of ours will do.
stamp_key=$(cat settings.ini setup.py constraints.txt tools/setup.sh | git hash-object --stdin | cut -c1-16)
for stamp in "$venv"/.stratfam-*-"$stamp_key"; do
    missing=no
    for extra in ${extras//,/ }; do [[ "$stamp" == *-$extra-* ]] || missing=yes; done
    [ -f "$stamp" ] && [ $missing = no ] && "$py" -c '' 2>/dev/null && exit 0
done

find_python() {
    local found=() c
    for c in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3 /usr/bin/python3 python; do
        command -v "$c" >/dev/null 2>&1 || continue
        if "$c" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$c"; return
        fi
        found+=("$c ($("$c" --version 2>&1 | head -1))")
    done
    die "No usable Python: this project needs Python 3.11 or newer with its venv module." \
        "Looked at: ${found[*]:-nothing on PATH}." \
        "Debian/Ubuntu: apt install python3 python3-venv. Or name one: PYTHON=/path/to/python3.12 make ..."
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }
has_cpu_index() {
    "$1" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=4).read(1)' "$cpu_index" 2>/dev/null
}

base=$(find_python)
new=yes; [ -x "$py" ] && "$py" -c 'import torch' 2>/dev/null && new=no
where=()
if [ $new = no ]; then size="little: torch is already here"
elif has_gpu; then size="about 3.1 GB, 7 GB on disk (CUDA build of torch: an NVIDIA GPU is present)"
elif has_cpu_index "$base"; then
    where=(--no-deps --index-url "$cpu_index") # what torch needs comes in step 3, at the tested versions
    size="about 0.6 GB, 2.0 GB on disk (CPU build of torch)"
else size="0.6 GB and 2.0 GB on disk where the default index has a CPU build of torch, else up to 3.1 GB and 7 GB"
fi
free_gb=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
say "Python:   $base ($("$base" --version 2>&1))"
say "Into:     $venv   Extras: $extras   Free disk: $free_gb GB"
say "Download: $size"
say "Steps:    1 environment, 2 torch, 3 the tested versions of constraints.txt; 1 to 5 minutes on a fast line"
[ $new = no ] || [ "$free_gb" -ge 3 ] || die "Only $free_gb GB are free here, the environment needs at least 2 GB: free some space first."

say "1/3 environment"
[ -x "$py" ] && "$py" -c '' 2>/dev/null || "$base" -m venv --clear "$venv"
"$py" -m pip install -q --disable-pip-version-check -c constraints.txt uv ||
    say "uv could not be installed; going on with pip (slower, same versions)"

say "2/3 $torch"
"$py" -c 'import torch' 2>/dev/null ||
    "$py" -m pip install -q --disable-pip-version-check -c constraints.txt "${where[@]}" "$torch"

say "3/3 stratfam[$extras]"
if "$py" -m uv --version >/dev/null 2>&1; then
    "$py" -m uv pip install -q -p "$py" -c constraints.txt -b constraints.txt -e ".[$extras]"
else
    "$py" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
fi
touch "$venv/.stratfam-${extras//,/-}-$stamp_key"
say "done: $(du -sh "$venv" 2>/dev/null | cut -f1) in $venv, $("$py" -c 'import torch; print("torch", torch.__version__)')"
