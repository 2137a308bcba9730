"""ddpm_hf COMMAND: train, sample, score, restore and share DDPMs that stock diffusers loads."""

import argparse
import errno
import os
import sys
from importlib import import_module

from . import __version__
from .commands import COMMANDS
from .commands.flags import Parser
from .errors import UserError, no_such
from .output import drop_failing_output
from .provenance import program


def module_of(command: str):
    """Return the module of a command, e.g. ddpm_hf.commands.push_space for "push-space"."""
    return import_module(f".commands.{command.replace('-', '_')}", __package__)


def parse(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Parse a command line into a namespace of flags.

    The namespace also has `command`, the name of the command, and `prog`, the program name that begins error messages.

    Exits with code 2 on bad input, and with code 0 after --help and --version.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in COMMANDS:
        refuse(words)
    command, *words = words
    prog, module = prog or f"{program()} {command}", module_of(command)
    if command == "train":
        arguments = module.parse(words, prog)
    else:
        parser = Parser(prog, module.__doc__)
        module.add_flags(parser)
        arguments = parser.parse_args(words)
    arguments.command, arguments.prog = command, prog
    return arguments


def refuse(words: list[str]):
    """Answer --help or --version, or print that the first word is not a command. Then exit."""
    listing = [f"  {command:11} {module_of(command).__doc__.partition(chr(10))[0]}" for command in COMMANDS]
    parser = Parser(
        program(),
        "\n".join([__doc__, "", "commands:", *listing]),
        usage="%(prog)s COMMAND [flags]",
        epilog="%(prog)s COMMAND --help shows examples and the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    if words and not words[0].startswith("-"):
        parser.error(no_such("command", words[0], COMMANDS))
    parser.parse_args(words)
    parser.error(f"a command is missing: choose from {', '.join(COMMANDS)}.")


def main(argv: list[str] | None = None, prog: str | None = None):
    """Run a command line. Exits with code 2 after a UserError, and with code 130 after Ctrl-C."""
    drop_failing_output()
    arguments = argparse.Namespace(command=None, prog=prog or program())
    is_first = int(os.environ.get("LOCAL_RANK", 0)) <= 0
    try:
        arguments = parse(argv, prog)
        if is_first and arguments.command != "presets" and "torch" not in sys.modules:
            # The import takes seconds, or a minute on a slow disk.
            print("Loading PyTorch and diffusers ...", file=sys.stderr, flush=True)
        module_of(arguments.command).run(arguments)
    except UserError as error:
        if error.on_one_process or is_first:  # else process 0 prints it
            # Replace line breaks and control characters: the message may quote a download, and a terminal obeys them.
            shown = "".join(each if each.isprintable() else " " for each in str(error))
            print(f"{arguments.prog}: error: {shown}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(
            f"{arguments.prog}: error: the name {str(error.filename)[:60]!r}... is too long: shorten it.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        can_resume = arguments.command in ("sample", "evaluate", "restore")
        more = " Finished images are kept: run the same command again to draw the rest." if can_resume else ""
        print(f"\nStopped.{more}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
