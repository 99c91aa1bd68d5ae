# shellcheck shell=bash
# Sourced by the sbatch scripts beside it: starts the ranks, passes warnings on, and decides what becomes of the job.
#
# What ended the ranks first                        what becomes of the job
#   nothing: all ended with 0                       COMPLETED; what is left of a job array is cancelled
#   75: a checkpoint is saved, go on                requeued; in a job array, left to the next array task
#   anything else, and a node is lost               requeued: SLURM may take minutes to notice it, the ranks do not
#   the end of the reward server                    FAILED, and not started again
#   a rank that got SIGKILL or SIGTERM              requeued, $MAX_KILLED times
#   anything else                                   FAILED with that status, and not started again
#   scancel, or the time limit itself               ends as SLURM says, and not started again
resumable=75
ended_by_usr1=$((128 + $(kill -l USR1))) # a warning that came before a rank ignored it, or while it was leaving
ended_by_kill=$((128 + $(kill -l KILL)))
ended_by_term=$((128 + $(kill -l TERM)))
restarts=${SLURM_RESTART_COUNT:-0}
leader=${SLURM_HET_JOB_ID:-$SLURM_JOB_ID}
warned=0
warned_after=
interrupted=0
ended=0
ranks_pid=
warner=
watcher=
served_by=
server_ended=0
output=/proc/$$/fd/1                                           # the job's, if that is a file
output_before=$(stat --dereference --format=%s "$output" 2>/dev/null) # of earlier starts

# With this the ranks sign what the first one tells the others before training, see docs/cluster.md.
FIBERPO_JOB_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export FIBERPO_JOB_SECRET

exec {nothing}<> <(:) # a pipe that nobody writes to: to read from it with a time-out is to sleep, and signals end that

say() { echo "[$(date +%FT%T) job $leader restart $restarts] $*"; }

# NodeAddr is the address that SLURM itself uses for the node; for most sites that is its host name.
address_of() { # NODELIST: of its first node
    scontrol show node --oneliner "$(scontrol show hostnames "$1" | head -n 1)" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# field_of_job NAME: what scontrol says of this job. It may show others beside it: an array's, a heterogeneous job's.
field_of_job() {
    scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n "s/^JobId=$SLURM_JOB_ID .* $1=\([^ ]*\).*/\1/p"
}

# is_running STATE: whether a job in that state runs. SLURM shows some flags in place of RUNNING, such as STOPPED after
# `scancel --signal=STOP`.
is_running() {
    case "$1" in RUNNING | STOPPED | SIGNALING | SUSPENDED | RESIZING | CONFIGURING) ;; *) return 1 ;; esac
}

# USR1 comes to this shell (--signal=B:USR1@SECONDS, or `scancel --signal=USR1 --batch JOB`). srun passes USR1 on to its
# step; repeated, because a rank that is still starting ignores it.
warn_ranks() {
    interrupted=1
    [ "$warned" = 0 ] || return 0
    warned=1
    warned_after=$SECONDS
    say "warned $SECONDS s after the start: the ranks are asked to save and to stop"
    [ -z "$ranks_pid" ] || keep_warning
}
keep_warning() {
    (while kill -USR1 "$ranks_pid" 2>/dev/null; do sleep 10; done) &
    warner=$!
}
# TERM comes to this shell and to srun from scancel and at the time limit, KillWait seconds before KILL. SLURM has written
# the job's end down by then. Where it has not, TERM is a warning like USR1.
stop_waiting() {
    interrupted=1
    if is_running "$(field_of_job JobState)"; then warn_ranks; else ended=1; fi
}
trap warn_ranks USR1
trap stop_waiting TERM

case "$LAUNCHER" in srun | torchrun) ;; *) say "error: LAUNCHER: '$LAUNCHER' is not srun or torchrun" && exit 2 ;; esac

