"""CPU offload: bitwise the same image, with one component at a time on the device.

Without a second device, the tests check which component the hook has moved there whenever a layer computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from mmengine.config import Config
from PIL import Image

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.inference.offload import PARTS, offload_models
from diffengine_sdxl.testing import draw_circle, write_tiny_refiner

TEXT, REST = ['text_encoder', 'text_encoder_2'], ['unet', 'vae']
IMAGE = draw_circle(1)[0]
#: Settings of a call, and the components in the order of their first use.
CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    'text': ({}, [*TEXT, *REST]), 'latents': (dict(output_type='latent'), [*TEXT, 'unet']),
    'weighted': (dict(prompt='a (circle)1.4', prompt_syntax='compel'), [*TEXT, *REST]),
    'image': (dict(image=IMAGE, strength=0.7), ['vae', *TEXT, 'unet']),
    'inpaint': (dict(image=IMAGE, mask_image=Image.new('L', (64, 64), 255)), ['vae', *TEXT, 'unet'])}


@contextmanager
def watched(inferencer: SDXLInferencer) -> Iterator[list[str]]:
    """Collect the components in the order of their use; fail if a layer computes while another one is on the device."""
    offload = inferencer.offload_hook
    assert offload is not None
    parts = {id(part): (name if model is inferencer.model else f'refiner {name}', part)
             for model in inferencer.models[::-1] for name in PARTS
             if (part := getattr(model, name)) is not None}
    order: list[str] = []

    def look(name: str, part: Any) -> Any:
        def hook(layer: Any, _: Any) -> None:
            assert offload.part is part, f'{type(layer).__name__} of the {name} computes, and it is not on the device'
            if order[-1:] != [name]:
                order.append(name)
        return hook
    handles = [layer.register_forward_pre_hook(look(name, part)) for name, part in parts.values()
               for layer in part.modules() if not list(layer.children())]
    yield order
    for handle in handles:
        handle.remove()
    assert offload.part is None, 'nothing stays on the device'


def config(base: Path, offload: bool, **sections: Any) -> Config:
    """Return a config with CFG, and self-attention guidance for a part of the steps."""
    guidances = [dict(type='CFG', scale=5.0), dict(type='SAG', scale=0.5, active_range=(0.0, 0.7))]
    model = dict(type='SDXL', pretrained=str(base), adapters=sections.pop('adapters', {}),
                 sampler=dict(type='Sampler', num_inference_steps=3, guidances=guidances))
    return Config(dict(model=model, infer_cfg=dict(prompt='a circle', offload=offload, height=64, width=64),
                       **sections))


@pytest.fixture(scope='module')
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SDXLInferencer, SDXLInferencer]:
    """Without and with offload; a LoRA in all components, and an IP-Adapter."""
    folder = tmp_path_factory.mktemp('adapters')
    cases = dict(style=CASES['lora_everywhere'], look=CASES['ip_adapter'])
    model = shaken(build(tiny_base, {name: case.config for name, case in cases.items()}), *[
        cases[name] for name in sorted(cases)])
    for name, adapter in model.adapters.items():
        adapter.save(folder / name)
    look = dict(type='IPAdapter', weights=str(folder / 'look'), image_encoder=str(tiny_base.parent / 'image_encoder'),
                image_encoder_subfolder=None)
    adapters = dict(style=dict(type='LoRA', weights=str(folder / 'style')), look=look)
    plain, offloaded = (SDXLInferencer(config(tiny_base, offload, adapters=adapters), device='cpu')
                        for offload in (False, True))
    return plain, offloaded


@pytest.mark.parametrize('asked', CALLS)
def test_one_part_at_a_time(pair: tuple[SDXLInferencer, SDXLInferencer], asked: str) -> None:
    """Twice, as the second call starts where the first ended."""
    plain, offloaded = pair
    call = {**dict(output_type='pt', conditions=dict(look=IMAGE)), **CALLS[asked][0]}
    expected = plain(**call)
    for _ in range(2):
        with watched(offloaded) as order:
            assert torch.equal(offloaded(**call), expected)
        # Each half of guidance calls both text encoders, which replace a VAE that encoded an image.
        assert list(dict.fromkeys(order)) == CALLS[asked][1] and order[-1] == ('unet' if asked == 'latents' else 'vae')
        assert order.count('unet') == 1 or 'text_encoder' in order[order.index('unet'):]


def test_after_an_error_nothing_stays(pair: tuple[SDXLInferencer, SDXLInferencer]) -> None:
    offloaded = pair[1]

    def stop(*_: Any) -> None:
        raise RuntimeError('stopped')
    with watched(offloaded) as order, pytest.raises(RuntimeError, match='stopped'):
        offloaded(conditions=dict(look=IMAGE), on_step=stop)
    assert order[-1] == 'unet'


def test_a_refiner_takes_turns_with_the_base(tiny_base: Path, tmp_path: Path) -> None:
    """Two components are shared with the base; the UNets are never on the device together."""
    refiner = dict(type='SDXL', pretrained=str(write_tiny_refiner(tmp_path / 'refiner')),
                   shared_components=['text_encoder_2', 'vae'], sampler=dict(type='Sampler', num_inference_steps=3))
    plain, offloaded = (SDXLInferencer(config(tiny_base, offload, refiner=refiner), device='cpu')
                        for offload in (False, True))
    expected = plain(denoising_end=0.5, num_inference_steps=4, output_type='pt')
    with watched(offloaded) as order:
        assert torch.equal(offloaded(denoising_end=0.5, num_inference_steps=4, output_type='pt'), expected)
    assert order[-4:] == ['unet', 'text_encoder_2', 'refiner unet', 'vae']


def test_parts_wait_in_the_cpus_memory(tiny_base: Path) -> None:
    """They are moved to the device and back. Nothing computes on 'meta', so the hooks are called directly."""
    inferencer = SDXLInferencer(config(tiny_base, False), device='cpu')
    model, moves = inferencer.model, []
    for name in PARTS:
        part = getattr(model, name)
        part.to = lambda device, name=name, part=part: (moves.append((name, str(device))), part)[1]
    hook = offload_models([model], torch.device('meta'))
    assert moves == [(name, 'cpu') for name in PARTS] and model.device == torch.device('meta')
    moves.clear()
    for name in ('vae', 'unet', 'unet'):
        args, _ = getattr(model, name)._hf_hook.pre_forward(getattr(model, name), torch.zeros(1))
        assert args[0].device.type == 'meta'
    hook.release()
    hook.release()
    assert moves == [('vae', 'meta'), ('vae', 'cpu'), ('unet', 'meta'), ('unet', 'cpu')]


@pytest.mark.parametrize('name', ['cuda:99', 'gpu', 'cpu:x'])
def test_a_device_that_is_not_there(name: str, tiny_base: Path) -> None:
    """Refused before anything loads."""
    with pytest.raises(UserError, match=rf"device='{name}' cannot be used here: \S"):
        SDXLInferencer(config(tiny_base, False), device=name)
