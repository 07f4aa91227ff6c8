#!/usr/bin/env bash
# The whole job for one device: read the recipe, cut, recover, check, and write a bundle into out/;
# with a host, also build its engine there and bring it back. Called by targets/<device>/build.sh.
set -euo pipefail

usage() {
    echo "usage: targets/$1/build.sh RECIPE [ssh://host]" >&2
    exit 2
}

target=$1
shift
[[ $# -ge 1 && $# -le 2 && $1 != -* ]] || usage "$target"
recipe=$1
device=${2:-}
[[ -z $device || $device == ssh://?* ]] || usage "$target"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}  # the Makefile's variable
if [[ -x $venv/bin/python ]]; then
    secateur=("$venv/bin/python" -m secateur)
elif command -v secateur >/dev/null; then
    secateur=(secateur)
else
    echo "error: there is no $venv and no secateur on the PATH: run \`make setup\` in $root" >&2
    exit 2
fi
exec "${secateur[@]}" build "$recipe" --target "$target" --out out ${device:+--device "$device"}
