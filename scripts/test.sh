#!/usr/bin/env bash
# Makes the environment and runs lint, types and tests. What follows is handed to pytest:
#
#   scripts/test.sh                          everything but the slow tests
#   scripts/test.sh --unit                   those of tests/unit that start no process, in about a minute; no lint
#   scripts/test.sh -m slow                  the slow tests alone
#   scripts/test.sh tests/unit -k captions   some of them
#
# SKIP_LINT=1 leaves lint and types out; JOBS sets the number of test processes (default: 3; each waits a third of its time).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
make_environment "$EXTRAS_OF_TESTS"

marker=(-m "not slow")
case " $* " in
    *" --unit "*)
        marker=(-m "not slow and not process")
        set -- tests/unit "${@/--unit/-q}"
        SKIP_LINT=1
        ;;
    *" -m "*) marker=() ;;
esac

lint() {
    "$VENV/bin/ruff" check . && "$VENV/bin/ruff" format --check . && "$VENV/bin/mypy"
}
linting=
if [ -z "${SKIP_LINT:-}" ]; then
    lint & # while pip waits for the network
    linting=$!
fi

# Files alone, beside the environment: the open_clip releases that are tested on every change; the numpy that
# CLIP_benchmark 1.6.2 can count with, for the test that compares with it; a webdataset that stock open_clip cannot read;
# TensorBoard, which open_clip would import at the start of every run if it were in the environment itself; mergekit,
# whose Model Stock ours is compared with.
"$VENV/bin/python" scripts/versions/install.py --every-change
for packages in numpy==2.3.5 webdataset==1.0.2 mergekit==0.1.5 "tensorboard==2.21.0 absl-py"; do
    first=${packages%% *}
    folder=.venvs/${first/==/-}
    if [ ! -d "$folder" ]; then
        # shellcheck disable=SC2086  # several packages in one word
        "$VENV/bin/python" -m pip --disable-pip-version-check install -q --no-deps --no-compile \
            --target "$folder.incomplete" $packages
        mv "$folder.incomplete" "$folder"
    fi
done

if [ -n "$linting" ]; then
    wait "$linting"
fi

unset PYTHONDONTWRITEBYTECODE # compiling all modules and tests anew costs each process seconds
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# In the order of the folders, integration tests first: the last ones are then short, and no process waits for another.
exec "$VENV/bin/python" -m pytest -n "${JOBS:-3}" --dist loadscope --no-loadscope-reorder --durations 10 \
    "${marker[@]}" "$@"
