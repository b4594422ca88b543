#!/usr/bin/env bash
# From a fresh clone to tested: sets up .venv, then runs every test that this machine can run. Further words go to
# pytest: -m 'not slow', -k NAME, a file, -n 0 (one process). Fails where no test ran.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup test
# One process per core, so one torch thread each; tests of one file share its fixtures, so they share a process.
export OMP_NUM_THREADS=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
"$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@" | tee "$log" || status=$?
if [ "$status" -eq 0 ] && ! tail -n 1 "$log" | grep -q ' passed'; then
    echo "error: no test ran" >&2
    status=5
fi
exit "$status"
