"""Run a Megatron script with the plugin, without editing it.

    torchrun --nproc-per-node 2 --no-python ep-plugin run pretrain_gpt.py --num-experts 8 ...
    torchrun --nproc-per-node 2 -m ep_plugin.run pretrain_gpt.py --num-experts 8 ...

Both are the same. Without torchrun the script runs as the only rank.
"""

import ast
import os
import runpy
import sys
import tokenize
from pathlib import Path

from ep_plugin.errors import ConfigError

LAUNCHERS = ("torchrun", "python", "python3", "srun", "mpirun", "deepspeed", "accelerate")
USAGE = """usage: {name} SCRIPT [ARGS ...]

Runs SCRIPT as `python SCRIPT ARGS ...` would, with the plugin installed in Megatron first.
All that stands behind SCRIPT goes to the script, --help too.

On several ranks:
  torchrun ... -m ep_plugin.run SCRIPT [ARGS ...]
  torchrun ... --no-python ep-plugin run SCRIPT [ARGS ...]

examples:
  ep-plugin run pretrain_gpt.py --help
  EP_PLUGIN_DEVICE=cpu ep-plugin run pretrain_gpt.py ...      one rank, on the CPU
  torchrun --nproc-per-node 8 -m ep_plugin.run pretrain_gpt.py --num-experts 8 \\
      --moe-router-topk 2 --expert-model-parallel-size 8 ...
"""


def main(argv: list[str], name: str = "python -m ep_plugin.run") -> int:
    """Run the script in `argv`; a ConfigError is one line on rank 0 and code 2 on every rank.

    `name` is what was typed before the script.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(name=name), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        run_script(argv[0], argv[1:])
    except ConfigError as error:
        from ep_plugin.megatron.seams.refusal import say

        say(error, f"{name.removeprefix('python -m ')}: error: ")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_script(script: str, arguments: list[str]) -> None:
    """Install the plugin and run `script` as __main__.

    Raises ConfigError where there is no such file, and for models and a Megatron not served.
    """
    if script.startswith("-") or Path(script).name in LAUNCHERS:
        raise ConfigError(
            f"SCRIPT must be a Python file; got {script!r}; use torchrun FLAGS --no-python "
            "ep-plugin run SCRIPT, since what starts the ranks stands in front"
        )
    if not os.path.isfile(script):
        raise ConfigError(
            f"SCRIPT must be a Python file; got {script!r}, which does not exist here; use the "
            "path of your pretrain script, with its flags behind it"
        )
    _check_served(script)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    if "RANK" not in os.environ:
        _be_the_only_rank()
    from ep_plugin.megatron.seams.alike import tell
    from ep_plugin.megatron.seams.ended_well import forget_starts
    from ep_plugin.megatron.seams.install import install, say_unused

    install()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if not end.code:
            say_unused()
            forget_starts()
        else:
            tell(f"the script ended with exit code {end.code}")
        raise
    say_unused()
    forget_starts()


def _check_served(script: str) -> None:
    """Read the script for what it trains; what is wrong with it as Python, Python says itself."""
    from ep_plugin.megatron.seams.served import check_script

    try:
        with tokenize.open(script) as file:
            tree = ast.parse(file.read())
        check_script(tree)
    except ConfigError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return


def _be_the_only_rank() -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # Any port: nobody else has to find it.
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
