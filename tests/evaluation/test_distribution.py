"""FID, KID and CMMD against torchmetrics and the formulas, on features that the test makes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import distribution
from diffengine_sdxl.evaluation.references import DatasetFeatures
from diffengine_sdxl.registry import METRICS

NETWORK = dict(model='diffengine_sdxl::shapes/base', subfolder='image_encoder')
NUM, WIDTH = 24, 6


class Colours:
    """Features of images that a test can compute by hand: WIDTH pixels of the first row, in red."""

    label, num_features = 'colours', WIDTH

    def __init__(self, *args: Any) -> None:
        self.num_calls = 0

    def check(self) -> None:
        pass

    def __call__(self, images: Tensor, device: torch.device) -> np.ndarray:
        self.num_calls += 1
        return images[:, 0, 0, :WIDTH].numpy()


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, 'ImageFeatures', Colours)


def images(seed: int, num: int = NUM, low: int = 0) -> Tensor:
    """Images [num, 3, 8, 8] of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (num, 3, 8, 8), generator=generator).float() / 255


def features(batch: Tensor) -> Tensor:
    return batch[:, 0, 0, :WIDTH]


def evaluated(metric: Any, real: Tensor, seeds: Sequence[dict[str, Tensor]], batch_size: int = 10) -> dict[str, Any]:
    """Evaluate image sets of several seeds against the samples' own images."""
    for start in range(0, len(real), batch_size):
        rows = range(start, min(start + batch_size, len(real)))
        data = {'key': [f'{row:03d}' for row in rows], 'img': real[start:start + batch_size] * 2 - 1}
        for seed, sets in enumerate(seeds):
            metric.process(data, [dict(key=f'{row:03d}', seed=seed, images={name: x[row] for name, x in sets.items()})
                                  for row in rows])
    numbers: dict[str, Any] = metric.evaluate(len(real) * len(seeds))
    return numbers


def by_torchmetrics(kind: str, real: Tensor, generated: Tensor) -> float:
    from torchmetrics.image import fid, kid
    if kind == 'FID':
        library: Any = fid.FrechetInceptionDistance(feature=WidthOne())
    else:
        library = kid.KernelInceptionDistance(feature=WidthOne(), subsets=1, subset_size=len(real))
    library.set_dtype(torch.float64)
    library.update(features(real).double(), real=True)
    library.update(features(generated).double(), real=False)
    value = library.compute()
    return float(value[0] if kind == 'KID' else value)


class WidthOne(nn.Module):
    """The identity on features; torchmetrics probes it with an image."""

    num_features = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def kid(real: Tensor, made: Tensor, of_made: Sequence[int]) -> float:
    """By the formula, over pairs of different samples."""
    def mean(x: Tensor, y: Tensor, of_x: Sequence[int], of_y: Sequence[int]) -> float:
        return float(np.mean([(float(p @ q) / WIDTH + 1) ** 3 for i, p in zip(of_x, x, strict=True)
                              for j, q in zip(of_y, y, strict=True) if i != j]))
    x, y, own = features(made).double(), features(real).double(), range(len(real))
    return mean(x, x, of_made, of_made) + mean(y, y, own, own) - 2 * mean(x, y, of_made, own)


