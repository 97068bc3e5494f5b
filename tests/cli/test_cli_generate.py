"""`generate`, `maps` and `swap`: sizes, ControlNets, images to change, subjects, regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from sefi_fast.cli import main
from sefi_fast.pipelines import generate, load_pipeline, swap
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import SAMPLING, bundled_subject_image

SHORT = ["--steps", "2"]
IMAGE = str(bundled_subject_image())


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(None, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def subject(pipe, tmp_path_factory) -> str:
    """The file of a tied one-stage subject near its class word."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    row = table[pipe.tokenizer.convert_tokens_to_ids("creature</w>")]
    noise = torch.randn(1, 1, len(row), generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("subject") / "me.safetensors"
    Subject("<me>", "creature", [row + row.std() * noise], [row], "bundled").save(path)
    return str(path)


@pytest.fixture(scope="module")
def controlnet(pipe, tmp_path_factory) -> str:
    """The folder of a ControlNet for the bundled model whose random weights act."""
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 32))
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.5)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=2.0)
    folder = tmp_path_factory.mktemp("controlnet")
    net.save_pretrained(folder)
    return str(folder)


def pixels(image) -> np.ndarray:
    image = image if isinstance(image, Image.Image) else Image.open(image)
    return np.asarray(image.convert("RGB")).astype(int)


def run(tmp_path, name: str, *arguments: str) -> np.ndarray:
    """Return the one image that `generate` saves for these arguments."""
    folder = tmp_path / name
    command = ["generate", *arguments, "-n", "1", "-o", str(folder)]
    assert main(command if "--steps" in command else [*command, *SHORT]) == 0
    return pixels(folder / "00000.png")


def test_each_image_has_the_number_of_its_seed(subject, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a photo of a <me> on the beach", "-s", subject, *SHORT]
    assert main([*command, "-n", "2", "--seed", "5"]) == 0
    assert main([*command, "-n", "1", "--seed", "6", "-o", "b"]) == 0
    names = [str(Path("images", name)) for name in ("00005.png", "00006.png")]
    assert capsys.readouterr().out.splitlines()[:2] == names
    first, second, alone = (pixels(path) for path in (*names, "b/00006.png"))
    assert abs(second - alone).max() <= 2 and abs(first - second).max() > 20


def test_width_and_height(subject, tmp_path):
    image = run(tmp_path, "a", "a <me>", "-s", subject, "--width", "72", "--height", "40")
    assert image.shape == (40, 72, 3)
    for side, shape in (("--width", (48, 96, 3)), ("--height", (96, 48, 3))):
        assert run(tmp_path, side, "a creature", side, "96").shape == shape


def test_maps_has_a_row_for_each_image_and_a_panel_for_each_word(subject, tmp_path):
    file = tmp_path / "new" / "maps.png"
    command = ["maps", "a <me> with a hat", "-s", subject, "-o", str(file), *SHORT]
    assert main([*command, "-w", "<me>", "hat", "--width", "96", "--height", "48", "-n", "2"]) == 0
    white = (pixels(file) == 255).all(-1)
    rows, columns = (~white).any(1), (~white[:140, :270]).any(0)
    # Each image is fitted into 256 pixels at its own proportions.
    assert columns.sum() == 256 and rows.sum() >= 2 * 128
    assert white.shape[1] > 3 * 256


def test_an_image_to_change_is_kept_in_part(tmp_path):
    source = pixels(Image.open(IMAGE).convert("RGB").resize((48, 48)))
    options = ["a photo of a creature", "--image", IMAGE, "--width", "48", "--height", "48"]
    options += ["--steps", "8"]
    close = run(tmp_path, "close", *options, "--strength", "0.25")
    far = run(tmp_path, "far", *options, "--strength", "1")
    assert close.shape == (48, 48, 3)
    assert abs(close - source).mean() < 0.6 * abs(far - source).mean()
    size = run(tmp_path, "size", "a creature", "--image", IMAGE, "--strength", "0.5")
    assert size.shape == (192, 192, 3)


def test_a_mask_selects_the_part_to_change(sd15_folder, tmp_path):
    # A transparent part is not to change, whatever its color.
    mask = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (64, 0, 128, 128))
    mask.save(tmp_path / "mask.png")
    # diffusers inpaints with four latent channels, which the bundled model does not have.
    options = ["-m", str(sd15_folder), "--image", IMAGE, "--mask", str(tmp_path / "mask.png")]
    options += ["--width", "128", "--height", "128", "--strength", "1"]
    cat, dog = (run(tmp_path, word, f"a {word}", *options) for word in ("cat", "dog"))
    assert cat.shape == (128, 128, 3)
    distance = abs(cat - dog)
    assert distance[:, :32].max() <= 1 and distance[:, 96:].max() > 8


