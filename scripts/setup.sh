# Sourced by the other scripts: makes or reuses .venv in the clone and installs natrain there. Sets PYTHON.
# NATRAIN_PYTHON names the interpreter that makes the venv, where the one found is not wanted.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fits() {
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

make_venv() {
    local base
    for base in "${NATRAIN_PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11 python3.10; do
        if fits "$base"; then
            echo "making .venv with $("$base" --version)"
            "$base" -m venv .venv && return
            echo "error: '$base -m venv .venv' failed. Try: install your system's venv package (python3-venv)" >&2
            exit 2
        fi
        [ -z "${NATRAIN_PYTHON:-}" ] || break
    done
    echo "error: natrain needs Python 3.10 or newer. Try: NATRAIN_PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
}

# setup EXTRA: the venv holds natrain[EXTRA]; pip runs only where the metadata changed since the last time. The test
# extra holds the others.
setup() {
    [ -x .venv/bin/python ] || make_venv
    PYTHON=$PWD/.venv/bin/python
    local extra metadata
    metadata=$(cat setup.py pyproject.toml | cksum)
    for extra in "$1" test; do
        [ "$(cat ".venv/natrain-$extra" 2>/dev/null)" = "$metadata" ] && return
    done
    echo "installing natrain[$1] into .venv (the first time takes a few minutes)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    echo "$metadata" >".venv/natrain-$1"
}
