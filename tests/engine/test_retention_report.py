"""`mim test` with `retention`: image sets of each adapter alone, the numbers in all files, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs import build

from diffengine_sdxl.engine import report
from diffengine_sdxl.errors import UserError, run_command
from diffengine_sdxl.evaluation.base import Measured

#: Two adapters that do something, of random weights, on 6 samples of the shapes world.
OPTIONS: dict[str, Any] = {
    'model.adapters.style': None, 'model.adapters.ip.weights': None, 'model.adapters.layout.weights': None,
    'test_cfg.retention': dict(layout='iou', ip=['fill_accuracy'], style=None),
    'model.sampler.num_inference_steps': 2, 'test_dataloader.dataset.length': 6, 'test_dataloader.batch_size': 3,
    'test_cfg.seeds': 2}


@pytest.fixture(scope='module')
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of such a test."""
    folder = tmp_path_factory.mktemp('retention')
    build(folder, OPTIONS, name='shapes_composition').test()
    return folder


def test_retention_is_reported_beside_the_scores(tested: Path) -> None:
    """In JSON, CSV and the page; by hand from the table of images."""
    results = json.loads((tested / 'metrics.json').read_text())
    assert list(results) == ['base', 'only_ip', 'only_layout', 'adapted', 'adapted - base', 'retention']
    assert [*results['retention']] == ['ip/fill_accuracy', 'layout/iou', 'harmonic_mean']
    rows = report.read_samples(tested / 'test' / 'samples.csv')
    assert len(rows) == 6 * 2 * 4 and all((tested / 'test' / row['file']).is_file() for row in rows)
    means = {name: np.mean([float(row['iou']) for row in rows if row['image_set'] == name])
             for name in ('base', 'only_layout', 'adapted')}
    assert results['only_layout']['iou']['value'] == pytest.approx(means['only_layout'])
    for entry in results['retention'].values():
        assert entry.keys() == results['base']['iou'].keys() and entry['p'] is None
    assert 'retention,layout/iou,' in (tested / 'metrics.csv').read_text()
    page = (tested / 'report.html').read_text()
    assert 'only_layout' in page and page.count('>retention <small>') == 1 and '>layout/iou</td>' in page


def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    """Of scores by hand: (0.6 - 0.2) / (1 - 0.2) and (0.9 - 0.1) / (0.5 - 0.1), each its own metric and adapter."""
    loop = build(tmp_path, OPTIONS, name='shapes_composition').build_test_loop(dict(
        type='TestLoop', retention=dict(layout='iou', ip='fill_accuracy')))
    scores = {'iou': dict(base=0.2, only_layout=1.0, only_ip=0.0, adapted=0.6),
              'fill_accuracy': dict(base=0.1, only_layout=0.0, only_ip=0.5, adapted=0.9)}
    for metric in loop.image_metrics:
        values = scores.get(metric.name, {})
        metric.rows = [Measured(str(i), 0, {name: value + 0.001 * (i % 3) for name, value in values.items()})
                       for i in range(12)]
    found = {name: entry['value'] for name, entry in loop.retention_results()['retention'].items()}
    assert found == pytest.approx({'layout/iou': 0.5, 'ip/fill_accuracy': 2.0, 'harmonic_mean': 0.8})


def test_an_adapter_alone_is_made_once(tested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later test at another scale of one adapter makes the others' images alone not again."""
    made: list[str] = []
    from diffengine_sdxl.engine import test_loop
    original = test_loop.make_images

    def noted(model: Any, batch: Any, seed: int, image_set: str) -> Any:
        made.append(image_set)
        return original(model, batch, seed, image_set)
    monkeypatch.setattr(test_loop, 'make_images', noted)
    build(tested, {**OPTIONS, 'model.adapters.ip.scale': 0.5}, name='shapes_composition').test()
    assert set(made) == {'only_ip', 'adapted'}


@pytest.mark.parametrize(('changes', 'words'), [
    ({'test_cfg.retention': dict(other='iou', style=None)}, 'retention.other: the model has no adapter of this name'),
    ({'test_cfg.retention': dict(ip='colour', style=None)}, "retention.ip.*colour"),
    ({'test_cfg.retention': dict(ip=[], style=None)}, 'retention.ip names no metric; name one of'),
    ({'test_cfg.image_sets': ['base', 'adapted']}, "needs the image set 'only_ip'"),
    ({'test_cfg.image_sets': ['only_lay']}, "image_sets.*only_lay"),
    ({'model.adapters.ip': None,
      'test_cfg.retention': dict(layout='iou', ip=None, style=None)}, 'no adapter of this name beside others')])
def test_invalid_settings_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(tmp_path, {**OPTIONS, **changes}, name='shapes_composition').test()


def test_the_base_alone_has_no_retention(tmp_path: Path) -> None:
    """`--checkpoint none` on a config that asks for it, and trains with partners."""
    few = {'test_cfg.seeds': 1, 'test_dataloader.dataset.length': 2, 'model.sampler.num_inference_steps': 2}
    options = [f'{key}={value}' for key, value in few.items()]
    args = SimpleNamespace(config='shapes_lora_partners', checkpoint='none', compare=None, work_dir=str(tmp_path),
                           launcher='none', cfg_options=options)
    assert run_command('test', args) == 0
    assert list(json.loads((tmp_path / 'metrics.json').read_text())) == ['base']
