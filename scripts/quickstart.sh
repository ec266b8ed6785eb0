#!/usr/bin/env bash
# From a fresh clone to the table: environment, EmojiNet, pretraining, anchors, FLYP and ARF, evaluation.
#
#   scripts/quickstart.sh                   about 15 minutes on two cores; a second start skips what is finished
#   scripts/quickstart.sh --seeds 0 1 2 3   other seeds
#   scripts/quickstart.sh --fast            a smoke run of about 3 minutes, too short for the figures to mean much
#   scripts/quickstart.sh --help            all options; scripts/env.sh lists the variables for versions
#
# Results: runs/quickstart/results.json and results.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_environment captions,evaluation,emojinet
exec "$VENV/bin/python" scripts/emojinet/quickstart.py "$@"
