"""Check the files of a model before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.support import WORKS_WITH
from sefi_fast.utils.files import open_regular, read_regular
from sefi_fast.utils.strict_json import parse_json

_FIRST_OF_SDXL = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
)
_SECOND_OF_SDXL = "conditioner.embedders.1.model.positional_embedding"
_EDM_MARKS = {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(
        ("v", "v_prediction", "v-prediction", "v-pred", "vpred", "velocity"), "v_prediction"
    ),
}
_LARGEST_JSON = 2**24
"""Bytes: the index of a model in hundreds of shards has well under one million."""
_LARGEST_NUMBER = 10**6
"""Whole number in a configuration: the vocabulary of CLIP has 49,408 tokens."""

_AGAIN = "Get the file again"
# First bytes of files that are not what their names say.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights. Run git lfs pull there"),
    (b"GGUF", "a GGUF file, whose weights are quantised. Get the model's safetensors weights"),
    (b"PK", "a pickled checkpoint, which is not loaded. Get the model's safetensors weights"),
    (b"\x80", "a pickled checkpoint, which is not loaded. Get the model's safetensors weights"),
    (b"<", f"a web page, not the weights. {_AGAIN}"),
    (b"{", f"a text file, not the weights. {_AGAIN}"),
)  # fmt: skip

# Names that ComfyUI, bitsandbytes and others use for parts of a quantised weight.
_SCALES = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8", ".absmax", ".quant_map")
# F8_E4M3 and F8_E5M2 without scales are plain roundings.
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class Header(NamedTuple):
    """Names of a safetensors file's tensors, and its metadata."""

    names: frozenset[str]
    metadata: dict[str, str]


def is_sdxl_checkpoint(file: Path, header: Header, needs_vae: bool) -> bool:
    """Return whether a checkpoint is of SDXL, not of Stable Diffusion 1.x or 2.x.

    Raises:
        ModelError: by the names of its tensors it is neither, or it lacks a part.
    """
    architecture = header.metadata.get("modelspec.architecture", "")
    if (other := _other_family(header.names)) is not None:
        kind = f" ({architecture})" if architecture else ""
        raise ModelError(f"{file} holds {other}{kind}; {WORKS_WITH}")
    if needs_vae and not any(name.startswith("first_stage_model.") for name in header.names):
        raise ModelError(
            f"{file} holds a checkpoint without its VAE: give one (vae= in Python, --vae of the "
            "commands)"
        )
    return any("conditioner.embedders." in name for name in header.names)


def _other_family(names: frozenset[str]) -> str | None:
    """Describe a checkpoint with these tensors; None for SD 1.x, 2.x and SDXL base models."""

    def any_with(part: str) -> bool:
        return any(part in name for name in names)

    if any_with("joint_blocks.") and any_with("x_block"):
        return "a model of the SD 3 family, which denoises with a transformer, not with a U-Net"
    if any_with("double_blocks.") and any_with("single_blocks."):
        return "a model of the Flux family, which denoises with a transformer, not with a U-Net"
    if not any_with("model.diffusion_model.input_blocks."):
        return "something other than a Stable Diffusion checkpoint (a LoRA, an embedding, one part)"
    if any_with("conditioner.embedders."):
        if not any_with("conditioner.embedders.1.") and not any_with(".embedders.0.transformer."):
            return "an SDXL refiner, which has one text encoder; load the base model"
        # diffusers looks for these two tensors, and would take the encoder from elsewhere.
        if _FIRST_OF_SDXL not in names:
            return "a checkpoint of SDXL without its first text encoder"
        if _SECOND_OF_SDXL not in names:
            return "a checkpoint of SDXL without its second text encoder"
        return None
    return None if any_with("cond_stage_model.") else "a checkpoint without its text encoder"


def noise_settings(file: Path, header: Header, guess: bool) -> dict[str, Any]:
    """Return the prediction type that a single file names, as settings of a scheduler, or {}.

    The marks are those that ComfyUI and the trainers of SDXL write: empty tensors and metadata.

    Args:
        guess: infer it from the weights of a Stable Diffusion 2.x model without a mark.

    Raises:
        ModelError: it predicts something other than noise or velocity at the steps of a schedule.
    """
    names, metadata = header
    if edm := names & _EDM_MARKS:
        raise ModelError(
            f"{file} is marked by {listed(edm)}: it was trained with EDM's continuous times, like "
            "Playground 2.5 and CosXL, which do not support subjects. Load another model"
        )
    prediction = "v_prediction" if "v_pred" in names else _named_prediction(metadata)
    if prediction is None and guess:
        prediction = _guessed_prediction(file, names)
    if prediction is None:
        return {}
    if prediction not in _PREDICTIONS.values():
        raise ModelError(
            f"{file} says that it predicts {prediction!r}. Models that predict the noise (epsilon) "
            "or the velocity (v) are supported. Load another model"
        )
    settings: dict[str, Any] = {"prediction_type": prediction}
    zero = "ztsnr" in names or _is_true(metadata, "ss_zero_terminal_snr")
    if prediction == "v_prediction" and zero:
        # Sampling has to begin at the last step, the one without signal.
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def _named_prediction(metadata: dict[str, str]) -> str | None:
    """Return the prediction type in a checkpoint's metadata, in diffusers' words if known."""
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if word := metadata.get(key, "").strip().lower():
            return _PREDICTIONS.get(word, word)
    if _is_true(metadata, "ss_v_parameterization"):
        return "v_prediction"
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2-"):
        return "v_prediction" if "-768-v" in architecture else "epsilon"
    return None


