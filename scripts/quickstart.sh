#!/usr/bin/env bash
# From a fresh clone to a trained model: sets up .venv, then trains a small NAT on scikit-learn's handwritten digits, on
# the GPU if there is one. Run again, it moves runs/quickstart aside and trains anew. Settings may follow: seed=1 ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup digits
exec "$PWD/.venv/bin/natrain" train model=nat_digits data=digits recipe=digits name=quickstart overwrite=true "$@"
