"""Tables on the terminal, and files in a folder of results, written whole or not at all."""

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

from common.rates import device_name

Row = dict[str, Any]
"""One line of a CSV file, by column."""
Target = tuple[str, str, float, float]
"""A problem, a ratio, its measured value and its least wanted value."""

RESULTS = Path(__file__).resolve().parents[1] / "results"


def reason(error: Exception) -> str:
    """Return the first line of an error, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return " ".join(word for word in text.split() if "/" not in word)[:160]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it to `path`; no half-written file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue()))


def read_csv(path: Path) -> list[Row]:
    """Read rows as `write_csv` wrote them; empty cells are left out."""

    def value(text: str) -> object:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return {"True": True, "False": False}.get(text, text)

    with path.open(newline="") as file:
        return [
            {name: value(text) for name, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def write_report(report: dict[str, Any], device: torch.device, folder: Path | None) -> Path:
    """Write the results as <benchmark>.csv and all else into environment.json; return the folder.

    folder: results/<device> if None.
    """
    folder = folder or RESULTS / device_name(device)
    name, path = report["benchmark"], folder / "environment.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    rest = {k: v for k, v in report.items() if k not in ("benchmark", "results")}
    known[name] = {"device": device_name(device), "environment": environment(device), **rest}
    write_csv(folder / f"{name}.csv", report["results"])
    write_json(path, known)
    for written in (folder / f"{name}.csv", path):
        print(f"wrote {os.path.relpath(written)}")
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ptxas_version(capability: int) -> str | None:
    """Return the version of the kernels' assembler, on which times of Triton's kernels depend."""
    try:
        from sefi_fast.kernels.ptxas import ptxas_version

        return ptxas_version(capability)
    except (ImportError, RuntimeError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device and load, without paths or names of the machine."""
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
        major, minor = torch.cuda.get_device_capability(device)
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": [major, minor],
            "cuda": torch.version.cuda,
            "ptxas": _ptxas_version(10 * major + minor),
        }
    return found


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns; a row shorter than the head ends in free text."""
    widths = [len(cell) for cell in head]
    for row in rows:
        aligned = row if len(row) == len(head) else row[:-1]
        for place, cell in enumerate(aligned):
            widths[place] = max(widths[place], len(cell))
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


def targets_table(targets: Sequence[Target]) -> str:
    """Return each ratio that has a target, next to its measured value."""
    if not targets:
        return "\nNo measured ratio has a target."
    rows = [[*target[:2], *(f"{number:.2f}" for number in target[2:])] for target in targets]
    return f"\n{table(['problem', 'ratio', 'measured', 'target'], rows)}"
