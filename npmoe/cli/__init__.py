"""The command ``npmoe``: train, generate, report, check, bench, explain and others."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from npmoe import __version__
from npmoe.cli import bench, check, conventions, explain, generate, gradcheck, info, report, train
from npmoe.errors import NpmoeError

_COMMANDS = {
    "train": train,
    "generate": generate,
    "report": report,
    "check": check,
    "bench": bench,
    "explain": explain,
    "conventions": conventions,
    "gradcheck": gradcheck,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; ``sys.argv[1:]`` if omitted.

    Returns
    -------
    int
        0 on success, 1 after a mistake of the user's or a failed check, 2 for a wrong command
        line, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="npmoe", description="Mixture of Experts in NumPy, with hand-written gradients."
    )
    parser.add_argument("--version", action="version", version=f"npmoe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal may lack a character
    try:
        code: int = options.run(options)
    except NpmoeError as error:
        message = str(error).removeprefix(f"{options.command}: ")
        print(f"npmoe {options.command}: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"npmoe {options.command}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; the interpreter flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
