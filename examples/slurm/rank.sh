#!/usr/bin/env bash
# What one SLURM task runs: a rank (LAUNCHER=srun), or torchrun for the ranks of a node (LAUNCHER=torchrun).
#   srun ... bash rank.sh SCRIPT [ARGUMENTS...]
# Reads PYTHON, LAUNCHER, RANKS_PER_NODE, MASTER_ADDR, MASTER_PORT, which the sbatch scripts set, and SLURM's variables
# of the step. Sources nothing. Its exit status is the script's; 75 says that the run can go on. Ranks that end with an
# error say so in a line, in which the sbatch script finds the first: srun's own status is that of the worst.
set -uo pipefail
resumable=75
exec {nothing}<> <(:) # a pipe that nobody writes to: to read from it with a time-out is to sleep, and signals end that

# Until the training script has a handler of its own, a warning must not end it: the sbatch script repeats the warning.
# What is ignored here stays ignored in the processes that are started here.
trap '' USR1

# SLURM signals every process of a step or, with proctrack/cgroup, this one alone, which passes on what it gets.
child='' pending='' pids=/dev/null
# shellcheck disable=SC2329 # by the traps
pass_on() { # SIGNAL
    interrupted=1
    if [ -s "$pids" ]; then
        xargs kill -s "$1" <"$pids" 2>/dev/null
    elif [ -z "$child" ]; then
        pending=$1
    elif [ "$1" != USR1 ] || [ "$pids" = /dev/null ]; then # torchrun has no ranks yet: a USR1 would end it
        kill -s "$1" "$child" 2>/dev/null
    fi
}

# run COMMAND...: sets `status`, the command's own.
run() {
    local result
    trap 'pass_on TERM' TERM
    "$@" {nothing}<&- &
    child=$!
    trap 'pass_on USR1' USR1 # after the start: now the child ignores it
    [ -z "$pending" ] || kill -s "$pending" "$child"
    # Not in `wait`: bash loses the status of a child that ends while a signal to this shell ends `wait`.
    while kill -0 "$child" 2>/dev/null; do read -rt 0.5 <&"$nothing"; done
    status=127
    while
        interrupted=0
        wait "$child"
        result=$?
        [ "$result" -eq 127 ] || status=$result # 127: bash has said it already
        [ "$interrupted" = 1 ]                  # by a signal, whose number may be in that result: ask again
    do :; done
}

# report RANK LOCAL_RANK: that a run can go on is said once a node.
report() {
    case "$status" in
        0) ;;
        "$resumable") [ "$2" != 0 ] || echo "rank.sh: rank $1 ended with status $status" ;;
        *) echo "rank.sh: rank $1 ended with status $status" ;;
    esac
}

if [ "${1:-}" = --worker ]; then # a rank under torchrun, which would report every failure as status 1
    # shellcheck disable=SC2016 # for the other shell to expand
    run bash -c 'echo $$ >>"$FIBERPO_PIDS" && exec "$@"' - "$PYTHON" "${@:2}"
    report "$RANK" "$LOCAL_RANK"
    [ "$status" -eq 0 ] || echo "$status" >>"$FIBERPO_STATUSES"
    [ "$status" -ne "$resumable" ] || status=0 # torchrun is not to end the others, which are saving too
    exit "$status"
fi

# What Megatron, NeMo and Lightning read. In a heterogeneous job SLURM names some of these by component; here they are
# those of this step.
export SLURM_NTASKS_PER_NODE=$RANKS_PER_NODE
if [ "${LAUNCHER:-srun}" = torchrun ]; then
    FIBERPO_STATUSES=$(mktemp) FIBERPO_PIDS=$(mktemp) || exit 1
    export FIBERPO_STATUSES FIBERPO_PIDS
    pids=$FIBERPO_PIDS
    # The rendezvous is new after each restart.
    run "$PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --no-python bash "$0" --worker "$@"
    # The first that is an error says why: torchrun then ends the others, by SIGTERM. None is: the run can go on.
    cause=$({ grep -vx "$resumable" "$FIBERPO_STATUSES" || cat "$FIBERPO_STATUSES"; } | head -n 1)
    rm -f "$FIBERPO_STATUSES" "$FIBERPO_PIDS"
    exit "${cause:-$status}"
fi

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$RANKS_PER_NODE
export MASTER_ADDR MASTER_PORT
run "$PYTHON" "$@"
report "$RANK" "$LOCAL_RANK"
exit "$status"
