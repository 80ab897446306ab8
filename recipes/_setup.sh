# Sourced by quickstart.sh and tests/run.sh: finds a Python >= 3.12, makes .venv, installs the project.
# EP_PYTHON names an interpreter to use instead of searching.

find_python() {
    # Prints the first interpreter that starts and is new enough; a pyenv shim can exist and fail.
    local root candidate
    local candidates=()
    if [[ -n "${EP_PYTHON:-}" ]]; then
        candidates=("$EP_PYTHON")
    else
        candidates=(python3.12 python3.13 python3.14 python3 python)
        for root in "${PYENV_ROOT:-$HOME/.pyenv}/versions" "$HOME/miniconda3/envs" \
            "$HOME/anaconda3/envs" "$HOME/miniforge3/envs" /opt/conda/envs; do
            for candidate in "$root"/*/bin/python; do
                candidates+=("$candidate")
            done
        done
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

setup_project() {
    # Leaves an environment in .venv with the project and its extras; does nothing when it is there.
    local python stamp
    stamp="$(cksum <pyproject.toml)"
    if [[ -f .venv/ep_plugin.stamp && "$(<.venv/ep_plugin.stamp)" == "$stamp" ]]; then
        return 0
    fi
    if ! python="$(find_python)"; then
        echo "error: Python >= 3.12 is needed and none was found on PATH, in pyenv or in conda;" \
            "install one, or name it: EP_PYTHON=/path/to/python3.12 $0" >&2
        return 2
    fi
    echo "setup: $("$python" --version) at $python -> .venv (the first time takes minutes)"
    if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -c '' 2>/dev/null; then
        "$python" -m venv --clear .venv
    fi
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --editable '.[megatron,report,dev]'
    echo "$stamp" >.venv/ep_plugin.stamp
}
