# shellcheck shell=bash
# Sourced by setup.sh and relock.sh.

# Prints the Python 3.11 to use: $PYTHON, else python3.11, else a python3 that is 3.11.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        # A version manager's shim can be on PATH with no Python behind it: only an answer counts.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 is needed (megatron-core 0.11.0 and NeMo 2.2.1 are pinned for it)." >&2
    echo "       python3 here is: $(python3 --version 2>&1 || true)" >&2
    echo "       Install python3.11, or name one: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}
