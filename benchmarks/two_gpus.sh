#!/usr/bin/env bash
# Expert parallelism on two GPUs of one host: right, how fast, how much hidden; beside Megatron.
#
#     ./benchmarks/two_gpus.sh [STEP ...]        steps: tests bench train (default: all, in turn)
#
# Rows go to benchmarks/results/two_gpus.json, a timeline beside it; each step can be repeated alone.
# RANKS=N for more GPUs, DATA=FOLDER for text that recipes/prepare_data.py wrote (default: mock data).
# Without GPUs the same commands run on the CPU with tiny sizes, to see that they work:
# SHAPES=tiny REPEATS=2 OUT=runs/two_gpus ITERATIONS=4 ./benchmarks/two_gpus.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}" RANKS="${RANKS:-2}" OUT="${OUT:-benchmarks/results}"
SHAPES="${SHAPES:-dsv3 q3-235b q3-30b-ep8}" REPEATS="${REPEATS:-30}" ITERATIONS="${ITERATIONS:-100}"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
ranks=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS")
read -ra shapes <<<"$SHAPES"
mkdir -p "$OUT"

run_tests() {
    "$PYTHON" -m pytest -q -m multi_gpu tests
}

run_bench() {
    if "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        "${ranks[@]}" -m ep_plugin.cli bench overlap --shapes "${shapes[@]}" --cuda-graph \
            --repeats "$REPEATS" --warm 5 --resume --output "$OUT/two_gpus.json"
    fi
    "${ranks[@]}" -m ep_plugin.cli bench overlap --shapes "${shapes[@]}" --repeats "$REPEATS" \
        --warm 5 --resume --output "$OUT/two_gpus.json" --plot "$OUT/../two_gpus.png" \
        --trace "$OUT/../two_gpus_trace.json" --trace-plot "$OUT/../two_gpus_trace.png"
}

run_train() {
    local data=() precisions=(bf16 fp8)
    if [[ -n "${DATA:-}" ]]; then data=(--data "$DATA"); fi
    if ! "$PYTHON" -c 'import torch, transformer_engine; assert torch.cuda.is_available()' \
        2>/dev/null; then
        precisions=(bf16) # Megatron has FP8 experts with Transformer Engine alone
    fi
    "$PYTHON" benchmarks/train_ep.py --ranks "$RANKS" --precision "${precisions[@]}" \
        --iterations "$ITERATIONS" "${data[@]}" --output "$OUT/two_gpus.json"
}

for step in "${@:-tests bench train}"; do
    for name in $step; do
        case "$name" in
        tests | bench | train) "run_$name" ;;
        *)
            echo "error: steps are tests, bench, train; got '$name'" >&2
            exit 2
            ;;
        esac
    done
done
