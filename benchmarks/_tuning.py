"""What a tuner tries for each place of the table of configurations, and the lines it prints."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from _shapes import MODELS, Problem

if TYPE_CHECKING:
    import torch
    from sefi_fast.kernels import KernelConfig

KERNELS = ("forward", "backward", "backward_query", "backward_key_value")
BATCHES = (1, 16)
# Head widths that stand for a bucket in which no layer of a known model lies.
_STAND_INS = (40, 64, 80, 160, 256, 32)
_QUERIES = 1024
_SHAPES = {
    "half": ((16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8)),
    "single": ((16, 4), (16, 8), (32, 4), (32, 8), (64, 8)),
}
KEY_TILES = (0, 16, 32, 64)
# By warps: the compiler's choice, and what lets three or four (of eight warps: two) be resident.
_REGISTERS = {4: (0, 128, 168), 8: (0, 128)}


class Place(NamedTuple):
    """Where one configuration stands in the table; capability is the device's own."""

    kernel: str
    capability: int
    precision: str
    width: int


@dataclass
class Trial:
    """One configuration at one place: what was found, or why it was dropped."""

    place: Place
    config: KernelConfig
    default: bool
    dropped: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a problem, or one without a time."""
        common = {
            **self.place._asdict(),
            **self.config._asdict(),
            "default": self.default,
            "dropped": self.dropped,
        }
        figures = dict(self.figures)
        times = figures.pop("times", {"": {}})
        return [{**common, "problem": name, **timing, **figures} for name, timing in times.items()]


class Winner(NamedTuple):
    """A configuration that is better than the default of its place, and the evidence in words."""

    place: Place
    config: KernelConfig
    evidence: str


def precision_of(dtype: torch.dtype) -> str:
    """The table's word for an element type."""
    return "single" if dtype.itemsize == 4 else "half"


@functools.cache
def table_width(kernel: str, capability: int, dtype: torch.dtype, head_dim: int) -> int:
    """The head width bucket in which a kernel looks up this head width: that of the tiles."""
    from sefi_fast.kernels.configs import WIDTHS, smallest_tile, split_tile

    smallest = smallest_tile(kernel, precision_of(dtype), capability)
    width = sum(split_tile(head_dim, smallest))
    return next(limit for limit in WIDTHS if width <= limit)


def problems_of(place: Place, dtype: torch.dtype) -> list[Problem]:
    """The layers of known models that take this place of the table, at each batch.

    Where there is none, a layer of 8 heads made up for it; none at all for a bucket of widths
    that this kernel never asks for.
    """
    kernel, capability, _, width = place

    def lies_here(head_dim: int) -> bool:
        return table_width(kernel, capability, dtype, head_dim) == width

    if default_of(place) is None:
        return []
    found = [
        Problem(model, layer.queries, layer.head_dim, layer.heads, batch)
        for model, layers in MODELS.items()
        for layer in layers
        if lies_here(layer.head_dim)
        for batch in BATCHES
    ]
    stand_in = next(filter(lies_here, _STAND_INS), None)
    if found or stand_in is None:
        return found
    return [Problem("custom", _QUERIES, stand_in, 8, batch) for batch in BATCHES]


def default_of(place: Place) -> KernelConfig | None:
    """What the table says now, for 77 keys; None where it has no such kernel."""
    from sefi_fast.kernels.configs import choose_config, choose_fused_config

    kernel, capability, precision, width = place
    if kernel == "backward":
        return choose_fused_config(capability, precision, width, 80)
    return choose_config(kernel, capability, precision, width, 80)


def candidates(place: Place) -> list[KernelConfig]:
    """The default first, then every other configuration worth a try, each once.

    Of these nobody knows yet how many programs of them are resident; compiling tells.
    """
    from sefi_fast.kernels import KernelConfig

    shapes = _SHAPES[place.precision]
    default = default_of(place)
    assert default is not None
    if place.kernel == "backward":
        # Sums of another number of gradients are other work.
        tried = [
            default._replace(
                block_m=block,
                num_warps=warps,
                max_registers=registers,
                prefetch=prefetch,
                load_do_late=late,
            )
            for block, warps in shapes
            for prefetch, late in ((False, False), (True, False), (False, True))
            for registers in _REGISTERS[warps]
        ]
    elif place.kernel == "backward_key_value":
        tried = [
            KernelConfig(block, warps, stages, reload, separate, key_tile)
            for (block, warps), (stages, reload), separate, key_tile in product(
                shapes, ((1, False), (1, True), (2, True)), (False, True), KEY_TILES
            )
        ]
    else:
        tried = [
            KernelConfig(block, warps, stages, reload, max_registers=registers, load_do_late=late)
            for (block, warps), stages, reload in product(shapes, (1, 2), (False, True))
            for registers in _REGISTERS[warps]
            for late in ((False,) if place.kernel == "forward" or reload else (False, True))
        ]
    others = [c for c in tried if c._replace(ctas_per_sm=default.ctas_per_sm) != default]
    return list(dict.fromkeys([default, *others]))


def as_code(config: KernelConfig) -> str:
    """The configuration as the table writes it: block, warps, stages, then what is not usual."""
    named = [
        f"{name}={value!r}".replace("'", '"')
        for name, value in config._asdict().items()
        if name in config._field_defaults and value != config._field_defaults[name]
    ]
    return f"KernelConfig({', '.join([*map(str, config[:3]), *named])})"


def table_lines(winners: Sequence[Winner]) -> Iterator[str]:
    """Lines for TABLE in kernels/configs.py, under the key they belong to.

    A key that the table does not have yet gets all its widths; those without a winner keep their
    default.
    """
    from sefi_fast.kernels.configs import TABLE, WIDTHS

    for key in dict.fromkeys(winner.place[:3] for winner in winners):
        kernel, capability, precision = key
        yield f'    ("{kernel}", {capability}, "{precision}"): {{'
        here = {winner.place.width: winner for winner in winners if winner.place[:3] == key}
        for width in WIDTHS if key not in TABLE else sorted(here):
            if width in here:
                yield f"        # {here[width].evidence}"
                config: KernelConfig | None = here[width].config
            else:
                config = default_of(Place(kernel, capability, precision, width))
            if config is not None:
                yield f"        {width}: {as_code(config)},"
        yield "    },"
