#!/usr/bin/env bash
# One layer beside its peers at their best, on one GPU, in steps that each end below nine minutes:
#
#     ./benchmarks/peers.sh rates             what this GPU reaches, and the terms of all floors
#     ./benchmarks/peers.sh ours              ours alone, all shapes: in a graph, then launched
#     ./benchmarks/peers.sh layer cutlass     every way of Megatron, then those by CUTLASS
#     ./benchmarks/peers.sh liger             Liger's, which compiles for minutes at each shape
#     ./benchmarks/peers.sh graph             in a CUDA graph; Megatron's with drop-and-pad alone, by CUTLASS too
#     ./benchmarks/peers.sh titan             torchtitan's minimal_async_ep, each shape in its own process
#     ./benchmarks/peers.sh many wide         gpt-oss-120b and Qwen3-Next; GLM, OLMoE, DeepSeek, Mixtral
#     ./benchmarks/peers.sh skew              balanced beside zipf1.2 and recorded routing
#     ./benchmarks/peers.sh gemm gemm_cutlass the products alone, gradients added to fp32 too
#
# Rows go to benchmarks/results/{peers,gemm_peers}_$GPU.json; GPU=h200 by default. A peer that cannot run
# is named with the reason ("not measured: ..."), and the others go on. A step that is cut at its
# limit keeps the rows that it has; started again it goes on from there.
# To see that it works without a GPU: SHAPES=tiny REPEATS=2 OUT=runs/peers ./benchmarks/peers.sh layer
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}" GPU="${GPU:-h200}" OUT="${OUT:-benchmarks/results}"
REPEATS="${REPEATS:-20}" LIMIT="${LIMIT:-520}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" # also where the package is not installed
layers="$OUT/peers_$GPU.json" products="$OUT/gemm_peers_$GPU.json"
mkdir -p "$OUT"

bench() { # BENCH OUTPUT "SHAPES" FLAG ...
    local shapes
    read -ra shapes <<<"${SHAPES:-$3}"
    timeout "$LIMIT" "$PYTHON" -m ep_plugin.cli bench "$1" --shapes "${shapes[@]}" --warm 5 \
        --repeats "$REPEATS" --resume --output "$2" "${@:4}" && return
    local code=$?
    ((code != 124)) && return "$code"
    echo "cut at LIMIT=$LIMIT seconds; what is measured is in $2: start the step again" >&2
    return 1
}
with_cutlass() { NVTE_USE_CUTLASS_GROUPED_GEMM=1 "$@"; }

five="q3-30b q3-30b-ep8 dsv3 q3-235b mixtral"
many="gpt-oss-120b qwen3-next" wide="glm-4.5-air olmoe deepseek-v2-lite mixtral-1024 mixtral-256"

run_rates() {
    local shapes
    read -ra shapes <<<"${SHAPES:-$five $many $wide}"
    timeout "$LIMIT" "$PYTHON" -m ep_plugin.cli bench layer --explain --shapes "${shapes[@]}"
}
run_ours() { # kernels of several shapes are compiled side by side first, and kept by Triton
    local shape unread
    unread="$(mktemp -d)"
    for shape in q3-30b mixtral-256 qwen3-next; do
        SHAPES="$shape" REPEATS=1 bench layer "$unread/$shape.json" "$shape" --cuda-graph --backends ep_plugin >/dev/null &
    done
    wait
    rm -r "$unread"
    bench layer "$layers" "$five $many $wide" --cuda-graph --backends ep_plugin
    bench layer "$layers" "$five $many $wide" --backends ep_plugin
}
run_layer() { bench layer "$layers" "$five" --skip liger; }
run_liger() { bench layer "$layers" "$five" --precision bf16 --backends liger; }
run_cutlass() {
    with_cutlass bench layer "$layers" "$five $many" --backends megatron --precision bf16
}
run_graph() { # a capture that fails ends its process: each peer has its own
    bench layer "$layers" "$five" --cuda-graph --backends ep_plugin torch
    for peer in megatron torchtitan; do
        bench layer "$layers" "$five" --cuda-graph --backends "$peer" ||
            echo "not measured in a graph: $peer; the reason is above" >&2
    done
    with_cutlass bench layer "$layers" "$five" --cuda-graph --backends megatron --precision bf16 ||
        echo "not measured in a graph: megatron with CUTLASS; the reason is above" >&2
}
run_titan() {
    local shapes shape
    read -ra shapes <<<"${SHAPES:-$five}"
    for shape in "${shapes[@]}"; do
        SHAPES="$shape" bench layer "$layers" "$shape" --backends torchtitan --precision bf16
    done
}
run_many() { bench layer "$layers" "$many" --skip liger; }
run_wide() { bench layer "$layers" "$wide" --skip liger; }
run_skew() {
    bench layer "$layers" "q3-30b gpt-oss-120b" --routing zipf1.2 recorded --backends ep_plugin torch
}
run_gemm() { bench gemm "$products" "$five"; }
run_gemm_cutlass() {
    with_cutlass bench gemm "$products" "$five" --backends transformer_engine --precision bf16
}

if (($# == 0)); then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    exit 2
fi
for step in "$@"; do
    case "$step" in
    rates | ours | layer | cutlass | liger | graph | titan | many | wide | skew | gemm | gemm_cutlass) "run_$step" ;;
    *)
        echo "error: steps are rates, ours, layer, cutlass, liger, graph, titan, many, wide, skew, gemm, gemm_cutlass; got '$step'" >&2
        exit 2
        ;;
    esac
done
