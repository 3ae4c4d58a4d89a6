#!/usr/bin/env bash
# Build the wheel into dist/, install it into an environment of its own, and run the demo from there for two steps.
#
#   scripts/wheel.sh            an empty environment, filled as `make` would; minutes
#   scripts/wheel.sh --borrow   the dependencies of .venv, without the checkout; seconds, for CI
#
# The variables of scripts/setup.sh hold here too. The environment is deleted afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="$PWD/.venv-wheel"
away="$(mktemp -d)"
trap 'rm -rf "$VENV" "$away"' EXIT

rm -rf dist "$VENV"
"${PYTHON:-python3}" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" wheel --quiet --no-deps --wheel-dir dist .
WHEEL="$(ls "$PWD"/dist/deepgrpo-*.whl)"
export WHEEL
if [ "${1:-}" = --borrow ]; then
  purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  # a path in a .pth file brings packages, and not the .pth file of .venv that leads to the checkout
  .venv/bin/python -c "$purelib" >"$("$VENV/bin/python" -c "$purelib")/borrowed.pth"
  "${pip[@]}" install --quiet --no-deps --no-compile --force-reinstall "$WHEEL"
else
  scripts/setup.sh
fi

# nothing of the checkout is in reach: what is missing from the wheel is missed here
cd "$away"
"$VENV/bin/python" - <<'END'
import deepgrpo, os, pathlib
home = pathlib.Path(deepgrpo.__file__).parent
print(f"deepgrpo {deepgrpo.__version__} in {home}")
assert home.is_relative_to(os.environ["VENV"]), "not the wheel's"
for recipe in ("demo", "gsm8k-qwen2.5-0.5b-deep", "lab/methods", "lab/regimes/facts"):
    assert (home / "recipes" / f"{recipe}.toml").is_file(), f"the wheel has no recipe {recipe}"
END
"$VENV/bin/deepgrpo" recipes | grep -q '^demo '
"$VENV/bin/deepgrpo" train demo --run.steps 2 --run.prompts_per_step 8 --warmstart.steps 20 --eval.limit 8
"$VENV/bin/deepgrpo" report runs/demo --out report.html
test -s report.html
