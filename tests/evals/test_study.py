"""Studies end to end, small: each training once, nothing twice, tables of the finished part."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from evals.studies import run_study, tasks
from evals.studies.__main__ import main
from sefi_fast.training import TrainingInterrupted
from sefi_fast.training.engine import Engine

SMALL = {"identities": 1, "prompts": 2, "seeds": 1, "sampling_steps": 2, "steps": 2,
         "batch_size": 2, "progress": False}  # fmt: skip
ZERO = {"study": "lambda", "variants": ["λ = 0"], **SMALL}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    variants = ["λ = 0", "λ = 0.003", "none", "subject-wise", "5 split", "mask, λ = 0.1"]
    found = run_study(["lambda", "loss", "pairs"], variants=variants, output=folder, **SMALL)
    return folder, found


@pytest.fixture
def held(finished):
    """The variant λ = 0, its file, and the contents."""
    folder, found = finished
    (variant,) = [v for v in found.studies[0].variants if v.name == "λ = 0"]
    (path,) = folder.glob(f"results/{variant.key}/*.json")
    return variant, path, json.loads(path.read_text(encoding="utf-8"))


def test_equal_settings_are_trained_once(finished):
    folder, found = finished
    # λ = 0 and none; λ = 0.003, subject-wise and 5 split; mask. The two controls have no training.
    assert len(list(folder.glob("subjects/*/*.safetensors"))) == 3
    assert len(list(folder.glob("results/*/*.json"))) == 5
    assert found.failures == ()


def test_every_file_is_written_whole(finished):
    folder, found = finished
    ends = (".md", ".csv", ".png", "-sheet.png")
    names = {f"{name}{end}" for name in ("lambda", "loss", "pairs") for end in ends}
    assert {path.name for path in found.files} == names | {"judge-sheet.png"}
    for path in found.files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 100
    assert not [path for path in folder.rglob("*") if "part" in path.name]
    assert not list(folder.rglob("summary.jsonl"))
    with open(folder / "loss.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == [
        "class word", "spelled out", "none", "mask, λ = 0.1", "subject-wise",
    ]  # fmt: skip
    values = found.results.values(found.studies[1].variants[0], "id_p")
    assert float(rows[2]["id_p"]) == pytest.approx(values[0], abs=1e-4)
    assert rows[4]["id − sefi"] == "" != rows[2]["id − sefi"]
    assert "| λ = 0.003 | 1 |" in (folder / "lambda.md").read_text(encoding="utf-8")


def test_results_are_means_of_the_files(finished, held):
    (folder, found), (variant, _, content) = finished, held
    values = found.results.values
    assert len(content["images"]) == 2 and content["training"]["steps"] == 2
    mean = sum(row["id"] for row in content["images"]) / 2
    assert values(variant, "id") == {0: pytest.approx(mean)}
    first = content["images"][0]
    assert values(variant, "prompt", [first["kind"]]) == {0: pytest.approx(first["prompt"])}
    assert 0 < values(variant, "inside")[0] == content["overfit"]["inside"] <= 1
    leaks = [row["leak"] for row in content["open"]]
    assert len(leaks) == 3 and values(variant, "open_leak") == {0: pytest.approx(sum(leaks) / 3)}
    (control,) = folder.glob("results/class-word/*.json")
    assert json.loads(control.read_text(encoding="utf-8"))["training"] is None


def test_the_same_call_makes_only_lost_scores_again(finished, held, monkeypatch):
    (folder, _), (variant, path, content) = finished, held
    (subject,) = folder.glob(f"subjects/{variant.key}/*.safetensors")
    before = subject.stat().st_mtime
    path.write_text('{"cut off')
    run_study(output=folder, **ZERO)
    assert subject.stat().st_mtime == before
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["images"] == content["images"] and made["training"]["steps"] == 2
    monkeypatch.setattr(tasks, "train_many", None)
    monkeypatch.setattr(tasks, "_generate", None)
    again = run_study(output=folder, **ZERO)
    assert again.results.numbers(again.studies[0].variants[0]) == [0]


def test_a_signal_in_training_leaves_tables_and_a_checkpoint(tmp_path, monkeypatch):
    honest = Engine.step

    def step(engine, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(engine, *arguments)

    monkeypatch.setattr(Engine, "step", step)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(TrainingInterrupted, match="The same call resumes it") as caught:
            run_study(output=tmp_path, **ZERO)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.signal == signal.SIGTERM
    assert len(list(tmp_path.glob("subjects/*/*.checkpoints/step-000001.safetensors"))) == 1
    assert "| class word | 1 |" in (tmp_path / "lambda.md").read_text(encoding="utf-8")


def test_a_failed_training_leaves_the_others(tmp_path, monkeypatch):
    real = tasks.train_many

    def failing(entries, **settings):
        results = real(entries, **settings)
        return [results[0]._replace(subject=None, error=RuntimeError("no luck"))]

    monkeypatch.setattr(tasks, "train_many", failing)
    found = run_study(output=tmp_path, **ZERO)
    assert len(found.failures) == 2 and all("no luck" in words for words in found.failures)
    made = {path.parent.name for path in tmp_path.glob("results/*/*.json")}
    assert made == {"class-word", "spelled-out"}


@pytest.mark.slow
def test_two_workers_find_the_scores_of_one(tmp_path):
    settings = {**ZERO, "identities": 2, "batch_subjects": 1}
    one = run_study(output=tmp_path / "one", **settings)
    two = run_study(output=tmp_path / "two", workers=2, **settings)
    variant = one.studies[0].variants[0]
    for score in ("id", "prompt", "share"):
        expected = one.results.values(variant, score)
        assert two.results.values(variant, score) == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_a_signal_ends_two_workers_soon_with_tables_and_checkpoints(tmp_path, number):
    command = [
        sys.executable, "-m", "evals.studies", "lambda", "--variants", "λ = 0",
        "--identities", "2", "--prompts", "1", "--seeds", "1", "--sampling-steps", "1",
        "--steps", "1000000", "--batch-size", "1", "--batch-subjects", "1", "--quiet",
        "--workers", "2", "-o", str(tmp_path), "--checkpoint-every", "1",
    ]  # fmt: skip
    checkpoints = "subjects/*/*.checkpoints/*.safetensors"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 400
            while not list(tmp_path.glob(checkpoints)) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.2)
            process.send_signal(number)
            # The workers hold the pipe too, so it ends with them.
            _, words = process.communicate(timeout=200)
        finally:
            process.kill()
    assert list(tmp_path.glob(checkpoints)) and not list(tmp_path.rglob("summary.jsonl"))
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert "The same call resumes it" in words
        assert "| class word |" in (tmp_path / "lambda.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"study": "lamda"}, "lambda, loss"),
        ({"variants": ["λ = 7"]}, "There is no variant 'λ = 7'"),
        ({"identities": 67}, "1 to 66"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(tmp_path, wrong, words, capsys):
    with pytest.raises(ValueError, match=words):
        run_study(**{**ZERO, "output": tmp_path / "never", **wrong})
    assert not (tmp_path / "never").exists()


def test_the_command_runs_a_study_and_reports_errors(tmp_path, capsys):
    command = ["lambda", "--variants", "λ = 0", "--identities", "1", "--prompts", "1", "--seeds",
               "1", "--sampling-steps", "1", "--steps", "1", "--batch-size", "1", "--quiet",
               "-o", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    assert str(tmp_path / "lambda.md") in capsys.readouterr().out
    assert (tmp_path / "lambda.png").exists()
    assert main([*command, "--identities", "67"]) == 1
    assert "1 to 66" in capsys.readouterr().err
