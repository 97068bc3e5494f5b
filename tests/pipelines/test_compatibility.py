"""Subjects on every pipeline, and beside every feature, of each family.

The whole table takes minutes: ``pytest -m long tests/pipelines/test_compatibility.py``.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest
from pipelines.compatibility import HEAD, WORKS, check
from pipelines.features import FAMILIES, FEATURES, KINDS, OTHERS, draw
from pipelines.sampling import state_of

from sefi_fast.errors import ModelError
from sefi_fast.pipelines import attach

NOTHING_TO_CHECK = ("not in diffusers", "peft is missing", "the bare pipeline fails")


def run(request, family: str, kind: str, feature: str) -> None:
    found = check(request.getfixturevalue(FAMILIES[family]), family, kind, feature)
    if found.startswith(NOTHING_TO_CHECK):
        pytest.skip(found)
    if (kind.split(",")[0], feature) == ("AnimateDiff", "regions"):
        assert found.startswith("refused: AnimateDiff")
        return
    assert found == WORKS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text to image"])
def test_every_pipeline_of_sdxl(request, kind):
    run(request, "SDXL", kind, "plain")


@pytest.mark.parametrize(
    "kind", ["ControlNet inpaint", "T2I-Adapter", "AnimateDiff", "AnimateDiff, FreeNoise"]
)
def test_pipelines_of_stable_diffusion_that_have_no_tests_of_their_own(request, kind):
    run(request, "SD 1.5", kind, "plain")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, name)
        for name, kind in OTHERS.items()
        for family in ("SD 1.5", "SDXL")
        if kind.class_name(family) is not None
    ],
)
def test_other_pipelines(request, family, kind):
    run(request, family, kind, "plain")


REFUSED = {
    "StableDiffusionInstructPix2PixPipeline": "has no encode_prompt",
    "StableDiffusionPipelineSafe": "has no encode_prompt",
    "SemanticStableDiffusionPipeline": "has no encode_prompt",
    "MarigoldDepthPipeline": "has no encode_prompt",
    "StableDiffusionLatentUpscalePipeline": "without num_images_per_prompt, lora_scale and with",
    "LEditsPPPipelineStableDiffusion": "with enable_edit_guidance, editing_prompt",
    "StableUnCLIPPipeline": "for a prior, where a subject would be missing",
    "StableDiffusionPix2PixZeroPipeline": "by the difference of two plain ones",
    "StableDiffusionImageVariationPipeline": "has no encode_prompt",
}


@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_that_are_refused(sd15_pipeline, make_subject, name):
    kind = getattr(diffusers, name)
    parts = sd15_pipeline.components | {"prior_text_encoder": sd15_pipeline.text_encoder}
    wanted = set(inspect.signature(kind).parameters) - {"requires_safety_checker"}
    if name == "LEditsPPPipelineStableDiffusion":
        parts["scheduler"] = diffusers.DDIMScheduler.from_config(sd15_pipeline.scheduler.config)
    pipe = kind(**{part: parts.get(part) for part in wanted})
    before = state_of(pipe)
    with pytest.raises(ModelError, match=REFUSED[name]):
        attach(pipe, make_subject())
    assert state_of(pipe) == before


def test_a_modular_pipeline_is_refused(sdxl_pipeline, make_sdxl_subject):
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{n: getattr(sdxl_pipeline, n) for n in ("unet", "tokenizer")})
    with pytest.raises(ModelError, match="StableDiffusionXLModularPipeline has no encode_prompt"):
        attach(pipe, make_sdxl_subject())


# No matter of the prompt, in which the families differ: of SD 1.5 here, of SDXL in the long test.
ALIKE = {"LCM", "LoRA", "FreeU", "fused QKV", "slicing", "model offload", "sequential offload"}


@pytest.mark.parametrize(
    ("family", "feature"),
    [("SD 1.5", name) for name in FEATURES if name != "plain"]
    + [("SDXL", name) for name in FEATURES if name not in {"plain", *ALIKE}],
)
def test_every_feature(request, family, feature):
    run(request, family, "text to image", feature)


ACTING = ["callback", "clip_skip", "IP-Adapter", "LoRA", "FreeU", "regions"]


@pytest.mark.parametrize("name", ACTING)
def test_features_act_at_all(sdxl_pipeline, name):
    pipe, feature = sdxl_pipeline, FEATURES[name]
    if feature.applies(pipe) is not None:
        pytest.skip(feature.applies(pipe))
    plain = draw(pipe, "a cat", num_inference_steps=4)
    feature.on(pipe)
    arguments = {"num_inference_steps": 4} | feature.arguments(pipe)
    with feature.around(pipe, "a cat"):
        changed = draw(pipe, "a cat", **arguments)
    assert (changed - plain).abs().max() > 1e-2


@pytest.mark.parametrize("feature", ["plain", "no guidance", "tensors"])
def test_velocity_prediction(request, feature):
    run(request, "SD 2.1", "text to image", feature)


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything(request, family, kind, feature):
    run(request, family, kind, feature)


def test_the_page_begins_as_its_command_writes_it():
    page = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
    if not page.exists():
        pytest.skip("needs the documents, which a wheel leaves out")
    assert page.read_text(encoding="utf-8").startswith(HEAD)
