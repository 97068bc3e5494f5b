"""What one run asks of the cross-attention layers and what they answer, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class LayerRecord:
    """The wishes for one cross-attention layer and the results of its latest call.

    A processor writes each result by assignment, so that a layer that runs twice (gradient
    checkpointing) leaves one result, not two.

    Attributes:
        reference_key: projected reference keys, [1 or B, M, heads · head_dim]; asks for alignment.
        token_weights: float32 weights of the text tokens in the alignment, [1 or B, M].
        reference_grad: whether a gradient runs through the reference map.
        map_tokens: int64 columns asked for, [1 or B, T]; negative entries give zero maps.
        alignment: [B] float32, equation 5 of docs/method.md; None when no reference was given.
        maps: [B, T, N] float32 head-mean probabilities; None when no columns were asked for.
    """

    reference_key: Tensor | None = None
    token_weights: Tensor | None = None
    reference_grad: bool = False
    map_tokens: Tensor | None = None
    alignment: Tensor | None = None
    maps: Tensor | None = None

    @property
    def asks(self) -> bool:
        """Whether anything beyond the attention output is wanted."""
        return self.reference_key is not None or self.map_tokens is not None


class AttentionRecord:
    """The layer records of one run, by the layers' names; it holds no other state."""

    def __init__(self) -> None:
        self._layers: dict[str, LayerRecord] = {}

    def layer(self, name: str) -> LayerRecord:
        """The record of the named layer, made on first use."""
        return self._layers.setdefault(name, LayerRecord())

    def items(self) -> Iterator[tuple[str, LayerRecord]]:
        """(name, record) of every layer asked for so far, in that order."""
        return iter(self._layers.items())

    def __len__(self) -> int:
        return len(self._layers)
