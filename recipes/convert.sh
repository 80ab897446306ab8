#!/usr/bin/env bash
# The commonest conversions, on a small dense model that is trained here first:
#
#   ./recipes/convert.sh
#   ITERS=50 RUN_DIR=runs/longer ./recipes/convert.sh
#   ./recipes/convert.sh --help
#
#   copy      8 experts, top-2, each the whole FFN; the run resumes with its optimizer
#   granular  4 copies of the FFN cut into 4, so 16 experts of a quarter, top-8
#   drop      8 experts beside a shared one, half of each expert's channels drawn anew
#
# To convert a checkpoint of your own, take the `ep-plugin convert` lines. Every setting can be
# overridden from the environment:
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/_check.sh
help_or_nothing recipes/convert.sh "$@"

RUN_DIR="${RUN_DIR:-runs/convert}"          # checkpoints and logs
ITERS="${ITERS:-20}"                        # iterations of dense pretraining
MORE="${MORE:-5}"                           # iterations with experts
RANKS="${RANKS:-2}"                         # and expert-parallel ranks
PROCESSES="${PROCESSES:-1}"                 # that write at once
MODEL_CLASS="${MODEL_CLASS:-}"              # gpt or hybrid; empty: hybrid, or what is in RUN_DIR
EP_PYTHON="${EP_PYTHON:-}"                  # interpreter to use instead of searching for one

whole 1 ITERS MORE RANKS PROCESSES
[[ "$RANKS" =~ ^[124]$ ]] || refuse "RANKS must be 1, 2 or 4, which divide the 8 experts and the" \
    "batch of 16; got RANKS=$RANKS; use RANKS=2"
not_a_file RUN_DIR
if [[ -n "$MODEL_CLASS" ]]; then one_of MODEL_CLASS hybrid gpt; fi

source recipes/_setup.sh
setup_project || exit $?
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS=ignore
export EP_PLUGIN_DEVICE="${EP_PLUGIN_DEVICE:-cpu}" MODEL_CLASS
mkdir -p "$RUN_DIR/logs"
dense="$RUN_DIR/dense"

train() {
    # train NAME FLAGS...: Megatron's loop with the plugin; prints its losses.
    local name="$1" log="$RUN_DIR/logs/$1.log"
    shift
    echo "$name (log: $log)"
    torchrun --standalone --nproc-per-node "$RANKS" -m ep_plugin.run recipes/pretrain_gpt.py \
        "${MODEL[@]}" "$@" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        return 1
    }
    sed -nE 's/.*iteration +([0-9]+)\/.*lm loss: ([^ ]+).*/    loss \1: \2/p' "$log" | tail -n 3
}

MODEL=(
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 4 --global-batch-size 16
    --lr 3e-3 --lr-decay-style constant --seed 1234 --log-interval 1
    --eval-iters 0 --eval-interval 1000
    --mock-data --tokenizer-type NullTokenizer --vocab-size 511 --num-workers 0
    --ckpt-format torch_dist --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    --transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-rope-fusion # what needs no Transformer Engine and no apex
)
# The dense run's schedule goes along with its optimizer, and this run is longer.
MORE_ITERS=(--train-iters "$((ITERS + MORE))" --override-opt-param-scheduler --moe-router-dtype fp32)

if [[ ! -f "$dense/latest_checkpointed_iteration.txt" ]]; then
    train dense --train-iters "$ITERS" --save "$dense" --save-interval "$ITERS"
fi

# Copies keep the function, and the optimizer goes along: the run goes on as if nothing had happened.
ep-plugin convert --from "$dense" --to "$RUN_DIR/copy" --num-experts 8 --topk 2 \
    --processes "$PROCESSES"
ep-plugin convert --check --to "$RUN_DIR/copy"
train copy-continued --load "$RUN_DIR/copy" "${MORE_ITERS[@]}" --num-experts 8 \
    --moe-router-topk 2 --moe-ffn-hidden-size 192 --expert-model-parallel-size "$RANKS"

# Quarters of the FFN, chosen four at a time by the router's virtual groups: the function is kept.
ep-plugin convert --from "$dense" --to "$RUN_DIR/granular" --num-experts 16 --topk 8 \
    --mode granular --granularity 4 --processes "$PROCESSES"
train granular-continued --load "$RUN_DIR/granular" "${MORE_ITERS[@]}" --num-experts 16 \
    --moe-router-topk 8 --moe-ffn-hidden-size 48 --expert-model-parallel-size "$RANKS"

# Experts that differ from the start, and a fresh optimizer: the report says how far the function is.
ep-plugin convert --from "$dense" --to "$RUN_DIR/drop" --num-experts 8 --topk 2 --mode drop \
    --drop-ratio 0.5 --shared-expert copy --drop-optimizer --processes "$PROCESSES"
train drop-continued --load "$RUN_DIR/drop" --finetune --train-iters "$MORE" \
    --moe-router-dtype fp32 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 192 \
    --moe-shared-expert-intermediate-size 192 --expert-model-parallel-size "$RANKS"
