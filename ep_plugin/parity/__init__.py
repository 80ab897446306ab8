"""Does a layout compute what one rank computes? Asked of the user's own script and flags.

`layouts.py` reads them, `arguments.py` makes their runs comparable and `tiny.py` small, `launch.py`
runs them, `compare.py` reads what they left (`ep_plugin/megatron/dump.py`), `command.py` prints it.
"""
