#!/usr/bin/env bash
# In place of PYTHON: a rank that ends as ENDS says for its start, "START/START/..." with an entry per rank in each. The
# tasks of an array count as starts. An entry is
# a status, a signal that it sends itself, wait: for SIGTERM or SIGUSR1, to end with 75 as a training script does, or
# start: which SIGTERM ends at once, as it does a training script that has no handler yet.
# Under torchrun also then:STATUS: that status, once another rank of the node has ended with one that is not 0.
#   ENDS="KILL 0/0 0"     rank 0 of the first start gets SIGKILL, everything else is well
set -euo pipefail
if [ "$1" = -m ]; then exec "$REAL_PYTHON" "$@"; fi # torchrun itself

IFS=/ read -ra starts <<<"$ENDS"
start=$((${SLURM_RESTART_COUNT:-0} + ${SLURM_ARRAY_TASK_ID:-1} - 1))
read -ra ranks <<<"${starts[$start]}"
end=${ranks[$RANK]}
echo "rank $RANK ends with $end in start $start"
case "$end" in
    then:*)
        until [ -s "$FIBERPO_STATUSES" ]; do sleep 0.05; done # rank.sh's own list
        exit "${end#then:}"
        ;;
    wait) # not in bash, which cannot catch a signal that it was started to ignore
        exec "${REAL_PYTHON:-python3}" -c '
import os, signal, sys
signals = {signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
os.write(1, b"waits\n") # in one write: ranks share a file, and an unbuffered print writes the end of the line by itself
sys.exit(75 if signal.sigwait(signals) else 1)'
        ;;
    start)
        echo waits
        exec sleep 600
        ;;
    [0-9]*) exit "$end" ;;
    *) kill -s "$end" $$ ;;
esac
