#!/usr/bin/env bash
# Sets everything up and runs the tests.
#   bash tests/run.sh                    every stage, in order; stops at the first that fails
#   bash tests/run.sh lint types         only these stages: lint, types, unit, mcore, matrix
#   bash tests/run.sh unit -- -k gates   what follows -- goes to pytest
# unit is all of tests/ on the main environment; mcore is the objective and the Megatron seam again, on the newest
# megatron-core. matrix, which runs only where it is named, compares every layout of up to 8 ranks with one process on both
# (about 40 minutes on two cores) and writes docs/layouts.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lint() { ruff check . && ruff format --check .; }
types() { mypy; }
unit() { python -m pytest tests "$@"; }
mcore() {
    local side="$PWD/.venv/mcore-newest"
    echo "megatron-core $(PYTHONPATH=$side python -W ignore -c 'import megatron.core as core; print(core.__version__, core.__path__[0])')"
    PYTHONPATH="$side" python -m pytest tests/objective tests/megatron "$@"
}
matrix() {
    python -m tests.megatron.layouts --write docs/layouts.md
    PYTHONPATH="$PWD/.venv/mcore-newest" python -m tests.megatron.layouts --write docs/layouts.md
}

stages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        lint | types | unit | mcore | matrix) stages+=("$1") ;;
        *) echo "error: unknown stage '$1'; there are: lint types unit mcore matrix" >&2; exit 2 ;;
    esac
    shift
done
[ $# -eq 0 ] || shift
[ ${#stages[@]} -gt 0 ] || stages=(lint types unit mcore)
bash requirements/setup.sh test
source requirements/env.sh

for stage in "${stages[@]}"; do
    begun=$SECONDS
    echo "== $stage"
    case "$stage" in unit | mcore) arguments=("$@") ;; *) arguments=() ;; esac
    "$stage" "${arguments[@]}" || { echo "== $stage failed after $((SECONDS - begun)) s"; exit 1; }
    echo "== $stage passed in $((SECONDS - begun)) s"
done
echo "== all passed in $SECONDS s, set-up included"
