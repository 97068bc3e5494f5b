"""Attention maps of chosen words while a pipeline samples, never the full maps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image
from torch import Tensor, nn

from sefi_fast.attention_record import LayerRecord
from sefi_fast.conditioning.prompt import word_positions
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.layers import (
    call_argument,
    cross_attention_layers,
    layer_resolutions,
    reduced_size,
)
from sefi_fast.pipelines.families import check_not_compiled, check_pipeline, unwrap
from sefi_fast.pipelines.overlay import draw_grid, draw_overlay
from sefi_fast.pipelines.prompt_encoder import PipelineCall, PromptEncoder, watched
from sefi_fast.utils.words import composed

_PLAIN = "StableDiffusionPipeline.from_pipe(pipe) (StableDiffusionXLPipeline for SDXL)"


class _Call:
    """Sums over the layers and steps of one call of the pipeline."""

    def __init__(self, words: int, map_tokens: Tensor, guidance: bool) -> None:
        self.words = words
        self.guidance = guidance
        self.map_tokens = map_tokens
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.layer_calls = 0
        # Prompt and size of the input of the U-Net's call that runs.
        self.running: tuple[Tensor, tuple[int, int]] | None = None

    def tokens_for(self, batch: int, device: torch.device) -> Tensor:
        """[batch, words · positions] for the U-Net's batch: under guidance its second half."""
        expected = len(self.map_tokens) * (2 if self.guidance else 1)
        if batch != expected:
            raise ModelError(
                f"while tracing, the U-Net was called with a batch of {batch} where the prompts "
                f"make {expected}: trace a pipeline that runs it on the prompts alone (SAG does "
                f"not), such as {_PLAIN}, and run no other meanwhile"
            )
        if self.map_tokens.device != device:
            self.map_tokens = self.map_tokens.to(device)
        if not self.guidance:
            return self.map_tokens
        return torch.cat([torch.full_like(self.map_tokens, -1), self.map_tokens])

    def add(self, maps: Tensor, size: tuple[int, int]) -> None:
        """Add one layer's [batch, words · positions, N]."""
        samples = len(self.map_tokens)
        maps = maps.detach()[-samples:].unflatten(1, (self.words, -1)).sum(2)
        maps = maps.unflatten(-1, size)
        self.sums[size] = maps if size not in self.sums else self.sums[size] + maps
        self.layer_calls += 1

    def mean(self) -> Tensor:
        """[B, words, h, w] at the largest size: sums upsample as well as their parts would."""
        largest = max(self.sums, key=lambda size: size[0] * size[1])
        total = torch.zeros_like(self.sums[largest])
        for size, maps in self.sums.items():
            if size == largest:
                total += maps
            else:
                total += F.interpolate(maps, largest, mode="bilinear", align_corners=False)
        return total / self.layer_calls


