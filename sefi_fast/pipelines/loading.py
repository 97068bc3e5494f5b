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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from sefi_fast.errors import ModelError, SubjectFileError, first_line
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

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
ModelSource: TypeAlias = str | os.PathLike[str]


class _Family(NamedTuple):
    """Parts of a family's pipelines; `omitted` are arguments that leave the optional ones out."""

    pipeline: type[Pipeline]
    models: dict[str, type[ModelMixin | PreTrainedModel]]
    tokenizers: list[str]
    omitted: dict[str, Any]


_SD = _Family(
    StableDiffusionPipeline,
    {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel},
    ["tokenizer"],
    {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    },
)
_SDXL = _Family(
    StableDiffusionXLPipeline,
    {**_SD.models, "text_encoder_2": CLIPTextModelWithProjection},
    ["tokenizer", "tokenizer_2"],
    {"feature_extractor": None, "image_encoder": None},
)
_SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"

_LARGEST_LATENT = 2048
_MOST_PARAMETERS = 10_000
"""Tensors that one load may create: a whole pipeline of SDXL has 2,600."""
_HOW_TO_CONFIGURE = (
    "Give the diffusers folder of a model of the same architecture (config= of load_pipeline, "
    "model_config= of train and train_many, --model-config of the commands)"
)


def load_pipeline(
    model: ModelSource | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    variant: str | None = None,
    config: ModelSource | None = None,
    vae: ModelSource | None = None,
) -> Pipeline:
    """Load a pipeline from safetensors weights, without a safety checker.

    Args:
        model: a diffusers folder, a single .safetensors checkpoint, a hub id, or None for the
            bundled tiny model.
        dtype: dtype of the weights; default: float32 on the CPU and float16 elsewhere.
        device: default: CUDA if available, else the CPU.
        variant: variant of the weight files of a folder or a hub id, such as "fp16"; default: the
            usual files, or the fp16 ones if there are no others.
        config: for a single file, the diffusers folder (weights are not read) or hub id of a model
            of the same architecture, for configurations and tokenizers; default: the hub's, for the
            family that diffusers finds in the file. The prediction type (noise or velocity) that
            the file names takes precedence over the folder's scheduler, with a warning.
        vae: an autoencoder that replaces the model's: a diffusers folder of one or of a pipeline, a
            .safetensors file, or a hub id.

    Raises:
        ModelError: there is no such model, its weights are not safetensors or not complete, it
            lacks the variant or a part, it is of a family without a U-Net with cross-attention
            (SD 3, Flux), or predicts something other than noise or velocity.
        ValueError: `config` for something other than a single file, or `variant` for one.

    Example:
        >>> pipe = load_pipeline(device="cpu")  # the bundled model
        >>> pipe.unet.dtype
        torch.float32
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
    elif path.is_dir():
        pipe = _load_folder(path, dtype, variant, vae)
    else:
        pipe = _load_hub(str(model), dtype, variant, vae)
    if not path.is_dir():
        # diffusers writes the folder of the hub's files, or nothing.
        pipe.register_to_config(_name_or_path=str(model))
    _check_latents(pipe, model, vae)
    return pipe.to(device)


def _check_latents(pipe: Pipeline, model: ModelSource, vae: ModelSource | None) -> None:
    """Raise ModelError unless the U-Net and the VAE have the same latents, of a sound size."""
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents and vae is not None:
        raise ModelError(
            f"the VAE {vae} has {latents} latent channels, but the U-Net of {model} takes "
            f"{channels}. Give a VAE of its family"
        )
    if channels != latents:
        raise ModelError(
            f"the U-Net of {model} takes {channels} channels, as inpainting and depth models do. "
            "Load a text-to-image model, or give your own inpainting pipeline to sefi_fast.attach"
        )
    scale = pipe.vae.config.scaling_factor
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ModelError(
            f"the VAE of {model} scales its latents by {scale!r}. A number above 0 is expected. "
            "Get the model again"
        )
    size = pipe.unet.config.sample_size
    for side in size if isinstance(size, (list, tuple)) else [64 if size is None else size]:
        if not (isinstance(side, int) and 1 <= side <= _LARGEST_LATENT):
            raise ModelError(
                f"the U-Net of {model} makes latents of size {size!r}. 1 to {_LARGEST_LATENT} is "
                "expected. Get the model again"
            )


def kept_model(subject: Subject) -> dict[str, str | None]:
    """Return the arguments of `load_pipeline` for the model that a subject was trained on.

    Raises:
        SubjectFileError: the subject's settings hold something other than names.
    """
    keys = {"model": "model", "config": "model_config", "vae": "vae"}
    kept = {name: subject.settings.get(key) for name, key in keys.items()}
    for name, value in kept.items():
        if not (value is None or isinstance(value, str)):
            raise SubjectFileError(
                f"the subject {subject.placeholder!r} has {value!r} as its {keys[name]}, which is "
                "not a name or a path. Give the model yourself"
            )
    return kept


def _is_file(path: Path) -> bool:
    """Return whether a path is a file, or by its name should be."""
    named = path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
    return (path.exists() or named) and not path.is_dir()


def _load_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, vae: ModelSource | None
) -> Pipeline:
    family = _check_folder(folder, needs_vae=vae is None)
    given: dict[str, Any] = {
        part: load_part(kind, folder, part, dtype, variant)
        if part != "vae" or vae is None
        else _load_vae(vae, dtype, str(folder), family)
        for part, kind in family.models.items()
    }
    with as_model_error(str(folder)):
        return family.pipeline.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **given,
            **family.omitted,
        )


def _check_folder(folder: Path, needs_vae: bool) -> _Family:
    """Return the family of a diffusers folder that has the configuration of every part."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json. Give the folder "
            "that holds unet, vae, text_encoder, tokenizer and scheduler"
        )
    index = read_json(index_file)
    check_model_index(index, str(folder))
    family = _SDXL if is_sdxl_index(index) else _SD
    for part in family.models:
        if part != "vae" or needs_vae:
            check_config(folder, part)
    for tokenizer in family.tokenizers:
        if not (folder / tokenizer / "tokenizer.json").is_file():
            check_config(folder, tokenizer, "vocab.json")
            check_config(folder, tokenizer, "merges.txt")
    check_config(folder, "scheduler", "scheduler_config.json")
    return family


