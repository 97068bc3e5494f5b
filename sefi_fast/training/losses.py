"""The losses of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sefi_fast.attention.layers import cross_attention_layers, layer_resolutions, reduced_size
from sefi_fast.attention.processor import AttentionRecord
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.prompts import LanePrompts


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B] whatever the prediction's dtype."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def mask_loss(maps: Tensor, present: Tensor, mask: Tensor) -> Tensor:
    """Equation 13 of docs/method.md: [B].

    Args:
        maps: [B, T, N], head-mean attention of the image tokens to the placeholder's T places.
        present: bool [B, T], False for the places that a sentence lacks.
        mask: [B, N] in [0, 1], the share of the subject in each image token.
    """
    peak = maps.amax(2, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    distance = (maps / peak - mask.unsqueeze(1)).square().mean(2)
    return (distance * present).sum(1) / present.sum(1)


def layer_mean(terms: Sequence[Tensor]) -> Tensor:
    """Mean over layers of terms [B] each: [B]."""
    return torch.stack(list(terms)).mean(0)


class AttentionTerm:
    """Subject-wise loss, class column or mask, of L lanes, through the operator's outputs alone.

    Args:
        unet: frozen, on its device.
        record: what the layers read and write.
        config: the settings.
        latent_size: (height, width) of the latents.

    Raises:
        ValueError: `loss_resolutions` names a side that no layer has.
    """

    def __init__(
        self, unet: Any, record: AttentionRecord, config: TrainConfig, latent_size: tuple[int, int]
    ) -> None:
        self._unet, self._record = unet, record
        self._kind = config.attention_loss if config.weight_lambda > 0 else "none"
        self._reference_grad = config.reference_grad
        factors = layer_resolutions(unet)
        sizes = {name: reduced_size(latent_size, factor) for name, factor in factors.items()}
        self._sizes = {} if self._kind == "none" else _chosen(sizes, config.loss_resolutions)
        self._references: dict[str, Tensor] = {}
        self._weights: Tensor | None = None
        self._columns: Tensor | None = None
        self._masks: dict[tuple[int, int], Tensor] = {}

    @property
    def is_on(self) -> bool:
        """Whether there is an attention term at all."""
        return bool(self._sizes)

    def prepare(self, prompts: LanePrompts, reference: Tensor | None, masks: Tensor | None) -> None:
        """Computes once what the term needs of these lanes.

        Args:
            prompts: of L lanes, P sentences each.
            reference: the class words' sentences as the text encoder gives them, [L, P, M, C];
                the mask's loss does without.
            masks: float32 [L, side, side].
        """
        device = prompts.slots.device
        if self._kind == "mask":
            assert masks is not None
            self._columns = _columns(prompts.slots)
            self._masks = {
                size: _views(masks.to(device), size) for size in set(self._sizes.values())
            }
        elif self._sizes:
            assert reference is not None
            self._references = self._project(reference)
            if self._kind == "class":
                self._weights = (prompts.slots > 0).float()

    def needs_reference(self) -> bool:
        """Whether `prepare` wants the class words' sentences."""
        return self.is_on and self._kind != "mask"

    def ask(self, templates: Tensor) -> None:
        """Tells the layers what the samples with these sentences, int64 [L, B], want of them."""
        weights, columns = (
            None if x is None else _of_samples(x, templates) for x in (self._weights, self._columns)
        )
        for name in self._sizes:
            layer = self._record.layer(name)
            if self._kind == "mask":
                layer.probs_positions = columns
                continue
            layer.reference_key = _of_samples(self._references[name], templates)
            layer.token_weights = weights
            layer.reference_grad = self._reference_grad

    def collect(self, views: Tensor) -> Tensor:
        """The term of each sample, [L·B] float32, from the layers' answers, which are taken away.

        Args:
            views: int64 [L, B], 1 where the sample is the mirrored image.
        """
        answers = []
        for name, size in self._sizes.items():
            layer = self._record.layer(name)
            if self._kind == "mask":
                assert layer.attn_probs is not None and layer.probs_positions is not None
                mask = _of_samples(self._masks[size], views)
                answers.append(mask_loss(layer.attn_probs, layer.probs_positions >= 0, mask))
            else:
                assert layer.subject_loss is not None
                answers.append(layer.subject_loss)
        self.clear()
        return layer_mean(answers)

    def clear(self) -> None:
        """Lets go of the layers' answers, which hold a step's graph."""
        for _, layer in self._record.items():
            layer.subject_loss = layer.attn_probs = None

    def tensors(self) -> dict[str, Tensor]:
        """What `prepare` computed, by name, each with one entry a lane: no copies."""
        found = {f"reference.{name}": keys for name, keys in self._references.items()}
        found |= {f"mask.{side}": mask for side, mask in self._masks.items()}
        for name, tensor in (("weights", self._weights), ("columns", self._columns)):
            if tensor is not None:
                found[name] = tensor
        return found

    def keep(self, index: Tensor) -> None:
        """Keeps the lanes of `index` only, in its order."""
        self._references = {name: keys[index] for name, keys in self._references.items()}
        self._masks = {side: mask[index] for side, mask in self._masks.items()}
        self._weights = None if self._weights is None else self._weights[index]
        self._columns = None if self._columns is None else self._columns[index]

    @torch.no_grad()
    def _project(self, reference: Tensor) -> dict[str, Tensor]:
        """W^k c_r of every layer that carries the loss, [L, P, M, inner]."""
        layers = cross_attention_layers(self._unet)
        lanes = len(reference)
        prompt = reference.flatten(0, 1).to(self._unet.dtype)
        keys = {}
        for name in self._sizes:
            attn = layers[name]
            normed = prompt
            if attn.norm_cross is not None:
                normed = attn.norm_encoder_hidden_states(prompt)
            keys[name] = attn.to_k(normed).unflatten(0, (lanes, -1))
        return keys


def _chosen(
    sizes: dict[str, tuple[int, int]], wanted: tuple[int, ...] | None
) -> dict[str, tuple[int, int]]:
    if wanted is None:
        return sizes
    sides = {name: max(size) for name, size in sizes.items()}
    missing = sorted(set(wanted) - set(sides.values()))
    if missing:
        present = ", ".join(str(side) for side in sorted(set(sides.values())))
        raise ValueError(
            f"loss_resolutions names {', '.join(map(str, missing))}, but at this resolution the "
            f"attention maps have the sides {present}"
        )
    return {name: size for name, size in sizes.items() if sides[name] in wanted}


def _of_samples(kept: Tensor, index: Tensor) -> Tensor:
    """Entries [L·B, …] of a kept [L, n, …] for int64 [L, B]; [1, …] if there is but one entry."""
    lanes, count = kept.shape[:2]
    entries = kept.flatten(0, 1)
    if lanes == count == 1:
        return entries
    first = torch.arange(lanes, device=index.device).unsqueeze(1) * count
    return entries.index_select(0, (index + first).flatten())


def _columns(slots: Tensor) -> Tensor:
    """Places of the placeholder in each sentence, int64 [L, P, T], filled up with -1."""
    is_subject = slots > 0
    most = int(is_subject.sum(2).max())
    places = torch.where(is_subject, torch.arange(slots.shape[2], device=slots.device), -1)
    return places.sort(2, descending=True).values[..., :most].contiguous()


def _views(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Shares of the subject in the image tokens of a layer, [L, 2, N], mirrored in the second."""
    shares = torch.nn.functional.adaptive_avg_pool2d(masks.unsqueeze(1), size)
    return torch.cat([shares, shares.flip(3)], 1).flatten(2)
