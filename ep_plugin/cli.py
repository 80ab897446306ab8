"""`ep-plugin COMMAND ...`: a thin table; each command's module is imported when it is called."""

import argparse
import contextlib
import os
import sys
import traceback
from importlib import import_module
from types import ModuleType

from ep_plugin import __version__
from ep_plugin.commands import law
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import one_line
from ep_plugin.written import cannot

BUG = 70  # exit code of a mistake of ours, as sysexits.h has it
# A command is a module of commands/ with add_arguments(parser) and run(args) -> int; and its help.
# In NEEDS it may say which of its flags act only beside others (commands/law.py).
COMMANDS = {
    "apply": "add the plugin to a Megatron pretrain script, or take it out",
    "audit": "check that a checkpoint is whole, with each expert in it once",
    "bench": "time the layer, its matrix products and kernels, also of other packages",
    "convert": "convert dense checkpoints to Mixture-of-Experts, and from and to Hugging Face",
    "doctor": "show what is installed, and whether it works together",
    "generate": "let a model go on with prompts, at any expert and tensor parallelism",
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
    parser = law.Parser(
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
    """Run one command and return its exit code.

    What a user can mend is one sentence, with code 2; Ctrl-C gives 130, a reader of the output that
    has had enough 1, and a mistake of ours BUG, with the traceback and where to report it.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        try:
            return _main(argv)
        finally:  # also where argparse ends the process, after --help
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _ended(130)
    except BrokenPipeError:  # the reader, head or less, has had enough
        return _ended(1)
    except OSError as error:
        command = next((word for word in argv if word in COMMANDS), "")
        if error.filename is None:
            _say(command, f"the output cannot be written ({error.strerror}); send it elsewhere")
        else:
            _say(command, cannot("read or written", error.filename, error))
        return _ended(2)


def _main(argv: list[str]) -> int:
    if argv[:1] == ["run"]:  # not by argparse, which would take a `--` out of the script's flags
        return int(import_module("ep_plugin.run").main(argv[1:], "ep-plugin run"))
    selected = next((word for word in argv if not word.startswith("-")), None)
    args, unknown = build_parser(selected).parse_known_args(argv)
    module = _module(args.command)
    if unknown:
        law.refuse_unknown(module, args.command, unknown)
    try:
        law.check(module, args, argv[argv.index(args.command) :])
        return int(module.run(args))
    except ConfigError as error:
        words = law.words(getattr(module, "SPELLING", {}))
        _say(args.command, error.spelled(words))
        return 2
    except MemoryError:
        _say(args.command, "memory ran out; use smaller sizes, or a machine with more memory")
        return 2
    except (OSError, KeyboardInterrupt):
        raise
    except Exception:
        traceback.print_exc()
        _say(
            args.command,
            "this is a mistake of ep-plugin, not of yours; please report the lines above, with the "
            f"command and `ep-plugin doctor --json`, of ep-plugin {__version__}",
        )
        return BUG


def _say(command: str, sentence: str) -> None:
    name = f"ep-plugin {command}".strip()
    print(f"{name}: error: {one_line(sentence)}", file=sys.stderr)


def _ended(code: int) -> int:
    """Return `code`; what is still to be written to the output is dropped."""
    with contextlib.suppress(OSError, ValueError):  # no file behind it, in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
