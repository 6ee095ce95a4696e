"""The shapes world as files: bitwise what `Shapes` draws, in both forms; trained on alike; nothing else overwritten."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import curves, train

from diffengine_sdxl.commands import write_shapes as module
from diffengine_sdxl.commands.write_shapes import MARK, write_shapes
from diffengine_sdxl.datasets import Draw, HFDataset, Shapes
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.shapes.draw import CONDITIONS
from diffengine_sdxl.shapes.scene import COMBINATIONS, STYLES, Scene

ROOT = Path(__file__).resolve().parents[2]
FORMS = ('imagefolder', 'parquet')
PACK = [dict(type='CaptionDrop', prob=0.5), dict(type='ComputeTimeIds'), dict(type='PackInputs')]
every_form = pytest.mark.parametrize('form', FORMS)


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of `datasets`."""
    return str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='module', params=FORMS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rows with all that there is; more than one chunk of a parquet."""
    folder = tmp_path_factory.mktemp('written') / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'CHUNK', 2)
        data = Shapes(length=5, seed=2, split='val', size=24, conditioning='depth', styles=list(STYLES),
                      combinations='all', reference=True)
        assert write_shapes(data, folder, request.param) == 5
    return folder


def shapes(**options: Any) -> Shapes:
    return Shapes(length=5, seed=2, split='val', size=24, conditioning='depth', styles=list(STYLES),
                  combinations='all', reference=True, **options)


def test_rows_are_those_that_are_drawn(written: Path, cache_dir: str) -> None:
    """Pictures bitwise, captions, another image for an image prompt; and through the transforms."""
    drawn, read = shapes(), HFDataset(written, cache_dir=cache_dir, extra_columns=dict(reference='reference'))
    assert len(read) == len(drawn) == 5
    for index in range(5):
        one, other = drawn[index], read[index]
        assert other['text'] == one['text'] and other.keys() == one.keys()
        for name in ('img', 'conditioning_image', 'reference'):
            np.testing.assert_array_equal(other[name], one[name])
    packed = (shapes(transforms=PACK), HFDataset(written, cache_dir=cache_dir, transforms=PACK, extra_columns=dict(
        reference='reference')))
    one, other = (data[Draw(3, 1, 4)] for data in packed)
    assert all(torch.equal(one[k], other[k]) for k in ('img', 'conditioning_image', 'reference', 'time_ids'))


def test_columns_hold_the_facts(written: Path, cache_dir: str) -> None:
    """As plain values of their kinds, from which the scene can be drawn again."""
    import datasets
    table = datasets.load_dataset(str(written), split='train', cache_dir=cache_dir)
    facts = shapes().scene(0).facts
    assert set(table.column_names) == {'image', 'conditioning_image', 'reference', 'text', *facts}
    for index, row in enumerate(table):
        scene = Scene(**{k: row[k] for k in facts})
        assert scene == shapes().scene(index) and row['text'] == scene.caption and type(row['wordy']) is bool
        assert row['image'].size == (24, 24)


def test_as_fill50k_has_it(tmp_path: Path, cache_dir: str) -> None:
    """Without a reference, and without a conditioning image."""
    write_shapes(Shapes(length=2, size=16), tmp_path / 'a')
    rows = [json.loads(line) for line in (tmp_path / 'a' / 'metadata.jsonl').read_text().splitlines()]
    assert list(rows[1])[:3] == ['file_name', 'conditioning_image_file_name', 'text']
    assert sorted(p.relative_to(tmp_path / 'a').as_posix() for p in (tmp_path / 'a').rglob('*') if p.is_file()) == [
        MARK, 'conditioning_images/000000.png', 'conditioning_images/000001.png', 'images/000000.png',
        'images/000001.png', 'metadata.jsonl']
    write_shapes(Shapes(length=2, size=16, conditioning=None), tmp_path / 'b', 'parquet')
    data = HFDataset(tmp_path / 'b', cache_dir=cache_dir, conditioning_image_column=None)
    np.testing.assert_array_equal(data[1]['img'], Shapes(size=16)[1]['img'])


@every_form
def test_a_run_on_the_files_is_the_run_on_what_is_drawn(form: str, tmp_path: Path, tiny_base: Path) -> None:
    """Only the data set changes in the config; rows have other keys, and so other noise: the pictures are compared."""
    options = {'model.pretrained': str(tiny_base), 'resolution': 32, 'train_cfg.max_iters': 1,
               'train_dataloader.batch_size': 2, 'default_hooks.samples': None, 'default_hooks.logger.interval': 1,
               'default_hooks.checkpoint.interval': 1, 'model.sampler.num_inference_steps': 1}
    write_shapes(Shapes(length=4, size=32), tmp_path / 'data', form)
    leaf = tmp_path / 'files.py'
    leaf.write_text("_base_ = ['diffengine_sdxl::shapes/shapes_t2i_adapter.py']\ntrain_dataloader = dict(dataset=dict("
                    f"_delete_=True, type='HFDataset', source='{tmp_path / 'data'}', transforms={PACK!r}))\n"
                    "val_dataloader = val_evaluator = val_cfg = test_dataloader = test_evaluator = test_cfg = None\n")
    train(tmp_path / 'run', options, name=str(leaf))
    assert len(curves(tmp_path / 'run')) == 1 and (tmp_path / 'run' / 'step1' / 'adapter' / 'config.json').is_file()


def test_what_is_refused(tmp_path: Path) -> None:
    """What is in the way stays as it is."""
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'metadata.jsonl').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    for name in ('mine', 'file'):
        with pytest.raises(UserError, match=f"{name}' exists and was not written by this command; name another folder"):
            write_shapes(Shapes(length=1), tmp_path / name)
    with pytest.raises(UserError, match="format='zip' is unknown; choose one of 'imagefolder', 'parquet'"):
        write_shapes(Shapes(length=1), tmp_path / 'x', 'zip')
    with pytest.raises(UserError, match='oversize=0.1 draws other sizes in every epoch'):
        write_shapes(Shapes(length=1, oversize=0.1), tmp_path / 'x')
    assert (tmp_path / 'mine' / 'metadata.jsonl').read_text() == (tmp_path / 'file').read_text() == 'mine'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'mine']


@every_form
def test_half_of_it_is_never_left(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it; what was written before is replaced when the new one is whole, also by the other form."""
    stock = Shapes.load

    def ends(data: Shapes, index: int, draw: Draw) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return stock(data, index, draw)
    for before in ([], ['x']):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Shapes, 'load', ends)
            patch.setattr(module, 'CHUNK', 1)
            write_shapes(Shapes(length=3, size=16), tmp_path / 'x', form)
        assert [p.name for p in tmp_path.iterdir()] == before
        (tmp_path / 'x').mkdir(exist_ok=True)  # an empty folder is nobody's
        write_shapes(Shapes(length=2, size=16), tmp_path / 'x', FORMS[form == FORMS[0]])
    facts = json.loads((tmp_path / 'x' / MARK).read_text())
    assert facts['length'] == 2 and facts['format'] != form and facts['styles'][0] == 'flat'
    write_shapes(Shapes(length=1, size=16), tmp_path / 'x', form)
    assert not (tmp_path / 'x' / ('data.parquet' if form == 'imagefolder' else 'images')).exists()
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def run_tool(*arguments: str) -> Any:
    """The exit code of tools/write_shapes.py, without its process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, 'argv', ['write_shapes.py', *arguments])
        runpy.run_path(str(ROOT / 'tools' / 'write_shapes.py'), run_name='__main__')
    return ended.value.code


def test_the_command_line(tmp_path: Path, cache_dir: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'x'
    assert run_tool(str(folder), '--format', 'parquet', '--length', '3', '--size', '16', '--split', 'val',
                    '--seed', '4', '--conditioning', 'mask', '--styles', 'dotted', 'ringed',
                    '--combinations', 'held_out', '--reference') == 0
    assert f'3 rows are in {folder}' in ''.join(capfd.readouterr().out.splitlines())
    drawn = Shapes(length=3, size=16, split='val', seed=4, conditioning='mask', styles=['dotted', 'ringed'],
                   combinations='held_out', reference=True)
    read = HFDataset(folder, cache_dir=cache_dir)
    for index in range(3):
        assert drawn[index]['text'] == read[index]['text']
        for name in ('img', 'conditioning_image'):
            np.testing.assert_array_equal(drawn[index][name], read[index][name])
    assert run_tool(str(tmp_path / 'y'), '--length', '1', '--conditioning', 'none') == 0
    assert not (tmp_path / 'y' / 'conditioning_images').exists()
    capfd.readouterr()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'a').touch()
    for arguments, words in ((('mine',), 'exists and was not written'), (('z', '--length', '0'), 'length=0'),
                             (('z', '--styles', 'spotted'), "styles='spotted' is unknown")):
        assert run_tool(str(tmp_path / arguments[0]), *arguments[1:]) == 1
        errors = capfd.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and errors[0].startswith('error: ') and words in errors[0], errors


def test_the_choices_are_those_of_the_world(capsys: pytest.CaptureFixture[str]) -> None:
    """The tool names them itself, so that -h need not import anything."""
    assert run_tool('-h') == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert f"{{{','.join((*CONDITIONS, 'none'))}}}" in text and f"{{{','.join(COMBINATIONS)}}}" in text
    assert ', '.join(STYLES) in text and f"{{{','.join(module.FORMS)}}}" in text
