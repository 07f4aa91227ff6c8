#!/usr/bin/env bash
# The whole job for this device: build.sh RECIPE [ssh://host]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../build.sh" "$(basename "$here")" "$@"
