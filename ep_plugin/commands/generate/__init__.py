"""`ep-plugin generate`: what does this model write? Megatron's model, at any EP and TP.

`layout.py` lays out the ranks, `source.py` opens the checkpoint, `start.py` starts the ranks; what
each does is in `ep_plugin/megatron/workers/generate_run.py`.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint import text
from ep_plugin.commands.generate.layout import layout_of
from ep_plugin.commands.generate.source import opened, reading
from ep_plugin.commands.generate.start import Killed, ranks_started, start
from ep_plugin.commands.law import Need
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, read_text, shown

EXAMPLES = r"""examples:
  ep-plugin generate runs/moe --prompt "def main("
  ep-plugin generate runs/moe --prompt "Once" "It was" --num-tokens 100 --top-p 0.9 --seed 3
  ep-plugin generate runs/moe --prompts prompts.txt --greedy --json --ep 4
  ep-plugin generate models/qwen3 --prompt "The sky is" --greedy --stop "."
  torchrun --nproc-per-node 4 --no-python ep-plugin generate runs/moe --ep 4 --prompt "def main("

The ranks are started here, or are those of torchrun. Without a GPU they are on the CPU. One prompt
is shown as it grows; of several each is a line, in their order. With more ranks than experts
(--ep 8, 4 experts) each expert is cut into slices. Capacity is that of evaluation; where a capacity
drops choices, prompts of one batch compete, and a text depends on the others.
Hugging Face folders and per-rank files are converted into a temporary folder first.
Exit codes: 1: whoever read the output went away; 2: a setting or the input is wrong; 128 + N:
signal N ended a rank.
"""
NEEDS = (
    Need(
        "--top-p --temperature --seed",
        lambda args: not args.greedy,
        "{flag} is for drawing tokens, and --greedy draws none; use one of the two",
    ),
)
TOKENIZERS = "ep_plugin.megatron.workers.tokenizer"
MOST_PROMPTS = 1024
MOST_TOKENS = 1 << 20  # of a prompt, or new ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="a Megatron checkpoint or Hugging Face folder"
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to go on from")
    prompts.add_argument(
        "--prompts", type=Path, metavar="FILE", help="text, a prompt a line; blank lines are none"
    )
    parser.add_argument(
        "--num-tokens", type=int, default=64, metavar="N", help="new tokens at most (default: 64)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument(
        "--top-p", type=float, default=0.9, metavar="P",
        help="draw from the likeliest tokens with this sum of probabilities (default: 0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of a draw (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of draws (default: 0)")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end before these")
    parser.add_argument(
        "--tokenizer", metavar="NAME",
        help="SentencePiece model, Hugging Face folder or name, or numbers (default: its own)",
    )  # fmt: skip
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="ranks of the experts")
    parser.add_argument(
        "--etp", type=int, metavar="N",
        help="ranks that share an expert (default: those that --ep has more than experts)",
    )  # fmt: skip
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="1: stages are not served")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"),
        help="of the weights (default: fp32; on a GPU bf16 where the checkpoint has it)",
    )  # fmt: skip
    parser.add_argument("--router", metavar="NAME", help="your own router's module")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt")


def run(args: argparse.Namespace) -> int:
    """Generate. Returns 0, or 128 + N where signal N ended a rank.

    Raises ConfigError for a user's mistake, before any rank is started.
    """
    _check_numbers(args)
    _check_megatron()
    texts = _texts(args)
    found = opened(args.checkpoint, args.router)
    layout = layout_of(args, found.args)
    where = text.choose(args.tokenizer, found.args, args.checkpoint)
    ranks = ranks_started(layout.world)
    first = ranks is None or os.environ["RANK"] == "0"
    if first:
        _tell(where, args)
    tokenizer: text.Tokenizer = import_module(TOKENIZERS).load(where)
    prompts = [tokenizer.encode(each) for each in texts]
    size = min(found.vocab_size, tokenizer.size or found.vocab_size)
    _check_prompts(args, found.args, texts, prompts, size)
    if layout.etp > 1 and not args.json and first:
        print(f"ep-plugin generate: {layout.sentence()}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="ep-generate-") as scratch:
        job: dict[str, Any] = {
            "layout": {"tp": layout.tp, "ep": layout.ep, "etp": layout.etp},
            "sampling": {
                "greedy": args.greedy,
                "top_p": args.top_p,
                "temperature": args.temperature,
                "seed": args.seed,
            },
            "router": args.router,
            "called": str(args.checkpoint),
            "dtype": args.dtype,
            "tokenizer": asdict(where),
            "texts": texts,
            "prompts": prompts,
            "stop": args.stop,
            "num_tokens": args.num_tokens,
            "size": size,
            "json": args.json,
        }
        if first:
            print(f"ep-plugin generate: loading {args.checkpoint} ...", file=sys.stderr)
        try:
            with reading(found, Path(scratch), alone=ranks is None) as folder:
                start(job | {"folder": str(folder)}, layout.world, ranks, Path(scratch))
        except Killed as error:
            print(f"ep-plugin generate: error: {error}", file=sys.stderr)
            return error.code
    return 0


def _check_megatron() -> None:
    """Raise ConfigError where Megatron has no model of run arguments, before work is done for it.

    That it is one that the plugin knows is seen once it is imported.
    """
    core = import_module("ep_plugin.megatron.seams.found").spec_of_core()
    if core is not None and find_spec("megatron.training") is None:
        raise ConfigError(
            "the model is built by megatron.training, which this Megatron lacks (a wheel of "
            "megatron-core 0.16 does); run pip install 'megatron-core[training]>=0.17', or put a "
            "Megatron-LM checkout into PYTHONPATH"
        )


def _tell(where: text.Place, args: argparse.Namespace) -> None:
    """Say on stderr which tokenizer is taken unasked, and that a name may be looked up for long."""
    if args.tokenizer is None and where.path not in ("", str(args.checkpoint)):
        print(
            f"ep-plugin generate: the tokenizer is {cut(where.path)}, which the run arguments of "
            f"{args.checkpoint} name; --tokenizer takes another",
            file=sys.stderr,
        )
    if where.kind == "file or name" and not Path(where.path).exists():
        print(
            f"ep-plugin generate: {cut(where.path)} is no file or folder here; transformers looks "
            "for a tokenizer of that name, in the network too, which can take a minute",
            file=sys.stderr,
        )


def _check_numbers(args: argparse.Namespace) -> None:
    if not 1 <= args.num_tokens <= MOST_TOKENS:
        raise ConfigError(
            f"--num-tokens must be from 1 to {MOST_TOKENS}; got {args.num_tokens}; use "
            "--num-tokens 64"
        )
    if not 0 < args.top_p <= 1:
        raise ConfigError(
            f"--top-p must be above 0 and at most 1; got {args.top_p}; use --top-p 0.9"
        )
    if not 1e-4 <= args.temperature <= 1e4:
        raise ConfigError(
            f"--temperature must be from 0.0001 to 10000; got {args.temperature}; use "
            "--temperature 1, or --greedy"
        )
    if "" in args.stop:
        raise ConfigError("--stop must have a text; got an empty one; leave --stop out")


def _texts(args: argparse.Namespace) -> list[str]:
    texts: list[str] = args.prompt or []
    if args.prompts is not None:
        remedy = "use a file of text with a prompt a line"
        lines = read_text(args.prompts, remedy).split("\n")  # no other sign ends a line
        texts = [line.removesuffix("\r") for line in lines if line.strip()]
        if not texts:
            raise ConfigError(f"--prompts {args.prompts} has no line with a prompt; {remedy}")
    for text_typed in (*texts, *args.stop):
        if not text_typed.isascii() and not _is_utf8(text_typed):
            raise ConfigError(
                f"{shown(text_typed)} is no text: it has bytes that are not UTF-8; use --prompt or "
                "--stop with a text"
            )
    if len(texts) > MOST_PROMPTS:
        raise ConfigError(
            f"{len(texts)} prompts are more than one batch holds; use {MOST_PROMPTS} at most"
        )
    return texts


def _is_utf8(text: str) -> bool:
    """Whether a text of the command line can be written: bytes of another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_prompts(
    args: argparse.Namespace,
    model: argparse.Namespace,
    texts: list[str],
    prompts: list[list[int]],
    size: int,
) -> None:
    for written, ids in zip(texts, prompts, strict=True):
        if not ids:
            raise ConfigError(f"the prompt {shown(written)} has no token; use one that has")
        if not all(0 <= token < size for token in ids):
            raise ConfigError(
                f"the prompt {shown(written)} has token {max(ids)}, and the model knows tokens 0 "
                f"to {size - 1}; use --tokenizer with the one that it was trained with, or "
                "numbers, and ids below that"
            )
    longest, room = max(map(len, prompts)), model.max_position_embeddings
    if longest + args.num_tokens > room:
        if longest >= room:
            raise ConfigError(
                f"a prompt has {longest} tokens, and the model has {room} positions "
                f"(max_position_embeddings); use a prompt of at most {room - 1} tokens"
            )
        raise ConfigError(
            f"a prompt of {longest} token{'s' * (longest > 1)} and --num-tokens "
            f"{args.num_tokens} are more than the model's {room} positions "
            f"(max_position_embeddings); use --num-tokens {room - longest}"
        )
