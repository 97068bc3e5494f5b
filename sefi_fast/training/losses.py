"""The losses of a training step.

A new attention loss is a class in this file, its name in AttentionLossName and LOSSES, its words in
LOSS_HELP, and its equation in docs/method.md.
"""

# TrainConfig takes the names from here, and --help must not wait for PyTorch: functions import it.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from sefi_fast.attention.processor import AttentionRecord
    from sefi_fast.training.config import TrainConfig
    from sefi_fast.training.prompts import BatchedPrompts

AttentionLossName = Literal["subject", "mask", "class", "none"]
LOSS_HELP = "subject: maps like the class word's; class: its column only; mask; none"


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, float32 [B] for predictions of any dtype."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def mask_loss(attn_probs: Tensor, present: Tensor, mask: Tensor) -> Tensor:
    """Return equation 13 of docs/method.md, [B].

    Args:
        attn_probs: [B, T, N], head-mean attention of the image tokens to the placeholder's T
            positions.
        present: bool [B, T], False for positions that a sentence lacks.
        mask: [B, N] in [0, 1], the share of the subject in each image token.
    """
    import torch

    highest = attn_probs.amax(2, keepdim=True).clamp_min(torch.finfo(attn_probs.dtype).tiny)
    distance = (attn_probs / highest - mask.unsqueeze(1)).square().mean(2)
    return (distance * present).sum(1) / present.sum(1)


class AttentionLoss:
    """Base of the attention losses of L subjects; by itself the loss that is none.

    Attributes:
        needs_reference: whether `prepare` takes the class words' sentences.
        needs_mask: whether each subject has a mask.
        sizes: (height, width) of the image tokens of each layer that carries the loss.
        tensors: what `prepare` computed, by name, with one entry for each subject.
    """

    needs_reference = False
    needs_mask = False

    def __init__(self, unet: Any, config: TrainConfig, latent_size: tuple[int, int]) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, Tensor] = {}

    @property
    def is_on(self) -> bool:
        """Whether any layer carries the loss."""
        return bool(self.sizes)

    def prepare(
        self, prompts: BatchedPrompts, reference: Tensor | None, masks: Tensor | None
    ) -> None:
        """Compute once what the loss needs of these subjects.

        Args:
            prompts: P sentences for each of L subjects.
            reference: the class words' sentences as the text encoder gives them, [L, P, M, C].
            masks: float32 [L, side, side].
        """

    def request(self, record: AttentionRecord, templates: Tensor) -> None:
        """Ask the layers for what samples of these sentences, int64 [L, B], need."""

    def collect(self, record: AttentionRecord, views: Tensor) -> Tensor:
        """Return the loss of each sample, float32 [L·B], from the layers' results.

        Args:
            views: int64 [L, B], 1 where the sample is the mirrored image.
        """
        raise NotImplementedError

    def keep(self, index: Tensor) -> None:
        """Keep the subjects of `index` only, in its order."""
        self.tensors = {name: tensor[index] for name, tensor in self.tensors.items()}


class _LayerLoss(AttentionLoss):
    def __init__(self, unet: Any, config: TrainConfig, latent_size: tuple[int, int]) -> None:
        from sefi_fast.attention.layers import layer_resolutions, reduced_size

        super().__init__(unet, config, latent_size)
        self._unet = unet
        self._reference_grad = config.reference_grad
        factors = layer_resolutions(unet)
        self.sizes = {name: reduced_size(latent_size, factor) for name, factor in factors.items()}
        if (wanted := config.loss_resolutions) is None:
            return
        sides = {name: max(size) for name, size in self.sizes.items()}
        if missing := sorted(set(wanted) - set(sides.values())):
            present = ", ".join(str(side) for side in sorted(set(sides.values())))
            raise ValueError(
                f"loss_resolutions names {', '.join(map(str, missing))}, but at this resolution "
                f"the attention maps have the sides {present}"
            )
        self.sizes = {name: self.sizes[name] for name, side in sides.items() if side in wanted}


