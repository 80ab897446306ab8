#!/usr/bin/env bash
# One launcher for every model and layout; the rest is data in models/ and layouts/. See --help.
set -euo pipefail
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

names() {
    # names FOLDER: the recipes in it, on one line.
    local file found=()
    for file in "$recipes/$1"/*.sh; do
        file="${file##*/}"
        found+=("${file%.sh}")
    done
    echo "${found[*]}"
}

usage() {
    cat <<EOF
usage: MODEL=NAME LAYOUT=NAME ./recipes/run.sh PRETRAIN_SCRIPT [MEGATRON_FLAGS ...]

Trains a published system with your own Megatron pretrain script, which stays as it is, under
torchrun on this node. Flags given here win over those of the recipe.

models:   $(names models)
layouts:  $(names layouts)
What fits where, and what is published of each schedule, stands on top of its file in
$recipes/models.

from the environment:
  DRY_RUN=1        print the command and do nothing
  DATA_PATH        prefix of Megatron's .bin and .idx files; without it mock data
  TOKENIZER        folder, file or name of the tokenizer; without it numbers are tokens
  TOKENIZER_TYPE   Megatron's name of its kind (HuggingFaceTokenizer)
  NAME             of the run (MODEL-LAYOUT)
  RUN_DIR          its folder, shared by all nodes (runs/NAME)
  SAVE             checkpoints, optimizer included (RUN_DIR/checkpoints); a run continues from the
                   one that is there
  LOAD             checkpoint to start from, weights alone, until SAVE has one
  SCHEDULE=own     leave batch, learning rate and length to your flags
  RECOMPUTE        full or none: compute each layer again in the backward (the model's choice)
  WANDB_PROJECT    log to Weights & Biases too
  NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT
                   as torchrun's (1 node of 8, or as many as the layout needs)

examples:
  MODEL=qwen3-nano LAYOUT=ep2 ./recipes/run.sh recipes/pretrain_gpt.py --exit-interval 20
  MODEL=ds-350m-moe128 LAYOUT=ep8 DATA_PATH=data/corpus TOKENIZER=gpt2 \\
      ./recipes/run.sh pretrain_gpt.py
  DRY_RUN=1 MODEL=deepseek-v3 LAYOUT=ep64-pp16 NNODES=128 MASTER_ADDR=node0 \\
      ./recipes/run.sh pretrain_gpt.py
  MODEL=qwen3-30b-a3b LAYOUT=ep8-pp4 sbatch --nodes 4 recipes/slurm/pretrain.sbatch pretrain_gpt.py
EOF
}

refuse() {
    echo "error: $*" >&2
    exit 2
}

given() {
    # given FLAG WORDS...: whether FLAG is among them, also as FLAG=VALUE.
    local flag="$1" word
    shift
    for word in "$@"; do
        if [[ "$word" == "$flag" || "$word" == "$flag="* ]]; then return 0; fi
    done
    return 1
}

if (($# == 0)); then
    usage >&2
    exit 2
fi
if [[ "$1" == -h || "$1" == --help ]]; then
    usage
    exit 0
fi
pretrain="$1"
shift

MODEL="${MODEL:-}" LAYOUT="${LAYOUT:-}"
[[ -n "$MODEL" && -f "$recipes/models/$MODEL.sh" ]] ||
    refuse "MODEL must be one of $(names models); got '$MODEL'"
[[ -n "$LAYOUT" && -f "$recipes/layouts/$LAYOUT.sh" ]] ||
    refuse "LAYOUT must be one of $(names layouts); got '$LAYOUT'"

# What the two files set; RECOMPUTE is the model's unless the user has chosen.
GPUS=1 PP=1 VOCAB=
MODEL_ARGS=() TRAIN_ARGS=() PARALLEL_ARGS=() ENVIRONMENT=()
declare -A PIPELINE_LAYOUT=() # PP -> how layers are split where they do not divide evenly
# shellcheck source=/dev/null
source "$recipes/models/$MODEL.sh"
# shellcheck source=/dev/null
source "$recipes/layouts/$LAYOUT.sh"
if [[ -n "${PIPELINE_LAYOUT[$PP]:-}" ]]; then
    PARALLEL_ARGS+=(--pipeline-model-parallel-layout "${PIPELINE_LAYOUT[$PP]}")
fi

RECOMPUTE="${RECOMPUTE:-none}" SCHEDULE="${SCHEDULE:-published}"
case "$RECOMPUTE" in
    none) ;;
    full)
        MODEL_ARGS+=(--recompute-granularity full --recompute-method uniform)
        MODEL_ARGS+=(--recompute-num-layers 1)
        ;;
    *) refuse "RECOMPUTE must be full or none; got '$RECOMPUTE'" ;;