def test_controlnets_follow_their_hints(controlnet, subject, sd15_folder, tmp_path, capsys):
    hints = {}
    for name, color in (("dark", "black"), ("light", "white")):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{name}.png")
        hints[name] = ["--controlnet", controlnet, "--control-image", str(tmp_path / f"{name}.png")]
    prompt = ["a <me>", "-s", subject]
    plain = run(tmp_path, "plain", *prompt)
    dark, light = (run(tmp_path, name, *prompt, *hint) for name, hint in hints.items())
    both = run(tmp_path, "both", *prompt, *hints["dark"], *hints["light"])
    changing = ["--image", IMAGE, "--strength", "0.9"]
    changed = run(tmp_path, "changed", *prompt, *hints["light"], *changing)
    assert dark.shape == plain.shape == both.shape and changed.shape == (192, 192, 3)
    for one, other in ((plain, dark), (dark, light), (light, both)):
        assert abs(one - other).max() > 8
    command = ["generate", "a cat", "-m", str(sd15_folder), *hints["dark"]]
    assert main([*command, "-o", str(tmp_path / "out")]) == 1
    assert "prompts of width 128, and this pipeline's are 48" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_swap_saves_the_images_of_the_library(pipe, subject, tmp_path):
    keys, values = "a photo of a red creature", "a photo of a blue creature"
    command = ["swap", "--key-prompt", keys, "--value-prompt", values, "-n", "2", "--seed", "3"]
    assert main([*command, "-o", str(tmp_path), *SHORT]) == 0
    sampling = SAMPLING | {"steps": 2}
    expected = swap(pipe, key_prompt=keys, value_prompt=values, n=2, seed=3, **sampling)
    for number, image in enumerate(expected, 3):
        assert abs(pixels(tmp_path / f"{number:05d}.png") - pixels(image)).max() <= 2
    plain = generate(pipe, keys, seed=3, **sampling)[0]
    assert abs(pixels(plain) - pixels(tmp_path / "00003.png")).max() > 8
    file = str(tmp_path / "swap.png")
    prompts = ["a <me>", "a blue creature", "a red creature"]
    assert main(["swap", "--sheet", *prompts, "-s", subject, "-o", file, *SHORT]) == 0
    sheet = pixels(file)
    assert sheet.shape[0] > 3 * 144 and sheet.shape[1] > 3 * 144 and sheet.std() > 5


def test_every_subject_must_be_in_a_prompt(subject, tmp_path, capsys):
    other = Subject.load(subject)
    other.placeholder = "<other>"
    other.save(tmp_path / "other.safetensors")
    files = ["-s", subject, "-s", str(tmp_path / "other.safetensors")]
    assert main(["generate", "a <me>", *files, "-o", str(tmp_path / "out")]) == 1
    assert "does not name the subject <other>" in capsys.readouterr().err
    pair = ["--key-prompt", "a <me>", "--value-prompt", "a <other>"]
    assert main(["swap", *pair, *files, *SHORT, "-o", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a <me> with <you>"],
        ["generate", "a <me>", "--negative-prompt", "a <you>"],
        ["generate", "a <me>", "--region", "a <you>", "0,0,1,1"],
        ["maps", "a <me> with <you>", "--words", "<me>"],
        ["swap", "--key-prompt", "a <me>", "--value-prompt", "a <you>"],
        ["swap", "--sheet", "a <me>", "a <you>"],
    ],
)
def test_a_placeholder_without_its_subject_is_refused(
    subject, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "-s", subject, *SHORT]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sefi-fast {command[0]}: the prompt names <you>, but no subject")
    assert "(given: '<me>'): add the file of each with -s FILE, or -s '<you>=FILE'" in message
    assert list(tmp_path.iterdir()) == []


def test_two_files_of_one_placeholder_take_another_name_for_a_call(subject, tmp_path, capsys):
    other = tmp_path / "a=b.safetensors"
    other.write_bytes(Path(subject).read_bytes())
    out = ["-o", str(tmp_path / "out")]
    assert main(["generate", "a <me>", "-s", subject, "-s", str(other), *out]) == 1
    message = capsys.readouterr().err
    assert f"{subject} and {other} both have the placeholder '<me>'" in message
    assert f"-s '<other>={other}'" in message
    one = run(tmp_path, "one", "a <me> and a <me>", "-s", subject)
    for second in (other, subject):
        pair = ["-s", subject, "-s", f"<you>={second}"]
        assert np.abs(run(tmp_path, "two", "a <me> and a <you>", *pair) - one).max() <= 2


def test_a_missing_model_that_the_subject_names_is_reported(subject, tmp_path, capsys):
    moved = Subject.load(subject)
    moved.settings["model"] = "other_model.safetensors"
    moved.save(tmp_path / "moved.safetensors")
    command = ["generate", "a <me>", "-s", str(tmp_path / "moved.safetensors")]
    words = f"(the model that {tmp_path / 'moved.safetensors'} names; give --model)"
    assert main(command) == 1
    assert words in capsys.readouterr().err
    assert main([*command, "-m", "other_model.safetensors"]) == 1
    assert words not in capsys.readouterr().err
    moved.settings["model"] = 3
    moved.save(tmp_path / "moved.safetensors")
    assert main(command) == 1
    assert "has 3 as its model" in capsys.readouterr().err


def test_regions_have_their_own_prompts(subject, tmp_path, capsys):
    prompt = "a photo of a creature"
    expected = run(tmp_path, "a", "a <me>", "-s", subject)
    whole = run(tmp_path, "b", prompt, "-s", subject, "--region", "a <me>", "0,0,1,1")
    assert np.abs(whole - expected).max() <= 1
    half = run(tmp_path, "c", prompt, "-s", subject, "-r", "a <me>", "0,0,0.5,1")
    assert np.abs(half - expected).max() > 4
    assert main(["generate", prompt, "-r", "a creature", "0,0,1,2", *SHORT]) == 1
    assert "must lie within" in capsys.readouterr().err
