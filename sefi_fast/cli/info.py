"""`sefi-fast info`: versions, devices and backends."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from sefi_fast import __version__

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "xformers")


def versions() -> dict[str, str]:
    """Version of sefi_fast, of Python and of each package it works with ("not installed")."""
    found = {"sefi_fast": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, str]:
    """The processor and its threads, what the native modules were built for, CUDA devices."""
    import torch

    from sefi_fast.ops import cpu, cuda

    built = cuda.architectures()
    devices = [
        f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
        for index in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(index)]
    ]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "native core": cpu.instruction_set() or "not built",
        "cuda kernels": "not built" if built is None else f"built for {', '.join(built)}",
        "cuda devices": ", ".join(devices) or "none",
    }


def report() -> str:
    """All of it as lines of text, the backends last: available, or why not."""
    from sefi_fast.ops.dispatch import available_backends

    backends = {name: reason or "available" for name, reason in available_backends().items()}
    sections = {"versions": versions(), "machine": machine(), "backends": backends}
    lines: list[str] = []
    for title, entries in sections.items():
        lines.append(title)
        lines.extend(f"  {name:<14}{value}" for name, value in entries.items())
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("info", help="versions, the machine, and which backends run here")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    pass  # MOVED

    print(report())
    return 0
