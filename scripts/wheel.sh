#!/usr/bin/env bash
# Builds a wheel for this Python into dist/, as a release has it, and tries it in an environment of its own: with the
# kernels that this machine has compilers for, and for Linux distributions from manylinux_2_28 on, whatever this one is.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

say "Building"
rm -rf build/wheel
LDFLAGS=$(python scripts/old_glibc.py build/glibc 2.28)
export LDFLAGS FUSEDVAE_REQUIRE_EXT=1
python -m build --wheel --no-isolation --outdir build/wheel .
say "Looking at what it needs"
bash scripts/audit_wheel.sh build/wheel/*.whl build/wheel/audited
say "Trying it"
python -m venv --clear build/wheel/venv
# PyTorch and the rest are those of .venv; the package is not.
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(echo build/wheel/venv/lib/python*/site-packages)/borrowed.pth"
build/wheel/venv/bin/pip install --quiet --no-deps build/wheel/audited/*.whl
(cd build/wheel && venv/bin/python ../../scripts/try_wheel.py)
mkdir -p dist
cp build/wheel/audited/*.whl dist
ls -l dist
