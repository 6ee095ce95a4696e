"""The metrics of the shapes world: correct images, wrong ones, incomplete batches, seeds."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from scipy.special import stdtrit

from diffengine_sdxl.datasets import collate
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import interval, shapes_metric
from diffengine_sdxl.evaluation.shapes_metric import observed
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes import draw
from diffengine_sdxl.shapes.measure import iou
from diffengine_sdxl.shapes.scene import STYLES, Scene, draw_scene

NAMES = {'ShapeAccuracy': 'shape_accuracy', 'FillAccuracy': 'fill_accuracy', 'GroundAccuracy': 'ground_accuracy',
         'StyleScore': 'style_score', 'MaskIoU': 'iou'}
SCENE = Scene('star', 'dotted', 'red', 'white', 'plain', 0.55, 0.45, 0.3)
WRONG = {'ShapeAccuracy': replace(SCENE, shape='circle'), 'FillAccuracy': replace(SCENE, fill='blue'),
         'GroundAccuracy': replace(SCENE, ground='yellow'), 'StyleScore': replace(SCENE, style='ringed'),
         'MaskIoU': replace(SCENE, x=0.4, y=0.6)}


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def image_of(scene: Scene, size: int = 64) -> torch.Tensor:
    return tensor(draw.render(scene, size))


def batch(scenes: Sequence[Scene], size: int = 64, first: int = 0) -> dict[str, Any]:
    """Make the batch of the data set Shapes with truth=True."""
    return collate([{'key': f'test/{first + i}', 'text': scene.caption, 'shape': scene.shape, 'style': scene.style,
                     'fill': scene.fill, 'ground': scene.ground, 'num_skipped': 0,
                     'shape_mask': tensor(draw.condition(scene, size, 'mask'))} for i, scene in enumerate(scenes)])


def generated(data: dict[str, Any], seed: int = 0, **images: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """Make the model's output for a batch."""
    return [{'key': key, 'seed': seed, 'prompt': data['text'][i],
             'images': {variant: batch_images[i] for variant, batch_images in images.items()}}
            for i, key in enumerate(data['key'])]


def metric(kind: str, **options: Any) -> Any:
    return METRICS.build(dict(type=kind, **options))


@pytest.mark.parametrize('kind', NAMES)
def test_right_and_wrong_images(kind: str) -> None:
    evaluated, data = metric(kind), batch([SCENE])
    evaluated.process(data, generated(data, base=[image_of(WRONG[kind])], adapted=[image_of(SCENE)]))
    numbers, name = evaluated.evaluate(1), NAMES[kind]
    parts = ('', '/low', '/high', '/num_samples', '/better')
    assert list(numbers) == [f'{group}/{name}{part}' for group in ('base', 'adapted', 'adapted - base')
                             for part in parts]
    gap = numbers[f'adapted - base/{name}']
    assert gap == pytest.approx(numbers[f'adapted/{name}'] - numbers[f'base/{name}']) and numbers[f'base/{name}/better']
    assert numbers[f'adapted/{name}'] == pytest.approx(1, abs=0.03) and numbers[f'base/{name}'] < 0.5
    if kind != 'MaskIoU':
        assert (numbers[f'adapted/{name}'], numbers[f'base/{name}']) == (1, 0)
    assert {type(value) for value in numbers.values()} == {float, int} and numbers[f'base/{name}/num_samples'] == 1
    assert all(numbers[f'{v}/{name}/low'] <= numbers[f'{v}/{name}'] <= numbers[f'{v}/{name}/high']
               for v in ('base', 'adapted'))


@pytest.mark.parametrize('kind', NAMES)
def test_one_wrong_thing_is_wrong_in_its_metric_only(kind: str) -> None:
    data = batch([SCENE])
    for other in NAMES:
        if other == 'MaskIoU' and kind == 'ShapeAccuracy':
            continue  # another shape covers other pixels
        evaluated = metric(other)
        evaluated.process(data, generated(data, base=[image_of(WRONG[kind])]))
        value = evaluated.evaluate(1)[f'base/{NAMES[other]}']
        assert value < 0.5 if other == kind else value > 0.97, (other, kind, value)


