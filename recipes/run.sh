#!/usr/bin/env bash
# One launcher for every model and layout; the rest is data in models/ and layouts/. See --help.
set -euo pipefail
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# recipes/_check.sh and recipes/_model.sh; recipes/schedules/finetune.sh is used below
source "$recipes/_check.sh"
source "$recipes/_model.sh"

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

Trains a published system, or a model of your own, with your own Megatron pretrain script, which
stays as it is, under torchrun on this node. Flags given here win over those of the recipe.

models:   $(names models)
          or a folder that ep-plugin convert wrote, such as MODEL=runs/moe or MODEL=./moe
layouts:  $(names layouts)
What fits where, and what is published of each schedule, stands on top of its file in
$recipes/models.

from the environment:
  DRY_RUN=1        print the command and do nothing; files that only the run reads may be missing
  DATA_PATH        prefix of Megatron's .bin and .idx files; without it mock data
  TOKENIZER        folder, file or name of the tokenizer; without it numbers are tokens
  TOKENIZER_TYPE   Megatron's name of its kind (HuggingFaceTokenizer)
  NAME             of the run (MODEL-LAYOUT)
  RUN_DIR          its folder, shared by all nodes (runs/NAME)
  SAVE             checkpoints, optimizer included (RUN_DIR/checkpoints); a run continues from the
                   one that is there, with the schedule it began with (RUN_DIR/schedule.txt). The
                   third start in a row of one command from one checkpoint, without a newer one, is
                   refused with code 1; remove SAVE/starts.txt to start all the same
  LOAD             checkpoint to start from, weights alone, until SAVE has one (MODEL, where that
                   is a folder)
  SCHEDULE         published: the system's own. finetune: 1000 iterations at a small learning
                   rate, see recipes/schedules. own: batch, learning rate and length are left to
                   your flags. (finetune with LOAD or where MODEL is a folder, else published)
  MODEL_CLASS      gpt or hybrid: what recipes/pretrain_gpt.py trains. Without it a new run trains a
                   HybridModel where Megatron has one that can be this model, a checkpoint goes on
                   as what it is, and the first lines of the log say which
  RECOMPUTE        full or none: compute each layer again in the backward (the model's choice)
  WANDB_PROJECT    log to Weights & Biases too
  NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT
                   as torchrun's (1 node of 8, or as many as the layout needs)

examples:
  MODEL=qwen3-nano LAYOUT=ep2 ./recipes/run.sh recipes/pretrain_gpt.py --exit-interval 20
  MODEL=ds-350m-moe128 LAYOUT=ep8 DATA_PATH=data/corpus TOKENIZER=gpt2 \\
      ./recipes/run.sh pretrain_gpt.py
  MODEL=runs/moe LAYOUT=ep2 DATA_PATH=data/corpus TOKENIZER=models/qwen3 \\
      ./recipes/run.sh pretrain_gpt.py --train-iters 200
  DRY_RUN=1 MODEL=deepseek-v3 LAYOUT=ep64-pp16 NNODES=128 MASTER_ADDR=node0 \\
      ./recipes/run.sh pretrain_gpt.py
  MODEL=qwen3-30b-a3b LAYOUT=ep8-pp4 sbatch --nodes 4 recipes/slurm/pretrain.sbatch pretrain_gpt.py
EOF
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

start_of() {
    # start_of WORDS...: what a run with these flags of the user's starts from, in words.
    local word='' before='' step='' load
    load="$(last_of --load "$SAVE" "$@")"
    for word in "$@"; do
        if [[ "$before" == --ckpt-step ]]; then step="$word"; fi
        if [[ "$word" == --ckpt-step=* ]]; then step="${word#*=}"; fi
        before="$word"
    done
    if [[ -z "$step" ]] && is_checkpoint "$load"; then
        step="$(<"$load/latest_checkpointed_iteration.txt")"
    fi
    echo "from ${step:+iteration }${step:-the beginning}"
}

last_of() {
    # last_of FLAG DEFAULT WORDS...: print FLAG's last value among them, also as FLAG=VALUE.
    local flag="$1" value="$2" before='' word
    shift 2
    for word in "$@"; do
        if [[ "$before" == "$flag" ]]; then value="$word"; fi
        if [[ "$word" == "$flag="* ]]; then value="${word#*=}"; fi
        before="$word"
    done
    echo "$value"
}

divides() {
    # divides WORDS...: Megatron would refuse a batch or layers that the ranks do not divide.
    local name degree ranks=$((NNODES * NPROC_PER_NODE)) degrees=() dp micro batch layers pp
    for name in tensor-model pipeline-model context; do
        degree="$(last_of "--$name-parallel-size" 1 "$@")"
        [[ "$degree" =~ ^[1-9][0-9]{0,5}$ ]] || return 0 # Megatron says what is wrong with it
        degrees+=("$degree") ranks=$((ranks / degree))
    done
    pp="${degrees[1]}" dp=$((ranks > 0 ? ranks : 1))
    micro="$(last_of --micro-batch-size '' "$@")" batch="$(last_of --global-batch-size '' "$@")"
    if [[ "$micro" =~ ^[1-9][0-9]{0,5}$ && "$batch" =~ ^[1-9][0-9]{0,8}$ ]] &&
        ((batch % (micro * dp))); then
        refuse "--global-batch-size must be a multiple of --micro-batch-size times the" \
            "data-parallel ranks; got $batch, with $micro times $dp; use --global-batch-size" \
            "$(((batch + micro * dp - 1) / (micro * dp) * micro * dp))"
    fi
    layers="$(last_of --num-layers '' "$@")"
    if [[ "$layers" =~ ^[1-9][0-9]{0,5}$ ]] && ((layers % pp)) && ! splits_layers "$@"; then
        refuse "--num-layers must be a multiple of the pipeline stages; got $layers, and" \
            "LAYOUT=$LAYOUT has $pp; use --num-layers $(((layers + pp - 1) / pp * pp)), or a LAYOUT" \
            "with other stages"
    fi
}

splits_layers() {
    # splits_layers WORDS...: whether they say themselves which layers each stage has.
    local flag
    for flag in --pipeline-model-parallel-layout --decoder-first-pipeline-num-layers \
        --decoder-last-pipeline-num-layers --account-for-embedding-in-pipeline-split \
        --account-for-loss-in-pipeline-split; do
        if given "$flag" "$@"; then return 0; fi
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

listed() {
    # listed FOLDER NAME MORE: the variable must name a file of the folder, or else what MORE says.
    local known near
    known="$(names "$1")"
    if [[ "${!2}" =~ ^[[:alnum:]._-]+$ && " $known " == *" ${!2} "* ]]; then return 0; fi
    # shellcheck disable=SC2086
    near="$(nearest "${!2}" $known)"
    refuse "$2 must be one of $known$3; got '${!2}'; use $2=${near// / or $2=}"
}

MODEL="${MODEL:-}" LAYOUT="${LAYOUT:-}" LOAD="${LOAD:-}" SCHEDULE="${SCHEDULE:-}"
DRY_RUN="${DRY_RUN:-0}" # check, of slurm/pretrain.sbatch: all checks and nothing else
one_of DRY_RUN 0 1 check

# What the two files set; RECOMPUTE is the model's unless the user has chosen.
GPUS=1 PP=1 VOCAB='' default_schedule=published
MODEL_ARGS=() TRAIN_ARGS=() PARALLEL_ARGS=() ENVIRONMENT=()
declare -A PIPELINE_LAYOUT=() # PP -> how layers are split where they do not divide evenly
folder=no
if [[ "$MODEL" == */* || (-d "$MODEL" && ! -f "$recipes/models/$MODEL.sh") ]]; then
    folder=yes MODEL="${MODEL%/}"
    listed layouts LAYOUT ""
    read_model_folder
else
    listed models MODEL ", or a folder that ep-plugin convert wrote"
    listed layouts LAYOUT ""
    # shellcheck source=/dev/null
    source "$recipes/models/$MODEL.sh"
fi
# shellcheck source=/dev/null
source "$recipes/layouts/$LAYOUT.sh"
if [[ -n "${PIPELINE_LAYOUT[$PP]:-}" ]]; then
    PARALLEL_ARGS+=(--pipeline-model-parallel-layout "${PIPELINE_LAYOUT[$PP]}")
fi

RECOMPUTE="${RECOMPUTE:-none}"
one_of RECOMPUTE full none
if [[ "$RECOMPUTE" == full ]]; then
    MODEL_ARGS+=(--recompute-granularity full --recompute-method uniform)
    MODEL_ARGS+=(--recompute-num-layers 1)
fi

MODEL_CLASS="${MODEL_CLASS:-}"
if [[ -n "$MODEL_CLASS" ]]; then
    one_of MODEL_CLASS hybrid gpt
    if [[ -f "$pretrain" ]] && ! grep -q choose_model_class "$pretrain"; then
        refuse "MODEL_CLASS=$MODEL_CLASS is for recipes/pretrain_gpt.py, and $pretrain trains what" \
            "it builds; leave MODEL_CLASS out, or use recipes/pretrain_gpt.py"
    fi
    ENVIRONMENT+=("MODEL_CLASS=$MODEL_CLASS")
fi

NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}"
MASTER_ADDR="${MASTER_ADDR:-}" MASTER_PORT="${MASTER_PORT:-29500}"
whole 1 NNODES NPROC_PER_NODE MASTER_PORT
whole 0 NODE_RANK
((NODE_RANK < NNODES)) ||
    refuse "NODE_RANK must be below NNODES; got NODE_RANK=$NODE_RANK, NNODES=$NNODES; use" \
        "NNODES=$((NODE_RANK + 1))"
((MASTER_PORT < 65536)) ||
    refuse "MASTER_PORT must be below 65536; got $MASTER_PORT; use MASTER_PORT=29500"
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

NAME="${NAME:-${MODEL##*/}-$LAYOUT}"
RUN_DIR="${RUN_DIR:-runs/$NAME}"
SAVE="${SAVE:-$RUN_DIR/checkpoints}"
DATA_PATH="${DATA_PATH:-}" TOKENIZER="${TOKENIZER:-}" WANDB_PROJECT="${WANDB_PROJECT:-}"
not_a_file RUN_DIR SAVE
if [[ -n "${TOKENIZER_TYPE:-}" && -z "$TOKENIZER" ]]; then
    refuse "TOKENIZER_TYPE=$TOKENIZER_TYPE needs TOKENIZER, the folder, file or name of the" \
        "tokenizer; use TOKENIZER=FOLDER too"
fi

# A run that continues keeps the schedule it began with. A new one takes it from SCHEDULE, or from
# what it starts with: weights that are trained already are not pretrained anew.
kept="$RUN_DIR/schedule.txt" began='' continues=no
if [[ -n "$SCHEDULE" ]]; then one_of SCHEDULE own finetune published; fi
if is_checkpoint "$SAVE"; then
    continues=yes
    if [[ -e "$kept" ]]; then
        words_of schedule "$kept"
        began="${words[0]#schedule=}" TRAIN_ARGS=("${words[@]:1}")
    fi
elif [[ -n "$LOAD" ]]; then
    check_checkpoint LOAD
    if [[ "$default_schedule" == published ]]; then default_schedule=finetune; fi
fi
if [[ -n "$began" && -n "$SCHEDULE" && "$SCHEDULE" != "$began" ]]; then
    refuse "$SAVE continues with the schedule it began with, $began; got SCHEDULE=$SCHEDULE; leave" \
        "SCHEDULE out, or use another RUN_DIR, with LOAD=$SAVE, for a run of its own"
fi
SCHEDULE="${began:-${SCHEDULE:-$default_schedule}}"
if [[ -z "$began" ]]; then
    case "$SCHEDULE" in
        published)
            [[ "$folder" == no ]] || refuse "SCHEDULE=published is for the models of recipes/models;" \
                "got MODEL=$MODEL, a folder; use SCHEDULE=finetune or SCHEDULE=own"
            ;;
        finetune)
            [[ -n "$LOAD" || "$continues" == yes ]] || refuse "SCHEDULE=finetune is for weights" \
                "that are trained already, and there are none; use LOAD=CHECKPOINT too, or" \
                "SCHEDULE=own with your flags"
            # shellcheck source=/dev/null
            source "$recipes/schedules/finetune.sh"
            ;;
        own) TRAIN_ARGS=() ;;
    esac
