"""load_pipeline: folders, single files and hub ids; damaged, hostile and foreign files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import make_controlnet, make_vae
from pipelines.checkpoint import save_checkpoint
from pipelines.sampling import sample, subject_for
from safetensors.torch import load_file, save_file

from sefi_fast.errors import ModelError, PathError
from sefi_fast.pipelines import attach, load_pipeline
from sefi_fast.pipelines.controlnet import load_controlnet
from sefi_fast.tiny_world import bundled_model_path

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(sd15_folder, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sd15_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def sd15_file(sd15_folder, tmp_path_factory) -> Path:
    """The model of the folder as one file."""
    path = tmp_path_factory.mktemp("sd15_file") / "whole.safetensors"
    save_checkpoint(load_pipeline(sd15_folder, device="cpu"), path)
    return path


@pytest.fixture(scope="module")
def sdxl_file(_sdxl_session, tmp_path_factory) -> tuple[Path, Path]:
    """A model of SDXL as one file, and its folder."""
    folder = tmp_path_factory.mktemp("sdxl_file")
    save_checkpoint(_sdxl_session, folder / "whole.safetensors")
    _sdxl_session.save_pretrained(folder / "pipe")
    return folder / "whole.safetensors", folder / "pipe"


def check_same_model(pipe, saved) -> None:
    """Check for equal weights, and equal images within rounding.

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


# What is loaded.


@pytest.mark.parametrize("name", ["sd15_pipeline", "sdxl_pipeline"])
def test_a_folder_loads_as_it_was_saved(request, tmp_path, name):
    saved = request.getfixturevalue(name)
    saved.save_pretrained(tmp_path, variant="fp16")
    pipe = load_pipeline(str(tmp_path), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.float32 and getattr(pipe, "safety_checker", None) is None
    check_same_model(pipe, saved)
    half = load_pipeline(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16


def test_a_variant_is_loaded_if_it_exists(sd15_folder, folder):
    half = load_pipeline(sd15_folder, dtype=torch.float16, device="cpu")
    half.unet.conv_in.bias.data.fill_(0.5)
    half.save_pretrained(folder, variant="fp16")
    for variant, found in ((None, False), ("fp16", True)):
        bias = load_pipeline(folder, device="cpu", variant=variant).unet.conv_in.bias
        assert bool((bias == 0.5).all()) == found
    for source, variant in ((folder, "bf16"), (sd15_folder, "fp16")):
        with pytest.raises(ModelError, match=f"no weights of variant '{variant}'"):
            load_pipeline(source, variant=variant)


@pytest.mark.parametrize("name", ["sd15_pipeline", "sdxl_pipeline"])
def test_a_single_file_means_what_its_folder_means(request, tmp_path, name):
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


@pytest.mark.parametrize("config", [None, "some/model"])
def test_diffusers_loads_a_single_file_with_a_configuration_of_the_hub(
    tmp_path, monkeypatch, sd15_pipeline, config
):
    names = ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"]
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in [*names, "first_stage_model.x"]}, file)
    calls = []

    def from_single_file(source, *, torch_dtype, safety_checker, **arguments):
        calls.append((source, torch_dtype, safety_checker, arguments.get("config")))
        if len(calls) > 1:
            raise OSError("no network\nmore")
        return sd15_pipeline

    target = "diffusers.StableDiffusionPipeline.from_single_file"
    monkeypatch.setattr(target, from_single_file)
    assert load_pipeline(file, device="cpu", config=config) is sd15_pipeline
    assert calls == [(str(file), torch.float32, None, config)]
    with pytest.raises(ModelError, match="no network") as raised:
        load_pipeline(file, config=config)
    assert ("configuration from the hub" in str(raised.value)) == (config is None)


def test_a_model_of_the_hub_is_checked_like_a_folder(folder, monkeypatch, sd15_folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    half, asked = tmp_path / "half", []
    load_pipeline(sd15_folder, device="cpu").save_pretrained(half, variant="fp16")

    def download(name, variant=None, **arguments):
        asked.append(variant)
        if variant == "fp16" and not half.exists():
            raise OSError("no such variant")
        return str(half if variant == "fp16" else folder)

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda *_, **__: index)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    assert load_pipeline("some/model", device="cpu").config._name_or_path == "some/model"
    lack(UNET, "conv_out")(folder)
    assert load_pipeline("some/model", device="cpu").config._name_or_path == "some/model"
    assert asked == [None, None, "fp16"]
    shutil.rmtree(half)
    for variant in (None, "fp32"):
        with pytest.raises(ModelError, match="unet are incomplete|no weights of variant"):
            load_pipeline("some/model", variant=variant)


