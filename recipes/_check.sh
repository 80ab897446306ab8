# Sourced by the recipes: what is wrong with a setting, in one sentence, before anything starts.

refuse() {
    echo "error: $*" >&2
    exit 2
}

whole() {
    # whole SMALLEST NAME...: each variable must be a whole number from SMALLEST on.
    local smallest="$1" name
    shift
    for name in "$@"; do
        [[ "${!name}" =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((${!name} >= smallest)) ||
            refuse "$name must be a whole number from $smallest on; got '${!name}'; without it" \
                "the default is taken"
    done
}

one_of() {
    # one_of NAME VALUE...: the variable must be one of these.
    local name="$1" legal
    shift
    for legal in "$@"; do
        if [[ "${!name}" == "$legal" ]]; then return 0; fi
    done
    legal="$(printf '%s, ' "${@:1:$#-1}")"
    refuse "$name must be ${legal%, } or ${*: -1}; got '${!name}'; use $name=$1"
}

not_a_file() {
    # not_a_file NAME...: each must be a folder, or a name for one to make, below no file.
    local name folder
    for name in "$@"; do
        folder="${!name}"
        while [[ -n "$folder" && ! -e "$folder" && "$folder" == */* ]]; do folder="${folder%/*}"; done
        if [[ -e "$folder" && ! -d "$folder" ]]; then
            refuse "$name must be a folder, or one to make; got '${!name}', and $folder is a" \
                "file; use $name=$folder-2"
        fi
    done
}

nearest() {
    # nearest WORD NAME...: those that contain WORD; else those that begin most like it; else one.
    # Numbers are compared whole, so ep3 is not the beginning of ep32; of several, those that differ
    # in their numbers alone.
    local word="${1,,}" name part rest length found=() alike=()
    shift
    for ((length = ${#word}; length > 0; length--)); do
        part="${word:0:length}"
        for name in "$@"; do
            rest="${name#*"$part"}"
            if [[ "$name" != *"$part"* || ("$part" == *[0-9] && "$rest" == [0-9]*) ]]; then continue; fi
            if [[ "$name" == "$part"* || "$length" == "${#word}" ]]; then found+=("$name"); fi
        done
        if ((${#found[@]})); then break; fi
    done
    for name in "${found[@]}"; do
        if [[ "${name//[0-9]/}" == "${word//[0-9]/}" ]]; then alike+=("$name"); fi
    done
    if ((${#alike[@]})); then found=("${alike[@]}"); fi
    echo "${found[*]:-$1}"
}

number() {
    # number NAME...: each variable must be a number above 0, such as 3e-3.
    local name
    for name in "$@"; do
        if ! [[ "${!name}" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?$ ]] ||
            [[ "${!name%%e*}" =~ ^[0.]+$ ]]; then
            refuse "$name must be a number above 0; got '${!name}'; without it the default is taken"
        fi
    done
}

help_or_nothing() {
    # help_or_nothing FILE WORDS...: print the help that is asked for; refuse any other word.
    local file="$1"
    shift
    if (($# == 0)); then return 0; fi
    if [[ "$1" != -h && "$1" != --help ]]; then
        refuse "$file takes no words, and got '$1'; use NAME=value before it, see $file --help"
    fi
    sed -nE '2,/^set -/s/^# ?//p' "$file"
    settings_of "$file"
    exit 0
}

settings_of() {
    # settings_of FILE: its NAME="${NAME:-DEFAULT}"  # COMMENT lines, as help.
    sed -nE 's/^([A-Z_]+)="\$\{[A-Z_]+:-([^}]*)\}" *(# (.*))?$/\1|\2|\4/p' "$1" |
        while IFS='|' read -r name default comment; do
            printf '  %-16s %s%s\n' "$name" "$comment" "${default:+ ($default)}"
        done
}