class SubjectLoss(_LayerLoss):
    """Squared distance of the attention maps to those of the class word, equation 5."""

    needs_reference = True

    def prepare(
        self, prompts: BatchedPrompts, reference: Tensor | None, masks: Tensor | None
    ) -> None:
        import torch

        from sefi_fast.attention.layers import cross_attention_layers

        assert reference is not None
        layers = cross_attention_layers(self._unet)
        prompt = reference.flatten(0, 1).to(self._unet.dtype)
        with torch.no_grad():
            for name in self.sizes:
                attn = layers[name]
                normed = prompt
                if attn.norm_cross is not None:
                    normed = attn.norm_encoder_hidden_states(prompt)
                # W^k c_r, [L, P, M, inner].
                self.tensors[f"reference.{name}"] = attn.to_k(normed).unflatten(
                    0, (len(reference), -1)
                )

    def request(self, record: AttentionRecord, templates: Tensor) -> None:
        for name in self.sizes:
            layer = record.layer(name)
            layer.reference_key = _of_samples(self.tensors[f"reference.{name}"], templates)
            layer.reference_grad = self._reference_grad

    def collect(self, record: AttentionRecord, views: Tensor) -> Tensor:
        return _layer_mean([record.layer(name).subject_loss for name in self.sizes])


class ClassLoss(SubjectLoss):
    """The subject loss over the columns of the class word alone, equation 14."""

    def prepare(
        self, prompts: BatchedPrompts, reference: Tensor | None, masks: Tensor | None
    ) -> None:
        super().prepare(prompts, reference, masks)
        self.tensors["weights"] = (prompts.slots > 0).float()

    def request(self, record: AttentionRecord, templates: Tensor) -> None:
        super().request(record, templates)
        weights = _of_samples(self.tensors["weights"], templates)
        for name in self.sizes:
            record.layer(name).token_weights = weights


class MaskLoss(_LayerLoss):
    """Squared distance of the placeholder's attention to a mask of the subject, equation 13."""

    needs_mask = True

    def prepare(
        self, prompts: BatchedPrompts, reference: Tensor | None, masks: Tensor | None
    ) -> None:
        import torch

        assert masks is not None
        is_subject = prompts.slots > 0
        most = int(is_subject.sum(2).max())
        places = torch.where(
            is_subject, torch.arange(is_subject.shape[2], device=is_subject.device), -1
        )
        # Positions of the placeholder in each sentence, int64 [L, P, T], filled up with -1.
        self.tensors["positions"] = places.sort(2, descending=True).values[..., :most].contiguous()
        for size in set(self.sizes.values()):
            shares = torch.nn.functional.adaptive_avg_pool2d(
                masks.to(is_subject.device).unsqueeze(1), size
            )
            # [L, 2, N], mirrored in the second.
            self.tensors[f"mask.{size}"] = torch.cat([shares, shares.flip(3)], 1).flatten(2)

    def request(self, record: AttentionRecord, templates: Tensor) -> None:
        positions = _of_samples(self.tensors["positions"], templates)
        for name in self.sizes:
            record.layer(name).probs_positions = positions

    def collect(self, record: AttentionRecord, views: Tensor) -> Tensor:
        terms = []
        for name, size in self.sizes.items():
            layer = record.layer(name)
            assert layer.attn_probs is not None and layer.probs_positions is not None
            mask = _of_samples(self.tensors[f"mask.{size}"], views)
            terms.append(mask_loss(layer.attn_probs, layer.probs_positions >= 0, mask))
        return _layer_mean(terms)


LOSSES: dict[str, type[AttentionLoss]] = {
    "subject": SubjectLoss,
    "class": ClassLoss,
    "mask": MaskLoss,
    "none": AttentionLoss,
}


def loss_class(config: TrainConfig) -> type[AttentionLoss]:
    """Return the class of the attention loss that these settings train with."""
    return LOSSES[config.attention_loss if config.weight_lambda > 0 else "none"]


def mask_problem(has_mask: bool, attention_loss: str) -> str | None:
    """Return why a subject with or without a mask does not fit an attention loss, or None."""
    if has_mask == LOSSES[attention_loss].needs_mask:
        return None
    return (
        f"there is {'a' if has_mask else 'no'} mask, but attention_loss is {attention_loss!r}. "
        "Give a mask with attention_loss='mask', and only with it"
    )


def clear(record: AttentionRecord) -> None:
    """Let go of the layers' results, which hold a step's graph."""
    for _, layer in record.items():
        layer.subject_loss = layer.attn_probs = None


def _layer_mean(terms: Sequence[Tensor | None]) -> Tensor:
    import torch

    return torch.stack([term for term in terms if term is not None]).mean(0)


def _of_samples(kept: Tensor, index: Tensor) -> Tensor:
    """Return entries [L·B, …] of a kept [L, n, …] for int64 [L, B]; [1, …] of a single entry."""
    import torch

    subjects, count = kept.shape[:2]
    entries = kept.flatten(0, 1)
    if subjects == count == 1:
        return entries
    first = torch.arange(subjects, device=index.device).unsqueeze(1) * count
    return entries.index_select(0, (index + first).flatten())
