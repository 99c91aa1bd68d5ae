#!/usr/bin/env bash
# Makes cpu.lock and test.lock again from cpu.in, nodeps.in and test.in: pip resolves them in a throw-away environment.
#   bash requirements/relock.sh              keeps the versions that the locks name and adds what is missing
#   bash requirements/relock.sh --upgrade    takes the newest versions that the .in files allow
set -euo pipefail
cd "$(dirname "$0")"
source ./python.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

known="$work/known"
touch "$known"
[ "${1:-}" = "--upgrade" ] || cat cpu.lock test.lock 2>/dev/null | grep -v "^megatron-core" >"$known" || true

"$(find_python)" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# torch's version is pinned with no local part, so that one lock serves the CPU build and every other.
freeze() { pip freeze | sed -E 's/^(torch==[^+]*)\+.*/\1/'; }

pip install --quiet -r bootstrap.lock
pip install --no-build-isolation -c "$known" -r cpu.in ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"}
freeze >"$work/resolved"
pip install --no-deps -r nodeps.in
freeze >"$work/cpu"
pip install -c "$known" -c "$work/resolved" -r test.in
freeze >"$work/test"

head="Made by requirements/relock.sh; edit"
{ echo "# $head cpu.in or nodeps.in instead. Install with --no-deps."; cat "$work/cpu"; } >cpu.lock
{ echo "# $head test.in instead. Install with --no-deps, after cpu.lock."; grep -vxFf "$work/cpu" "$work/test"; } >test.lock
wc -l cpu.lock test.lock
