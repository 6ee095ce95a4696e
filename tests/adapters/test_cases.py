"""What every kind of adapter is tested on. The kinds are in tests/kinds.py, pairs of them in test_pairs.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kinds import CASES, SEEDS, Case, build, conditions, pictures, shaken
from parity import PROMPTS, assert_same, grads, make_batch, picture_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL

every = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


def hooks(module: torch.nn.Module) -> int:
    """How many hooks of forward passes there are."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@every
def test_detach_restores_the_base(tiny_base: Path, case: Case) -> None:
    """Equal, changed, equal again, bitwise; and once more."""
    given = conditions(case.config)
    base = SDXL(pretrained=str(tiny_base))
    expected, parts = pictures(base, given), ('unet', 'text_encoder', 'text_encoder_2')
    before = {part: getattr(base, part).state_dict() for part in parts}
    processors = {name: type(p) for name, p in base.unet.attn_processors.items()}
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    for _ in range(2):
        changed = pictures(model, given)
        assert (changed - expected).abs().max() > 1e-3
        adapter = model.adapters.pop('a')
        adapter.detach(model)
        assert torch.equal(pictures(model, given), expected)
        for part in parts:
            module = getattr(model, part)
            assert_same(module.state_dict(), before[part])
            assert hooks(module) == hooks(getattr(base, part))  # transformers has some of its own
        assert {name: type(p) for name, p in model.unet.attn_processors.items()} == processors
        with rng.fork(model.seed, 'adapter', 'a'):
            adapter.attach(model)
        model.adapters['a'] = adapter
        adapter.ready(model)
        shaken(model, case)


@every
def test_scale_zero_is_the_base(tiny_base: Path, case: Case) -> None:
    """Bitwise, in sampling and in training; other scales differ from one another; so is `without_adapters`."""
    base, model = SDXL(pretrained=str(tiny_base)), shaken(build(tiny_base, dict(a=case.config)), case)
    given = conditions(case.config)
    outputs = {}
    for scale in case.scales:
        model.adapters['a'].scale = scale
        outputs[scale] = pictures(model, given)
    expected = pictures(base, given)
    assert torch.equal(outputs[0.0], expected)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == len(case.scales)
    with model.without_adapters():
        assert torch.equal(pictures(model, given), expected)
    assert torch.equal(pictures(model, given), outputs[case.scales[-1]])
    model.adapters['a'].scale = 0.0
    batch = make_batch(2, conditions=given)
    x, t, progress = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.zeros(2, 2)
    with torch.no_grad():
        assert torch.equal(model.predict(x, t, model.encode(batch), progress),
                           base.predict(x, t, base.encode(batch), progress))


@pytest.mark.parametrize('kind', [kind for kind, case in CASES.items() if len(case.scales) == 2])
def test_a_scale_that_a_kind_cannot_do_is_refused(tiny_base: Path, kind: str) -> None:
    with pytest.raises(ValueError, match='0.5'):
        build(tiny_base, dict(a={**CASES[kind].config, 'scale': 0.5}))
    model = build(tiny_base, dict(a=CASES[kind].config))
    with pytest.raises(ValueError, match='0.5'):
        model.adapters['a'].scale = 0.5
    assert model.adapters['a'].scale == 1


@pytest.mark.parametrize('kind', [kind for kind, case in CASES.items() if case.windows])
def test_a_window_is_scale_and_base_in_turn(tiny_base: Path, kind: str) -> None:
    """Inside it each call of the UNet is that of the adapter without a window, outside that of the base."""
    case, outputs = CASES[kind], {}
    for name, window in (('always', (0.0, 1.0)), ('half', (0.0, 0.5))):
        model = shaken(build(tiny_base, dict(a={**case.config, 'window': window})), case)
        found: list[Tensor] = outputs.setdefault(name, [])
        model.unet.register_forward_hook(lambda _m, _a, out, found=found: found.append(out[0].clone()))
        pictures(model, conditions(case.config), steps=4)
        pictures(model, conditions(case.config), steps=4)  # what is off at the end is on again at the next beginning
    same = [torch.equal(a, b) for a, b in zip(outputs['always'], outputs['half'], strict=True)]
    assert same == [True, True, False, False] * 2


@pytest.mark.parametrize('kind', [kind for kind, case in CASES.items() if not case.windows])
def test_a_window_that_a_kind_cannot_have_is_refused(tiny_base: Path, kind: str) -> None:
    with pytest.raises(ValueError, match='window'):
        build(tiny_base, dict(a={**CASES[kind].config, 'window': (0.0, 0.5)}))


@every
def test_a_batch_of_two_is_two_batches_of_one(tiny_base: Path, case: Case) -> None:
    """No sample sees another's input: pictures, loss and gradients (fp64; a batch size changes fp32's last bits)."""
    model = shaken(build(tiny_base, dict(a=case.config), dtype='float64'), case)
    given = conditions(case.config)
    batch = make_batch(2, conditions=given)
    loss, found = grads(model, batch)
    both = pictures(model, given)
    singles, parts = [], []
    for i in range(2):
        one = {k: v[i:i + 1] for k, v in given.items()}
        cut = {k: getattr(batch, k)[i:i + 1] for k in ('text', 'time_ids', 'key', 'epoch', 'seed', 'img')}
        parts.append(grads(model, replace(batch, conditions=one, **cut)))
        singles.append(pictures(model, given, [i]))
    torch.testing.assert_close(both, torch.cat(singles), rtol=1e-8, atol=1e-8)
    # A word that stands in one prompt only has no gradient from the other.
    mean = {k: sum(p[1].get(k, torch.zeros(())) for p in parts) / 2 for k in found}
    assert_same({'loss': loss, **found}, {'loss': (parts[0][0] + parts[1][0]) / 2, **mean}, 1e-10)
    assert both.dtype == torch.float64 and not torch.allclose(both[0], both[1], atol=1e-2)


