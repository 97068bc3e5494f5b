"""sefi_fast's own training step on a ready pipeline, set up as `sefi_fast.train` does it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from _plain_steps import size_and_crop, start_tokens, training_prompts
from torch import Tensor

from sefi_fast.training import TrainConfig
from sefi_fast.training.base_model import BaseModel, frozen
from sefi_fast.training.engine import Engine, SubjectInputs
from sefi_fast.training.latents import encode_image


class SefiStep:
    """One step of the engine; the image's encoder is released once its latents are known."""

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        device = pipe.unet.device
        latents = encode_image(pipe.vae, pixels, config.flip)
        pipe.vae = None
        # Entered for good: the models are this step's own.
        self._models = ExitStack()
        source = BaseModel(pipe, "random weights", None, device, dtype, owned=True)
        self._models.enter_context(frozen(source, config))
        subject = SubjectInputs(
            start_tokens(pipe, config),
            latents,
            training_prompts(pipe, config),
            config.seed,
            time_ids=size_and_crop(pipe, pixels),
        )
        self.engine = Engine(
            unet=pipe.unet,
            text_encoders=source.text_encoders,
            scheduler=pipe.scheduler,
            subjects=[subject],
            config=config,
            dtype=dtype,
        )

    def __call__(self) -> tuple[float, float]:
        (result,) = self.engine.step()
        assert result is not None
        return result.noise, result.subject_loss
