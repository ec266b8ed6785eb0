#!/usr/bin/env bash
# Builds the documentation into site/; a broken link or an undocumented argument is an error.
#
#   scripts/docs.sh           builds; then open site/index.html
#   scripts/docs.sh serve     shows it on http://127.0.0.1:8000, search included, and follows changes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_environment docs,evaluation
if [ "${1:-build}" = serve ]; then
    exec "$VENV/bin/python" -m mkdocs serve --strict --dev-addr 127.0.0.1:8000
fi
exec "$VENV/bin/python" -m mkdocs build --strict --clean "${@:2}"
