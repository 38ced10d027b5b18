"""The command line: ``fusedvae COMMAND``, also ``python -m fusedvae COMMAND``.

A command is a module of this package, named in ``COMMANDS``: its docstring's first line is its help,
``add_arguments(parser)`` says what it takes and ``run(arguments)`` does it and returns the exit status.

Exit statuses: 0, done; 1, done, and what was found is bad (see the command's help); 2, bad input, with one line on
stderr that says what; 130, interrupted by Ctrl-C (143 by SIGTERM); 141, nobody reads what is printed.
What the terminal cannot show is escaped. A training run goes on where nothing can be printed any more.
"""

from __future__ import annotations

import argparse
import importlib
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ..version import __version__
from .errors import CommandError, LostProcessError
from .processes import speaks
from .streams import tolerant

COMMANDS = ("train", "bench", "info")


class _Parser(argparse.ArgumentParser):
    """Bad arguments get one line: ``--help`` has the usage."""

    # What begins so is a value: to argparse, before Python 3.14, -1e-3 and -8,8 are options that it does not know.
    _NEGATIVE = re.compile(r"-[\d.]")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = self._NEGATIVE

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fusedvae", description="Fused kernels for variational autoencoders in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedvae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"fusedvae.cli.{name}")
        summary, _, description = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own arguments) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Known before the parser is: an error of a command's own arguments names that command.
    name = " ".join(["fusedvae", *argv[:1]]) if argv and argv[0] in COMMANDS else "fusedvae"
    with tolerant(goes_on=argv[:1] == ["train"]) as (out, err):
        try:
            status = _status(argv, name)
            out.flush()
        except BrokenPipeError as error:  # as in `fusedvae info | head -1`: nobody is left to be told anything
            out.failure = error
            return 128 + signal.SIGPIPE
        if out.failure is not None and status in (0, 1):
            print(f"{name}: error: cannot write to standard output: {out.failure.strerror}", file=err)
            return 128 + signal.SIGPIPE if isinstance(out.failure, BrokenPipeError) else 2
        return status


def _status(argv: list[str], name: str) -> int:
    """Run a command line, and say what went wrong."""
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments))
    except CommandError as error:
        if not (speaks() or isinstance(error, LostProcessError)):
            return 2
        message = " ".join(str(error).split())
        print(f"{name}: error: {message}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # PyTorch's error is a type of its own for GPUs only.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print(
            f"{name}: error: not enough memory: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        if speaks():
            print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as request:  # argparse's --help
        return int(request.code or 0)
