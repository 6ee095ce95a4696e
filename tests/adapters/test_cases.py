"""What every kind of adapter is tested on. A new kind is one line in CASES."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import PROMPTS, assert_same, generators, grads, images, make_batch, picture_batch, sampler, stock
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch

SEEDS = [4, 2]
Stock = Callable[[Path, Path, Batch], Tensor]


@dataclass(frozen=True)
class Case:
    """A kind of adapter.

    Attributes:
        config: its config; where it `reads` something, a picture of the sample's size stands there.
        stock: (base, exported folder, batch) -> latents of the ecosystem's own loader and pipeline, 3 Euler steps.
        additive: its effect adds to others', so that order changes nothing.
        scales: scale 0 is the base, bitwise.
    """

    config: dict[str, Any]
    stock: Stock
    additive: bool = True
    scales: bool = True


def stock_t2i(base: Path, folder: Path, batch: Batch) -> Tensor:
    """diffusers' T2IAdapter in its pipeline."""
    from diffusers import T2IAdapter
    pipeline = stock(base, 'StableDiffusionXLAdapterPipeline', adapter=T2IAdapter.from_pretrained(folder))
    return pipeline(batch.text, image=batch.conditions['conditioning_image'], height=64, width=64,
                    num_inference_steps=3, generator=generators(SEEDS), output_type='latent').images


CASES: dict[str, Case] = {
    't2i_adapter': Case(dict(type='T2IAdapter', reads='conditioning_image'), stock_t2i),
}
PAIRS = [*permutations(CASES, 2), *((kind, kind) for kind in CASES)]

every = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


def conditions(*cases: Case) -> dict[str, Tensor]:
    """A picture for everything that is read."""
    return {c.config['reads']: images(2, seed=i) for i, c in enumerate(cases) if c.config.get('reads')}


def build(base: Path, adapters: dict[str, Any], **settings: Any) -> SDXL:
    """A model that can train."""
    return SDXL(pretrained=str(base), adapters=adapters, objective=dict(type='Denoise'), **settings)


def pictures(model: SDXL, *cases: Case, **changes: Any) -> Tensor:
    """Latents of two pictures."""
    batch = picture_batch(PROMPTS[:2], SEEDS, conditions=conditions(*cases))
    return sampler(steps=3)(model, replace(batch, **changes))


def shaken(model: SDXL) -> SDXL:
    """The model with trained-looking adapters: none may be an identity, as a fresh LoRA is."""
    with torch.no_grad():
        for name, parameters in model.trainables().items():
            for i, (_, parameter) in enumerate(parameters):
                noise = torch.randn(parameter.shape, generator=rng.generator('shaken', name, i))
                parameter.add_(0.02 * noise.to(parameter.dtype))
    return model


@every
def test_detach_restores_the_base(tiny_base: Path, case: Case) -> None:
    """Equal, changed, equal again, bitwise; and once more."""
    expected = pictures(SDXL(pretrained=str(tiny_base)))
    before = {k: v.clone() for k, v in SDXL(pretrained=str(tiny_base)).unet.state_dict().items()}
    model = shaken(build(tiny_base, dict(a=case.config)))
    for _ in range(2):
        changed = pictures(model, case)
        assert (changed - expected).abs().max() > 1e-3
        adapter = model.adapters.pop('a')
        adapter.detach(model)
        assert torch.equal(pictures(model, case), expected)
        assert model.unet.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())
        with rng.fork(model.seed, 'adapter', 'a'):
            adapter.attach(model)
        model.adapters['a'] = adapter
        adapter.ready(model)


@every
def test_scale_zero_is_the_base(tiny_base: Path, case: Case) -> None:
    """Bitwise, in sampling and in training; other scales differ from one another."""
    if not case.scales:
        pytest.skip('scaling this kind to 0 is not the base; it is disabled instead')
    base, model = SDXL(pretrained=str(tiny_base)), shaken(build(tiny_base, dict(a=case.config)))
    outputs = {}
    for scale in (0.0, 0.5, 1.0):
        model.adapters['a'].scale = scale
        outputs[scale] = pictures(model, case)
    assert torch.equal(outputs[0.0], pictures(base))
    assert not torch.equal(outputs[0.5], outputs[1.0]) and not torch.equal(outputs[0.5], outputs[0.0])
    model.adapters['a'].scale = 0.0
    batch = make_batch(2, conditions=conditions(case))
    x, t, progress = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.zeros(2, 2)
    with torch.no_grad():
        assert torch.equal(model.predict(x, t, model.encode(batch), progress),
                           base.predict(x, t, base.encode(batch), progress))


@every
def test_a_window_is_scale_and_base_in_turn(tiny_base: Path, case: Case) -> None:
    """Inside it each call of the UNet is that of the adapter without a window, outside that of the base."""
    outputs: dict[str, list[Tensor]] = {}
    for kind, window in (('always', (0.0, 1.0)), ('half', (0.0, 0.5))):
        model = shaken(build(tiny_base, dict(a={**case.config, 'window': window})))
        found = outputs.setdefault(kind, [])
        model.unet.register_forward_hook(lambda _m, _a, out, found=found: found.append(out[0].clone()))
        batch = picture_batch(PROMPTS[:2], SEEDS, conditions=conditions(case))
        sampler(steps=4)(model, batch)
    assert [torch.equal(a, b) for a, b in zip(*outputs.values(), strict=True)] == [True, True, False, False]


