"""Write a pipeline as a single file with the names of the first published models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
    "self_attn.out_proj": "attn.out_proj",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}


def save_checkpoint(pipe: Any, path: Path) -> None:
    """Write a Stable Diffusion 1.x or an SDXL pipeline to one .safetensors file."""
    tensors = {f"model.diffusion_model.{n}": t for n, t in _unet(pipe.unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(pipe.vae).items()}
    second = getattr(pipe, "text_encoder_2", None)
    prefix = "cond_stage_model" if second is None else "conditioner.embedders.0"
    for name, tensor in _clip(pipe.text_encoder).items():
        tensors[f"{prefix}.transformer.text_model.{name}"] = tensor
    if second is not None:
        for name, tensor in _open_clip(second).items():
            tensors[f"conditioner.embedders.1.model.{name}"] = tensor
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _unet(unet: Any) -> dict[str, Tensor]:
    each = unet.config.layers_per_block + 1
    found = {}
    for name, tensor in unet.state_dict().items():
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
        if match is None:
            old = next(start for start in _UNET if name.startswith(start))
            rest = name[len(old) :]
            if "resnets" in old:
                rest = _renamed(rest, _RESNET)
            found[_UNET[old] + rest] = tensor
            continue
        way, block, part, index, rest = match.groups()
        side = "input" if way == "down" else "output"
        place = int(block) * each + int(index) + (1 if way == "down" else 0)
        if part == "resnets":
            number, rest = 0, _renamed(rest, _RESNET)
        elif part == "attentions":
            number = 1
        else:
            place += each - 1
            owner = getattr(unet, f"{way}_blocks")[int(block)]
            number = 0 if way == "down" else 1 + (getattr(owner, "attentions", None) is not None)
            rest = rest.replace("conv.", "op.") if way == "down" else rest
        found[f"{side}_blocks.{place}.{number}.{rest}"] = tensor
    return found


def _vae(vae: Any) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    found = {}
    for name, tensor in vae.state_dict().items():
        if "attentions.0" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = _renamed(name, {"mid_block.attentions.0": "mid.attn_1", **_VAE_ATTENTION})
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = re.sub(r"((?:down|up)\.\d)\.resnets", r"\1.block", name)
        name = re.sub(r"((?:down|up)\.\d)\.(down|up)samplers\.0", r"\1.\2sample", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[name] = tensor
    return found


def _clip(text_encoder: Any) -> dict[str, Tensor]:
    # transformers 4 has one module more around these than transformers 5.
    state = text_encoder.state_dict()
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _open_clip(text_encoder: Any) -> dict[str, Tensor]:
    found = {}
    state = _clip(text_encoder)
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif "q_proj" in name:
            joined = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            layer, kind = name.split(".self_attn.q_proj.")
            layer = layer.replace("encoder.layers.", "transformer.resblocks.")
            found[f"{layer}.attn.in_proj_{kind}"] = joined
        elif "k_proj" not in name and "v_proj" not in name:
            found[_renamed(name, _OPEN_CLIP)] = tensor
    return found