# A step that is ended while one of its nodes does not answer: SLURM tries again, for a minute and more, to kill it there,
# and names it by its number alone. The job's next start would lose its ranks to that. So its steps have other numbers:
# a start has two steps in each component, 0 and 1 in the first start, 2 and 3 in the second, and so on in turn.
if [ $((restarts % 2)) = 1 ]; then
    for ((component = 0; component < ${SLURM_HET_SIZE:-1}; component++)); do
        options=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
        [ -z "${SLURM_HET_SIZE:-}" ] || options+=("--het-group=$component")
        timeout "$PROBE_SECONDS" srun "${options[@]}" true &>/dev/null
        timeout "$PROBE_SECONDS" srun "${options[@]}" true &>/dev/null
    done
fi

# ranks_options NODES: options of the ranks' srun, one a line. All numbers are said: srun would take those that are not
# from the job. A rank that dies does not take the others with it at once (their own error message, or their status 75,
# is worth waiting for), but it does after $STRAGGLER_SECONDS.
ranks_options() {
    local tasks=$RANKS_PER_NODE
    [ "$LAUNCHER" = srun ] || tasks=1 # a torchrun
    printf '%s\n' --nodes="$1" --ntasks="$(($1 * tasks))" --ntasks-per-node="$tasks" --cpu-bind="$CPU_BIND" \
        --kill-on-bad-exit=0 --wait="$STRAGGLER_SECONDS" --label
    container_options
}
container_options() { # pyxis
    [ -z "$CONTAINER_IMAGE" ] || printf '%s\n' --container-image="$CONTAINER_IMAGE" \
        --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$REPO"
}

# start_ranks COMMAND...: in the background, so that this shell can take signals meanwhile.
start_ranks() {
    if [ "$restarts" -gt "$MAX_RESTARTS" ]; then # SLURM requeued it
        say "error: MAX_RESTARTS=$MAX_RESTARTS is reached: not started again"
        exit 1
    fi
    "$@" &
    ranks_pid=$!
    [ "$warned" = 0 ] || [ -n "$warner" ] || keep_warning # warned before there was anybody to pass it on to
}

# end_with PID NAME: once that process of this shell ends, the ranks are ended: they would wait for it for ever.
end_with() {
    (
        tail --pid="$1" --follow /dev/null
        say "$2 has ended: the ranks are ended"
        kill -TERM "$ranks_pid"
    ) &
    watcher=$!
    served_by=$1
}

# wait_for_ranks: sets `status`, that of the ranks' srun: the highest of its tasks'.
wait_for_ranks() {
    local result helper
    # Not in `wait`: bash loses the status of a child that ends while a signal to this shell ends `wait`.
    while kill -0 "$ranks_pid" 2>/dev/null; do read -rt 0.5 <&"$nothing"; done
    status=127
    while
        interrupted=0
        wait "$ranks_pid"
        result=$?
        [ "$result" -eq 127 ] || status=$result # 127: bash has said it already
        [ "$interrupted" = 1 ]                  # by a signal, whose number may be in that result: ask again
    do :; done
    for helper in $warner $watcher; do kill "$helper" 2>/dev/null; done
    if [ -n "$served_by" ]; then
        kill -TERM "$served_by" 2>/dev/null || server_ended=1
        wait "$served_by"
    fi
}

# probe NODES [SRUN_OPTIONS...]: whether so many nodes of the job still start a task. srun asks the nodes themselves;
# slurmctld may not know yet.
probe() {
    timeout "$PROBE_SECONDS" srun --overlap --nodes="$1" --ntasks="$1" --ntasks-per-node=1 "${@:2}" true >/dev/null 2>&1
}

