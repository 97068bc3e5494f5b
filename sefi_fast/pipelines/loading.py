"""Load a Stable Diffusion 1.x, 2.x or SDXL pipeline from a folder, a hub id or a single file."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sefi_fast.errors import ModelError, SubjectFileError
from sefi_fast.pipelines.support import check_model_index, is_sdxl_index
from sefi_fast.pipelines.weight_files import (
    check_config,
    check_weights,
    is_sdxl_checkpoint,
    listed,
    noise_settings,
    read_header,
    read_json,
)
from sefi_fast.utils.files import expanded, user_path

if TYPE_CHECKING:
    from sefi_fast.subject import Subject

logger = logging.getLogger(__name__)

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"

# Parts that not every pipeline of a family has and none needs to draw.
_SD_EXTRAS = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
    "image_encoder": None,
}
_SDXL_EXTRAS = {"feature_extractor": None, "image_encoder": None}

_MODELS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
_LARGEST_LATENT = 2048
_SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
_HOW_TO_CONFIGURE = (
    "give the diffusers folder of a model of the same architecture (config= of load_pipeline, "
    "model_config= of train and train_many, --model-config of the commands)"
)
_MOST_PARAMETERS = 10_000
"""Tensors that one load may make: a whole pipeline of SDXL has 2,600."""


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    variant: str | None = None,
    config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
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
            the family that diffusers finds in the file. What the file says of its prediction
            (noise or velocity) goes before the folder's scheduler, with a warning.
        vae: another autoencoder than the model's: a diffusers folder of one or of a pipeline, a
            .safetensors file, or a hub id.

    Raises:
        ModelError: there is no such model, its weights are not safetensors or not whole, it lacks
            the variant or a part, it is of a family without a U-Net with cross-attention (SD 3,
            Flux), or predicts something else than noise or velocity.
        ValueError: `config` for something other than a single file, or `variant` for one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if model is None:
        from sefi_fast.tiny_world import bundled_model_path

        model = bundled_model_path()
    path = user_path(model)
    single = _is_file(path)
    if single and variant is not None:
        raise ValueError(f"{path} is one file, which has no variants: leave variant out")
    if config is not None and not single:
        raise ValueError(
            f"a model config is for a single .safetensors file, which {model} is not: leave it out"
        )
    if single:
        pipe = _load_file(path, dtype, config, vae)
        pipe.register_to_config(_name_or_path=str(model))
    elif path.is_dir():
        pipe = _load_folder(path, dtype, variant, vae)
    else:
        pipe = _load_hub(str(model), dtype, variant, vae)
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        if vae is not None:
            raise ModelError(
                f"the VAE {vae} has {pipe.vae.config.latent_channels} latent channels, but the "
                f"U-Net of {model} takes {pipe.unet.config.in_channels}: give a VAE of its family"
            )
        raise ModelError(
            f"the U-Net of {model} takes {pipe.unet.config.in_channels} channels, as inpainting "
            "and depth models do; load a text-to-image model (an inpainting pipeline of your own "
            "can be given to sefi_fast.attach)"
        )
    scale = pipe.vae.config.scaling_factor
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ModelError(
            f"the VAE of {model} scales its latents by {scale!r}. A number above 0 is wanted: get "
            "the model again"
        )
    size = pipe.unet.config.sample_size
    for side in size if isinstance(size, (list, tuple)) else [64 if size is None else size]:
        if not (isinstance(side, int) and 1 <= side <= _LARGEST_LATENT):
            raise ModelError(
                f"the U-Net of {model} makes latents of size {size!r}. 1 to {_LARGEST_LATENT} is "
                "wanted: get the model again"
            )
    return pipe.to(device)


def kept_model(subject: Subject) -> dict[str, str | None]:
    """Return what `load_pipeline` takes to load the model that a subject was trained on.

    Raises:
        SubjectFileError: the subject's settings hold something else than names.
    """
    keys = {"model": "model", "config": "model_config", "vae": "vae"}
    kept = {name: subject.settings.get(key) for name, key in keys.items()}
    for name, value in kept.items():
        if not (value is None or isinstance(value, str)):
            raise SubjectFileError(
                f"the subject {subject.placeholder!r} names {value!r} as its {keys[name]}, which "
                "is not a name or a path: give the model yourself"
            )
    return kept


def _is_file(path: Path) -> bool:
    """Whether a path is one file, or by its name should be."""
    named = path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
    return (path.exists() or named) and not path.is_dir()


def _load_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, vae: str | os.PathLike[str] | None
) -> Pipeline:
    sdxl = _check_folder(folder, needs_vae=vae is None)
    kind, extras = _kind(sdxl)
    given: dict[str, Any] = {}
    for part in _models_of(sdxl):
        if part == "vae" and vae is not None:
            given[part] = _load_vae(vae, dtype, str(folder), sdxl)
        else:
            given[part] = load_part(_MODELS[part], folder, part, dtype, variant)
    with as_model_error(str(folder)):
        return kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **given,
            **extras,
        )


def _check_folder(folder: Path, needs_vae: bool) -> bool:
    """Whether a diffusers folder is of SDXL or of Stable Diffusion 1.x or 2.x.

    Raises:
        ModelError: it is neither, or lacks the configuration of one of its parts.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"{folder} is no diffusers pipeline: it has no model_index.json. Give the folder that "
            "holds unet, vae, text_encoder, tokenizer and scheduler"
        )
    index = read_json(index_file)
    check_model_index(index, str(folder))
    sdxl = is_sdxl_index(index)
    for part in _models_of(sdxl):
        if part != "vae" or needs_vae:
            check_config(folder, part)
    for tokenizer in ("tokenizer", "tokenizer_2")[: 2 if sdxl else 1]:
        whole = (folder / tokenizer / "tokenizer.json").is_file()
        for file in ("vocab.json", "merges.txt") if not whole else ():
            check_config(folder, tokenizer, file)
    check_config(folder, "scheduler", "scheduler_config.json")
    return sdxl


