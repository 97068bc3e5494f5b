"""This process's share of many subjects, under accelerate's or torch's launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sefi_fast.errors import TrainingError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Process `index` of `count`; `state` is accelerate's, which gave it a device of its own."""

    index: int = 0
    count: int = 1
    state: Any = None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every `count`-th item from `index` on: each item is exactly one process's."""
        return list(items[self.index :: self.count])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def current_shard() -> Shard:
    """What the launcher's environment says of this process; one of one without a launcher.

    Raises:
        TrainingError: accelerate was set up for fewer processes than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched < 2:
        return Shard()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without this word accelerate sees no processes where there is no GPU.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    if state.num_processes != launched:
        raise TrainingError(
            f"{launched} processes were launched, but accelerate was set up for "
            f"{state.num_processes}, so each would learn the same subjects: make its first "
            "PartialState or Accelerator with cpu=True on machines without a GPU"
        )
    return Shard(state.process_index, state.num_processes, state)