def cmmd(real: np.ndarray, generated: np.ndarray) -> float:
    """By the formula, pair by pair."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (real.astype(float), generated.astype(float)))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((p - q) ** 2).sum() / (2 * 10**2)) for q in b] for p in a]))
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize('kind', ['FID', 'KID', 'CMMD'])
def test_the_number_is_the_librarys(kind: str) -> None:
    real, sets = images(0), {'base': images(1, low=200), 'adapted': images(2, low=20)}
    numbers = evaluated(METRICS.build(dict(type=kind)), real, [sets])
    name = f'{kind.lower()}_colours'
    for image_set, made in sets.items():
        expected = (cmmd(*(features(x).numpy() for x in (real, made))) if kind == 'CMMD' else
                    kid(real, made, range(NUM)) if kind == 'KID' else by_torchmetrics('FID', real, made))
        assert numbers[f'{image_set}/{name}'] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert numbers[f'{image_set}/{name}/num_samples'] == NUM and numbers[f'{image_set}/{name}/better'] == -1
    gap = f'adapted - base/{name}'
    assert numbers[gap] == pytest.approx(numbers[f'adapted/{name}'] - numbers[f'base/{name}'], abs=1e-12)
    assert numbers[f'{gap}/low'] <= numbers[gap] <= numbers[f'{gap}/high']
    # CMMD does not see that one set is brighter.
    assert (numbers[f'{gap}/high'] < 0 and numbers[f'{gap}/p'] < 0.05) == (kind != 'CMMD')


@pytest.mark.parametrize('kind', ['FID', 'KID', 'CMMD'])
def test_leaving_out_is_the_number_of_the_rest(kind: str) -> None:
    """With several seeds a sample's own image counts once, and goes with its images."""
    metric, real, first, second = METRICS.build(dict(type=kind)), images(0), images(1), images(2)
    evaluated(metric, real, [{'base': first}, {'base': second}])
    kept = np.array([row.key >= '005' for row in metric.rows])
    rest = METRICS.build(dict(type=kind))
    numbers = evaluated(rest, real[5:], [{'base': first[5:]}, {'base': second[5:]}])
    assert metric._of(metric.rows, 'base')(kept) == pytest.approx(numbers[f'base/{metric.name}'], rel=1e-9)
    both = torch.cat([first[5:], second[5:]])
    if kind == 'KID':
        assert numbers['base/kid_colours'] == pytest.approx(kid(real[5:], both, [*range(19), *range(19)]), rel=1e-6)
    if kind == 'FID':
        assert numbers['base/fid_colours'] == pytest.approx(
            by_torchmetrics('FID', real[5:], both), rel=1e-6)


def test_a_singular_covariance_has_the_librarys_number() -> None:
    few = [images(seed, 4) for seed in (0, 1)]
    metric = METRICS.build(dict(type='FID'))
    expected = by_torchmetrics('FID', *few)
    assert evaluated(metric, few[0], [{'base': few[1]}])['base/fid_colours'] == pytest.approx(expected, rel=1e-5)
    warning = metric.check(4, 1)
    assert '4 images (4 samples, seeds: 1) and 4 real ones' in warning and '6 features' in warning and 'KID' in warning
    assert metric.check(6, 3) is not None, 'six different real images, whatever the seeds'
    assert metric.check(7, 1) is None and METRICS.build(dict(type='KID')).check(4, 1) is None
    with pytest.raises(UserError, match='KID compares sets of images and needs 3 samples at least; there are 2'):
        METRICS.build(dict(type='KID')).check(2, 5)


def test_pairs_that_do_not_count_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are many: a sample's seeds squared."""
    widths: list[int] = []
    metric = METRICS.build(dict(type='KID'))
    kernel = metric.kernel
    monkeypatch.setattr(metric, 'kernel', lambda dot, *rest: widths.append(len(dot)) or kernel(dot, *rest))
    monkeypatch.setattr(distribution, 'CHUNK', 5)
    real, made = images(0), images(1)
    found = evaluated(metric, real, [{'base': made}, {'base': made}])['base/kid_colours']
    of_made = [*range(NUM), *range(NUM)]
    assert found == pytest.approx(kid(real, torch.cat([made, made]), of_made)) and max(widths) <= 5


def test_kid_of_copies_is_not_below_0() -> None:
    """A sample and its own image are no pair of independent ones, so this pair does not count."""
    real = images(0)
    copies = evaluated(METRICS.build(dict(type='KID')), real, [{'base': real}])
    assert copies['base/kid_colours'] == pytest.approx(0, abs=1e-9)
    assert by_torchmetrics('KID', real, real) < -0.03


