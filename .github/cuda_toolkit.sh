#!/usr/bin/env bash
# Runs once in the manylinux container, before the wheels are built: the CUDA compiler and the local version, if wanted.
# MOLT_CUDA=1 installs the toolkit CUDA_TOOLKIT, "13.0" say; LOCAL_VERSION=cu130 makes 0.1.0 into 0.1.0+cu130.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${LOCAL_VERSION:-}" ]; then
  sed -i "s/^__version__ = \"\([^\"+]*\)\"/__version__ = \"\1+$LOCAL_VERSION\"/" molt/__init__.py
  grep -q "^__version__ = \".*+$LOCAL_VERSION\"" molt/__init__.py
fi

if [ "${MOLT_CUDA:-0}" = 1 ]; then
  name=${CUDA_TOOLKIT//./-}
  curl --fail --silent --show-error --location --output /etc/yum.repos.d/cuda.repo \
    https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
  dnf install --assumeyes "cuda-nvcc-$name" "cuda-cudart-devel-$name" "cuda-cccl-$name"
  ln -sfn "/usr/local/cuda-$CUDA_TOOLKIT" /usr/local/cuda
  /usr/local/cuda/bin/nvcc --version
fi