def test_shards_are_loaded_and_a_missing_one_is_named(folder):
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(weights)}
    for file in names:
        shard = {name: weights[name] for name, place in places.items() if place == file}
        save_file(shard, folder / "unet" / file, {"format": "pt"})
    index = folder / f"{UNET}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = load_pipeline(folder, device="cpu").unet.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    (folder / "unet" / names[1]).unlink()
    with pytest.raises(ModelError, match=f"unet lacks {names[1]}"):
        load_pipeline(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="names no files"):
        load_pipeline(folder)


@pytest.fixture(scope="module")
def other_vae(sd15_folder, tmp_path_factory) -> Path:
    """Folder "pipe" of a pipeline with another VAE, "vae" of the VAE alone, and its two files."""
    folder = tmp_path_factory.mktemp("vae")
    pipe = load_pipeline(sd15_folder, device="cpu")
    pipe.vae = make_vae(seed=7)
    pipe.save_pretrained(folder / "pipe")
    pipe.vae.save_pretrained(folder / "vae")
    save_checkpoint(pipe, folder / "one.safetensors")
    prefix = "first_stage_model."
    tensors = load_file(folder / "one.safetensors")
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    save_file(own, folder / "original.safetensors")
    shutil.copy(folder / VAE, folder / "diffusers.safetensors")
    return folder


VAES = ["pipe", "vae", "one.safetensors", "original.safetensors", "diffusers.safetensors"]


@pytest.mark.parametrize(
    ("vae", "single"), [*((vae, False) for vae in VAES), (VAES[1], True), (VAES[3], True)]
)
def test_a_vae_replaces_the_models(folder, sd15_file, other_vae, tmp_path, vae, single):
    model, config = folder, None
    if single:
        model = edited(sd15_file, tmp_path / "no-vae.safetensors", lack="first_stage_model")
        config = folder
    if (other_vae / vae).is_dir():
        shutil.rmtree(folder / "vae")
    pipe = load_pipeline(model, config=config, vae=other_vae / vae, device="cpu")
    wanted = make_vae(seed=7)
    found = pipe.vae.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
    assert pipe.vae.config.scaling_factor == wanted.config.scaling_factor


def test_a_vae_that_does_not_fit_is_reported(sd15_folder, other_vae, tmp_path, caplog, monkeypatch):
    make_vae(scaling_factor=0.13025).save_pretrained(tmp_path / "scaled")
    load_pipeline(sd15_folder, vae=tmp_path / "scaled", device="cpu")
    assert "scales its latents by 0.13025, and the model's own by 0.18215" in caplog.text
    cut = tmp_path / "cut.safetensors"
    for vae, words in (
        (sd15_folder / UNET, "does not hold a VAE, but conv_in"),
        (tmp_path / "missing.safetensors", "no model file"),
        (tmp_path / "vae.pt", "pickled checkpoints are not loaded"),
        (tmp_path, "lacks the folder vae"),
        (bundled_model_path(), "has 8 latent channels, but the U-Net"),
        ("nobody/no-such-vae", "the VAE nobody/no-such-vae cannot be loaded"),
        (edited(other_vae / VAES[4], cut, lack="conv_out"), "its AutoencoderKL lacks"),
    ):
        with pytest.raises(ModelError, match=words):
            load_pipeline(sd15_folder, vae=vae)
    with pytest.raises(PathError, match="home folder that is not there"):
        load_pipeline(sd15_folder, vae="~nobody-of-that-name/vae")
    found = (make_vae(), {"missing_keys": ["encoder.conv_in.bias"]})
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", lambda *_, **__: found)
    with pytest.raises(ModelError, match="of the VAE some/vae are incomplete: they lack enc"):
        load_pipeline(sd15_folder, vae="some/vae")


