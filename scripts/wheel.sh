#!/usr/bin/env bash
# Build the wheel into dist/, install it into an empty environment, and run the demo from there for two steps.
#
# The variables of scripts/setup.sh hold here too. The environment is deleted afterwards; pip's cache makes a second time quick.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="$PWD/.venv-wheel"
away="$(mktemp -d)"
trap 'rm -rf "$VENV" "$away"' EXIT

rm -rf dist "$VENV"
"${PYTHON:-python3}" -m venv "$VENV"
"$VENV/bin/python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
WHEEL="$(ls "$PWD"/dist/deepgrpo-*.whl)"
export WHEEL
scripts/setup.sh

# nothing of the checkout is in reach: what is missing from the wheel is missed here
cd "$away"
"$VENV/bin/python" -c 'import deepgrpo, pathlib; print(f"deepgrpo {deepgrpo.__version__} in {pathlib.Path(deepgrpo.__file__).parent}")'
"$VENV/bin/deepgrpo" recipes >recipes.txt
for recipe in demo gsm8k-qwen2.5-0.5b-deep lab/methods; do
  grep -q "$recipe" recipes.txt || { echo "error: the wheel has no recipe $recipe" >&2; exit 1; }
done
"$VENV/bin/deepgrpo" train demo --run.steps 2 --run.prompts_per_step 8 --warmstart.steps 20 --eval.limit 8
"$VENV/bin/deepgrpo" report runs/demo --out report.html
test -s report.html
