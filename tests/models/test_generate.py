"""Images without adapters are bitwise those of a model built without them; images with them don't change."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, shaken
from parity import PROMPTS, assert_same, images, make_batch, picture_batch, t2i
from torch import Tensor, nn

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch

SAMPLER = dict(type='Sampler', num_inference_steps=2)
SEEDS = [3, 8]


@ADAPTERS.register_module(force=True)
class LivesInTheUNet(Adapter):
    """As a LoRA: fp32 weights inside the base, which act wherever the base runs."""

    def attach(self, model: Any) -> None:
        self.on = True
        model.unet.conv_in.register_parameter('extra', nn.Parameter(torch.full((1,), 0.3)))
        self.unet = [model.unet]  # in a list: the UNet is not its child
        model.unet.conv_in.register_forward_hook(
            lambda module, _, out: out + module.extra.to(out.dtype) if self.on else out)

    def trainables(self) -> list[nn.Parameter]:
        return [self.unet[0].conv_in.extra]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True


ADAPTERS_OF = {'none': {}, 't2i': dict(a=t2i()), 'in the unet': dict(b=dict(type='LivesInTheUNet')),
               'both': dict(a=t2i(), b=dict(type='LivesInTheUNet')), 'frozen': dict(a=t2i(trainable=False))}


def batch() -> Batch:
    return picture_batch(PROMPTS[:2], SEEDS, conditions={'conditioning_image': images(2)})


def stacked(samples: list[dict[str, Any]], image_set: str) -> Tensor:
    return torch.stack([sample['images'][image_set] for sample in samples])


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('kind', [k for k in ADAPTERS_OF if k != 'none'])
def test_image_sets_are_bitwise_those_of_separate_models(tiny_base: Path, kind: str, precision: str) -> None:
    """From the same noise, in any order; with fp32 weights in a bf16 UNet too."""
    base = SDXL(pretrained=str(tiny_base), sampler=SAMPLER, mixed_precision=precision)
    model = SDXL(pretrained=str(tiny_base), adapters=ADAPTERS_OF[kind], sampler=SAMPLER, mixed_precision=precision)
    expected = base.decode(base.sampler(base, batch()))
    before = model.decode(model.sampler(model, batch()))
    assert not torch.equal(expected, before)
    for image_sets in (('base', 'adapted'), ('adapted', 'base')):
        samples = model(batch(), mode='predict', image_sets=image_sets)
        assert tuple(samples[0]['images']) == image_sets
        assert torch.equal(stacked(samples, 'base'), expected) and torch.equal(stacked(samples, 'adapted'), before)
    assert torch.equal(stacked(model(batch(), mode='predict', image_sets=['base']), 'base'), expected)
    assert torch.equal(stacked(base(batch(), mode='predict'), 'base'), expected)


@pytest.mark.parametrize('brings', [False, True])
def test_an_adapter_that_casts_nothing_is_under_autocast(tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
                                                         brings: bool) -> None:
    """fp32 weights in a bf16 UNet, of an adapter that does not bring its own precision; without it, the base is not."""
    monkeypatch.setattr(LivesInTheUNet, 'brings_precision', brings)
    model = SDXL(pretrained=str(tiny_base), adapters=ADAPTERS_OF['in the unet'], sampler=SAMPLER,
                 mixed_precision='bf16')
    seen: dict[str, set[bool]] = {'base': set(), 'adapted': set()}
    model.unet.register_forward_pre_hook(
        lambda *_: seen['base' if model.adapters_disabled else 'adapted'].add(torch.is_autocast_enabled('cpu')))
    model(batch(), mode='predict', image_sets=model.image_sets)
    assert seen == {'base': {False}, 'adapted': {not brings}}


def test_an_adapter_that_casts_nothing_stays_as_it_is() -> None:
    """Its `encode` may run a network, which is not under autocast."""
    adapter = Adapter()
    adapter.net = nn.Linear(2, 2)
    adapter.to_compute_dtype(torch.bfloat16)
    assert adapter.net.weight.dtype == torch.float32


def test_fields_of_a_sample(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), adapters=ADAPTERS_OF['t2i'], sampler=SAMPLER)
    assert model.image_sets == ('base', 'adapted')
    samples = model(batch(), mode='predict')
    # By default the images with all adapters only.
    assert [list(sample) for sample in samples] == [['key', 'seed', 'prompt', 'images']] * 2
    assert [(s['key'], s['seed'], s['prompt'], list(s['images'])) for s in samples] == [
        (f'prompt {i}', SEEDS[i], PROMPTS[i], ['adapted']) for i in range(2)]
    image = samples[0]['images']['adapted']
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1


def test_a_model_without_adapters_is_its_base(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), sampler=SAMPLER, trainable=['unet'], objective=dict(type='Denoise'))
    assert model.image_sets == ('base',)
    before = stacked(model(batch(), mode='predict'), 'base')
    with torch.no_grad():
        next(iter(model.unet.parameters())).add_(0.1)
    assert not torch.equal(stacked(model(batch(), mode='predict'), 'base'), before)
    with pytest.raises(UserError, match="image_sets='adapted' is unknown; choose one of 'base'"):
        model(batch(), mode='predict', image_sets=['adapted'])
    with pytest.raises(UserError, match="mode='tensor' is unknown"):
        model(batch(), mode='tensor')


def test_adapters_are_enabled_again(tiny_base: Path) -> None:
    """Also after an error inside, and where contexts are nested; disabled, an adapter needs no input."""
    model = SDXL(pretrained=str(tiny_base), adapters=ADAPTERS_OF['both'], sampler=SAMPLER)
    before = model.decode(model.sampler(model, batch()))
    without = picture_batch(PROMPTS[:2], SEEDS)
    with pytest.raises(UserError, match="'a' reads 'conditioning_image'"):
        model(without, mode='predict')
    assert len(model(without, mode='predict', image_sets=['base'])) == 2
    with pytest.raises(RuntimeError, match='inside'), model.disable_adapters():
        with model.disable_adapters():
            pass
        assert model.adapters_disabled and not model.adapters['b'].on
        raise RuntimeError('inside')
    assert not model.adapters_disabled and model.adapters['b'].on
    assert torch.equal(model.decode(model.sampler(model, batch())), before)


def test_sampling_does_not_change_gradients(tiny_base: Path) -> None:
    """Gradients before and after images of the base are equal, bitwise."""
    model = SDXL(pretrained=str(tiny_base), adapters=ADAPTERS_OF['both'], sampler=SAMPLER,
                 objective=dict(type='Denoise'))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(make_batch(), mode='loss')['loss'].backward()
        return [p.grad.clone() for owned in model.trainables().values() for _, p in owned if p.grad is not None]
    before = gradients()
    model(batch(), mode='predict', image_sets=model.image_sets)
    after = gradients()
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(('precision', 'trains'), [('no', False), ('bf16', False), ('bf16', True)])
def test_images_of_one_adapter_are_those_of_a_model_that_has_no_other(
        tiny_base: Path, precision: str, trains: bool) -> None:
    """Bitwise, of every kind in a set of four; the set itself, and the base, are as before. What trains is fp32."""
    kinds = ('controlnet', 'dora_everywhere', 'ip_adapter', 't2i_adapter')
    configs = {kind: {**CASES[kind].config, 'trainable': trains} for kind in kinds}
    sampler = dict(type='Sampler', num_inference_steps=2)

    def built(*names: str) -> SDXL:
        model = build(tiny_base, {name: {**configs[name], 'trainable': True} for name in names}, sampler=sampler)
        values = {n: p.detach().clone() for n, p in shaken(model, *(CASES[n] for n in names)).named_parameters()
                  if p.requires_grad}
        frozen = build(tiny_base, {name: configs[name] for name in names}, sampler=sampler, mixed_precision=precision)
        with torch.no_grad():
            for name, parameter in frozen.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        return frozen.eval()
    model = built(*kinds)
    batch = picture_batch(['a red circle', ''], [4, 2], conditions=conditions(*configs.values()))

    def made(of: SDXL, *image_sets: str) -> dict[str, Tensor]:
        with torch.no_grad():
            rows = of(batch, mode='predict', image_sets=list(image_sets))
        return {name: torch.stack([row['images'][name] for row in rows]) for name in image_sets}
    assert set(model.only_sets) == {f'only_{kind}' for kind in kinds}
    before = made(model, 'base', 'adapted')
    for kind in kinds:
        alone = made(model, f'only_{kind}')[f'only_{kind}']
        single = built(kind)
        assert torch.equal(alone, made(single, 'adapted')['adapted'])
        with model.only_adapter(kind):  # on CUDA, where autocast computes norms in fp32, this decides on bits
            assert (model.mixed_parts, model.text_adapted) == (single.mixed_parts, single.text_adapted)
        assert not torch.equal(alone, before['base']) and not torch.equal(alone, before['adapted'])
    assert_same(made(model, 'base', 'adapted'), before)
    assert built('t2i_adapter').only_sets == ()


def test_one_adapter_alone_makes_images_as_large_as_all_of_them(tiny_base: Path) -> None:
    """An image prompt, which another adapter reads, does not set the size."""
    kinds = ('ip_adapter', 't2i_adapter')
    configs = {kind: CASES[kind].config for kind in kinds}
    model = build(tiny_base, configs, sampler=dict(type='Sampler', num_inference_steps=1)).eval()
    given = conditions(*configs.values(), num=1)
    given[configs['t2i_adapter']['condition_key']] = images(1, (96, 128))
    with torch.no_grad():
        [made] = model(replace(picture_batch([''], [1], size=(96, 128), conditions=given), size=None),
                       mode='predict', image_sets=['adapted', *model.only_sets])
    assert {name: tuple(image.shape[1:]) for name, image in made['images'].items()} == dict.fromkeys(
        ('adapted', *model.only_sets), (96, 128))
