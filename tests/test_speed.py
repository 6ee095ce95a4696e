"""The key `speed`: what is refused before anything loads, and what becomes of 'auto'."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.speed import Memory, Speed, check_settings

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
LORA = {'adapters': {'style': {'type': 'LoRA'}}, 'mixed_precision': 'bf16'}
AUTO = {'compile': 'auto', 'checkpointing': 'auto', 'base_dtype': 'auto'}


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torchao were installed."""
    module = ModuleType('torchao')
    module.__spec__ = pytest.__spec__
    monkeypatch.setitem(sys.modules, 'torchao', module)


@pytest.mark.parametrize(('settings', 'words'), [
    ({'compil': 'off'}, "no setting 'compil'. Did you mean 'compile'?"),
    ({'compile': 'block'}, "speed.compile='block' is unknown; choose one of 'auto', 'off', 'blocks', 'graph'"),
    ({'compile': True}, 'speed.compile=True is unknown'), ({'checkpointing': None}, 'speed.checkpointing=None'),
    ({'base_dtype': 'nf4'}, "speed.base_dtype='nf4' is unknown")])
def test_unknown_names_and_values_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(settings)
    assert words in str(caught.value)


def test_gradient_checkpointing_of_the_model_is_an_alias_of_full() -> None:
    model = {'gradient_checkpointing': True}
    assert Speed.of(None, {}) == Speed.of(AUTO, {}) == Speed() != Speed.of(AUTO, model)
    assert Speed.of(AUTO, model) == Speed.of({'checkpointing': 'full'}, model) == Speed(checkpointing='full')
    with pytest.raises(UserError, match=r'gradient_checkpointing=True means .*full, but .*=.off.; set'):
        Speed.of({'checkpointing': 'off'}, model)


@pytest.mark.parametrize(('speed', 'device', 'model', 'more', 'words'), [
    (Speed(compile='graph'), CUDA, LORA, {'training': True}, "for images only.*'blocks'"),
    (Speed(compile='graph'), CPU, LORA, {}, 'needs CUDA, and the device is cpu'),
    (Speed(compile='graph'), CUDA, LORA, {'offload': True}, 'does not go with offload=True'),
    (Speed(compile='blocks'), CUDA, LORA, {'offload': True}, 'does not go with offload=True'),
    (Speed(compile='blocks'), CUDA, LORA, {'deterministic': True}, 'does not go with randomness.deterministic=True'),
    (Speed(), CUDA, {'attention': 'xformers'}, {'deterministic': True}, "'xformers' has no deterministic backward"),
    (Speed(base_dtype='fp8'), CPU, LORA, {}, "needs a GPU, and the device is cpu; use 'int8'"),
    (Speed(base_dtype='int8'), CPU, LORA, {}, 'needs the package torchao, .* pip install torchao'),
    (Speed(base_dtype='int8'), CPU, {**LORA, 'trainable': ['unet']}, {}, 'frozen base, but unet trains'),
    (Speed(base_dtype='fp16'), CPU, LORA, {}, 'but the config stores the UNet in bf16: set mixed_precision=fp16'),
    (Speed(base_dtype='bf16'), CPU, {}, {}, 'stores the UNet in fp32'),
    (Speed(base_dtype='bf16'), CPU, {**LORA, 'dtype': {'unet': 'float32'}}, {}, 'stores the UNet in fp32'),
    (Speed(base_dtype='bf16'), CPU, {**LORA, 'trainable': ['unet']}, {}, 'stores the UNet in fp32')])
def test_what_cannot_be_is_refused_before_anything_loads(
        speed: Speed, device: torch.device, model: dict[str, Any], more: dict[str, Any], words: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'torchao', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=words):
        speed.check(device, model, **{'training': False, **more})


