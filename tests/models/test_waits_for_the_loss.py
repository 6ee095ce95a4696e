"""Up to the gradients a training step does not wait for its device: counted on `meta`, which stands for CUDA here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build
from waits import count_waits, to_meta

from diffengine_sdxl.datasets import collate
from diffengine_sdxl.engine.prefetch import DrawingCollate
from diffengine_sdxl.models.sdxl import SDXL

#: Adapters, and what a sample holds beside its texts and conditions.
MODELS: dict[str, tuple[list[str], dict[str, tuple[int, ...]]]] = {
    'images': (['t2i_adapter', 'controlnet', 'lora_everywhere', 'ip_adapter', 'textual_inversion'], {}),
    'cached': (['t2i_adapter', 'ip_adapter_plus'], dict(latents=(4, 8, 8), reference_embeds=(17, 32),
                                                         text_embeds=(77, 64), pooled=(32,))),
}


def samples(model: SDXL, entries: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Two samples as a data set with CaptionDrop, JointDrop and LossMask gives them."""
    pixels = torch.arange(3 * 64 * 64).remainder(256).byte().view(3, 64, 64)
    image = {name: torch.zeros(shape) for name, shape in entries.items()} or {'img': pixels}
    drops = {name: name == 'text' for name in ('text', *model.adapters)}
    return [{**image, 'text': f'a {i}', 'key': str(i), 'epoch': 0, 'seed': 1, 'time_ids': torch.ones(6), 'drop': drops,
             'weight': 1.0, 'num_skipped': 0, 'mask': torch.ones(1, 64, 64), 'conditioning_image': pixels,
             'reference': pixels / 255} for i in range(2)]


@pytest.mark.parametrize('name', MODELS)
def test_no_wait_up_to_the_gradients(name: str, tiny_base: Path) -> None:
    """With captions and conditions that are dropped, masks, weights and active ranges."""
    kinds, entries = MODELS[name]
    adapters = {kind: {**CASES[kind].config, **({'active_range': (0.1, 1)} if CASES[kind].active_ranges else {})}
                for kind in kinds}
    model: Any = to_meta(build(tiny_base, adapters, mixed_precision='bf16', null_prompt='empty')).train()
    collated = DrawingCollate(collate, model)(samples(model, entries))
    with count_waits() as waits:
        total, _ = model.parse_losses(model(**model.data_preprocessor(collated, True), mode='loss'))
        total.backward()
    assert waits == []
    assert all(p.grad is not None for trained in model.trainables().values() for _, p in trained)
