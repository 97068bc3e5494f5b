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
from sefi_fast.errors import SefiError, first_line, is_out_of_memory, printable

_MODULES = ("train", "generate", "convert", "evaluate", "info", "demo")
_SMALLER = (
    "to train, try --low-memory, a smaller --batch-size or --resolution; to generate, a smaller "
    "--number, --width and --height"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0, 1 for an expected error, 128 plus the number of the signal that ended it
        (129: SIGHUP, 130: SIGINT, 143: SIGTERM).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableRecord())
    # On import, transformers warns that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    name, status = "sefi-fast", 1
    try:
        options = _parser().parse_args(arguments)
        name = f"sefi-fast {options.command}"
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except Exception as error:
        if is_out_of_memory(error):
            message = f"there is not enough memory ({first_line(error)[:300]}): {_SMALLER}"
        elif isinstance(error, (SefiError, ValueError, TypeError, OSError)):
            message = str(error)
        else:
            raise
    except KeyboardInterrupt as error:
        message, status = str(error) or "stopped", 128 + getattr(error, "signal", 2)
    print(f"{name}: {printable(message)}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are safe to print, whatever the arguments hold."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _PrintableRecord(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sefi-fast", description="Personalise a diffusion model from one image (SeFi-IDE)."
    )
    parser.add_argument("--version", action="version", version=f"sefi_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _MODULES:
        importlib.import_module(f"sefi_fast.cli.{module}").add(commands)
    return parser
