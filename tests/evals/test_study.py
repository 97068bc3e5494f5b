"""Studies end to end, small: each training once, nothing twice, tables of what there is."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from evals.studies import run_study, tasks
from evals.studies.__main__ import main
from evals.studies.report import judge_sheet, verdict
from sefi_fast.subject import Subject
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, draw
from sefi_fast.tiny_world.judge import Judge
from sefi_fast.training import TrainingInterrupted
from sefi_fast.training.engine import Engine

SMALL = {
    "identities": 1,
    "prompts": 2,
    "seeds": 1,
    "sampling_steps": 2,
    "steps": 2,
    "batch_size": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = run_study(
        ["lambda", "loss", "pairs"],
        variants=["λ = 0", "λ = 0.003", "none", "subject-wise", "5 split", "mask, λ = 0.1"],
        output=folder,
        **SMALL,
    )
    return folder, found


def results(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.glob("results/*/*.json")}


def test_settings_that_coincide_are_trained_once(finished):
    folder, found = finished
    # λ = 0 and none; λ = 0.003, subject-wise and 5 split; mask. And two controls without training.
    assert len(list(folder.glob("subjects/*/*.safetensors"))) == 3
    assert len(results(folder)) == 5
    assert found.failures == ()


def test_the_files_are_whole(finished):
    folder, found = finished
    assert {path.name for path in found.files} == {
        f"{name}{end}"
        for name in ("lambda", "loss", "pairs")
        for end in (".md", ".csv", ".png", "-sheet.png")
    } | {"summary.json", "judge-sheet.png"}
    for path in found.files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 100
    assert not [path for path in folder.rglob("*") if "part" in path.name]
    assert not list(folder.rglob("summary.jsonl"))
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["variant"] for row in summary["studies"]["lambda"]] == [
        "class word", "spelled out", "λ = 0", "λ = 0.003",
    ]  # fmt: skip
    with open(folder / "loss.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows[2:]] == ["none", "mask, λ = 0.1", "subject-wise"]
    assert "| λ = 0.003 | 1 |" in (folder / "lambda.md").read_text(encoding="utf-8")


def test_a_table_shows_what_the_files_hold(finished):
    folder, found = finished
    (variant,) = [v for v in found.studies[0].variants if v.name == "λ = 0"]
    (path,) = folder.glob(f"results/{variant.key}/*.json")
    held = json.loads(path.read_text(encoding="utf-8"))
    assert len(held["pictures"]) == 2 and held["training"]["steps"] == 2
    mean = sum(row["id"] for row in held["pictures"]) / 2
    assert found.results.values(variant, "id") == {0: pytest.approx(mean)}
    kind = held["pictures"][0]["kind"]
    first = held["pictures"][0]["prompt"]
    assert found.results.values(variant, "prompt", [kind]) == {0: pytest.approx(first)}
    assert 0 < held["overfit"]["inside"] <= 1
    leaks = [row["leak"] for row in held["open"]]
    assert len(leaks) == 3 and {row["kind"] for row in held["open"]} == {"open"}
    assert found.results.values(variant, "open_leak") == {0: pytest.approx(sum(leaks) / 3)}
    (control,) = folder.glob("results/class-word/*.json")
    assert json.loads(control.read_text(encoding="utf-8"))["training"] is None


def test_the_subject_is_of_its_variant(finished):
    folder, found = finished
    (variant,) = [v for v in found.studies[1].variants if v.name == "mask, λ = 0.1"]
    (path,) = folder.glob(f"subjects/{variant.key}/*.safetensors")
    subject = Subject.load(path)
    assert subject.settings["attention_loss"] == "mask" and subject.settings["steps"] == 2
    assert subject.settings["scene"] == "on the beach"


def test_the_same_call_does_nothing_twice(finished, monkeypatch):
    folder, _ = finished
    before = results(folder)
    monkeypatch.setattr(tasks, "train_many", None)
    monkeypatch.setattr(tasks, "_draw", None)
    again = run_study("lambda", variants=["λ = 0"], output=folder, **SMALL)
    assert results(folder) == before
    assert again.results.numbers(again.studies[0].variants[0]) == [0]


def test_lost_scores_are_made_anew_from_the_subject_that_is_there(finished, monkeypatch):
    folder, found = finished
    (variant,) = [v for v in found.studies[0].variants if v.name == "λ = 0"]
    (path,) = folder.glob(f"results/{variant.key}/*.json")
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text('{"cut off')
    (subject,) = folder.glob(f"subjects/{variant.key}/*.safetensors")
    before = subject.stat().st_mtime
    run_study("lambda", variants=["λ = 0"], output=folder, **SMALL)
    assert subject.stat().st_mtime == before
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["pictures"] == held["pictures"]
    assert made["training"]["steps"] == 2


def test_a_part_that_is_missing_is_added_and_the_others_stay(finished):
    folder, found = finished
    (variant,) = [v for v in found.studies[0].variants if v.name == "λ = 0"]
    (path,) = folder.glob(f"results/{variant.key}/*.json")
    held = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: part for name, part in held.items() if name != "open"}
    path.write_text(json.dumps({**kept, "pictures": ["as they were"]}), encoding="utf-8")
    task = tasks.Task(folder, variant, (0,), found.results.protocol)
    assert not task.is_done(0)
    assert tasks.Worker()(task) == {}
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["pictures"] == ["as they were"] and made["open"] == held["open"]
    path.write_text(json.dumps(held), encoding="utf-8")


def test_an_interrupted_run_leaves_tables_of_what_is_done(tmp_path, monkeypatch):
    done = []
    real = tasks.Worker.__call__

    def interrupted(self, task):
        if done:
            raise KeyboardInterrupt
        done.append(task)
        return real(self, task)

    monkeypatch.setattr(tasks.Worker, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study("lambda", variants=["λ = 0"], output=tmp_path, **SMALL)
    text = (tmp_path / "lambda.md").read_text(encoding="utf-8")
    assert "| class word | 1 |" in text and "spelled out" not in text


def test_a_signal_in_training_leaves_tables_and_a_checkpoint(tmp_path, monkeypatch):
    honest = Engine.step

    def step(engine, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(engine, *arguments)

    monkeypatch.setattr(Engine, "step", step)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(TrainingInterrupted, match="the same call goes on with") as caught:
            run_study("lambda", variants=["λ = 0"], output=tmp_path, **SMALL)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.signal == signal.SIGTERM
    assert len(list(tmp_path.glob("subjects/*/*.checkpoints/step-000001.safetensors"))) == 1
    assert "| class word | 1 |" in (tmp_path / "lambda.md").read_text(encoding="utf-8")


def test_a_subject_that_fails_is_told_and_the_others_stay(tmp_path, monkeypatch):
    real = tasks.train_many

    def failing(entries, **settings):
        results = real(entries, **settings)
        return [results[0]._replace(subject=None, error=RuntimeError("no luck"))]

    monkeypatch.setattr(tasks, "train_many", failing)
    found = run_study("lambda", variants=["λ = 0"], output=tmp_path, **SMALL)
    assert len(found.failures) == 2 and all("no luck" in words for words in found.failures)
    assert {path.parent.name for path in tmp_path.glob("results/*/*.json")} == {
        "class-word",
        "spelled-out",
    }


@pytest.mark.slow
def test_two_workers_find_what_one_finds(tmp_path):
    settings = {**SMALL, "identities": 2, "side_by_side": 1, "variants": ["λ = 0"]}
    one = run_study("lambda", output=tmp_path / "one", **settings)
    two = run_study("lambda", output=tmp_path / "two", workers=2, **settings)
    variant = one.studies[0].variants[0]
    for score in ("id", "prompt", "share"):
        expected = one.results.values(variant, score)
        assert two.results.values(variant, score) == pytest.approx(expected, abs=2e-3)


_ENDLESS = """
import sys
from evals.studies.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_a_signal_ends_two_workers_soon_with_tables_and_checkpoints(tmp_path, number):
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(_ENDLESS, encoding="utf-8")
    command = [
        sys.executable, str(script), "lambda", "--variants", "λ = 0",
        "--identities", "2", "--prompts", "1", "--seeds", "1", "--sampling-steps", "1",
        "--steps", "1000000", "--batch-size", "1", "--side-by-side", "1", "--quiet",
        "--workers", "2", "-o", str(out), "--checkpoint-every", "1",
    ]  # fmt: skip
    checkpoints = "subjects/*/*.checkpoints/*.safetensors"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 400
            while not list(out.glob(checkpoints)) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.2)
            process.send_signal(number)
            # The workers hold the pipe too, so its end is theirs.
            _, words = process.communicate(timeout=200)
        finally:
            process.kill()
    assert list(out.glob(checkpoints)) and not list(out.rglob("summary.jsonl"))
    if number == signal.SIGKILL:
        return
    assert process.returncode == 128 + number
    assert "the same call goes on with what is left" in words
    assert "| class word |" in (out / "lambda.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"study": "lamda"}, "lambda, loss"),
        ({"variants": ["λ = 7"]}, "no variant is called 'λ = 7'"),
        ({"identities": 67}, "1 to 66"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        run_study(**{"study": "lambda", "output": tmp_path / "never", **wrong})
    assert not (tmp_path / "never").exists()


def test_the_command_runs_a_study(tmp_path, capsys):
    status = main(
        ["lambda", "--variants", "λ = 0", "--identities", "1",
         "--prompts", "1", "--seeds", "1", "--sampling-steps", "1", "--steps", "1",
         "--batch-size", "1", "-o", str(tmp_path), "--quiet"]
    )  # fmt: skip
    assert status == 0
    assert str(tmp_path / "lambda.md") in capsys.readouterr().out
    assert (tmp_path / "lambda.png").exists()


def test_the_judges_verdicts_can_be_checked_by_eye(finished):
    _, found = finished
    sheet = judge_sheet(found.results, count=3)
    assert sheet is not None and sheet.width > 3 * 120
    spec = ImageSpec(
        Identity("purple", "orange", "spotted", "big", "round"), "snow", ("hat",), "left"
    )
    words = verdict(Judge.load()([draw(spec)[0]])[0])
    assert words == "purple/orange spotted, big ears, round, hat, snow, left"
