"""An independent judge: says what a picture of the tiny world shows; trained on drawings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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
"""What the judge tells, and the values of each attribute."""
IDENTITY_ATTRIBUTES = ("colour", "second_colour", "pattern", "ears", "shape")
JUDGE_PATH = Path(__file__).parent / "judge.safetensors"


def true_values(spec: ImageSpec) -> dict[str, str | None]:
    """The right answer for each attribute of a drawn picture; None where it cannot be seen."""
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
    """What one picture shows.

    Attributes:
        probabilities: for each attribute, the probability of each of its values.
    """

    probabilities: dict[str, dict[str, float]]

    @property
    def labels(self) -> dict[str, str]:
        """The likeliest value of each attribute."""
        return {
            name: max(values, key=values.__getitem__) for name, values in self.probabilities.items()
        }

    def shows(self, identity: Identity) -> float:
        """Mean over the five identity attributes of the probability of the identity's value."""
        wanted = (identity.value(name) for name in IDENTITY_ATTRIBUTES)
        found = [
            self.probabilities[name][value]
            for name, value in zip(IDENTITY_ATTRIBUTES, wanted, strict=True)
        ]
        return sum(found) / len(found)


def right_answers(specs: Sequence[ImageSpec], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Share of right answers for each attribute, over the pictures that show it."""
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for spec, judgement in zip(specs, judgements, strict=True):
        labels = judgement.labels
        for name, value in true_values(spec).items():
            if value is not None:
                right[name].append(labels[name] == value)
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}


class JudgeNetwork(nn.Module):
    """A plain convolutional classifier of 48×48 pictures with one linear head an attribute."""

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

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits [B, values] of each attribute for pictures [B, 3, 48, 48] in −1..1."""
        hidden = torch.relu(self.hidden(self.body(pictures)))
        return {name: head(hidden) for name, head in self.heads.items()}


class Judge:
    """Tells what pictures show.

    Args:
        network: a trained network; it is put in evaluation mode.
    """

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path = JUDGE_PATH) -> Judge:
        """The bundled judge, or one that was saved elsewhere.

        Raises:
            OSError: the file cannot be read.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no judge at {path}: give a file written by "
                "`python -m evals.tiny_world.judge_training`"
            )
        network = JudgeNetwork()
        state = {name: value.float() for name, value in load_file(path).items()}
        counters = {n: v for n, v in network.state_dict().items() if n not in state}
        network.load_state_dict(state | counters)
        return cls(network)

    def save(self, path: str | Path) -> None:
        """Write the weights in float16."""
        state = self.network.state_dict()
        kept = {
            name: value.to(torch.float16).contiguous()
            for name, value in state.items()
            if not name.endswith("num_batches_tracked")
        }
        part = Path(path).with_name(f"{Path(path).name}.part")
        save_file(kept, part)
        part.replace(path)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], batch_size: int = 64) -> list[Judgement]:
        """Judge pictures of any size (they are reduced to 48×48)."""
        found = []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([_to_tensor(image) for image in images[start : start + batch_size]])
            logits = self.network(batch)
            chances = {name: value.softmax(-1).tolist() for name, value in logits.items()}
            for row in range(len(batch)):
                found.append(
                    Judgement(
                        {
                            name: dict(zip(values, chances[name][row], strict=True))
                            for name, values in ATTRIBUTES.items()
                        }
                    )
                )
        return found

    def identity_score(self, image: Image.Image, identity: Identity) -> float:
        """How far a picture shows an identity, 0..1.

        The mean, over body colour, second colour, pattern, ears and shape, of the probability
        that the judge gives to the identity's value. An unrelated creature scores about 0.25 to
        0.35 by chance.
        """
        return self([image])[0].shows(identity)


def _to_tensor(image: Image.Image) -> Tensor:
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
