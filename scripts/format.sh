#!/usr/bin/env bash
# Formats all sources, Python and C++, the way scripts/test.sh checks them.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check --fix --exit-zero
ruff format
find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -exec clang-format -i {} +
