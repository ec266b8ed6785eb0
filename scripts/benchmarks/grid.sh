#!/usr/bin/env bash
# Every method on one benchmark: data, pretrained models, anchors, `arf ablate` on grids/*.yaml, a report for each model.
#
#   scripts/benchmarks/grid.sh emojinet|iconnet                      all arms, one ResNet and one transformer, 3 seeds
#   scripts/benchmarks/grid.sh iconnet --dry-run                     what it would take, and nothing else
#   scripts/benchmarks/grid.sh iconnet --arms main --models 5        the five main arms, five pretrained models of each tower
#   scripts/benchmarks/grid.sh emojinet --grid lr --towers resnet    learning rates x 1, 2, 4
#   scripts/benchmarks/grid.sh --help                                all options
#
# An estimate of the time comes first. A second start goes on where the first one stopped. Hyper-parameters are chosen
# with the first model of a tower, and the others take them over. Results: runs/BENCHMARK/TOWER-N/GRID/results.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait must not spin: runs are side by side
exec "${VENV:-.venv}/bin/python" scripts/benchmarks/grid.py "$@"
