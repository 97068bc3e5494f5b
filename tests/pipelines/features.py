"""Base models, pipelines and features of diffusers that subjects are tested with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import accelerate
import diffusers
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDPMScheduler,
    LCMScheduler,
    MotionAdapter,
    MultiControlNetModel,
    T2IAdapter,
)
from models import make_controlnet
from PIL import Image
from torch import Tensor

from sefi_fast import regions
from sefi_fast.prompts import encode_with_pooled

FAMILIES = {"SD 1.5": "sd15_pipeline", "SD 2.1": "sd21_pipeline", "SDXL": "sdxl_pipeline"}
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
MASK = (IMAGE[:, :1] > 0.5).float()


def _controlnet(pipe: Any, count: int = 1) -> dict[str, Any]:
    nets: list[ControlNetModel] = [make_controlnet(pipe.unet, seed) for seed in range(count)]
    return {"controlnet": nets[0] if count == 1 else MultiControlNetModel(nets)}


def _changed(model: Any, **changes: Any) -> Any:
    """A random model of the same class and shape but for a few settings."""
    config = dict(model.config)
    # Values named there would be replaced by defaults.
    config.pop("_use_default_values", None)
    return type(model).from_config(config | changes).eval()


def _union(pipe: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    # from_unet leaves the width of its own transformer at that of the full-sized models.
    full, width = ControlNetUnionModel.from_unet(pipe.unet), pipe.unet.config.block_out_channels[0]
    union = _changed(full, num_trans_channel=width, num_proj_channel=width)
    for block in [*union.controlnet_down_blocks, union.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.05)
    return {"controlnet": union}


def _t2i_adapter(pipe: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    sdxl = hasattr(pipe, "text_encoder_2")
    widths = list(pipe.unet.config.block_out_channels)
    adapter = T2IAdapter(
        in_channels=3,
        # SDXL's adapter has a feature for the middle block too.
        channels=widths + widths[-1:] if sdxl else widths,
        num_res_blocks=1,
        downscale_factor=16 if sdxl else 8,
        adapter_type="full_adapter_xl" if sdxl else "full_adapter",
    )
    return {"adapter": adapter.eval()}


def _motion(pipe: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        use_motion_mid_block=not hasattr(pipe, "text_encoder_2"),
    )
    return {"motion_adapter": adapter.eval()}


def _unet(**changes: Any) -> Callable[[Any], dict[str, Any]]:
    def parts(pipe: Any) -> dict[str, Any]:
        torch.manual_seed(4)
        return {"unet": _changed(pipe.unet, **changes)}

    return parts


def _controlnet_xs(pipe: Any) -> dict[str, Any]:
    widths = pipe.unet.config.block_out_channels
    shape = {"block_out_channels": (32, 64, 64, 64)[: len(widths)], "attention_head_dim": 4}
    # ControlNet-XS counts on two layers a block.
    unet = _unet(layers_per_block=2, **shape)(pipe)["unet"]
    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=1.0, conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    return {"unet": unet, "controlnet": adapter.eval()}


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline.

    Attributes:
        name: its class in diffusers, {XL} or {SDXL} where the name of SDXL's class has these
            letters; without them the class serves one family alone.
        arguments: further arguments of a call.
        parts: models besides those of the text-to-image pipeline, which it gets.
        on: called with the pipeline once it is made.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    on: Callable[[Any], None] = lambda pipe: None

    def class_name(self, family: str) -> str | None:
        """Return the pipeline class of diffusers for a family; None where there is none."""
        sdxl = family == "SDXL"
        if "{" not in self.name and ("XL" in self.name) != sdxl:
            return None
        name = self.name.format(XL="XL" * sdxl, SDXL="SDXL" * sdxl)
        return name if hasattr(diffusers, name) else None

    def make(self, base: Any, family: str) -> Any:
        """Return a pipeline of this kind from the parts of the text-to-image one."""
        parts = {name: part for name, part in base.components.items() if part is not None}
        kind = getattr(diffusers, str(self.class_name(family)))
        # Constructors know different options.
        known = inspect.signature(kind).parameters
        extras = {"add_watermarker": False, "safety_checker": None, "feature_extractor": None}
        extras |= {"requires_safety_checker": False}
        options = {name: value for name, value in extras.items() if name in known}
        pipe = kind(**(parts | options | self.parts(base)))
        pipe.set_progress_bar_config(disable=True)
        self.on(pipe)
        return pipe


_HINT = {"image": IMAGE}
_CHANGED = {"image": IMAGE, "strength": 0.8}
_MASKED = _CHANGED | {"mask_image": MASK}
_STEERED = {"control_image": 1 - IMAGE}
_VIDEO = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
KINDS = {
    "text to image": Kind("StableDiffusion{XL}Pipeline"),
    "img2img": Kind("StableDiffusion{XL}Img2ImgPipeline", _CHANGED),
    "inpaint": Kind("StableDiffusion{XL}InpaintPipeline", _MASKED),
    "ControlNet": Kind("StableDiffusion{XL}ControlNetPipeline", _HINT, _controlnet),
    "two ControlNets": Kind(
        "StableDiffusion{XL}ControlNetPipeline",
        {"image": [IMAGE, 1 - IMAGE]},
        lambda pipe: _controlnet(pipe, 2),
    ),
    "ControlNet, guess_mode": Kind(
        "StableDiffusion{XL}ControlNetPipeline", _HINT | {"guess_mode": True}, _controlnet
    ),
    "ControlNet img2img": Kind(
        "StableDiffusion{XL}ControlNetImg2ImgPipeline", _CHANGED | _STEERED, _controlnet
    ),
    "ControlNet inpaint": Kind(
        "StableDiffusion{XL}ControlNetInpaintPipeline", _MASKED | _STEERED, _controlnet
    ),
    "ControlNet-Union": Kind(
        "StableDiffusionXLControlNetUnionPipeline",
        {"control_image": [IMAGE], "control_mode": [0]},
        _union,
    ),
    "T2I-Adapter": Kind("StableDiffusion{XL}AdapterPipeline", _HINT, _t2i_adapter),
    "AnimateDiff": Kind("AnimateDiff{SDXL}Pipeline", {"num_frames": 2}, _motion),
    "AnimateDiff, FreeNoise": Kind(
        "AnimateDiffPipeline",
        {"num_frames": 6},
        _motion,
        lambda pipe: pipe.enable_free_noise(context_length=4, context_stride=2),
    ),
}
# Tested with the feature "plain" alone.
OTHERS = {
    "perturbed-attention guidance": Kind("StableDiffusion{XL}PAGPipeline"),
    "ControlNet with perturbed-attention guidance": Kind(
        "StableDiffusion{XL}ControlNetPAGPipeline", _HINT, _controlnet
    ),
    "self-attention guidance": Kind("StableDiffusionSAGPipeline", {"output_type": "pt"}),
    "Attend-and-Excite": Kind(
        "StableDiffusionAttendAndExcitePipeline",
        {"token_indices": [5], "max_iter_to_alter": 1, "attn_res": (8, 8)},
    ),
    "ControlNet-XS": Kind("StableDiffusion{XL}ControlNetXSPipeline", _HINT, _controlnet_xs),
    "InstructPix2Pix": Kind(
        "StableDiffusionXLInstructPix2PixPipeline", _HINT, _unet(in_channels=8)
    ),
    "latent consistency": Kind(
        "LatentConsistencyModelPipeline",
        {},
        _unet(time_cond_proj_dim=32),
        lambda pipe: _use_lcm(pipe),
    ),
    "GLIGEN": Kind(
        "StableDiffusionGLIGENPipeline",
        {"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
        _unet(attention_type="gated"),
    ),
    "depth to image": Kind(
        "StableDiffusionDepth2ImgPipeline",
        _CHANGED | {"depth_map": torch.rand(1, 64, 64)},
        lambda pipe: _unet(in_channels=5)(pipe) | {"depth_estimator": None},
    ),
    "upscaling": Kind(
        "StableDiffusionUpscalePipeline",
        {"image": IMAGE[..., :16, :16]},
        lambda pipe: _unet(in_channels=7)(pipe) | {"low_res_scheduler": DDPMScheduler()},
    ),
    "Panorama": Kind("StableDiffusionPanoramaPipeline"),
    "CycleDiffusion": Kind(
        "CycleDiffusionPipeline", _CHANGED | {"source_prompt": "a dog", "eta": 0.1}
    ),
    "Text2Video-Zero": Kind(
        "TextToVideoZero{SDXL}Pipeline",
        {"video_length": 2, "t0": 1, "t1": 2, "num_inference_steps": 4},
    ),
    "AnimateDiff on a video": Kind(
        "AnimateDiffVideoToVideoPipeline", {"video": _VIDEO, "num_inference_steps": 3}, _motion
    ),
    "PIA": Kind(
        "PIAPipeline",
        _CHANGED | {"num_frames": 2},
        lambda pipe: _motion(pipe) | _unet(in_channels=9)(pipe),
    ),
}


@torch.no_grad()
def sample_small(pipe: Any, text: Any, **arguments: Any) -> Tensor:
    """Latents of a run of two steps on a small image."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3 if "strength" in arguments else 2,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    if "image" not in arguments and "control_image" not in arguments:
        settings |= {"height": 64, "width": 64}
    settings |= arguments
    prompt = _encoded(pipe, text) if settings.pop("as_tensors", False) else {"prompt": text}
    result = pipe(**prompt, **settings)
    return result.frames if hasattr(result, "frames") else result.images


