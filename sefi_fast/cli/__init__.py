"""The command `sefi-fast`, a module for each subcommand; `interchange` has export and import."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from sefi_fast import __version__
from sefi_fast.errors import SefiError, is_out_of_memory

_COMMANDS = (
    "train",
    "train-many",
    "generate",
    "maps",
    "swap",
    "interchange",
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
    options = _parser().parse_args(arguments)
    # It tells on import that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except Exception as error:
        if is_out_of_memory(error):
            reason = str(error).strip().partition("\n")[0]
            message = f"there is not enough memory ({reason}): {_SMALLER}"
        elif isinstance(error, (SefiError, ValueError, TypeError, OSError)):
            message = str(error)
        else:
            raise
        print(f"sefi-fast {options.command}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"sefi-fast {options.command}: {str(error) or 'stopped'}", file=sys.stderr)
        return 128 + getattr(error, "signal", 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sefi-fast", description="Personalise a diffusion model from one picture (SeFi-IDE)."
    )
    parser.add_argument("--version", action="version", version=f"sefi_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"sefi_fast.cli.{name.replace('-', '_')}").add(commands)
    return parser
