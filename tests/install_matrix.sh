#!/usr/bin/env bash
# Runs one wheel on the oldest and the newest torch: the file named, else one built here once, isolated.
# Downloads torch three times and needs some 20 GB in TMPDIR while it runs, which it frees at the end.
set -euo pipefail

python=${PYTHON:-python3}
oldest=${OLDEST_TORCH:-2.10.0}
root=$(cd "$(dirname "$0")/.." && pwd)
given=${1:+$(realpath "$1")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir wheels

if [ -n "$given" ]; then
  echo "== wheel $given"
  cp "$given" wheels/
else
  echo "== wheel, with build isolation"
  MOLT_REQUIRE_EXT=1 "$python" -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir wheels "$root"
fi
ls -l wheels
cp "$root/tests/check_installed.py" .

for wanted in "torch==$oldest" torch; do
  echo "== $wanted"
  rm -rf venv
  "$python" -m venv venv
  venv/bin/pip install --quiet --no-cache-dir "$wanted" numpy scipy
  venv/bin/pip install --quiet --no-deps wheels/*.whl
  env -u PYTHONPATH venv/bin/python -P check_installed.py
done
