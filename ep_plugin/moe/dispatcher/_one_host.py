"""Whether a group's ranks are on one host, for dispatchers that access other ranks' memory."""

import socket

import torch.distributed as dist

from ep_plugin.errors import ConfigError


def check_one_host(group: dist.ProcessGroup, dispatcher: str) -> None:
    """Raise ConfigError, on all ranks of `group` alike, if they are on several hosts.

    Every rank of `group` must call it: host names are gathered.
    """
    hosts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    if len(set(hosts)) > 1:
        raise ConfigError(
            f"dispatcher '{dispatcher}' needs the ranks of ep and etp on one host; the "
            f"{len(hosts)} are on {len(set(hosts))}: {', '.join(sorted(set(hosts)))}; use "
            "<dispatcher=alltoall>"
        )
