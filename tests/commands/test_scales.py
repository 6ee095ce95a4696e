"""The contact sheet of an adapter's scales."""

from pathlib import Path

import numpy as np
import torch
from parity import make_batch, sampler, with_t2i

from diffengine_sdxl.commands.scales import scale_sheet


def test_scale_zero_is_the_base_and_more_is_not(tiny_base: Path) -> None:
    model = with_t2i(tiny_base).eval()
    for parameter in model.adapters['adapter'].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.sampler = sampler(steps=2)
    batch = make_batch(2)
    sheet = scale_sheet(model, batch, 'adapter', [0.0, 1.0], 'A title')
    assert model.adapters['adapter'].scale == 1.0
    pixels, cell = np.asarray(sheet), 128
    # Columns of a sheet: a gap of 6 pixels before each; the pictures of the last row end 12 pixels above the edge.
    columns = [pixels[-12 - cell:-12, 6 + i * (cell + 6):6 + i * (cell + 6) + cell] for i in range(4)]
    condition, base, zero, one = columns
    assert np.array_equal(base, zero)
    assert not np.array_equal(base, one) and not np.array_equal(base, condition)
