"""Notes the operations of a step, to find those that a CUDA graph cannot hold."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What waits for a device, has a size that depends on values, or begins on the host.
FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "lift_fresh")


class Watch(TorchDispatchMode):
    """Notes every operation by its name."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        picks = arguments[1] if name.startswith("index") and isinstance(arguments[1], list) else ()
        by_mask = any(pick is not None and pick.dtype == torch.bool for pick in picks)
        self.seen.add("nonzero" if by_mask else name)
        return function(*arguments, **(keywords or {}))
