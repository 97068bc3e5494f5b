"""The commands that draw: sizes, ControlNets, images to change, swapped keys and values."""

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
PICTURE = str(bundled_subject_image())


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(None, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def subject(pipe, tmp_path_factory) -> str:
    """The file of a tied one-stage subject beside its class word."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    row = table[pipe.tokenizer.convert_tokens_to_ids("creature</w>")]
    tokens = row + row.std() * torch.randn(
        1, 1, len(row), generator=torch.Generator().manual_seed(0)
    )
    path = tmp_path_factory.mktemp("subject") / "me.safetensors"
    Subject("<me>", "creature", [tokens], [row], base_model="bundled").save(path)
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


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def run(tmp_path, name: str, *arguments: str) -> np.ndarray:
    """The one image that `generate` leaves for these arguments."""
    folder = tmp_path / name
    command = ["generate", *arguments, "-n", "1", "-o", str(folder)]
    assert main(command if "--steps" in command else [*command, *SHORT]) == 0
    return pixels(folder / "00000.png")


def test_width_and_height(subject, tmp_path):
    drawn = run(tmp_path, "a", "a <me>", "-s", subject, "--width", "72", "--height", "40")
    assert drawn.shape == (40, 72, 3)
    for side, shape in (("--width", (48, 96, 3)), ("--height", (96, 48, 3))):
        assert run(tmp_path, side, "a creature", side, "96").shape == shape
    file = tmp_path / "maps.png"
    command = ["maps", "a <me>", "-s", subject, "-w", "<me>", "-o", str(file), *SHORT]
    assert main([*command, "--width", "96", "--height", "48", "-n", "2"]) == 0
    white = (pixels(file) == 255).all(-1)
    rows, columns = (~white).any(1), (~white[:140, :270]).any(0)
    # Two rows of panels, each image fitted into 256 pixels at its own proportions.
    assert columns.sum() == 256 and rows.sum() >= 2 * 128


def test_a_picture_to_change_is_kept_in_part(tmp_path):
    source = np.asarray(Image.open(PICTURE).convert("RGB").resize((48, 48))).astype(int)
    prompt = ["a photo of a creature", "--image", PICTURE, "--width", "48", "--height", "48"]
    prompt += ["--steps", "8"]
    close = run(tmp_path, "close", *prompt, "--strength", "0.25")
    far = run(tmp_path, "far", *prompt, "--strength", "1")
    assert close.shape == (48, 48, 3)
    assert abs(close - source).mean() < 0.6 * abs(far - source).mean()
    size = run(tmp_path, "size", "a creature", "--image", PICTURE, "--strength", "0.5")
    assert size.shape == (192, 192, 3)


def test_a_mask_says_what_to_change(sd15_folder, tmp_path):
    # What is transparent is not to change, whatever its colour.
    mask = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (64, 0, 128, 128))
    mask.save(tmp_path / "mask.png")
    # diffusers inpaints with four latent channels, which the bundled model has not.
    options = ["-m", str(sd15_folder), "--image", PICTURE, "--mask", str(tmp_path / "mask.png")]
    options += ["--width", "128", "--height", "128", "--strength", "1"]
    cat, dog = (run(tmp_path, word, f"a {word}", *options) for word in ("cat", "dog"))
    assert cat.shape == (128, 128, 3)
    distance = abs(cat - dog)
    assert distance[:, :32].max() <= 1 and distance[:, 96:].max() > 8


def test_controlnets_follow_their_hints(controlnet, subject, tmp_path):
    Image.new("RGB", (48, 48), "black").save(tmp_path / "dark.png")
    Image.new("RGB", (48, 48), "white").save(tmp_path / "light.png")
    prompt = ["a <me>", "-s", subject]
    plain = run(tmp_path, "plain", *prompt)
    hints = {name: ["--controlnet", controlnet, "--control-image", str(tmp_path / f"{name}.png")]
             for name in ("dark", "light")}  # fmt: skip
    dark, light = (run(tmp_path, name, *prompt, *hint) for name, hint in hints.items())
    both = run(tmp_path, "both", *prompt, *hints["dark"], *hints["light"])
    changed = run(
        tmp_path, "changed", *prompt, *hints["light"], "--image", PICTURE, "--strength", "0.9"
    )
    assert dark.shape == plain.shape == both.shape and changed.shape == (192, 192, 3)
    for one, other in ((plain, dark), (dark, light), (light, both)):
        assert abs(one - other).max() > 8


def test_a_controlnet_of_another_width_is_refused(controlnet, sd15_folder, tmp_path, capsys):
    command = ["generate", "a cat", "-m", str(sd15_folder), "--controlnet", controlnet]
    command += ["--control-image", PICTURE, "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert "prompts of width 128, and this pipeline's are 48" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_swap_draws_what_the_library_draws(pipe, tmp_path):
    keys, values = "a photo of a red creature", "a photo of a blue creature"
    command = ["swap", "--key-prompt", keys, "--value-prompt", values, "-n", "2", "--seed", "3"]
    assert main([*command, "-o", str(tmp_path), *SHORT]) == 0
    sampling = SAMPLING | {"steps": 2}
    expected = swap(pipe, key_prompt=keys, value_prompt=values, n=2, seed=3, **sampling)
    for number, picture in enumerate(expected, 3):
        found = pixels(tmp_path / f"{number:05d}.png")
        assert abs(found - np.asarray(picture).astype(int)).max() <= 2
    plain = generate(pipe, keys, seed=3, **sampling)[0]
    assert abs(np.asarray(plain).astype(int) - pixels(tmp_path / "00003.png")).max() > 8


def test_swap_draws_a_sheet_with_subjects(subject, tmp_path):
    file = tmp_path / "swap.png"
    prompts = ["a <me>", "a blue creature", "a red creature"]
    command = ["swap", "--sheet", *prompts, "-s", subject, "-o", str(file)]
    assert main([*command, *SHORT]) == 0
    sheet = pixels(file)
    assert sheet.shape[0] > 3 * 144 and sheet.shape[1] > 3 * 144 and sheet.std() > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["swap"], "--key-prompt and --value-prompt, or --sheet"),
        (["swap", "--key-prompt", "a"], "--key-prompt and --value-prompt"),
        (["swap", "--key-prompt", "a", "--value-prompt", "b", "--sheet", "a", "b"], "--sheet"),
        (["swap", "--sheet", "a"], "two or more"),
        (["swap", "--sheet", "a", "b", "-n", "2"], "leave --number out"),
        (["swap", "--key-prompt", "a", "--value-prompt", "b", "-n", "0"], "--number is 0"),
        (["maps", "a creature", "-w", "creature", "-n", "0"], "--number is 0"),
        (["generate", "a", "--controlnet", "x"], "--control-image 0 times"),
        (["generate", "a", "--mask", "x.png"], "give --image too"),
        (["generate", "a", "--strength", "0.5"], "give --image too"),
        (["generate", "a", "--image", "x.png", "--strength", "2"], "at most 1"),
        (["generate", "a", "--image", PICTURE, "--steps", "1"], "less than one"),
        (["generate", "a", "--width", "0"], "--width is 0"),
        (["generate", "a", "--width", "50"], "--width is 50 pixels: give a multiple of 8"),
        (["generate", "a", "--image", PICTURE, "--height", "100"], "--height is 100 pixels"),
        (["generate", "a", "--steps", "0"], "--steps is 0: give 1 or more"),
        (["generate", "a", "--steps", "1001"], "trained on 1000"),
        (["generate", "a", "--guidance", "nan"], "a finite guidance, but it is nan"),
        (["generate", "a", "--guidance", "inf"], "a finite guidance, but it is inf"),
        (["generate", "a", "--seed", "-1"], "4 from -1 on are not all there"),
        (["generate", "a", "--seed", str(2**63 - 3)], "are not all there"),
        (["generate", "a", "--image", PICTURE, "--mask", PICTURE], "latents of 8 channels"),
        (["generate", "a", "--image", "missing.png"], "missing.png"),
        (["generate", "a", "--controlnet", "no/such", "--control-image", PICTURE], "no/such"),
        (["generate", "a", "--controlnet", PICTURE, "--control-image", PICTURE], "pickled"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sefi-fast {arguments[0]}:") and words in message
    assert list(tmp_path.iterdir()) == []


def test_every_subject_given_must_stand_in_a_prompt(subject, tmp_path, capsys):
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
def test_a_subject_that_was_forgotten_is_told(subject, command, tmp_path, monkeypatch, capsys):
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
    pair = ["-s", subject, "-s", f"<you>={other}"]
    both = run(tmp_path, "both", "a <me> and a <you>", *pair)
    assert np.abs(both - run(tmp_path, "one", "a <me> and a <me>", "-s", subject)).max() <= 2
    assert main(["generate", "a <me>", *pair, *out]) == 1
    assert "does not name the subject <you>" in capsys.readouterr().err


def test_a_model_that_the_subject_file_names_is_told_so(subject, tmp_path, capsys):
    moved = Subject.load(subject)
    moved.settings["model"] = "other_model.safetensors"
    moved.save(tmp_path / "moved.safetensors")
    command = ["generate", "a <me>", "-s", str(tmp_path / "moved.safetensors")]
    told = f"(the model that {tmp_path / 'moved.safetensors'} names; give --model)"
    assert main(command) == 1
    assert told in capsys.readouterr().err
    assert main([*command, "-m", "other_model.safetensors"]) == 1
    assert told not in capsys.readouterr().err


def test_regions_have_prompts_of_their_own(pipe, subject, tmp_path, capsys):
    prompt, whole = "a photo of a creature", "0,0,1,1"
    expected = run(tmp_path, "a", "a <me>", "-s", subject)
    drawn = run(tmp_path, "b", prompt, "-s", subject, "--region", "a <me>", whole)
    assert np.abs(drawn - expected).max() <= 1
    half = run(tmp_path, "c", prompt, "-s", subject, "-r", "a <me>", "0,0,0.5,1")
    assert np.abs(half - expected).max() > 4
    for box, words in (("0,0,1", "must be four numbers"), ("0,0,1,2", "must lie within")):
        assert main(["generate", prompt, "-r", "a creature", box, *SHORT]) == 1
        assert words in capsys.readouterr().err
