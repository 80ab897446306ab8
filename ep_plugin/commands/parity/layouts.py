"""A layout as it is written on the command line: `tp=2,ep=4,etp=1`."""

from dataclasses import dataclass
from math import lcm

from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig
from ep_plugin.untrusted import shown

DEGREES = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
LAYOUT_FLAGS = (
    *DEGREES.values(),
    "--sequence-parallel",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--pipeline-model-parallel-layout",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--tp-comm-overlap",
    # what is about more ranks than one, and Megatron refuses on one
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
    "--distribute-saved-activations",
    "--defer-embedding-wgrad-compute",
    "--wgrad-deferral-limit",
    "--overlap-p2p-communication-warmup-flush",
    "--microbatch-group-size-per-virtual-pipeline-stage",
    "--hierarchical-context-parallel-sizes",
    "--hybrid-context-parallel",
    "--num-distributed-optimizer-instances",
)


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, and on how many ranks."""

    name: str
    parallel: ParallelConfig

    def arguments(self) -> list[str]:
        """Return Megatron's flags for it; tensor parallelism comes with sequence parallelism."""
        sizes = {name: getattr(self.parallel, name) for name in DEGREES}
        flags = [word for name, size in sizes.items() for word in (DEGREES[name], str(size))]
        return flags + (["--sequence-parallel"] if self.parallel.tp > 1 else [])


ONE_RANK = Layout("one rank", ParallelConfig(world_size=1))


def parse(text: str) -> Layout:
    """Read "tp=2,ep=4"; etp defaults to tp, and dp to as few ranks as there can be.

    Raises ConfigError for another form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in (*DEGREES, "dp") or not _is_size(size) or name in sizes:
            raise ConfigError(
                f"--layouts takes {', '.join(DEGREES)} and dp, each once with a size from 1 on; "
                f"got {shown(text)}; use --layouts tp=2,ep=4 for one, and a space before the next"
            )
        sizes[name] = int(size)
    tp, cp, pp = (sizes.get(name, 1) for name in ("tp", "cp", "pp"))
    dense, experts = tp * cp, sizes.get("ep", 1) * sizes.get("etp", tp)
    step = lcm(dense, experts) // dense  # of dp
    dp = sizes.get("dp", step)
    if dp % step:
        raise ConfigError(
            f"--layouts {text} has {dense * dp} ranks a pipeline stage, tp*cp*dp, and ep*etp "
            f"({experts}) must divide them; use --layouts "
            f"{spell({**sizes, 'dp': -(-dp // step) * step})}"
        )
    ep, etp = sizes.get("ep", 1), sizes.get("etp")
    world_size = dense * dp * pp
    return Layout(text, ParallelConfig(world_size=world_size, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp))


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text[:7]) > 0 and len(text) < 7


def spell(sizes: dict[str, int]) -> str:
    """Return a layout as it is typed."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())
