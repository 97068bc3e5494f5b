"""Files of models that are incomplete, hostile or marked, another VAE, and folders of hub ids."""

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
from safetensors.torch import load_file, save_file

from sefi_fast.errors import ModelError, PathError
from sefi_fast.pipelines import load_pipeline
from sefi_fast.pipelines.controlnet import load_controlnet

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(sd15_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sd15_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def sd15_file(sd15_folder, tmp_path_factory) -> Path:
    """The folder's model as one file."""
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


def without(names: str, file: Path, to: Path) -> Path:
    """The file without the tensors whose names hold these words."""
    save_file({n: t for n, t in load_file(file).items() if names not in n}, to, {"format": "pt"})
    return to


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"
CONTENTS = {
    "is a Git LFS pointer": lambda whole: LFS,
    "is empty": lambda whole: b"",
    "is damaged, half downloaded": lambda whole: whole[: len(whole) // 2],
    "is a web page": lambda whole: b"<!DOCTYPE html><html></html>",
    "is a GGUF file": lambda whole: b"GGUF\x03\0\0\0\0\0\0\0",
    "is a pickled checkpoint": lambda whole: b"PK\x03\x04\0\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("words", CONTENTS)
@pytest.mark.parametrize("part", [UNET, TEXT, None])
def test_c2_files_of_another_content_are_named_for_what_they_are(folder, sd15_file, words, part):
    if part is None:
        file = folder / "one.safetensors"
        file.write_bytes(CONTENTS[words](sd15_file.read_bytes()))
        with pytest.raises(ModelError, match=f"one.safetensors {words}"):
            load_pipeline(file, config=folder)
        return
    file = folder / part
    file.write_bytes(CONTENTS[words](file.read_bytes()))
    with pytest.raises(ModelError, match=f"{file.parent.name}/{file.name} {words}"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (UNET, "mid_block.resnets.0.norm1.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        (TEXT, "encoder.layers.0.layer_norm1.bias"),
    ],
)
def test_c2_a_folder_whose_weights_lack_tensors_is_told_which(folder, part, name):
    # Left to diffusers and transformers, they would be random.
    without(name, folder / part, folder / part)
    with pytest.raises(ModelError, match=f"{Path(part).parent} are incomplete: they lack .*{name}"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    "missing",
    ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "unet/config.json"]
    + ["scheduler/scheduler_config.json"],
)
def test_c2_a_folder_that_lacks_a_part_is_told_which(folder, missing):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=rf"lacks (the folder )?{Path(missing).name}\."):
        load_pipeline(folder)


def test_c2_a_missing_shard_is_named(folder):
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(weights)}
    for file in names:
        shard = {name: weights[name] for name, place in places.items() if place == file}
        save_file(shard, folder / "unet" / file, {"format": "pt"})
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = load_pipeline(folder, device="cpu").unet.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    (folder / "unet" / names[1]).unlink()
    with pytest.raises(ModelError, match=f"unet lacks {names[1]}"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("middle_block.1", "UNet2DConditionModel lacks mid_block.attentions.0.norm.bias"),
        ("output_blocks.3.0.in_layers.0", "lacks"),
        ("first_stage_model.decoder.conv_out", "AutoencoderKL lacks decoder.conv_out.bias"),
        ("layers.0.layer_norm1", "CLIPTextModel lacks .*layers.0.layer_norm1.bias"),
        ("first_stage_model", "without its VAE: give one .*--vae"),
        ("cond_stage_model", "without its text encoder"),
        ("model.diffusion_model", "no Stable Diffusion checkpoint"),
    ],
)
def test_c2_one_file_that_is_not_whole_is_told_what_it_lacks(
    sd15_file, sd15_folder, tmp_path, names, words
):
    cut = without(names, sd15_file, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match=words) as raised:
        load_pipeline(cut, config=sd15_folder)
    assert "meta tensor" not in str(raised.value)


