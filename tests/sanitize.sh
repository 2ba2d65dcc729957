#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the short GPU tests: bash tests/sanitize.sh [pytest -k expression]
# Exits 0 where nothing was found, 1 where something was, 2 where the tool or a GPU is missing. PYTHON chooses Python,
# TOOLS="memcheck racecheck" the tools; DRY=1 collects the tests and needs neither.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CHOICE=${1:-sanitized}
TESTS=(-p no:cacheprovider -m gpu -k "$CHOICE" tests/test_cuda_device.py)

if [ -n "${DRY:-}" ]; then
  exec "$PYTHON" -m pytest -q --collect-only "${TESTS[@]}"
fi

SANITIZER=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
for home in "${CUDA_HOME:-}" /usr/local/cuda; do
  [ -z "$SANITIZER" ] && [ -x "$home/bin/compute-sanitizer" ] && SANITIZER=$home/bin/compute-sanitizer
done
if [ -z "$SANITIZER" ]; then
  echo "sanitize: compute-sanitizer is not there (COMPUTE_SANITIZER, PATH, CUDA_HOME/bin, /usr/local/cuda/bin)" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "sanitize: $PYTHON's torch sees no CUDA device" >&2
  exit 2
fi

# The caching allocator would hide accesses beyond a tensor's end.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=0
for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
  echo "== $tool"
  "$SANITIZER" --tool "$tool" --error-exitcode 1 --target-processes all \
    "$PYTHON" -m pytest -v "${TESTS[@]}" || failed=1
done
exit $failed