# first_cause: the status of the first event that ended the ranks of this start, by what rank.sh and srun wrote into the
# job's output; nothing where there is none to find. srun's own status does not say it: after $STRAGGLER_SECONDS srun
# kills those that still wait for a rank that failed, and a signal counts for more than any status.
first_cause() {
    [ -f "$output" ] || return 0
    tail -c +$((${output_before:-0} + 1)) "$output" | awk -v resumable="$resumable" -v killed="$ended_by_kill" '
        /rank\.sh: rank [0-9]+ ended with status [0-9]+$/ { if ($NF == resumable) saved = 1; else { print $NF; exit } }
        /^srun: error: .*: tasks? [][0-9,-]+: Killed/ { print killed; exit }
        /^srun: First task exited/ { print saved ? resumable : "straggler"; exit }'
}

# may_be_killed_again: whether fewer than $MAX_KILLED starts of this job ended by such a signal. Each leaves a line in the
# job's output. Nobody here sends SIGKILL: the kernel does for want of memory, SLURM does, and so does an administrator.
# What is transient is worth another start; what is not, such as memory that never suffices, comes again.
may_be_killed_again() {
    [ -f "$output" ] && [ "$(grep -c "job $leader restart [0-9]*\] a rank was killed" "$output")" -lt "$MAX_KILLED" ]
}

# warned_at_once: whether the warnings came within 45 s of the first and of the second start: SLURM looks at time limits
# every 30 s. Where --time leaves no time before the warning, no start gets further.
warned_at_once() {
    local first
    [ "$restarts" -eq 1 ] && [ "${warned_after:-60}" -lt 45 ] && [ -f "$output" ] || return 1
    first=$(sed -n "s/.*job $leader restart 0\] warned \([0-9]*\) s after.*/\1/p" "$output" | head -n 1)
    [ "${first:-60}" -lt 45 ]
}

# ended_from_outside: whether SLURM has ended the job. TERM says so, but on a busy node the ranks may end before it comes
# here. Without asking for the state, a cancelled job would then be requeued.
ended_from_outside() {
    local state
    [ "$ended" = 0 ] || return 0
    state=$(field_of_job JobState) # empty where slurmctld does not answer
    [ -n "$state" ] && ! is_running "$state"
}

# finish_job: acts on `status`, see the table above. The script that sources this defines `nodes_answer`, by `probe`.
finish_job() {
    local why cause
    [ "$status" -eq 0 ] || cause=$(first_cause)
    case "${cause:=$status}" in
        straggler) why="a rank was still running $STRAGGLER_SECONDS s after the first one's end, and was ended" ;;
        *) status=$cause why="the ranks ended with status $status" ;;
    esac
    if ended_from_outside; then
        say "ended from outside (scancel, the time limit, a lost node); $why"
        exit 143
    elif [ "$status" -eq 0 ]; then
        say "done"
        [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
        exit 0
    elif [ "$status" -eq "$resumable" ] || { [ "$warned" = 1 ] && [ "$status" -eq "$ended_by_usr1" ]; }; then
        why="the run can go on"
        if warned_at_once; then
            say "error: warned $warned_after s after the start: --time must be longer than the seconds of --signal"
            exit "$status"
        fi
        leave_to_the_next "$why"
    elif ! nodes_answer; then
        why+=" and a node does not answer"
    elif [ "$server_ended" = 0 ] && [[ $cause =~ ^($ended_by_kill|$ended_by_term)$ ]] && may_be_killed_again; then
        why+=": a rank was killed"
        say "a rank was killed"
    else
        [ "$server_ended" = 0 ] || why+=" after the reward server's end"
        say "error: $why; not started again"
        [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
        exit "$status"
    fi
    ! ended_from_outside || exit 143 # while the nodes were asked
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        say "error: $why, but MAX_RESTARTS=$MAX_RESTARTS is reached: not started again"
        exit "$status"
    fi
    say "$why: requeued"
    scontrol requeue "$SLURM_JOB_ID" || exit "$status"
    sleep infinity & # SLURM ends this shell
    wait
}

# In a job array the next task goes on, if this is not the last one.
leave_to_the_next() {
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || return 0
    if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MAX" ]; then
        say "$1, and no array task is left"
        exit "$resumable"
    fi
    say "$1: the next array task goes on"
    exit 0
}
