#!/usr/bin/env bash
# Sets up .venv-verl: verl, the CPU build of torch, and this package (editable). A second call returns at once.
#   bash requirements/setup_verl.sh
# About 2 minutes and 2.5 GB of disk. On GPUs use verl's own images instead and `pip install -e '.[verl]'` there.
# PYTHON and TORCH_INDEX_URL are read as by setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
source requirements/python.sh

venv=.venv-verl
key=$({ cat requirements/bootstrap.lock requirements/verl.lock requirements/setup_verl.sh pyproject.toml; echo "$PWD"; } | cksum)
finished() { [ "$(cat "$venv/setup-done" 2>/dev/null)" = "$key" ] && "$venv/bin/python" -c '' 2>/dev/null; }
finished && exit 0

python=$(find_python)
if [ -e "$venv" ] && [ ! -e "$venv/setup-begun" ]; then
    echo "error: $PWD/$venv exists and was not made by this script. Move it away and run this again." >&2
    exit 1
fi
echo "[setup] $PWD/$venv: about 2 minutes, 2.5 GB on disk"
rm -rf "$venv"
mkdir "$venv"
touch "$venv/setup-begun"
"$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet install --no-compile "$@"; }
install --upgrade -r requirements/bootstrap.lock
# The CPU build where pip is configured to find it, or at TORCH_INDEX_URL; else the one that PyPI has.
torch=torch==$(sed -n 's/^torch==//p' requirements/verl.lock)
index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"})
install --no-deps "$torch+cpu" "${index[@]}" 2>/dev/null || install "$torch"
install --no-deps --no-build-isolation -r <(grep -v '^torch==' requirements/verl.lock)
install --no-deps --no-build-isolation -e .
"$venv/bin/python" requirements/check.py requirements/verl.lock
echo "$key" >"$venv/setup-done"
