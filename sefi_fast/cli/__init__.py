"""The command `sefi-fast`, with its subcommands in a module for each topic."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sefi_fast import __version__
from sefi_fast.errors import SefiError, is_out_of_memory, printable

_COMMANDS = (
    "train",
    "generate",
    "convert",
    "evaluate",
    "info",
    "demo",
)


_SMALLER = (
    "to train, try --low-memory, a smaller --batch-size or --resolution; to draw, a smaller "
    "--number, --width and --height"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0, 1 for an expected error, 128 and the signal's number when a signal
        ended it (129: SIGHUP, 130: SIGINT, 143: SIGTERM).
    """
    _make_printable()
    try:
        options = _parser().parse_args(arguments)
    except SefiError as error:
        print(f"sefi-fast: {error}", file=sys.stderr)
        return 1
    # It tells on import that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except Exception as error:
        if is_out_of_memory(error):
            reason = str(error).strip().partition("\n")[0][:300]
            message = f"there is not enough memory ({reason}): {_SMALLER}"
        elif isinstance(error, (SefiError, ValueError, TypeError, OSError)):
            message = str(error)
        else:
            raise
        print(f"sefi-fast {options.command}: {printable(message)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        reason = printable(str(error)) or "stopped"
        print(f"sefi-fast {options.command}: {reason}", file=sys.stderr)
        return 128 + getattr(error, "signal", 2)


class _Parser(argparse.ArgumentParser):
    """One that shows what it was given in a form that is safe to print."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _PrintableRecord(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _make_printable() -> None:
    """Let no character end the command: what an encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableRecord())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sefi-fast", description="Personalise a diffusion model from one image (SeFi-IDE)."
    )
    parser.add_argument("--version", action="version", version=f"sefi_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"sefi_fast.cli.{name}").add(commands)
    return parser