def test_a_metric_knows_nothing_of_the_evaluation_before() -> None:
    metric, real = METRICS.build(dict(type='KID')), images(0)
    first = evaluated(metric, real, [{'base': images(1)}])
    second = evaluated(metric, real, [{'base': images(2)}])
    assert second == evaluated(METRICS.build(dict(type='KID')), real, [{'base': images(2)}]) != first


def test_against_a_data_set() -> None:
    real = dict(type='Shapes', length=30, size=16, split='val', conditioning=None, transforms=[dict(type='PackInputs')])
    metric = METRICS.build(dict(type='KID', real=real, max_real=20))
    assert metric.needs == () and metric.check(NUM, 1) is None
    rows = [metric.real.dataset[i * 30 // 20]['img'].float()[None] / 255 for i in range(20)]
    made = images(1, 20)
    data = {'key': [str(i) for i in range(20)]}
    metric.process(data, [dict(key=str(i), seed=0, images={'base': made[i]}) for i in range(20)])
    assert metric.evaluate(20)['base/kid_colours'] == pytest.approx(by_torchmetrics('KID', torch.cat(rows), made), 1e-6)
    assert metric.features.num_calls == 1 + 2, 'the images of the test, and two batches of real ones'
    metric.process(data, [dict(key=str(i), seed=0, images={'base': made[i]}) for i in range(20)])
    metric.evaluate(20)
    assert metric.features.num_calls == 2 + 2, 'real images are read once'


def test_data_sets_that_are_none() -> None:
    stream = dict(type='HFStream', source='x')
    with pytest.raises(UserError, match=r"KID: .*'img'"):
        broken = DatasetFeatures(dict(type='Shapes', length=3), Colours(), None, 'KID')
        broken.dataset.transforms = [lambda sample: {'key': 'a'}]
        broken.compute(torch.device('cpu'))
    with pytest.raises(UserError, match='max_samples=1 must be at least 2'):
        DatasetFeatures(stream, Colours(), 1, 'KID')
    with pytest.raises(UserError, match='KID compares with .img. of each sample, an image of'):
        METRICS.build(dict(type='KID')).process({'key': ['a'], 'img': ['b']}, [
            dict(key='a', seed=0, images={'base': images(0, 1)[0]})])


def test_intervals_cover() -> None:
    """Of 30 evaluations of images of one distribution, about 95 % of the intervals hold the mean of their numbers."""
    draws, metric, estimates = np.random.default_rng(0), METRICS.build(dict(type='KID')), []
    for _ in range(30):
        real, made = draws.normal(size=(2, 40, 3)) + np.array([[[0.0]], [[0.5]]])
        rows = [distribution.Measured(str(i), 0, {'base': made[i]}, real[i]) for i in range(40)]
        estimates.append(metric.estimate(rows, 'base'))
    middle = np.mean([estimate.value for estimate in estimates])
    assert np.mean([estimate.low <= middle <= estimate.high for estimate in estimates]) >= 0.85
    widths = [estimate.high - estimate.low for estimate in estimates]
    assert 2 < np.mean(widths) / np.std([estimate.value for estimate in estimates]) < 7, '4 of a normal distribution'


def test_names_say_the_network() -> None:
    undone = pytest.MonkeyPatch()
    from diffengine_sdxl.evaluation.networks import ImageFeatures
    with undone.context() as patch:
        patch.setattr(distribution, 'ImageFeatures', ImageFeatures)
        assert METRICS.build(dict(type='FID')).name == 'fid_dinov2-base'
        assert METRICS.build(dict(type='CMMD')).name == 'cmmd'
        assert METRICS.build(dict(type='CMMD', **NETWORK)).name == 'cmmd_base_image_encoder'
        assert METRICS.build(dict(type='FID', inception='a.pth')).name == 'fid_inception'
