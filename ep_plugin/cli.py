"""`ep-plugin COMMAND ...`: a thin table; each command's module is imported when it is called."""

import argparse
import os
import sys
from importlib import import_module

from ep_plugin import __version__
from ep_plugin.errors import ConfigError

# command -> (module with add_arguments(parser) and run(args) -> int, one line of help)
COMMANDS = {
    "apply": ("ep_plugin.codemod", "add the plugin to a Megatron pretrain script, or take it out"),
    "audit": (
        "ep_plugin.audit.command",
        "prove that a checkpoint is whole, each expert there once",
    ),
    "bench": ("ep_plugin.bench.command", "time the layer, its products and kernels beside peers"),
    "convert": (
        "ep_plugin.convert.command",
        "dense checkpoints to Mixture-of-Experts, Hugging Face both ways",
    ),
    "doctor": ("ep_plugin.doctor", "say what is installed and whether Megatron matches"),
    "parity": ("ep_plugin.parity.command", "compare layouts with one rank, on your own script"),
    "plan": ("ep_plugin.plan.command", "foresee what a layer's exchanges take on so many ranks"),
    "presets": ("ep_plugin.presets._command", "list published systems, or print one's arguments"),
    "report": ("ep_plugin.report.command", "draw what happened in runs, as HTML and PNG"),
}


def build_parser(selected: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the selected command's module is imported for its arguments."""
    parser = argparse.ArgumentParser(
        prog="ep-plugin",
        description="Expert parallelism for Megatron.",
        epilog="To run a script with the plugin: torchrun ... -m ep_plugin.run SCRIPT ARGS",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == selected:
            module = import_module(path)
            command.epilog = getattr(module, "EXAMPLES", None)
            module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a ConfigError is printed as one sentence and gives exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    selected = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(selected).parse_args(argv)
    module = import_module(COMMANDS[args.command][0])
    try:
        code = int(module.run(args))
        sys.stdout.flush()
    except ConfigError as error:
        print(f"ep-plugin {args.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head or less, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
