"""The training step of SDXL as a page of formulas, on `plain.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from training.plain import PlainTraining

from sefi_fast.training.image import load_image
from sefi_fast.training.noise import Draw


class PlainTrainingXL(PlainTraining):
    """`PlainTraining` with two text encoders; `rows` is one module for each."""

    def __init__(self, pipe, image, config, class_word: str, rows, mask=None) -> None:
        super().__init__(pipe, image, config, class_word, rows, mask)
        self.encoders = (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2.requires_grad_(False).eval()),
        )
        self.time_ids = _time_ids(load_image(image), 8 * self.mean.shape[-1])

    def encode_both(self, rows: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """[P, M, C] and pooled [P, D]: the templates with `rows` in the class word's place."""
        texts = [text.replace("{}", self.class_word) for text in self.config.sentences()]
        hidden = []
        for number, (tokenizer, encoder) in enumerate(self.encoders):
            ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
            ids = ids.input_ids
            if number == 0:
                self.ids = ids
            table = encoder.get_input_embeddings().weight
            changed = table
            if rows is not None:
                for word, row in zip(self.class_word.split(), rows[number], strict=True):
                    is_word = torch.arange(len(table)) == tokenizer.convert_tokens_to_ids(
                        word + "</w>"
                    )
                    changed = torch.where(is_word[:, None], row, changed)
            name = next(n for n, p in encoder.named_parameters() if p is table)
            output = torch.func.functional_call(
                encoder, {name: changed}, (ids,), {"output_hidden_states": True}
            )
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(hidden, -1), pooled

    def condition(self, drawn: Draw) -> dict[str, Tensor]:
        """Sets the samples' prompts; V's pooled embedding and the image's size and crop."""
        first, second = (module().to(self.mean.dtype) for module in self.rows)
        stages = drawn.timesteps * self.config.stages // 1000
        keys, values, pooled = [], [], []
        for stage, template in zip(stages.tolist(), drawn.template.tolist(), strict=True):
            key, _ = self.encode_both((first[stage, 0], second[stage, 0]))
            value, of_value = self.encode_both((first[stage, -1], second[stage, -1]))
            keys.append(key[template])
            values.append(value[template])
            pooled.append(of_value[template])
        reference, _ = self.encode_both(None)
        self.step_data.update(
            key=torch.stack(keys),
            value=torch.stack(values),
            reference=reference[drawn.template],
            maps={},
        )
        return {
            "text_embeds": torch.stack(pooled),
            "time_ids": self.time_ids.to(self.mean.dtype).repeat(len(stages), 1),
        }


def _time_ids(image, size: int) -> Tensor:
    """As diffusers' SDXL examples do it: the shorter side is resized, then the centre cut out."""
    width, height = image.size
    shorter = min(width, height)
    resized = (int(size * height / shorter), int(size * width / shorter))
    top, left = (round((side - size) / 2) for side in resized)
    return torch.tensor([[height, width, top, left, size, size]])
