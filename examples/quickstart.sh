#!/usr/bin/env bash
# Sets everything up in .venv (first call only), makes the data and a warm-started policy, and trains that small
# mixture-of-experts GPT with FiberPO-Domain on two processes of the CPU.
#   bash examples/quickstart.sh                               the run of conf/quickstart.yaml
#   bash examples/quickstart.sh seed=1 run_dir=runs/seed1     anything in the config can be overridden
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash requirements/setup.sh
source requirements/env.sh

export PYTHONWARNINGS=ignore TQDM_DISABLE=1 # NeMo's imports warn a lot, and one line a step is enough

fiberpo check quickstart "$@"
torchrun --standalone --nproc_per_node 2 examples/warm_start.py --config-name quickstart "$@"
fiberpo train quickstart "$@"
