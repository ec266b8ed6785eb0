#!/usr/bin/env bash
# A real clip-retrieval service on this machine: environment, index, server.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/knn_service.sh --embeddings DIR [--factory F] [options]    index an embedding folder and serve it
       scripts/knn_service.sh --index DIR [options]                       serve an index folder that exists
       scripts/knn_service.sh --install-only                              make the environment, and stop
       scripts/knn_service.sh --run COMMAND ...                           clip-retrieval's own command line

Makes an environment of its own for clip-retrieval, which does not live beside open_clip 3, and starts
`clip-retrieval back` on 127.0.0.1. Queries are sent as embeddings (that is what `arf retrieve --backend service`
does), so no CLIP model is loaded unless --clip-model names one.

  --embeddings DIR   folder of `arf embed` or `clip-retrieval inference`
  --index DIR        index folder: image.index and metadata/. With --embeddings, where to build it (DIR-index)
  --factory F        faiss's description of the index, for `arf index` (Flat), or auto: `clip-retrieval index`
  --name NAME        what the index is called (pool)
  --port PORT        (1234)
  --stop-after S     seconds after which the service ends by itself (86400). It also ends with the process that
                     started it.
  --clip-model M     all_clip's name of a model for text and image queries, such as
                     open_clip:ViT-B-32/laion2b_s34b_b79k or open_clip:NAME//PATH/TO/WEIGHTS.pt
  --models DIR       folder of open_clip model configurations (NAME.json) that --clip-model or --run may name
  -h, --help         this text

examples:
  scripts/knn_service.sh --embeddings EMB/pool                  until Ctrl-C
  arf retrieve --queries EMB/task --pool EMB/pool --backend service --service-url http://127.0.0.1:1234 --out HITS
  scripts/knn_service.sh --run inference --input_dataset 'pool/{0000..0331}.tar' --input_format webdataset \
      --output_folder EMB/pool --clip_model ViT-B/32

Variables: PYTHON (python3.11, else python3), CLIP_RETRIEVAL_VENV (.venvs/clip-retrieval), TORCH_VERSION and
TORCHVISION_VERSION (see scripts/env.sh).
TEXT
}

fail() {
    echo "knn_service.sh: $*" >&2
    exit 2
}

here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/scripts/env.sh"
venv=${CLIP_RETRIEVAL_VENV:-$here/.venvs/clip-retrieval}
embeddings='' index='' factory=Flat name=pool port=1234 stop_after=86400 clip_model=none models=() mode=serve

while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
        -h | --help) usage; exit 0 ;;
        --install-only) mode=install; continue ;;
        --run) mode=run; break ;;
    esac
    [ $# -gt 0 ] || fail "$option: expected a value (see --help)"
    case $option in
        --embeddings) embeddings=${1%/} ;;
        --index) index=${1%/} ;;
        --factory) factory=$1 ;;
        --name) name=$1 ;;
        --port) port=$1 ;;
        --stop-after) stop_after=$1 ;;
        --clip-model) clip_model=$1 ;;
        --models) models=(--models "$1") ;;
        *) fail "unknown option $option (see --help)" ;;
    esac
    shift
done
if [ "$mode" = serve ] && [ -z "$embeddings$index" ]; then
    fail "expected --embeddings DIR or --index DIR (see --help)"
fi

# setuptools: clip-retrieval imports pkg_resources, which 82 dropped. The other bounds are its own.
pins=('clip-retrieval==2.45.0' 'setuptools>=77.0.3,<82' 'numpy<2' 'pyarrow<16' 'open_clip_torch<3'
    "torch==$TORCH_VERSION" "torchvision==$TORCHVISION_VERSION")
python=$venv/bin/python
if [ "$(cat "$venv/.made-from" 2>/dev/null)" != "${pins[*]}" ]; then
    echo "environment: $venv (a few minutes)" >&2
    "${PYTHON:-$(command -v python3.11 || command -v python3)}" -m venv "$venv"
    # Standard output is the command's own: --run may be read by another program.
    "$python" -m pip --disable-pip-version-check install -q "${pins[@]}" filelock tqdm >&2
    echo "${pins[*]}" >"$venv/.made-from"
fi
[ "$mode" != install ] || exit 0

launch=("$python" "$here/scripts/knn_service/launch.py" "${models[@]}")
[ "$mode" != run ] || exec "${launch[@]}" "$@"

if [ -n "$embeddings" ]; then
    index=${index:-$embeddings-index}
    if [ "$factory" != auto ]; then
        # `arf index` in this environment: it needs no more than is there, and picks up after an interruption.
        PYTHONPATH=$here "$python" -m arf_plugin.cli.main index --embeddings "$embeddings" --factory "$factory" \
            --out "$index" >&2
    elif [ ! -e "$index/metadata" ]; then # copied last
        rm -f "$index/image.index" "$index/text.index"
        mkdir -p "$index"
        "${launch[@]}" index --embeddings_folder "$embeddings" --index_folder "$index" >&2
    fi
fi
[ -e "$index/image.index" ] || fail "$index has no image.index; expected an index folder, or --embeddings to build one"
ls "$index"/metadata/*.parquet >/dev/null 2>&1 || fail "$index has no metadata/*.parquet; hits would name no pair"

indices=$("$python" -c 'import json, os, sys; print(json.dumps({sys.argv[1]: os.path.abspath(sys.argv[2])}))' "$name" "$index")
exec "${launch[@]}" --stop-after "$stop_after" back --indices_paths <(echo "$indices") --port "$port" \
    --clip_model "$clip_model" --use_jit False --enable_mclip_option False --provide_aesthetic_embeddings False \
    --enable_faiss_memory_mapping True --columns_to_return '["image_path","caption","url","sha256"]'
