"""SeFiAttnProcessor in every layer of a whole U-Net."""

from __future__ import annotations

import pytest
import torch
from models import make_unet

from sefi_fast.attention.processor import SeFiAttnProcessor

BATCH, TOKENS, WIDTH = 2, 7, 24


def unet_inputs(dtype):
    torch.manual_seed(5)
    sample = torch.randn(BATCH, 4, 16, 16, dtype=dtype)
    return sample, torch.tensor(420), torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_into_a_whole_unet(dtype):
    unet = make_unet(WIDTH).to(dtype)
    inputs = unet_inputs(dtype)
    with torch.no_grad():
        expected = unet(*inputs).sample
        unet.set_attn_processor(SeFiAttnProcessor())
        actual = unet(*inputs).sample
        unet.set_attn_processor(SeFiAttnProcessor(backend="eager"))
        fused = unet(*inputs).sample
    scale = float(expected.float().abs().max())
    tight = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=tight * scale)
    loose = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(fused, expected, rtol=0, atol=loose * scale)
