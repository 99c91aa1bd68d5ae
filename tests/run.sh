#!/usr/bin/env bash
# Sets everything up and runs the tests.
#   bash tests/run.sh                    every stage but matrix, in order; stops at the first that fails
#   bash tests/run.sh lint types         only these stages: lint, types, unit, mcore, mcore312, verl, slurm, matrix
#   bash tests/run.sh unit -- -k gates   what follows -- goes to pytest
# unit is all of tests/ on the main environment; mcore is the Megatron seam again, on the newest megatron-core for Python
# 3.11; mcore312 the same on the newest of all, where there is a Python 3.12 and a CPU build of torch for it (named, with
# any build); verl is tests/verl on the real verl, and Liger. The last two make environments of their own
# (requirements/setup_*.sh).
# slurm is tests/slurm/run.sh, which starts a SLURM where it is root on Debian. What could not be run is in the last lines.
# Only where it is named: matrix compares every layout of up to 8 ranks with one process on both versions of megatron-core
# (about an hour on two cores) and writes docs/layouts.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lint() {
    ruff check . && ruff format --check . && hadolint Dockerfile && shellcheck --external-sources --source-path SCRIPTDIR \
        .ci/run {requirements,tests,tests/gpu,tests/slurm,examples,examples/slurm}/*.sh examples/slurm/*.sbatch
}
types() { mypy; }
# Two files at a time: a test that waits for processes leaves a core to the other. More would crowd out tests that start
# several processes and have a time-out; "-- -n 0" runs one at a time.
TWO=(-n 2 --dist loadfile --no-loadscope-reorder)
unit() { python -m pytest "${TWO[@]}" tests "$@"; }
mcore() {
    local side="$PWD/.venv/mcore-newest"
    echo "megatron-core $(PYTHONPATH=$side python -W ignore -c 'import megatron.core as core; print(core.__version__, core.__path__[0])')"
    PYTHONPATH="$side" python -m pytest "${TWO[@]}" tests/megatron "$@"
}
slurm() { bash tests/slurm/run.sh; }
matrix() {
    python -m tests.megatron.layouts --write docs/layouts.md
    PYTHONPATH="$PWD/.venv/mcore-newest" python -m tests.megatron.layouts --write docs/layouts.md
}
mcore312() {
    local python why=''
    if ! python=$(find_python 3.12 2>/dev/null); then
        why="no Python 3.12 at \$PYTHON, on PATH or with pyenv"
    elif [ -z "$named" ] && [ ! -e .venv-mcore312/setup-done ] && ! has_cpu_torch "$python"; then
        why="pip finds only a CUDA build of torch (4 GB) for Python 3.12; bash tests/run.sh mcore312 takes it"
    fi
    if [ -n "$why" ]; then
        echo "== SKIPPED, no test ran on megatron-core 0.17 or later: $why" | tee -a "$SKIPPED"
        return
    fi
    bash requirements/setup_mcore312.sh && .venv-mcore312/bin/python -m pytest "${TWO[@]}" tests/megatron "$@"
}
has_cpu_torch() { # PYTHON
    "$1" -m pip --disable-pip-version-check --no-input --quiet install --dry-run --no-deps --break-system-packages \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        "torch==$(sed -n 's/^torch==//p' requirements/mcore312.lock)+cpu" 2>/dev/null
}
verl() { bash requirements/setup_verl.sh && .venv-verl/bin/python -m pytest tests/verl \
    tests/megatron/test_linear_logprobs.py::test_ours_is_what_liger_computes "$@"; }

stages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        lint | types | unit | mcore | mcore312 | verl | slurm | matrix) stages+=("$1") ;;
        *) echo "error: unknown stage '$1'; there are: lint types unit mcore mcore312 verl slurm matrix" >&2; exit 2 ;;
    esac
    shift
done
[ $# -eq 0 ] || shift
named=${stages[*]} # on the command line
[ ${#stages[@]} -gt 0 ] || stages=(lint types unit mcore mcore312 verl slurm)
case "${stages[*]}" in verl | mcore312) ;; *) bash requirements/setup.sh test ;; esac
source requirements/env.sh
source requirements/python.sh
SKIPPED=$(mktemp) # a line for each stage that could not run here
export SKIPPED
trap 'rm -f "$SKIPPED"' EXIT

for stage in "${stages[@]}"; do
    begun=$SECONDS
    echo "== $stage"
    case "$stage" in unit | mcore | mcore312 | verl) arguments=("$@") ;; *) arguments=() ;; esac
    "$stage" "${arguments[@]}" || { echo "== $stage failed after $((SECONDS - begun)) s"; exit 1; }
    echo "== $stage passed in $((SECONDS - begun)) s"
done
cat "$SKIPPED"
echo "== all passed in $SECONDS s, set-up included$([ ! -s "$SKIPPED" ] || echo "; not run: see above")"
