#!/usr/bin/env bash
# Measures what docs/cost.md tells, on a machine that does nothing else: some hours on two cores.
#
#   scripts/bench/all.sh                     all of it
#   scripts/bench/all.sh loader step         some of it
#
# Each figure is a ratio of two things that were timed in turn. Writes docs/figures/bench/NAME.json, from which
# scripts/tables.py makes the table; exits with 1 if a bar is missed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
missed=()

measure() {
    name=$1
    shift
    if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then
        return
    fi
    echo "== $name"
    "${VENV:-.venv}/bin/python" "scripts/bench/$name.py" "$@" --json "docs/figures/bench/$name.json" || missed+=("$name")
}

chosen=("$@")
measure startup
measure loader --workers 1 2 4 8 --images 1024 --rounds 5
measure step --models ViT-B-32 ViT-B-16 --batch-size 16 4
measure memory --model ViT-B-16 --batch-size 32
measure distributed --processes 1 2 4
measure checkpoint --model ViT-B-32 --batch-size 16
measure captions --captions 5000000 --workers 4
measure evaluate
OMP_NUM_THREADS=1 measure caption
measure pack
OMP_NUM_THREADS=2 measure retrieve
OMP_NUM_THREADS=2 measure pool
OMP_NUM_THREADS=2 measure duplicates
OMP_NUM_THREADS=2 measure growth --samples 1000
if [ ${#missed[@]} -gt 0 ]; then
    echo "a bar is missed: ${missed[*]}"
    exit 1
fi
