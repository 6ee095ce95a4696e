"""What the engine's tests share."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tiny(tiny_base: Path, circles: Path) -> dict[str, Any]:
    """Options of a run that is over in a second: the tiny base, circles of 32 pixels, four steps, no pictures."""
    return {'model.pretrained': str(tiny_base), 'train_dataloader.dataset.source': str(circles), 'resolution': 32,
            'train_cfg.max_iters': 4, 'optim_wrapper.accumulative_counts': 1, 'default_hooks.samples': None,
            'default_hooks.checkpoint.interval': 2, 'model.sampler.num_inference_steps': 2}
