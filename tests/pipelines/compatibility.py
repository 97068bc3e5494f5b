"""Run every family, pipeline and feature, and write the results as a table.

Run ``python tests/pipelines/compatibility.py docs/compatibility.md``: some minutes on one core.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TESTS), str(_TESTS.parent)]

import torch  # noqa: E402
from pipelines.features import FAMILIES, FEATURES, KINDS, OTHERS, sample_small  # noqa: E402
from pipelines.sampling import assert_close, assert_differ, subject_for  # noqa: E402

from sefi_fast import attach, detach  # noqa: E402
from sefi_fast.errors import SefiError  # noqa: E402

# The model runs in float32, and its numbers reach some tens.
CLOSE = 2e-3
WORKS = "yes"


def check(base: Any, family: str, kind: str, feature: str) -> str:
    """Return `WORKS`, or why there is nothing to check, or why it is refused.

    Raises:
        AssertionError: the image of an untrained subject differs from that of its class word in
            the bare pipeline, with the feature turned on before attaching or after it; that of a
            trained subject does not; or the detached pipeline gives another image than before.
    """
    made = (KINDS | OTHERS)[kind]
    if made.class_name(family) is None:
        return "not in diffusers"
    chosen = FEATURES[feature]
    early, late = (made.make(copy.deepcopy(base), family) for _ in range(2))
    reason = chosen.missing(early)
    if reason is not None:
        return reason
    arguments = made.arguments | chosen.arguments(early)
    untrained, trained = subject_for(base, distance=0), subject_for(base)

    def run(pipe: Any, text: str) -> torch.Tensor:
        with chosen.around(pipe, text):
            return sample_small(pipe, text, **arguments)

    try:
        chosen.on(early)
        expected = run(early, "a photo of a cat")
    except SefiError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"the bare pipeline fails: {type(error).__name__}: {str(error).splitlines()[0]}"
    try:
        attach(early, untrained)
        attach(late, untrained)
        chosen.on(late)
        for pipe in (early, late):
            assert_close(run(pipe, "a photo of a <it>"), expected, CLOSE)
        attach(early, trained)
        assert_differ(run(early, "a photo of a <it>"), expected)
    except SefiError as error:
        return f"refused: {error}"
    detach(early)
    assert torch.equal(run(early, "a photo of a cat"), expected)
    return WORKS


def make_bases(folder: Path) -> dict[str, Any]:
    """Return the random-weight text-to-image pipeline of each family."""
    import models

    makers = (models.make_sd15, models.make_sd21, models.make_sdxl)
    return {
        family: make(folder / make.__name__) for family, make in zip(FAMILIES, makers, strict=True)
    }


def table(bases: dict[str, Any]) -> tuple[str, int]:
    """Return the page, and the number of cells that came out wrong."""
    notes: list[str] = []
    wrong = 0
    lines = []
    for family, base in bases.items():
        lines += ["", f"## {family}", ""]
        lines += ["| pipeline | " + " | ".join(FEATURES) + " |"]
        lines += ["|---" * (len(FEATURES) + 1) + "|"]
        for kind in KINDS:
            cells = []
            for feature in FEATURES:
                try:
                    found = check(base, family, kind, feature)
                except Exception as error:
                    wrong += 1
                    found = f"wrong: {type(error).__name__}: {str(error).splitlines()[0]}"
                print(f"{family} · {kind} · {feature}: {found}", flush=True)
                if found not in (WORKS, "not in diffusers") and found not in notes:
                    notes.append(found)
                symbol = {WORKS: "✓", "not in diffusers": "–"}
                cells.append(symbol.get(found) or f"[{notes.index(found) + 1}]")
            if set(cells) != {"–"}:
                lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    explained = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")
    )
    return "\n".join([HEAD, "", f"Run with {packages}.", *lines, "", *explained]) + "\n", wrong


HEAD = """# Tested pipelines and features

Every mark comes from a run of `python tests/pipelines/compatibility.py docs/compatibility.md` on
random-weight models of each family's architecture at reduced width, on a CPU.

✓ means that all of this held. A subject whose tokens are those of its class word gives the image of
the class word in the bare pipeline, within rounding, with the feature turned on before `attach` or
after it. A subject with other tokens gives another image. After `detach` the pipeline gives the
same image as before, bit for bit. Where the bare pipeline fails, there is nothing to compare with;
`clip_skip` on a prompt with a subject works there too, as its own test shows. – means that
diffusers has no such pipeline or feature.

| column | turned on |
|---|---|
| plain | nothing; guidance 5 |
| several images | `num_images_per_prompt=2` |
| no guidance | `guidance_scale=1` |
| LCM | `LCMScheduler`, two steps, no guidance |
| tensors | `prompt_embeds` (and SDXL's `pooled_prompt_embeds`) in place of words |
| callback | `callback_on_step_end` that changes `prompt_embeds` |
| clip_skip | `clip_skip=1` |
| IP-Adapter | `load_ip_adapter`, a scale of 0.7 |
| LoRA | `load_lora_weights` on queries, keys and values of the cross-attention |
| FreeU | `enable_freeu` |
| fused QKV | `unet.fuse_qkv_projections` |
| slicing | attention slicing |
| regions | `sefi_fast.regions`, a sentence with the subject for a part of the image |
| model offload, sequential offload | accelerate's hooks, onto the CPU itself |

Prompts made with `sefi_fast.encode` (SDXL: `sefi_fast.prompts.encode_with_pooled`), negative
ones among them, also work after the text encoders were freed (`pipe.text_encoder = None`).
Negative embeddings of another library go with a prompt in words, `pipe("… <me>",
negative_prompt_embeds=…)`: next to `prompt_embeds` diffusers wants both of one shape.

Attaching changes no attention processor and no plain prompt: `set_attn_processor`,
`set_default_attn_processor`, slicing, fused projections and adapters work before it and after it,
and other threads may generate with other pipelines over the same models while subjects are attached
and detached. Tokenizers of Hugging Face are not safe to share between threads: give each thread its
own, or prompt embeddings. Traces and regions set processors of their own on the layers while they
run. Attached pipelines, U-Nets and text encoders are copied and pickled: a pipeline comes back
with its subjects.

Tested with the feature "plain" alone, by `tests/pipelines/test_compatibility.py`:
perturbed-attention guidance (PAG), self-attention guidance (SAG), Attend-and-Excite, ControlNet-XS,
InstructPix2Pix of SDXL, latent consistency models, GLIGEN, depth to image, upscaling (x4),
Panorama, CycleDiffusion, Text2Video-Zero, AnimateDiff on a video, PIA.

Not run here: xformers. On CUDA, training, sampling and traces of the bundled model have run
(`sefi-fast demo` on an H200), and nothing else of this page. Refused with an error message:

- SD 3, Flux and other transformers, which have no U-Net with cross-attention layers;
- the SDXL refiner, which has one of the two text encoders;
- schedulers that count time by the noise's logarithm (EDM);
- pipelines without the `encode_prompt` of their family: InstructPix2Pix of SD 1.5, Safe and
  Semantic Stable Diffusion, LEdits++, the latent upscaler, Marigold, image variation, modular
  pipelines;
- pipelines that use the prompt a second time, without its subject: StableUnCLIP from text,
  Pix2PixZero;
- tracing a pipeline whose U-Net is compiled, and training with an IP-Adapter loaded."""


def main() -> int:
    """Write the page named on the command line, or print it; 1 if a cell came out wrong."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers", "sefi_fast"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        page, wrong = table(make_bases(Path(folder)))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page, encoding="utf-8")
    else:
        print(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
