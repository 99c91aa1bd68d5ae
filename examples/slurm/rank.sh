#!/usr/bin/env bash
# What one SLURM task runs: a rank (LAUNCHER=srun), or torchrun for the ranks of a node (LAUNCHER=torchrun).
#   srun ... bash rank.sh SCRIPT [ARGUMENTS...]
# Reads PYTHON, LAUNCHER, RANKS_PER_NODE, MASTER_ADDR, MASTER_PORT, which the sbatch scripts set, and SLURM's variables
# of the step. Sources nothing. Its exit status is the script's; 75 says that the run can go on.
set -euo pipefail
resumable=75

# Until the training script has a handler of its own, a warning must not end it: the sbatch script repeats the warning.
# SLURM signals every process of the step; what is ignored here stays ignored in the processes that are started here.
trap '' USR1

if [ "${1:-}" = --worker ]; then # a rank under torchrun, which would report every failure as status 1
    shift
    "$PYTHON" "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a SIGTERM interrupted the wait
        status=0
        wait "$child" || status=$?
    done
    [ "$status" -eq 0 ] || echo "$status" >>"$FIBERPO_STATUSES"
    [ "$status" -ne "$resumable" ] || status=0 # torchrun is not to end the others, which are saving too
    exit "$status"
fi

# What Megatron, NeMo and Lightning read. In a heterogeneous job SLURM names some of these by component; here they are
# those of this step.
export SLURM_NTASKS_PER_NODE=$RANKS_PER_NODE
if [ "${LAUNCHER:-srun}" = torchrun ]; then
    FIBERPO_STATUSES=$(mktemp)
    export FIBERPO_STATUSES
    # The rendezvous is new after each restart. exec is not used: the ranks' statuses are read afterwards.
    status=0
    "$PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --no-python bash "$0" --worker "$@" || status=$?
    # The first that is an error says why: torchrun then ends the others, by SIGTERM. None is: the run can go on.
    cause=$({ grep -vx "$resumable" "$FIBERPO_STATUSES" || cat "$FIBERPO_STATUSES"; } | head -n 1)
    rm -f "$FIBERPO_STATUSES"
    exit "${cause:-$status}"
fi

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$RANKS_PER_NODE
export MASTER_ADDR MASTER_PORT
exec "$PYTHON" "$@"
