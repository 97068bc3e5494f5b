"""`sefi-fast info`: versions, devices and backends."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

from sefi_fast import __version__
from sefi_fast.cli.options import Commands

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "xformers")


def add(commands: Commands) -> None:
    parser = commands.add_parser("info", help="show versions, the machine and available backends")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from sefi_fast.ops.dispatch import available_backends

    backends = {name: reason or "available" for name, reason in available_backends().items()}
    sections = {"versions": _versions(), "machine": _machine(), "backends": backends}
    for title, entries in sections.items():
        print(title)
        for name, value in entries.items():
            print(f"  {name:<14}{value}")
    return 0


def _versions() -> dict[str, str]:
    found = {"sefi_fast": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
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
