#!/usr/bin/env bash
# The quickstart on seeds 0, 1 and 2, and the table of docs/quickstart.md.
#   bash examples/quickstart_seeds.sh [KEY=VALUE ...]
# Runs that are there already (runs/quickstart-seed<n>) are not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=()
for seed in 0 1 2; do
    run="runs/quickstart-seed$seed"
    [ -e "$run/report.png" ] || bash examples/quickstart.sh "seed=$seed" "run_dir=$run" "$@"
    runs+=("$run")
done
source requirements/env.sh
python -m nemo_fiberpo.analysis.report --markdown "${runs[@]}"
