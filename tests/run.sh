#!/usr/bin/env bash
# Sets up as the quickstart does, then checks style and types and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/_setup.sh
setup_project || exit $?
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
mypy
mypy --config-file tests/mypy.ini
python tests/edge/releases.py # the releases of Megatron that the tests run side by side
pytest "$@"
