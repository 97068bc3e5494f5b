"""An independent classifier of images of the tiny world, trained on drawings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sefi_fast.tiny_world.drawing import (
    ACCESSORIES,
    COLOURS,
    EARS,
    IMAGE_SIZE,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    STYLES,
    Identity,
    ImageSpec,
)
from sefi_fast.utils.files import atomic_write

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "creature": ("no", "yes"),
    "colour": COLOURS,
    "second_colour": ("none", *COLOURS),
    "pattern": PATTERNS,
    "ears": EARS,
    "shape": SHAPES,
    "scene": SCENES,
    **{accessory: ("no", "yes") for accessory in ACCESSORIES},
    "position": POSITIONS,
    "style": STYLES,
}
"""Attributes that the judge reads, with their values."""
IDENTITY_ATTRIBUTES = ("colour", "second_colour", "pattern", "ears", "shape")
JUDGE_PATH = Path(__file__).parent / "judge.safetensors"
_BATCH = 64


def true_values(spec: ImageSpec) -> dict[str, str | None]:
    """Return the true value of each attribute of a drawn image; None if it cannot be seen."""
    identity = spec.identity
    values: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    values |= {"creature": "no" if identity is None else "yes", "scene": spec.scene}
    values |= {name: "yes" if name in spec.accessories else "no" for name in ACCESSORIES}
    values["style"] = spec.style
    if identity is not None:
        values |= {"pattern": identity.pattern, "ears": identity.ears, "shape": identity.shape}
        values["position"] = spec.position
        if spec.style != "grey":
            values["colour"] = identity.colour
            values["second_colour"] = identity.second_colour or "none"
    return values


@dataclass(frozen=True)
class Judgement:
    """Answers of the judge for one image.

    Attributes:
        probabilities: attribute → value → its probability.
    """

    probabilities: dict[str, dict[str, float]]

    @property
    def labels(self) -> dict[str, str]:
        """Return the likeliest value of each attribute."""
        return {
            name: max(values, key=values.__getitem__) for name, values in self.probabilities.items()
        }

    def shows(self, identity: Identity) -> float:
        """Return the likeness to an identity, 0..1.

        It is the mean probability of the identity's colour, second colour, pattern, ears and
        shape. An unrelated creature scores about 0.25 to 0.35 by chance.
        """
        found = [self.probabilities[n][identity.value(n)] for n in IDENTITY_ATTRIBUTES]
        return sum(found) / len(found)


def right_answers(specs: Sequence[ImageSpec], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Return the share of right answers for each attribute, over the images that show it."""
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for spec, judgement in zip(specs, judgements, strict=True):
        labels = judgement.labels
        for name, value in true_values(spec).items():
            if value is not None:
                right[name].append(labels[name] == value)
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}


class JudgeNetwork(nn.Module):
    """A convolutional classifier of 48×48 images with one linear head per attribute."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 128), hidden: int = 160) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for depth, width in enumerate(widths):
            for _ in range(1 if depth == 0 else 2):
                layers += [
                    nn.Conv2d(before, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        side = IMAGE_SIZE // 2 ** len(widths)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(before * side * side, hidden))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits [B, values] of each attribute for images [B, 3, 48, 48] in −1..1."""
        hidden = torch.relu(self.hidden(self.body(images)))
        return {name: head(hidden) for name, head in self.heads.items()}


class Judge:
    """Classifier of images, with the answers by name.

    Args:
        network: a trained network. It is put into evaluation mode.
    """

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path = JUDGE_PATH) -> Judge:
        """Load the bundled judge, or one that `save` wrote.

        Raises:
            OSError: the file cannot be read.
        """
        network = JudgeNetwork()
        state = {name: value.float() for name, value in load_file(path).items()}
        counters = {n: v for n, v in network.state_dict().items() if n not in state}
        network.load_state_dict(state | counters)
        return cls(network)

    def save(self, path: Path) -> None:
        """Write the weights in float16."""
        state = self.network.state_dict()
        kept = {
            name: value.to(torch.float16).contiguous()
            for name, value in state.items()
            if not name.endswith("num_batches_tracked")
        }
        atomic_write(path, save(kept))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """Classify images of any size; they are reduced to 48×48."""
        found = []
        for start in range(0, len(images), _BATCH):
            batch = torch.stack([_to_tensor(image) for image in images[start : start + _BATCH]])
            rows = {name: head.softmax(-1).tolist() for name, head in self.network(batch).items()}
            for k in range(len(batch)):
                named = (dict(zip(ATTRIBUTES[n], row[k], strict=True)) for n, row in rows.items())
                found.append(Judgement(dict(zip(rows, named, strict=True))))
        return found


def _to_tensor(image: Image.Image) -> Tensor:
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
