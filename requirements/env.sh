# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh after setup.sh: the environment of a run.
PATH="$PWD/.venv/bin:$PATH"
export PATH
unset PYTHONPATH PYTHONHOME # another environment's packages would come before the pinned ones
export PYTHONNOUSERSITE=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 # nothing is fetched from a model hub
export TOKENIZERS_PARALLELISM=false            # it warns at every fork otherwise
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # a process a core: more threads than cores slow every rank
