#!/usr/bin/env bash
# Sets up .venv-mcore312, where tests/megatron runs on a megatron-core that needs Python 3.12. A second call returns at once.
#   bash requirements/setup_mcore312.sh
# PYTHON, a Python 3.12, and TORCH_INDEX_URL are read as by setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source requirements/python.sh
source requirements/venv.sh
make_venv .venv-mcore312 requirements/mcore312.lock 3.12 "about 2 minutes, 1 GB on disk; 5 GB with a CUDA build of torch"
