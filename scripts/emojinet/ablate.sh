#!/usr/bin/env bash
# EmojiNet's grids, after scripts/quickstart.sh: twelve arms with three seeds, chosen on validation, and six ablations.
#
#   scripts/emojinet/ablate.sh                        the main grid; about three quarters of an hour on two cores
#   scripts/emojinet/ablate.sh main --dry-run         its commands and cost
#   scripts/emojinet/ablate.sh k | pool | captioner | weights [more arguments of arf ablate]
#   scripts/emojinet/ablate.sh frontier | frontier-vit        cheaper anchors; then, on an idle machine,
#       python scripts/emojinet/step_cost.py $OUT/NAME && python scripts/emojinet/frontier.py $OUT/NAME
#
# A second start goes on where the first one stopped. Results: $OUT/NAME/table.md, results.json and report/index.html.
# Variables: DATA (data/emojinet), RUN (runs/quickstart), OUT (runs/ablation), VENV (.venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
DATA=${DATA:-data/emojinet} RUN=${RUN:-runs/quickstart} OUT=${OUT:-runs/ablation} VENV=${VENV:-.venv}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait must not spin: runs are side by side

name=${1:-main}
[ $# -eq 0 ] || shift
case $name in
    main) grid=emojinet ;;
    k | pool | captioner | weights | frontier | frontier-vit) grid=emojinet-$name ;;
    *)
        sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
dry_run=
for argument in "$@"; do [ "$argument" != --dry-run ] || dry_run=yes; done
[ -n "$dry_run" ] || "$VENV/bin/python" scripts/emojinet/quickstart.py --data "$DATA" --out "$RUN" --anchors
if [ "$name" = captioner ] && [ -z "$dry_run" ]; then
    for steps in 50 150; do
        "$VENV/bin/python" scripts/benchmarks/captioner.py "$DATA" "$RUN" "$steps" "$OUT/captioners/$steps"
    done
fi
if [ "$name" = frontier-vit ] && [ -z "$dry_run" ]; then
    "$VENV/bin/python" scripts/emojinet/vit.py "$DATA" "$RUN" "$OUT/vit"
fi
[ "$name" != frontier-vit ] || set -- --set "clip=$OUT/vit/clip" "$@"
[ "$name" != captioner ] || set -- --set "captioners=$OUT/captioners" "$@"
"$VENV/bin/arf" ablate "$grid" --out "$OUT/$name" --set "data=$DATA" --set "run=$RUN" "$@"
[ -n "$dry_run" ] || "$VENV/bin/arf" report "$OUT/$name" --out "$OUT/$name/report"