fi

# The optimizer is saved in a form that another layout can read.
RUN_ARGS=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --save "$SAVE" --save-interval 500 --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
    --exit-signal-handler # SIGTERM: save, then exit
    --log-interval 10 --log-throughput --tensorboard-dir "$RUN_DIR/tensorboard"
    --eval-interval 1000 --eval-iters 10 --data-cache-path "$RUN_DIR/cache"
)
if ! given --fp16 "${MODEL_ARGS[@]}" "$@"; then RUN_ARGS+=(--bf16); fi
if [[ "$continues" == yes ]]; then
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
    RUN_ARGS+=(--tokenizer-type NullTokenizer ${VOCAB:+--vocab-size "$VOCAB"})
fi
if [[ -n "$WANDB_PROJECT" ]]; then
    RUN_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$NAME")
fi

script=(
    "$pretrain" "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${RUN_ARGS[@]}" "$@"
)
command=(
    env "${ENVIRONMENT[@]}" torchrun --nproc-per-node "$NPROC_PER_NODE" "${rendezvous[@]}"
    -m ep_plugin.run "${script[@]}"
)

divides "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${PARALLEL_ARGS[@]}" "$@"
if [[ "$DRY_RUN" == 1 ]]; then
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
if [[ -n "$DATA_PATH" && ! -f "$DATA_PATH.idx" ]]; then
    refuse "DATA_PATH must be the prefix of Megatron's .bin and .idx files; got '$DATA_PATH', and" \
        "$DATA_PATH.idx does not exist; use recipes/prepare_data.py, or Megatron's" \
        "tools/preprocess_data.py, to make them"
