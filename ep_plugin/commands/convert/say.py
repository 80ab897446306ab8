"""What a conversion prints: names and sizes before, what was made and what to do next after.

`as_json.py` says the same as JSON.
"""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.adapt.model_class import OWN_SPEC
from ep_plugin.checkpoint.carried import EXTRA_STATE
from ep_plugin.checkpoint.manifest import manifest_problems, tensor_problems
from ep_plugin.checkpoint.open import is_hf, safetensors, stored_tensors
from ep_plugin.checkpoint.target import SPECIAL, Target
from ep_plugin.commands.convert.compare import need
from ep_plugin.commands.convert.request import Request
from ep_plugin.commands.numbers import rounded
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.flags_file import unsaid
from ep_plugin.megatron.arguments.spell_model import (
    BESIDE_DENSE,
    PATTERN,
    model_flags,
    padded_vocabulary,
    where_other,
)
from ep_plugin.untrusted import one_line, printable

BYTES_PER_SECOND = 200e6  # of output by one process on one core: read, copied, hashed, written
_GENERATION = "generation_config.json"
_FILES = f"its tokenizer (tokenizer.json, tokenizer_config.json and the like) and {_GENERATION}"
_FLAGS = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"


def check_manifest(folder: Path) -> int:
    """Print what is wrong with a converted checkpoint's files; returns the exit code."""
    problems = manifest_problems(folder)
    if not problems:
        try:
            problems = tensor_problems(folder, stored_tensors(folder))
        except ConfigError as error:
            problems = [str(error)]
    for problem in problems:
        print(f"ep-plugin convert: {one_line(problem)}", file=sys.stderr)
    if not problems:
        _print(f"{folder}: every file has the bytes that were written")
    return 1 if problems else 0


def _print(line: str) -> None:
    """Print one line; names and flags of a checkpoint may hold what a terminal obeys."""
    print(printable(line))


def say_plan(request: Request, target: Target) -> int:
    """Print every name and size, and about how long writing takes; returns exit code 0."""
    seconds = seconds_of(request, target)
    comparison = need(request, target)
    for name, value in request.asked.items():
        _print(f"{name.removeprefix('--')}: {value}")
    for old, name in target.name_map:
        _print(f"{old or '(new)'} -> {name}")
    for name in target.model.left_out:
        _print(f"{name} -> (left out)")
    for name in target.model.emptied:
        _print(f"{one_line(name)} -> (emptied)")
    for tensor in target.tensors:
        _print(f"{tensor.info.num_bytes:>14} bytes  {tensor.name} {list(tensor.info.shape)}")
    for reason in target.model.deviations:
        _print(f"the model's output changes: {reason}")
    for line in _vocabulary(request, target):
        _print(line)
    _print(f"{target.num_bytes:>14} bytes in all; nothing written")
    _print(f"{seconds:>14.1f} s expected, at {BYTES_PER_SECOND / 1e6:.0f} MB/s a process")
    if request.renames and request.compare:
        _print("then every tensor is read back and its bits compared with the source's")
    else:
        _print(
            "source and result are not compared" if comparison is None else comparison.sentence()
        )
    return 0


def seconds_of(request: Request, target: Target) -> float:
    """Return about how long writing takes."""
    return target.num_bytes / BYTES_PER_SECOND / request.processes


def family_of(target: Target) -> str | None:
    """Return the Hugging Face family that the result is of, if any."""
    return target.model.family.model_type if target.model.family else None


def training_notes(request: Request, target: Target) -> list[str]:
    """Return what training with the settings of source and result differs in."""
    family, exported = target.model.family, request.format == "hf"
    return family.training_notes(target.args, exported) if family else []


def printed_flags(request: Request, target: Target) -> list[str]:
    """Return the flags of the model; where names stay, those beside a dense run's own."""
    model = target.model
    names_stay = model.upcycled is not None and model.spelling == "stored"
    if not names_stay or request.format == "hf":
        return model_flags(target.args)
    pattern = getattr(target.args, "hybrid_layer_pattern", None)
    return [*([PATTERN, pattern] if pattern else []), *where_other(target.args, BESIDE_DENSE)]


def load_flags(request: Request, target: Target) -> list[str]:
    """Return the flags that load the result."""
    return ["--load", str(request.target), *([] if resumes(target) else ["--finetune"])]


def resumes(target: Target) -> bool:
    """Whether the optimizer goes on."""
    made = target.model.upcycled or target.model.reclassed
    return made is not None and made.optimizer


def made_hybrid(target: Target) -> bool:
    """Whether the result is a HybridModel."""
    return bool(getattr(target.args, "hybrid_layer_pattern", None))


