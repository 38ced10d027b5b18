#!/usr/bin/env bash
# Sets everything up and runs every check: lint, formatting, types, tests. Arguments go to pytest.
export FUSEDVAE_REQUIRE_EXT=1 # tests without the native kernels would prove little
# Compiling for each generation of GPUs takes minutes: the tests do with one, a release is built for all.
if [ -n "${CUDA_HOME:-}" ] || command -v nvcc >/dev/null; then
    export FUSEDVAE_CUDA_ARCHS=${FUSEDVAE_CUDA_ARCHS:-90}
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

check() {
    say "$*"
    "$@"
}

mapfile -t cpp < <(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
check ruff check
check ruff format --check
check clang-format --dry-run -Werror "${cpp[@]}"
check mypy
# A process a core, whose threads wait for each other asleep: awake they would keep the other process from running.
export OMP_WAIT_POLICY=passive
# A test that hangs shows where, and ends its process alone.
stuck=(-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true)
check python -m pytest -n "$(nproc)" --dist loadfile --no-loadscope-reorder "${stuck[@]}" "$@"
