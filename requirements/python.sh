# shellcheck shell=bash
# Sourced by setup.sh, relock.sh, venv.sh and tests/run.sh.

# find_python [VERSION]: prints the Python of that version to use, 3.11 unless given: $PYTHON, else pythonVERSION, else a
# python3 that is it, else one of pyenv's.
find_python() {
    local version=${1:-3.11} candidate why=
    for candidate in ${PYTHON:+"$PYTHON"} "python$version" python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
        # A version manager's shim can be on PATH with no Python behind it: only an answer counts.
        if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
            command -v "$candidate"
            return
        fi
    done
    [ "$version" != 3.11 ] || why=" (megatron-core 0.11.0 and NeMo 2.2.1 are pinned for it)"
    echo "error: Python $version is needed$why." >&2
    echo "       python3 here is: $(python3 --version 2>&1 || true)" >&2
    echo "       Install python$version, or name one: PYTHON=/path/to/python$version bash $0" >&2
    return 1
}
