"""Command-line options that the benchmarks share, and their exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.timing import Effort
from sefi_fast import keep_freed_memory

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
}
PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The trainer's words for the dtypes."""


def bench_parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options of a benchmark that runs on a CPU or on CUDA."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available")
    parser.add_argument("--seconds", type=float, help="seconds of timing per row")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--no-plots", action="store_true")
    return parser


def choose_device(word: str | None) -> torch.device:
    """Return the device of a word, by default CUDA if available.

    Raises:
        ValueError: the device is not available.
    """
    word = word or ("cuda" if torch.cuda.is_available() else "cpu")
    if word.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {word}: wanted cpu or cuda")
    device = torch.device(word)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return device


def default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def effort_of(options: argparse.Namespace, full: Effort, quick: Effort) -> Effort:
    """Return the length of a measurement."""
    effort = quick if options.quick else full
    return effort if options.seconds is None else effort._replace(seconds=options.seconds)


def exit_status(name: str, run: Callable[[], dict[str, Any]]) -> int:
    """Run a benchmark; return 0, 1 if a row of sefi_fast failed, or 2 for bad arguments."""
    keep_freed_memory()
    try:
        rows = run()["results"]
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    failed = {
        row["provider"]
        for row in rows
        if row.get("provider", "").startswith("sefi") and row["status"].startswith("fail")
    }
    if failed:
        print(f"FAILED: {', '.join(sorted(failed))}", file=sys.stderr)
    return 1 if failed else 0
