# shellcheck shell=bash
# Sourced by setup_verl.sh and setup_mcore312.sh, in the root of the repository.

# make_venv VENV LOCK PYTHON_VERSION SIZE: an environment of its own with what LOCK pins, the CPU build of torch where
# pip finds one, and this package (editable). Returns at once where it was finished with the same pins. SIZE is for the
# reader. PYTHON and TORCH_INDEX_URL are read as by setup.sh.
make_venv() {
    local venv=$1 lock=$2 version=$3 size=$4 key python torch index
    unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
    key=$({ cat requirements/bootstrap.lock "$lock" requirements/venv.sh pyproject.toml; echo "$PWD"; } | cksum)
    if [ "$(cat "$venv/setup-done" 2>/dev/null)" = "$key" ] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    python=$(find_python "$version")
    if [ -e "$venv" ] && [ ! -e "$venv/setup-begun" ]; then
        echo "error: $PWD/$venv exists and was not made by this script. Move it away and run this again." >&2
        exit 1
    fi
    echo "[setup] $PWD/$venv: $size"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$venv/setup-begun"
    "$python" -m venv "$venv"
    install() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet install --no-compile "$@"; }
    install --upgrade -r requirements/bootstrap.lock
    # The CPU build where pip is configured to find it, or at TORCH_INDEX_URL; else the one that PyPI has.
    torch=torch==$(sed -n 's/^torch==//p' "$lock")
    index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"})
    install --no-deps "$torch+cpu" "${index[@]}" 2>/dev/null || install "$torch"
    install --no-deps --no-build-isolation -r <(grep -v '^torch==' "$lock")
    install --no-deps --no-build-isolation -e .
    "$venv/bin/python" requirements/check.py "$lock"
    echo "$key" >"$venv/setup-done"
}