class Trace:
    """What `trace` found in the latest call of the pipeline."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._latest: _Call | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        """Word → [B, h, w] float32: the attention its tokens get, in [0, 1].

        Mean over heads, cross-attention layers (bilinear to the largest) and U-Net calls; the sum
        over the tokens where the word is several; zero where a prompt lacks the word. B counts
        prompts times pictures a prompt; under guidance it is the conditional half.

        Raises:
            ValueError: no call of the pipeline ran inside the with block.
        """
        if self._latest is None or not self._latest.layer_calls:
            raise ValueError("nothing was traced: call the pipeline inside the with block first")
        return dict(zip(self.words, self._latest.mean().unbind(1), strict=True))

    def overlay(self, image: Image.Image, word: str, index: int = 0) -> Image.Image:
        """`image`, in its own size, with the map of `word` of sample `index` over it.

        Colours run from nothing to the strongest place of this one map.

        Raises:
            KeyError: the word was not traced.
            IndexError: there is no sample of that index.
        """
        return draw_overlay(image, self._pick([word], index)[0])

    def grid(
        self, images: Sequence[Image.Image], words: Sequence[str] | None = None
    ) -> Image.Image:
        """One row a picture: the picture, then the overlay of each word, with captions.

        Args:
            images: the pictures of the latest call, in its order.
            words: which of the traced words; None for all.

        Raises:
            KeyError, IndexError: as for `overlay`.
            ValueError: there is no picture.
        """
        chosen = self.words if words is None else tuple(words)
        rows = [
            (image, list(zip(chosen, self._pick(chosen, index), strict=True)))
            for index, image in enumerate(images)
        ]
        return draw_grid(rows)

    def _pick(self, words: Sequence[str], index: int) -> list[Tensor]:
        maps, words = self.maps, [composed(word) for word in words]
        for word in words:
            if word not in maps:
                raise KeyError(f"{word!r} was not traced; the traced words are {list(maps)}")
        samples = len(maps[self.words[0]])
        if not -samples <= index < samples:
            raise IndexError(f"there is no sample {index}: the latest call made {samples}")
        return [maps[word][index] for word in words]


class _Tracer:
    """Puts records on the prompt of each U-Net call and gathers what the layers answer."""

    def __init__(self, pipe: Any, found: Trace, encoder: PromptEncoder) -> None:
        self._pipe = pipe
        self._found = found
        self._encoder = encoder
        unet = unwrap(pipe.unet)
        self._layers = cross_attention_layers(unet)
        self._factors = layer_resolutions(unet)
        # By thread, since one pipeline may serve several; the newest call is the one shown.
        self._calls: dict[int, _Call] = {}

    def begin(self, call: PipelineCall) -> None:
        """Find the words in the prompts of a call that starts."""
        # Told before the call replaces processors, which would stay.
        if getattr(self._pipe, "do_perturbed_attention_guidance", False):
            raise ModelError(
                "perturbed-attention guidance runs the U-Net on a third batch, in which no word "
                f"can be traced: give pag_scale=0, or trace {_PLAIN}"
            )
        prompts = call.prompts
        if prompts is None:
            raise PromptError(
                "trace looks words up in the prompt, but the prompt was given as prompt_embeds: "
                "give it as text"
            )
        positions = [self._positions(prompt) for prompt in prompts]
        for index, word in enumerate(self._found.words):
            if not any(found[index] for found in positions):
                raise PromptError(f"the word {word!r} to trace is not in the prompt: {prompts}")
        longest = max(len(where) for found in positions for where in found)
        columns = [
            [column for where in found for column in where + [-1] * (longest - len(where))]
            for found in positions
        ]
        map_tokens = torch.tensor(columns).repeat_interleave(call.images, dim=0)
        sums = _Call(len(self._found.words), map_tokens, call.guidance)
        self._calls[threading.get_ident()] = self._found._latest = sums

    def end(self) -> None:
        """Leave the U-Net to other calls of this thread."""
        self._calls.pop(threading.get_ident(), None)

    def _positions(self, prompt: str) -> list[list[int]]:
        """Token positions of each traced word."""
        tokenizer = self._pipe.tokenizer
        if isinstance(self._pipe, TextualInversionLoaderMixin):
            prompt = self._pipe.maybe_convert_prompt(prompt, tokenizer)
        placeholders = [subject.in_prompts(tokenizer) for subject in self._encoder.subjects]
        return [word_positions(tokenizer, prompt, word, placeholders) for word in self._found.words]

    def before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Forward-pre-hook of the U-Net, behind the one that picks the stage."""
        call = self._calls.get(threading.get_ident())
        # torch leaves the keywords out while another thread registers or removes the hook.
        if call is None or kwargs is None:
            return
        height, width = call_argument(args, kwargs, 0, "sample").shape[-2:]
        prompt = call_argument(args, kwargs, 2, "encoder_hidden_states")
        call.running = prompt, (height, width)
        map_tokens = call.tokens_for(len(prompt), prompt.device)
        prompt.sefi_records = {
            id(attn): LayerRecord(map_tokens=map_tokens) for attn in self._layers.values()
        }

    def after_unet(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the U-Net: gather and forget what its layers recorded."""
        call = self._calls.get(threading.get_ident())
        if call is None or call.running is None:
            return
        prompt, input_size = call.running
        call.running = None
        records = prompt.__dict__.pop("sefi_records")
        for name, attn in self._layers.items():
            maps = records[id(attn)].maps
            size = reduced_size(input_size, self._factors[name])
            if maps is None or maps.shape[-1] != size[0] * size[1]:
                raise ModelError(
                    f"layer {name} gave no map of {size[0]}×{size[1]}: its attention processor was "
                    "replaced while tracing or belongs to an IP-Adapter (pipe.unload_ip_adapter() "
                    "takes it off), or the U-Net scales its layers in an unknown way"
                )
            call.add(maps, size)


@contextmanager
def trace(pipe: Any, words: Sequence[str] | str) -> Iterator[Trace]:
    """Watch where the words of a prompt are attended to while `pipe` samples.

    ```python
    with sefi_fast.trace(pipe, ["<me>", "tower"]) as found:
        image = pipe("<me> in front of a tower").images[0]
    found.overlay(image, "tower")
    ```

    Works with and without attached subjects. Memory does not grow with the number of steps. On
    exit, also by an exception, everything is as it was; the maps stay. Until then it holds for
    every call of `pipe`, whichever thread makes it.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline, whose U-Net is not compiled. Words are
            looked up in the first text encoder's prompt.
        words: words of the prompt, attached placeholders among them.

    Raises:
        ModelError: the pipeline is of another family, or its U-Net is compiled.
        ValueError: no word, a word twice, or a trace or regions of this pipeline already run.
        PromptError: from the call of the pipeline, if a word is in none of its prompts.
    """
    words = [composed(word) for word in ([words] if isinstance(words, str) else words)]
    if not words or len(set(words)) != len(words):
        raise ValueError(f"trace wants at least one word and none twice, but it got {words}")
    check_pipeline(pipe)
    check_not_compiled([pipe.unet], "trace the pipeline")
    unet = pipe.unet
    encoder = PromptEncoder.acquire(pipe)
    if encoder.watchers:
        raise ValueError(
            "a trace or regions of this pipeline already run: name all words in one trace, and "
            "draw regions without one, whose words would differ from place to place"
        )
    found = Trace(words)
    tracer = _Tracer(pipe, found, encoder)
    hooks = [
        unet.register_forward_pre_hook(tracer.before_unet, with_kwargs=True),
        unet.register_forward_hook(tracer.after_unet),
    ]
    with watched(pipe, encoder, tracer):
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
