"""Options of the data; see test_table.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from options.table import Cases, World

from diffengine_sdxl.datasets import Draw

case = Cases()


@case('dataset_name', 'train_data_dir')
def dataset_name(world: World) -> None:
    assert len(world.dataset()) == 16


def write_rows(world: World, names: tuple[str, str, str] = ('image', 'conditioning_image', 'text'), num: int = 3,
               name: str = 'train') -> Path:
    """Write a jsonl of `num` rows with columns of these names, beside the images that it names."""
    folder = world.tmp / 'rows'
    if not folder.exists():
        shutil.copytree(world.data, folder, ignore=shutil.ignore_patterns('metadata.jsonl'))
    rows = [dict(zip(names, (f'images/{i:05d}.png', f'conditioning_images/{i:05d}.png', f'caption {i}'), strict=True))
            for i in range(num)]
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@case('dataset_config_name', name='few')
def dataset_config_name(world: World) -> None:
    for name, num in (('many', 5), ('few', 2)):
        folder = write_rows(world, num=num, name=name).parent
    (folder / 'README.md').write_text('---\nconfigs:\n- config_name: many\n  data_files: many.jsonl\n'
                                      '- config_name: few\n  data_files: few.jsonl\n---\n')
    world.data = folder
    assert len(world.dataset()) == 2


@case('image_column', image_column='picture')
def image_column(world: World) -> None:
    world.data = write_rows(world, ('picture', 'conditioning_image', 'text'))
    assert world.sample()['img'].shape == (3, 64, 64)


@case('conditioning_image_column', conditioning_image_column='edges')
def conditioning_image_column(world: World) -> None:
    world.data = write_rows(world, ('image', 'edges', 'text'))
    assert world.sample()['conditioning_image'].shape == (3, 64, 64)


@case('caption_column', caption_column='words')
def caption_column(world: World) -> None:
    world.data = write_rows(world, ('image', 'conditioning_image', 'words'))
    assert world.sample()['text'] == 'caption 0'


@case('max_train_samples')
def max_train_samples(world: World) -> None:
    assert len(world.dataset()) == 4


@case('proportion_empty_prompts')
def proportion_empty_prompts(world: World) -> None:
    dataset = world.dataset()
    texts = [dataset[Draw(i, epoch, 0)]['text'] for i in range(16) for epoch in range(20)]
    assert 0.05 < texts.count('') / len(texts) < 0.15


@case('resolution', resolution=32)
def resolution(world: World) -> None:
    sample = world.sample()
    assert sample['img'].shape == sample['conditioning_image'].shape == (3, 32, 32)
    assert sample['time_ids'].tolist() == [64, 64, 0, 0, 32, 32]
    assert world.resolved().default_hooks.samples.size == 32


@case('detection_resolution', detection_resolution=16)
def detection_resolution(world: World) -> None:
    at_16 = world.sample()['conditioning_image']
    world.overrides['condition.detection_resolution'] = None
    assert not torch.equal(at_16, world.sample()['conditioning_image'])


@case('crops_coords_top_left_h', 'crops_coords_top_left_w', crops_coords_top_left=(5, 7))
def crops(world: World) -> None:
    assert world.sample()['time_ids'].tolist() == [64, 64, 5, 7, 64, 64]


@case('train_batch_size')
def train_batch_size(world: World) -> None:
    runner = world.runner()
    assert len(next(iter(runner.build_dataloader(runner._train_dataloader, seed=0)))['text']) == 4


@case('dataloader_num_workers', num_workers=2)
def dataloader_num_workers(world: World) -> None:
    runner = world.runner()
    assert runner.build_dataloader(runner._train_dataloader, seed=0).num_workers == 2


@pytest.mark.parametrize('option', case.checks)
def test_option(option: str, request: pytest.FixtureRequest) -> None:
    case.run(option, request)
