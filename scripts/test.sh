#!/usr/bin/env bash
# Makes the environment and runs lint, types and tests. What follows is handed to pytest:
#
#   scripts/test.sh                          everything but the slow tests
#   scripts/test.sh -m slow                  the slow tests alone
#   scripts/test.sh tests/unit -k captions   some of them
#
# SKIP_LINT=1 leaves lint and types out; JOBS sets the number of test processes (default: 2).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
make_environment captions,retrieval,evaluation,emojinet,dev

# Files alone, beside the environment: the open_clip releases that are tested on every change, and the numpy that
# CLIP_benchmark 1.6.2 can count with, for the test that compares with it.
"$VENV/bin/python" scripts/versions/install.py --every-change
if [ ! -d .venvs/numpy-2.3.5 ]; then
    "$VENV/bin/python" -m pip --disable-pip-version-check install -q --no-deps --target .venvs/numpy-2.3.5.incomplete \
        numpy==2.3.5
    mv .venvs/numpy-2.3.5.incomplete .venvs/numpy-2.3.5
fi

if [ -z "${SKIP_LINT:-}" ]; then
    "$VENV/bin/ruff" check .
    "$VENV/bin/ruff" format --check .
    "$VENV/bin/mypy"
fi

export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
marker=(-m "not slow")
case " $* " in *" -m "*) marker=() ;; esac
exec "$VENV/bin/python" -m pytest -n "${JOBS:-2}" --dist loadscope --durations 10 "${marker[@]}" "$@"