# Prediction types that a single file names.

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
VELOCITY = {"prediction_type": "v_prediction"}
MARKS = [
    (["v_pred"], {}, VELOCITY),
    (["v_pred", "ztsnr"], {}, VELOCITY | ZERO),
    (["v_pred"], {"modelspec.predict_key": "epsilon"}, VELOCITY),
    ([], {"modelspec.prediction_type": "v"}, VELOCITY),
    ([], {"modelspec.prediction_type": "v_prediction"}, VELOCITY),
    ([], {"modelspec.prediction_type": "V-Pred"}, VELOCITY),
    ([], {"modelspec.predict_key": "v"}, VELOCITY),
    ([], {"ss_v_parameterization": "True"}, VELOCITY),
    ([], {"ss_v_parameterization": "true"}, VELOCITY),
    (["v_pred"], {"ss_zero_terminal_snr": "True"}, VELOCITY | ZERO),
    ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, VELOCITY),
    ([], {"modelspec.architecture": "stable-diffusion-v2-512"}, {}),
    ([], {"modelspec.prediction_type": "epsilon"}, {}),
    (["ztsnr"], {}, {}),
    ([], {}, {}),
    (["edm_mean", "edm_std"], {}, "edm_mean, edm_std: it was trained with EDM"),
    (["edm_vpred.sigma_max"], {}, "EDM"),
    ([], {"modelspec.prediction_type": "flow"}, "predicts 'flow'"),
]
SDXL = [
    "model.diffusion_model.input_blocks.0.0.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "conditioner.embedders.1.model.positional_embedding",
    "first_stage_model.x",
]


@pytest.mark.parametrize(("marks", "metadata", "wanted"), MARKS)
def test_marks_of_a_single_file_set_the_scheduler(
    sdxl_pipeline, tmp_path, monkeypatch, caplog, marks, metadata, wanted
):
    file = tmp_path / "marked.safetensors"
    tensors = {name: torch.zeros(2) for name in SDXL} | {name: torch.zeros(0) for name in marks}
    save_file(tensors, file, metadata)
    target = "diffusers.StableDiffusionXLPipeline.from_single_file"
    monkeypatch.setattr(target, lambda *_, **__: sdxl_pipeline)
    if isinstance(wanted, str):
        with pytest.raises(ModelError, match=wanted):
            load_pipeline(file)
        return
    found = load_pipeline(file, device="cpu").scheduler.config
    expected = {"prediction_type": "epsilon", "timestep_spacing": "leading"} | wanted
    assert {name: found[name] for name in expected} == expected
    assert found["beta_end"] == 0.012
    assert ("v_prediction" in caplog.text) == bool(wanted)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_single_file_of_velocity_trains_on_velocity(sdxl_file, tmp_path, scheduler):
    from sefi_fast.training.noise import NoiseSchedule

    whole, folder = sdxl_file
    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    marked = edited(whole, tmp_path / "marked.safetensors", add=marks)
    config = shutil.copytree(folder, tmp_path / "config")
    # PNDM does not support zero terminal SNR.
    index(scheduler=["diffusers", scheduler])(config)
    pipe = load_pipeline(marked, config=config, device="cpu")
    schedule = NoiseSchedule(pipe.scheduler, torch.device("cpu"))
    latents, noise, last = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([999])
    torch.testing.assert_close(schedule.target(latents, noise, last), -latents)
    assert schedule.add_noise(latents, noise, last).abs().max() < 1e-6


def test_a_folder_of_velocity_yields_to_a_file_of_noise(sd15_file, folder, tmp_path, caplog):
    configure("scheduler/scheduler_config.json", prediction_type="v_prediction")(folder)
    pipe = load_pipeline(sd15_file, config=folder)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert "prediction_type" not in caplog.text
    metadata = {"modelspec.prediction_type": "epsilon"}
    save_file(load_file(sd15_file), tmp_path / "marked.safetensors", metadata)
    pipe = load_pipeline(tmp_path / "marked.safetensors", config=folder)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert "prediction_type='epsilon'" in caplog.text


@pytest.mark.parametrize(
    ("width", "spread", "prediction"),
    [(1024, 0.01, "epsilon"), (1024, 0.2, "v_prediction"), (768, 0.2, "epsilon")],
)
def test_the_prediction_of_an_unmarked_sd2_file_is_inferred(
    tmp_path, monkeypatch, sd15_pipeline, width, spread, prediction
):
    unet = "model.diffusion_model"
    tensors = {
        f"{unet}.input_blocks.0.0.weight": torch.zeros(2),
        f"{unet}.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, width),
        f"{unet}.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([spread, 0]) * 2,
        "cond_stage_model.x": torch.zeros(2),
        "first_stage_model.x": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "sd2.safetensors")
    target = "diffusers.StableDiffusionPipeline.from_single_file"
    monkeypatch.setattr(target, lambda *_, **__: sd15_pipeline)
    pipe = load_pipeline(tmp_path / "sd2.safetensors", device="cpu")
    assert pipe.scheduler.config.prediction_type == prediction


