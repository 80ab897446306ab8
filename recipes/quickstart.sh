#!/usr/bin/env bash
# The whole way on one machine: data, dense pretraining, conversion, expert-parallel pretraining, report.
#
#   ./recipes/quickstart.sh
#   RANKS=4 EXPERTS=16 TOPK=4 RUN_DIR=runs/wide ./recipes/quickstart.sh
#   DATA_INPUT=my/texts DENSE_ITERS=1000 MOE_ITERS=1000 ./recipes/quickstart.sh
#   ./recipes/quickstart.sh --help
#
# Without a GPU it runs on the CPU with gloo; with GPUs it uses NCCL, bf16 and one rank per GPU.
# A second run picks up what is there. Every setting can be overridden from the environment:
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/_check.sh
help_or_nothing recipes/quickstart.sh "$@"

RUN_DIR="${RUN_DIR:-runs/quickstart}"       # checkpoints, logs, report
DATA_DIR="${DATA_DIR:-data/quickstart}"     # tokenizer and tokens
DATA_INPUT="${DATA_INPUT:-}"                # folder or file; empty: Python's standard library
RANKS="${RANKS:-}"                          # empty: as many as GPUs, else 2
EXPERTS="${EXPERTS:-8}"                     # experts per layer
TOPK="${TOPK:-2}"                           # experts per token
EP="${EP:-}"                                # expert-parallel ranks; empty: gcd(RANKS, EXPERTS)
VOCAB="${VOCAB:-4096}"                      # tokens in the vocabulary
LAYERS="${LAYERS:-4}"
HIDDEN="${HIDDEN:-128}"
FFN="${FFN:-384}"
HEADS="${HEADS:-4}"
SEQ="${SEQ:-256}"
MICRO_BATCH="${MICRO_BATCH:-8}"             # samples per rank at once
GLOBAL_BATCH="${GLOBAL_BATCH:-}"            # samples per iteration; empty: 16 or the next that fits
LR="${LR:-3e-3}"
DENSE_ITERS="${DENSE_ITERS:-160}"           # iterations of dense pretraining
MOE_ITERS="${MOE_ITERS:-160}"               # iterations after the conversion
EVAL_INTERVAL="${EVAL_INTERVAL:-40}"
EVAL_ITERS="${EVAL_ITERS:-8}"               # batches in each validation
SPLIT="${SPLIT:-98,1,1}"                    # training, validation, test
MODEL_CLASS="${MODEL_CLASS:-}"              # gpt or hybrid; empty: hybrid, or what is in RUN_DIR
EP_PYTHON="${EP_PYTHON:-}"                  # interpreter to use instead of searching for one

source recipes/_setup.sh
started=$SECONDS
setup_project || exit $?
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS=ignore
export MODEL_CLASS

settle_sizes() {
    # Sets EP and GLOBAL_BATCH where they are empty; refuses sizes that only a later step would.
    local gcd rest batch
    whole 1 RANKS EXPERTS TOPK MICRO_BATCH ${EP:+EP} ${GLOBAL_BATCH:+GLOBAL_BATCH} VOCAB LAYERS \
        HIDDEN FFN HEADS SEQ DENSE_ITERS MOE_ITERS EVAL_INTERVAL EVAL_ITERS
    number LR
    if [[ -n "$MODEL_CLASS" ]]; then one_of MODEL_CLASS hybrid gpt; fi
    ((HIDDEN % HEADS == 0)) || refuse "HEADS must divide HIDDEN; got HIDDEN=$HIDDEN," \
        "HEADS=$HEADS; use HIDDEN=$(((HIDDEN + HEADS - 1) / HEADS * HEADS))"
    [[ "$SPLIT" =~ ^[0-9.]+,[0-9.]+,[0-9.]+$ ]] || refuse "SPLIT must be three numbers, for" \
        "training, validation and test; got '$SPLIT'; use SPLIT=98,1,1"
    [[ -z "$DATA_INPUT" || -e "$DATA_INPUT" ]] || refuse "DATA_INPUT must be a folder or a file" \
        "of text; got '$DATA_INPUT', which does not exist; without it Python's library is taken"
    not_a_file RUN_DIR DATA_DIR
    gcd=$RANKS rest=$EXPERTS
    while ((rest > 0)); do
        read -r gcd rest <<<"$rest $((gcd % rest))"
    done
    EP="${EP:-$gcd}"
    ((gcd % EP == 0)) || refuse "EP must divide RANKS and EXPERTS; got EP=$EP, RANKS=$RANKS," \
        "EXPERTS=$EXPERTS; use EP=$gcd"
    ((TOPK <= EXPERTS)) || refuse "TOPK must be at most EXPERTS; got TOPK=$TOPK," \
        "EXPERTS=$EXPERTS; use TOPK=$EXPERTS"
    batch=$((MICRO_BATCH * RANKS))
    GLOBAL_BATCH="${GLOBAL_BATCH:-$(((15 + batch) / batch * batch))}"
    ((GLOBAL_BATCH % batch == 0)) || refuse "GLOBAL_BATCH must be a multiple of" \
        "MICRO_BATCH x RANKS; got GLOBAL_BATCH=$GLOBAL_BATCH," \
        "MICRO_BATCH=$MICRO_BATCH, RANKS=$RANKS; use" \
        "GLOBAL_BATCH=$(((GLOBAL_BATCH + batch - 1) / batch * batch))"
}

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [[ "${EP_PLUGIN_DEVICE:-}" == cpu ]]; then gpus=0; fi
if ((gpus > 0)); then device="cuda"; else device="cpu"; fi
RANKS="${RANKS:-$((gpus > 0 ? gpus : 2))}"
settle_sizes
mkdir -p "$RUN_DIR/logs"

