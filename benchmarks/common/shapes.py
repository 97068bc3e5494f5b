"""Cross-attention shapes of Stable Diffusion models, and their selection by words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Problem:
    """One cross-attention call: `batch` samples of `heads` heads, `queries` rows of `head_dim`."""

    model: str
    queries: int
    head_dim: int
    heads: int
    batch: int = 1
    keys: int = TEXT_TOKENS

    @property
    def layer(self) -> str:
        return f"{self.model} {self.queries}x{self.head_dim}"

    @property
    def name(self) -> str:
        return f"{self.layer} b{self.batch}"

    @property
    def rows(self) -> int:
        """Rows of the attention map, over batch and heads."""
        return self.batch * self.heads * self.queries


@dataclass(frozen=True)
class Layer:
    queries: int
    head_dim: int
    heads: int


# Latent sizes: 64² for SD 1.5 at 512², 96² for SD 2.1 at 768², 128² for SDXL at 1024², whose
# first block has no attention. Down factors 1, 2, 4 and 8.
MODELS: dict[str, tuple[Layer, ...]] = {
    "sd15": (Layer(4096, 40, 8), Layer(1024, 80, 8), Layer(256, 160, 8), Layer(64, 160, 8)),
    "sd21": (Layer(9216, 64, 5), Layer(2304, 64, 10), Layer(576, 64, 20), Layer(144, 64, 20)),
    "sdxl": (Layer(4096, 64, 10), Layer(1024, 64, 20)),
}
QUICK_SHAPES = ("sd15",)
BATCHES = (1, 4, 16)

_CUSTOM = re.compile(r"(\d+)x(\d+)x(\d+)")


def layers_of(shape: str) -> list[tuple[str, Layer]]:
    """Return the layers of one `--shapes` word: a model, `model:queries`, or `NxDxH`.

    Raises:
        ValueError: the word is none of them.
    """
    custom = _CUSTOM.fullmatch(shape)
    if custom:
        queries, head_dim, heads = (int(number) for number in custom.groups())
        if min(queries, head_dim, heads) < 1 or head_dim > 256:
            raise ValueError(
                f"shape {shape!r}: wanted queries, head_dim (at most 256) and heads of at least 1"
            )
        return [("custom", Layer(queries, head_dim, heads))]
    model, _, queries_word = shape.partition(":")
    found = [
        (model, layer)
        for layer in MODELS.get(model, ())
        if not queries_word or str(layer.queries) == queries_word
    ]
    if not found:
        known = ", ".join(MODELS)
        raise ValueError(
            f"shape {shape!r} is unknown: give a model ({known}), one of its layers as in "
            "'sd15:4096', or queries x head_dim x heads as in '4096x40x8'"
        )
    return found


def problems(
    shapes: Sequence[str], batches: Sequence[int], keys: int = TEXT_TOKENS
) -> list[Problem]:
    """Return all problems of the named shapes at each batch, without repeats, in order."""
    if not 1 <= keys <= 256:
        raise ValueError(f"keys is {keys}: the operator takes 1 to 256 text tokens")
    if any(batch < 1 for batch in batches):
        raise ValueError(f"batches are {list(batches)}: each must be at least 1")
    chosen = [
        Problem(model, layer.queries, layer.head_dim, layer.heads, batch, keys)
        for shape in shapes
        for model, layer in layers_of(shape)
        for batch in batches
    ]
    return list(dict.fromkeys(chosen))
