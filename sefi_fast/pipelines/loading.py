"""Load a Stable Diffusion 1.x, 2.x or SDXL pipeline from a folder, a hub id or a single file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.families import WORKS_WITH, check_model_index, is_sdxl_index
from sefi_fast.utils.files import expanded, user_path

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"

# Parts that not every pipeline of a family has and none needs to draw.
_SD_EXTRAS = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
    "image_encoder": None,
}
_SDXL_EXTRAS = {"feature_extractor": None, "image_encoder": None}


def load_pipeline(
    model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    variant: str | None = None,
    config: str | Path | None = None,
) -> Pipeline:
    """Load a pipeline from safetensors weights, without a safety checker.

    Args:
        model: a diffusers folder, a single .safetensors checkpoint, a hub id, or None for the
            bundled tiny model.
        dtype: of the weights; None for float32 on the CPU and float16 elsewhere.
        device: None for CUDA where there is one, else the CPU.
        variant: of the weight files of a folder or a hub id, such as "fp16"; None for the usual
            files, or the fp16 ones where there are no others.
        config: for a single file, a diffusers folder (weights are not read) or a hub id of a model
            of the same architecture, for configurations and tokenizers; None for the hub's own of
            the family that diffusers finds in the file.

    Raises:
        ModelError: there is no such model, its weights are not safetensors, it lacks the variant,
            or it is of a family without a U-Net with cross-attention (SD 3, Flux).
        ValueError: `config` for something other than a single file, or `variant` for one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if model is None:
        from sefi_fast.tiny_world import bundled_model_path

        model = bundled_model_path()
    path = user_path(model)
    is_file = path.is_file() or path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".bin")
    single = is_file and not path.is_dir()
    if single and variant is not None:
        raise ValueError(f"{path} is one file, which has no variants: leave variant out")
    if config is not None and not single:
        raise ValueError(f"config is for a single .safetensors file, which {model} is not")
    if single:
        pipe = _load_file(path, dtype, config)
    elif path.is_dir():
        pipe = _load_folder(path, dtype, variant)
    else:
        pipe = _load_hub(str(model), dtype, variant)
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"the U-Net of {model} takes {pipe.unet.config.in_channels} channels, as inpainting "
            "and depth models do; load a text-to-image model (an inpainting pipeline of your own "
            "can be given to sefi_fast.attach)"
        )
    return pipe.to(device)


def _load_folder(folder: Path, dtype: torch.dtype, variant: str | None) -> Pipeline:
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
    sdxl = is_sdxl_index(index)
    variant = _weights_variant(folder, sdxl, variant)
    return _from_pretrained(str(folder), dtype, variant, sdxl)


def _weights_variant(folder: Path, sdxl: bool, wanted: str | None) -> str | None:
    """The variant to ask for: the one wanted; else None, or "fp16" when only those are there.

    Raises:
        ModelError: a part has no safetensors weights, or not of the variant wanted.
    """
    variants = set()
    parts = ("unet", "vae", "text_encoder") + (("text_encoder_2",) if sdxl else ())
    for part in parts:
        files = sorted(file.name for file in (folder / part).glob("*.safetensors"))
        if not files:
            pickled = sorted(file.name for file in (folder / part).glob("*.bin"))
            raise ModelError(
                f"{folder / part} holds no .safetensors weights"
                + (f", only {pickled[0]}, and pickled weights are not loaded" if pickled else "")
                + ": get the model's safetensors weights, or convert it with "
                "pipe.save_pretrained(folder)"
            )
        if wanted is not None and not any(f".{wanted}" in name for name in files):
            raise ModelError(
                f"{folder / part} holds no weights of variant {wanted!r}, only {files[0]}: leave "
                "variant out, or get that variant"
            )
        plain = [name for name in files if ".fp16." not in name]
        variants.add(None if plain else "fp16")
    if wanted is not None:
        return wanted
    # diffusers takes the usual names for parts that lack the variant, not the other way round.
    return "fp16" if "fp16" in variants else None


def _load_hub(name: str, dtype: torch.dtype, variant: str | None) -> Pipeline:
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a file here nor a model that can be had from the "
            f"hub ({_first_line(error)})"
        ) from error
    check_model_index(index, name)
    sdxl = is_sdxl_index(index)
    try:
        return _from_pretrained(name, dtype, variant, sdxl)
    except ModelError:
        if variant is None:
            try:
                return _from_pretrained(name, dtype, "fp16", sdxl)
            except ModelError:
                pass
        raise


def _from_pretrained(source: str, dtype: torch.dtype, variant: str | None, sdxl: bool) -> Pipeline:
    kind, extras = _kind(sdxl)
    try:
        with _old_name_of_dtype():
            return kind.from_pretrained(
                source, torch_dtype=dtype, variant=variant, use_safetensors=True, **extras
            )
    except Exception as error:
        raise ModelError(f"{source} cannot be loaded: {_first_line(error)}") from error


def _kind(sdxl: bool) -> tuple[Any, dict[str, Any]]:
    if sdxl:
        return StableDiffusionXLPipeline, _SDXL_EXTRAS
    return StableDiffusionPipeline, _SD_EXTRAS


@contextmanager
def _old_name_of_dtype() -> Iterator[None]:
    """diffusers below 0.36 knows `torch_dtype` alone, later ones take it with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        yield


def _load_file(file: Path, dtype: torch.dtype, config: str | Path | None) -> Pipeline:
    if not file.is_file():
        raise ModelError(f"there is no model file {file}")
    kind, extras = _kind(_is_sdxl_checkpoint(file))
    config = None if config is None else expanded(config)
    local: dict[str, Any] = {} if config is None else {"config": config}
    if config is not None and Path(config).is_dir():
        local["local_files_only"] = True
    try:
        with _old_name_of_dtype():
            return kind.from_single_file(str(file), torch_dtype=dtype, **extras, **local)
    except Exception as error:
        raise ModelError(
            f"{file} cannot be loaded: {_first_line(error)}. A single file needs its family's "
            "configuration from the hub or its cache, or config=, the diffusers folder of a model "
            "of the same architecture"
        ) from error


def _is_sdxl_checkpoint(file: Path) -> bool:
    """Whether a .safetensors file is of SDXL or of Stable Diffusion 1.x or 2.x.

    Raises:
        ModelError: by the names of its tensors it is neither.
    """
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
    other = _other_family(names)
    if other is not None:
        raise ModelError(f"{file} holds {other}{f' ({kind})' if kind else ''}; {WORKS_WITH}")
    return any("conditioner.embedders." in name for name in names)


def _other_family(names: set[str]) -> str | None:
    """What a checkpoint with these tensor names is; None for SD 1.x, 2.x and SDXL base models."""

    def any_with(part: str) -> bool:
        return any(part in name for name in names)

    if any_with("joint_blocks.") and any_with("x_block"):
        return "a model of the SD 3 family, which denoises with a transformer, not with a U-Net"
    if any_with("double_blocks.") and any_with("single_blocks."):
        return "a model of the Flux family, which denoises with a transformer, not with a U-Net"
    if not any_with("model.diffusion_model.input_blocks."):
        return "no Stable Diffusion checkpoint (a LoRA, an embedding or one part of a model?)"
    if any_with("conditioner.embedders."):
        if not any_with("conditioner.embedders.1."):
            return "an SDXL refiner, which has one text encoder; load the base model"
        return None
    if not any_with("cond_stage_model."):
        return "a checkpoint without its text encoder"
    return None


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