def load_part(
    kind: Any, folder: Path, part: str, dtype: torch.dtype, variant: str | None = None
) -> Any:
    """Load one model of a diffusers folder, with every one of its tensors from there.

    Args:
        kind: its class.
        folder: of the pipeline, or of this model alone.
        part: its name in the pipeline's folder; "" for a folder of this model alone.
        dtype: of the weights.
        variant: of the weight files, as for `load_pipeline`.

    Raises:
        ModelError: it cannot be loaded, or lacks a tensor.
    """
    variant = check_weights(folder / part, variant)
    with as_model_error(str(folder / part)):
        model, found = kind.from_pretrained(
            str(folder),
            subfolder=part,
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
        )
    _check_found(found, f"in {folder / part}")
    return model


def _check_found(found: dict[str, Any], where: str) -> None:
    """Raise ModelError for a model that `from_pretrained` left tensors of at random."""
    if missing := found["missing_keys"]:
        raise ModelError(
            f"the weights {where} are incomplete: they lack {listed(missing)}. Get the files again"
        )


def _load_hub(
    name: str, dtype: torch.dtype, variant: str | None, vae: str | os.PathLike[str] | None
) -> Pipeline:
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a file here nor a model that can be had from the "
            f"hub ({_first_line(error)})"
        ) from error
    check_model_index(index, name)
    try:
        pipe = _load_folder(_download(name, index, variant), dtype, variant, vae)
    except ModelError:
        if variant is not None:
            raise
        try:
            folder = _download(name, index, "fp16")
        except ModelError:
            folder = None
        if folder is None:
            raise
        pipe = _load_folder(folder, dtype, None, vae)
    # The name, where diffusers wrote the folder that the hub's files are kept in.
    pipe.register_to_config(_name_or_path=name)
    return pipe


def _download(name: str, index: dict[str, Any], variant: str | None) -> Path:
    """The folder of a hub's model, without any part that is not needed."""
    kind, extras = _kind(is_sdxl_index(index))
    with as_model_error(name):
        return Path(kind.download(name, variant=variant, use_safetensors=True, **extras))


