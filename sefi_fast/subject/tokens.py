"""Trainable module that computes the tokens of each stage and stream from the class embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def mixed_rows(tensors: Mapping[str, Tensor], heads: int) -> Tensor:
    """Return the rows [..., n, C] of equation 2 in docs/method.md, of one subject or several.

    Row j belongs to vector j mod W, and is added to that vector's base embedding.

    Args:
        tensors: parameters and buffers of `SubjectTokens` with ``module="attention"`` by name, all
            with the same leading axes: an axis of subjects, or none.
        heads: attention heads.
    """
    slots, base = tensors["slots"], tensors["base"]
    if base.shape[-2] > 1:
        repeats = slots.shape[-2] // base.shape[-2]
        base = base.unsqueeze(-3).expand(*base.shape[:-2], repeats, -1, -1).flatten(-3, -2)
    normed = nn.functional.layer_norm(base + slots, base.shape[-1:])
    normed = normed * tensors["norm.weight"].unsqueeze(-2) + tensors["norm.bias"].unsqueeze(-2)
    projected = normed @ tensors["in_weight"].mT + tensors["in_bias"].unsqueeze(-2)
    # For a few dozen rows plain products are as fast as a fused kernel, and deterministic.
    split = projected.reshape(*projected.shape[:-1], 3, heads, -1)
    query, key, value = split.transpose(-4, -2).unbind(-3)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    mixed = (scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2)
    change: Tensor = mixed @ tensors["out_weight"].mT * tensors["scale"][..., None, None]
    return base + change


class SubjectTokens(nn.Module):
    """Tokens ``P_i^K, P_i^V`` of a placeholder, W pairs for each stage (docs/method.md §1).

    With ``module="attention"`` each of the ``n = 2·S·W`` tokens (``S·W`` when tied) is

        ``token_j = P_t + W_out · attention(LayerNorm(P_t + slot))_j``

    where ``P_t`` is its vector's base embedding, ``slot`` are trained slot embeddings, the
    attention is one multi-head self-attention over the ``n`` slots, and ``W_out`` (no bias) starts
    at zero. Slot embeddings enter the attention only, so at the start every token equals its class
    embedding bit for bit. ``W_out`` is kept in units of the class embeddings' root mean square, so
    that a learning rate means the same on text encoders of different scale. With
    ``module="free"`` the tokens are plain trainable rows with the same start.

    All parameters are float32; the forward pass disables autocast.

    Args:
        class_embedding: [W, C], the start of each vector: the class word's rows of the text
            encoder's token table; or [C] for W = 1.
        stages: number of stages S, at least 1.
        split: True for a K and a V token in each stage, False for one token for both streams.
        heads: most attention heads; the largest divisor of C up to it is used.
        train_base: whether ``P_t`` itself is trained (``module="attention"`` only).
        module: ``"attention"`` or ``"free"``.
        generator: source of the random start values; the result depends on nothing else.

    Raises:
        ValueError: the class embedding has another shape or is not finite, or an argument is out
            of range.
    """

    class_embedding: Tensor
    base: Tensor
    scale: Tensor

    def __init__(
        self,
        class_embedding: Tensor,
        stages: int = 5,
        split: bool = True,
        heads: int = 8,
        train_base: bool = True,
        module: str = "attention",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if class_embedding.dim() == 1:
            class_embedding = class_embedding.unsqueeze(0)
        if class_embedding.dim() != 2 or not class_embedding.is_floating_point():
            raise ValueError(
                f"class_embedding must be floating-point vectors [W, C] or [C], got "
                f"{class_embedding.dtype} of shape {tuple(class_embedding.shape)}"
            )
        if not bool(torch.isfinite(class_embedding).all()):
            raise ValueError("class_embedding holds NaN or infinity; is the text encoder intact?")
        if stages < 1:
            raise ValueError(f"stages must be at least 1, got {stages}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if module not in ("attention", "free"):
            raise ValueError(f"module must be 'attention' or 'free', got {module!r}")
        start = class_embedding.detach().to(torch.float32).clone()
        vectors, width = start.shape
        device = start.device
        self.stages = stages
        self.split = split
        self.module = module
        self.heads = next(n for n in range(min(heads, width), 0, -1) if width % n == 0)
        self.register_buffer("class_embedding", start)
        count = stages * self.streams * vectors
        if module == "free":
            self.rows = nn.Parameter(start.repeat(stages * self.streams, 1))
            return

        scale = start.square().mean().sqrt()
        self.register_buffer("scale", torch.where(scale > 0, scale, 1.0))
        if train_base:
            self.base = nn.Parameter(start.clone())
        else:
            self.register_buffer("base", start.clone())

        def uniform(bound: float, *shape: int) -> Tensor:
            # On the generator's device, so that a CPU generator gives one start everywhere.
            source = generator.device if generator is not None else torch.device("cpu")
            values = torch.empty(shape, dtype=torch.float32, device=source)
            return values.uniform_(-bound, bound, generator=generator).to(device)

        # √3 gives the slots the root mean square of the embedding they are added to.
        self.slots = nn.Parameter(uniform(3**0.5 * float(self.scale), count, width))
        self.norm = nn.LayerNorm(width, dtype=torch.float32, device=device)
        self.in_weight = nn.Parameter(uniform((3 / width) ** 0.5, 3 * width, width))
        self.in_bias = nn.Parameter(start.new_zeros(3 * width))
        self.out_weight = nn.Parameter(start.new_zeros(width, width))

    @property
    def streams(self) -> int:
        """Streams of a stage: 2 if K and V are split, 1 if tied."""
        return 2 if self.split else 1

    @property
    def width(self) -> int:
        """Width C of the text encoder's token table."""
        return self.class_embedding.shape[1]

    @property
    def vectors(self) -> int:
        """Number of tokens W of the placeholder in a prompt."""
        return self.class_embedding.shape[0]

    def forward(self) -> Tensor:
        """Return tokens, float32 [S, 2, W, C] (axis 1: K row, V row), or [S, 1, W, C] if tied."""
        shape = (self.stages, self.streams, self.vectors, self.width)
        if self.module == "free":
            return self.rows.view(shape)
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        with torch.autocast(self.class_embedding.device.type, enabled=False):
            return mixed_rows(own, self.heads).view(shape)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return groups for ``torch.optim``: embedding rows, and weights of the attention.

        ``learning_rate`` is in the units of Textual Inversion, that is of the token table. For the
        attention's matrices it is divided by ``scale · C``: one Adam step through ``W_out`` then
        moves a token about as far as one step of the row itself.
        """
        if self.module == "free":
            return [{"params": [self.rows], "lr": learning_rate, "name": "rows"}]
        rows = [self.slots] + ([self.base] if isinstance(self.base, nn.Parameter) else [])
        weights = [self.in_weight, self.in_bias, self.out_weight, *self.norm.parameters()]
        return [
            {"params": rows, "lr": learning_rate, "name": "rows"},
            {
                "params": weights,
                "lr": learning_rate / (float(self.scale) * self.width),
                "name": "attention",
            },
        ]