@pytest.mark.parametrize(('kind', 'window'), [(kind, window) for kind, case in CASES.items()
                                              for window in ((0.0, 1.0), (0.3, 0.9))
                                              if window == (0.0, 1.0) or case.windows])
def test_only_what_is_declared_gets_gradients(tiny_base: Path, kind: str, window: tuple[float, float]) -> None:
    """All of it does, nothing else; with and without gradient checkpointing, bitwise the same."""
    case, results = CASES[kind], []
    for checkpointing in (False, True):
        config = {**case.config, 'window': window}
        model = shaken(build(tiny_base, dict(a=config), gradient_checkpointing=checkpointing), case)
        declared = {n for n, _ in model.trainables()['a']}
        results.append(grads(model, make_batch(2, conditions=conditions(case.config))))
        assert set(results[-1][1]) == declared == set(model.state_dict())
        assert declared == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(g.isfinite().all() and g.any() for g in results[-1][1].values())
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1])


@every
def test_frozen_it_acts_and_does_not_train(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Beside the fine-tuned base too, whose optimizer must not get its weights."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    model.adapters['a'].save(tmp_path / 'a')
    frozen = {**case.config, 'weights': str(tmp_path / 'a'), 'trainable': False}
    others = build(tiny_base, dict(a=frozen), trainable=['unet'])
    given = conditions(case.config)
    torch.testing.assert_close(pictures(others, given), pictures(model, given), rtol=1e-4, atol=1e-4)
    assert set(others.trainables()) == {'unet'}
    theirs = {id(p) for p in others.adapters['a'].owned()}
    assert theirs and not theirs & {id(p) for _, p in others.trainables()['unet']}
    base = SDXL(pretrained=str(tiny_base), trainable=['unet'])
    assert len(others.trainables()['unet']) == len(base.trainables()['unet'])


@every
def test_saved_weights_load_in_the_ecosystem_and_back(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Bitwise the same pictures in stock; read back by `load` and by `weights`, bitwise the same weights."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    model.adapters['a'].save(tmp_path / 'a')
    given = conditions(case.config)
    got = pictures(model, given)
    batch = picture_batch(PROMPTS[:2], SEEDS, conditions=given)
    assert torch.equal(got, case.stock(tiny_base, tmp_path / 'a', batch))
    state = model.state_dict()
    fresh = build(tiny_base, dict(a=case.config), seed=9)
    assert not torch.equal(pictures(fresh, given), got)
    fresh.adapters['a'].load(tmp_path / 'a')
    loaded = build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}), seed=9)
    for other in (fresh, loaded):
        assert_same(other.state_dict(), state)
        assert torch.equal(pictures(other, given), got)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(state)


@every
def test_an_fp64_adapter_survives_its_file(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Nothing is rounded on the way."""
    model = shaken(build(tiny_base, dict(a=case.config), dtype='float64'), case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.adapters['a'].save(tmp_path / 'a')
    model.adapters['a'].load(tmp_path / 'a')
    assert_same(model.state_dict(), before)
    given = build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}), dtype='float64')
    assert_same(given.state_dict(), before)


@every
def test_a_file_that_does_not_fit_is_refused(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """One key missing or misnamed: named, and the adapter stays as it was."""
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.adapters['a'].save(tmp_path / 'a')
    path = min((tmp_path / 'a').rglob('*.safetensors'))
    state = load_file(path)
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata()
    for key in (min(state), max(state)):
        for changed, named in (({k: v for k, v in state.items() if k != key}, key),
                               ({(f'{k}_x' if k == key else k): v for k, v in state.items()}, f'{key}_x')):
            save_file(changed, path, metadata=metadata)
            with pytest.raises(ValueError, match=named.replace('.', r'\.')):
                model.adapters['a'].load(tmp_path / 'a')
            with pytest.raises(ValueError, match=named.replace('.', r'\.')):
                build(tiny_base, dict(a={**case.config, 'weights': str(tmp_path / 'a')}))
    with pytest.raises(ValueError, match='nothing_here'):
        model.adapters['a'].load(tmp_path / 'nothing_here')
    assert_same(model.state_dict(), before)


@every
def test_another_base_is_refused(tiny_base: Path, tmp_path: Path, case: Case) -> None:
    """Weights for other widths: both are named."""
    from diffengine_sdxl.testing import write_tiny_sdxl
    model = build(tiny_base, dict(a=case.config))
    model.adapters['a'].save(tmp_path / 'a')
    wide = write_tiny_sdxl(tmp_path / 'base', channels=(32, 64, 128), cross_attention_dim=128, hidden=64)
    for weights, load in ((str(tmp_path / 'a'), False), (None, True)):
        with pytest.raises(ValueError, match=r'\d+') as said:
            other = build(wide, dict(a={**case.config, 'weights': weights}))
            assert load
            other.adapters['a'].load(tmp_path / 'a')
        assert 'base' in str(said.value) or 'fit' in str(said.value)
