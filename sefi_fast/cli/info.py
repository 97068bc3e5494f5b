"""`sefi-fast info`: versions, the machine, and which backends run here."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("info", help="versions, the machine, and which backends run here")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from sefi_fast.info import report

    print(report())
    return 0
