#!/usr/bin/env bash
# Sets everything up in .venv (first call only) and trains a small mixture-of-experts GPT with FiberPO-Domain on two
# processes of the CPU.
#   bash examples/quickstart.sh                       the run of conf/quickstart.yaml
#   bash examples/quickstart.sh seed=1 dir=runs/s1    anything in the config can be overridden
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash requirements/setup.sh
source requirements/env.sh
exec torchrun --standalone --nproc_per_node 2 examples/train_gpt_fiberpo.py --config-name quickstart "$@"
