"""`ep-plugin convert`: a dense checkpoint becomes a Mixture-of-Experts that computes the same."""

import argparse
import sys
from typing import Any

from tqdm import tqdm

from ep_plugin.checkpoint.adapt.keep_layers import keep_layers
from ep_plugin.checkpoint.adapt.model_class import as_class
from ep_plugin.checkpoint.adapt.upcycle import add_experts
from ep_plugin.checkpoint.adapt.upcycled_class import with_experts_as_hybrid
from ep_plugin.checkpoint.manifest import seal
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.checkpoint.open import check_required, open_source
from ep_plugin.checkpoint.opened import Opened
from ep_plugin.checkpoint.staging import staged
from ep_plugin.checkpoint.target import aim, fit_family
from ep_plugin.commands.convert import as_json
from ep_plugin.commands.convert.compare import Differs, compare, load_compare
from ep_plugin.commands.convert.compare_kept import compare_kept
from ep_plugin.commands.convert.flags import add_arguments as add_arguments
from ep_plugin.commands.convert.request import Request, read_request
from ep_plugin.commands.convert.say import check_manifest, say_plan, say_summary
from ep_plugin.megatron.arguments.flags_file import write_flags

EXAMPLES = r"""examples:
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 8 --topk 2
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 64 --topk 8 \
      --mode granular --granularity 8 --layers every:2
  ep-plugin convert --from runs/dense/iter_0001000 --to runs/moe --num-experts 8 --topk 2 \
      --mode drop --drop-ratio 0.5 --drop-optimizer
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 8 --topk 2 \
      --shared-expert copy --layers '[0]*1+[1]*3' --dry-run
  ep-plugin convert --from runs/teacher --to runs/student --keep-layers 0-19,23
  ep-plugin convert --from runs/moe --to runs/hybrid --hybrid-layer-pattern '*E*E|*E*E'
  ep-plugin convert --from runs/hybrid --to runs/gpt --model-class gpt
  ep-plugin convert --from runs/dense --to runs/hybrid --num-experts 8 --topk 2 --model-class hybrid
  ep-plugin convert --check --to runs/moe

After a kill the same command goes on where it stopped.

modes:
  copy      every expert is the dense FFN (arXiv:2212.05055); the model's output is kept
  granular  --granularity g experts are one FFN, cut along its channels (arXiv:2410.07524); the
            model's output is kept with --router-init virtual-group
  drop      --drop-ratio of each expert's channels drawn anew (arXiv:2502.19261); output changes
  noise     copies with Gaussian noise of --noise-std; output changes
The model's output is kept to rounding where a token's weights are divided by their sum, as Megatron
does by default. Otherwise (--pre-softmax, top-1) experts are scaled for equal logits: exact with
--router-init zero, about right with a random router. The report says by how much the output
changes and why; the comparison fails only where it is to be kept.

What is written is a Megatron torch_dist checkpoint that loads at any tensor-, pipeline- and
expert-parallel size. Optimizer state goes along: moments are copied to the experts.
Every flag acts, or is refused. Exit code 1: the comparison failed; 2: a setting or the input is
wrong. Neither leaves anything in --to.

between formats:
  ep-plugin convert --from models/qwen3 --to runs/qwen3
  ep-plugin convert --from models/mixtral --to runs/mixtral --model-class hybrid
  ep-plugin convert --from runs/moe --to models/moe --format hf --verify
  ep-plugin convert --from models/llama --to models/mixtral --format hf --num-experts 8 --topk 2
"""


BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}  # of a bar


def _with_experts(dense: Opened, request: Request) -> Opened:
    """Return the model with experts, of the class that is asked for, else of the dense one's."""
    is_hybrid = bool(hybrid_pattern(dense.args))
    model = as_class(dense, "gpt", None, request.keep_optimizer) if is_hybrid else dense
    model = add_experts(model, request.settings, request.keep_optimizer)
    to = request.model_class or ("hybrid" if is_hybrid else "gpt")
    if to == "gpt" or model.spelling == "plain":  # which gets its names when all is done
        return model
    return with_experts_as_hybrid(model, request.hybrid_layer_pattern)


def run(args: argparse.Namespace) -> int:
    """Convert. Returns 0, or 1 when the result does not compute what the source computes.

    Raises ConfigError for a user's mistake.
    """
    request = read_request(args)
    if request.check:
        return check_manifest(request.target)
    dense = open_source(
        request.source,
        request.format,
        request.vocab_size,
        request.leave_out,
        request.router,
        hybrid=request.reads_hybrids,
    )
    model = keep_layers(dense, request.keep_layers)
    if request.settings is not None:
        model = _with_experts(model, request)
    elif (to := request.model_class) is not None and model.spelling == "stored":
        model = as_class(model, to, request.hybrid_layer_pattern, request.keep_optimizer)
    check_required(dense)
    model = fit_family(model, dense, request.format, request.family)
    to_class, pattern = request.model_class, request.hybrid_layer_pattern
    target = aim(model, request.format, request.implementation, to_class, pattern)
    if request.dry_run:
        return (as_json.print_plan if request.json else say_plan)(request, target)
    by_running = request.compare and not request.renames
    comparison = load_compare(request, target) if by_running else None
    try:
        with staged(request.target, dense.folder, request.asked, target.num_bytes) as staging:
            with tqdm(desc="convert", total=target.num_bytes, **BYTES) as bar:
                hashes = target.write(
                    root=staging.folder,
                    on_bytes=bar.update,
                    journal=staging.journal,
                    processes=request.processes,
                )
            report = compare(comparison, request, target, staging.folder) if comparison else None
            if request.compare and request.renames:
                report = compare_kept(request, target, staging.folder)
            if request.format == "megatron":
                from_hf = target.model.family is not None
                write_flags(staging.folder, target.args, from_hf)
            seal(staging.folder, hashes, target.content, request.manifest)
    except Differs as error:
        print(f"ep-plugin convert: {error}", file=sys.stderr)
        return 1
    return (as_json.print_summary if request.json else say_summary)(request, target, report)
