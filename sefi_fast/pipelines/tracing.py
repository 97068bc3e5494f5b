"""Record the attention of words while a pipeline generates, and show it over the image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sefi_fast.attention.layers import reduced_size
from sefi_fast.attention.processor import LayerRecord, PromptState
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.pipelines.support import check_not_compiled, check_pipeline
from sefi_fast.pipelines.watcher import PipelineCall, Watcher
from sefi_fast.prompts.text_encoder import Pipeline, unwrap
from sefi_fast.prompts.tokenization import with_all_vectors, word_positions
from sefi_fast.utils.text import composed

_INK = (30, 30, 34)
_PAPER = (255, 255, 255)
_GAP = 8
_STRENGTH = 0.65
_LEAST_WIDTH = 144


def draw_overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """Return the image, in its own size, with a heat map [h, w] over it.

    Colors run from zero to the maximum of this map.
    """
    from matplotlib import colormaps

    values = attention.detach().float().cpu().numpy()
    heat = Image.fromarray(values / max(float(values.max()), 1e-12))
    strength = np.clip(np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)), 0.0, 1.0)
    colors = colormaps["inferno"](strength)[..., :3]
    # Without attention the image shows through, darkened, so that hot places stand out.
    opacity = (_STRENGTH * (0.4 + 0.6 * strength))[..., None]
    blended = np.asarray(image.convert("RGB")) / 255.0 * (1 - opacity) + colors * opacity
    return Image.fromarray(np.uint8(np.round(blended * 255)))


def _captioned(image: Image.Image, caption: str) -> Image.Image:
    size = max(11, min(20, image.width // 12))
    font: Any = ImageFont.load_default(size)
    bar = size + 8
    width = max(image.width, int(font.getlength(caption)) + 8)
    framed = Image.new("RGB", (width, image.height + bar), _PAPER)
    framed.paste(image, ((width - image.width) // 2, 0))
    middle = (width // 2, image.height + bar // 2)
    ImageDraw.Draw(framed).text(middle, caption, _INK, font=font, anchor="mm")
    return framed


_REQUEST = "trace the pipeline"
_PLAIN = "StableDiffusionPipeline.from_pipe(pipe) (StableDiffusionXLPipeline for SDXL)"


class _Call:
    """Sums over the layers and steps of one call of the pipeline."""

    def __init__(self, words: int, probs_positions: Tensor, guidance: bool) -> None:
        self.words = words
        self.guidance = guidance
        self.probs_positions = probs_positions
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.layer_calls = 0
        # Size of the input of the U-Net's running call.
        self.size = (0, 0)

    def positions_for(self, batch: int, device: torch.device) -> Tensor:
        """Return [batch, words · positions] for the U-Net's batch: under guidance its last half."""
        expected = len(self.probs_positions) * (2 if self.guidance else 1)
        if batch != expected:
            raise ModelError(
                f"while tracing, the U-Net was called with a batch of {batch} where the prompts "
                f"make {expected}. Trace a pipeline that runs it on the prompts alone (SAG does "
                f"not), such as {_PLAIN}, and run no other meanwhile."
            )
        self.probs_positions = self.probs_positions.to(device)
        negative = [torch.full_like(self.probs_positions, -1)] * self.guidance
        return torch.cat([*negative, self.probs_positions])

    def add(self, maps: Tensor, size: tuple[int, int]) -> None:
        """Add one layer's [batch, words · positions, N]."""
        samples = len(self.probs_positions)
        maps = torch.unflatten(maps.detach()[-samples:], 1, (self.words, -1)).sum(2)
        maps = torch.unflatten(maps, -1, size)
        self.sums[size] = maps if size not in self.sums else self.sums[size] + maps
        self.layer_calls += 1

    def mean(self) -> Tensor:
        """Return [B, words, h, w] at the largest size; upsampling the sums is enough."""
        largest = max(self.sums, key=lambda size: size[0] * size[1])
        total = torch.zeros_like(self.sums[largest])
        for size, maps in self.sums.items():
            if size != largest:
                maps = F.interpolate(maps, largest, mode="bilinear", align_corners=False)
            total += maps
        return total / self.layer_calls