# Damaged and foreign folders and files: each row is a change and words of the error.


def edited(file: Path, to: Path, lack: str | None = None, add=()) -> Path:
    """Copy a safetensors file without tensors whose names hold `lack`, and with others."""
    tensors = {n: t for n, t in load_file(file).items() if lack is None or lack not in n}
    save_file(tensors | dict(add), to, {"format": "pt"})
    return to


def remove(path):
    def change(root):
        shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return change


def put(path, make):
    """Write a file; `make` gives the content from the earlier one."""

    def change(root):
        content = make((root / path).read_bytes()) if callable(make) else make
        (root / path).write_bytes(content)

    return change


def lack(path, name):
    return lambda root: edited(root / path, root / path, lack=name)


def add(path, **tensors):
    return lambda root: edited(root / path, root / path, add=tensors.items())


def configure(path, **settings):
    return put(path, lambda content: json.dumps(json.loads(content) | settings).encode())


def index(**changes):
    return configure("model_index.json", **changes)


def steps(*changes):
    return lambda root: [change(root) for change in changes]


def inpainting(root):
    configure("unet/config.json", in_channels=9)(root)
    kernel = load_file(root / UNET)["conv_in.weight"]
    add(UNET, **{"conv_in.weight": kernel.new_zeros(kernel.shape[0], 9, *kernel.shape[2:])})(root)


