"""A quantized base: adapters train over it, their exports are unaffected, and their own layers stay."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, shaken
from parity import assert_same, grads, make_batch
from safetensors.torch import load_file
from torch import nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.models import apply_speed as apply_module
from diffengine_sdxl.models.apply_speed import apply_speed, quantize
from diffengine_sdxl.speed import Speed


def test_each_setting_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks of an adapter's own network too; text encoders that train recompute with 'full'."""
    calls: list[Any] = []
    for name in ('compile_blocks', 'set_checkpointing', 'UNetGraphs', 'quantize'):
        monkeypatch.setattr(apply_module, name, lambda *args, name=name: calls.append((name, *args)))
    encoder = SimpleNamespace(gradient_checkpointing_enable=lambda: calls.append(('text',)))
    model: Any = SimpleNamespace(unet='unet', adapters={'a': 'net'}, trainable_parts=('text_encoder',),
                                 text_encoder=encoder)
    for speed, expected in (
            (Speed('off', 'off', 'bf16'), []),
            (Speed('off', 'blocks', 'fp32'), [('set_checkpointing', 'unet', 'blocks')]),
            (Speed('blocks', 'full', 'fp8'), [
                ('quantize', model, 'fp8'), ('set_checkpointing', 'unet', 'full'), ('text',),
                ('compile_blocks', 'unet'), ('compile_blocks', 'net')]),
            (Speed('graph', 'off', 'bf16'), [('UNetGraphs', model)])):
        calls.clear()
        apply_speed(model, speed)
        assert calls == expected


def test_what_is_quantized(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's linear layers in transformer blocks, in wrappers too: none of an adapter's, though it is frozen."""
    config = dict(CASES['lora'].config, targets=['to_q', 'ff.net.0.proj', 'proj_in'])
    build(tiny_base, dict(a=config)).adapters['a'].save(tmp_path / 'a')
    model = build(tiny_base, dict(a={**config, 'weights': str(tmp_path / 'a'), 'trainable': False}))
    chosen: list[str] = []
    stub: Any = ModuleType('torchao.quantization')
    stub.Int8WeightOnlyConfig, stub.Float8WeightOnlyConfig = (lambda: 'int8'), (lambda: 'fp8')
    stub.quantize_ = lambda unet, config, filter_fn: chosen.extend(
        [config, *(name for name, module in unet.named_modules() if filter_fn(module, name))])
    monkeypatch.setitem(sys.modules, 'torchao.quantization', stub)
    for name in ('fp8', 'int8'):
        chosen.clear()
        apply_speed(model, Speed('off', 'off', name))
        assert chosen[0] == name and not any('lora' in layer for layer in chosen)
        with lora_layers.unwrapped(model.unet):
            assert sorted(layer.replace('.base_layer', '') for layer in chosen[1:]) == sorted(
                layer for layer, module in model.unet.named_modules()
                if isinstance(module, nn.Linear) and 'transformer_blocks' in layer)


@pytest.mark.parametrize('kind', ['lora', 'oft', 'ip_adapter', 'controlnet'])
def test_adapters_train_over_an_int8_base(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Loss and gradients move by what 8 bits lose, and an export is what it would be."""
    pytest.importorskip('torchao', reason='torchao, which `speed.base_dtype` needs, is not installed')
    case = CASES[kind]
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    batch = make_batch(2, conditions=conditions(case.config))
    model.adapters['a'].save(tmp_path / 'before')
    loss, gradients = grads(model, batch)
    keys, size = set(model.state_dict()), sum(p.numel() for p in model.unet.parameters())
    quantize(model, 'int8')
    new_loss, new_gradients = grads(model, batch)
    assert 0 < abs(float(new_loss / loss) - 1) < 2e-3
    old, new = (torch.cat([g.flatten() for _, g in sorted(x.items())]) for x in (gradients, new_gradients))
    assert 0 < float((new - old).norm() / old.norm()) < 0.05
    model.adapters['a'].save(tmp_path / 'after')
    for path in (tmp_path / 'before').rglob('*.safetensors'):
        assert_same(load_file(path), load_file(tmp_path / 'after' / path.relative_to(tmp_path / 'before')))
    assert set(model.state_dict()) == keys and sum(p.numel() for p in model.unet.parameters()) == size
