"""`mim test`: images that are there are not made again, whatever ended the test; and what made them is known."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import MeanRed, build, evaluation, numbers, without_training

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine import eval_images, report, test_loop
from diffengine_sdxl.engine.eval_images import ImageFiles
from diffengine_sdxl.errors import UserError

FILES = ('metrics.json', 'metrics.csv', 'test/samples.csv', 'test/pictures.png')
#: Five samples in batches of two, two seeds, two image sets: 12 calls of the sampler for 20 images.
CALLS = 12


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report's page, which has tests of its own."""
    monkeypatch.setattr('diffengine_sdxl.pages.run_report.write_report', lambda work_dir: work_dir / 'report.html')


@pytest.fixture(scope='module')
def options(tiny_options: dict[str, Any], circles: Path) -> dict[str, Any]:
    return {**without_training(tiny_options), **evaluation('test', circles, 5, seeds=2),
            'test_evaluator': [dict(type='MeanRed')]}


@pytest.fixture
def run(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, int]]:
    """Test in a work_dir; return the runner and how often the sampler was called, at most `dies_at` times."""
    def tested(work_dir: Path, dies_at: int = 99, **changes: Any) -> tuple[Any, int]:
        runner, calls = build(work_dir, {**options, **changes}), 0
        sampler = runner.model.sampler

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > dies_at:
                raise KeyboardInterrupt
            return sampler(*args)
        monkeypatch.setattr(runner.model, 'sampler', counted)
        try:
            runner.test()
        except KeyboardInterrupt:
            assert calls == dies_at + 1
        return runner, calls
    return tested


@pytest.fixture(scope='module')
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of an undisturbed test. Don't write into it."""
    folder = tmp_path_factory.mktemp('whole')
    build(folder, options).test()
    return folder


def log(work_dir: Path) -> str:
    return max(work_dir.glob('*/*.log')).read_text()