def test_all_metrics_on_many_images_by_mmengines_evaluator() -> None:
    scenes = [draw_scene(3, i, STYLES, 'all', 'metrics') for i in range(24)]
    evaluator = Evaluator([metric(kind) for kind in NAMES])
    wrong = scenes[1:] + scenes[:1]
    for first in range(0, 24, 8):
        data = batch(scenes[first:first + 8], first=first)
        evaluator.process(generated(data, adapted=[image_of(s) for s in scenes[first:first + 8]],
                               base=[image_of(s) for s in wrong[first:first + 8]]), data)
    numbers = evaluator.evaluate(24)
    assert len(numbers) == 5 * (3 * 5 + 1)
    for name in NAMES.values():
        assert numbers[f'adapted/{name}'] > 0.98 and numbers[f'adapted/{name}/num_samples'] == 24
        assert numbers[f'base/{name}'] < 0.5
        assert numbers[f'adapted - base/{name}/p'] < 1e-3 and numbers[f'adapted - base/{name}/low'] > 0.2
    for word in ('shape', 'fill', 'ground'):
        assert numbers[f'base/{word}_accuracy'] == pytest.approx(
            np.mean([getattr(a, word) == getattr(b, word) for a, b in pairwise([*scenes, scenes[0]])]))


@pytest.mark.parametrize('kind', NAMES)
def test_what_the_batch_lacks_is_named(kind: str) -> None:
    data = batch([SCENE])
    for name in ('key', *metric(kind).needs):
        lacking = {key: value for key, value in data.items() if key != name}
        with pytest.raises(UserError, match=rf"{kind} needs '{name}' .*'Shapes' provides it with truth=True"):
            metric(kind).process(lacking, generated(data, base=[image_of(SCENE)]))


@pytest.mark.parametrize(('kind', 'word'), [('ShapeAccuracy', 'shape'), ('FillAccuracy', 'fill'),
                                            ('GroundAccuracy', 'ground'), ('StyleScore', 'style')])
def test_a_word_that_cannot_be_seen_is_refused(kind: str, word: str) -> None:
    data = batch([SCENE])
    data[word] = [{'shape': 'sqare', 'style': 'stripped', 'fill': 'grey', 'ground': 'grey'}[word]]
    with pytest.raises(UserError, match=rf"{kind}: the {word} '.*' of 'test/0' .*Did you mean"):
        metric(kind).process(data, generated(data, base=[image_of(SCENE)]))


def test_a_mask_of_another_size_is_refused() -> None:
    data = batch([SCENE], size=32)
    with pytest.raises(UserError, match=r"shape_mask of sample 'test/0' is \[32, 32\] and its image \[64, 64\]"):
        metric('MaskIoU').process(data, generated(data, base=[image_of(SCENE)]))


def test_values_outside_0_to_1_are_cut() -> None:
    assert observed(image_of(SCENE) * 1.5 - 0.2).shape == 'star'
    bright = observed(torch.full((3, 16, 16), 9.0))
    assert bright.ground == 'white' and not bright.mask.any()


def test_one_style_may_be_wanted_of_all() -> None:
    scenes = [replace(SCENE, style=style) for style in STYLES]
    data, images = batch(scenes), [image_of(scene) for scene in scenes]
    dotted, own = metric('StyleScore', style='dotted'), metric('StyleScore')
    for evaluated in (dotted, own):
        evaluated.process(data, generated(data, adapted=images))
    assert dotted.evaluate(6)['adapted/style_score'] == pytest.approx(1 / 6)
    assert own.evaluate(6)['adapted/style_score'] == 1
    lacking = {key: value for key, value in data.items() if key != 'style'}
    metric('StyleScore', style='dotted').process(lacking, generated(data, adapted=images))
    with pytest.raises(UserError, match="'doted' of the config .*Did you mean 'dotted'"):
        metric('StyleScore', style='doted')


def test_a_prefix_keeps_two_of_a_kind_apart() -> None:
    data = batch([SCENE])
    evaluator = Evaluator([metric('StyleScore'), metric('StyleScore', style='flat', prefix='flat')])
    evaluator.process(generated(data, base=[image_of(SCENE)]), data)
    numbers = evaluator.evaluate(1)
    assert (numbers['base/style_score'], numbers['flat/base/style_score']) == (1, 0)


def test_no_warning_of_a_missing_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr('mmengine.evaluator.metric.print_log', lambda message, **_: messages.append(message))
    assert metric('ShapeAccuracy').prefix is None and not messages


def test_an_image_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    observe = shapes_metric.observe
    monkeypatch.setattr(shapes_metric, 'observe', lambda pixels: seen.append(pixels) or observe(pixels))
    monkeypatch.setattr(shapes_metric, '_cache', type(shapes_metric._cache)())
    scenes = [replace(SCENE, x=0.5 + 0.01 * i) for i in range(3)]
    data = batch(scenes)
    for kind in NAMES:
        metric(kind).process(data, generated(data, adapted=[image_of(s) for s in scenes], base=[image_of(SCENE)] * 3))
    assert len(seen) == 4
    monkeypatch.setattr(shapes_metric, 'CACHE_SIZE', 2)
    observed(image_of(WRONG['ShapeAccuracy']))
    assert len(shapes_metric._cache) == 2 and len(seen) == 5
    # An image with the same bytes but another shape is another one.
    flat = torch.zeros(3, 4, 16)
    assert [observed(p).mask.shape for p in (flat, flat.reshape(3, 8, 8))] == [(4, 16), (8, 8)]


