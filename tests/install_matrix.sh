#!/usr/bin/env bash
# Runs the tests of tests/every_torch.txt on every torch that molt names, from source and from one wheel:
#   bash tests/install_matrix.sh [TORCH...]        2.10.0, 2.11.0, 2.14.1 and the newest that pip offers by default
# HOW="source wheel" chooses; WHEEL names a file to try instead of one built here, isolated. Each torch has a new
# environment under TMPDIR, 7 GB that are freed before the next. What fails is told at the end; the rest still runs.
set -euo pipefail

python=${PYTHON:-python3}
how=${HOW:-source wheel}
wheel=${WHEEL:+$(realpath "$WHEEL")}
[ $# -gt 0 ] || set -- 2.10.0 2.11.0 2.14.1 newest
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
summary="$work/summary"
trap 'echo "== what ran"; cat "$summary" 2>/dev/null; rm -rf "$work"' EXIT
export MOLT_REQUIRE_EXT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 PIP_NO_CACHE_DIR=1
unset PYTHONPATH

# A copy without what was built in the tree: tests there must find the installed package and no other.
mkdir "$work/tree"
cd "$root"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$work/tree"
cd "$work/tree"
pip="$work/venv/bin/pip"

if [[ $how == *wheel* && -z $wheel ]]; then
  echo "== a wheel, with build isolation"
  "$python" -m pip wheel --no-deps --wheel-dir "$work/wheels" .
  wheel=$(ls "$work"/wheels/*.whl)
fi

try() {  # HOW WHAT: installs and tests; a line of the summary
  local start=$SECONDS result="FAILED"
  echo "== torch $("$work/venv/bin/python" -c 'import torch; print(torch.__version__)'), $1"
  rm -rf build  # what another torch left
  if "$pip" install --no-build-isolation --no-deps --force-reinstall "$2" &&
    PYTHONSAFEPATH=1 "$work/venv/bin/python" tests/check_installed.py &&
    PYTHONSAFEPATH=1 "$work/venv/bin/python" -m pytest -q -n 2 --dist loadfile @tests/every_torch.txt | tee "$work/log"
  then
    result="ok"
  fi
  PYTHONSAFEPATH=1 "$work/venv/bin/python" - "$1" "$result" "$((SECONDS - start))" "$work/log" >> "$summary" <<'PY'
import pathlib, platform, sys
import torch
how, result, seconds, log = sys.argv[1:]
last = pathlib.Path(log).read_text().strip().splitlines()[-1].strip("= ") if pathlib.Path(log).exists() else "no tests"
from molt import config
cuda = "with CUDA kernels" if config()["cuda"] else "CPU kernels alone"
print(f"torch {torch.__version__}, Python {platform.python_version()}, {how}, {cuda}: {result}, {seconds} s; {last}")
PY
  rm -f "$work/log"
}

seen=
for version in "$@"; do
  wanted="torch==$version"
  [ "$version" = newest ] && wanted=torch
  start=$SECONDS
  rm -rf "$work/venv"
  if ! { "$python" -m venv "$work/venv" && "$pip" install --upgrade pip "setuptools>=77" wheel "pybind11>=2.13" ninja &&
    "$pip" install "$wanted"; }; then
    echo "$wanted: FAILED, could not be installed" >> "$summary"
    continue
  fi
  torch=$("$work/venv/bin/python" -c 'import torch; print(torch.__version__)' 2>/dev/null)
  if [[ $version == newest && $seen == *" $torch "* ]]; then
    echo "newest: torch $torch, as above" >> "$summary"
    continue
  fi
  seen="$seen $torch "
  # What molt and the tests need, at this torch; the interpreter of Triton before 3.7 fails with a newer NumPy.
  needs=("$wanted")
  [[ $version == 2.10.* || $version == 2.11.* ]] && needs+=("numpy<2.4")
  if ! MOLT_SKIP_EXT=1 MOLT_REQUIRE_EXT=0 "$pip" install --no-build-isolation "${needs[@]}" '.[demo,test]'; then
    echo "torch $torch: FAILED, what the tests need could not be installed" >> "$summary"
    continue
  fi
  echo "torch $torch: environment in $((SECONDS - start)) s" >> "$summary"
  [[ $how == *source* ]] && try source .
  [[ $how == *wheel* ]] && try wheel "$wheel"
done

! grep -q FAILED "$summary"
