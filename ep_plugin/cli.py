"""`ep-plugin COMMAND ...`: a thin table; each command's module is imported when it is called."""

import argparse
import os
import sys
from importlib import import_module
from types import ModuleType

from ep_plugin import __version__
from ep_plugin.commands import law
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import one_line

# A command is a module of commands/ with add_arguments(parser) and run(args) -> int; and its help.
# In NEEDS it may say which of its flags act only beside others (commands/law.py).
COMMANDS = {
    "apply": "add the plugin to a Megatron pretrain script, or take it out",
    "audit": "check that a checkpoint is whole, with each expert in it once",
    "bench": "time the layer, its matrix products and kernels, also of other packages",
    "convert": "convert dense checkpoints to Mixture-of-Experts, and from and to Hugging Face",
    "doctor": "show what is installed, and whether it works together",
    "parity": "check that parallel layouts of your own script compute what one rank does",
    "plan": "estimate communication time of a layer, or memory of a whole model",
    "presets": "list published models, or print the Megatron arguments of one",
    "recipes": "list ready-made scripts, models and layouts, and copy them",
    "report": "draw what happened in a run, as HTML and PNG",
    "run": "run your pretrain script with the plugin, without editing it",
}


def _module(command: str) -> ModuleType:
    return import_module(f"ep_plugin.commands.{command}")


def build_parser(selected: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the selected command's module is imported for its arguments."""
    parser = argparse.ArgumentParser(
        prog="ep-plugin",
        description="Expert parallelism for Megatron.",
        epilog="On several ranks: torchrun ... -m ep_plugin.run SCRIPT ARGS",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == selected:
            module = _module(name)
            command.epilog = getattr(module, "EXAMPLES", None)
            module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a ConfigError is printed as one sentence and gives exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:  # not by argparse, which would take a `--` out of the script's flags
        return int(import_module("ep_plugin.run").main(argv[1:], "ep-plugin run"))
    selected = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(selected).parse_args(argv)
    module = _module(args.command)
    try:
        law.check(module, args, argv[argv.index(args.command) :])
        code = int(module.run(args))
        sys.stdout.flush()
    except ConfigError as error:
        words = law.words(getattr(module, "SPELLING", {}))
        sentence = one_line(error.spelled(words))
        print(f"ep-plugin {args.command}: error: {sentence}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head or less, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
