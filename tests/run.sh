#!/usr/bin/env bash
# Sets up as the quickstart does, then checks style and types and runs the tests. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'EOF'
usage: ./tests/run.sh [--quick] [--releases WHICH ...] [PYTEST_ARGUMENTS ...]

Sets up .venv as the quickstart does, then checks style and types and runs the tests. All other
arguments go to pytest.

  --quick           for every change: without the tests that train or take long, two at a time;
                    pytest's last lines name what is left out
  --releases WHICH  releases of Megatron to test in full beside the newest: all, newest (none
                    beside it) or one, such as 0.17.1; the others are tested where releases
                    differ, and share the other tests: each is run on one of them (newest)

from the environment:
  EP_RELEASES       as --releases
  EP_NEWEST=1       install the newest of everything, not the versions of constraints.txt
  EP_PYTHON         interpreter to use instead of searching for one

examples:
  ./tests/run.sh --quick
  ./tests/run.sh --quick tests/commands/test_cli.py
  ./tests/run.sh --numprocesses 2 --dist loadfile
  ./tests/run.sh --releases all
EOF
}

quick=no releases="${EP_RELEASES:-newest}" arguments=()
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --quick) quick=yes ;;
        --releases)
            releases="${2:?"--releases needs all, newest or a release; use --releases all"}"
            shift
            ;;
        --releases=*) releases="${1#*=}" ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

source recipes/_setup.sh
setup_project || exit $?
# Each test starts processes, and each compiles what no other may keep.
unset PYTHONDONTWRITEBYTECODE
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
mypy
if [[ "$quick" == yes ]]; then
    exec pytest -m "not slow and not long" --numprocesses 2 --dist loadfile --quiet "${arguments[@]}"
fi
mypy --config-file tests/mypy.ini
# The releases of Megatron that the tests run side by side; said once, so that days do not mix.
EP_RELEASES="$(python tests/helpers/releases.py "$releases")"
export EP_RELEASES
pytest -m "not long" "${arguments[@]}"
