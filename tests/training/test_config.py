"""Settings, their presets and their files: what is saved is loaded, each mistake is one error."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sefi_fast.errors import ConfigError
from sefi_fast.training import TrainConfig
from sefi_fast.training.config import PRESETS, read_settings, write_settings

OUT_OF_RANGE = {
    "steps": (0, -5), "batch_size": (0,), "stages": (0,), "num_vectors": (0, 33),
    "seed": (-1, 2**64), "resolution": (0,), "validation_every": (0,), "validation_steps": (0,),
    "learning_rate": (0.0, float("nan"), float("inf")), "weight_lambda": (-0.1, float("nan")),
    "ema_decay": (0, 1.0), "snr_gamma": (0,), "max_seconds": (0,), "validation_guidance": (-1,),
    "schedule": ("polynomial",), "module": ("mlp",), "crop": ("middle",), "precision": ("fp8",),
    "self_attention": ("flash", ["sdpa"]), "attention_loss": ("masks",), "capture": ("yes",),
    "templates": ((), ("a photo of a cat",), ("a photo of {}", "a photo")),
    "validation_prompts": (("in the snow",),), "scene": ("  ", "behind {}"),
    "loss_resolutions": ((),), "trackers": ((" ",),),
}  # fmt: skip
WRONG_TYPES = {
    "steps": (2.0, True, "300"), "batch_size": (None,), "learning_rate": ("fast", True),
    "flip": (1,), "split": ("yes",), "reference_grad": (None,),
    "templates": ("a photo of a {}", (1, 2)), "validation_prompts": ("a {}",),
    "attention_backend": (3,), "device": (0,), "scene": (7,), "loss_resolutions": (16, (16.0,)),
    "trackers": ("tensorboard", (3,)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (name, value, error)
        for table, error in ((OUT_OF_RANGE, ValueError), (WRONG_TYPES, TypeError))
        for name, values in table.items()
        for value in values
    ],
)
def test_values_out_of_range_and_wrong_types_are_named(name, value, error):
    with pytest.raises(error, match=name):
        TrainConfig(**{name: value})


def test_overrides_win_over_a_config_and_a_preset():
    config = TrainConfig(steps=7, seed=3)
    changed = TrainConfig.from_overrides(config, {"steps": 9, "templates": ["a {}"]})
    assert (changed.steps, changed.seed, changed.templates) == (9, 3, ("a {}",))
    assert TrainConfig.preset("sefi") == TrainConfig.from_overrides() == TrainConfig()
    for name, preset in PRESETS.items():
        changed = TrainConfig.preset(name, seed=4)
        assert changed == TrainConfig(**{**preset, "seed": 4})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TrainConfig.from_overrides(None, {"stepps": 3}), TypeError, r"stepps \(did you"),
        (lambda: TrainConfig.from_overrides({"steps": 3}, {}), TypeError, "TrainConfig, got dict"),
        (lambda: TrainConfig.preset("sifi"), ValueError, "'prospect', got 'sifi'"),
        (lambda: TrainConfig.preset("sefi", stage=1), TypeError, "no setting stage"),
    ],
)
def test_mistakes_in_overrides_and_presets_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_scene_follows_every_template():
    config = TrainConfig(templates=("a {}", "one {}"), scene="in the forest")
    assert config.sentences() == ("a {} in the forest", "one {} in the forest")
    assert TrainConfig(templates=("a {}",)).sentences() == ("a {}",)


# Whole numbers stand in the place of others.
UNUSUAL = TrainConfig(
    steps=7, learning_rate=10**40, snr_gamma=10**300, loss_resolutions=[8, 16], max_seconds=7,
    templates=("a {} é", "yes: {}"), ema_decay=1e-7, trackers=("tensorboard",), flip=False,
)  # fmt: skip


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "run.json", "run"])
@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL], ids=["default", "unusual"])
def test_saved_settings_are_loaded(tmp_path, name, config):
    path = tmp_path / "new" / name
    config.save(path)
    assert TrainConfig.load(path) == config
    assert os.listdir(path.parent) == [name]


def test_a_hand_written_file_may_leave_things_out_and_write_numbers_its_way(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# mine\nlearning_rate: 1e-3\nweight_lambda: 0\nflip: no\nimage: me.jpg\n")
    config = TrainConfig.load(path)
    assert (config.learning_rate, config.weight_lambda, config.flip) == (1e-3, 0, False)
    assert config.steps == TrainConfig().steps
    assert read_settings(path).run == {"image": "me.jpg"}


def test_fields_win_over_the_files_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stages: 4\npreset: prospect\n")
    assert TrainConfig.load(path) == TrainConfig.preset("prospect", stages=4)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("step: 3", ValueError, r"unknown settings: step \(did you mean steps\?\); the settings"),
        ("imagge: x\nzzz: 1", ValueError, r"imagge \(did you mean image\?\), zzz; the"),
        ("steps: many", TypeError, "steps must be an integer, got 'many'"),
        ("learning_rate: fast", TypeError, "learning_rate must be a number, got 'fast'"),
        ("image: 3", ValueError, "image must be a string, got 3"),
        ("preset: best", ValueError, "preset must be one of 'sefi', 'likeness'"),
        ("- steps", ValueError, "line by line, as 'steps: 600', got list"),
        ("a: [1", ValueError, "is not YAML"),
        # Aliases of 300 bytes that stand for 9^8 values.
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefghi"))
            + "steps: *i",
            ConfigError,
            "anchors, aliases and tags",
        ),
        ("steps: " + "[" * 900 + "]" * 900, ConfigError, "nested more than 8 levels"),
        ("[" * 500_000, ConfigError, "nested more than 8 levels"),
        ("templates: [" + "'{}'," * 11_000 + "]", ConfigError, "more than 10000 values"),
        ("templates: [" + "'{}'," * 1_001 + "]", ConfigError, "at most 1,000 texts"),
        ("x" * 3_000_000, OSError, "at most 2,097,152 are read"),
        ("".join(f"k{n}: 1\n" for n in range(2000)), ConfigError, "k1005 and 1990 more; the"),
        ("<<: {steps: 3}", ConfigError, "unknown settings: <<"),
        ("steps: 1\n---\nsteps: 2", ConfigError, "expected a single document"),
        ("steps: 1\nsteps: 2", ConfigError, "'steps' stands in it twice"),
        ("1: 2", ConfigError, "line by line"),
        ("? [a]\n: 3", ConfigError, "is not YAML"),
        ("steps:\t3\n\tseed: 2", ConfigError, "is not YAML"),
        ("steps: 0600", ConfigError, "steps must be an integer, got '0600'"),
        ("steps: 1:00:00", ConfigError, "steps must be an integer, got '1:00:00'"),
        ("weight_lambda: 1:30.5", ConfigError, "weight_lambda must be a number"),
        ("steps: " + "9" * 100_000, ConfigError, "steps must be an integer"),
        ("steps: " + "9" * 30, ConfigError, "steps must be at least 1 .* got a number of 100 bits"),
        ("learning_rate: 1" + "0" * 400, ConfigError, "learning_rate must be finite"),
        ("learning_rate: .inf", ConfigError, "learning_rate must be a number"),
        ("learning_rate: nan", ConfigError, "learning_rate must be finite"),
        ("stages: 101", ConfigError, "stages must be at least 1 and at most 100, got 101"),
        ("loss_resolutions: [0]", ConfigError, "loss_resolutions must be at most 100 sides"),
        ("scene: !!binary aGVsbG8=", ConfigError, "anchors, aliases and tags"),
        ('scene: "\\ud800"', ConfigError, "scene holds an unpaired surrogate"),
        ("scene: " + "x" * 30_000, ConfigError, "scene must be at most"),
    ],
)
def test_mistakes_are_named(tmp_path, text, error, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message) as raised:
        TrainConfig.load(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 2100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": 1, "steps": 2}', "'steps' stands in it twice"),
        ('{"learning_rate": NaN}', "NaN in it is not a finite number"),
        ('{"steps": ' + "[" * 100_000, "is not JSON: it is nested too deeply"),
        ('{"scene": "\\ud800"}', "scene holds an unpaired surrogate"),
        ("steps: 3", "is not JSON"),
    ],
)
def test_mistakes_in_json_are_named(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainConfig.load(path)


def test_a_file_of_another_program_is_read_as_it_looks(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('\ufeff{"scene": "\\ud83d\\ude00"}', encoding="utf-8")
    assert TrainConfig.load(path).scene == "😀"
    path = tmp_path / "run.yaml"
    path.write_text("\ufeffscene: 2024-01-01\nsteps: 1_000\n", encoding="utf-8")
    config = TrainConfig.load(path)
    assert (config.scene, config.steps) == ("2024-01-01", 1000)


ODD_TEXTS = [
    "0600", "1:30", "1e3", ".5e3", "-.5", "1.5e3", "2024-01-01", "<<", "=", "~", "yes", "1_0",
    "\x85", "&a",
]  # fmt: skip
TEXTS = st.text(max_size=12) | st.sampled_from(ODD_TEXTS)


@settings(max_examples=40, deadline=None)
@given(
    scene=TEXTS,
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    name=st.sampled_from(["run.yaml", "run.json"]),
    values=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-300, 1e300),
            "steps": st.integers(-1, 10**8),
            "stages": st.integers(0, 200),
            "num_vectors": st.integers(0, 80),
            "seed": st.integers(-1, 2**64),
        },
    ),
)
def test_all_valid_settings_can_be_saved_and_loaded(tmp_path_factory, scene, texts, name, values):
    templates = tuple(text + "{}" for text in texts)
    try:
        config = TrainConfig(scene=scene, templates=templates, log_dir=scene, **values)
    except ValueError:
        return
    path = tmp_path_factory.getbasetemp() / name
    config.save(path)
    assert TrainConfig.load(path) == config


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file at"):
        TrainConfig.load(tmp_path / "missing.yaml")
    with pytest.raises(OSError, match="cannot be read"):
        TrainConfig.load(tmp_path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="is not text"):
        TrainConfig.load(tmp_path / "image.png")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            TrainConfig.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        TrainConfig().save(tmp_path / "file" / "run.yaml")
    with pytest.raises(OSError):
        write_settings(tmp_path, {"steps": 1})
    assert sorted(os.listdir(tmp_path)) == ["file", "image.png", "pipe"]