esac
case "$SCHEDULE" in
    published) ;;
    own) TRAIN_ARGS=() ;;
    *) refuse "SCHEDULE must be published or own; got '$SCHEDULE'" ;;
esac

NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}"
MASTER_ADDR="${MASTER_ADDR:-}" MASTER_PORT="${MASTER_PORT:-29500}"
for name in NNODES NPROC_PER_NODE; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] ||
        refuse "$name must be a whole number from 1 on; got '${!name}'"
done
if ((NNODES * NPROC_PER_NODE % GPUS)); then
    nodes=1
    while ((nodes * NPROC_PER_NODE % GPUS)); do nodes=$((nodes + 1)); done
    refuse "LAYOUT=$LAYOUT needs a multiple of $GPUS GPUs; got NNODES=$NNODES with" \
        "NPROC_PER_NODE=$NPROC_PER_NODE; use NNODES=$nodes"
fi
if ((NNODES > 1)); then
    [[ -n "$MASTER_ADDR" ]] || refuse "NNODES=$NNODES needs MASTER_ADDR, the host of NODE_RANK=0"
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
    rendezvous=(--standalone) # a free port of its own
fi

NAME="${NAME:-$MODEL-$LAYOUT}"
RUN_DIR="${RUN_DIR:-runs/$NAME}"
SAVE="${SAVE:-$RUN_DIR/checkpoints}" LOAD="${LOAD:-}"
DATA_PATH="${DATA_PATH:-}" TOKENIZER="${TOKENIZER:-}" WANDB_PROJECT="${WANDB_PROJECT:-}"

# The optimizer is saved in a form that another layout can read.
RUN_ARGS=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --save "$SAVE" --save-interval 500 --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
    --exit-signal-handler # SIGTERM: save, then exit
    --log-interval 10 --log-throughput --tensorboard-dir "$RUN_DIR/tensorboard"
    --eval-interval 1000 --eval-iters 10 --data-cache-path "$RUN_DIR/cache"
)
if [[ -f "$SAVE/latest_checkpointed_iteration.txt" ]]; then
    RUN_ARGS+=(--load "$SAVE")
elif [[ -n "$LOAD" ]]; then
    RUN_ARGS+=(--load "$LOAD" --finetune)
fi
if [[ -n "$DATA_PATH" ]]; then
    RUN_ARGS+=(--data-path "$DATA_PATH")
elif ! given --data-path "$@" && ! given --data-args-path "$@" &&
    ! given --per-split-data-args-path "$@"; then
    RUN_ARGS+=(--mock-data)
fi
if [[ -n "$TOKENIZER" ]]; then
    RUN_ARGS+=(--tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}")
    RUN_ARGS+=(--tokenizer-model "$TOKENIZER")
elif ! given --tokenizer-type "$@"; then
    RUN_ARGS+=(--tokenizer-type NullTokenizer --vocab-size "$VOCAB")
fi
if [[ -n "$WANDB_PROJECT" ]]; then
    RUN_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$NAME")
fi

command=(
    env "${ENVIRONMENT[@]}" torchrun --nproc-per-node "$NPROC_PER_NODE" "${rendezvous[@]}"
    -m ep_plugin.run "$pretrain"
    "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${RUN_ARGS[@]}" "$@"
)

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q' "${command[0]}"
    for word in "${command[@]:1}"; do
        if [[ "$word" == --* || "$word" == -m ]]; then printf ' \\\n   '; fi
        printf ' %q' "$word"
    done
    echo
    exit 0
fi
[[ -f "$pretrain" ]] || refuse "PRETRAIN_SCRIPT must be a file; got '$pretrain', which is not here"
command -v torchrun >/dev/null ||
    refuse "torchrun is not on PATH; activate the environment that ep_plugin is installed in"
exec "${command[@]}"
