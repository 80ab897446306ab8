"""The line in a run's log that says what `auto` chose, and which flags choose otherwise."""

from ep_plugin import __version__
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.moe.groups import ExpertGroups, group_rank

EARLIER = "--ep-dispatcher alltoall --ep-overlap serial"


def say(asked: MoEConfig, found: MoEConfig, groups: ExpertGroups) -> None:
    """Print the line of `said`."""
    line = said(asked, found, groups)
    if line is not None:
        print(f"ep_plugin {__version__}: {line}", flush=True)


def said(asked: MoEConfig, found: MoEConfig, groups: ExpertGroups) -> str | None:
    """Return the line, on the first rank and once for all layers that share `groups`; else None.

    `asked` is as the user set it, `found` is what the layer runs with. One rank and the CPU are not
    worth a line: there it is what it always was.
    """
    chosen = _chosen(asked, found)
    plain = found.dispatcher == "alltoall" and not found.dispatch_dedup
    tried = groups.shared.get("trial")
    first = group_rank(groups.tp_dp_cp) == 0 and "said" not in groups.shared
    if groups.ep_etp_size == 1 or not chosen or not first or (plain and tried is None):
        return None
    groups.shared["said"] = True
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