class Trace:
    """The attention maps of the latest call of a traced pipeline."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._latest: _Call | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        """Word → [B, h, w] float32: the attention to its tokens, in [0, 1].

        Mean over heads, cross-attention layers (bilinear to the largest) and U-Net calls; sum over
        the tokens of the word; zero for a prompt without the word. B counts prompts times images a
        prompt; under guidance it is the conditional half.

        Raises:
            ValueError: no call of the pipeline ran inside the with block.
        """
        if self._latest is None or not self._latest.layer_calls:
            raise ValueError("nothing was traced: call the pipeline inside the with block first")
        return dict(zip(self.words, self._latest.mean().unbind(1), strict=True))

    def overlay(self, image: Image.Image, word: str, index: int = 0) -> Image.Image:
        """Return `image`, in its own size, with the map of `word` of sample `index` over it.

        Colors run from zero to the maximum of this map.

        Raises:
            KeyError: the word was not traced.
            IndexError: there is no sample of that index.
        """
        return draw_overlay(image, self._pick([word], index)[0])

    def grid(
        self, images: Sequence[Image.Image], words: Sequence[str] | None = None
    ) -> Image.Image:
        """Return one row an image: the image, then the overlay of each word, with captions.

        Args:
            images: the images of the latest call, in its order.
            words: which of the traced words; None for all.

        Raises:
            KeyError, IndexError: as for `overlay`.
            ValueError: there is no image.
        """
        chosen = self.words if words is None else tuple(words)
        cells = []
        for index, image in enumerate(images):
            # Whole multiples of its size, large enough to read a caption under it.
            factor = -(-_LEAST_WIDTH // image.width)
            size = (image.width * factor, image.height * factor)
            enlarged = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
            maps = zip(chosen, self._pick(chosen, index), strict=True)
            overlays = [_captioned(draw_overlay(enlarged, one), word) for word, one in maps]
            cells.append([_captioned(enlarged, "image"), *overlays])
        if not cells:
            raise ValueError("grid got no images: give the images of the traced call")
        cell_width = max(cell.width for row in cells for cell in row)
        heights = [max(cell.height for cell in row) for row in cells]
        width = max(len(row) for row in cells) * (cell_width + _GAP) + _GAP
        sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(cells) + 1)), _PAPER)
        top = _GAP
        for row, height in zip(cells, heights, strict=True):
            for column, cell in enumerate(row):
                left = _GAP + column * (cell_width + _GAP) + (cell_width - cell.width) // 2
                sheet.paste(cell, (left, top))
            top += height + _GAP
        return sheet

    def _pick(self, words: Sequence[str], index: int) -> list[Tensor]:
        maps, words = self.maps, [composed(word) for word in words]
        for word in words:
            if word not in maps:
                raise KeyError(f"{word!r} was not traced; the traced words are {list(maps)}")
        samples = len(maps[self.words[0]])
        if not -samples <= index < samples:
            raise IndexError(f"there is no sample {index}: the latest call made {samples}")
        return [maps[word][index] for word in words]


class _TraceWatcher(Watcher[_Call]):
    """Puts records on the prompt of each U-Net call and sums the maps of its layers."""

    def __init__(self, pipe: Pipeline, found: Trace, patch: EncodePromptPatch) -> None:
        super().__init__(pipe, _REQUEST)
        self._found = found
        self._patch = patch

    def models(self) -> Iterable[nn.Module]:
        return [unwrap(self.pipe.unet)]

    def begin(self, call: PipelineCall) -> _Call:
        """Find the words in the prompts."""
        # Checked before the call replaces processors, which would stay.
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise ModelError(
                "perturbed-attention guidance runs the U-Net on a third batch, in which no word "
                f"can be traced. Give pag_scale=0, or trace {_PLAIN}."
            )
        prompts = call.prompts
        if prompts is None:
            raise PromptError(
                "trace looks words up in the prompt, but the prompt was given as prompt_embeds; "
                "give it as text"
            )
        positions = [self._positions(prompt) for prompt in prompts]
        for index, word in enumerate(self._found.words):
            if not any(found[index] for found in positions):
                raise PromptError(f"the word {word!r} to trace is not in the prompt: {prompts}")
        longest = max(len(where) for found in positions for where in found)
        padded = [
            [place for where in found for place in where + [-1] * (longest - len(where))]
            for found in positions
        ]
        probs_positions = torch.tensor(padded).repeat_interleave(call.images, dim=0)
        # The newest call is the one shown.
        self._found._latest = _Call(len(self._found.words), probs_positions, call.guidance)
        return self._found._latest

    def _positions(self, prompt: str) -> list[list[int]]:
        """Return the token positions of each traced word."""
        tokenizer = self.pipe.tokenizer
        (prompt,) = with_all_vectors(self.pipe, [prompt], tokenizer)
        placeholders = [subject.in_prompts(tokenizer) for subject in self._patch.subjects]
        return [word_positions(tokenizer, prompt, word, placeholders) for word in self._found.words]

    def before(self, model: nn.Module, call: _Call, arguments: Mapping[str, Any]) -> PromptState:
        call.size = tuple(arguments["sample"].shape[-2:])
        prompt = arguments["encoder_hidden_states"]
        positions = call.positions_for(len(prompt), prompt.device)
        layers = self.layers[model].values()
        records = {id(attn): LayerRecord(probs_positions=positions) for attn in layers}
        return PromptState(records=records)

    def after(self, model: nn.Module, call: _Call, state: PromptState) -> None:
        for name, attn in self.layers[model].items():
            maps = None if state.records is None else state.records[id(attn)].attn_probs
            size = reduced_size(call.size, self.factors[model][id(attn)])
            if maps is None or maps.shape[-1] != size[0] * size[1]:
                raise ModelError(
                    f"layer {name} gave no map of {size[0]}×{size[1]}: its attention processor was "
                    "replaced while tracing or belongs to an IP-Adapter (pipe.unload_ip_adapter() "
                    "takes it off), or the U-Net scales its layers in an unknown way"
                )
            call.add(maps, size)


@contextmanager
def trace(pipe: Pipeline, words: Sequence[str] | str) -> Iterator[Trace]:
    """Record the attention to words of a prompt while `pipe` generates.

    Works with and without attached subjects. Memory does not grow with the number of steps. On
    exit, also by an exception, everything is restored; the maps stay. Until then it applies to
    every call of `pipe`, in any thread. Traced layers run the fused operator.

    Example:
        >>> with sefi_fast.trace(pipe, ["<me>", "tower"]) as found:
        ...     image = pipe("<me> in front of a tower").images[0]
        >>> found.overlay(image, "tower").save("tower.png")

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
        raise ValueError(f"trace takes at least one word and none twice, but it got {words}")
    check_pipeline(pipe)
    check_not_compiled([pipe.unet], _REQUEST)
    patch = EncodePromptPatch.acquire(pipe)
    found = Trace(words)
    with patch.watched_by(_TraceWatcher(pipe, found, patch)):
        yield found
