"""The checkpoint that `ep-plugin generate` reads, as a folder that Megatron's ranks can load."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ep_plugin.checkpoint.adapt.model_class import as_class
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.checkpoint.open import kind_of, open_source
from ep_plugin.checkpoint.opened import Opened
from ep_plugin.checkpoint.staging import staged
from ep_plugin.checkpoint.target import aim
from ep_plugin.commands.numbers import rounded
from ep_plugin.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """A model, and whether it must be converted first."""

    model: Opened
    convert: bool

    @property
    def args(self) -> argparse.Namespace:
        return self.model.args

    @property
    def vocab_size(self) -> int:
        """The rows of the vocabulary that are tokens."""
        return int(getattr(self.args, "ep_vocab_size", None) or self.args.padded_vocab_size)


def opened(path: Path, router: str | None) -> Source:
    """Open a checkpoint; reads no tensor but tied ones.

    Raises ConfigError for one that cannot be opened, for a router that looks ahead, and for one
    that the model was not trained with.
    """
    kind = kind_of(path)
    if kind == "hf" and router is not None:
        raise ConfigError(
            "--router is for a checkpoint that was trained with a router of your own; "
            f"{path} is a Hugging Face model; leave --router out"
        )
    model = open_source(path, "megatron", router=router, hybrid=kind == "torch_dist")
    if hybrid_pattern(model.args):
        model = as_class(model, "gpt", None, keep_optimizer=False)  # as which it is loaded
    if getattr(model.args, "ep_router", None) == "expert_choice":
        raise ConfigError(
            f"{path} was trained with --ep-router expert_choice, by which later tokens decide "
            "where earlier ones go: it cannot write from left to right; use a model whose tokens "
            "choose"
        )
    return Source(model, kind != "torch_dist")


@contextmanager
def reading(source: Source, scratch: Path, alone: bool) -> Iterator[Path]:
    """Yield the iteration folder to load; what had to be converted lies in `scratch`.

    With `alone` the ranks are started here; those of torchrun would all convert. Raises ConfigError
    for them, and for want of room.
    """
    if not source.convert:
        yield source.model.folder
        return
    if not alone:
        raise ConfigError(
            f"{source.model.folder} must be converted before ranks can load it; use ep-plugin "
            f"convert --from {source.model.folder} --to runs/converted, then generate from there"
        )
    target = aim(source.model, "megatron", None)
    print(
        f"ep-plugin generate: converting into a temporary folder of {scratch.parent}, "
        f"{rounded(target.num_bytes / 2**30, 2)} GiB (TMPDIR names another)",
        file=sys.stderr,
    )
    folder = scratch / "model"
    with (
        staged(folder, source.model.folder, {}, target.num_bytes) as staging,
        tqdm(desc="convert", total=target.num_bytes, unit="B", unit_scale=True) as bar,
    ):
        target.write(root=staging.folder, on_bytes=bar.update, journal=staging.journal, processes=1)
    assert target.iteration is not None
    yield folder / target.iteration
