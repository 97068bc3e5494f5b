"""Base models, pipelines and features of diffusers that subjects are drawn with, as test cases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
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
    UNet2DConditionModel,
)
from models import make_controlnet
from PIL import Image
from torch import Tensor

from sefi_fast.pipelines import regions
from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.prompts import encode_with_pooled

FAMILIES = {"SD 1.5": "sd15_pipeline", "SD 2.1": "sd21_pipeline", "SDXL": "sdxl_pipeline"}
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
MASK = (IMAGE[:, :1] > 0.5).float()


def _controlnet(pipe: Any, count: int = 1) -> dict[str, Any]:
    nets: list[ControlNetModel] = [make_controlnet(pipe.unet, seed) for seed in range(count)]
    return {"controlnet": nets[0] if count == 1 else MultiControlNetModel(nets)}


def _union(pipe: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    # from_unet leaves the width of its own transformer at that of the full-sized models.
    config = dict(ControlNetUnionModel.from_unet(pipe.unet).config)
    width = pipe.unet.config.block_out_channels[0]
    # Or the values named there would be taken for defaults and left out.
    config.pop("_use_default_values", None)
    union = ControlNetUnionModel.from_config(
        config | {"num_trans_channel": width, "num_proj_channel": width}
    )
    for block in [*union.controlnet_down_blocks, union.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.05)
    return {"controlnet": union.eval()}


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


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline: the class for SD 1.x and 2.x, the class for SDXL, what a call needs.

    on: called with the pipeline once it is made.
    """

    sd: str | None
    sdxl: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    on: Callable[[Any], None] = lambda pipe: None

    def class_name(self, family: str) -> str | None:
        """The pipeline class of diffusers for a family; None where there is none."""
        return self.sdxl if family == "SDXL" else self.sd

    def make(self, base: Any, family: str) -> Any:
        """A pipeline of this kind from the parts of the text-to-image one."""
        parts = {name: part for name, part in base.components.items() if part is not None}
        kind = getattr(diffusers, str(self.class_name(family)))
        # What a class does not know it must not be given: their constructors differ.
        known = inspect.signature(kind).parameters
        extras = {"add_watermarker": False, "safety_checker": None, "feature_extractor": None}
        extras |= {"requires_safety_checker": False}
        options = {name: value for name, value in extras.items() if name in known}
        pipe = kind(**(parts | options | self.parts(base)))
        pipe.set_progress_bar_config(disable=True)
        self.on(pipe)
        return pipe


_STRENGTH = {"image": IMAGE, "strength": 0.8}
KINDS = {
    "text to image": Kind("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "img2img": Kind(
        "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline", _STRENGTH
    ),
    "inpaint": Kind(
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        _STRENGTH | {"mask_image": MASK},
    ),
    "ControlNet": Kind(
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLControlNetPipeline",
        {"image": IMAGE},
        _controlnet,
    ),
    "two ControlNets": Kind(
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLControlNetPipeline",
        {"image": [IMAGE, 1 - IMAGE]},
        lambda pipe: _controlnet(pipe, 2),
    ),
    "ControlNet, guess_mode": Kind(
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLControlNetPipeline",
        {"image": IMAGE, "guess_mode": True},
        _controlnet,
    ),
    "ControlNet img2img": Kind(
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        _STRENGTH | {"control_image": 1 - IMAGE},
        _controlnet,
    ),
    "ControlNet inpaint": Kind(
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        _STRENGTH | {"mask_image": MASK, "control_image": 1 - IMAGE},
        _controlnet,
    ),
    "ControlNet-Union": Kind(
        None,
        "StableDiffusionXLControlNetUnionPipeline",
        {"control_image": [IMAGE], "control_mode": [0]},
        _union,
    ),
    "T2I-Adapter": Kind(
        "StableDiffusionAdapterPipeline",
        "StableDiffusionXLAdapterPipeline",
        {"image": IMAGE},
        _t2i_adapter,
    ),
    "AnimateDiff": Kind(
        "AnimateDiffPipeline", "AnimateDiffSDXLPipeline", {"num_frames": 2}, _motion
    ),
    "AnimateDiff, FreeNoise": Kind(
        "AnimateDiffPipeline",
        None,
        {"num_frames": 6},
        _motion,
        lambda pipe: pipe.enable_free_noise(context_length=4, context_stride=2),
    ),
}


