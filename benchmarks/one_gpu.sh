#!/usr/bin/env bash
# All that one GPU measures, in steps of a few minutes that can be repeated alone:
#
#     ./benchmarks/one_gpu.sh tests            kernels and layers beside twins and oracle
#     ./benchmarks/one_gpu.sh sanitizer        the same kernels under compute-sanitizer
#     ./benchmarks/one_gpu.sh layer gemm kernels
#                                              ep-plugin bench, with the peers that are installed
#     ./benchmarks/one_gpu.sh start            seconds until the first step is done
#     ./benchmarks/one_gpu.sh check_save       what --ep-check-save adds to a save
#     ./benchmarks/one_gpu.sh curves           losses of 500 iterations; DATA=FOLDER, real text
#
# Rows go to benchmarks/results/{layer,gemm,kernels,start,check_save,curves}_$GPU.json; GPU=h100 by default.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}" GPU="${GPU:-h100}" OUT="${OUT:-benchmarks/results}"
bench=("$PYTHON" -m ep_plugin.cli bench)
mkdir -p "$OUT"

run_tests() { "$PYTHON" -m pytest -q -m gpu tests; }

run_sanitizer() {
    local cases
    for cases in kernel_cases routing_kernel_cases peers_cases; do
        compute-sanitizer --error-exitcode 1 "$PYTHON" "tests/helpers/$cases.py" cuda
    done
}

run_layer() {
    local rows="$OUT/layer_$GPU.json"
    "${bench[@]}" layer --warm 10 --repeats 40 --output "$rows"
    "${bench[@]}" layer --warm 10 --repeats 30 --output "$rows" --backends ep_plugin --cuda-graph
    "${bench[@]}" layer --warm 5 --repeats 20 --output "$rows" --backends ep_plugin --cuda-graph \
        --resume --routing zipf one_empty half --plot "$OUT/../layer_$GPU.png"
}

run_gemm() { "${bench[@]}" gemm --warm 5 --repeats 20 --output "$OUT/gemm_$GPU.json"; }

run_kernels() {
    "${bench[@]}" kernels --warm 5 --repeats 30 --output "$OUT/kernels_$GPU.json"
}

run_start() { "$PYTHON" benchmarks/start.py --shapes dsv3 q3-30b --output "$OUT/start_$GPU.json"; }

run_check_save() {
    "$PYTHON" benchmarks/check_save.py --parameters 1e9 2e9 --output "$OUT/check_save_$GPU.json"
}

run_curves() {
    "$PYTHON" benchmarks/curves.py --data "${DATA:-data/quickstart}" \
        --output "$OUT/curves_$GPU.json" --plot "$OUT/../curves_$GPU.png"
}

if (($# == 0)); then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    exit 2
fi
for step in "$@"; do
    case "$step" in
    tests | sanitizer | layer | gemm | kernels | start | check_save | curves) "run_$step" ;;
    *)
        echo "error: steps are tests, sanitizer, layer, gemm, kernels, start, check_save, curves; got '$step'" >&2
        exit 2
        ;;
    esac
done
