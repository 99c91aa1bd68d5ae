#!/usr/bin/env bash
# Checks this package on one GPU, in at most 8 minutes, where there is torch with Triton but neither a network nor .venv.
#   bash tests/gpu/run.sh --wheels DIR [--out DIR]     with the wheels of DIR
#   bash tests/gpu/run.sh [--out DIR]                  with what the Python has, such as that of NVIDIA's NeMo container
#   bash tests/gpu/run.sh --download DIR               fetches those wheels, on a machine with a network
# Leaves report.md and report.json in --out (default: a new folder, which it prints). Without a GPU it runs on the CPU,
# without a promise about its time.
# What a machine lacks is left out with a reason; the exit status is 0 where every check passed.
# Reads PYTHON: the Python to use, which must have torch (to download: of the same version as that one). Installs nothing
# into it, needs no root, and writes to the --out folder alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
wheels='' out='' download=''
fail() { printf 'error: %s\n' "$@" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in --wheels | --out | --download) [ $# -gt 1 ] || fail "$1 needs a folder" ;; esac
    case "$1" in
        --wheels) wheels=$(realpath "$2") ;;
        --out) out=$(realpath -m "$2") ;;
        --download) download=$(realpath -m "$2") ;;
        *) fail "unknown argument '$1'; there are --wheels, --out and --download" ;;
    esac
    shift 2
done
# Everything that is imported beyond the standard library, torch and numpy.
packages=(omegaconf antlr4-python3-runtime PyYAML megatron-core packaging pytest pytest-timeout iniconfig pluggy Pygments)
quiet_pip=("$python" -m pip --disable-pip-version-check --no-input --quiet)
if [ -n "$download" ]; then
    names=$(IFS='|' && echo "${packages[*]}")
    pins=$(grep -hiE "^($names)==" requirements/cpu.lock requirements/test.lock requirements/mcore-newest.lock |
        grep -v '^megatron-core==0\.11\.')
    echo "$pins"
    mapfile -t pins <<<"$pins"
    [ ${#pins[@]} -eq ${#packages[@]} ] || fail "the locks pin ${#pins[@]} of ${#packages[@]} packages"
    "${quiet_pip[@]}" wheel --no-deps --wheel-dir "$download" "${pins[@]}"
    exit
fi

out=${out:-$(mktemp -d -t fiberpo-gpu-XXXX)}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$scratch/site:$PWD"
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset NEMO_FIBERPO_COMPILE

slow=$("$python" -c 'import torch; print(1 if torch.cuda.is_available() else 5)') || fail "$python has no torch; set PYTHON"

# Runs one stage with its output in a log, and prints a line about it: name, limit in seconds (on a GPU), command.
stages='' failed=0
stage() {
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    timeout --signal=INT --kill-after=10 $((limit * slow)) "$@" >"$out/$name.log" 2>&1 || status=$?
    stages+="$name $status $((SECONDS - begun)) "
    echo "== $name: $([ $status -eq 0 ] && echo passed || echo "failed ($status), see $out/$name.log") in $((SECONDS - begun)) s"
    [ $status -eq 0 ] || failed=1
}
if [ -n "$wheels" ]; then
    # No other folder of wheels that pip may be configured with.
    stage install 40 env -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null "${quiet_pip[@]}" install --no-index --no-deps --no-compile --find-links "$wheels" \
        --target "$scratch/site" "${packages[@]}"
    [ $failed -eq 0 ] || { cat "$out/install.log" >&2; exit 1; }
fi
stage checks 220 "$python" -m pytest tests/gpu -q -rs -p no:cacheprovider -o timeout=200 --junitxml "$out/junit.xml"
stage measure 75 "$python" -m tests.gpu.measure --out "$out/measure.json"
sizes=(--tokens 8192 --hidden 4096 --repeats 5)
[ "$slow" -eq 1 ] || sizes=(--tokens 64 --hidden 64 --vocab 16384 --repeats 3)
stage logprobs 20 "$python" -m benchmarks.logprobs --no-aligner "${sizes[@]}" --out "$out/logprobs.json"
sizes=()
[ "$slow" -eq 1 ] || sizes=(--layers 1 --hidden 64 --experts 2 --vocab 128 --length 16 --samples 1 --repeats 1)
stage step 120 "$python" -W ignore -m benchmarks.step --model dense moe --recompute both "${sizes[@]}" --out "$out/step.json"
"$python" -m tests.gpu.report "$out" --stages "$stages" || failed=1
cat "$out/report.md"
echo "== $([ $failed -eq 0 ] && echo passed || echo failed) in $SECONDS s; $out/report.md, $out/report.json"
exit $failed