def test_what_can_be_is_not(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (CPU, CUDA):
        for speed in (Speed(), Speed(compile='blocks'), Speed(checkpointing='full', base_dtype='bf16'),
                      Speed(base_dtype='int8')):
            speed.check(device, LORA, training=True)
    Speed(compile='graph').check(CUDA, {}, training=False)
    Speed().check(CUDA, {**LORA, 'trainable': ['unet']}, training=True, offload=True, deterministic=True)


@pytest.mark.parametrize(('capability', 'refused'), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_asks_for_a_gpu_that_has_it(torchao: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int],
                                        refused: bool) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A100')
    if not refused:
        return Speed(base_dtype='fp8').check(CUDA, LORA, training=True)
    with pytest.raises(UserError, match=r'8\.9 or more; A100 has 8\.[06]\. Use .int8'):
        Speed(base_dtype='fp8').check(CUDA, LORA, training=True)


def test_auto_is_off_on_a_cpu_and_named_values_stay() -> None:
    assert Speed().resolve('cpu', torch.float32, steps=10**6) == Speed('off', 'off', 'fp32')
    assert str(Speed().resolve('cpu', torch.float64)) == 'not compiled, checkpointing off, base fp64'
    named = Speed('blocks', 'full', 'int8')
    assert named.resolve('cpu', torch.bfloat16, steps=1) == named.resolve('cuda', torch.bfloat16) == named
    assert str(named) == 'blocks compiled, checkpointing full, base int8'


@pytest.mark.parametrize(('more', 'compiled'), [
    ({'steps': 200}, 'blocks'), ({'steps': 199}, 'off'), ({}, 'off'), ({'steps': 10**4, 'deterministic': True}, 'off'),
    ({'steps': 10**4, 'offload': True}, 'off'), ({'steps': 10**4, 'attention': 'xformers'}, 'off')])
def test_auto_compiles_on_cuda_where_it_gains(more: dict[str, Any], compiled: str) -> None:
    assert Speed().resolve('cuda', torch.bfloat16, **more) == Speed(compiled, 'off', 'bf16')


@pytest.mark.parametrize(('model', 'batch_size', 'size', 'free', 'checkpointing'), [
    (LORA, 1, 1024, 10, 'off'), (LORA, 2, 1024, 16, 'off'), (LORA, 4, 1024, 16, 'blocks'), (LORA, 4, 1024, 70, 'off'),
    (LORA, 8, 512, 16, 'off'), (LORA, 8, 1024, 16, 'full'), (LORA, 1, 1024, 2, 'full'),
    ({'adapters': {'a': {'type': 'T2IAdapter'}, 'b': None}}, 1, 1024, 6.2, 'off'), (LORA, 1, 1024, 6.2, 'blocks'),
    # A frozen adapter saves nothing of its own; what is not counted counts as a LoRA.
    ({'adapters': {'a': {'type': 'T2IAdapter'}, 'b': {'type': 'LoRA', 'trainable': False}}}, 1, 1024, 6.2, 'off'),
    ({'adapters': {'a': {'type': 'Mine'}}}, 1, 1024, 6.2, 'blocks'),
    # Of a ControlNet less goes; casts of all weights stay.
    ({'adapters': {'a': {'type': 'ControlNet'}}}, 1, 1024, 7, 'full'), ({'trainable': ['unet']}, 1, 1024, 12, 'blocks'),
    ({'trainable': ['unet']}, 1, 1024, 8, 'full')])
def test_auto_checkpoints_by_need(model: dict[str, Any], batch_size: int, size: int, free: float,
                                  checkpointing: str) -> None:
    memory = Memory.of(model, free=int(free * 2**30), trained=10**7, batch_size=batch_size, pixels=size**2,
                       bytes_per_value=2)
    assert Speed().resolve('cuda', torch.bfloat16, memory=memory).checkpointing == checkpointing
    assert Speed(checkpointing='off').resolve('cuda', torch.bfloat16, memory=memory).checkpointing == 'off'


def test_auto_takes_what_was_recorded() -> None:
    recorded = {'compile': 'blocks', 'checkpointing': 'full', 'base_dtype': 'bf16'}
    assert Speed().resolve('cuda', torch.bfloat16, steps=3, recorded=recorded) == Speed('blocks', 'full', 'bf16')
    assert Speed(compile='off').resolve('cuda', torch.bfloat16, recorded=recorded) == Speed('off', 'full', 'bf16')
