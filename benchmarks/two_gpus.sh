#!/usr/bin/env bash
# Expert parallelism on two GPUs of one host: right, how fast, how much hidden; beside Megatron.
#
#     ./benchmarks/two_gpus.sh [STEP ...]        steps: tests bench train (default: these, in turn)
#                                          and train_fp8, which takes Transformer Engine
#
# Rows go to benchmarks/results/two_gpus.json, a timeline beside it; each step can be repeated alone.
# RANKS=N for more GPUs, DATA=FOLDER for text that recipes/prepare_data.py wrote (default: mock data).
# Without GPUs the same commands run on the CPU with tiny sizes, to see that they work:
# SHAPES=tiny REPEATS=2 OUT=runs/two_gpus ITERATIONS=4 ./benchmarks/two_gpus.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}" RANKS="${RANKS:-2}" OUT="${OUT:-benchmarks/results}"
SHAPES="${SHAPES:-dsv3 q3-235b q3-30b-ep8}" REPEATS="${REPEATS:-20}" ITERATIONS="${ITERATIONS:-100}"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
ranks=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS")
read -ra shapes <<<"$SHAPES"
mkdir -p "$OUT"

run_tests() {
    local side_by_side=() files
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        side_by_side=(-n auto --maxprocesses 10)
    fi
    mapfile -t files < <(grep -rl --include 'test_*.py' 'mark\.multi_gpu' tests)
    "$PYTHON" -m pytest -q "${side_by_side[@]}" -m multi_gpu "${files[@]}"
}

run_bench() {
    local bench=("${ranks[@]}" -m ep_plugin.cli bench overlap --shapes "${shapes[@]}" --resume
        --repeats "$REPEATS" --warm 5 --output "$OUT/two_gpus.json")
    local trace=(--trace "$OUT/../two_gpus_trace.json" --trace-plot "$OUT/../two_gpus_trace.png")
    local plot=(--plot "$OUT/../two_gpus.png")
    # On one host; blockwise and hierarchical in steps that the host launches are left out.
    local ways=(--recipes off rowwise
        --dispatchers alltoall alltoall+dedup alltoall+dedup+fp8 symm_mem)
    if "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        "${bench[@]}" --cuda-graph "${trace[@]}"
        "${bench[@]}" "${ways[@]}" "${plot[@]}"
    else
        "${bench[@]}" "${ways[@]}" "${plot[@]}" "${trace[@]}"
    fi
}

run_train() {
    local data=()
    if [[ -n "${DATA:-}" ]]; then data=(--data "$DATA"); fi
    "$PYTHON" benchmarks/train_ep.py --ranks "$RANKS" --precision "$1" \
        --iterations "$ITERATIONS" "${data[@]}" --output "$OUT/two_gpus.json"
}

for step in "${@:-tests bench train}"; do
    for name in $step; do
        case "$name" in
        tests | bench) "run_$name" ;;
        train) run_train bf16 ;;
        train_fp8) run_train fp8 ;;
        *)
            echo "error: steps are tests, bench, train, train_fp8; got '$name'" >&2
            exit 2
            ;;
        esac
    done
done