def test_a_killed_test_goes_on(run: Callable[..., tuple[Any, int]], whole: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is made twice but those of a batch of which one is lost, and all files are equal, bitwise.

    Then with another metric: the same images are measured, and the model makes none.
    """
    monkeypatch.setattr(test_loop, 'LOG_INTERVAL', -1.0)
    run(tmp_path, dies_at=5)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / 'test' / 'images').glob('*/*_seed*.png')}
    assert len(made) == 5 * 2 and not (tmp_path / 'metrics.json').exists()
    next(iter(made)).unlink()
    _, calls = run(tmp_path)
    assert calls == CALLS - 5 + 1
    assert '8 of 20 images' in log(tmp_path) or '9 of 20 images' in log(tmp_path)
    assert sum(path.stat().st_mtime_ns != time for path, time in made.items()) == 1
    assert not [name for name in FILES if (tmp_path / name).read_bytes() != (whole / name).read_bytes()]
    rows = report.read_samples(tmp_path / 'test/samples.csv')
    assert len(rows) == 20 and [row['key'] for row in rows] == [key for key in '01234' for _ in range(4)]
    for row in rows:
        image = eval_images.to_tensor(Image.open(tmp_path / 'test' / row['file']))
        assert float(row['redness']) == float(image[None, 0].double().mean(dim=(1, 2)))
    _, calls = run(tmp_path, test_evaluator=[dict(type='Brightness')])
    assert calls == 0 and list(numbers(tmp_path / 'metrics.json')['base']) == ['brightness']


def test_images_of_other_settings_are_made_again(run: Callable[..., tuple[Any, int]], whole: Path, tmp_path: Path
                                                 ) -> None:
    """And those of the base only if they are the base's settings; the log says which. Batch sizes agree."""
    first, _ = run(tmp_path, **{'test_cfg.seeds': 1})
    (tmp_path / 'test/images/conditions/000009_other.png').write_bytes(b'')
    run(tmp_path, dies_at=0, **{'test_cfg.seeds': 1, 'model.adapters.adapter.scale': 0.5})
    # Killed at once, it leaves no numbers of the other weights, nor conditions of its data.
    assert not any((tmp_path / name).exists() for name in FILES)
    assert not (tmp_path / 'test/images/conditions/000009_other.png').exists()
    assert "5 images 'adapted' of an earlier test" in log(tmp_path)
    assert 'model.adapters.adapter.scale was 1.0, is now 0.5' in log(tmp_path)
    _, calls = run(tmp_path, **{'test_cfg.seeds': 1, 'model.adapters.adapter.scale': 0.5})
    assert calls == 3
    assert "The 5 images 'base'" not in log(tmp_path) and "5 of 10 images 'base' and 'adapted' are" in log(tmp_path)
    _, calls = run(tmp_path, **{'test_cfg.seeds': 1, 'test_dataloader.batch_size': 3})
    assert calls == 4 and 'batch_size was 2, is now 3' in log(tmp_path)
    values = [[float(row['redness']) for row in report.read_samples(folder / 'test/samples.csv') if row['seed'] == '0']
              for folder in (tmp_path, whole)]
    # In 8 bits a pixel may fall on the other side: 3.8e-6 of the mean of such a small image.
    assert values[0] == pytest.approx(values[1], abs=1e-5) and sum(values[0]) == pytest.approx(sum(values[1]), abs=1e-5)
    # Weights count by their content.
    with torch.no_grad():
        next(first.model.adapters['adapter'].parameters()).view(-1)[0] += 1
    old = json.loads((whole / 'test/images/record.json').read_text())['image_sets']['adapted']['weights']
    new = eval_images.weights_digests(first.model)
    assert old['base'] == new['base'] and old['adapter'] != new['adapter']
    assert eval_images.weights_digests(first.model, ['adapter']) == {'adapter': new['adapter']}


def test_images_of_changed_conditions_and_of_a_smaller_last_batch(run: Callable[..., tuple[Any, int]], circles: Path,
                                                                   tmp_path: Path) -> None:
    """Under the same config and captions: only their batches are made again, by the adapters only, and measured."""
    def tested(name: str, num: int) -> int:
        return run(tmp_path / name, **{**evaluation('test', data, num), 'test_evaluator': [dict(type='MeanRed')]})[1]

    def made() -> dict[str, int]:
        return {f'{path.parent.name}/{path.name}': path.stat().st_mtime_ns
                for path in (tmp_path / 'W/test/images').glob('*/*.png')}
    data = Path(shutil.copytree(circles, tmp_path / 'data'))
    assert tested('W', 3) == 4
    before = made()
    shutil.copy(data / 'conditioning_images/00007.png', data / 'conditioning_images/00001.png')
    assert tested('W', 3) == 1
    assert '1 image of an earlier test' in log(tmp_path / 'W') and 'conditions of their samples' in log(tmp_path / 'W')
    changed = {name for name, time in made().items() if before[name] != time}
    assert changed == {'adapted/000001_seed0.png', *(f'conditions/00000{i}_conditioning_image.png' for i in (0, 1))}
    # One more row: its batch is made again, which had one image.
    before = made()
    assert tested('W', 4) == 2 and {name for name, time in before.items() if made()[name] != time} == {
        'base/000002_seed0.png', 'adapted/000002_seed0.png', 'conditions/000002_conditioning_image.png'}
    assert tested('W', 3) == 2 and 'the last one, had another size' in log(tmp_path / 'W')
    assert tested('V', 3) == 4 and not [
        name for name in FILES if (tmp_path / 'W' / name).read_bytes() != (tmp_path / 'V' / name).read_bytes()]


def test_files_that_are_no_images_of_the_test(run: Callable[..., tuple[Any, int]], whole: Path, tmp_path: Path) -> None:
    """Damaged, foreign or exchanged, they are made again. A second test at the same time is refused."""
    folder = Path(shutil.copytree(whole, tmp_path / 'W'))
    images = folder / 'test/images'
    damaged, foreign = images / 'base/000000_seed0.png', images / 'adapted/000003_seed1.png'
    damaged.write_bytes(damaged.read_bytes()[:-20])
    Image.new('RGB', (32, 32)).save(foreign)
    with (folder / 'test/run.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
        with pytest.raises(UserError, match=r"W/test' is in use: another process tests there.*another --work-dir"):
            run(folder, **{'model.adapters.adapter.scale': 0.5})
        assert not [path for path, content in before.items() if path.read_bytes() != content]
    shutil.copy(images / 'base/000004_seed0.png', images / 'base/000002_seed0.png')
    assert run(folder)[1] == 3
    assert '1 image is damaged, or of no test' in log(folder) and 'have other samples in their rows' in log(folder)
    assert not [name for name in FILES if (folder / name).read_bytes() != (whole / name).read_bytes()]


def test_differences(whole: Path) -> None:
    """Paired: of each sample's own images."""
    rows = report.read_samples(whole / 'test/samples.csv')
    values = {name: [float(row['redness']) for row in rows if row['image_set'] == name] for name in ('base', 'adapted')}
    found = numbers(whole / 'metrics.json')
    assert list(found) == ['base', 'adapted', 'adapted - base']
    gap = found['adapted - base']['redness']
    gaps = [a - b for a, b in zip(values['adapted'], values['base'], strict=True)]
    assert gap['value'] == pytest.approx(sum(gaps) / 10)
    assert gap['low'] < gap['value'] < gap['high'] and 0 < gap['p'] <= 1 and found['base']['redness']['p'] is None
    record = json.loads((whole / 'test/images/record.json').read_text())
    assert (record['checkpoint'], record['seeds'], record['num_samples']) == (None, [0, 1], 5)
    assert record['dataset']['type'] == 'HFDataset' and list(record['image_sets']) == ['base', 'adapted']
    lines = (whole / 'metrics.csv').read_text().splitlines()
    assert lines[0] == 'image_set,metric,value,low,high,num_samples,p,better' and len(lines) == 4


# Faults

@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return ImageFiles(tmp_path / 'images')


def test_an_image_that_cannot_be_read(files: ImageFiles) -> None:
    made, path = {'key': 'a', 'prompt': 'a \udc80 cat'}, files.path('base', 3, 0)
    files.save(path, Image.new('RGB', (8, 8), (1, 2, 3)), made)
    assert path.name == '000003_seed0.png' and files.read(path).getpixel((0, 0)) == (1, 2, 3)
    assert files.made_from(path) == made
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match='000003_seed0.png. is damaged .*; test again'):
        files.read(path)
    path.unlink()
    with pytest.raises(UserError, match='There is no image .*one work_dir'):
        files.read(path)
    assert files.made_from(path) is None


def test_images_without_a_record_are_made_again_and_other_files_stay(files: ImageFiles) -> None:
    path, other = files.path('base', 3, 0), files.folder / 'base' / 'notes.txt'
    files.save(path, Image.new('RGB', (8, 8)))
    other.write_text('mine')
    said, = files.claim({'base': {'a': 1}}, {'step': 3})
    assert "1 images 'base'" in said and 'no record' in said and not path.exists() and other.is_file()
    files.save(path, Image.new('RGB', (8, 8)))
    assert files.claim({'base': {'a': 1}, 'adapted': {}}, {}) == [] and path.is_file()
    assert files.missing(['base', 'adapted'], [3], [0, 1]) == [(0, 'adapted'), (1, 'base'), (1, 'adapted')]
    files.record.write_text('{')
    assert "record.json', which says what made them, is damaged" in files.claim({'base': {'a': 1}}, {})[0]


def test_a_full_disk(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any) -> None:
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(atomic_files, '_flush', full)
    with pytest.raises(UserError, match="000003_seed0.png' could not be written"):
        files.save(files.path('base', 3, 0), Image.new('RGB', (8, 8)))


def test_a_metric_that_lacks_a_file(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, knows its device by then, and the folder of tests is not made."""
    def check(self: MeanRed, *_: int) -> None:
        raise UserError(f'There is no folder to read to {self.device}.')
    monkeypatch.setattr(MeanRed, 'check', check)
    monkeypatch.setattr(MeanRed, 'device', None)
    with pytest.raises(UserError, match='^test_evaluator: MeanRed: There is no folder to read to cpu'):
        build(tmp_path, options).test()
    assert not (tmp_path / 'test').exists()


def test_what_cannot_be_measured(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 circles: Path) -> None:
    """An image of another size, an image that is not finite, two rows of one key, names of metrics."""
    runner = build(tmp_path / 'a', {**options, 'test_cfg.seeds': 1})
    decode = runner.model.decode
    monkeypatch.setattr(runner.model, 'decode', lambda latents: decode(latents) * float('nan'))
    with pytest.raises(UserError, match="The image 'base' of sample '0' is not finite"):
        runner.test()
    monkeypatch.setattr(runner.model, 'decode', decode)
    read = ImageFiles.read

    def resized(self: ImageFiles, path: Path) -> Image.Image:
        image = read(self, path)
        return image.resize((8, 8)) if path.name == '000001_seed0.png' else image
    monkeypatch.setattr(ImageFiles, 'read', resized)
    with pytest.raises(UserError, match='000001_seed0.png. has 8 x 8 pixels, the others of its batch have 32 x 32'):
        runner.test()
    with pytest.raises(UserError, match="rows 0 and 2 have the same key 'a'.*Mixture"):
        for row in (0, 2):
            runner.test_loop._note_key('a', row, '')
    for metrics, words in (([dict(type='MeanRed')] * 2, "two metrics of the name 'redness'.*prefix"),
                           ([dict(type='MeanRed', prefix='a,b')], "MeanRed has the name 'a,b'; it stands in tables")):
        runner._test_loop, runner._test_evaluator = dict(type='TestLoop'), metrics
        with pytest.raises(UserError, match=f'test_evaluator.* {words}'):
            runner.test()