def _encoded(pipe: Any, text: str) -> dict[str, Any]:
    if "<" in text:
        given = encode_with_pooled(pipe, text)._asdict()
        return {name: value for name, value in given.items() if value is not None}
    count = next(n for n in inspect.signature(pipe.encode_prompt).parameters if "num_" in n)
    own = pipe.encode_prompt(
        text, device=torch.device("cpu"), do_classifier_free_guidance=False, **{count: 1}
    )
    return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), own[::2], strict=False))


@dataclass(frozen=True)
class Feature:
    """A feature that a user turns on: on the pipeline, in the call, around the call, or all three.

    Attributes:
        around: given the pipeline and the prompt of the call.
        needs: a method of the pipeline or its U-Net, or an argument of its call.
    """

    on: Callable[[Any], None] = lambda pipe: None
    arguments: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    around: Callable[[Any, str], AbstractContextManager[Any]] = lambda pipe, text: nullcontext()
    needs: str = "__call__"

    def missing(self, pipe: Any) -> str | None:
        """Return None where the feature exists, else why it does not."""
        known = {*dir(pipe), *dir(pipe.unet), *inspect.signature(type(pipe).__call__).parameters}
        if self.needs not in known:
            return "not in diffusers"
        return "peft is missing" if "lora" in self.needs and not find_spec("peft") else None


