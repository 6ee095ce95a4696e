"""Noises against their formulas, written out here for each sample."""

import pytest
import torch

from diffengine_sdxl.registry import NOISES
from diffengine_sdxl.rng import Draws, generator

SHAPE = (4, 12, 16)
KINDS = [dict(type='PlainNoise'), dict(type='OffsetNoise', strength=0.3), dict(type='PyramidNoise'),
         dict(type='InputPerturbation'),
         dict(type='InputPerturbation', inner=dict(type='OffsetNoise', inner=dict(type='PyramidNoise')))]


def draws(names='abc', epoch=1):
    return Draws(torch.full((len(names),), 7), list(names), torch.full((len(names),), epoch))


def normal(name, stream, shape, epoch=1):
    return torch.randn(shape, generator=generator(7, name, epoch, stream))


def base(names='abc'):
    return torch.stack([normal(n, 'noise', SHAPE) for n in names])


@pytest.mark.parametrize('cfg', KINDS)
def test_a_sample_does_not_depend_on_its_batch(cfg):
    noise = NOISES.build(cfg)
    both = noise(draws('abc'), SHAPE)
    for row, name in enumerate('abc'):
        alone = noise(draws(name), SHAPE)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, both, strict=True))
    assert not torch.equal(both[0], noise(draws('abc', epoch=2), SHAPE)[0])
    assert both[0].shape == both[1].shape == (3, *SHAPE) and both[0].dtype == torch.float32


@pytest.mark.parametrize('cfg', KINDS)
def test_dtype_is_a_rounding_of_the_fp32_draw(cfg):
    noise = NOISES.build(cfg)
    for half, full in zip(noise(draws(), SHAPE, torch.bfloat16, torch.device('cpu')), noise(draws(), SHAPE),
                          strict=True):
        assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


def test_plain():
    noise, for_input = NOISES.build(dict(type='PlainNoise'))(draws(), SHAPE)
    assert torch.equal(noise, base()) and for_input is noise


def test_offset_adds_one_number_to_a_channel():
    noise, for_input = NOISES.build(dict(type='OffsetNoise', strength=0.3))(draws(), SHAPE)
    offset = torch.stack([normal(n, 'noise_offset', (4, 1, 1)) for n in 'abc'])
    torch.testing.assert_close(noise, base() + 0.3 * offset, rtol=0, atol=1e-6)
    assert for_input is noise and offset.unique().numel() == 12
    assert torch.equal(NOISES.build(dict(type='OffsetNoise', strength=0))(draws(), SHAPE)[0], base())


def pyramid(name, discount, num_levels):
    rng, total = generator(7, name, 1, 'noise_pyramid'), normal(name, 'noise', SHAPE)[None]
    for i in range(num_levels):
        r = torch.rand((), generator=rng).item() * 2 + 2
        h, w = max(1, int(12 / r**i)), max(1, int(16 / r**i))
        small = torch.randn(1, 4, h, w, generator=rng)
        total = total + torch.nn.Upsample(size=(12, 16), mode='bilinear')(small) * discount**i
        if h == 1 or w == 1:
            break
    return total / total.std()


@pytest.mark.parametrize(('discount', 'num_levels'), [(0.9, 6), (0.4, 2), (1.0, 1)])
def test_pyramid(discount, num_levels):
    noise, for_input = NOISES.build(dict(type='PyramidNoise', discount=discount, num_levels=num_levels))(draws(), SHAPE)
    expected = torch.cat([pyramid(n, discount, num_levels) for n in 'abc'])
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(3))
    assert for_input is noise


def test_input_perturbation_keeps_the_target():
    noise, for_input = NOISES.build(dict(type='InputPerturbation', strength=0.2))(draws(), SHAPE)
    fresh = torch.stack([normal(n, 'noise_perturbation', SHAPE) for n in 'abc'])
    assert torch.equal(noise, base())
    torch.testing.assert_close(for_input, base() + 0.2 * fresh, rtol=0, atol=1e-6)


def test_kinds_nest():
    offset = dict(type='OffsetNoise', strength=0.3)
    noise, for_input = NOISES.build(dict(type='InputPerturbation', strength=0.2, inner=offset))(draws(), SHAPE)
    assert torch.equal(noise, NOISES.build(offset)(draws(), SHAPE)[0])
    plain = NOISES.build(dict(type='InputPerturbation', strength=0.2))(draws(), SHAPE)
    torch.testing.assert_close(for_input - noise, plain[1] - plain[0], rtol=0, atol=1e-6)
    turned = NOISES.build({**offset, 'inner': dict(type='InputPerturbation', strength=0.2)})(draws(), SHAPE)
    torch.testing.assert_close(turned[1], for_input, rtol=0, atol=1e-6)
    assert torch.equal(turned[0], noise)


@pytest.mark.parametrize(('cfg', 'word'), [
    (dict(type='OffsetNoise', strength=-1), 'strength=-1'), (dict(type='InputPerturbation', strength=-1), 'strength'),
    (dict(type='PyramidNoise', discount=0), 'discount=0'), (dict(type='PyramidNoise', num_levels=0), 'num_levels=0'),
    (dict(type='OffsetNoise', inner=dict(type='PyramidNoise', inner=dict(type='OffsetNoise'))), 'twice'),
    (dict(type='OfsetNoise'), "Did you mean 'OffsetNoise'")])
def test_what_is_refused(cfg, word):
    with pytest.raises(ValueError, match=word):
        NOISES.build(cfg)
