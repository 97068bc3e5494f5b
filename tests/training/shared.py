"""Helpers of the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sefi_fast
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training.checkpoint import CheckpointFolder, folder_of

# It ships inside the scikit-image package: 451×300 pixels.
PHOTO = Path(skimage.__file__).parent / "data" / "chelsea.png"
FAST: dict[str, Any] = {"steps": 3, "batch_size": 2, "resolution": 64, "progress": False}
"""Settings for the random pipelines."""
BUNDLED_IMAGE = sefi_fast.bundled_subject_image()
QUICK: dict[str, Any] = {
    "class_word": CLASS_WORD, "batch_size": 1, "stages": 2, "progress": False
}  # fmt: skip
"""Settings for the bundled pipeline."""


# transformers 4 makes masks in torch's default dtype, where its lowest number may not fit.
MASKS_OVERFLOW = transformers.__version__.startswith("4.")


class Family:
    """A pipeline and the parts that its family has one or two of."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def encoders(self) -> list[tuple[Any, Any]]:
        pairs = [(self.pipe.tokenizer, self.pipe.text_encoder)]
        if hasattr(self.pipe, "text_encoder_2"):
            pairs.append((self.pipe.tokenizer_2, self.pipe.text_encoder_2))
        return pairs

    @property
    def is_sdxl(self) -> bool:
        return len(self.encoders) == 2

    def class_ids(self, words: str) -> list[list[int]]:
        """For each tokenizer the ids of words that are one token each."""
        return [
            [tokenizer.convert_tokens_to_ids(word + "</w>") for word in words.split()]
            for tokenizer, _ in self.encoders
        ]

    def class_rows(self, words: str) -> list[Tensor]:
        """For each text encoder the rows of the words, [W, C]."""
        return [
            encoder.get_input_embeddings().weight[ids].detach()
            for (_, encoder), ids in zip(self.encoders, self.class_ids(words), strict=True)
        ]


def random_image(number: int, width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def checkpoints(output: Path) -> CheckpointFolder:
    return CheckpointFolder(folder_of(output))


def newest_step(output: Path) -> int:
    return max(checkpoints(output).steps(), default=0)


def stop_at(step: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    """Return a callback that raises after some steps."""

    def callback(done: int, history: Any) -> None:
        if done == step:
            raise error(f"from the callback of step {step}")

    return callback


def raising(error: Exception) -> Any:
    """Return a function that raises, whatever its arguments."""

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return fail


def assert_same(one: Any, other: Any) -> None:
    """Two subjects are equal bit for bit, and so are the numbers of their runs."""
    assert all(map(torch.equal, one.tokens, other.tokens))
    for name in ("loss", "subject_loss", "skipped"):
        assert getattr(one.history, name) == getattr(other.history, name)
    pairs = zip(one.history.validation, other.history.validation, strict=True)
    for (step, images), (other_step, other_images) in pairs:
        assert step == other_step
        assert [x.tobytes() for x in images] == [x.tobytes() for x in other_images]


def assert_near(one: Any, other: Any) -> None:
    """Two subjects are equal up to rounding: a hundredth of the change by training."""
    parts = zip(one.tokens, other.tokens, other.class_embeddings, strict=True)
    for found, wanted, start in parts:
        assert (found - wanted).norm() < 0.01 * (wanted - start[-1]).norm()
    assert one.history.loss == other.history.loss or all(
        abs(a - b) < 1e-3 * b for a, b in zip(one.history.loss, other.history.loss, strict=True)
    )


def state_of(pipe: Any) -> dict[Any, Any]:
    """Everything of a pipeline that training touches, to compare before and after."""
    state: dict[Any, Any] = {"pipe": {k: id(v) for k, v in vars(pipe).items()}}
    state["scheduler"] = {k: str(v) for k, v in vars(pipe.scheduler).items()}
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
            place = (id(tensor), tensor.dtype, tensor.device, tensor.stride(), tensor.requires_grad)
            state[name, key] = (*place, tensor.detach().double().sum().item())
        for key, module in part.named_modules():
            hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
            processor = id(getattr(module, "processor", None))
            checkpointing = getattr(module, "gradient_checkpointing", None)
            state[name, key, "module"] = (module.training, processor, checkpointing, hooks)
    return state


# What waits for a device, has a size that depends on values, or begins on the host.
FORBIDDEN = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "lift_fresh"
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Records the names of all operations, to find those that a CUDA graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        picks = arguments[1] if name.startswith("index") and isinstance(arguments[1], list) else ()
        by_mask = any(pick is not None and pick.dtype == torch.bool for pick in picks)
        self.seen.add("nonzero" if by_mask else name)
        return function(*arguments, **(keywords or {}))