def load_ip_adapter(pipe: Any) -> None:
    """A random IP-Adapter for image embeddings of width 24, four tokens each."""
    generator = torch.Generator().manual_seed(3)
    width = pipe.unet.config.cross_attention_dim
    modules = [pipe.unet.get_submodule(n.rpartition(".")[0]) for n in pipe.unet.attn_processors]
    layers = [module for module in modules if module.is_cross_attention]
    # diffusers counts the layers as 1, 3, 5 …
    adapter = {
        f"{2 * index + 1}.to_{letter}_ip.weight": 0.3
        * torch.randn(getattr(layer, f"to_{letter}").weight.shape, generator=generator)
        for index, layer in enumerate(layers)
        for letter in "kv"
    }
    projection = {
        "proj.weight": 0.2 * torch.randn(4 * width, 24, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": adapter},
        subfolder="",
        weight_name="",
        image_encoder_folder=None,
    )
    pipe.set_ip_adapter_scale(0.7)


def load_lora(pipe: Any) -> None:
    """A random LoRA of rank 2 on keys, values and queries of the U-Net's attention."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_k", "to_v", "to_q")) and "attn2" in name:
            out, inner = module.weight.shape
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, inner, generator=generator)
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator) / 8
    pipe.load_lora_weights(weights)


def _use_lcm(pipe: Any) -> None:
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)


def _offload(pipe: Any) -> None:
    hook = None
    for name in pipe.model_cpu_offload_seq.split("->"):
        model = getattr(pipe, name, None)
        if isinstance(model, torch.nn.Module):
            _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"), hook)


def _offload_sequentially(pipe: Any) -> None:
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _callback(pipe: Any) -> dict[str, Any]:
    def halve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return tensors | {"prompt_embeds": tensors["prompt_embeds"] * 0.5}

    names = ["latents", "prompt_embeds"]
    return {
        "callback_on_step_end": halve,
        "callback_on_step_end_tensor_inputs": names,
        # The last of two steps hardly changes the image.
        "num_inference_steps": 4,
    }


def _count(pipe: Any) -> dict[str, Any]:
    kind = type(pipe).__name__
    return {"num_videos_per_prompt" if "AnimateDiff" in kind else "num_images_per_prompt": 2}


FEATURES = {
    "plain": Feature(),
    "several images": Feature(arguments=_count),
    "no guidance": Feature(arguments=lambda pipe: {"guidance_scale": 1.0}),
    "LCM": Feature(_use_lcm, lambda pipe: {"guidance_scale": 1.0}),
    "tensors": Feature(arguments=lambda pipe: {"as_tensors": True}),
    "callback": Feature(arguments=_callback, needs="callback_on_step_end"),
    "clip_skip": Feature(arguments=lambda pipe: {"clip_skip": 1}, needs="clip_skip"),
    "IP-Adapter": Feature(
        load_ip_adapter,
        lambda pipe: {
            "ip_adapter_image_embeds": [
                torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
            ]
        },
        needs="ip_adapter_image_embeds",
    ),
    "LoRA": Feature(load_lora, needs="load_lora_weights"),
    "FreeU": Feature(lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), needs="enable_freeu"),
    "fused QKV": Feature(lambda pipe: pipe.unet.fuse_qkv_projections()),
    "slicing": Feature(lambda pipe: pipe.unet.set_attention_slice(1), needs="set_attention_slice"),
    "regions": Feature(
        around=lambda pipe, text: regions(pipe, {f"{text} in the snow": (0.25, 0, 1, 0.6)})
    ),
    "model offload": Feature(_offload),
    "sequential offload": Feature(_offload_sequentially),
}