def load_part(
    kind: type[ModelMixin | PreTrainedModel],
    folder: Path,
    part: str,
    dtype: torch.dtype,
    variant: str | None = None,
) -> Any:
    """Load one model of a diffusers folder, with every one of its tensors from there.

    Args:
        kind: class of the model.
        folder: folder of the pipeline, or of this model alone.
        part: name in the pipeline's folder; "" for a folder of this model alone.
        dtype: dtype of the weights.
        variant: variant of the weight files, as for `load_pipeline`.

    Raises:
        ModelError: the model cannot be loaded, or lacks a tensor.
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
    """Raise ModelError for a model some of whose tensors `from_pretrained` left random."""
    if missing := found["missing_keys"]:
        raise ModelError(
            f"the weights {where} are incomplete: they lack {listed(missing)}. Get the files again"
        )


def _load_hub(
    name: str, dtype: torch.dtype, variant: str | None, vae: ModelSource | None
) -> Pipeline:
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a file here, and the hub gives no such model "
            f"({_reason(error)})"
        ) from error
    check_model_index(index, name)
    family = _SDXL if is_sdxl_index(index) else _SD

    def download(variant: str | None) -> Path:
        with as_model_error(name):
            return Path(
                family.pipeline.download(
                    name, variant=variant, use_safetensors=True, **family.omitted
                )
            )

    try:
        return _load_folder(download(variant), dtype, variant, vae)
    except ModelError as error:
        if variant is not None:
            raise
        try:
            folder = download("fp16")
        except ModelError:
            raise error from error.__cause__
        return _load_folder(folder, dtype, None, vae)


def _load_vae(
    vae: ModelSource, dtype: torch.dtype, config: str | None, family: _Family
) -> AutoencoderKL:
    """Load a VAE that replaces the model's; `config` is the model's diffusers folder or hub id."""
    path = user_path(vae)
    if _is_file(path):
        names = read_header(path).names
        if not any("decoder.conv_in." in name for name in names):
            raise ModelError(
                f"{path} does not hold a VAE, but {listed(names)}. Give the file of a VAE"
            )
        if config is None and family is _SDXL:
            # By the tensors of a VAE diffusers takes it for one of Stable Diffusion 1.x.
            config = _SDXL_CONFIG
        return _from_file(AutoencoderKL, path, dtype, config, subfolder="vae")
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


@contextmanager
def as_model_error(what: str, then: str = "") -> Iterator[None]:
    """Convert every exception of diffusers and transformers while they load to a ModelError.

    A configuration that asks for an unbounded number of layers raises one too.
    """
    thread, created = threading.get_ident(), itertools.count()

    def count(*_: Any) -> None:
        if threading.get_ident() == thread and next(created) >= _MOST_PARAMETERS:
            raise ModelError(
                f"{what} cannot be loaded: its configuration asks for more than "
                f"{_MOST_PARAMETERS:,} tensors. Get the model again"
            )

    counting = register_module_parameter_registration_hook(count)
    with warnings.catch_warnings():
        # diffusers below 0.36 knows only `torch_dtype`, later versions take it with a warning.
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{what} cannot be loaded: {_reason(error)}{then}") from error
        finally:
            counting.remove()


def _load_file(
    file: Path, dtype: torch.dtype, config: ModelSource | None, vae: ModelSource | None
) -> Pipeline:
    header = read_header(file)
    family = _SDXL if is_sdxl_checkpoint(file, header, needs_vae=vae is None) else _SD
    noise = noise_settings(file, header, guess=config is None)
    described = None if config is None else expanded(config)
    if described is not None and Path(described).is_dir():
        found = _check_folder(Path(described), needs_vae=vae is None)
        if found is not family:
            raise ModelError(
                f"{file} is {'' if family is _SDXL else 'not '}a model of SDXL, and {described} is "
                f"{'' if found is _SDXL else 'not '}one. {_HOW_TO_CONFIGURE}"
            )
    given = {} if vae is None else {"vae": _load_vae(vae, dtype, described, family)}
    pipe = _from_file(family.pipeline, file, dtype, described, **family.omitted, **given)
    _set_noise(pipe, file, noise)
    return pipe


def _from_file(
    kind: type[Pipeline | AutoencoderKL],
    file: Path,
    dtype: torch.dtype,
    config: str | None,
    **given: Any,
) -> Any:
    """Load a pipeline, or one part of it, from a single file that has all of its tensors."""
    if config is not None:
        given |= {"config": config, "local_files_only": Path(config).is_dir()}
    then = f". A single file needs its family's configuration from the hub. {_HOW_TO_CONFIGURE}"
    with as_model_error(str(file), then if config is None else ""):
        try:
            loaded = kind.from_single_file(str(file), torch_dtype=dtype, **given)
        except NotImplementedError as error:
            # A tensor that the file lacks has no data to move; its model is in a frame above.
            frames = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
            for model in frames:
                if isinstance(model, nn.Module):
                    check_whole(model, file)
            raise
        except KeyError as error:
            raise ModelError(
                f"{file} is incomplete: it lacks {error}. Get the file again"
            ) from error
    for model in [loaded] if isinstance(loaded, nn.Module) else loaded.components.values():
        if isinstance(model, nn.Module):
            check_whole(model, file)
    return loaded


def check_whole(model: nn.Module, file: Path) -> None:
    """Raise ModelError unless a model got every one of its tensors from a file."""
    if missing := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise ModelError(
            f"{file} is incomplete: its {type(model).__name__} lacks {listed(missing)}. Get the "
            "file again, or one of the same model"
        )


def _set_noise(pipe: Pipeline, file: Path, wanted: dict[str, Any]) -> None:
    """Apply the settings of the scheduler that a file names."""
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


def _reason(error: BaseException) -> str:
    # diffusers continues with advice for its own callers.
    return first_line(error).partition(" If you want to instead")[0].rstrip(".")
