"""Attention processors of diffusers that run the fused cross-attention, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from sefi_fast.attention.regions import RegionPrompts
from sefi_fast.errors import BackendError
from sefi_fast.ops import fused_cross_attention


@dataclass(eq=False)
class LayerRecord:
    """The requests to one cross-attention layer and the results of its latest call.

    A processor assigns each result, so that a layer that runs twice (gradient checkpointing)
    leaves one result.

    Attributes:
        reference_key: projected reference keys, [1 or B, M, heads · head_dim]; requests the loss.
        token_weights: float32 weights of the text tokens in the subject loss, [1 or B, M].
        reference_grad: whether a gradient runs through the reference map.
        probs_positions: int64 token positions whose maps are requested, [1 or B, T]; negative
            entries give zero maps.
        subject_loss: [B] float32, equation 5 of docs/method.md; None without a reference.
        attn_probs: [B, T, N] float32 head-mean probabilities; None without positions.
    """

    reference_key: Tensor | None = None
    token_weights: Tensor | None = None
    reference_grad: bool = False
    probs_positions: Tensor | None = None
    subject_loss: Tensor | None = None
    attn_probs: Tensor | None = None

    @property
    def has_requests(self) -> bool:
        """Whether more than the attention output is requested."""
        return self.reference_key is not None or self.probs_positions is not None


class AttentionRecord(dict[str, LayerRecord]):
    """The layer records of one run by the names of their layers."""

    def layer(self, name: str) -> LayerRecord:
        """Return the record of the named layer, created on first use."""
        return self.setdefault(name, LayerRecord())


@dataclass(eq=False)
class PromptState:
    """State that travels on a prompt tensor to the cross-attention layers of one model call.

    It is bound to the tensor, not to the layers, so that other threads and other pipelines over
    the same model are not affected. Compiled models do not read it.

    Attributes:
        records: id of a layer → its record, in place of the processor's own (`trace`).
        regions: prompts for parts of the image (`regions`).
        training: whether the prompt belongs to a training (`TrainingProcessor`).
    """

    records: Mapping[int, LayerRecord] | None = None
    regions: RegionPrompts | None = None
    training: bool = False

    def put_on(self, prompt: Tensor) -> None:
        """Let this state travel with `prompt`, in place of an earlier one."""
        prompt.sefi_state = self  # type: ignore[attr-defined]

    @staticmethod
    def of(prompt: Any) -> PromptState | None:
        """Return the state on a prompt, or None."""
        if prompt is None or torch.compiler.is_compiling():
            return None
        return getattr(prompt, "sefi_state", None)

    @staticmethod
    def take_off(prompt: Tensor) -> PromptState:
        """Remove the state from a prompt and return it."""
        state: PromptState = vars(prompt).pop("sefi_state")
        return state


# diffusers writes a masked key as a bias of -10000. A bias between this and 0 is soft, which a
# boolean mask cannot express.
_MASKED_BELOW = -1000.0


class SeFiAttnProcessor:
    """Drop-in attention processor for diffusers' `Attention`, for self- and cross-attention.

    For plain prompts it computes what AttnProcessor2_0 computes. Cross-attention runs the fused
    operator if its record requests the subject loss or probabilities, or if a backend is named.
    Otherwise it runs torch's scaled_dot_product_attention, as sampling does.

    Mixed precision: the processor follows the dtype of the model (float32, float16, bfloat16) and
    torch.autocast. The subject loss and the probabilities are float32 in every dtype.

    Example:
        >>> unet.to(torch.bfloat16)
        >>> unet.set_attn_processor(SeFiAttnProcessor(backend="triton"))
        >>> record = LayerRecord(probs_positions=torch.tensor([[4]]))  # maps of token 4
        >>> unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(
        ...     SeFiAttnProcessor(record=record)
        ... )

    Args:
        split_streams: cross-attention gets [B, 2·M, C]: first the M rows that keys are projected
            from, then the M rows for values (equation 3 of docs/method.md). A mask for it has M
            entries a sample.
        record: requests to this layer's cross-attention, and the place of their results.
        backend: backend of the fused operator, by name. It takes up to 256 keys and key masks only.
        self_attention: "sdpa" or "xformers".

    Raises:
        ValueError: `self_attention` is neither of the two.
        BackendError: xformers was requested and cannot be imported.
    """

    def __init__(
        self,
        *,
        split_streams: bool = False,
        record: LayerRecord | None = None,
        backend: str | None = None,
        self_attention: Literal["sdpa", "xformers"] = "sdpa",
    ) -> None:
        if self_attention not in ("sdpa", "xformers"):
            raise ValueError(
                f"self_attention must be 'sdpa' or 'xformers', but it is {self_attention!r}"
            )
        self.split_streams = split_streams
        self.record = record
        self.backend = backend
        self.self_attention = self_attention
        self._efficient_attention: Any = None
        if self_attention == "xformers":
            try:
                from xformers.ops import memory_efficient_attention
            except (ImportError, OSError) as error:
                raise BackendError(
                    "self_attention='xformers' was requested, but xformers cannot be imported "
                    f"({error}). Install a build that fits this torch, or use "
                    "self_attention='sdpa'."
                ) from error
            self._efficient_attention = memory_efficient_attention

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` [B, N, C] or [B, C, h, w] to itself or to a prompt."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query = attn.to_q(hidden_states)
        query = _split_heads(query, attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        key, value = self._project(attn, hidden_states, encoder_hidden_states)

        mask = self._prepare_mask(attn, attention_mask, key)
        scale = None if attn.scale == query.shape[-1] ** -0.5 else attn.scale
        state = PromptState.of(encoder_hidden_states) or PromptState()
        record = self.record if state.records is None else state.records.get(id(attn), self.record)
        if encoder_hidden_states is None:
            output = self._attend_to_self(query, key, value, mask, scale)
        elif self.backend is not None or (record is not None and record.has_requests):
            record = record or LayerRecord()
            output = self._attend_fused(attn, query, key, value, mask, scale, record)
        else:
            output = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
            if record is not None:
                record.subject_loss = record.attn_probs = None
        if state.regions is not None:
            output = self._attend_in_regions(attn, query, output, state.regions, scale)

        hidden_states = output.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        result: Tensor = hidden_states / attn.rescale_output_factor
        return result

    def _project(
        self, attn: Attention, hidden_states: Tensor, prompt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, heads, L, head_dim] of the prompt, or of the image itself."""
        streams: tuple[Tensor, ...] = (hidden_states,)
        if prompt is not None:
            if not isinstance(prompt, Tensor):
                raise TypeError(
                    f"SeFiAttnProcessor got encoder_hidden_states of type {type(prompt).__name__}, "
                    "as IP-Adapter makes them. It takes one tensor. Call pipe.unload_ip_adapter() "
                    "first."
                )
            if self.split_streams and prompt.shape[1] % 2:
                raise ValueError(
                    f"a prompt of odd length {prompt.shape[1]} reached cross-attention that takes "
                    "a key and a value stream of equal length. The stage hook of this model is "
                    "missing. Call sefi_fast.attach(pipe, ...) again."
                )
            streams = prompt.chunk(2, dim=1) if self.split_streams else (prompt,)
            if attn.norm_cross is not None:
                streams = tuple(attn.norm_encoder_hidden_states(stream) for stream in streams)
        key = _split_heads(attn.to_k(streams[0]), attn.heads)
        value = _split_heads(attn.to_v(streams[-1]), attn.heads)
        return key if attn.norm_k is None else attn.norm_k(key), value

    def _prepare_mask(self, attn: Attention, mask: Tensor | None, key: Tensor) -> Tensor | None:
        """Return [B, heads, 1 or N, keys] from diffusers' [B, 1 or N, keys], or None."""
        if mask is None:
            return None
        batch, heads, length, _ = key.shape
        if self.split_streams and mask.shape[-1] != length:
            raise ValueError(
                f"the attention mask has {mask.shape[-1]} entries a sample, but each of the key "
                f"and value streams has {length} tokens. Give one entry a token of the prompt."
            )
        mask = attn.prepare_attention_mask(mask, length, batch)
        return mask.view(batch, heads, -1, mask.shape[-1])

    def _attend_to_self(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        if self._efficient_attention is None:
            return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        bias = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        output: Tensor = self._efficient_attention(*tokens_first, attn_bias=bias, scale=scale)
        return output.transpose(1, 2)

    def _attend_in_regions(
        self,
        attn: Attention,
        query: Tensor,
        output: Tensor,
        regions: RegionPrompts,
        scale: float | None,
    ) -> Tensor:
        """Return `output` [B, heads, N, head_dim], replaced where the regions' image tokens lie."""
        output = output.clone()
        samples = regions.samples
        for prompt, places in regions.of(attn, query):
            key, value = self._project(attn, query, prompt)
            output[-samples:, :, places] = F.scaled_dot_product_attention(
                query[-samples:, :, places],
                key.expand(samples, -1, -1, -1),
                value.expand(samples, -1, -1, -1),
                scale=scale,
            ).to(output.dtype)
        return output

    def _attend_fused(
        self,
        attn: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        record: LayerRecord,
    ) -> Tensor:
        reference_key = record.reference_key
        if reference_key is not None:
            reference_key = _split_heads(reference_key.to(key.dtype), attn.heads)
            if attn.norm_k is not None:
                reference_key = attn.norm_k(reference_key)
        result = fused_cross_attention(
            query,
            key,
            value,
            reference_key=reference_key,
            token_weights=record.token_weights,
            key_mask=None if mask is None else _key_mask(mask),
            probs_positions=record.probs_positions,
            scale=scale,
            reference_grad=record.reference_grad,
            backend=self.backend,
        )
        record.subject_loss = None if reference_key is None else result.subject_loss
        record.attn_probs = None if record.probs_positions is None else result.attn_probs
        return result.output


class TrainingProcessor(SeFiAttnProcessor):
    """Split-stream processor for the prompts of a training (`PromptState.training`).

    Prompts of pipelines that other threads run on the U-Net go to `replaced`, the processor that
    the layer has without the training.
    """

    replaced: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        state = PromptState.of(encoder_hidden_states)
        own = torch.compiler.is_compiling() or (state is not None and state.training)
        attend: Any = super().__call__ if own else self.replaced
        output: Tensor = attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [B, L, heads · head_dim] as a view [B, heads, L, head_dim]."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def _key_mask(mask: Tensor) -> Tensor:
    """Return the boolean [B, keys] of a [B, heads, 1, keys] mask or bias."""
    first = mask[:, 0, 0]
    soft = mask.dtype != torch.bool
    keep = first > _MASKED_BELOW if soft else first
    fits = mask.shape[2] == 1 and torch.equal(mask, mask[:, :1].expand_as(mask))
    if not fits or (soft and not bool(torch.all(~keep | (first == 0)))):
        raise ValueError(
            f"the attention mask, {tuple(mask.shape)} as [B, heads, queries, keys], differs "
            "between queries or heads, or holds biases between masked (-10000) and free (0). The "
            "fused operator takes only key masks. Give encoder_attention_mask as [B, tokens], or "
            "request no subject loss, maps or backend."
        )
    return keep
