"""Options for the pictures that steer a generation: ControlNet hints, a picture to change."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sefi_fast.utils.files import user_path

if TYPE_CHECKING:
    from PIL import Image

STRENGTH = 0.8


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """--width, --height, --controlnet, --control-image, --image, --strength and --mask."""
    parser.add_argument("--width", type=int, help="in pixels (default: the model's, or --image's)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's, or --image's)")
    parser.add_argument(
        "--controlnet", action="append", default=[], metavar="MODEL",
        help="folder, hub id or .safetensors file of a ControlNet; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--control-image", type=user_path, action="append", default=[], metavar="FILE",
        help="the hint (pose, edges, depth) for each --controlnet, in the same order",
    )  # fmt: skip
    parser.add_argument("--image", type=user_path, metavar="FILE", help="a picture to change")
    parser.add_argument(
        "--strength",
        type=float,
        help=f"how much of --image to change, 0 to 1 (default: {STRENGTH})",
    )
    parser.add_argument(
        "--mask",
        type=user_path,
        metavar="FILE",
        help="white where --image is to change, black or transparent elsewhere",
    )


def check_pictures(options: argparse.Namespace) -> None:
    """Raise ValueError where the options do not go together, before anything is loaded."""
    nets, hints = len(options.controlnet), len(options.control_image)
    if nets != hints:
        raise ValueError(
            f"--controlnet was given {nets} times and --control-image {hints} times: give one "
            "picture for each ControlNet"
        )
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is for changing a picture: give --image too")
    for name in ("width", "height"):
        value = getattr(options, name)
        if value is not None and (value < 8 or value % 8):
            raise ValueError(f"--{name} is {value} pixels: give a multiple of 8, and at least 8")
    if options.strength is not None and not 0 < options.strength <= 1:
        raise ValueError(f"--strength is {options.strength}: give more than 0 and at most 1")


def with_pictures(options: argparse.Namespace, pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline that takes the pictures named, and the arguments to call it with."""
    nets: list[Any] = []
    masked = options.mask is not None
    if options.controlnet or options.image is not None:
        # It imports all of diffusers' pipelines.
        from sefi_fast.pipelines.steering import load_controlnet, steered

        nets = [load_controlnet(source, pipe) for source in options.controlnet]
        pipe = steered(pipe, controlnets=nets, image=options.image is not None, mask=masked)
    takes = inspect.signature(type(pipe).__call__).parameters
    size = (options.width, options.height)
    if options.image is None and not nets:
        size = _whole_size(size, pipe)
    arguments: dict[str, Any] = {}
    if options.image is not None:
        picture = _load(options.image, size, pipe.vae_scale_factor)
        size = picture.size
        arguments["image"] = picture
        if masked:
            from sefi_fast.training.masks import check_selection, open_mask

            mask = open_mask(options.mask).resize(size).convert("L")
            lowest, highest = mask.getextrema()
            check_selection(lowest / 255, highest / 255, "the image to change")
            arguments["mask_image"] = mask
        arguments["strength"] = STRENGTH if options.strength is None else options.strength
    if nets:
        hints = [_load(path, size, pipe.vae_scale_factor) for path in options.control_image]
        name = "control_image" if options.image is not None else "image"
        arguments[name] = hints[0] if len(hints) == 1 else hints
    for name, value in zip(("width", "height"), size, strict=True):
        if value is not None and name in takes:
            arguments[name] = value
    return pipe, arguments


def check_steps(sampling: dict[str, Any]) -> None:
    """Raise ValueError where so weak a change of a picture leaves no step to do."""
    steps, strength = sampling.get("steps", 30), sampling.get("strength", 1.0)
    if int(steps * strength) < 1:
        raise ValueError(
            f"{steps} steps at strength {strength} are less than one: give more --steps or more "
            "--strength"
        )


def _whole_size(size: tuple[int | None, int | None], pipe: Any) -> tuple[int | None, int | None]:
    """Width and height, of which the model gives what is missing; none where both are.

    diffusers' pipelines of Stable Diffusion take the model's own for both where one is missing.
    """
    if size.count(None) != 1:
        return size
    from sefi_fast.pipelines.families import unwrap

    own = unwrap(pipe.unet).config.sample_size
    height, width = (own, own) if isinstance(own, int) else own
    return size[0] or width * pipe.vae_scale_factor, size[1] or height * pipe.vae_scale_factor


def _load(path: Path, size: tuple[int | None, int | None], multiple: int) -> Image.Image:
    """The picture at the size wanted; where none is, at its own, cut to whole latent places."""
    from sefi_fast.training import load_image

    picture = load_image(path)
    width, height = (
        wanted or max(multiple, own // multiple * multiple)
        for wanted, own in zip(size, picture.size, strict=True)
    )
    return picture if picture.size == (width, height) else picture.resize((width, height))