why() {
    # why LOG: the first error with the lines around it, or else the last lines. Torchrun's own
    # report, which names no cause but a signal, begins where it stops the other ranks.
    local torchrun='torch/distributed/elastic/.*(closing signal|failed \(exitcode)'
    local raised='^(\[rank[0-9]+\]: ?)?[A-Za-z_.]*(Error|Exception|Interrupt|StopIteration)(:|$)'
    grep -E -m 1 -B 12 -A 3 "$raised|(^|: )error: " <(sed -E "\\#$torchrun#,\$d" "$1") ||
        tail -n 20 "$1"
}

step() {
    # step NAME OUTPUT COMMAND...: run it with a log; stop with what went wrong when it fails.
    local name="$1" output="$2" log="$RUN_DIR/logs/$1.log" code=0
    shift 2
    echo "$name -> $output (log: $log)"
    python recipes/_measure.py "$RUN_DIR/logs/$name.usage.json" "$@" >"$log" 2>&1 || code=$?
    if ((code != 0)); then
        echo "error: step $name failed with exit code $code; from $log:" >&2
        why "$log" >&2
        exit "$code"
    fi
    grep -E '^ep_plugin' "$log" | sed 's/^/    /' || true
}

train() {
    # train NAME OUTPUT FLAGS...: Megatron's loop over recipes/pretrain_gpt.py, with the plugin.
    local name="$1" output="$2"
    shift 2
    step "$name" "$output" torchrun --standalone --nproc-per-node "$RANKS" \
        -m ep_plugin.run recipes/pretrain_gpt.py "${MODEL[@]}" "$@"
}

MODEL=(
    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN"
    --num-attention-heads "$HEADS" --seq-length "$SEQ" --max-position-embeddings "$SEQ"
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --lr "$LR" --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
    --adam-beta2 0.95 --init-method-std 0.02 --seed 1234
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA_DIR/tokenizer.model"
    --data-path "$DATA_DIR/corpus" --split "$SPLIT" --num-workers 0
    --data-cache-path "$RUN_DIR/cache"
    --log-interval 5 --tensorboard-log-interval 5 --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
    --ckpt-format torch_dist --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    --transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-rope-fusion # what needs no Transformer Engine and no apex
)
if ((gpus > 0)); then MODEL+=(--bf16); fi
EXPERT_PARALLEL=(
    --num-experts "$EXPERTS" --moe-router-topk "$TOPK" --moe-aux-loss-coeff 1e-2
    --moe-router-dtype fp32 --expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1
)
half=$((DENSE_ITERS + MOE_ITERS / 2)) total=$((DENSE_ITERS + MOE_ITERS))
dense="$RUN_DIR/dense" converted="$RUN_DIR/converted" moe="$RUN_DIR/moe"

reached() {
    # reached FOLDER ITERATION: whether a checkpoint of that iteration is there.
    [[ "$(cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null || echo -1)" -ge "$2" ]]
}

step data "$DATA_DIR" python recipes/prepare_data.py ${DATA_INPUT:+"$DATA_INPUT"} \
    --output "$DATA_DIR" --vocab-size "$VOCAB"

if reached "$dense" "$DENSE_ITERS"; then
    echo "dense -> $dense is there"
else
    train dense "$dense" --train-iters "$DENSE_ITERS" --lr-decay-iters "$((2 * DENSE_ITERS))" \
        --save "$dense" --load "$dense" --save-interval "$DENSE_ITERS" \
        --tensorboard-dir "$RUN_DIR/tensorboard/dense"
fi

if reached "$converted" "$DENSE_ITERS"; then
    echo "convert -> $converted is there"
else
    step convert "$converted" ep-plugin convert --from "$dense" --to "$converted" \
        --num-experts "$EXPERTS" --topk "$TOPK"
    tail -n 25 "$RUN_DIR/logs/convert.log" | sed 's/^/    /'
fi

evaluate() {
    # evaluate NAME FLAGS...: validation alone, from the first validation sample on.
    local name="$1"
    shift
    if [[ ! -f "$RUN_DIR/logs/$name.usage.json" ]]; then
        train "$name" "$RUN_DIR/logs/$name.log" --train-iters "$total" --finetune --skip-train "$@"
    fi
}
evaluate evaluate-dense --load "$dense"
evaluate evaluate-converted --load "$converted" "${EXPERT_PARALLEL[@]}"

# The run goes on at the iteration and the place in the data, and starts an optimizer of its own.
schedule=(--train-iters "$total" --lr-decay-iters "$MOE_ITERS"
    --tensorboard-dir "$RUN_DIR/tensorboard/moe" --save "$moe" --save-interval "$total")
if ! reached "$moe" "$half"; then
    train moe "$moe" "${EXPERT_PARALLEL[@]}" "${schedule[@]}" --exit-interval "$half" \
        --load "$converted" --no-load-optim --no-load-rng
fi
if reached "$moe" "$total"; then
    echo "resume -> $moe is there"
else
    train resume "$moe" "${EXPERT_PARALLEL[@]}" "${schedule[@]}" --load "$moe"
fi

evaluate evaluate-moe --load "$moe" "${EXPERT_PARALLEL[@]}"

step report "$RUN_DIR/report.html" ep-plugin report --run "$RUN_DIR" --device "$device" \
    --ranks "$RANKS" --ep "$EP" --experts "$EXPERTS" --topk "$TOPK" \
    --resumed-at-iteration "$half"
cat "$RUN_DIR/summary.json"
echo "done in $((SECONDS - started)) s: open $RUN_DIR/report.html"
