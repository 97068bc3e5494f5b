"""Load a Stable Diffusion 1.x or 2.x pipeline from a folder, a hub id or a single file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.families import WORKS_WITH, check_model_index

_NO_SAFETY_CHECKER = {"safety_checker": None, "requires_safety_checker": False}


def load_pipeline(
    model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> StableDiffusionPipeline:
    """Load a pipeline from safetensors weights, without a safety checker.

    Args:
        model: a diffusers folder, a single .safetensors checkpoint, a hub id, or None for the
            bundled tiny model.
        dtype: of the weights; None for float32 on the CPU and float16 elsewhere.
        device: None for CUDA where there is one, else the CPU.

    Raises:
        ModelError: there is no such model, its weights are not safetensors, or it is of a family
            that this version does not work with (SDXL, SD 3, Flux).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if model is None:
        from sefi_fast.tiny_world import bundled_model_path

        model = bundled_model_path()
    path = Path(model).expanduser()
    if path.is_dir():
        pipe = _load_folder(path, dtype)
    elif path.is_file() or path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".bin"):
        pipe = _load_file(path, dtype)
    else:
        pipe = _load_hub(str(model), dtype)
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"the U-Net of {model} takes {pipe.unet.config.in_channels} channels, as inpainting "
            "and depth models do; load a text-to-image model (an inpainting pipeline of your own "
            "can be given to sefi_fast.attach)"
        )
    return pipe.to(device)


def _load_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"{folder} is no diffusers pipeline: it has no model_index.json. Give the folder that "
            "holds unet, vae, text_encoder, tokenizer and scheduler"
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{index_file} cannot be read ({error}): get the model again") from error
    if not isinstance(index, dict):
        raise ModelError(f"{index_file} holds no pipeline description: get the model again")
    check_model_index(index, str(folder))
    variant = _weights_variant(folder)
    return _from_pretrained(str(folder), dtype, variant)


def _weights_variant(folder: Path) -> str | None:
    """None for weights of the usual name, "fp16" when only those are there.

    Raises:
        ModelError: a part has no safetensors weights.
    """
    variants = set()
    for part in ("unet", "vae", "text_encoder"):
        files = sorted(file.name for file in (folder / part).glob("*.safetensors"))
        if not files:
            pickled = sorted(file.name for file in (folder / part).glob("*.bin"))
            raise ModelError(
                f"{folder / part} holds no .safetensors weights"
                + (f", only {pickled[0]}, and pickled weights are not loaded" if pickled else "")
                + ": get the model's safetensors weights, or convert it with "
                "pipe.save_pretrained(folder)"
            )
        plain = [name for name in files if ".fp16." not in name]
        variants.add(None if plain else "fp16")
    # diffusers takes the usual names for parts that lack the variant, not the other way round.
    return "fp16" if "fp16" in variants else None


def _load_hub(name: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a file here nor a model that can be had from the "
            f"hub ({_first_line(error)})"
        ) from error
    check_model_index(index, name)
    try:
        return _from_pretrained(name, dtype, None)
    except ModelError:
        try:
            return _from_pretrained(name, dtype, "fp16")
        except ModelError:
            pass
        raise


def _from_pretrained(
    source: str, dtype: torch.dtype, variant: str | None
) -> StableDiffusionPipeline:
    try:
        with _old_name_of_dtype():
            return StableDiffusionPipeline.from_pretrained(
                source,
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=True,
                feature_extractor=None,
                image_encoder=None,
                **_NO_SAFETY_CHECKER,
            )
    except Exception as error:
        raise ModelError(f"{source} cannot be loaded: {_first_line(error)}") from error


@contextmanager
def _old_name_of_dtype() -> Iterator[None]:
    """diffusers below 0.36 knows `torch_dtype` alone, later ones take it with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        yield


def _load_file(file: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    if not file.is_file():
        raise ModelError(f"there is no model file {file}")
    _check_checkpoint(file)
    try:
        with _old_name_of_dtype():
            return StableDiffusionPipeline.from_single_file(
                str(file), torch_dtype=dtype, feature_extractor=None, **_NO_SAFETY_CHECKER
            )
    except Exception as error:
        raise ModelError(
            f"{file} cannot be loaded: {_first_line(error)}. A single file needs its family's "
            "configuration from the hub or its cache; a diffusers folder needs nothing more"
        ) from error


def _check_checkpoint(file: Path) -> None:
    """Raise ModelError unless the names in a .safetensors file are those of SD 1.x or 2.x."""
    from safetensors import SafetensorError, safe_open

    if file.suffix.lower() != ".safetensors":
        raise ModelError(
            f"{file} is no .safetensors file, and pickled checkpoints are not loaded: convert it, "
            "or get the safetensors file of the model"
        )
    try:
        with safe_open(str(file), framework="pt") as opened:
            names = set(opened.keys())
            kind = (opened.metadata() or {}).get("modelspec.architecture", "")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or no .safetensors file ({error})") from error
    family = _family(names)
    if family is not None:
        raise ModelError(f"{file} holds {family}{f' ({kind})' if kind else ''}; {WORKS_WITH}")


def _family(names: set[str]) -> str | None:
    """What a checkpoint with these tensor names is; None for SD 1.x and 2.x."""

    def any_with(part: str) -> bool:
        return any(part in name for name in names)

    if any_with("joint_blocks.") and any_with("x_block"):
        return "a model of the SD 3 family"
    if any_with("double_blocks.") and any_with("single_blocks."):
        return "a model of the Flux family"
    if any_with("conditioner.embedders."):
        return "a model of the SDXL family"
    if not any_with("model.diffusion_model.input_blocks."):
        return "no Stable Diffusion checkpoint (a LoRA, an embedding or one part of a model?)"
    if not any_with("cond_stage_model."):
        return "a checkpoint without its text encoder"
    return None


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
