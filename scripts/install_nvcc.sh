#!/usr/bin/env bash
# Installs nvcc 12.8 in a container of manylinux_2_28, before cibuildwheel builds. It is the first release that compiles
# for sm_100, and drivers from 525 on run what it makes: those of the oldest PyTorch that is served, too.
set -euo pipefail
folder=$(uname -m)
[ "$folder" = aarch64 ] && folder=sbsa
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$folder/cuda-rhel8.repo"
dnf install -y cuda-nvcc-12-8 cuda-cudart-devel-12-8
