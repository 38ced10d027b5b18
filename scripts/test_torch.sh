#!/usr/bin/env bash
# Runs the core of the tests under other releases of PyTorch: by default the oldest that is supported and the newest.
#
#     bash scripts/test_torch.sh [--wheel FILE] [RELEASE...]
#
# Each release gets an environment of its own, build/torch/RELEASE, which is kept. FILE is the wheel to test; without, the
# checkout is built. PYTHON names the interpreter; the oldest release runs on the oldest Python, too:
# PYTHON=python3.10 bash scripts/test_torch.sh 2.6.0. PyTorch with CUDA takes some 5 GB, CPU builds far less, where pip
# finds them: PIP_INDEX_URL. For before a release, not for every change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheel=
if [ "${1:-}" = --wheel ]; then
    wheel=$(realpath "$2")
    shift 2
fi
[ $# -gt 0 ] || set -- 2.6.0 newest
core=(operations gradient_rules forms reductions latents kernel_tasks likelihoods divergences formulas transforms wrappers
    calls inplace large_tensors linear sharded noise errors layout properties vae likelihood_estimates networks
    distributions pretrained recipes triton_launches)

files=("${core[@]/#/../../tests/test_}")
files=("${files[@]/%/.py}")

failed=()
for release in "$@"; do
    place=build/torch/$release
    if [ ! -e "$place/ready" ]; then
        printf '\n== Installing PyTorch %s\n' "$release" >&2
        "${PYTHON:-python3}" -m venv --clear "$place"
        torch=torch
        [ "$release" = newest ] || torch=torch==$release
        "$place/bin/pip" install --quiet "$torch" numpy safetensors scikit-learn pytest pytest-xdist hypothesis \
            'setuptools>=77' pybind11 ninja
        touch "$place/ready"
    fi
    printf '\n== Installing fusedvae\n' >&2
    FUSEDVAE_REQUIRE_EXT=1 "$place/bin/pip" install --quiet --no-deps --no-build-isolation --force-reinstall "${wheel:-.}"
    printf '\n== %s\n' "$("$place/bin/python" -c 'import sys, torch; print("PyTorch", torch.__version__, "Python", sys.version)')" >&2
    # From another folder: in the checkout, what the tests start would import the package of the checkout.
    (cd build/torch && OMP_WAIT_POLICY=passive "$release/bin/pytest" -q -n "$(nproc)" --dist loadfile \
        -p no:cacheprovider -m 'not slow' "${files[@]}") || failed+=("$release")
done
[ ${#failed[@]} -eq 0 ] || {
    printf 'error: tests fail under PyTorch %s\n' "${failed[*]}" >&2
    exit 1
}