@every
def test_a_batch_of_two_is_two_batches_of_one(tiny_base: Path, case: Case) -> None:
    """No sample sees another's input: pictures, loss and gradients (fp64; a batch size changes fp32's last bits)."""
    model = shaken(build(tiny_base, dict(a=case.config), dtype='float64'))
    batch = make_batch(2, conditions=conditions(case))
    loss, found = grads(model, batch)
    both = pictures(model, case)
    singles, parts = [], []
    for i in range(2):
        one = {k: v[i:i + 1] for k, v in batch.conditions.items()}
        cut = {k: getattr(batch, k)[i:i + 1] for k in ('text', 'time_ids', 'key', 'epoch', 'seed', 'img')}
        parts.append(grads(model, replace(batch, conditions=one, **cut)))
        singles.append(sampler(steps=3)(model, picture_batch(
            PROMPTS[i:i + 1], SEEDS[i:i + 1], conditions={k: v[i:i + 1] for k, v in conditions(case).items()})))
    torch.testing.assert_close(both, torch.cat(singles), rtol=1e-8, atol=1e-8)
    mean = {k: (parts[0][1][k] + parts[1][1][k]) / 2 for k in found}
    assert_same({'loss': loss, **found}, {'loss': (parts[0][0] + parts[1][0]) / 2, **mean}, 1e-10)
    assert both.dtype == torch.float64 and not torch.allclose(both[0], both[1], atol=1e-2)


@every
@pytest.mark.parametrize('window', [(0.0, 1.0), (0.3, 0.9)])
def test_only_what_is_declared_gets_gradients(tiny_base: Path, case: Case, window: tuple[float, float]) -> None:
    """All of it does, nothing else; with and without gradient checkpointing, bitwise the same."""
    results = []
    for checkpointing in (False, True):
        config = {**case.config, 'window': window}
        model = shaken(build(tiny_base, dict(a=config), gradient_checkpointing=checkpointing))
        declared = {n for n, _ in model.trainables()['a']}
        results.append(grads(model, make_batch(2, conditions=conditions(case))))
        assert set(results[-1][1]) == declared == set(model.state_dict())
        assert declared == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(g.isfinite().all() and g.any() for g in results[-1][1].values())
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1])


@every
def test_saved_weights_load_in_the_ecosystem_and_back(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Bitwise the same pictures in stock; read back by `load` and by `weights`, bitwise the same weights."""
    model = shaken(build(tiny_base, dict(a=case.config)))
    model.adapters['a'].save(tmp_path / 'a')
    got = pictures(model, case)
    batch = picture_batch(PROMPTS[:2], SEEDS, conditions=conditions(case))
    assert torch.equal(got, case.stock(tiny_base, tmp_path / 'a', batch))
    state = model.state_dict()
    fresh = build(tiny_base, dict(a=case.config), seed=9)
    assert not torch.equal(pictures(fresh, case), got)
    fresh.adapters['a'].load(tmp_path / 'a')
    given = build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}), seed=9)
    for other in (fresh, given):
        assert_same(other.state_dict(), state)
        assert torch.equal(pictures(other, case), got)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(state)


@every
def test_an_fp64_adapter_survives_its_file(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Nothing is rounded on the way."""
    model = shaken(build(tiny_base, dict(a=case.config), dtype='float64'))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.adapters['a'].save(tmp_path / 'a')
    model.adapters['a'].load(tmp_path / 'a')
    assert_same(model.state_dict(), before)
    given = build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}), dtype='float64')
    assert_same(given.state_dict(), before)


@every
def test_a_file_that_does_not_fit_is_refused(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """One key missing or misnamed: named, and the adapter stays as it was."""
    model = shaken(build(tiny_base, dict(a=case.config)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.adapters['a'].save(tmp_path / 'a')
    path, = (tmp_path / 'a').glob('*.safetensors')
    state = load_file(path)
    for key in (min(state), max(state)):
        for changed, named in (({k: v for k, v in state.items() if k != key}, key),
                               ({(f'{k}_x' if k == key else k): v for k, v in state.items()}, f'{key}_x')):
            save_file(changed, path, metadata={'format': 'pt'})
            with pytest.raises(ValueError, match=named.replace('.', r'\.')):
                model.adapters['a'].load(tmp_path / 'a')
            with pytest.raises(ValueError, match=named.replace('.', r'\.')):
                build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}))
    with pytest.raises(ValueError, match='nothing_here'):
        model.adapters['a'].load(tmp_path / 'nothing_here')
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(('first', 'second'), PAIRS)
def test_pairs_compose_in_both_orders(tiny_base: Path, first: str, second: str) -> None:
    """Both act; for additive kinds the order of the config changes nothing, bitwise; detaching one leaves the other."""
    one, two = CASES[first], CASES[second]
    if one.config.get('reads') and one.config.get('reads') == two.config.get('reads'):
        two = replace(two, config={**two.config, 'reads': 'another'})
    configs = {'a': one.config, 'b': two.config}
    models = [shaken(build(tiny_base, {n: configs[n] for n in order})) for order in ('ab', 'ba')]
    together = [pictures(m, one, two) for m in models]
    if one.additive and two.additive:
        assert torch.equal(*together)
    results = [grads(m, make_batch(2, conditions=conditions(one, two))) for m in models]
    assert_same(results[0][1], results[1][1], 0.0 if one.additive and two.additive else 1e-5)
    alone = pictures(shaken(build(tiny_base, {'a': one.config})), one, two)
    assert not torch.equal(together[0], alone)
    models[0].adapters.pop('b').detach(models[0])
    assert torch.equal(pictures(models[0], one, two), alone)