def say_summary(request: Request, target: Target, report: dict[str, Any] | None) -> int:
    """Print what was made and how to go on; returns exit code 0."""
    kind = ", ".join(filter(None, (request.format, family_of(target))))
    size = f"{len(target.tensors)} tensors, {rounded(target.num_bytes / 2**20, 1)} MiB"
    _print(f"wrote {request.target} ({kind}): {size}")
    settings, made = request.settings, target.model.upcycled
    if settings is not None and made is not None:
        _print(
            f"mode {settings.mode}, {settings.num_experts} experts, top-{settings.topk}, in "
            f"{sum(made.moe_layers)} of {target.model.args.num_layers} layers"
        )
    if (kept := target.model.kept) is not None:
        _print(
            f"{len(kept.layers)} of the teacher's {kept.of} layers: "
            f"{', '.join(map(str, kept.layers))}; left out: optimizer, random-number and rerun "
            f"state ({kept.dropped} entries); the optimizer starts afresh"
        )
    if (changed := target.model.reclassed) is not None and made is None:
        what = f"a HybridModel ({changed.pattern})" if changed.to == "hybrid" else "a GPT"
        left, then = ("", "goes on") if changed.optimizer else ("optimizer, ", "starts afresh")
        _print(
            f"{what}; left out: {left}random-number and rerun state ({changed.dropped} entries); "
            f"the optimizer {then}"
        )
    if target.model.left_out:
        _print(f"left out: {', '.join(target.model.left_out)}")
    if emptied := target.model.emptied:
        _print(f"emptied, {len(emptied)} in all: {one_line(', '.join(emptied))}")
    if names := [name for name in request.leave_out if name != EXTRA_STATE]:
        _print(f"run arguments left out: {', '.join(names)}")
    for reason in target.model.deviations:
        _print(f"the model's output changes: {reason}")
    for line in _vocabulary(request, target):
        _print(line)
    if (beside := tokenizer(request, target)) is not None:
        _print(beside)
    for difference in training_notes(request, target):
        _print(f"in training: {difference}")
    if report is None:
        _print("source and result were not compared (--skip-parity)")
    if made is not None and request.moments_go_along:
        _print(_optimizer(made.optimizer, made.dropped))
    if request.format == "megatron":
        _print_next(request, target)
        _print_recipe(request, target)
    return 0


def _vocabulary(request: Request, target: Target) -> Iterator[str]:
    """Yield what is to be said of rows that pad the vocabulary."""
    model = target.model
    rows = getattr(model.args, "padded_vocab_size", None)
    size = getattr(model.args, "ep_vocab_size", None)
    if rows is None:
        return
    if model.cut_rows:
        yield f"vocabulary: {rows} rows; {model.cut_rows} that only padded it are cut"
    elif request.vocab_size is not None:
        yield f"vocabulary: {size} of {rows} rows; the others pad it, and an export cuts them"
    elif size is None and model.spelling == "plain":
        yield (
            f"vocabulary: all {rows} rows are kept, since the checkpoint does not say whether some "
            "only pad it; --vocab-size V keeps V"
        )
    if request.format != "megatron" or model.spelling == "stored":
        return
    padded = padded_vocabulary(target.args)
    if padded != rows:
        yield (
            f"vocabulary: {rows} rows, and {padded} in a run, so that each tensor-parallel size "
            "that the heads allow divides it; Megatron fills the new rows with zeros"
        )


def tokenizer(request: Request, target: Target) -> str | None:
    """Return what became of these files, or what the user has to do; None where there are none."""
    source = target.model.folder
    listed = safetensors().files_beside(source, to_copy=False) if is_hf(source) else []
    found = [str(path) for path in listed]
    has_one = any(name != _GENERATION for name in found)
    if request.format == "hf":
        said = [f"copied beside the weights: {', '.join(found)}"] if found else []
        left = [str(path) for path in safetensors().left_beside(source)] if is_hf(source) else []
        if left:
            names = one_line(", ".join(left))
            said.append(f"not copied, being no data: {names}; copy by hand what you trust")
        if not has_one:
            known = getattr(target.model.args, "tokenizer_model", None)
            whence = f"; the run had --tokenizer-model {known}" if known else ""
            said.append(
                f"{source} has no tokenizer{whence}; copy {_FILES} from the model that it began "
                f"with into {request.target}"
            )
        if not is_hf(source):
            said.append(
                f"config.json names no {', '.join(SPECIAL[:-1])} and {SPECIAL[-1]}, which Megatron "
                "does not keep; set them to the tokenizer's"
            )
        return "; ".join(said)
    if has_one:
        folder = shlex.quote(str(source))
        return f"the tokenizer stays where it is; a run finds it with {_FLAGS} {folder}"
    return f"{source} has no tokenizer, and a run needs one" if is_hf(source) else None


def _optimizer(goes_on: bool, dropped: int) -> str:
    if goes_on:
        return (
            f"left out: random-number and rerun state ({dropped} entries); the optimizer goes on: "
            "moments copied to each expert, zero for routers"
        )
    return (
        f"left out: optimizer, random-number and rerun state ({dropped} entries); the optimizer "
        "starts afresh"
    )


def _print_recipe(request: Request, target: Target) -> None:
    if names := unsaid(target.args):
        missing = ", ".join(names)
        _print(f"no flags.txt, so recipes/run.sh cannot run it: it cannot say {missing}")
        return
    folder = str(request.target)
    words = shlex.join([f"MODEL={folder if '/' in folder else f'./{folder}'}"])
    _print("or fine-tune its weights with a recipe, on 2 ranks:")
    script = "recipes/pretrain_gpt.py" if made_hybrid(target) else "pretrain_gpt.py"
    _print(f"  {words} LAYOUT=ep2 ./recipes/run.sh {script}")


def _print_next(request: Request, target: Target) -> None:
    settings, made = request.settings, target.model.upcycled
    flags = shlex.join([*load_flags(request, target), *printed_flags(request, target)])
    if settings is None or made is None or not request.moments_go_along:
        _print("continue with your flags for data and optimizer, and:")
        _print(f"  {flags}")
        if made_hybrid(target):
            _print("  with Megatron's pretrain_hybrid.py also")
            _print(f"  --spec {' '.join(OWN_SPEC)}")
        return
    _print("continue with the dense run's flags and:")
    _print(f"  {flags} --expert-model-parallel-size {settings.ep or 'EP'}")
    if made.optimizer:
        divisors = f"any divisor above 1 of {settings.num_experts}"
        _print(f"  EP: {'1' if settings.ep == 1 else divisors}; at another add --no-load-optim")
        _print("  for another training length or learning rate than the dense run's, add")
        _print("  --override-opt-param-scheduler")
        return
    _print("  or, to keep the iteration and the place in the data, --no-load-optim --no-load-rng")
    _print("  instead of --finetune")
    _print(f"  EP: any divisor of {settings.num_experts}")
