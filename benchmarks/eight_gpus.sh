#!/usr/bin/env bash
# How speed and memory scale with expert parallelism on the GPUs of one host, and real-size models
# beside Megatron's own MoE. Each step takes a few minutes and can be repeated alone:
#
#     ./benchmarks/eight_gpus.sh ep1 ep2 ep4 ep8  the layer at EP = 1, 2, 4, 8
#     ./benchmarks/eight_gpus.sh qwen3 mixtral    tokens per second in Megatron's loop, bf16 and FP8
#     ./benchmarks/eight_gpus.sh layouts          tensor, pipeline and expert parallelism compared
#     ./benchmarks/eight_gpus.sh scaling          efficiency over EP, a table and a picture
#     ./benchmarks/eight_gpus.sh foreseen         measured exchanges beside the network model's
#
# RANKS=8 by default, and QWEN3_LAYERS=12, MIXTRAL_LAYERS=6, ITERATIONS=50: fewer GPUs want less of
# each. Rows go to benchmarks/results/eight_gpus.json. To see that it works without GPUs:
# SMALL=1 RANKS=8 OUT=runs/eight_gpus ./benchmarks/eight_gpus.sh ep1 ep8 qwen3 scaling
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}" RANKS="${RANKS:-8}" OUT="${OUT:-benchmarks/results}"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export CUDA_DEVICE_MAX_CONNECTIONS=1
rows="$OUT/eight_gpus.json"
mkdir -p "$OUT"
if [[ -n "${SMALL:-}" ]]; then
    shapes=(tiny) repeats=2 iterations="${ITERATIONS:-3}" size=(--num-layers 2 --sequence 32)
    qwen3=(--model qwen3-nano "${size[@]}") mixtral=(--model mixtral-nano "${size[@]}")
else
    shapes=(dsv3 q3-235b q3-30b-ep8 mixtral) repeats=20 iterations="${ITERATIONS:-50}"
    qwen3=(--model qwen3-30b-a3b --num-layers "${QWEN3_LAYERS:-12}" --sequence 4096)
    mixtral=(--model mixtral-8x7b --num-layers "${MIXTRAL_LAYERS:-6}" --sequence 4096)
fi
on_gpus() { "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }
precisions=(bf16 fp8) alone=(ep_plugin megatron)
if ! { on_gpus && "$PYTHON" -c 'import transformer_engine' 2>/dev/null; }; then
    precisions=(bf16) alone=(ep_plugin) # Megatron has FP8 experts with Transformer Engine alone
fi

run_ep() {
    if [[ "$1" == 1 ]]; then
        local layer=("$PYTHON" -m ep_plugin.cli bench layer --shapes "${shapes[@]}"
            --repeats "$repeats" --warm 5 --resume --output "$rows")
        "${layer[@]}" --backends "${alone[@]}"
        if on_gpus; then "${layer[@]}" --backends ep_plugin --cuda-graph; fi
        return
    fi
    local bench=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$1"
        -m ep_plugin.cli bench overlap --shapes "${shapes[@]}" --repeats "$repeats" --warm 5
        --resume --output "$rows" --recipes off rowwise)
    if on_gpus; then "${bench[@]}" --cuda-graph; fi
    "${bench[@]}" --dispatchers alltoall+dedup symm_mem
}

train() {
    "$PYTHON" benchmarks/train_ep.py --ranks "$RANKS" --iterations "$iterations" --micro-batch 1 \
        --batch "$((4 * RANKS))" --output "$rows" "$@"
}

run_qwen3() {
    local sides=(ep_plugin megatron)
    if on_gpus; then sides=(ep_plugin graph megatron); fi
    train "${qwen3[@]}" --precision "${precisions[@]}" --sides "${sides[@]}"
}
run_mixtral() { train "${mixtral[@]}" --precision "${precisions[@]}"; }
run_layouts() {
    local half=$((RANKS / 2))
    train "${qwen3[@]}" --layouts "ep=$RANKS" "tp=2,ep=$half" "pp=2,ep=$half"
}

run_scaling() { "$PYTHON" benchmarks/scaling.py "$rows" --plot "$OUT/../scaling.png"; }

foresee() { # NAME FLAG ...
    "$PYTHON" -m ep_plugin.cli plan --ep 2 4 8 --measured "$rows" \
        --plot "$OUT/../network_$1.png" "${@:2}"
}

run_foreseen() {
    if [[ -n "${SMALL:-}" ]]; then
        foresee tiny --tokens 64 --topk 2 --hidden 128 --experts 32
        return
    fi
    foresee dsv3 --tokens 8192 --topk 4 --hidden 7168
    foresee q3-235b --tokens 8192 --topk 8 --hidden 4096 --experts 128
}

if (($# == 0)); then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    exit 2
fi
for step in "$@"; do
    case "$step" in
    qwen3 | mixtral | layouts | scaling | foreseen) "run_$step" ;;
    ep[1-9]) run_ep "${step#ep}" ;;
    *)
        echo "error: steps are ep1 to ep9, qwen3, mixtral, layouts, scaling, foreseen; got '$step'" >&2
        exit 2
        ;;
    esac
done
