"""Runs on images of several shapes: stopped and resumed, and with the samples of a step split in another way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import assert_same_run, curves, train

from diffengine_sdxl.engine.train_loop import StepLoop
from diffengine_sdxl.testing import write_circles

TRANSFORMS = [dict(type='Resize', size='bucket'), dict(type='Crop', size='bucket', mode='random'),
              dict(type='Flip', prob=0.5), dict(type='ComputeTimeIds'), dict(type='PackInputs')]
#: Bucket -> the sizes of the images that belong to it, all (height, width).
BUCKETS = {(48, 48): {(64, 64)}, (32, 64): {(40, 70), (40, 72)}, (64, 32): {(70, 40)}}


@pytest.fixture(scope='module')
def options(tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of five steps on ellipses and their outlines, of three aspect ratios in uneven numbers."""
    folder = write_circles(tmp_path_factory.mktemp('stretched') / 'data', 11)
    for path in folder.rglob('*.png'):
        size = ((64, 64), (70, 40), (40, 70), (72, 40))[int(path.stem) % 4]
        with Image.open(path) as image:
            image.resize(size).save(path)
    return {**tiny_options, 'resolution': 48, 'train_dataloader.dataset.source': str(folder),
            'train_cfg.max_iters': 5, 'optim_wrapper.accumulative_counts': 2, 'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.transforms': TRANSFORMS, 'train_dataloader.sampler': dict(
                _delete_=True, type='BucketSampler', resolution='$resolution', step=16),
            'default_hooks.samples': dict(type='SampleHook', interval=5, num_from_dataset=2, num_images=1, size=48)}


Seen = list[tuple[int, dict[str, Any]]]


@pytest.fixture(scope='module')
def seen() -> Iterator[Seen]:
    """(steps done, batch) of each micro-batch that is trained on."""
    batches: Seen = []
    run_iter = StepLoop.run_iter

    def watched(loop: StepLoop, loaded: Iterator[Any]) -> None:
        def spy() -> Iterator[Any]:
            for batch in loaded:
                batches.append((loop.iter, batch))
                yield batch
        run_iter(loop, spy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLoop, 'run_iter', watched)
        yield batches


@pytest.fixture(scope='module')
def whole(options: dict[str, Any], seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A finished run, and its micro-batches."""
    seen.clear()
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(folder, options)
    return folder, list(seen)


def test_micro_batches_of_a_step_have_one_shape_and_true_time_ids(whole: tuple[Path, Seen]) -> None:
    shapes = {(step, tuple(batch['img'].shape[-2:])) for step, batch in whole[1]}
    assert len(whole[1]) == 10 and len(shapes) == 5 and {shape for _, shape in shapes} == {*BUCKETS}
    for _, batch in whole[1]:
        shape = tuple(batch['img'].shape[-2:])
        assert batch['img'].shape == batch['conditioning_image'].shape
        for height, width, top, left, *target in batch['time_ids'].tolist():
            assert (height, width) in BUCKETS[shape] and tuple(target) == shape
            # Resize covers the bucket, so the crop moves along one edge, and not far: the ratios are near.
            assert 0 in (top, left) and max(top, left) <= 4


def test_a_resumed_run_is_bitwise_the_whole_one(tmp_path: Path, options: dict[str, Any],
                                                whole: tuple[Path, Seen]) -> None:
    train(tmp_path, {**options, 'default_hooks.samples': None}, die_at=3)
    train(tmp_path, {**options, 'default_hooks.samples': None}, resume=True)
    assert_same_run(whole[0], tmp_path, 5)


def test_how_a_step_is_split_changes_no_sample(tmp_path: Path, options: dict[str, Any], seen: Seen,
                                               whole: tuple[Path, Seen]) -> None:
    seen.clear()
    train(tmp_path, {**options, 'train_cfg.max_iters': 2, 'train_dataloader.batch_size': 4,
                     'optim_wrapper.accumulative_counts': 1, 'default_hooks.samples': None})
    assert [key for _, batch in seen for key in batch['key']] == [
        key for step, batch in whole[1] if step < 2 for key in batch['key']]
    for one, other in zip(curves(tmp_path), curves(whole[0]), strict=False):
        assert one['loss'] == pytest.approx(other['loss'], rel=1e-5)
