"""Models that training is given: one file offline, float8 and quantized weights, other inputs."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from models import make_vae
from PIL import Image
from pipelines.checkpoint import save_checkpoint
from pipelines.sampling import sample
from torch import nn
from training.shared import FAST as THREE
from training.shared import random_image, state_of
from transformers import BertTokenizer, CLIPTokenizer, CLIPTokenizerFast

import sefi_fast
from sefi_fast.cli import main
from sefi_fast.errors import ModelError
from sefi_fast.prompts import text_encoders
from sefi_fast.subject import Subject
from sefi_fast.training import ManifestError

FAST: dict[str, Any] = {**THREE, "steps": 2, "batch_size": 1, "class_word": "cat"}
FP8 = torch.float8_e4m3fn


@pytest.fixture
def photo() -> Image.Image:
    return random_image(0)


@pytest.fixture
def one_file(sd15_pipeline, tmp_path, monkeypatch, photo):
    """The current folder: model.safetensors, its configuration pipe, a VAE of its own, a photo."""
    monkeypatch.chdir(tmp_path)
    sd15_pipeline.save_pretrained("pipe")
    for weights in (tmp_path / "pipe").rglob("*.safetensors"):
        weights.unlink()
    save_checkpoint(sd15_pipeline, tmp_path / "model.safetensors")
    make_vae(seed=7).save_pretrained("vae")
    photo.save("me.png")
    return tmp_path


KEPT = {"model": "model.safetensors", "model_config": "pipe", "vae": "vae"}


def test_training_from_one_file_without_the_hub(one_file, photo):
    with pytest.raises(ModelError, match="model_config= of train"):
        sefi_fast.train(photo, model="model.safetensors", **FAST)
    subject = sefi_fast.train(photo, **KEPT, output="a.safetensors", **FAST)
    assert {name: subject.settings[name] for name in KEPT} == KEPT
    own = sefi_fast.train(photo, model="model.safetensors", model_config="pipe", **FAST)
    assert "vae" not in own.settings and own.history.loss != subject.history.loss
    pipe = sefi_fast.load_pipeline("model.safetensors", config="pipe")
    assert pipe.config._name_or_path == "model.safetensors"
    with pytest.raises(ValueError, match="set pipe.vae instead"):
        sefi_fast.train(photo, model=pipe, vae="vae", **FAST)


def test_the_commands_take_a_config_and_a_vae(one_file, capsys):
    train = ["train", "me.png", "--class-word", "cat", "-o", "me.safetensors", "--quiet"]
    train += ["--steps", "1", "--batch-size", "1", "--resolution", "64"]
    assert main([*train, "-m", "model.safetensors"]) == 1
    assert "--model-config" in capsys.readouterr().err
    options = ["-m", "model.safetensors", "--model-config", "pipe", "--vae", "vae"]
    assert main([*train, *options]) == 0
    assert {name: Subject.load("me.safetensors").settings[name] for name in KEPT} == KEPT
    # The run's file and the subject name them again.
    assert main([*train[:1], "-c", "me.run.yaml", "-o", "again.safetensors", "--quiet"]) == 0
    assert {name: Subject.load("again.safetensors").settings[name] for name in KEPT} == KEPT
    for prompt, more in {"a <it>": ["-s", "me.safetensors"], "a cat": options}.items():
        assert main(["generate", prompt, *more, "--steps", "1", "-n", "1", "-o", prompt[2:5]]) == 0
    shutil.rmtree("pipe")
    assert main(["generate", "a <it>", "-s", "me.safetensors", "-o", "gone"]) == 1
    assert "give --model" in capsys.readouterr().err


def test_a_manifest_names_a_config_and_a_vae(one_file, photo):
    row = {"image": "me.png", **KEPT}
    arguments = {**FAST, "output": "out"}
    (result,) = sefi_fast.train_many([row], **arguments)
    assert {name: result.subject.settings[name] for name in KEPT} == KEPT
    (again,) = sefi_fast.train_many([row], **arguments)
    assert again.before
    (other,) = sefi_fast.train_many([{**row, "vae": None}], **arguments)
    assert "vae was 'vae', is None" in str(other.error)
    with pytest.raises(ManifestError, match="names the vae 'vae', the run 'other'"):
        sefi_fast.train_many([row], vae="other", **arguments)


NARROW = {
    "U-Net": lambda pipe: pipe.unet.to(FP8),
    "text encoder and VAE": lambda pipe: (
        pipe.text_encoder.to(torch.float8_e5m2),
        pipe.vae.to(FP8),
    ),
    "U-Net cast by layers": lambda pipe: pipe.unet.enable_layerwise_casting(FP8, torch.bfloat16),
    "text encoder cast by layers": lambda pipe: apply_layerwise_casting(
        pipe.text_encoder, FP8, torch.float32
    ),
}


@pytest.mark.parametrize("kind", NARROW)
def test_float8_weights_are_trained_through_and_given_back(sd15_pipeline, photo, kind):
    NARROW[kind](sd15_pipeline)
    before = _bits(sd15_pipeline)
    subject = sefi_fast.train(photo, model=sd15_pipeline, **FAST)
    assert _bits(sd15_pipeline) == before
    # The same run on weights that were cast by hand.
    for part in (sd15_pipeline.unet, sd15_pipeline.text_encoder, sd15_pipeline.vae):
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        for module in part.modules():
            vars(module).pop("_diffusers_hook", None)
            vars(module).pop("forward", None)
    plain = sefi_fast.train(photo, model=sd15_pipeline, **FAST)
    np.testing.assert_allclose(subject.history.loss, plain.history.loss, rtol=1e-4)


def _bits(pipe: Any) -> dict[tuple[str, str], Any]:
    return {
        (name, key): (tensor.dtype, tensor.detach().contiguous().view(torch.uint8).sum().item())
        for name in ("unet", "text_encoder", "vae")
        for key, tensor in getattr(pipe, name).state_dict().items()
        if tensor.ndim
    }


def test_a_pipeline_cast_by_layers_takes_a_subject(sd15_pipeline, photo):
    sd15_pipeline.unet.enable_layerwise_casting(FP8, torch.float32)
    subject = sefi_fast.train(photo, model=sd15_pipeline, **FAST)
    bare = sample(sd15_pipeline, "a cat")
    sefi_fast.attach(sd15_pipeline, subject)
    torch.testing.assert_close(sample(sd15_pipeline, "a cat"), bare)
    assert sample(sd15_pipeline, "a <it>").isfinite().all()


class Packed(nn.Parameter):
    """A quantized weight of another library: bytes, or a tensor of its own class."""


def _dynamic(pipe):
    torch.ao.quantization.quantize_dynamic(pipe.text_encoder, {nn.Linear}, inplace=True)


def _bytes(pipe):
    weight = pipe.unet.conv_in.weight
    pipe.unet.conv_in.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)


def _own_class(pipe):
    layer = pipe.unet.mid_block.resnets[0].conv1
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)


QUANTIZED = {
    "text encoder, dynamic int8": (_dynamic, r"text_encoder|CLIPTextModel is quantized"),
    "U-Net in bytes": (_bytes, r"conv_in.weight is a Tensor of torch.uint8"),
    "U-Net of a class of its own": (_own_class, r"conv1.weight is a Packed of torch.float32"),
}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_refused_before_training(sd15_pipeline, photo, tmp_path, kind):
    change, words = QUANTIZED[kind]
    change(sd15_pipeline)
    before = state_of(sd15_pipeline)
    with pytest.raises(ModelError, match=words):
        sefi_fast.train(photo, model=sd15_pipeline, output=tmp_path / "a.safetensors", **FAST)
    assert state_of(sd15_pipeline) == before and not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_clips_is_refused(sd15_pipeline, photo, tmp_path):
    subject = sefi_fast.train(photo, model=sd15_pipeline, **FAST)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    sd15_pipeline.tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=77)
    words = f"tokenizer of type {type(sd15_pipeline.tokenizer).__name__}, which does not cut text"
    for call in (
        lambda: sefi_fast.train(photo, model=sd15_pipeline, **FAST),
        lambda: sefi_fast.attach(sd15_pipeline, subject),
        lambda: sefi_fast.encode(sd15_pipeline, "a <it>", subjects=subject),
    ):
        with pytest.raises(ModelError, match=words):
            call()


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_clips_tokenizers_of_every_class_pass(sd15_folder, sd15_pipeline, kind):
    class Own(kind):
        """A subclass, as diffusers' multi-vector tokenizers are."""

    for cls in (kind, Own):
        sd15_pipeline.tokenizer = cls.from_pretrained(sd15_folder / "tokenizer")
        assert text_encoders(sd15_pipeline)[0].tokenizer is sd15_pipeline.tokenizer


