#!/usr/bin/env bash
# Submits all stages of anchor building to SLURM, each after those that it needs, and prints their job ids:
#
#   caption (array) ---------------------------------------+
#   embed task (array) --+                                 +--> features (array) --> the anchor set
#   embed pool (array) --+--> retrieve --> pack -----------+
#
#   TASK_DATA='task/{000..099}.tar' CAPTIONER=Salesforce/blip-image-captioning-base \
#   POOL='pool/{0000..0331}.tar' MODEL=ViT-B-16-quickgelu PRETRAINED=openai OUT=ANCHORS \
#   GPU_SBATCH='--partition=gpu --gpus-per-task=1 --time=8:00:00' CPU_SBATCH='--time=2:00:00' scripts/slurm/anchors.sh
#
#   scripts/slurm/anchors.sh --dry-run      prints the sbatch commands instead
#
# Run it again to go on after a failure: finished work is skipped. The result is that of one `arf anchors`.
#
# Variables:
#   OUT         the anchor set                                                    (required)
#   TASK_DATA   task data: tars with braces and ::, or a CSV file                 (required)
#   CAPTIONER   captioner of the caption anchors                                  (none: no captions)
#   POOL        pool tars of the pair anchors                                     (none: no pairs)
#   MODEL, PRETRAINED   open_clip model that the pairs are found with, and whose features are written
#                                                                                 (MODEL is required with POOL)
#   K, SHARD_SIZE       neighbours per image; pairs per output tar                (10, 1000)
#   WORK        embeddings, hits and logs                                         (OUT/work)
#   ARRAY       array of the stages that run a model; 0-31%8 runs 8 at a time    (0-3)
#   GPU_SBATCH, CPU_SBATCH   flags of sbatch for the stages that run a model, and for pack
#   CAPTION_FLAGS, EMBED_FLAGS, RETRIEVE_FLAGS, PACK_FLAGS, FEATURES_FLAGS   more flags of the stages
#   ARF_SETUP, MAX_RESTARTS  see the .sbatch files
# sbatch's own variables work too: SBATCH_ACCOUNT, SBATCH_PARTITION, ...
set -euo pipefail
set -o noglob # flags are split at blanks, and that is all
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

dry_run=
case ${1:-} in
    '') ;;
    --dry-run) dry_run=1 ;;
    -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
        exit
        ;;
    *)
        echo "anchors.sh: unknown argument '$1'; expected --dry-run or --help" >&2
        exit 2
        ;;
esac
: "${OUT:?names the anchor set}" "${TASK_DATA:?names the task data}"
: "${CAPTIONER:-${POOL:?or CAPTIONER must be given: without both there is nothing to build}}"
[ -z "${POOL:-}" ] || : "${MODEL:?names the open_clip model that the pairs are found with}"
work=${WORK:-$OUT/work}

# submit STAGE JOBS_BEFORE "FLAGS OF SBATCH" "FLAGS OF THE STAGE" NAME=VALUE...
# Sets $id to the job's. Of the variables above that mean another thing to a stage, it gets those named here alone.
submit() {
    local stage=$1 before=$2 resources=$3 flags=$4
    shift 4
    local command=(env -u TASK_DATA -u POOL -u OUT -u K "$@" sbatch --parsable --job-name="arf-$stage")
    local log="%x-%j.log"
    case $stage in
        caption | embed-* | features)
            command+=(--array="${ARRAY:-0-3}")
            log="%x-%A_%a.log"
            ;;
    esac
    command+=(--output="$work/logs/$log")
    # A job whose predecessor has failed would wait for ever otherwise.
    [ -z "$before" ] || command+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
    # shellcheck disable=SC2206 # split on purpose
    command+=($resources "$here/${stage%%-*}.sbatch" $flags)
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"
        echo
        id="<$stage>"
    else
        id=$("${command[@]}")
        id=${id%%;*} # with a cluster's name after it on federated SLURMs
        printf '%-12s %s%s\n' "$stage" "$id" "${before:+  after $before}"
    fi
}

made=
[ -n "$dry_run" ] || mkdir -p "$work/logs"
if [ -n "${CAPTIONER:-}" ]; then
    submit caption "" "${GPU_SBATCH:-}" "${CAPTION_FLAGS:-}" \
        TASK_DATA="$TASK_DATA" CAPTIONER="$CAPTIONER" OUT="$OUT"
    made=$id
fi
model=(MODEL="${MODEL:-}" PRETRAINED="${PRETRAINED:-}")
if [ -n "${POOL:-}" ]; then
    submit embed-task "" "${GPU_SBATCH:-}" "${EMBED_FLAGS:-}" \
        "${model[@]}" TASK_DATA="$TASK_DATA" OUT="$work/task"
    task=$id
    submit embed-pool "" "${GPU_SBATCH:-}" "${EMBED_FLAGS:-}" "${model[@]}" POOL="$POOL" OUT="$work/pool"
    submit retrieve "$task:$id" "${GPU_SBATCH:-}" "${RETRIEVE_FLAGS:-}" \
        QUERIES="$work/task" POOL_EMBEDDINGS="$work/pool" OUT="$work/retrieve" K="${K:-10}"
    submit pack "$id" "${CPU_SBATCH:-}" "--shard-size ${SHARD_SIZE:-1000} ${PACK_FLAGS:-}" \
        RETRIEVED="$work/retrieve" POOL="$POOL" OUT="$OUT"
    made=${made:+$made:}$id
fi
if [ -n "${MODEL:-}" ]; then
    submit features "$made" "${GPU_SBATCH:-}" "${FEATURES_FLAGS:-}" "${model[@]}" OUT="$OUT"
fi

[ -n "$dry_run" ] || echo "Logs are in $work/logs; look at the queue with: squeue --me" >&2
