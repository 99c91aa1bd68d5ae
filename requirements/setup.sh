#!/usr/bin/env bash
# Sets up .venv with every dependency pinned, and this package in it (editable).
#   bash requirements/setup.sh          what a run needs
#   bash requirements/setup.sh test     that, the test tools, and megatron-core's newest version in a side folder
# A second call finds the stamp of a finished set-up and returns at once. A set-up that was interrupted, or whose pins
# changed, is made again from nothing.
#
# Needs Python 3.11 with its headers, pip's venv and a C compiler. Reads:
#   PYTHON           the Python 3.11 to use
#   TORCH_INDEX_URL  where pip finds the CPU build of torch, if the index it is set up with has only the CUDA build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
source requirements/python.sh

goal=${1:-run}
venv=.venv
case "$goal" in run | test) ;; *) echo "error: setup.sh takes 'run' or 'test', not '$goal'" >&2; exit 2 ;; esac

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
fail() { printf 'error: %s\n' "$@" >&2; exit 1; }

# The key of a finished set-up: what was installed, by what, and where (a venv cannot be moved).
key_of() { { cat "$@"; echo "$PWD"; } | cksum; }
run_pins=(requirements/bootstrap.lock requirements/cpu.lock requirements/setup.sh)
test_pins=("${run_pins[@]}" requirements/test.lock requirements/mcore-newest.lock)
run_key=$(key_of "${run_pins[@]}")
test_key=$(key_of "${test_pins[@]}")
package_key=$(key_of pyproject.toml)
is_done() { [ "$(cat "$venv/setup-$1" 2>/dev/null)" = "$2" ] && "$venv/bin/python" -c '' 2>/dev/null; }
finished() { is_done run "$run_key" && is_done package "$package_key" && { [ "$goal" = run ] || is_done test "$test_key"; }; }

finished && exit 0
if command -v flock >/dev/null; then # two commands started together: the second waits, then finds the work done
    exec 9>.venv.lock
    flock 9
    finished && exit 0
fi

# Runs a command of the venv's Python with a line of progress every 20 s; shows its output only if it fails.
quiet() {
    local what=$1 log="$venv/setup.log" pid ticks=0
    shift
    "$venv/bin/python" "$@" >"$log" 2>&1 9>&- &
    pid=$!
    trap 'kill "$pid" 2>/dev/null' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        ticks=$((ticks + 1))
        [ $((ticks % 40)) -ne 0 ] ||
            say "  ... $what: $(du -sm "$venv" | cut -f1) MB in $venv"
    done
    trap - EXIT
    wait "$pid" || { cat "$log" >&2; fail "$what failed; the output is above"; }
}
# Not compiled: the first import compiles the modules that are used, compiling all of them takes a minute more.
pip_install() { quiet "$1" -m pip --disable-pip-version-check --no-input install --no-compile "${@:2}"; }

preflight() {
    local python
    python=$(find_python)
    if [ -e "$venv" ] && [ ! -e "$venv/setup-begun" ]; then
        fail "$PWD/$venv exists and was not made by this script. Move it away and run this again."
    fi
    command -v cc >/dev/null || command -v gcc >/dev/null ||
        fail "no C compiler: reasoning-gym's pycosat is built from source. Install gcc."
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "$python has no headers (Python.h), which pycosat needs. Install python3.11-dev."
    rm -rf "$venv"
    mkdir "$venv"
    touch "$venv/setup-begun"
    "$python" -m venv "$venv" || fail "$python cannot make a venv. Install python3.11-venv."
}

install_torch() {
    local index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}) version available
    version=$(sed -n 's/^torch==//p' requirements/cpu.lock)
    available=$("$venv/bin/python" -m pip --disable-pip-version-check index versions torch "${index[@]}" 2>/dev/null || true)
    if [ "$(uname)" = Darwin ] || grep -qwF "$version+cpu" <<<"$available"; then
        pip_install torch --no-deps -c requirements/cpu.lock torch "${index[@]}"
    elif [ -n "${TORCH_INDEX_URL:-}" ]; then
        fail "TORCH_INDEX_URL=$TORCH_INDEX_URL has no torch $version+cpu. It has: ${available:-nothing}"
    else
        say "  pip's index has torch $version only as a CUDA build: about 3 GB to download, 7 GB on disk. It works without"
        say "  a GPU. For the CPU build (200 MB) stop this with Ctrl-C and set TORCH_INDEX_URL to PyTorch's CPU wheel index:"
        say "  the --index-url that PyTorch's 'Get started' page shows for pip and CPU."
        pip_install torch -c requirements/cpu.lock torch
    fi
}

if ! is_done run "$run_key"; then
    say "setting up $PWD/$venv: about 2 minutes, 550 MB to download, 1.8 GB on disk"
    preflight
    pip_install "pip" --upgrade -r requirements/bootstrap.lock
    say "torch"
    install_torch
    say "$(grep -vc '^#' requirements/cpu.lock) packages of requirements/cpu.lock"
    pip_install "packages" --no-deps --no-build-isolation -r requirements/cpu.lock
    say "checking versions and imports"
    quiet "requirements/check.py" requirements/check.py requirements/cpu.lock
    echo "$run_key" >"$venv/setup-run"
fi

if ! is_done package "$package_key"; then
    say "nemo_fiberpo"
    pip_install "nemo_fiberpo" --no-deps --no-build-isolation -e .
    echo "$package_key" >"$venv/setup-package"
fi

if [ "$goal" = test ] && ! is_done test "$test_key"; then
    say "test tools and the newest megatron-core: about half a minute"
    side="$venv/mcore-newest"
    rm -rf "$side" "$side.partial" "$venv/setup-test"
    pip_install "test tools" --no-deps --no-build-isolation -r requirements/test.lock
    pip_install "megatron-core" --no-deps --target "$side.partial" -r requirements/mcore-newest.lock
    mv "$side.partial" "$side"
    quiet "requirements/check.py" requirements/check.py requirements/test.lock
    PYTHONPATH="$side" quiet "requirements/check.py" requirements/check.py requirements/mcore-newest.lock
    echo "$test_key" >"$venv/setup-test"
fi
say "done"
