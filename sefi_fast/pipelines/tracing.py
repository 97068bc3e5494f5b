"""Record the attention of words while a pipeline generates, and draw it over the image."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sefi_fast.attention.layers import (
    call_argument,
    cross_attention_layers,
    layer_resolutions,
    reduced_size,
)
from sefi_fast.attention.processor import LayerRecord
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines.encode_prompt import PipelineCall, PromptEncoder, watched
from sefi_fast.pipelines.support import check_not_compiled, check_pipeline, unwrap
from sefi_fast.prompts.tokenization import word_positions
from sefi_fast.utils.text import composed

_INK = (30, 30, 34)
_PAPER = (255, 255, 255)
_GAP = 8
_STRENGTH = 0.65
_LEAST_WIDTH = 144


def draw_overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """The image, in its own size, with a heat map [h, w] over it.

    Colours run from nothing to the strongest place of this map.
    """
    from matplotlib import colormaps

    picture = image.convert("RGB")
    values = attention.detach().float().cpu().numpy()
    heat = Image.fromarray(values / max(float(values.max()), 1e-12))
    heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(heat), 0.0, 1.0)
    colours = colormaps["inferno"](strength)[..., :3]
    # Where nothing is attended the image shows through, darkened, so that hot places stand out.
    opacity = (_STRENGTH * (0.4 + 0.6 * strength))[..., None]
    blended = np.asarray(picture) / 255.0 * (1 - opacity) + colours * opacity
    return Image.fromarray(np.uint8(np.round(blended * 255)))


def draw_grid(
    rows: Sequence[tuple[Image.Image, Sequence[tuple[str, Tensor]]]],
) -> Image.Image:
    """One row an image: itself, then each (word, map [h, w]) over it, with captions.

    Raises:
        ValueError: there is no image.
    """
    if not rows:
        raise ValueError("grid got no images: give the images of the traced call")
    cells = []
    for image, maps in rows:
        picture = _enlarged(image.convert("RGB"))
        overlays = [_captioned(draw_overlay(picture, m), word) for word, m in maps]
        cells.append([_captioned(picture, "picture"), *overlays])
    cell_width = max(cell.width for row in cells for cell in row)
    heights = [max(cell.height for cell in row) for row in cells]
    width = max(len(row) for row in cells) * (cell_width + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    top = _GAP
    for row, height in zip(cells, heights, strict=True):
        for column, cell in enumerate(row):
            left = _GAP + column * (cell_width + _GAP) + (cell_width - cell.width) // 2
            sheet.paste(cell, (left, top))
        top += height + _GAP
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    """The image in whole multiples of its size, large enough to read a caption under it."""
    factor = -(-_LEAST_WIDTH // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    size = max(11, min(20, picture.width // 12))
    font = ImageFont.load_default(size)
    bar = size + 8
    width = max(picture.width, int(font.getlength(caption)) + 8)
    framed = Image.new("RGB", (width, picture.height + bar), _PAPER)
    framed.paste(picture, ((width - picture.width) // 2, 0))
    ImageDraw.Draw(framed).text(
        (width // 2, picture.height + bar // 2), caption, _INK, font=font, anchor="mm"
    )
    return framed


_PLAIN = "StableDiffusionPipeline.from_pipe(pipe) (StableDiffusionXLPipeline for SDXL)"


class _Call:
    """Sums over the layers and steps of one call of the pipeline."""

    def __init__(self, words: int, probs_positions: Tensor, guidance: bool) -> None:
        self.words = words
        self.guidance = guidance
        self.probs_positions = probs_positions
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.layer_calls = 0
        # Prompt and size of the input of the U-Net's call that runs.
        self.running: tuple[Tensor, tuple[int, int]] | None = None

    def tokens_for(self, batch: int, device: torch.device) -> Tensor:
        """[batch, words · positions] for the U-Net's batch: under guidance its second half."""
        expected = len(self.probs_positions) * (2 if self.guidance else 1)
        if batch != expected:
            raise ModelError(
                f"while tracing, the U-Net was called with a batch of {batch} where the prompts "
                f"make {expected}: trace a pipeline that runs it on the prompts alone (SAG does "
                f"not), such as {_PLAIN}, and run no other meanwhile"
            )
        if self.probs_positions.device != device:
            self.probs_positions = self.probs_positions.to(device)
        if not self.guidance:
            return self.probs_positions
        return torch.cat([torch.full_like(self.probs_positions, -1), self.probs_positions])

    def add(self, maps: Tensor, size: tuple[int, int]) -> None:
        """Add one layer's [batch, words · positions, N]."""
        samples = len(self.probs_positions)
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
        prompts times images a prompt; under guidance it is the conditional half.

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
        """One row an image: the image, then the overlay of each word, with captions.

        Args:
            images: the images of the latest call, in its order.
            words: which of the traced words; None for all.

        Raises:
            KeyError, IndexError: as for `overlay`.
            ValueError: there is no image.
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
        probs_positions = torch.tensor(columns).repeat_interleave(call.images, dim=0)
        sums = _Call(len(self._found.words), probs_positions, call.guidance)
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
        probs_positions = call.tokens_for(len(prompt), prompt.device)
        prompt.sefi_records = {
            id(attn): LayerRecord(probs_positions=probs_positions) for attn in self._layers.values()
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
            maps = records[id(attn)].attn_probs
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
