"""Read from a one-file checkpoint what model it is: its family, its parts and its prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.families import WORKS_WITH
from sefi_fast.pipelines.weight_files import Header, listed

HOW_TO_GIVE_A_VAE = "give one (vae= in Python, --vae of the commands)"


def is_sdxl_checkpoint(file: Path, header: Header, needs_vae: bool) -> bool:
    """Whether a .safetensors file is of SDXL or of Stable Diffusion 1.x or 2.x.

    Raises:
        ModelError: by the names of its tensors it is neither, or it lacks a part.
    """
    architecture = header.metadata.get("modelspec.architecture", "")
    if (other := _other_family(header.names)) is not None:
        kind = f" ({architecture})" if architecture else ""
        raise ModelError(f"{file} holds {other}{kind}; {WORKS_WITH}")
    if needs_vae and not any(name.startswith("first_stage_model.") for name in header.names):
        raise ModelError(f"{file} holds a checkpoint without its VAE: {HOW_TO_GIVE_A_VAE}")
    return any("conditioner.embedders." in name for name in header.names)


def _other_family(names: frozenset[str]) -> str | None:
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
        if not any_with("conditioner.embedders.1.") and not any_with(".embedders.0.transformer."):
            return "an SDXL refiner, which has one text encoder; load the base model"
        # diffusers looks for these two tensors, and would take the encoder from elsewhere.
        if _FIRST_OF_SDXL not in names:
            return "a checkpoint of SDXL without its first text encoder"
        if _SECOND_OF_SDXL not in names:
            return "a checkpoint of SDXL without its second text encoder"
        return None
    if not any_with("cond_stage_model."):
        return "a checkpoint without its text encoder"
    return None


_FIRST_OF_SDXL = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
)
_SECOND_OF_SDXL = "conditioner.embedders.1.model.positional_embedding"


def noise_settings(file: Path, header: Header, guess: bool) -> dict[str, Any]:
    """What a single file says of its prediction, as settings of a scheduler; {} if nothing.

    The keys are those that ComfyUI and the trainers of SDXL write, empty tensors that only mark.

    Args:
        guess: read it from the weights of a Stable Diffusion 2.x model that does not say.

    Raises:
        ModelError: it predicts something else than noise or velocity at the steps of a schedule.
    """
    names, metadata = header
    if edm := sorted(names & {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}):
        raise ModelError(
            f"{file} is marked by {listed(edm)}: it was trained with EDM's continuous times, as "
            "Playground 2.5 and CosXL, which take no subject; load a model of another training"
        )
    said = _said_prediction(metadata)
    if "v_pred" in names:
        said = "v_prediction"
    elif said is None and guess:
        said = _guessed_prediction(file, names)
    elif said not in (None, "epsilon", "v_prediction"):
        raise ModelError(
            f"{file} says that it predicts {said!r}; sefi_fast works with models that predict the "
            "noise (epsilon) or the velocity (v). Load another model"
        )
    if said is None:
        return {}
    zero = "ztsnr" in names or _is_true(metadata, "ss_zero_terminal_snr")
    if said == "v_prediction" and zero:
        # Sampling has to begin at the last step, the one without signal.
        return {
            "prediction_type": said,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    return {"prediction_type": said}


def _said_prediction(metadata: dict[str, str]) -> str | None:
    """What the metadata of a checkpoint says that the model predicts, in diffusers' words."""
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if word := metadata.get(key, "").strip().lower():
            velocity = word in ("v", "v_prediction", "v-prediction", "v-pred", "vpred", "velocity")
            noise = word in ("epsilon", "eps")
            return "v_prediction" if velocity else "epsilon" if noise else word
    if _is_true(metadata, "ss_v_parameterization"):
        return "v_prediction"
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2-"):
        return "v_prediction" if "-768-v" in architecture else "epsilon"
    return None


def _is_true(metadata: dict[str, str], key: str) -> bool:
    return metadata.get(key, "").strip().lower() in ("true", "1")


def _guessed_prediction(file: Path, names: frozenset[str]) -> str | None:
    """Of Stable Diffusion 2.x, by the spread of a bias that is small in the models of noise.

    diffusers takes every such file for one of 2.1, which predicts the velocity.
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
