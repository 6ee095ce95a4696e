"""What is chosen by measuring. The kernels of a CPU are measured in place of a GPU's; times come from the test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffengine_sdxl.loading.single_file import SDXL_FILES
from diffengine_sdxl.models import measured


def test_shapes_of_sdxl() -> None:
    """Podell et al. 2023, table 1: transformers at half and a quarter of the latents' side, heads of 64 channels."""
    with torch.device('meta'):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL_FILES / 'unet'))
    assert measured.attention_shapes(unet) == [(10, 64 * 64, 64), (20, 32 * 32, 64)]


@pytest.mark.parametrize('slow', ['contiguous', 'channels_last'])
def test_fastest_first(slow: str, model: Any) -> None:
    """The order is that of the times; kernels that the device lacks are left out; the UNet's layout is restored."""
    ran = []

    def timer(work: Callable[[], Any]) -> float:
        work()
        ran.append(work)
        # The last two are the layouts.
        return 2.0 if len(ran) == before + list(measured.LAYOUTS).index(slow) + 1 else 1.0
    before = 2 * len(measured.attention_shapes(model.unet))
    choices = measured.measure(model.unet, 2, timer)
    # A CPU has a flash attention, no cuDNN and no memory-efficient one; the last resort is always there.
    assert choices == {'attention': ['flash', 'math'], 'layout': ({*measured.LAYOUTS} - {slow}).pop()}
    assert len(ran) == before + 2
    assert model.unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous()


def test_applied(model: Any) -> None:
    """The layout and the order of kernels are in force inside."""
    with measured.applied(model.unet, {'attention': ['math', 'flash'], 'layout': 'channels_last'}):
        assert torch._C._get_sdp_priority_order()[0] == measured.KERNELS['math'].value
        assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with measured.applied(model.unet, {'layout': 'contiguous'}):
        assert model.unet.conv_in.weight.is_contiguous()
    model.unet.conv_in.weight.requires_grad_(True)  # its optimizer state and DDP's buckets have a layout too
    with measured.applied(model.unet, {'layout': 'channels_last'}):
        assert model.unet.conv_in.weight.is_contiguous() and not model.unet.conv_out.weight.is_contiguous()
    model.unet.requires_grad_(False)
