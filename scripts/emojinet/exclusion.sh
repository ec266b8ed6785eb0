#!/usr/bin/env bash
# How many of EmojiNet's retrieved pairs show what the evaluation sets show? Embeds the test images, and retrieves again
# with `--exclude`. After scripts/quickstart.sh; arguments go to `arf retrieve`, such as `--exclude-similarity 0.98`.
# Works in runs/quickstart/exclusion; RUN and DATA name other folders than the quickstart's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run=${RUN:-runs/quickstart} data=${DATA:-data/emojinet}
arf=${VENV:-.venv}/bin/arf
work=$run/fit/anchors/work out=$run/exclusion
folders=()
# zero_shot_fine holds zero_shot's images
for set in "$data"/evaluation/test/{id,zero_shot,shift/*}; do
    folder=$out/$(basename "$set")
    "$arf" embed --task-data "$set/test/0.tar" --model "local-dir:$run/clip" --out "$folder"
    folders+=("$folder")
done
"$arf" retrieve --queries "$work/task" --pool "$work/pool" --out "$out/hits" --k 10 --restart --exclude "${folders[@]}" "$@"