def _is_true(metadata: dict[str, str], key: str) -> bool:
    return metadata.get(key, "").strip().lower() in ("true", "1")


def _guessed_prediction(file: Path, names: frozenset[str]) -> str | None:
    """Infer the prediction type of Stable Diffusion 2.x, which diffusers takes for velocity.

    The spread of one bias is small in the models of noise.
    """
    width = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if not {width, bias} <= names:
        return None
    with safe_open(str(file), framework="pt") as opened:
        if opened.get_slice(width).get_shape()[-1] != 1024:
            return None
        spread = opened.get_tensor(bias).float().std(correction=0)
    return "v_prediction" if spread > 0.09 else "epsilon"


def read_header(file: Path) -> Header:
    """Read the header of a .safetensors file.

    Raises:
        ModelError: the file is missing, incomplete or of another kind, which is named, or its
            weights are quantised.
    """
    if file.suffix.lower() != ".safetensors":
        raise ModelError(
            f"{file} is not a .safetensors file, and pickled checkpoints are not loaded. Convert "
            "it, or get the safetensors file of the model"
        )
    try:
        # safe_open would wait for the writer of a FIFO.
        with open_regular(file) as stream:
            start = stream.read(64)
        with safe_open(str(file), framework="pt") as opened:
            header = Header(frozenset(opened.keys()), opened.metadata() or {})
            weights = [name for name in header.names if name.endswith((".weight", ".bias"))]
            kinds = {name: opened.get_slice(name).get_dtype() for name in weights}
    except FileNotFoundError as error:
        raise ModelError(f"there is no model file {file}. Check the path") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error}). {_AGAIN}") from error
    except SafetensorError as error:
        what = f"damaged, half downloaded or not a safetensors file ({error}). {_AGAIN}"
        # The length of a damaged header can begin like any of the others.
        if start[8:9] != b"{":
            what = next((other for sign, other in _OTHERS if start.startswith(sign)), what)
        raise ModelError(f"{file} is {what if start else f'empty. {_AGAIN}'}") from error
    # Loaded without these, every weight would be wrong by its scale.
    if scales := [name for name in header.names if name.endswith(_SCALES)]:
        raise ModelError(
            f"{file} holds quantised weights with scales of their own ({listed(scales)}). Get the "
            "model's weights in float16, bfloat16 or float32"
        )
    if others := [name for name in weights if kinds[name] not in _NUMBERS]:
        raise ModelError(
            f"{file} holds weights of type {kinds[min(others)]} ({listed(others)}), not real "
            "numbers. Get the model's weights in float16, bfloat16 or float32"
        )
    return header


def read_json(file: Path, largest: int | None = None) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises:
        ModelError: the file is missing, too large or not a JSON object, or holds a whole number
            above `largest`.
    """
    try:
        # Schedulers write -Infinity.
        found = parse_json(read_regular(file, _LARGEST_JSON), finite=False, largest=largest)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}). Get the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is not a JSON object. Get the model again")
    return found


def check_config(folder: Path, part: str, file: str = "config.json") -> None:
    """Raise ModelError unless a model's folder has a part and its configuration, of sound size."""
    if not (folder / part).is_dir():
        raise ModelError(f"{folder} lacks the folder {part}. Get the whole model")
    if not (folder / part / file).is_file():
        raise ModelError(f"{folder / part} lacks {file}. Get the whole model")
    if file.endswith("config.json"):
        read_json(folder / part / file, _LARGEST_NUMBER)


def check_weights(folder: Path, wanted: str | None) -> str | None:
    """Check the weights of one part of a model, and return the variant to load.

    Args:
        folder: folder of the part.
        wanted: variant that was asked for; None for the usual files, or fp16 if there are no
            others.

    Raises:
        ModelError: there are no safetensors weights, or not of that variant, or one of the files
            is missing or not complete.
    """
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        raise ModelError(
            f"{folder} holds no .safetensors weights"
            + (f", only {pickled[0]}, and pickled weights are not loaded" if pickled else "")
            + ". Get the model's safetensors weights, or convert it with "
            "pipe.save_pretrained(folder)"
        )
    if wanted is not None and not any(f".{wanted}" in name for name in files):
        raise ModelError(
            f"{folder} holds no weights of variant {wanted!r}, only {files[0]}. Leave variant out, "
            "or get that variant"
        )
    plain = [name for name in files if name.count(".") == 1]
    variant = wanted
    if variant is None and not plain and any(".fp16" in name for name in files):
        variant = "fp16"
    for index in folder.glob("*.safetensors.index*.json"):
        if (f".{variant}." in index.name) if variant else index.name.endswith(".index.json"):
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ModelError(f"{index} names no files. Get the model again")
            # A name that is not of a safetensors file here could be of a pickled one.
            if missing := {str(name) for name in shards.values()} - set(files):
                raise ModelError(f"{folder} lacks {listed(missing)}. Get the files again")
    for name in plain if variant is None else files:
        if variant is None or f".{variant}" in name:
            read_header(folder / name)
    return variant


def listed(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more
