#!/usr/bin/env bash
# Compiles the Triton kernels ahead of time under Triton releases of other years, and runs the tests of their launches.
# Arguments name releases; without, the oldest and the newest that are supported, and those in between that changed how
# kernels are launched. Each is installed into build/triton/ (some 250 MB), unless it is there.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

variants='^(contiguous float32|contiguous bfloat16|mixed dtypes|packed|small and odd|64-bit offsets|a mask, none, float32'
variants+='|contiguous laplace of softplus, float32|contiguous sample of std, a prior, float32|offset 5, float32)$'
[ $# -gt 0 ] || set -- 3.2.0 3.3.1 3.4.0 3.6.0 3.7.1
for release in "$@"; do
    place=build/triton/$release
    if [ ! -d "$place/triton" ]; then
        say "Installing Triton $release"
        pip install --quiet --no-deps --target "$place" "triton==$release" ||
            fail "Triton $release cannot be had from the package index"
    fi
    say "Triton $release"
    export PYTHONPATH=$PWD/$place
    python tests/triton_ahead_of_time.py sm_90 "$variants" >"$place/compiled.json"
    python - "$place/compiled.json" <<'EOF'
import json, sys

launches = json.load(open(sys.argv[1]))
spilled = [launch for launch in launches if launch["local"]]
print(f"{len(launches)} launches compiled, {len(spilled)} of them with memory of a thread's own")
sys.exit(not launches or bool(spilled))
EOF
    python -m pytest -q -p no:cacheprovider tests/test_triton_launches.py
done
