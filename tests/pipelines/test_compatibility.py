"""Subjects with every pipeline and every feature of each family.

The whole table takes minutes: ``pytest -m long tests/pipelines/test_compatibility.py``.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest
from pipelines.compatibility import HEAD, WORKS, check
from pipelines.features import FAMILIES, FEATURES, KINDS, OTHERS, sample_small
from pipelines.sampling import assert_differ, state_of

from sefi_fast import attach
from sefi_fast.errors import ModelError

NOTHING_TO_CHECK = ("not in diffusers", "peft is missing", "the bare pipeline fails")
# These do not touch the prompt, in which the families differ: SDXL runs them in the long test.
ALIKE = {"LCM", "LoRA", "FreeU", "fused QKV", "slicing", "model offload", "sequential offload"}


def run(request, family: str, kind: str, feature: str) -> None:
    found = check(request.getfixturevalue(FAMILIES[family]), family, kind, feature)
    if found.startswith(NOTHING_TO_CHECK):
        pytest.skip(found)
    if (kind.split(",")[0], feature) == ("AnimateDiff", "regions"):
        assert found.startswith("refused: AnimateDiff")
        return
    assert found == WORKS


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, name)
        for name, kind in (KINDS | OTHERS).items()
        for family in ("SD 1.5", "SDXL")
        if kind.class_name(family) is not None
    ],
)
def test_every_pipeline(request, family, kind):
    run(request, family, kind, "plain")


@pytest.mark.parametrize(
    ("family", "feature"),
    [("SD 1.5", name) for name in FEATURES if name != "plain"]
    + [("SDXL", name) for name in FEATURES if name not in {"plain", *ALIKE}]
    + [("SD 2.1", name) for name in ("plain", "no guidance", "tensors")],
)
def test_every_feature(request, family, feature):
    run(request, family, "text to image", feature)


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything(request, family, kind, feature):
    run(request, family, kind, feature)


@pytest.mark.parametrize(
    "name", ["callback", "clip_skip", "IP-Adapter", "LoRA", "FreeU", "regions"]
)
def test_features_change_the_image(sdxl_pipeline, name):
    pipe, feature = sdxl_pipeline, FEATURES[name]
    if feature.missing(pipe):
        pytest.skip(feature.missing(pipe))
    plain = sample_small(pipe, "a cat", num_inference_steps=4)
    feature.on(pipe)
    arguments = {"num_inference_steps": 4} | feature.arguments(pipe)
    with feature.around(pipe, "a cat"):
        assert_differ(sample_small(pipe, "a cat", **arguments), plain)


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
def test_pipelines_that_are_refused(pipe, make_subject, name):
    kind = getattr(diffusers, name)
    parts = pipe.components | {"prior_text_encoder": pipe.text_encoder}
    wanted = set(inspect.signature(kind).parameters) - {"requires_safety_checker"}
    if name == "LEditsPPPipelineStableDiffusion":
        parts["scheduler"] = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    refused = kind(**{part: parts.get(part) for part in wanted})
    before = state_of(refused)
    with pytest.raises(ModelError, match=REFUSED[name]):
        attach(refused, make_subject())
    assert state_of(refused) == before


@pytest.mark.parametrize("family", ["sdxl"])
def test_a_modular_pipeline_is_refused(pipe, make_subject):
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**{name: getattr(pipe, name) for name in ("unet", "tokenizer")})
    with pytest.raises(ModelError, match="StableDiffusionXLModularPipeline has no encode_prompt"):
        attach(modular, make_subject())


def test_the_page_begins_as_its_command_writes_it():
    page = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
    if not page.exists():
        pytest.skip("needs the documents, which a wheel leaves out")
    assert page.read_text(encoding="utf-8").startswith(HEAD)
