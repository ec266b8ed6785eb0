#!/usr/bin/env bash
# From a fresh clone to the table: environment, EmojiNet, pretraining, `arf fit` with anchors, evaluation.
#
#   scripts/quickstart.sh                   about 20 minutes on two cores; a second start skips what is finished
#   scripts/quickstart.sh --seeds 5         more seeds
#   scripts/quickstart.sh --fast            a smoke run of about 3 minutes, too short for the figures to mean much
#   scripts/quickstart.sh --help            all options; scripts/env.sh lists the variables for versions
#
# Results: runs/quickstart/results.json, results.png, and the model with its report in runs/quickstart/fit/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_environment captions,evaluation,emojinet
exec "$VENV/bin/python" scripts/emojinet/quickstart.py "$@"
