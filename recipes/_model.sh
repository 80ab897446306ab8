# Sourced by recipes/run.sh: a model in a folder that ep-plugin convert wrote, and checkpoints.

words_of() {
    # words_of KIND FILE: into the array `words`, the words of a file: data, never sourced.
    local python text
    python="$(command -v python || command -v python3)" ||
        refuse "python is not on PATH; activate the environment that ep_plugin is installed in"
    "$python" -c 'import ep_plugin' 2>/dev/null ||
        refuse "$python has no ep_plugin; activate the environment that it is installed in"
    text="$("$python" -m ep_plugin.megatron.arguments.flags_file "$1" "$2")" || exit 2
    mapfile -t words <<<"$text"
}

is_checkpoint() {
    [[ -f "$1/latest_checkpointed_iteration.txt" ]]
}

check_checkpoint() {
    # check_checkpoint NAME: the folder in this variable must hold a checkpoint of Megatron's.
    local folder="${!1%/}"
    if is_checkpoint "$folder"; then return 0; fi
    [[ -d "$folder" ]] || refuse "$1 must be a folder with a checkpoint; got '$folder', which does" \
        "not exist; use the folder that --save or ep-plugin convert --to named"
    if [[ -f "$folder/config.json" ]]; then
        refuse "$1=$folder is a Hugging Face model; use ep-plugin convert --from $folder --to" \
            "$folder-megatron, and MODEL=$folder-megatron"
    fi
    if is_checkpoint "$folder/.."; then
        refuse "$1=$folder is one iteration of a checkpoint; use $1=$(dirname "$folder")"
    fi
    refuse "$1=$folder holds no checkpoint (latest_checkpointed_iteration.txt); use the folder that" \
        "--save or ep-plugin convert --to named"
}

read_model_folder() {
    # Sets what a file of models/ would, from the folder MODEL.
    local place
    [[ -d "$MODEL" ]] || refuse "MODEL must be a name or a folder that ep-plugin convert wrote; got" \
        "'$MODEL', which does not exist; use the folder that --to named"
    if [[ ! -e "$MODEL/flags.txt" && ! -L "$MODEL/flags.txt" ]]; then
        check_checkpoint MODEL
        refuse "MODEL=$MODEL has no flags.txt, which ep-plugin convert writes; use LOAD=$MODEL with" \
            "the name of its model, or write its flags into $MODEL/flags.txt, one word a line," \
            "below a first line schedule=finetune"
    fi
    words_of model "$MODEL/flags.txt"
    default_schedule="${words[0]#schedule=}" MODEL_ARGS=("${words[@]:1}")
    for ((place = 0; place < ${#MODEL_ARGS[@]}; place++)); do
        if [[ "${MODEL_ARGS[place]}" == --padded-vocab-size ]]; then
            VOCAB="${MODEL_ARGS[place + 1]}"
            [[ "$VOCAB" =~ ^[1-9][0-9]{0,8}$ ]] || refuse "--padded-vocab-size in" \
                "$MODEL/flags.txt must be a whole number from 1 on; got '$VOCAB'"
            VOCAB=$((VOCAB - 1)) # Megatron's NullTokenizer adds one
        fi
    done
    if is_checkpoint "$MODEL"; then LOAD="${LOAD:-$MODEL}"; fi
}
