"""Timestep distributions against diffusers' formulas and against their cumulative distributions."""

import math

import pytest
import torch

from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import TIMESTEPS
from diffengine_sdxl.rng import Draws

NUM = 6000
SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000))


class FixedDraws(Draws):
    """Draws with numbers that the test sets."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)

    def uniform(self, stream, shape=()):
        assert stream == 'timestep' and tuple(shape) == ()
        return self.values

    normal = uniform


@pytest.fixture(scope='module')
def draws():
    """Keyed draws of many samples, drawn once for the whole file."""
    keyed = Draws(torch.zeros(NUM, dtype=torch.long), [str(i) for i in range(NUM)], torch.zeros(NUM, dtype=torch.long))
    uniform, normal = keyed.uniform('timestep'), keyed.normal('timestep', ())
    fixed = FixedDraws(uniform)
    fixed.normal = lambda stream, shape: normal
    return fixed


def cumulative(t):
    """Share of timesteps at or below 0, 1, ..., 999."""
    assert t.dtype == torch.int64 and t.shape == (NUM,) and 0 <= t.min() and t.max() < 1000
    return torch.bincount(t, minlength=1000).double().cumsum(0) / NUM


def build(**cfg):
    return TIMESTEPS.build(cfg)


def close(t, expected):
    """Kolmogorov-Smirnov at one in a million."""
    assert float((cumulative(t) - expected).abs().max()) < math.sqrt(math.log(2e6) / 2 / NUM)


UPPER = torch.arange(1, 1001).double() / 1000


def test_uniform(draws):
    close(build(type='UniformTimesteps')(draws, SCHEDULE), UPPER)
    close(build(type='UniformTimesteps', low=100, high=300)(draws, SCHEDULE), ((UPPER - 0.1) / 0.2).clamp(0, 1))
    ends = FixedDraws([0, 1 - 2**-24])
    assert build(type='UniformTimesteps', low=100, high=300)(ends, SCHEDULE).tolist() == [100, 299]


def test_cubic_is_the_scripts_formula(draws):
    t = build(type='CubicTimesteps')(draws, SCHEDULE)
    timesteps = draws.uniform('timestep')
    timesteps = (1 - timesteps**3) * 1000
    assert torch.equal(t, timesteps.long().clamp(0, 999))
    close(t, 1 - (1 - UPPER) ** (1 / 3))
    assert build(type='CubicTimesteps')(FixedDraws([0, 1 - 2**-24]), SCHEDULE).tolist() == [999, 0]


BIASED = [(dict(strategy='earlier', multiplier=4, portion=0.25), slice(0, 250)),
          (dict(strategy='later', multiplier=4, portion=0.1), slice(-100, None)),
          (dict(strategy='range', multiplier=0.5, begin=200, end=500), slice(200, 500)),
          (dict(strategy='range', multiplier=3, begin=900), slice(900, 1000))]


@pytest.mark.parametrize(('cfg', 'part'), BIASED)
def test_biased(draws, cfg, part):
    biased = build(type='BiasedTimesteps', **cfg)
    weights = torch.ones(1000)  # generate_timestep_weights of train_text_to_image_sdxl.py
    weights[part] *= cfg['multiplier']
    weights /= weights.sum()
    torch.testing.assert_close(biased.weights(1000), weights.double(), rtol=1e-5, atol=0)
    close(biased(draws, SCHEDULE), weights.double().cumsum(0))
    assert biased(FixedDraws([0, 1 - 2**-24]), SCHEDULE).tolist() == [0, 999]


def test_biased_never_draws_across_an_edge():
    biased = build(type='BiasedTimesteps', strategy='earlier', multiplier=3, portion=0.5)
    edges = biased.weights(1000).cumsum(0).float()
    below, above = biased(FixedDraws(edges - 1e-6), SCHEDULE), biased(FixedDraws(edges[:-1] + 1e-6), SCHEDULE)
    assert torch.equal(below, torch.arange(1000)) and torch.equal(above, torch.arange(1, 1000))
    four = NoiseSchedule(torch.tensor([0.9, 0.6, 0.3, 0.1]))  # [0, 1/4) is timestep 0, and so on
    assert build(type='BiasedTimesteps')(FixedDraws([0, 0.25, 0.5, 0.75]), four).tolist() == [0, 1, 2, 3]


def test_logit_normal(draws):
    for mean, std in [(0.0, 1.0), (0.5, 0.6)]:
        expected = torch.special.ndtr((torch.logit(UPPER) - mean) / std)
        close(build(type='LogitNormalTimesteps', mean=mean, std=std)(draws, SCHEDULE), expected)
    assert build(type='LogitNormalTimesteps')(FixedDraws([-200, 0, 200]), SCHEDULE).tolist() == [0, 500, 999]


@pytest.mark.parametrize('name', ['UniformTimesteps', 'CubicTimesteps', 'BiasedTimesteps', 'LogitNormalTimesteps'])
def test_a_sample_does_not_depend_on_its_batch(name):
    def keyed(names):
        return Draws(torch.full((len(names),), 3), list(names), torch.zeros(len(names), dtype=torch.long))
    timesteps = build(type=name)
    together = timesteps(keyed('abcdef'), SCHEDULE)
    assert together.tolist() == [timesteps(keyed(n), SCHEDULE).item() for n in 'abcdef']
    assert together.unique().numel() > 3 and together.device.type == 'cpu'


@pytest.mark.parametrize(('cfg', 'word'), [
    (dict(type='UniformTimesteps', low=5, high=5), 'low=5'), (dict(type='UniformTimesteps', low=-1), 'low=-1'),
    (dict(type='UniformTimesteps', high=1001), '1000'), (dict(type='UniformTimesteps', low=1000), '1000'),
    (dict(type='BiasedTimesteps', strategy='latter'), "Did you mean 'later'"),
    (dict(type='BiasedTimesteps', multiplier=0), 'multiplier=0'), (dict(type='BiasedTimesteps', portion=2), 'portion'),
    (dict(type='BiasedTimesteps', strategy='range', begin=-1), 'begin=-1'),
    (dict(type='BiasedTimesteps', strategy='range', end=1001), '1000'),
    (dict(type='LogitNormalTimesteps', std=0), 'std=0')])
def test_what_is_refused(draws, cfg, word):
    with pytest.raises(ValueError, match=word):
        build(**cfg)(draws, SCHEDULE)
