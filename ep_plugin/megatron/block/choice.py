"""The line in a run's log that says what `auto` chose, and which flags choose otherwise."""

import hashlib

import torch.distributed as dist

from ep_plugin import __version__
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.moe.groups import ExpertGroups, group_rank

EARLIER = "--ep-dispatcher alltoall --ep-overlap serial"


def say(asked: MoEConfig, found: MoEConfig, groups: ExpertGroups) -> None:
    """Print the line of `said` if no rank has: once a run for each choice, whatever made it.

    Models may differ, and stages of a pipeline.
    """
    line = said(asked, found, groups) if group_rank(groups.tp_dp_cp) == 0 else None
    if line is not None and _is_new(line):
        print(f"ep_plugin {__version__}: {line}", flush=True)


def _is_new(line: str) -> bool:
    """Whether this rank is the first to ask for this line; the process group's store counts."""
    key = f"ep_plugin/said/{hashlib.sha256(line.encode()).hexdigest()}"
    asked: int = dist.distributed_c10d._get_default_store().add(key, 1)
    return asked == 1


def said(asked: MoEConfig, found: MoEConfig, groups: ExpertGroups) -> str | None:
    """Return the line; None where nothing was left to `auto`, or there is nothing worth a line.

    `asked` is as the user set it, `found` is what the layer runs with. One rank and the CPU are not
    worth a line: there it is what it always was.
    """
    chosen = _chosen(asked, found)
    plain = found.dispatcher == "alltoall" and not found.dispatch_dedup
    tried = groups.shared.get("trial")
    if groups.ep_etp_size == 1 or not chosen or (plain and tried is None):
        return None
    line = f"{chosen} for {groups.ep_etp_size} ranks of ep and etp"
    if found.dispatcher == "symm_mem":
        num_bytes = symm_mem.buffer_bytes(found, groups.ep_etp_size)
        size = f" of {-(-num_bytes // 2**20)} MiB" if num_bytes else ""
        line += f", with a buffer{size} on each GPU"
    if tried is not None and tried.reason is not None:
        line += f", since symm_mem does not work here: {tried.reason}"
    return f"{line}; to have it as it was before: {EARLIER}"


def _chosen(asked: MoEConfig, found: MoEConfig) -> str:
    """Return the settings that stand for `auto`, as flags."""
    flags = []
    if asked.dispatcher == "auto":
        flags.append(f"--ep-dispatcher {found.dispatcher}")
        if found.dispatch_dedup and not asked.dispatch_dedup:
            flags.append("--ep-dispatch-dedup on")
    if asked.overlap == "auto":
        flags.append(f"--ep-overlap {found.overlap}")
    return f"auto takes {' '.join(flags)}" if flags else ""
