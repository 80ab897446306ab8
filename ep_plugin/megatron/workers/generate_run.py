"""A rank of `ep-plugin generate`: the model at a layout, a KV cache, and the texts that it makes.

All ranks hold all texts. The first one chooses each token, and tells the others. Megatron's static
inference context keeps keys and values; all rows stand at one position, so the shortest prompt is
read at once, and what longer ones have behind it goes in a token a step.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import moe_module_specs as specs
from torch import Tensor

from ep_plugin.checkpoint.text import Place
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.workers import saved_model
from ep_plugin.megatron.workers.foreign import as_megatron_loads
from ep_plugin.megatron.workers.generate_ranks import Layout, at_layout
from ep_plugin.megatron.workers.sampling import Sampling, choose, generators
from ep_plugin.megatron.workers.shown_text import Growing, Shown
from ep_plugin.megatron.workers.tokenizer import load
from ep_plugin.untrusted import one_line

UNREAD = 141  # as a shell says of SIGPIPE
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    folder: Path,
    layout: Layout,
    router: str | None,
    dtype: str | None = None,
    called: Path | None = None,
) -> Any:
    """Return the model of an iteration folder that is not trusted; nothing in it is run.

    `dtype`: a name of DTYPES; None: bf16 on a GPU where it was trained in bf16, else fp32.
    Raises ConfigError when Megatron makes no model of it; the folder is named there as `called`.
    """
    with as_megatron_loads(folder, router, called) as view:
        return _load_model(view, layout, dtype)


def _load_model(view: Path, layout: Layout, dtype: str | None) -> Any:
    common = dist_checkpointing.load_common_state_dict(str(view))
    fused_norm_kept = common["args"].transformer_impl == "local"
    own = "bf16" if getattr(common["args"], "bf16", False) is True else "fp32"
    args = saved_model.plain(common["args"])
    args.params_dtype = DTYPES[dtype or ("fp32" if cpu_mode.active() else own)]
    args.bf16 = args.params_dtype == torch.bfloat16
    if args.ep_drop_policy == "random":  # DeepSpeed's inference draws nobody either
        args.ep_drop_policy = "position"
    args.tensor_model_parallel_size = layout.tp
    args.expert_model_parallel_size = layout.ep
    args.expert_tensor_parallel_size = layout.etp
    if args.num_experts and layout.ep * layout.etp > 1:
        args.ep_dispatcher = "alltoall"
    args.use_cpu_initialization = cpu_mode.active()
    specs.MoELayer.settings = settings_from_args(args)
    model = saved_model.build(args).eval()
    model = model if cpu_mode.active() else model.cuda()
    saved_model.load_weights(model, view, common.get("content_metadata") or {}, fused_norm_kept)
    return model


NOT_FINITE = -1  # in the place of a token


class Cached:
    """A model that remembers what it has read. Every rank must call it with the same tokens."""

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self.model = model
        self.context = StaticInferenceContext(rows, length)

    def read(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, V] behind `tokens` [B, S], which follow what was read before.

        After the first call S is 1.
        """
        start, length = self.context.sequence_len_offset, tokens.shape[1]
        assert start == 0 or length == 1, "a second block of tokens would need a mask of its own"
        device = next(self.model.parameters()).device
        tokens = tokens.to(device)
        positions = torch.arange(start, start + length, device=device).expand_as(tokens)
        mask = None
        if length > 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
        if start:
            self.context.enable_decode_mode()
        logits: Tensor = self.model(
            tokens, positions, mask, inference_context=self.context, runtime_gather_output=True
        )
        self.context.increment_sequence_len_offset(length)
        return logits[:, -1]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling,
    size: int,
    on_token: Callable[[int, int], bool],
) -> None:
    """Let the model go on with each of `prompts`; `on_token(row, token)` says whether it is done.

    It is called on the first rank alone, for each new token. `size`: tokens from here on are none.
    Raises ConfigError on all ranks alike where a logit is nan or infinite.
    """
    first = dist.get_rank() == 0
    lengths = [len(prompt) for prompt in prompts]
    torch.manual_seed(sampling.seed)  # a second expert may be drawn, alike on all ranks
    cached = Cached(model, len(prompts), max(lengths) + num_tokens)
    drawn, done = generators(sampling, prompts), [False] * len(prompts)
    read = min(lengths)
    tokens = torch.tensor([list(prompt[:read]) for prompt in prompts])
    while True:
        logits = cached.read(tokens)[:, :size]
        device = logits.device
        going = [row for row, end in enumerate(lengths) if end <= read and not done[row]]
        news = torch.zeros(len(prompts), 2, dtype=torch.int64)  # token, and whether it is the last
        if first and not logits[going].isfinite().all():
            news[:, 0] = NOT_FINITE
        elif first:
            made = choose(logits[going], sampling, [drawn[row] for row in going])
            for row, token in zip(going, made, strict=True):
                last = on_token(row, token) or read + 1 == lengths[row] + num_tokens
                news[row] = torch.tensor([token, int(last)])
        news = news.to(device)
        dist.broadcast(news, 0)
        news = news.cpu()
        if int(news[0, 0]) == NOT_FINITE:
            raise ConfigError(
                f"the logits behind {read} tokens have nan or inf, so no token follows; look for "
                "them in the weights with ep-plugin audit CKPT, or use --dtype fp32 where a larger "
                "dtype could help"
            )
        for row in going:
            done[row] = bool(news[row, 1])
        if all(done):
            return
        for row, prompt in enumerate(prompts):
            if read < len(prompt):
                news[row, 0] = prompt[read]
        tokens, read = news[:, :1], read + 1


def run(job: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Do a job on this rank; the first one writes what is shown."""
    layout, sampling = Layout(**job["layout"]), Sampling(**job["sampling"])
    with at_layout(layout, job):
        model = load_model(
            Path(job["folder"]), layout, job["router"], job["dtype"], Path(job["called"])
        )
        tokenizer = load(Place(**job["tokenizer"]))
        texts = [
            Growing(tokenizer, text, ids, job["stop"])
            for text, ids in zip(job["texts"], job["prompts"], strict=True)
        ]
        shown = Shown(texts, job["json"], write, time.perf_counter)

        def on_token(row: int, token: int) -> bool:
            texts[row].add(token)
            if len(texts[row].tokens) == job["num_tokens"]:
                texts[row].end("length")
            shown.update()
            return texts[row].reason is not None

        if dist.get_rank() == 0:
            shown.begin()
        generate(model, job["prompts"], job["num_tokens"], sampling, job["size"], on_token)


def _write(out: int, text: str) -> None:
    """Write all of `text`; raises BrokenPipeError where nobody reads, else ConfigError."""
    content = text.encode(errors="backslashreplace")
    while content:
        try:
            content = content[os.write(out, content) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError(
                f"the output cannot be written ({error.strerror}); send it elsewhere"
            ) from error


def do(job: dict[str, Any]) -> None:
    """Do a job; what Megatron prints goes to stderr.

    Raises ConfigError, and BrokenPipeError where nobody reads what is written any more.
    """
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(job, partial(_write, out))
    finally:
        sys.stdout.flush()
        os.dup2(out, 1)
        os.close(out)


def main(argv: list[str]) -> int:
    """Do the job in the file `argv[0]`; a ConfigError is one line and code 2."""
    try:
        do(json.loads(Path(argv[0]).read_text()))
    except ConfigError as error:
        print(f"ep_plugin: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        words = "memory ran out; use more ranks (--ep, --tp), --dtype bf16, or fewer prompts"
        print(f"ep_plugin: error: {words}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return UNREAD
    return 0
