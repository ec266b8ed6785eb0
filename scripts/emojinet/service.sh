#!/usr/bin/env bash
# EmojiNet's anchors through a real clip-retrieval service, and the fine-tune that uses them; after scripts/quickstart.sh.
#
#   scripts/emojinet/service.sh           about 3 minutes; makes the service's environment first (6 GB) if need be
#   scripts/emojinet/service.sh --fast    after scripts/quickstart.sh --fast
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/env.sh
make_environment captions,evaluation,emojinet,retrieval
exec "$VENV/bin/python" scripts/emojinet/service.py "$@"
