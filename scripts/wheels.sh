#!/usr/bin/env bash
# Collect wheels for a machine with PyTorch but without a package index (Linux x86-64): what constraints.txt pins, and the
# embedded data, but for what that machine has.
#
#   there:  python3 -m pip list --format=freeze > present.txt
#   here:   scripts/wheels.sh present.txt 3.12 wheels           its list, its Python, a folder
#   there:  python3 -m pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site
set -euo pipefail
cd "$(dirname "$0")/.."
present=$1 python=$2 folder=$3
data=$(sed -n 's/^DATA *:= *\(llm-[^ ]*\)\(.*\)/\2/p' Makefile) # the model of 100 MB is not needed there
plain() { tr 'A-Z_.' 'a-z--'; }
for pin in $(cat constraints.txt) $data; do
  name=${pin%%==*}
  cut -d= -f1 "$present" | plain | grep -qx -- "$(plain <<< "$name")" && continue
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    $(printf -- '--platform manylinux_2_%s_x86_64 ' 28 27 24 17) --platform manylinux2014_x86_64 -d "$folder" "$pin" ||
    python3 -m pip wheel -q --no-deps -w "$folder" "$pin" # of pure Python, where there is only its source
done
