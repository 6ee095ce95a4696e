"""The sampling loop does not make the host wait for the device in each step."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from parity import PROMPTS, picture_batch
from waits import count_waits

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.non_finite import NonFiniteDetector
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Conditioning, to_device

#: Scheduler -> waits of its own in a step: noise is drawn on the CPU, from each image's seed.
WAITS = {'EulerDiscreteScheduler': 0, 'DDIMScheduler': 0, 'DPMSolverMultistepScheduler': 0, 'HeunDiscreteScheduler': 0,
         'TCDScheduler': 0, 'EulerAncestralDiscreteScheduler': 1, 'LCMScheduler': 1}


@pytest.fixture(scope='module')
def on_meta(tiny_base: Path) -> SDXL:
    """That SDXL on the stand-in for a GPU, with nothing to compute in a step but the loop itself."""
    model = SDXL(pretrained=str(tiny_base)).to('meta')
    rows = torch.zeros(2, 1, device='meta')
    model.encode = lambda *_, **__: Conditioning(rows, rows, rows)
    model.predict = lambda x, *_: x + x
    return model


@pytest.mark.parametrize('name', WAITS)
def test_waits_of_a_step(name: str, on_meta: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer loop waits as often as a short one, but for what the scheduler itself does."""
    monkeypatch.setattr(NonFiniteDetector, 'check', lambda *_: None)  # waits once, and reads zeros on meta
    batch, counts = to_device(picture_batch(PROMPTS[:1], [1], (32, 32)), 'meta'), []
    for num in (3, 5):
        with count_waits() as waits:
            Sampler(scheduler=dict(type=name), num_inference_steps=num)(on_meta, batch)
        counts.append(Counter(waits))
    short, long = counts
    assert sum((long - short).values()) == 2 * WAITS[name], long - short
