"""Random-weight diffusers pipelines of real architectures at reduced width, built without a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WORDS = (
    "a an the photo image painting of in on at with and person people cat dog bear car chair "
    "plushie creature face man woman holding wearing hat red blue green old young snow forest "
    "beach night city tower cup basketball eyes closed standing front left right side"
)


def make_tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    """Return CLIP's byte-pair tokenizer (end-of-word suffix, 77 positions) trained on a few words.

    The words of WORDS are one token each, and any other word several.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in trained["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    pieces += ["".join(merge.split(" ")) for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, **options
    )


def make_unet(
    cross_attention_dim: int, seed: int = 0, heads: int | tuple[int, ...] = 4, **options: Any
) -> UNet2DConditionModel:
    """Return Stable Diffusion 1.5's U-Net at width 32/64/96/96, or as the options say.

    It has four levels, three of them with cross-attention.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64, 96, 96),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        attention_head_dim=heads,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=8,
        **(settings | options),
    ).eval()


def make_text_encoder(
    kind: type, tokenizer: CLIPTokenizer, seed: int = 0, **options: Any
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return CLIP's text transformer of two layers and width 48, or as the options say."""
    torch.manual_seed(seed)
    ids = tokenizer.convert_tokens_to_ids
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 48,
        "pad_token_id": ids("<|endoftext|>"),
    }
    text_encoder = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=77,
            bos_token_id=ids("<|startoftext|>"),
            eos_token_id=ids("<|endoftext|>"),
            **(settings | options),
        )
    ).eval()
    with torch.no_grad():
        # With CLIP's own initialisation (std 0.02) all prompts would be nearly alike.
        text_encoder.get_input_embeddings().weight.mul_(20)
    return text_encoder


def make_vae(seed: int = 0, **options: Any) -> AutoencoderKL:
    """Return Stable Diffusion's autoencoder (a factor of 8, four channels) at width 8 and 16."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=8,
        sample_size=128,
        **options,
    ).eval()


def make_sd15(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """Return a pipeline of SD 1.5's architecture: 128×128 images, 77 tokens, width 48."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_encoder = make_text_encoder(CLIPTextModel, tokenizer, seed)
    return _sd(tokenizer, text_encoder, make_unet(48, seed + 2), make_vae(seed + 1))


def make_sd21(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """Return SD 2.1's architecture: v-prediction, linear projections, a head count a level."""
    tokenizer = make_tokenizer(folder / "tokenizer", pad_token="!")
    unet = make_unet(48, seed + 2, heads=(2, 4, 6, 6), use_linear_projection=True)
    text_encoder = make_text_encoder(
        CLIPTextModel, tokenizer, seed, hidden_act="gelu", pad_token_id=0, num_hidden_layers=3
    )
    vae = make_vae(seed + 1)
    return _sd(tokenizer, text_encoder, unet, vae, prediction_type="v_prediction")


_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _sd(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    **schedule: Any,
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sdxl(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """Return SDXL base's architecture: text encoders of width 48 and 64, 128×128 images, 77 tokens.

    The U-Net has three levels, attention on the lower two with two and three transformer blocks, a
    head count a level, linear projections, a pooled embedding of width 32 and six time ids of
    width 8.
    """
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokenizer_2 = make_tokenizer(folder / "tokenizer_2", pad_token="!")
    text_encoder = make_text_encoder(CLIPTextModel, tokenizer, seed, num_hidden_layers=3)
    text_encoder_2 = make_text_encoder(
        CLIPTextModelWithProjection,
        tokenizer_2,
        seed + 3,
        hidden_size=64,
        num_hidden_layers=3,
        hidden_act="gelu",
        projection_dim=32,
        pad_token_id=0,
    )
    unet = make_unet(
        112,
        seed + 2,
        heads=(2, 4, 6),
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    with torch.no_grad():
        # With random weights the pooled embedding hardly reaches the image.
        unet.add_embedding.linear_1.weight.mul_(4)
        unet.add_embedding.linear_2.weight.mul_(4)
    pipe = StableDiffusionXLPipeline(
        vae=make_vae(seed + 1, scaling_factor=0.13025, force_upcast=True),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """Return a ControlNet of the U-Net's shape with random weights for its zero convolutions."""
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
    for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.05)
    return controlnet.eval()
