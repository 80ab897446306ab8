#!/usr/bin/env bash
# Megatron's loop beside ours, both with all that is fast, on two GPUs; qwen3-30b-a3b's layers.
# Each step ends below nine minutes. On two H200 a side takes some 75 seconds, most of them to start: `one` and `two`
# are cut, and go on where they are started again.
#
#     ./benchmarks/loop.sh one two four     sequences a micro-batch, 4 layers: ours, Megatron's ways
#     ./benchmarks/loop.sh deep             12 layers, two sequences: what a layer costs
#     ./benchmarks/loop.sh fp8              ours, Megatron's recipes delayed, tensorwise and blockwise
#     ./benchmarks/loop.sh balanced         routing in forced balance on both sides
#
# Rows go to benchmarks/results/loop_$GPU.json, with switches and the attention taken; GPU=h200 by default.
# A side that cannot run, or takes over MINUTES, is named with the reason; its log is in runs/train_ep.
# To see that it works without GPUs:
# SMALL=1 OUT=runs/loop ./benchmarks/loop.sh one
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}" GPU="${GPU:-h200}" OUT="${OUT:-benchmarks/results}" RANKS="${RANKS:-2}"
LIMIT="${LIMIT:-520}" ITERATIONS="${ITERATIONS:-12}" BATCH="${BATCH:-16}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" # also where the package is not installed
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
rows="$OUT/loop_$GPU.json"
mkdir -p "$OUT"
model=(--model qwen3-30b-a3b --sequence 4096) shallow=4 deep=12
if [[ -n "${SMALL:-}" ]]; then
    model=(--model qwen3-nano --sequence 32) shallow=1 deep=2 ITERATIONS=3
fi
ours=(layers graph graph-serial ep_plugin)
if ! "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    ours=(ep_plugin) # graphs are captured on GPUs alone
fi
# The two figures that are published first, should a step be cut.
theirs=(megatron-defaults megatron-graphs-cutlass megatron-graphs megatron-drop_and_pad megatron-all
    megatron-cutlass megatron-overlap megatron)

train() { # FLAG ...
    timeout "$LIMIT" "$PYTHON" benchmarks/train_ep.py --ranks "$RANKS" "${model[@]}" \
        --iterations "$ITERATIONS" --batch "$BATCH" --minutes "${MINUTES:-2}" --resume --output "$rows" "$@" &&
        return
    local code=$?
    ((code != 124)) && return "$code"
    echo "cut at LIMIT=$LIMIT seconds; what is measured is in $rows: start the step again" >&2
    return 1
}

run_one() {
    train --micro-batch 1 --num-layers "$shallow" --sides "${ours[@]}" "${theirs[@]}"
}
run_two() {
    train --micro-batch 2 --num-layers "$shallow" --sides "${ours[@]}" "${theirs[@]}"
}
run_four() {
    train --micro-batch 4 --num-layers "$shallow" --sides "${ours[@]}" megatron-graphs \
        megatron-graphs-cutlass megatron-all
}
run_deep() {
    train --micro-batch 2 --num-layers "$shallow" "$deep" --sides "${ours[@]}" megatron-graphs \
        megatron-graphs-cutlass
}
run_fp8() {
    train --micro-batch 2 --num-layers "$shallow" --precision fp8 --sides "${ours[@]}"
    for recipe in delayed tensorwise blockwise; do
        train --micro-batch 2 --num-layers "$shallow" --precision fp8 --fp8-recipe "$recipe" \
            --sides megatron-graphs
    done
}
run_balanced() {
    train --micro-batch 2 --num-layers "$shallow" --force-balance --sides "${ours[@]}" \
        megatron-graphs megatron-graphs-cutlass megatron-all
}

if (($# == 0)); then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    exit 2
fi
for step in "$@"; do
    case "$step" in
    one | two | four | deep | fp8 | balanced) "run_$step" ;;
    *)
        echo "error: steps are one, two, four, deep, fp8, balanced; got '$step'" >&2
        exit 2
        ;;
    esac
done
