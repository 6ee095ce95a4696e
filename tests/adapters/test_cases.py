"""The tests of every kind of adapter. The kinds are in tests/kinds.py, pairs of them in test_pairs.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kinds import CASES, SEEDS, Case, build, conditions, sample, shaken
from parity import PROMPTS, assert_same, grads, make_batch, picture_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_sdxl

every = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


def hooks(module: torch.nn.Module) -> int:
    """Count the hooks of forward passes."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture(scope='module')
def base(model: SDXL) -> SDXL:
    """The base alone. Don't change it."""
    return model


@pytest.fixture(scope='module')
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of other widths."""
    return write_tiny_sdxl(tmp_path_factory.mktemp('wide') / 'base', channels=(32, 64, 128), cross_attention_dim=128,
                           hidden=64)


@every
def test_detach_restores_the_base(tiny_base: Path, base: SDXL, case: Case) -> None:
    """Equal, changed, equal again, bitwise; and once more."""
    inputs = conditions(case.config)
    expected, parts = sample(base, inputs), ('unet', 'text_encoder', 'text_encoder_2')
    before = {part: getattr(base, part).state_dict() for part in parts}
    processors = {name: type(p) for name, p in base.unet.attn_processors.items()}
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    for _ in range(2):
        changed = sample(model, inputs)
        assert (changed - expected).abs().max() > 1e-3
        adapter = model.adapters.pop('a')
        adapter.detach(model)
        assert torch.equal(sample(model, inputs), expected)
        for part in parts:
            module = getattr(model, part)
            assert_same(module.state_dict(), before[part])
            assert hooks(module) == hooks(getattr(base, part))  # transformers has some of its own
        assert {name: type(p) for name, p in model.unet.attn_processors.items()} == processors
        with rng.fork(model.seed, 'adapter', 'a'):
            adapter.attach(model)
        model.adapters['a'] = adapter
        shaken(model, case)


@every
def test_scale_zero_is_the_base(tiny_base: Path, base: SDXL, case: Case) -> None:
    """Bitwise, in sampling and in training, as `disable_adapters` is; other scales differ from one another."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    inputs = conditions(case.config)
    outputs = {}
    for scale in case.scales:
        model.adapters['a'].scale = scale
        outputs[scale] = sample(model, inputs)
    expected = sample(base, inputs)
    assert torch.equal(outputs[0.0], expected)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == len(case.scales)
    with model.disable_adapters():
        assert torch.equal(sample(model, inputs), expected)
    assert torch.equal(sample(model, inputs), outputs[case.scales[-1]])
    model.adapters['a'].scale = 0.0
    batch = make_batch(2, conditions=inputs)
    x, t, progress = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.zeros(2, 2)
    with torch.no_grad():  # in a batch, as text encoders that are adapted are called
        assert torch.equal(model.predict(x, t, model.encode(batch, by_row=False), progress),
                           base.predict(x, t, base.encode(batch, by_row=False), progress))


@pytest.mark.parametrize('kind', [kind for kind, case in CASES.items() if len(case.scales) == 2])
def test_an_unsupported_scale_is_refused(tiny_base: Path, kind: str) -> None:
    with pytest.raises(UserError, match='0.5'):
        build(tiny_base, dict(a={**CASES[kind].config, 'scale': 0.5}))
    model = build(tiny_base, dict(a=CASES[kind].config))
    with pytest.raises(UserError, match='0.5'):
        model.adapters['a'].scale = 0.5
    assert model.adapters['a'].scale == 1


@pytest.mark.parametrize('kind', [kind for kind, case in CASES.items() if case.active_ranges])
def test_an_active_range_is_scale_and_base_in_turn(tiny_base: Path, kind: str) -> None:
    """Each call of the UNet inside it is that of the adapter without a range, outside that of the base."""
    case, outputs = CASES[kind], {}
    for name, active_range in (('always', (0.0, 1.0)), ('half', (0.0, 0.5))):
        model = shaken(build(tiny_base, dict(a={**case.config, 'active_range': active_range})), case)
        calls: list[Tensor] = outputs.setdefault(name, [])
        model.unet.register_forward_hook(lambda _m, _a, out, calls=calls: calls.append(out[0].clone()))
        sample(model, conditions(case.config), steps=4)
        sample(model, conditions(case.config), steps=4)  # it is on again when the next run begins
    same = [torch.equal(a, b) for a, b in zip(outputs['always'], outputs['half'], strict=True)]
    assert same == [True, True, False, False] * 2


@pytest.mark.parametrize('kind', [kind for kind, case in CASES.items() if not case.active_ranges])
def test_an_unsupported_active_range_is_refused(tiny_base: Path, kind: str) -> None:
    with pytest.raises(UserError, match='active_range'):
        build(tiny_base, dict(a={**CASES[kind].config, 'active_range': (0.0, 0.5)}))


@every
def test_a_batch_of_two_is_two_batches_of_one(tiny_base: Path, case: Case) -> None:
    """No sample sees another's input: latents, loss and gradients (fp64; a batch size changes fp32's last bits)."""
    model = shaken(build(tiny_base, dict(a=case.config), dtype='float64'), case)
    inputs = conditions(case.config)
    batch = make_batch(2, conditions=inputs)
    loss, gradients = grads(model, batch)
    both = sample(model, inputs)
    singles, parts = [], []
    for i in range(2):
        one = {k: v[i:i + 1] for k, v in inputs.items()}
        cut = {k: getattr(batch, k)[i:i + 1] for k in ('text', 'time_ids', 'key', 'epoch', 'seed', 'img')}
        parts.append(grads(model, replace(batch, conditions=one, **cut)))
        singles.append(sample(model, inputs, [i]))
    torch.testing.assert_close(both, torch.cat(singles), rtol=1e-8, atol=1e-8)
    # A word that stands in one prompt only has no gradient from the other.
    mean = {k: sum(p[1].get(k, torch.zeros(())) for p in parts) / 2 for k in gradients}
    assert_same({'loss': loss, **gradients}, {'loss': (parts[0][0] + parts[1][0]) / 2, **mean}, 1e-10)
    assert both.dtype == torch.float64 and not torch.allclose(both[0], both[1], atol=1e-2)