def _unet(**changes: Any) -> Callable[[Any], dict[str, Any]]:
    """A random U-Net of the base's shape but for a few settings."""

    def parts(pipe: Any) -> dict[str, Any]:
        torch.manual_seed(4)
        config = dict(pipe.unet.config)
        # Or the values named there would be taken for defaults and left out.
        config.pop("_use_default_values", None)
        return {"unet": UNet2DConditionModel.from_config(config | changes).eval()}

    return parts


def _scheduler(kind: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda pipe: {"scheduler": kind.from_config(pipe.scheduler.config)}


def _controlnet_xs(pipe: Any) -> dict[str, Any]:
    widths = pipe.unet.config.block_out_channels
    shape = {"block_out_channels": (32, 64, 64, 64)[: len(widths)], "attention_head_dim": 4}
    # ControlNet-XS counts on two layers a block.
    unet = _unet(layers_per_block=2, **shape)(pipe)["unet"]
    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=1.0, conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    return {"unet": unet, "controlnet": adapter.eval()}


# Tried with the feature "plain" alone.
OTHERS = {
    "perturbed-attention guidance": Kind(
        "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"
    ),
    "ControlNet with perturbed-attention guidance": Kind(
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        {"image": IMAGE},
        _controlnet,
    ),
    "self-attention guidance": Kind("StableDiffusionSAGPipeline", None, {"output_type": "pt"}),
    "Attend-and-Excite": Kind(
        "StableDiffusionAttendAndExcitePipeline",
        None,
        {"token_indices": [5], "max_iter_to_alter": 1, "attn_res": (8, 8)},
    ),
    "ControlNet-XS": Kind(
        "StableDiffusionControlNetXSPipeline",
        "StableDiffusionXLControlNetXSPipeline",
        {"image": IMAGE},
        _controlnet_xs,
    ),
    "InstructPix2Pix": Kind(
        None, "StableDiffusionXLInstructPix2PixPipeline", {"image": IMAGE}, _unet(in_channels=8)
    ),
    "latent consistency": Kind(
        "LatentConsistencyModelPipeline",
        None,
        parts=lambda pipe: _unet(time_cond_proj_dim=32)(pipe) | _scheduler(LCMScheduler)(pipe),
    ),
    "GLIGEN": Kind(
        "StableDiffusionGLIGENPipeline",
        None,
        {"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
        _unet(attention_type="gated"),
    ),
    "depth to image": Kind(
        "StableDiffusionDepth2ImgPipeline",
        None,
        _STRENGTH | {"depth_map": torch.rand(1, 64, 64)},
        lambda pipe: _unet(in_channels=5)(pipe) | {"depth_estimator": None},
    ),
    "upscaling": Kind(
        "StableDiffusionUpscalePipeline",
        None,
        {"image": IMAGE[..., :16, :16]},
        lambda pipe: _unet(in_channels=7)(pipe) | {"low_res_scheduler": DDPMScheduler()},
    ),
    "Panorama": Kind("StableDiffusionPanoramaPipeline", None),
    "CycleDiffusion": Kind(
        "CycleDiffusionPipeline", None, _STRENGTH | {"source_prompt": "a dog", "eta": 0.1}
    ),
    "Text2Video-Zero": Kind(
        "TextToVideoZeroPipeline",
        "TextToVideoZeroSDXLPipeline",
        {"video_length": 2, "t0": 1, "t1": 2, "num_inference_steps": 4},
    ),
    "AnimateDiff on a video": Kind(
        "AnimateDiffVideoToVideoPipeline",
        None,
        {
            "video": [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")],
            "num_inference_steps": 3,
        },
        _motion,
    ),
    "PIA": Kind(
        "PIAPipeline",
        None,
        _STRENGTH | {"num_frames": 2},
        lambda pipe: _motion(pipe) | _unet(in_channels=9)(pipe),
    ),
}


@torch.no_grad()
def draw(pipe: Any, text: str, **arguments: Any) -> Tensor:
    """Latents of a run of two steps on a small image."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3 if "strength" in arguments else 2,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    if "image" not in arguments and "control_image" not in arguments:
        settings |= {"height": 64, "width": 64}
    result = pipe(**_words(pipe, text, settings | arguments))
    return result.frames if hasattr(result, "frames") else result.images


def _words(pipe: Any, text: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if not arguments.pop("as_tensors", False):
        return arguments | {"prompt": text}
    if EncodePromptPatch.of(pipe) is not None:
        given = encode_with_pooled(pipe, text)._asdict()
    else:
        names = ("prompt_embeds", "", "pooled_prompt_embeds")
        count = next(n for n in inspect.signature(pipe.encode_prompt).parameters if "num_" in n)
        own = pipe.encode_prompt(
            text, device=torch.device("cpu"), do_classifier_free_guidance=False, **{count: 1}
        )
        given = {name: value for name, value in zip(names, own, strict=False) if name}
    return arguments | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Feature:
    """Something a user turns on: on the pipeline, in the call, around the call, or all of these.

    around: of the pipeline and the call's sentence.
    applies: None where the feature exists, else why it does not.
    """

    on: Callable[[Any], None] = lambda pipe: None
    arguments: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    around: Callable[[Any, str], AbstractContextManager[Any]] = lambda pipe, text: nullcontext()
    applies: Callable[[Any], str | None] = lambda pipe: None


def _lacks(method: str) -> Callable[[Any], str | None]:
    return lambda pipe: None if hasattr(pipe, method) else "not in diffusers"


def _call_lacks(argument: str) -> Callable[[Any], str | None]:
    def applies(pipe: Any) -> str | None:
        known = argument in inspect.signature(type(pipe).__call__).parameters
        return None if known else "not in diffusers"

    return applies


def _cross_layers(unet: Any) -> Iterator[tuple[int, Any]]:
    for index, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if layer.is_cross_attention:
            yield index, layer


def load_ip_adapter(pipe: Any) -> None:
    """A random IP-Adapter for image embeddings of width 24, four tokens each."""
    generator = torch.Generator().manual_seed(3)
    width = pipe.unet.config.cross_attention_dim
    adapter = {
        f"{index}.to_{letter}_ip.weight": 0.3
        * torch.randn(getattr(layer, f"to_{letter}").weight.shape, generator=generator)
        for index, layer in _cross_layers(pipe.unet)
        for letter in "kv"
    }
    # Its keys count as diffusers counts them: 1, 3, 5 … in the order of the layers.
    order = sorted({int(key.split(".")[0]) for key in adapter})
    places = {str(index): str(2 * place + 1) for place, index in enumerate(order)}
    adapter = {
        ".".join([places[key.split(".")[0]], *key.split(".")[1:]]): value
        for key, value in adapter.items()
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


def _lcm(pipe: Any) -> None:
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
    "LCM": Feature(_lcm, lambda pipe: {"guidance_scale": 1.0}),
    "tensors": Feature(arguments=lambda pipe: {"as_tensors": True}),
    "callback": Feature(arguments=_callback, applies=_call_lacks("callback_on_step_end")),
    "clip_skip": Feature(arguments=lambda pipe: {"clip_skip": 1}, applies=_call_lacks("clip_skip")),
    "IP-Adapter": Feature(
        load_ip_adapter,
        lambda pipe: {
            "ip_adapter_image_embeds": [
                torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
            ]
        },
        applies=_call_lacks("ip_adapter_image_embeds"),
    ),
    "LoRA": Feature(
        load_lora,
        applies=lambda pipe: (
            _lacks("load_lora_weights")(pipe) or (None if find_spec("peft") else "peft is missing")
        ),
    ),
    "FreeU": Feature(
        lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), applies=_lacks("enable_freeu")
    ),
    "fused QKV": Feature(lambda pipe: pipe.unet.fuse_qkv_projections()),
    "slicing": Feature(
        lambda pipe: pipe.unet.set_attention_slice(1),
        applies=lambda pipe: _lacks("set_attention_slice")(pipe.unet),
    ),
    "regions": Feature(
        around=lambda pipe, text: regions(pipe, {f"{text} in the snow": (0.25, 0, 1, 0.6)})
    ),
    "model offload": Feature(_offload),
    "sequential offload": Feature(_offload_sequentially),
}
