"""load_pipeline: what it loads, and what it says of everything else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pipelines.checkpoint import save_checkpoint
from pipelines.sampling import sample, subject_for
from safetensors.torch import load_file, save_file

from sefi_fast.errors import ModelError
from sefi_fast.pipelines import attach, load_pipeline


def check_same_model(pipe, saved) -> None:
    """Equal weights, and equal images within rounding.

    Weights that are mapped from a file begin at other addresses modulo 64 bytes, and matrix
    products on some processors round differently there.
    """
    for name, part in saved.components.items():
        if isinstance(part, torch.nn.Module):
            found = getattr(pipe, name).state_dict()
            assert found.keys() == part.state_dict().keys()
            assert all(torch.equal(found[key], value) for key, value in part.state_dict().items())
    wanted = sample(saved, "a cat")
    torch.testing.assert_close(
        sample(pipe, "a cat"), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())
    )


def test_a_folder_loads_as_it_was_saved(sd15_folder, sd15_pipeline):
    pipe = load_pipeline(sd15_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.float32 and pipe.safety_checker is None
    check_same_model(pipe, sd15_pipeline)
    half = load_pipeline(str(sd15_folder), dtype=torch.bfloat16, device="cpu")
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16


def test_a_folder_with_half_precision_files_alone_loads(sd15_folder, tmp_path):
    folder = shutil.copytree(sd15_folder, tmp_path / "half")
    load_pipeline(sd15_folder, dtype=torch.float16, device="cpu").save_pretrained(
        folder, variant="fp16"
    )
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            if ".fp16." not in file.name:
                file.unlink()
    assert load_pipeline(folder, device="cpu").unet.dtype == torch.float32


def test_a_variant_asked_for_is_loaded_or_told(sd15_folder, tmp_path):
    folder = shutil.copytree(sd15_folder, tmp_path / "both")
    half = load_pipeline(sd15_folder, dtype=torch.float16, device="cpu")
    half.unet.conv_in.bias.data.fill_(0.5)
    half.save_pretrained(folder, variant="fp16")
    for variant, found in ((None, False), ("fp16", True)):
        bias = load_pipeline(folder, device="cpu", variant=variant).unet.conv_in.bias
        assert bool((bias == 0.5).all()) == found
    with pytest.raises(ModelError, match="no weights of variant 'bf16'"):
        load_pipeline(folder, variant="bf16")
    with pytest.raises(ModelError, match="no weights of variant 'fp16'"):
        load_pipeline(sd15_folder, variant="fp16")


def test_sdxl_folders_load(sdxl_pipeline, tmp_path):
    sdxl_pipeline.save_pretrained(tmp_path, variant="fp16")
    pipe = load_pipeline(tmp_path, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    check_same_model(pipe, sdxl_pipeline)
    shutil.rmtree(tmp_path / "text_encoder_2")
    with pytest.raises(ModelError, match="lacks the folder text_encoder_2"):
        load_pipeline(tmp_path)


def index_of(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


@pytest.fixture
def folder(sd15_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sd15_folder, tmp_path / "model")


FAMILIES = {
    "StableDiffusionXLImg2ImgPipeline": (
        {
            "text_encoder": [None, None],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        },
        "second text encoder alone, as SDXL's refiner has",
    ),
    "HybridPipeline": (
        {"text_encoder_2": ["transformers", "T5EncoderModel"]},
        "text_encoder_2 is T5EncoderModel instead of CLIPTextModelWithProjection",
    ),
    "StableDiffusion3Pipeline": (
        {"transformer": ["diffusers", "SD3Transformer2DModel"]},
        "SD3Transformer2DModel, not with a U-Net",
    ),
    "FluxPipeline": (
        {"transformer": ["diffusers", "FluxTransformer2DModel"]},
        "FluxTransformer2DModel",
    ),
    "DiTPipeline": ({"unet": None}, "whose unet is missing instead of UNet2DConditionModel"),
    "IFPipeline": (
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        "text_encoder is T5EncoderModel instead of CLIPTextModel",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_told_before_anything_is_loaded(folder, name):
    changes, words = FAMILIES[name]
    index = index_of(folder) | {"_class_name": name} | changes
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelError, match=words) as raised:
        load_pipeline(folder)
    assert name in str(raised.value)


def test_damaged_folders_are_told_in_words(folder, tmp_path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pickled = weights.with_suffix(".bin")
    pickled.write_bytes(b"pickle")
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights, only diffusion_pytorch_mod"):
        load_pipeline(folder)
    weights.write_bytes(whole[:2000])
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match="no description of a model"):
        load_pipeline(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load_pipeline(folder)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="neither a folder nor a file"):
        load_pipeline("nobody/no-such-model")
    with pytest.raises(ModelError, match="no model file"):
        load_pipeline(tmp_path / "missing.safetensors")


def test_inpainting_models_are_refused(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["in_channels"] = 9
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    kernel = weights["conv_in.weight"]
    weights["conv_in.weight"] = kernel.new_zeros(kernel.shape[0], 9, *kernel.shape[2:])
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="takes 9 channels"):
        load_pipeline(folder)


CHECKPOINTS = {
    "SDXL refiner": ["conditioner.embedders.0.x", "model.diffusion_model.input_blocks.0.0.weight"],
    "SD 3 family, which denoises with a transformer": [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    ],
    "Flux family, which denoises with a transformer": [
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.0.linear1.weight",
    ],
    "a LoRA, an embedding or one part": ["lora_unet_down_blocks_0.lora_up.weight"],
    "without its text encoder": ["model.diffusion_model.input_blocks.0.0.weight"],
}


@pytest.mark.parametrize("words", CHECKPOINTS)
def test_single_files_of_other_families(tmp_path, words):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in CHECKPOINTS[words]}, file)
    with pytest.raises(ModelError, match=words):
        load_pipeline(file)


def test_single_files_that_are_no_safetensors(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="pickled checkpoints are not loaded"):
        load_pipeline(tmp_path / "model.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"text")
    with pytest.raises(ModelError, match="damaged"):
        load_pipeline(tmp_path / "model.safetensors")


def test_a_single_file_of_the_right_family_goes_to_diffusers(tmp_path, monkeypatch, sd15_pipeline):
    from diffusers import StableDiffusionPipeline

    names = ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"]
    names.append("first_stage_model.x")
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    asked = []

    def from_single_file(source, **arguments):
        asked.append((source, arguments["torch_dtype"], arguments["safety_checker"]))
        return sd15_pipeline

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    assert load_pipeline(file, device="cpu") is sd15_pipeline
    assert asked == [(str(file), torch.float32, None)]

    def fail(source, **arguments):
        raise OSError("no network\nmore")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", fail)
    with pytest.raises(ModelError, match="no network.*configuration from the hub"):
        load_pipeline(file)


@pytest.mark.parametrize("name", ["sd15_pipeline", "sdxl_pipeline"])
def test_a_single_file_draws_what_its_folder_draws(request, tmp_path, name):
    base = request.getfixturevalue(name)
    base.save_pretrained(tmp_path / "folder")
    for weights in (tmp_path / "folder").rglob("*.safetensors"):
        weights.unlink()
    save_checkpoint(base, tmp_path / "model.safetensors")
    pipe = load_pipeline(tmp_path / "model.safetensors", device="cpu", config=tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is type(base)
    torch.testing.assert_close(sample(pipe, "a cat"), sample(base, "a cat"), rtol=0, atol=1e-4)
    attach(pipe, subject_for(pipe, distance=0))
    torch.testing.assert_close(sample(pipe, "a <it>"), sample(base, "a cat"), rtol=0, atol=1e-3)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(pipe.vae.decode(latents)[0], base.vae.decode(latents)[0])


def test_config_and_variant_are_for_what_has_them(sd15_folder, tmp_path):
    with pytest.raises(ValueError, match="config is for a single"):
        load_pipeline(sd15_folder, config=sd15_folder)
    with pytest.raises(ValueError, match="has no variants"):
        load_pipeline(tmp_path / "model.safetensors", variant="fp16")


def test_nothing_given_loads_the_bundled_model():
    pipe = load_pipeline(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.float32
    assert sample(pipe, "a photo of a creature", num_inference_steps=1).isfinite().all()
