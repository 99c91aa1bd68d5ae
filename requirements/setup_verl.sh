#!/usr/bin/env bash
# Sets up .venv-verl: verl, the CPU build of torch, and this package (editable). A second call returns at once.
#   bash requirements/setup_verl.sh
# About 2 minutes and 2.5 GB of disk. On GPUs use verl's own images instead and `pip install -e '.[verl]'` there.
# PYTHON and TORCH_INDEX_URL are read as by setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source requirements/python.sh
source requirements/venv.sh
make_venv .venv-verl requirements/verl.lock 3.11 "about 2 minutes, 2.5 GB on disk"
