"""One subject in training beside others, and what must agree between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sefi_fast.subject import SubjectTokens
from sefi_fast.training.latents import LatentDistribution
from sefi_fast.training.prompts import TrainingPrompts


@dataclass(frozen=True, eq=False)
class Lane:
    """One subject in training; lanes of one engine share its settings and nothing else.

    Attributes:
        tokens: the start values; the module itself is not changed.
        latents: of the picture.
        prompts: the training sentences.
        seed: of everything drawn at random for this lane.
        mask: float32 [side, side] in [0, 1], 1 where the picture shows the subject;
            `attention_loss="mask"` needs it, the other losses take none.
    """

    tokens: SubjectTokens
    latents: LatentDistribution
    prompts: TrainingPrompts
    seed: int
    mask: Tensor | None = None


def check_lanes(lanes: Sequence[Lane], attention_loss: str) -> None:
    """Raise ValueError unless these lanes can be computed as one batch under this loss."""
    if not lanes:
        raise ValueError("there is no lane to train: give at least one subject")
    first = _shape(lanes[0])
    for number, lane in enumerate(lanes):
        for name, value in _shape(lane).items():
            if value != first[name]:
                raise ValueError(
                    f"lanes 0 and {number} cannot train side by side: {name} is {first[name]} in "
                    f"the first and {value} in the other; give them the same or an engine each"
                )
        if (lane.mask is not None) != (attention_loss == "mask"):
            state = "no mask" if lane.mask is None else "a mask"
            raise ValueError(
                f"lane {number} has {state}, but attention_loss is {attention_loss!r}: give a mask "
                "with attention_loss='mask', and with that only"
            )


def _shape(lane: Lane) -> dict[str, object]:
    tokens = lane.tokens
    return {
        "the number of stages": tokens.stages,
        "split": tokens.split,
        "the tokens' module": tokens.module,
        "the tokens' width": tokens.width,
        "the trained parameters": [name for name, _ in tokens.named_parameters()],
        "the number of attention heads": tokens.heads,
        "the shape of the latents": tuple(lane.latents.mean.shape),
        "the shape of the tokenised sentences": tuple(lane.prompts.input_ids.shape),
        "the side of the mask": None if lane.mask is None else tuple(lane.mask.shape),
    }