def _load_vae(
    vae: str | os.PathLike[str], dtype: torch.dtype, config: str | None, sdxl: bool
) -> AutoencoderKL:
    """A VAE of its own; `config` is the diffusers folder or hub id that describes the model."""
    path = user_path(vae)
    if _is_file(path):
        names = read_header(path).names
        if not any("decoder.conv_in." in name for name in names):
            raise ModelError(f"{path} holds no VAE, but {listed(names)}. Give the file of a VAE")
        if config is None and sdxl:
            # By a VAE's tensors alone diffusers takes it for one of Stable Diffusion 1.x.
            config = _SDXL_CONFIG
        return _from_file(AutoencoderKL, path, dtype, config, "vae")
    if path.is_dir():
        part = "" if (path / "config.json").is_file() else "vae"
        check_config(path, part)
        loaded = load_part(AutoencoderKL, path, part, dtype)
    else:
        with as_model_error(f"the VAE {vae}"):
            loaded, found = AutoencoderKL.from_pretrained(
                expanded(vae), torch_dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        _check_found(found, f"of the VAE {vae}")
    described = Path(config or "") / "vae" / "config.json"
    if described.is_file():
        own, scale = read_json(described).get("scaling_factor"), loaded.config.scaling_factor
        if own is not None and own != scale:
            logger.warning(
                "the VAE %s scales its latents by %s, and the model's own by %s: is it a VAE of "
                "another family?",
                vae, scale, own,
            )  # fmt: skip
    return loaded


def _kind(sdxl: bool) -> tuple[Any, dict[str, Any]]:
    if sdxl:
        return StableDiffusionXLPipeline, _SDXL_EXTRAS
    return StableDiffusionPipeline, _SD_EXTRAS


def _models_of(sdxl: bool) -> list[str]:
    return list(_MODELS) if sdxl else list(_MODELS)[:3]


@contextmanager
def as_model_error(what: str, then: str = "") -> Iterator[None]:
    """Make one ModelError of whatever diffusers and transformers raise while they load.

    A configuration that asks for layers without end is one too.
    """
    thread, made = threading.get_ident(), itertools.count()

    def count(*_: Any) -> None:
        if threading.get_ident() == thread and next(made) >= _MOST_PARAMETERS:
            raise ModelError(
                f"{what} cannot be loaded: its configuration asks for more than "
                f"{_MOST_PARAMETERS:,} tensors. Get the model again"
            )

    counting = register_module_parameter_registration_hook(count)
    with warnings.catch_warnings():
        # diffusers below 0.36 knows `torch_dtype` alone, later ones take it with a warning.
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{what} cannot be loaded: {_first_line(error)}{then}") from error
        finally:
            counting.remove()


def _load_file(
    file: Path,
    dtype: torch.dtype,
    config: str | os.PathLike[str] | None,
    vae: str | os.PathLike[str] | None,
) -> Pipeline:
    header = read_header(file)
    sdxl = is_sdxl_checkpoint(file, header, needs_vae=vae is None)
    noise = noise_settings(file, header, guess=config is None)
    described = None if config is None else expanded(config)
    if described is not None and Path(described).is_dir():
        if _check_folder(Path(described), needs_vae=vae is None) != sdxl:
            raise ModelError(
                f"{file} is {'' if sdxl else 'not '}a model of SDXL, and {described} is of the "
                f"other kind: {_HOW_TO_CONFIGURE}"
            )
    elif config is not None:
        described = str(config)
    kind, extras = _kind(sdxl)
    given = {} if vae is None else {"vae": _load_vae(vae, dtype, described, sdxl)}
    pipe = _from_file(kind, file, dtype, described, None, **extras, **given)
    _set_noise(pipe, file, noise)
    return pipe


def _from_file(
    kind: Any, file: Path, dtype: torch.dtype, config: str | None, part: str | None, **given: Any
) -> Any:
    """A pipeline, or one part of it, from a single file that has every one of its tensors."""
    if config is not None:
        given["config"] = config
        given["local_files_only"] = Path(config).is_dir()
    if part is not None:
        given["subfolder"] = part
    then = f". A single file needs its family's configuration from the hub: {_HOW_TO_CONFIGURE}"
    with as_model_error(str(file), then if config is None else ""):
        try:
            loaded = kind.from_single_file(str(file), torch_dtype=dtype, **given)
        except NotImplementedError as error:
            # A tensor that the file lacks has no data to move; the one who moves it knows it.
            frames = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
            for model in frames:
                if isinstance(model, nn.Module):
                    check_whole(model, file)
            raise
        except KeyError as error:
            raise ModelError(
                f"{file} is incomplete: it lacks {error}. Get the file again"
            ) from error
    for model in [loaded] if part is not None else loaded.components.values():
        if isinstance(model, nn.Module):
            check_whole(model, file)
    return loaded


def check_whole(model: nn.Module, file: Path) -> None:
    """Raise ModelError for a model that did not get every one of its tensors from a file."""
    if missing := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise ModelError(
            f"{file} is incomplete: its {type(model).__name__} lacks {listed(missing)}. Get the "
            "file again, or one of the same model"
        )


def _set_noise(pipe: Pipeline, file: Path, wanted: dict[str, Any]) -> None:
    """Make the scheduler's settings those that the file says."""
    config = pipe.scheduler.config
    changed = {name: value for name, value in wanted.items() if config.get(name) != value}
    if not changed:
        return
    kind = type(pipe.scheduler)
    if not changed.keys() <= inspect.signature(kind.__init__).parameters.keys():
        kind = DDIMScheduler
    pipe.scheduler = kind.from_config(config, **changed)
    words = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    logger.warning(
        "%s says that its model wants %s, where the configuration has %s: the pipeline's %s "
        "follows the file",
        file.name, words, ", ".join(repr(config.get(name)) for name in changed), kind.__name__,
    )  # fmt: skip


def _first_line(error: Any) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    # diffusers goes on with what its own callers may do.
    return first.partition(" If you want to instead")[0].rstrip(".")