@pytest.mark.parametrize(('kind', 'active_range'), [
    (kind, active_range) for kind, case in CASES.items() for active_range in ((0.0, 1.0), (0.3, 0.9))
    if active_range == (0.0, 1.0) or case.active_ranges])
def test_only_what_is_declared_gets_gradients(tiny_base: Path, kind: str, active_range: tuple[float, float]) -> None:
    """All of it does, with and without gradient checkpointing, bitwise the same."""
    case, results = CASES[kind], []
    for checkpointing in (False, True):
        config = {**case.config, 'active_range': active_range}
        model = shaken(build(tiny_base, dict(a=config), gradient_checkpointing=checkpointing), case)
        declared = {n for n, _ in model.trainables()['a']}
        results.append(grads(model, make_batch(2, conditions=conditions(case.config))))
        assert set(results[-1][1]) == declared == set(model.state_dict())
        assert declared == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(g.isfinite().all() and g.any() for g in results[-1][1].values())
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1])


@every
def test_a_frozen_adapter_acts_but_does_not_train(tiny_base: Path, base: SDXL, tmp_path: Path, case: Case) -> None:
    """Also beside a fine-tuned base, whose optimizer must not get its weights."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    model.adapters['a'].save(tmp_path / 'a')
    frozen = {**case.config, 'weights': str(tmp_path / 'a'), 'trainable': False}
    others = build(tiny_base, dict(a=frozen), trainable=['unet'])
    inputs = conditions(case.config)
    torch.testing.assert_close(sample(others, inputs), sample(model, inputs), rtol=1e-4, atol=1e-4)
    assert set(others.trainables()) == {'unet'}
    parameters = {id(p) for p in others.adapters['a'].all_parameters()}
    assert parameters and not parameters & {id(p) for _, p in others.trainables()['unet']}
    assert len(others.trainables()['unet']) == len(list(base.unet.parameters()))


@every
def test_saved_weights_load_in_the_ecosystem_and_back(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Bitwise the same latents in diffusers; bitwise the same weights, read by `load` and by `weights`."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    model.adapters['a'].save(tmp_path / 'a')
    inputs = conditions(case.config)
    got = sample(model, inputs)
    batch = picture_batch(PROMPTS[:2], SEEDS, conditions=inputs)
    assert torch.equal(got, case.stock(tiny_base, tmp_path / 'a', batch))
    state = model.state_dict()
    fresh = build(tiny_base, dict(a=case.config), seed=9)
    assert not torch.equal(sample(fresh, inputs), got)
    fresh.adapters['a'].load(tmp_path / 'a')
    loaded = build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}), seed=9)
    for other in (fresh, loaded):
        assert_same(other.state_dict(), state)
        assert torch.equal(sample(other, inputs), got)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(state)


@every
def test_an_fp64_adapter_survives_its_file(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Nothing is rounded on the way."""
    model = shaken(build(tiny_base, dict(a=case.config), dtype='float64'), case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.adapters['a'].save(tmp_path / 'a')
    model.adapters['a'].load(tmp_path / 'a')
    assert_same(model.state_dict(), before)
    loaded = build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}), dtype='float64')
    assert_same(loaded.state_dict(), before)


@every
def test_a_file_that_does_not_fit_is_refused(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """One key missing or misnamed: the error names it, and the adapter is unchanged."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.adapters['a'].save(tmp_path / 'a')
    path = min((tmp_path / 'a').rglob('*.safetensors'))
    state = load_file(path)
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata()
    if set(state) == {'clip_l', 'clip_g'}:
        state['clip_l'] = state['clip_l'][:, :-1].contiguous()  # either alone is a word of one encoder
        save_file(state, path, metadata=metadata)
        with pytest.raises(UserError, match='31 wide for text_encoder'):
            model.adapters['a'].load(tmp_path / 'a')
        state = {}
    for key in (min(state), max(state)) if state else ():
        for changed, named in (({k: v for k, v in state.items() if k != key}, key),
                               ({(f'{k}_x' if k == key else k): v for k, v in state.items()}, f'{key}_x')):
            save_file(changed, path, metadata=metadata)
            with pytest.raises(UserError, match=named.replace('.', r'\.')):
                model.adapters['a'].load(tmp_path / 'a')
        with pytest.raises(UserError, match=named.replace('.', r'\.')):
            build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}))
    with pytest.raises(UserError, match='nothing_here'):
        model.adapters['a'].load(tmp_path / 'nothing_here')
    assert_same(model.state_dict(), before)


@every
def test_another_base_is_refused(tiny_base: Path, wide: Path, tmp_path: Path, case: Case) -> None:
    """Weights for other widths: the error names both."""
    model = build(tiny_base, dict(a=case.config))
    model.adapters['a'].save(tmp_path / 'a')
    for weights, load in ((str(tmp_path / 'a'), False), (None, True)):
        with pytest.raises(UserError, match=r'\d+') as refusal:
            other = build(wide, dict(a={**case.config, 'weights': weights}))
            assert load
            other.adapters['a'].load(tmp_path / 'a')
        assert 'base' in str(refusal.value) or 'fit' in str(refusal.value)