fi
if [[ "$TOKENIZER" == [./]* || "$TOKENIZER" == */*/* ]] && [[ ! -e "$TOKENIZER" ]]; then
    refuse "TOKENIZER must be a folder, a file, or a name on the Hugging Face hub; got" \
        "'$TOKENIZER', which does not exist; use the folder of the model's tokenizer"
fi
# A start that ends well takes the file away (ep_plugin does); what is left are those that failed.
# A line names the command too: one that is mended is no restart. Hosts and ports may change.
starts="$SAVE/starts.txt"
from="$(start_of "$@")"
start="$from, command $(printf '%s\0' "${script[@]}" | cksum)"
if [[ "$NODE_RANK" == 0 && "${SLURM_RESTART_COUNT:-0}" != 0 && ! -e "$SAVE/not_saved.json" ]]; then
    rm -f "$starts" # Slurm ended the turn before, and no save was refused then: it did not fail
fi
if [[ "$NODE_RANK" == 0 && -f "$starts" ]] &&
    [[ "$(tail -n 2 "$starts")" == "$start"$'\n'"$start" ]]; then
    echo "error: the last two starts $from ended without a newer checkpoint, and this one would be" \
        "the third; look at the end of their logs, and at $SAVE/not_saved.json where it is there;" \
        "to start all the same remove $starts, or start from another checkpoint with --ckpt-step" >&2
    exit 1
fi
if [[ "$DRY_RUN" == check ]]; then exit 0; fi
if [[ "$continues" == no && "$NODE_RANK" == 0 ]]; then
    if ! { mkdir -p "$RUN_DIR" && printf '%s\n' "schedule=$SCHEDULE" "${TRAIN_ARGS[@]}" \
        >"$kept.new" && mv "$kept.new" "$kept"; } 2>/dev/null; then
        refuse "RUN_DIR must be a folder that can be written; got '$RUN_DIR'; use another RUN_DIR"
    fi
fi
if [[ "$NODE_RANK" == 0 ]] && ! { mkdir -p "$SAVE" && echo "$start" >>"$starts"; } 2>/dev/null; then
    refuse "SAVE must be a folder that can be written; got '$SAVE'; use another SAVE"
fi
if [[ "$NODE_RANK" == 0 ]]; then # --save may name another folder
    EP_PLUGIN_STARTS="$(realpath "$starts")"
    export EP_PLUGIN_STARTS
fi
exec "${command[@]}"
