"""Tables on the terminal and files in a folder of results, written whole or not at all."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _record import Entry, ProblemRecord, Target
from _roofline import DIRECTIONS


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place; nothing half-written stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False, default=_plain) + "\n"
    write_whole(path, lambda beside: beside.write_text(text))


def _plain(value: object) -> object:
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda beside: beside.write_text(text.getvalue()))


def write_report(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write the results as <benchmark>.csv and all else into environment.json, by benchmark."""
    name, path = report["benchmark"], folder / "environment.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {k: v for k, v in report.items() if k not in ("benchmark", "results")}
    write_csv(folder / f"{name}.csv", report["results"])
    write_json(path, known)
    return [folder / f"{name}.csv", path]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _assembler(capability: tuple[int, int]) -> str | None:
    """Version of the kernels' assembler for a device, without which its times tell half."""
    try:
        from sefi_fast.kernels.ptxas import ptxas_version

        return ptxas_version(10 * capability[0] + capability[1])
    except (ImportError, RuntimeError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and load; no path or name of the machine."""
    found: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": {
            name: version
            for name in ("torch", "triton", "xformers", "numpy")
            if (version := _version(name)) is not None
        },
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "ptxas": _assembler(torch.cuda.get_device_capability(device)),
        }
    return found


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _cells(record: ProblemRecord, entry: Entry, eager_seconds: float | None) -> list[str]:
    cells = [entry.contender, "yes" if entry.with_loss else "no"]
    if not entry.sound:
        return [*cells, entry.verdict]
    row = record.row(entry, "both")
    cells += [f"{row['worst_error']:.1e}"]
    cells += [time_text(entry.seconds(direction)) for direction in DIRECTIONS]
    memory = entry.memory.extra / 2**20 if entry.memory else float("nan")
    seconds = entry.seconds("both")
    cells += [
        f"{row['spread'] * 100:.0f}%",
        f"{row['gflops']:.0f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['roofline_share'] * 100:.0f}% {row['roofline_unit'][:4]}",
        f"{memory:.2f}",
        f"{eager_seconds / seconds:.2f}" if eager_seconds and seconds else "-",
    ]
    return cells


_HEAD = ["contender", "loss", "error", "forward", "backward", "both", "spread"]
_HEAD += ["GFLOP/s", "GB/s", "roofline", "extra-MiB", "xeager"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned; a row shorter than the head ends in free text."""
    widths = [len(cell) for cell in head]
    for row in rows:
        if len(row) == len(head):
            widths = [max(width, len(cell)) for width, cell in zip(widths, row, strict=True)]
        else:
            widths[: len(row) - 1] = [
                max(width, len(cell)) for width, cell in zip(widths, row[:-1], strict=False)
            ]
    lines = []
    for row in (head, *rows):
        padded = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        if len(row) < len(head):
            padded[-1] = row[-1]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def problem_table(record: ProblemRecord) -> str:
    """The contenders of one problem, times as medians, both directions' rates and memory."""
    problem = record.problem
    eager = record.entry("eager-maps")
    eager_seconds = eager.seconds("both") if eager else None
    title = (
        f"\n{problem.layer}: {problem.heads} heads, batch {problem.batch}, {problem.keys} keys, "
        f"{record.dtype}"
    )
    if record.matrix_seconds:
        products = ", ".join(
            f"{what} {time_text(seconds)}" for what, seconds in record.matrix_seconds.items()
        )
        title += f"  (nine products at sgemm's rate: {products})"
    rows = [_cells(record, entry, eager_seconds) for entry in record.entries]
    return f"{title}\n{table(_HEAD, rows)}"


def targets_table(targets: Sequence[Target]) -> str:
    """Each ratio that has a target, with what was measured."""
    if not targets:
        return "\nNothing that was measured has a target."
    rows = [[*target[:2], *(f"{number:.2f}" for number in target[2:])] for target in targets]
    return f"\n{table(['problem', 'ratio', 'measured', 'target'], rows)}"