FURTHER = {
    "LCM's guidance": ({"time_cond_proj_dim": 16}, "takes the guidance scale as an input"),
    "class labels": ({"num_class_embeds": 4}, "takes class labels .num_class_embeds is 4"),
    "class timesteps": ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    "text added": (
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        "added conditioning of type 'text'",
    ),
    "projected text": (
        {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"},
        "encoder_hid_dim_type is 'text_proj'",
    ),
    "another width": ({"cross_attention_dim": 64}, "of width 64, but its text encoders make 48"),
}


def _unet_with(pipe: Any, settings: dict[str, Any]) -> UNet2DConditionModel:
    config = {name: value for name, value in pipe.unet.config.items() if name[0] != "_"}
    return UNet2DConditionModel.from_config(config | settings)


@pytest.mark.parametrize("kind", FURTHER)
def test_unets_that_want_further_inputs_are_refused_in_words(sd15_pipeline, photo, kind):
    settings, words = FURTHER[kind]
    sd15_pipeline.unet = _unet_with(sd15_pipeline, settings)
    with pytest.raises(ModelError, match=words):
        sefi_fast.train(photo, model=sd15_pipeline, **FAST)


def test_advice_for_lcm_works(sd15_pipeline, photo):
    subject = sefi_fast.train(photo, model=sd15_pipeline, **FAST)
    distilled = _unet_with(sd15_pipeline, {"time_cond_proj_dim": 16})
    distilled.load_state_dict(sd15_pipeline.unet.state_dict(), strict=False)
    sd15_pipeline.unet = distilled.eval()
    sd15_pipeline.scheduler = LCMScheduler.from_config(sd15_pipeline.scheduler.config)
    sefi_fast.attach(sd15_pipeline, subject)
    assert sample(sd15_pipeline, "a <it>", num_inference_steps=1).isfinite().all()
