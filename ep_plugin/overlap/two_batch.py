"""Public name of `moe/schedule/two_batch.py`."""

from ep_plugin.moe.schedule.two_batch import two_batch

__all__ = ["two_batch"]
