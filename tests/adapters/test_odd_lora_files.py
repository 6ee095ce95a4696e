"""LoRA files that are odd in one thing: read as what they are, or refused; never another change without a word."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_loras import attached, predict, write
from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.add_adapters import add_adapter
from diffengine_sdxl.models.sdxl import SDXL

LAYER = 'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
NORM = {'unet.conv_norm_out.w_norm': torch.zeros(16)}
Tensors = dict[str, Tensor]


def pair(prefix: str = 'unet.', a: str = 'lora_A.weight', b: str = 'lora_B.weight', factor: float = 1.0) -> Tensors:
    """A LoRA of rank 3 of one layer."""
    random = torch.Generator().manual_seed(3)
    down, up = (torch.randn(shape, generator=random) for shape in ((3, 32), (32, 3)))
    return {f'{prefix}{LAYER}.{a}': factor * down, f'{prefix}{LAYER}.{b}': up}


def header(**settings: Any) -> dict[str, str]:
    return {'lora_adapter_metadata': json.dumps({f'unet.{key}': value for key, value in settings.items()})}


SMALL = pair()
NOTHING = {f'unet.{LAYER}.lora_A.weight': torch.zeros(0, 32), f'unet.{LAYER}.lora_B.weight': torch.zeros(32, 0)}
REFUSED: list[tuple[Tensors, Mapping[str, str] | None, str]] = [
    # One layer under two names, with different values.
    ({**SMALL, **pair(a='lora.down.weight', b='lora.up.weight', factor=2)}, None, 'two names with different values'),
    ({**SMALL, **pair('', factor=2)}, None, 'two names with different values'),
    ({**SMALL, **pair('unet.base_model.model.', factor=2)}, None, 'two names with different values'),
    ({**SMALL, f'unet.{LAYER}.alpha': torch.tensor(1.0), f'{LAYER}.alpha': torch.tensor(2.0)}, None, 'two names'),
    # A key of kohya's layout does not switch off the settings in the header.
    ({**SMALL, **NORM}, header(r=3, lora_alpha=12), 'so their scale is unknown'),
    ({**SMALL, **NORM}, header(r=3, lora_alpha=3, use_rslora=True), 'so their scale is unknown'),
    ({**SMALL, **NORM}, header(r=3, lora_alpha=3, init_lora_weights='pissa'), 'was initialized by PiSSA'),
    ({**pair('base_model.model.'), 'base_model.model.conv_norm_out.w_norm': torch.zeros(16)}, None, 'scale is unknown'),
    # peft's names below a part's, without its config.
    (pair('unet.base_model.model.'), None, 'set `alpha` of the adapter'),
    (SMALL, header(r=3, lora_alpha=3, use_dora=True), 'no lora_magnitude_vector'),
    (SMALL, header(r=3, lora_alpha=10**400), 'must be a finite number'),
    (NOTHING, None, 'has no rank'), ({**SMALL, f'unet.{LAYER}.lora_A.weight': torch.tensor(1.0)}, None, 'has no rank')]


@pytest.mark.parametrize(('tensors', 'metadata', 'words'), REFUSED)
def test_refused(tensors: Tensors, metadata: dict[str, str] | None, words: str, model64: SDXL, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / 'a.safetensors', metadata=metadata)
    before = predict(model64)
    with pytest.raises(UserError, match=words), attached(model64, tmp_path / 'a.safetensors'):
        pass
    assert torch.equal(predict(model64), before)


@pytest.mark.parametrize(('tensors', 'settings'), [
    ({**SMALL, **pair('')}, {}), (pair(a='lora_A.default.weight', b='lora_B.default.weight'), {}),
    (pair('unet.base_model.model.'), {'alpha': 3}), ({**SMALL, 'step': torch.tensor(3)}, {'ignore_keys': ['step']}),
    ({**SMALL, **NORM}, {})], ids=['equal', 'default', 'alpha', 'ignored', 'norm'])
def test_read_as_the_plain_one(tensors: Tensors, settings: dict[str, Any], model64: SDXL, tmp_path: Path) -> None:
    outputs = []
    for number, (file, more) in enumerate(((SMALL, {}), (tensors, settings))):
        with attached(model64, write(tmp_path / f'{number}.safetensors', file), **more):
            outputs.append(predict(model64))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)


def test_keys_to_ignore_also_while_the_kind_is_found(tmp_path: Path) -> None:
    """`--adapter x=FILE,ignore_keys=...` of a file that detection would refuse."""
    from mmengine.config import Config
    path = write(tmp_path / 'a.safetensors', {**SMALL, 'double_blocks.0.odd': torch.zeros(1)})
    config = Config({'model': {'type': 'SDXL', 'adapters': {}}})
    with pytest.raises(UserError, match='Flux'):
        add_adapter(config, 'x', {'weights': path})
    path = write(tmp_path / 'b.safetensors', {**SMALL, 'step': torch.tensor(3)})
    add_adapter(config, 'x', {'weights': path, 'ignore_keys': ['step']})
    assert config.model.adapters.x.type == 'LoRA'


def test_a_layer_that_alpha_switches_off_does_not_train(model64: SDXL, tmp_path: Path) -> None:
    other = {key.replace('to_q', 'to_k'): value for key, value in SMALL.items()}
    path = write(tmp_path / 'a.safetensors', {**SMALL, **other, f'unet.{LAYER}.alpha': torch.tensor(0.0)})
    with attached(model64, path, trainable=True) as adapter:
        assert len(adapter.all_parameters()) == 4 and len(adapter.trainables()) == 2
        assert adapter.attach_point.endswith(', x 0-1')
