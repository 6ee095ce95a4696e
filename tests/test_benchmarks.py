"""The benchmarks that need a GPU or full size, on a tiny SDXL: they run, and what they compare is comparable."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffengine_sdxl.shapes import BASE
from diffengine_sdxl.testing.adapters import write_tiny_adapter

BENCHMARKS = Path(__file__).resolve().parents[1] / 'benchmarks'
LORA = {'type': 'LoRA', 'rank': 2}
IP_ADAPTER = {'type': 'IPAdapter', 'architecture': 'plus', 'image_encoder': BASE,
              'image_encoder_subfolder': 'image_encoder'}
T2I_ADAPTER = {'type': 'T2IAdapter'}


@pytest.fixture(scope='module', autouse=True)
def path() -> Iterator[None]:
    """The scripts, which import each other by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope='module')
def bench(path: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of gpu.py's parts on a tiny base."""
    import gpu
    from workbench import Workbench
    folder = tmp_path_factory.mktemp('bench')
    return gpu.Bench(Workbench(folder, 'cpu', tiny=True), folder, compile=('off',), batch_sizes=(1,), steps=1,
                     solver_steps=2)


def finite(row: dict[str, Any]) -> bool:
    return all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_steps_images_and_exactness(bench: Any) -> None:
    """Rows have figures, and are in the file at once."""
    import gpu_exact
    import gpu_images
    import gpu_parity
    import gpu_steps
    bench.section, bench.started = 'test', gpu_steps.time.monotonic()
    bench.measure('ours', lambda: gpu_steps._ours(bench, 't2i', 1, 'off'), batch=1)
    bench.measure('recipe', lambda: gpu_steps._recipe(bench, 'lora', 1, cached=False), batch=1)
    bench.measure('image', lambda: gpu_images._ours(bench, ('lora',), 'off'))
    bench.measure('stock', lambda: gpu_parity._stock(bench, ('ip',), 'no'))
    bench.measure('nan', lambda: gpu_parity._nan(bench))
    bench.measure('exact', lambda: gpu_exact._exact(bench, 'lora'))
    ours, recipe, image, stock, nan, exact = bench.rows
    assert not [row for row in bench.rows if 'error' in row], bench.rows
    assert [json.loads(line) for line in (bench.out / 'results.jsonl').read_text().splitlines()] == bench.rows
    assert all(map(finite, bench.rows))
    assert ours['ms'] > 0 and recipe['images_s'] > 0 and image['after_swap_s'] > 0
    assert stock['equal'] and nan['names_its_step'] and nan['weights_of_last_good_step']
    assert exact['run_twice_equal'] and exact['resumed_equal']
    names = [name for name, _ in bench.base.parts['unet'].named_parameters() if 'lora' in name]
    assert not names, 'the base is as it was'


def test_a_row_that_fails_is_a_row(bench: Any) -> None:
    def out_of_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError('no')

    def fails() -> dict[str, Any]:
        raise ValueError('why')
    import gpu
    start = len(bench.rows)
    bench.measure('large', out_of_memory, batch=99)
    bench.measure('wrong', fails)
    bench.budget = 0.0
    bench.measure('late', fails)
    bench.budget = 170.0
    large, wrong, late = bench.rows[start:]
    assert large['out_of_memory'] and large['batch'] == 99
    assert wrong['error'] == 'ValueError: why' and late['skipped'] == 'no time left'
    assert '| large | 99 |' in gpu.table(bench.rows)


def test_the_checksum_sees_a_bit_and_its_place(path: None) -> None:
    from gpu_exact import digest
    one = torch.zeros(4)
    other, moved = one.clone(), one.clone()
    other[1], moved[2] = 1e-45, 1e-45
    assert len({digest([one]), digest([other]), digest([moved])}) == 3
    assert digest([one, {'step': 1}]) != digest([one, {'step': 2}])
    assert digest([one.bfloat16()]) == digest([one.bfloat16().clone()])


@pytest.mark.parametrize('kind', ['t2i', 'lora'])
def test_ours_and_the_recipe_have_the_same_loss(kind: str, path: None) -> None:
    import train_step
    row = train_step.measure_recipe(kind, pairs=2, block=1, size=1, warm_up=0)
    assert row['losses'][0] == pytest.approx(row['losses'][1], rel=1e-5) and 0 < row['ratio'] < 10


def test_sets_of_adapters_are_compared(path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """A set that lacks an adapter is left out; the last step of each config counts; what is measured already stands."""
    import together
    kinds = {'style': LORA, 'ip': IP_ADAPTER, 'layout': T2I_ADAPTER}
    for run, steps in (('apart', (1, 20)), ('repaired', (3,))):
        for name, (config, subfolder) in together.SETS[run].items():
            for step in steps:
                write_tiny_adapter(tmp_path / f'{config}/step{step}/{subfolder}', BASE, kinds[name])
    out = tmp_path / 'out'
    monkeypatch.setattr(sys, 'argv', ['together.py', str(tmp_path), '--out', str(out), '--num-samples', '2',
                                      '--seeds', '1'])
    together.main()
    said = capsys.readouterr()
    assert "shapes_lora_partners' has no step*/style" in said.err
    rows = [line.strip('| ').split(' | ') for line in said.out.splitlines() if line.startswith('| ')]
    assert [row[:2] for row in rows if row[0] in together.SETS] == [
        *([run, what] for run in ('apart', 'repaired') for what in (
            'style: style_score', 'ip: fill_accuracy', 'ip: ground_accuracy', 'layout: iou', 'harmonic mean')),
        *(['repaired', f'{name}: {metric}'] for name, metric in together.MEASURES)]
    [dumped] = (out / 'apart').glob('*/vis_data/config.py')
    assert 'shapes_lora/step20/style' in dumped.read_text()
    with Image.open(out / 'together.png') as sheet:
        assert sheet.width > 8 * 128
    monkeypatch.setattr(together, 'evaluate', None)
    together.main()
    with pytest.raises(SystemExit, match='holds no complete set'):
        monkeypatch.setattr(sys, 'argv', ['together.py', str(out), '--out', str(tmp_path / 'none')])
        together.main()


def test_metrics_are_timed(path: None, capsys: pytest.CaptureFixture[str]) -> None:
    import metrics
    seconds = metrics.main(['--samples', '4', '--threads', '1'])
    assert list(seconds) == ['fill_accuracy', 'iou', 'clip_i_base_image_encoder', 'kid_base_image_encoder', 'ssim']
    assert '8 images of 4 samples' in capsys.readouterr().out
