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
        tokens: the start values for each text encoder; the modules themselves are not changed.
        latents: of the picture.
        prompts: the training sentences.
        seed: of everything drawn at random for this lane.
        mask: float32 [side, side] in [0, 1], 1 where the picture shows the subject;
            `attention_loss="mask"` needs it, the other losses take none.
        time_ids: float32 [6], the picture's size and crop (`image.time_ids`), which models with
            two text encoders need and others do not take.
    """

    tokens: tuple[SubjectTokens, ...]
    latents: LatentDistribution
    prompts: TrainingPrompts
    seed: int
    mask: Tensor | None = None
    time_ids: Tensor | None = None


def check_lanes(lanes: Sequence[Lane], attention_loss: str, encoders: int) -> None:
    """Raise ValueError unless these lanes make one batch for this loss and number of encoders."""
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
        _check_encoders(number, lane, encoders)


def _check_encoders(number: int, lane: Lane, encoders: int) -> None:
    found = {len(lane.tokens), len(lane.prompts.input_ids)}
    if found != {encoders}:
        raise ValueError(
            f"lane {number} has tokens for {len(lane.tokens)} text encoder(s) and sentences for "
            f"{len(lane.prompts.input_ids)}, but the model has {encoders}: give both for each"
        )
    if (lane.time_ids is not None) != (encoders > 1):
        state = "no time_ids" if lane.time_ids is None else "time_ids"
        raise ValueError(
            f"lane {number} has {state}, but the model has {encoders} text encoder(s): give the "
            "picture's size and crop for SDXL, which is conditioned on them, and for SDXL only"
        )


def _shape(lane: Lane) -> dict[str, object]:
    first = lane.tokens[0]
    return {
        "the number of stages": first.stages,
        "split": first.split,
        "the tokens' module": first.module,
        "the number of vectors": first.vectors,
        "the tokens' width": [tokens.width for tokens in lane.tokens],
        "the trained parameters": [
            [name for name, _ in tokens.named_parameters()] for tokens in lane.tokens
        ],
        "the number of attention heads": [tokens.heads for tokens in lane.tokens],
        "the shape of the latents": tuple(lane.latents.mean.shape),
        "the shape of the tokenised sentences": tuple(lane.prompts.input_ids.shape),
        "the side of the mask": None if lane.mask is None else tuple(lane.mask.shape),
    }
