#!/usr/bin/env bash
# Tests of examples/slurm on a real SLURM: two nodes on this machine, with ports, keys and folders of their own.
#   bash tests/slurm/run.sh                    everything, about 10 minutes on two cores
#   bash tests/slurm/run.sh -k cancelled       what is given goes to pytest
# Installs Debian's slurm-wlm and munge where it is root and they are absent, and PyTriton into .venv/pytriton. Says why
# and passes where no SLURM can be started: not root, no Debian packages, or a SLURM of the system's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# tests/run.sh shows the lines of $SKIPPED again at its end.
skip() { echo "== SKIPPED, no test of tests/slurm was run: $*" | tee -a "${SKIPPED:-/dev/null}"; exit 0; }
missing() {
    local program
    for program in slurmctld slurmd sbatch munged; do
        [ -n "$(PATH="$PATH:/usr/sbin" command -v "$program")" ] || echo "$program"
    done
}

[ "$(id -u)" = 0 ] || skip "slurmd and slurmctld must run as root"
[ ! -e /etc/slurm/slurm.conf ] || skip "/etc/slurm/slurm.conf: this machine belongs to a cluster"
for name in /proc/[0-9]*/comm; do
    case "$(cat "$name" 2>/dev/null)" in slurmd | slurmctld) skip "a SLURM is running on this machine" ;; esac
done
if [ -n "$(missing)" ]; then
    [ -n "$(command -v apt-get)" ] || skip "no apt-get to install slurm-wlm and munge with; absent: $(missing | xargs)"
    log=$(mktemp)
    echo "== apt-get install slurm-wlm munge"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
        >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log"
        skip "apt-get could not install slurm-wlm and munge"
    }
    rm -f "$log"
    [ -z "$(missing)" ] || skip "still absent: $(missing | xargs)"
fi
PATH="$PATH:/usr/sbin"
echo "== $(slurmctld -V), $(munged --version | head -n 1)"

bash requirements/setup.sh test
source requirements/env.sh
export PYTHONWARNINGS=ignore # NeMo's imports warn a lot
folder=$(mktemp -d "${TMPDIR:-/tmp}/fiberpo-slurm.XXXXXX")
# The tests end what they start. This is for tests that are killed themselves.
tear_down() {
    local pid
    while read -r pid; do
        case "$(cat "/proc/$pid/comm" 2>/dev/null)" in slurmd | slurmctld | munged) kill -9 "$pid" ;; esac
    done < <(cat "$folder"/*/pids 2>/dev/null)
    for pid in $(cd /proc && echo [0-9]*); do
        tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qF "SLURM_CONF=$folder/" || continue
        kill -9 "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}
trap tear_down EXIT
trap 'exit 130' INT TERM
python -m tests.slurm "$folder/trial" || skip "a SLURM of two nodes does not start here"

pytriton=.venv/pytriton
pins=$(cksum <tests/slurm/pytriton.lock)
if [ "$(cat $pytriton/pins 2>/dev/null)" != "$pins" ]; then
    echo "== PyTriton"
    rm -rf $pytriton
    python -m venv $pytriton
    $pytriton/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps \
        --only-binary :all: -r tests/slurm/pytriton.lock
    echo "$pins" >$pytriton/pins
fi

# run_tests CLUSTER [ARGUMENTS...]: on a cluster in that folder.
run_tests() {
    FIBERPO_SLURM="$folder/$1" FIBERPO_PYTRITON="$PWD/$pytriton/bin/python" \
        python -m pytest tests/slurm --timeout 1200 "${@:2}"
}
# On a very busy machine SLURM's daemons can miss their own timeouts, and a good test fails. So a failed run is reported
# and then repeated once, in full, on a new cluster.
run_tests cluster --maxfail 3 "$@" && exit 0
echo "== failed; running all of it once more on a new cluster"
run_tests again --maxfail 1 "$@"
