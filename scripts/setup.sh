# Sourced by the scripts beside it. Goes to the top of the checkout, makes the virtual environment .venv there unless
# it exists, installs fusedvae in it (editable, with all that the tests need) and activates it.
#
# PYTHON names the interpreter that .venv is made with (default: python3).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

if ! .venv/bin/python -c '' 2>/dev/null; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is not Python 3.11 or later; name one that is: PYTHON=python3.11 bash $0"
    say "Making a virtual environment in .venv"
    "$python" -m venv --clear .venv || fail "$python cannot make one (on Debian: apt install python3-venv)"
fi
# By its absolute path, whatever environment is active in the calling shell.
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONHOME
# Whatever imports a module first keeps its bytecode for all processes after it.
unset PYTHONDONTWRITEBYTECODE

# Requirements are installed once, and again when a file that names them has changed.
requirements=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$requirements" != "$(cat .venv/requirements.sha256 2>/dev/null)" ]; then
    say "Installing requirements"
    # The build requirements come first, as the builds below do not use environments of their own: that is what makes
    # them incremental. One compiles while the rest is installed, by a single processor that often waits for the disk;
    # without bytecode, as nothing ever imports most of it.
    pip install -c constraints.txt setuptools pybind11 ninja
    python setup.py -q build_ext &
    build=$!
    pip install --no-compile -c constraints.txt -r <(python scripts/requirements.py test)
    wait "$build"
    pip install --no-deps --no-build-isolation -e .
    echo "$requirements" >.venv/requirements.sha256
else
    say "Compiling what has changed"
    pip install --quiet --no-deps --no-build-isolation -e .
fi