def test_seeds_of_a_prompt_are_one_cluster() -> None:
    scenes = [replace(SCENE, x=0.5 + 0.01 * i) for i in range(6)]
    data, accuracy, overlap = batch(scenes), metric('ShapeAccuracy'), metric('MaskIoU')
    right = [scene if i % 3 else replace(scene, shape='circle') for i, scene in enumerate(scenes)]
    for seed in range(4):
        for evaluated in (accuracy, overlap):
            evaluated.process(data, generated(data, seed, base=[image_of(scene) for scene in right]))
    numbers = {**accuracy.evaluate(sys.maxsize), **overlap.evaluate(sys.maxsize)}
    assert numbers['base/shape_accuracy/num_samples'] == numbers['base/iou/num_samples'] == 24
    assert (numbers['base/shape_accuracy/low'], numbers['base/shape_accuracy/high']) == interval.wilson(2 / 3, 6)
    ious = [iou(observed(image_of(shown)).mask, draw.mask(scene, 64) >= 0.5)
            for shown, scene in zip(right, scenes, strict=True)]
    half = stdtrit(5, 0.975) * np.std(ious, ddof=1) / np.sqrt(6)
    assert numbers['base/iou/low'] == pytest.approx(np.mean(ious) - half)


def test_what_a_metric_gives_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is refused by name; None does not count; an error says which samples were measured."""
    def process(*values: Any) -> Any:
        evaluated = metric('MaskIoU')
        monkeypatch.setattr(evaluated, 'measure', lambda images, batch: [value() for value in values])
        evaluated.process(data, generated(data, base=[image_of(SCENE)] * 2, adapted=[image_of(SCENE)] * 2))
        return evaluated
    data = batch([SCENE, SCENE])
    with pytest.raises(UserError, match="MaskIoU: 'iou' of the image 'base' of sample 'test/1' is not finite"):
        process(lambda: 0.5, lambda: float('nan'))
    with pytest.raises(ZeroDivisionError) as raised:
        process(lambda: 1 / 0)
    assert raised.value.__notes__ == ['MaskIoU measured the images of test/0, test/1.']
    evaluated = process(lambda: 0.5, lambda: None)
    numbers = evaluated.evaluate(2)
    assert numbers['base/iou'] == 0.5 and numbers['base/iou/num_samples'] == 1
    assert numbers['adapted - base/iou'] == 0 and numbers['adapted - base/iou/num_samples'] == 1
    assert evaluated.per_image() == {('test/0', 0, name): 0.5 for name in ('base', 'adapted')}
    assert process(lambda: None, lambda: None).evaluate(2)['base/iou/num_samples'] == 0


def test_no_results_are_no_numbers() -> None:
    assert metric('MaskIoU').compute_metrics([]) == {}


def test_a_variant_that_only_some_samples_have() -> None:
    evaluated = metric('FillAccuracy')
    for i, images in enumerate(({'base': [image_of(SCENE)]},
                                {'base': [image_of(SCENE)], 'adapted': [image_of(WRONG['FillAccuracy'])]})):
        evaluated.process(batch([SCENE], first=i), generated(batch([SCENE], first=i), **images))
    numbers = evaluated.evaluate(2)
    assert (numbers['base/fill_accuracy/num_samples'], numbers['adapted/fill_accuracy/num_samples']) == (2, 1)
    assert (numbers['base/fill_accuracy'], numbers['adapted/fill_accuracy']) == (1, 0)


def test_a_caption_counts_by_what_it_says() -> None:
    """All that it says is right, or not; a caption that says nothing that can be observed does not count."""
    said = ['shape', 'shape fill', 'texture', '', 'ground texture', 'style']
    data = {**batch([SCENE] * 6), 'mentioned': said}
    drawn = [WRONG['FillAccuracy'], WRONG['FillAccuracy'], SCENE, SCENE, WRONG['GroundAccuracy'], SCENE]
    evaluated = metric('CaptionAccuracy')
    evaluated.process(data, generated(data, adapted=[image_of(scene) for scene in drawn]))
    results = evaluated.evaluate(6)
    assert results['adapted/caption_accuracy'] == 0.5 and results['adapted/caption_accuracy/num_samples'] == 4


def test_a_clean_shape_is_any_of_the_world() -> None:
    data, evaluated = batch([SCENE] * 3), metric('CleanShape')
    smear = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    evaluated.process(data, generated(data, base=[image_of(WRONG['ShapeAccuracy']), smear, torch.zeros(3, 64, 64)]))
    assert evaluated.evaluate(3)['base/clean_shape'] == pytest.approx(1 / 3)
