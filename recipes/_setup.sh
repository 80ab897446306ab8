# Sourced by quickstart.sh, convert.sh and tests/run.sh. In a checkout it finds a Python >= 3.12,
# makes .venv and installs the project; EP_PYTHON names an interpreter to use instead of searching,
# and EP_NEWEST=1 takes the newest of what it needs, not the versions of constraints.txt.
# Beside a copy of the recipes it only looks whether the project is installed.

usable() {
    # usable PYTHON: whether it starts, is new enough and can make environments.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    # Prints the first usable interpreter; a pyenv shim can exist and fail.
    local home="${HOME:-}" root candidate
    local candidates=()
    if [[ -n "${EP_PYTHON:-}" ]]; then
        candidates=("$EP_PYTHON")
    else
        candidates=(python3.12 python3.13 python3.14 python3 python)
        for root in "${PYENV_ROOT:-$home/.pyenv}/versions" "$home/.pyenv/versions" \
            {"$home",/opt}/{conda,miniconda3,anaconda3,miniforge3,mambaforge}{,/envs} \
            "$home/.conda/envs" "${CONDA_PREFIX:-/opt/conda}"; do
            for candidate in "$root/bin/python" "$root"/*/bin/python; do
                candidates+=("$candidate")
            done
        done
    fi
    for candidate in "${candidates[@]}"; do
        if usable "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

installed() {
    # Whether python, of .venv or else the first on PATH, has the project; says so when not.
    local python
    python="$(PATH="$PWD/.venv/bin:$PATH" command -v python || echo "no python")"
    if "$python" -c 'import ep_plugin' >/dev/null 2>&1; then return 0; fi
    echo "error: ep_plugin must be installed where recipes are no checkout; got $python on PATH," \
        "without it; use an environment that has it: source ENVIRONMENT/bin/activate" >&2
    return 2
}

setup_project() {
    # Leaves an environment in .venv with the project and its extras; does nothing when it is there.
    # Each failure is returned by name: under `setup_project || ...` bash ignores set -e in here.
    local python stamp made=no versions=(--constraint constraints.txt)
    if [[ ! -f ep_plugin/__init__.py ]]; then
        installed
        return
    fi
    stamp="$(cat pyproject.toml constraints.txt | cksum)"
    if [[ "${EP_NEWEST:-0}" == 1 ]]; then
        stamp=newest versions=(--upgrade --upgrade-strategy eager)
    fi
    if usable .venv/bin/python; then made=yes; fi
    if [[ "$made" == yes && "$stamp" != newest &&
        "$(cat .venv/ep_plugin.stamp 2>/dev/null)" == "$stamp" ]]; then
        return 0
    fi
    if ! python="$(find_python)"; then
        echo "error: Python >= 3.12 with its venv module (Debian and Ubuntu: python3-venv) is" \
            "needed and none was found on PATH, in pyenv or in conda; install one, or name it:" \
            "EP_PYTHON=/path/to/python3.12 $0" >&2
        return 2
    fi
    echo "setup: $("$python" --version) at $python -> .venv (the first time takes minutes)"
    if [[ "$made" == no ]]; then
        "$python" -m venv --clear .venv || return
    fi
    .venv/bin/python -m pip install --quiet --upgrade pip || return
    .venv/bin/python -m pip install --quiet "${versions[@]}" \
        --editable '.[megatron,muon,hf,report,dev]' || return
    echo "$stamp" >.venv/ep_plugin.stamp
}