def foreign(name, **changes):
    """Make the index of another family, without the weights."""
    return steps(index(_class_name=name, **changes), remove("unet"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"
CONTENTS = {
    "is a Git LFS pointer": LFS,
    "is empty": b"",
    "is damaged, half downloaded": lambda whole: whole[: len(whole) // 2],
    "is a web page": b"<!DOCTYPE html><html></html>",
    "is a GGUF file": b"GGUF\x03\0\0\0\0\0\0\0",
    "is a pickled checkpoint": b"PK\x03\x04\0\0\0\0\0\0\0\0",
}
CLIP2 = ["transformers", "CLIPTextModelWithProjection"]
T5 = ["transformers", "T5EncoderModel"]
SCHEDULER = "scheduler/scheduler_config.json"
COUNTS = [
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "1000000000 in it is larger"),
    ("unet/config.json", {"block_out_channels": [10**9] * 4}, "1000000000 in it is larger"),
    ("unet/config.json", {"layers_per_block": 10**6}, "asks for more than 10,000 tensors"),
    ("unet/config.json", {"sample_size": 10**6}, "latents of size 1000000"),
    ("unet/config.json", {"sample_size": "16"}, "latents of size '16'"),
    ("vae/config.json", {"layers_per_block": 10**9}, "1000000000 in it is larger"),
    ("vae/config.json", {"scaling_factor": 0}, "scales its latents by 0"),
    ("vae/config.json", {"scaling_factor": "0.18"}, "scales its latents by '0.18'"),
    (SCHEDULER, {"num_train_timesteps": 10**8}, "in it is larger"),
]
PARTS = ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "unet/config.json", SCHEDULER]
FOLDERS = [
    *((put(part, x), f"{part} {words}") for words, x in CONTENTS.items() for part in (UNET, TEXT)),
    *((remove(part), rf"lacks (the folder )?{Path(part).name}\.") for part in PARTS),
    *(
        # diffusers and transformers would leave them random.
        (lack(part, name), f"{Path(part).parent} are incomplete: they lack .*{name}")
        for part, name in [
            (UNET, "mid_block.resnets.0.norm1.bias"),
            (VAE, "decoder.conv_in.bias"),
            (TEXT, "encoder.layers.0.layer_norm1.bias"),
        ]
    ),
    *((configure(file, **settings), words) for file, settings, words in COUNTS),
    (
        steps(remove(UNET), put("unet/diffusion_pytorch_model.bin", b"pickle")),
        r"no \.safetensors weights, only diffusion_pytorch_mod",
    ),
    (
        steps(remove("tokenizer"), lambda root: (root / "tokenizer").mkdir()),
        "tokenizer lacks vocab.json",
    ),
    (
        steps(
            remove("tokenizer"),
            lambda root: (root / "tokenizer").mkdir(),
            put("tokenizer/vocab.json", b"{}"),
        ),
        "tokenizer lacks merges.txt",
    ),
    (put("model_index.json", b"{"), "cannot be read"),
    (put("model_index.json", b"[]"), "not a JSON object"),
    (remove("model_index.json"), r"no model_index\.json"),
    (steps(remove(UNET), lambda root: os.mkfifo(root / UNET)), "a pipe or a socket"),
    (add(UNET, **{"conv_in.weight": torch.zeros(3)}), "expected shape"),
    (add(UNET, scaled_fp8=torch.ones(())), "quantised weights with scales .*scaled_fp8"),
    (add(UNET, **{"conv_in.bias": torch.ones(2).int()}), r"weights of type I32 \(conv_in.bias\)"),
    (inpainting, "takes 9 channels"),
    (
        foreign("RefinerPipeline", text_encoder=[None, None], text_encoder_2=CLIP2),
        "RefinerPipeline.*second text encoder alone",
    ),
    (
        foreign("HybridPipeline", text_encoder_2=T5),
        "HybridPipeline.*text_encoder_2 is T5EncoderModel instead of CLIPTextModelWithProjection",
    ),
    (
        foreign("StableDiffusion3Pipeline", transformer=["diffusers", "SD3Transformer2DModel"]),
        "StableDiffusion3Pipeline.*SD3Transformer2DModel, not with a U-Net",
    ),
    (foreign("DiTPipeline", unet=None), "DiTPipeline.*unet is missing instead of UNet2DCond"),
    (foreign("IFPipeline", text_encoder=T5), "IFPipeline.*text_encoder is T5EncoderModel"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FOLDERS, ids=[words for _, words in FOLDERS])
def test_a_folder_that_cannot_be_used_is_refused(folder, change, words):
    change(folder)
    with pytest.raises(ModelError, match=words) as raised:
        load_pipeline(folder)
    assert "low_cpu_mem_usage" not in str(raised.value)


NAMED = {
    "SDXL refiner": ["conditioner.embedders.0.x", SDXL[0]],
    "SD 3 family, which denoises with a transformer": ["joint_blocks.0.x_block.attn.qkv.weight"],
    "Flux family, which denoises with a transformer": ["double_blocks.0.x", "single_blocks.0.x"],
    "a LoRA, an embedding, one part": ["lora_unet_down_blocks_0.lora_up.weight"],
    "without its text encoder": [SDXL[0]],
    "SDXL without its first text encoder": [SDXL[0], SDXL[2]],
    "SDXL without its second text encoder": SDXL[:2],
}
LACKING = {
    "middle_block.1": "UNet2DConditionModel lacks mid_block.attentions.0.norm.bias",
    "output_blocks.3.0.in_layers.0": "lacks",
    "first_stage_model.decoder.conv_out": "AutoencoderKL lacks decoder.conv_out.bias",
    "layers.0.layer_norm1": "CLIPTextModel lacks .*layers.0.layer_norm1.bias",
    "first_stage_model": "without its VAE: give one .*--vae",
    "cond_stage_model": "without its text encoder",
}
SCALES = ["scaled_fp8", "model.diffusion_model.out.2.scale_weight", "conv_out.weight_scale"]
BIAS = "model.diffusion_model.out.2.bias"
KINDS = [torch.int8, torch.int32, torch.bool, torch.complex64]
# The length of a damaged header can begin like another kind of file.
LENGTHS = [b"\x80\0\0\0\0\0\0\0", b"<\0\0\0\0\0\0\0", b"PK\0\0\0\0\0\0"]
SINGLE = [
    *((put("a.safetensors", content), f"a.safetensors {x}") for x, content in CONTENTS.items()),
    *((put("a.safetensors", length + b'{"a":'), "damaged, half downl") for length in LENGTHS),
    *((lack("a.safetensors", name), words) for name, words in LACKING.items()),
    *((add("a.safetensors", **{x: torch.ones(())}), f"with scales .*{x}") for x in SCALES),
    *(
        (add("a.safetensors", **{BIAS: torch.ones(4).to(kind)}), rf"of type \w+ \({BIAS}\)")
        for kind in KINDS
    ),
    *(
        (lambda root, names=names: save_file(
            {name: torch.zeros(2, 2) for name in names}, root / "a.safetensors"
        ), words)
        for words, names in NAMED.items()
    ),
    *(
        (configure(f"model/{file}", **settings), words)
        for file, settings, words in COUNTS
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), SINGLE, ids=[words for _, words in SINGLE])
def test_a_single_file_that_cannot_be_used_is_refused(sd15_file, folder, change, words):
    file = folder.parent / "a.safetensors"
    shutil.copy(sd15_file, file)
    change(folder.parent)
    with pytest.raises(ModelError, match=words) as raised:
        load_pipeline(file, config=folder)
    assert "meta tensor" not in str(raised.value)


def test_arguments_that_do_not_fit_are_refused(sd15_folder, sd15_file, sdxl_file, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    for arguments, words in [
        ({"model": "nobody/no-such-model"}, "neither a folder nor a file"),
        ({"model": tmp_path / "missing.safetensors"}, "no model file"),
        ({"model": tmp_path / "model.ckpt"}, "pickled checkpoints are not loaded"),
        ({"model": sd15_file, "config": sdxl_file[1]}, "is not a model of SDXL"),
        ({"model": sd15_folder, "config": sd15_folder}, "config is for a single"),
        ({"model": sd15_file, "variant": "fp16"}, "has no variants"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_pipeline(**arguments)


def test_infinity_in_a_scheduler_is_read(folder):
    configure(SCHEDULER, lambda_min_clipped=float("-inf"))(folder)
    assert load_pipeline(folder, device="cpu").scheduler is not None


def test_a_controlnet_that_cannot_be_used_is_refused(sd15_pipeline, tmp_path):
    make_controlnet(sd15_pipeline.unet).save_pretrained(tmp_path)
    assert load_controlnet(tmp_path, sd15_pipeline) is not None
    name = "diffusion_pytorch_model.safetensors"
    for change, words in (
        (lack(name, "mid_block.resnets.0"), "incomplete: they lack mid_block.resnets.0.conv1.bias"),
        (put(name, LFS), "Git LFS pointer"),
        (configure("config.json", layers_per_block=10**9), "in it is larger"),
    ):
        change(tmp_path)
        with pytest.raises(ModelError, match=words):
            load_controlnet(tmp_path, sd15_pipeline)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        load_controlnet(tmp_path / name, sd15_pipeline)


# Hostile folders: nothing of theirs is run.


class Opened:
    """A class whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return (open, (str(self._mark), "w"))


def own_part(name):
    def change(root):
        found = json.loads((root / "model_index.json").read_text()).get(name, [None, None])
        (root / name).mkdir(exist_ok=True)
        shutil.copy(root / "evil.py", root / name / "evil.py")
        index(**{name: ["evil", found[1] or "Evil"]})(root)

    return change


def auto_map(root):
    classes = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"}
    for part, file in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
        configure(f"{part}/{file}", auto_map=classes)(root)
        shutil.copy(root / "evil.py", root / part / "evil.py")


def pickles(root):
    content = pickle.dumps(Opened(root / "mark"))
    remove(UNET)(root)
    remove(TEXT)(root)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (root / name).write_bytes(content)


def pickled_shard(root):
    (root / "unet" / "evil.bin").write_bytes(pickle.dumps(Opened(root / "mark")))
    names = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "evil.bin"}})
    (root / f"{UNET}.index.json").write_text(names)


HOSTILE = {
    "a pipeline class": index(_class_name=["evil", "Evil"]),
    "AutoTokenizer": index(tokenizer=["transformers", "AutoTokenizer"]),
    "auto_map": auto_map,
    "pickles": pickles,
    "a pickled shard": pickled_shard,
}
OWN = ("unet", "text_encoder", "scheduler", "tokenizer", "extra", "safety_checker")
HOSTILE |= {f"its own {name}": own_part(name) for name in OWN}
AS_CONFIG = ("a pipeline class", "its own scheduler", "its own extra")


@pytest.mark.parametrize(
    ("kind", "single"),
    [*((kind, False) for kind in HOSTILE), *((kind, True) for kind in AS_CONFIG)],
)
def test_no_code_of_a_folder_is_run(folder, sd15_file, monkeypatch, kind, single):
    mark = folder / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    HOSTILE[kind](folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with contextlib.suppress(ModelError):
        load_pipeline(sd15_file if single else folder, config=folder if single else None)
    assert not mark.exists() and "evil" not in sys.modules