@pytest.mark.parametrize(
    "scale",
    ["scaled_fp8", "model.diffusion_model.out.2.scale_weight", "conv_out.weight_scale"],
)
def test_c3_files_of_weights_with_scales_are_refused(sd15_file, folder, tmp_path, scale):
    for file in (sd15_file, folder / UNET):
        scaled = {**load_file(file), scale: torch.ones(())}
        save_file(scaled, tmp_path / "one.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=f"quantised weights with scales .*{scale}"):
            load_pipeline(tmp_path / "one.safetensors", config=folder)
    shutil.move(tmp_path / "one.safetensors", folder / UNET)
    with pytest.raises(ModelError, match="quantised weights"):
        load_pipeline(folder)


def test_c2_a_controlnet_that_is_not_whole_is_told_what_it_lacks(sd15_pipeline, tmp_path):
    make_controlnet(sd15_pipeline.unet).save_pretrained(tmp_path)
    assert load_controlnet(tmp_path, sd15_pipeline) is not None
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    without("mid_block.resnets.0", file, file)
    with pytest.raises(ModelError, match="incomplete: they lack mid_block.resnets.0.conv1.bias"):
        load_controlnet(tmp_path, sd15_pipeline)
    file.write_bytes(LFS)
    for source in (tmp_path, file):
        with pytest.raises(ModelError, match="Git LFS pointer"):
            load_controlnet(source, sd15_pipeline)


@pytest.mark.parametrize("part", ["embedders.0.", "embedders.1."])
def test_c2_one_file_of_sdxl_without_a_text_encoder(sdxl_file, tmp_path, part):
    cut = without(part, sdxl_file[0], tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match="text encoder"):
        load_pipeline(cut, config=sdxl_file[1])


def test_c2_a_config_folder_of_another_family_is_told(sd15_file, sdxl_file):
    with pytest.raises(ModelError, match="is not a model of SDXL"):
        load_pipeline(sd15_file, config=sdxl_file[1])


class Opened:
    """Pickled, a class whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return (open, (str(self._mark), "w"))


def _own_class(index, folder, evil, mark):
    index["_class_name"] = ["evil", "Evil"]


def _own_part(name):
    def change(index, folder, evil, mark):
        index[name] = ["evil", index.get(name, [None, "Evil"])[1] or "Evil"]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "evil.py").write_text(evil)

    return change


def _auto_map(index, folder, evil, mark):
    for part, file in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
        values = json.loads((folder / part / file).read_text())
        values["auto_map"] = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"}
        (folder / part / file).write_text(json.dumps(values))
        (folder / part / "evil.py").write_text(evil)


def _auto_tokenizer(index, folder, evil, mark):
    index["tokenizer"] = ["transformers", "AutoTokenizer"]


def _pickles(index, folder, evil, mark):
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        (folder / f"{name}.safetensors").unlink()
    for name in ("unet/diffusion_pytorch_model", "text_encoder/pytorch_model"):
        (folder / f"{name}.bin").write_bytes(pickle.dumps(Opened(mark)))


def _pickled_shard(index, folder, evil, mark):
    (folder / "unet" / "evil.bin").write_bytes(pickle.dumps(Opened(mark)))
    names = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "evil.bin"}})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(names)


HOSTILE = {
    "a pipeline class": _own_class,
    "a U-Net": _own_part("unet"),
    "a text encoder": _own_part("text_encoder"),
    "a scheduler": _own_part("scheduler"),
    "a tokenizer": _own_part("tokenizer"),
    "another part": _own_part("extra"),
    "a safety checker": _own_part("safety_checker"),
    "auto_map": _auto_map,
    "AutoTokenizer": _auto_tokenizer,
    "pickles": _pickles,
    "a pickled shard": _pickled_shard,
}


@pytest.mark.parametrize(
    ("kind", "single"),
    [
        *((kind, False) for kind in HOSTILE),
        ("a pipeline class", True),
        ("a scheduler", True),
        ("another part", True),
    ],
)
def test_c2_nothing_of_a_given_folder_is_run(
    folder, sd15_file, tmp_path, monkeypatch, kind, single
):
    mark = tmp_path / "run"
    evil = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    index = json.loads((folder / "model_index.json").read_text())
    HOSTILE[kind](index, folder, evil, mark)
    (folder / "evil.py").write_text(evil)
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with contextlib.suppress(ModelError):
        load_pipeline(sd15_file if single else folder, config=folder if single else None)
    assert not mark.exists() and "evil" not in sys.modules


ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
VELOCITY = {"prediction_type": "v_prediction"}
MARKS = {
    "v_pred": (["v_pred"], {}, VELOCITY),
    "v_pred and ztsnr": (["v_pred", "ztsnr"], {}, VELOCITY | ZERO),
    "v_pred against its metadata": (["v_pred"], {"modelspec.predict_key": "epsilon"}, VELOCITY),
    "modelspec": ([], {"modelspec.prediction_type": "v"}, VELOCITY),
    "modelspec in diffusers' word": ([], {"modelspec.prediction_type": "v_prediction"}, VELOCITY),
    "ComfyUI": ([], {"modelspec.predict_key": "v"}, VELOCITY),
    "kohya": ([], {"ss_v_parameterization": "True"}, VELOCITY),
    "kohya in small letters": ([], {"ss_v_parameterization": "true"}, VELOCITY),
    "vpred": ([], {"modelspec.prediction_type": "V-Pred"}, VELOCITY),
    "kohya to zero": (["v_pred"], {"ss_zero_terminal_snr": "True"}, VELOCITY | ZERO),
    "768": ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, VELOCITY),
    "512": ([], {"modelspec.architecture": "stable-diffusion-v2-512"}, {}),
    "epsilon": ([], {"modelspec.prediction_type": "epsilon"}, {}),
    "ztsnr alone": (["ztsnr"], {}, {}),
    "nothing": ([], {}, {}),
}  # fmt: skip


SDXL = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "conditioner.embedders.1.model.positional_embedding",
    "first_stage_model.x",
)


@pytest.mark.parametrize("kind", MARKS)
def test_c1_one_file_is_loaded_as_its_marks_say(sdxl_pipeline, tmp_path, monkeypatch, caplog, kind):
    marks, metadata, wanted = MARKS[kind]
    tensors = {name: torch.zeros(2) for name in SDXL} | {name: torch.zeros(0) for name in marks}
    save_file(tensors, tmp_path / "marked.safetensors", metadata)
    take = lambda *_, **__: sdxl_pipeline  # noqa: E731
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.from_single_file", take)
    found = load_pipeline(tmp_path / "marked.safetensors", device="cpu").scheduler.config
    expected = {"prediction_type": "epsilon", "timestep_spacing": "leading"} | wanted
    assert {name: found[name] for name in expected} == expected
    assert found["beta_end"] == 0.012
    assert ("v_prediction" in caplog.text) == bool(wanted)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_c1_one_file_of_velocity_is_trained_on_velocity(sdxl_file, tmp_path, scheduler):
    from sefi_fast.training.noise import NoiseSchedule

    whole, folder = sdxl_file
    tensors = load_file(whole) | {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    save_file(tensors, tmp_path / "marked.safetensors")
    config = shutil.copytree(folder, tmp_path / "config")
    index = json.loads((config / "model_index.json").read_text())
    # PNDM knows no zero terminal SNR.
    index["scheduler"] = ["diffusers", scheduler]
    (config / "model_index.json").write_text(json.dumps(index))
    pipe = load_pipeline(tmp_path / "marked.safetensors", config=config, device="cpu")
    schedule = NoiseSchedule(pipe.scheduler, torch.device("cpu"))
    latents, noise, last = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([999])
    torch.testing.assert_close(schedule.target(latents, noise, last), -latents)
    assert schedule.add_noise(latents, noise, last).abs().max() < 1e-6


def test_c1_a_folder_of_velocity_yields_to_a_file_of_noise(sd15_file, folder, tmp_path, caplog):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(values | {"prediction_type": "v_prediction"}))
    assert (
        load_pipeline(sd15_file, config=folder).scheduler.config.prediction_type == "v_prediction"
    )
    assert "prediction_type" not in caplog.text
    said = {"modelspec.prediction_type": "epsilon"}
    save_file(load_file(sd15_file), tmp_path / "said.safetensors", said)
    pipe = load_pipeline(tmp_path / "said.safetensors", config=folder)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert "prediction_type='epsilon'" in caplog.text


@pytest.mark.parametrize(
    ("marks", "metadata", "words"),
    [
        (["edm_mean", "edm_std"], {}, "edm_mean, edm_std: it was trained with EDM"),
        (["edm_vpred.sigma_max"], {}, "EDM"),
        ([], {"modelspec.prediction_type": "flow"}, "predicts 'flow'"),
    ],
)
def test_c1_one_file_of_another_training_is_refused(sdxl_file, tmp_path, marks, metadata, words):
    tensors = load_file(sdxl_file[0]) | {name: torch.zeros(4) for name in marks}
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ModelError, match=words):
        load_pipeline(tmp_path / "other.safetensors", config=sdxl_file[1])


@pytest.mark.parametrize(("spread", "said"), [(0.01, "epsilon"), (0.2, "v_prediction")])
def test_c1_one_file_of_sd2_without_a_config_is_told_apart(
    tmp_path, monkeypatch, sd15_pipeline, spread, said
):
    from diffusers import StableDiffusionPipeline

    unet = "model.diffusion_model"
    save_file(
        {
            f"{unet}.input_blocks.0.0.weight": torch.zeros(2),
            f"{unet}.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 1024),
            f"{unet}.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([1.0, -1.0])
            * spread,
            "cond_stage_model.x": torch.zeros(2),
            "first_stage_model.x": torch.zeros(2),
        },
        tmp_path / "sd2.safetensors",
    )
    take = lambda *_, **__: sd15_pipeline  # noqa: E731
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", take)
    pipe = load_pipeline(tmp_path / "sd2.safetensors", device="cpu")
    assert pipe.scheduler.config.prediction_type == said


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
    shutil.copy(
        folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "diffusers.safetensors"
    )
    return folder


VAES = ["pipe", "vae", "one.safetensors", "original.safetensors", "diffusers.safetensors"]


@pytest.mark.parametrize(
    ("vae", "single"), [*((vae, False) for vae in VAES), (VAES[1], True), (VAES[3], True)]
)
def test_c2_another_vae(sd15_folder, sd15_file, other_vae, tmp_path, vae, single):
    model, config = sd15_folder, None
    if single:
        model = without("first_stage_model", sd15_file, tmp_path / "no-vae.safetensors")
        config = sd15_folder
    pipe = load_pipeline(model, config=config, vae=other_vae / vae, device="cpu")
    wanted = make_vae(seed=7)
    found = pipe.vae.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
    assert pipe.vae.config.scaling_factor == wanted.config.scaling_factor


def test_c2_a_folder_without_its_vae_takes_another(folder, other_vae, caplog):
    shutil.rmtree(folder / "vae")
    assert load_pipeline(folder, vae=other_vae / "vae", device="cpu").vae is not None


def test_c2_a_vae_of_another_scale_is_told(sd15_folder, tmp_path, caplog):
    make_vae(scaling_factor=0.13025).save_pretrained(tmp_path)
    load_pipeline(sd15_folder, vae=tmp_path, device="cpu")
    assert "scales its latents by 0.13025, and the model's own by 0.18215" in caplog.text


def test_c2_a_vae_that_cannot_be_used_is_told(sd15_folder, other_vae, tmp_path):
    for vae, words in (
        (sd15_folder / UNET, "holds no VAE, but conv_in"),
        (tmp_path / "missing.safetensors", "no model file"),
        (tmp_path / "vae.pt", "pickled checkpoints are not loaded"),
        (tmp_path, "lacks the folder vae"),
        ("nobody/no-such-vae", "the VAE nobody/no-such-vae cannot be loaded"),
        (without("conv_out", other_vae / "diffusers.safetensors", tmp_path / "cut.safetensors"),
         "its AutoencoderKL lacks"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=words):
            load_pipeline(sd15_folder, vae=vae)


def test_c2_a_model_of_the_hub_is_checked_like_a_folder(folder, monkeypatch):
    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda *_, **__: index)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: str(folder))
    assert load_pipeline("some/model", device="cpu").config._name_or_path == "some/model"
    without("conv_out", folder / UNET, folder / UNET)
    with pytest.raises(ModelError, match="unet are incomplete"):
        load_pipeline("some/model")


def test_c2_a_pipe_in_the_weights_place_is_refused_at_once(folder):
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)
    with pytest.raises(ModelError, match="a pipe or a socket"):
        load_pipeline(folder)


def _set(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


COUNTS = [
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "1000000000 in it is larger"),
    ("unet/config.json", {"block_out_channels": [10**9] * 4}, "1000000000 in it is larger"),
    ("unet/config.json", {"layers_per_block": 10**6}, "asks for more than 10,000 tensors"),
    ("unet/config.json", {"sample_size": 10**6}, "latents of size 1000000"),
    ("unet/config.json", {"sample_size": "16"}, "latents of size '16'"),
    ("vae/config.json", {"layers_per_block": 10**9}, "1000000000 in it is larger"),
    ("vae/config.json", {"scaling_factor": 0}, "scales its latents by 0"),
    ("vae/config.json", {"scaling_factor": "0.18"}, "scales its latents by '0.18'"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**8}, "in it is larger"),
]


@pytest.mark.parametrize(("file", "settings", "words"), COUNTS)
@pytest.mark.parametrize("single", [False, True])
def test_g_counts_of_a_models_configuration_have_limits(
    folder, sd15_file, file, settings, words, single
):
    _set(folder / file, **settings)
    with pytest.raises(ModelError, match=words):
        load_pipeline(sd15_file if single else folder, config=folder if single else None)


def test_g_counts_of_a_controlnet_have_limits(sd15_pipeline, tmp_path):
    make_controlnet(sd15_pipeline.unet).save_pretrained(tmp_path)
    _set(tmp_path / "config.json", layers_per_block=10**9)
    with pytest.raises(ModelError, match="in it is larger"):
        load_controlnet(tmp_path, sd15_pipeline)


def test_g_infinity_in_a_scheduler_is_read(folder):
    _set(folder / "scheduler" / "scheduler_config.json", lambda_min_clipped=float("-inf"))
    assert load_pipeline(folder, device="cpu").scheduler is not None


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_c3_weights_that_are_not_real_numbers_are_refused(folder, sd15_file, tmp_path, kind):
    for file, name in ((folder / UNET, "conv_in.bias"), (sd15_file, "diffusion_model.out.2.bias")):
        whole = load_file(file)
        found = {n: t.to(kind) if n.endswith(name) else t for n, t in whole.items()}
        save_file(found, tmp_path / "one.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=rf"weights of type \w+ \(.*{name}\)"):
            load_pipeline(tmp_path / "one.safetensors", config=folder)


@pytest.mark.parametrize("length", [b"\x80\0\0\0\0\0\0\0", b"<\0\0\0\0\0\0\0", b"PK\0\0\0\0\0\0"])
def test_c2_a_damaged_file_is_not_taken_for_another_by_its_length(tmp_path, length):
    path = tmp_path / "one.safetensors"
    path.write_bytes(length + b'{"a":')
    with pytest.raises(ModelError, match="damaged, half downloaded"):
        load_pipeline(path)


def test_c2_a_file_of_other_shapes_is_told_without_advice_that_does_not_work(folder):
    save_file(load_file(folder / UNET) | {"conv_in.weight": torch.zeros(3)}, folder / UNET)
    with pytest.raises(ModelError, match=r"expected shape") as raised:
        load_pipeline(folder)
    assert "low_cpu_mem_usage" not in str(raised.value)


def test_c2_the_home_folder_of_nobody_is_told(sd15_folder):
    with pytest.raises(PathError, match="home folder that is not there"):
        load_pipeline(sd15_folder, vae="~nobody-of-that-name/vae")


def test_c2_a_vae_of_the_hub_that_is_not_whole_is_told(sd15_folder, other_vae, monkeypatch):
    from diffusers import AutoencoderKL

    found = (make_vae(), {"missing_keys": ["encoder.conv_in.bias"]})
    take = lambda *_, output_loading_info=False, **__: found[: 2 if output_loading_info else 1]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "from_pretrained", take)
        with pytest.raises(ModelError, match="of the VAE some/vae are incomplete: they lack enc"):
            load_pipeline(sd15_folder, vae="some/vae")
