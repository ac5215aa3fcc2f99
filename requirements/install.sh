#!/bin/sh
# Install the CPU environment into a virtual environment: install.sh VENV
# No resolver runs: the list is complete. pip's own configured sources come first; PyTorch's public
# CPU index is added only when they do not have the +cpu build.
set -eu
venv=$1
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
torch="torch==2.13.0+cpu"

python=${PYTHON:-}
for candidate in $python python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        python=$candidate
        break
    fi
    python=
done
[ -n "$python" ] || { echo "Python 3.11 or 3.12 is needed; name one with PYTHON=..." >&2; exit 1; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "Installing into $venv with $("$venv/bin/python" --version): about 3 minutes"
pip install --quiet --no-deps --no-compile "$torch" 2>/dev/null ||
    pip install --no-deps --no-compile --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
pip install --quiet --no-deps --no-compile -r "$root/requirements/cpu.txt"
pip install --quiet --no-deps --no-build-isolation "$root/requirements/vllm_shim"
pip install --quiet --no-deps --no-build-isolation --editable "$root"
rm -rf "$root/requirements/vllm_shim/build" "$root/requirements/vllm_shim/vllm.egg-info"
