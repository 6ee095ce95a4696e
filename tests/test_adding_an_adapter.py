"""docs/adding_an_adapter.md: its two files as they stand there work with its commands, and its tables are complete."""

import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from installs import ROOT
from kinds import CASES, build, conditions, sample, shaken
from parity import assert_same, grads, make_batch
from PIL import Image
from safetensors.torch import load_file

from diffengine_sdxl import config, registry
from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.commands import cli
from diffengine_sdxl.config import custom_modules
from diffengine_sdxl.engine.report import read_samples
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import UNetCall

PAGE = (ROOT / 'docs' / 'adding_an_adapter.md').read_text()
FILES = dict(re.findall(r'^```python (\w+\.py)\n(.*?)^```', PAGE, re.M | re.S))
#: Options that make a command of the page small.
SMALL = {
    'train': ['--cfg-options', 'train_cfg.max_iters=2', 'train_dataloader.batch_size=2',
                 'default_hooks.checkpoint.interval=2', 'default_hooks.samples=None', 'default_hooks.progress=None',
                 'default_hooks.curves=None'],
    'test': ['--cfg-options', 'test_dataloader.dataset.length=2', 'test_cfg.seeds=1',
                'model.sampler.num_inference_steps=2'],
    'infer': ['--cfg-options', 'model.sampler.num_inference_steps=2']}
PALETTE = dict(type='PalettePrompt')


def forget() -> None:
    """Forget the module and its folder, as a new process would."""
    sys.modules.pop('my_parts', None)
    registry.ADAPTERS.module_dict.pop('PalettePrompt', None)
    registry.METRICS.module_dict.pop('PaletteOverlap', None)
    sys.path[:] = [folder for folder in sys.path if Path(folder) not in custom_modules._appended]
    custom_modules._appended.clear()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of the page, and an image; the module is imported."""
    folder = tmp_path_factory.mktemp('own')
    for name, text in FILES.items():
        (folder / name).write_text(text)
    Image.new('RGB', (80, 60), (250, 30, 200)).save(folder / 'REFERENCE.png')
    path = [*sys.path]
    config.load(folder / 'my_config.py')
    yield folder
    forget()
    sys.path[:] = path


def run(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Run one command of the page in this process, made small."""
    while match := re.fullmatch(r'PYTHONPATH=(\S+)', words[0]):
        sys.path.append(os.path.abspath(match[1]))
        words = words[1:]
    if words[0] == 'cd':
        patch.chdir(words[1])
        return
    tool, *words = words[1:]
    words = [str(found) for word in words for found in (sorted(Path().glob(word)) if '*' in word else [word])]
    small = [option.replace('=2', '=4') if '--resume' in words and 'max_iters' in option else option
             for option in ([] if words[0].endswith('.png') else SMALL[tool])]
    assert cli.main(tool, [*words, *small]) == 0, words


def pixels(folder: str) -> bytes:
    path, = Path(folder).glob('0*.png')
    return Image.open(path).tobytes()


def test_the_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands in order, the last one in a new process: the module is found on PYTHONPATH."""
    training, again = re.findall(r'^```sh\n(.*?)^```', PAGE, re.M | re.S)
    monkeypatch.chdir(folder)
    for line in training.splitlines():
        run(shlex.split(line), monkeypatch)
    assert [path.name for path in sorted(Path('W').glob('step*.pth'))] == ['step2.pth', 'step4.pth']
    exported = load_file('W/step4/palette/adapter.safetensors')
    assert exported.keys() == {'net.0.weight', 'net.2.weight'} and exported['net.2.weight'].any()
    results = json.loads(Path('W/metrics.json').read_text())
    assert [*results] == ['base', 'adapted', 'adapted - base']
    assert 0 <= results['adapted']['palette_overlap']['value'] <= 1
    assert results['adapted - base']['palette_overlap']['p'] is not None  # paired
    assert all(0 <= float(row['palette_overlap']) <= 1 for row in read_samples(Path('W/test/samples.csv')))
    before = pixels('P')
    recorded = json.loads(Image.open(next(Path('P').glob('0*.png'))).text['diffengine_sdxl'])  # type: ignore[attr-defined]
    assert [module['name'] for module in recorded['modules']] == ['my_parts']
    forget()
    for line in again.splitlines():
        run(shlex.split(line), monkeypatch)
    assert pixels('AGAIN') == before and sys.modules['my_parts'].__file__ == str(folder / 'my_parts.py')


def test_the_adapter(folder: Path, tiny_base: Path) -> None:
    """Scale 0 is the base; in a range it is scale and base in turn; all its weights train, with checkpointing too."""
    base, model = SDXL(pretrained=str(tiny_base)), build(tiny_base, dict(a=PALETTE))
    inputs = conditions(dict(condition_key='reference'))
    expected = sample(base, inputs)
    assert torch.equal(sample(model, inputs), expected)  # untrained
    moved = sample(shaken(model, CASES['lora']), inputs)
    assert not torch.allclose(moved, expected, atol=1e-3)
    model.adapters['a'].scale = 0
    assert torch.equal(sample(model, inputs), expected)
    results = []
    for checkpointing in (False, True):
        model = shaken(build(tiny_base, dict(a=dict(PALETTE, active_range=(0, 0.5))),
                             gradient_checkpointing=checkpointing), CASES['lora'])
        results.append(grads(model, make_batch(2, conditions=inputs)))
        assert len(results[-1][1]) == 2 and all(gradient.any() for gradient in results[-1][1].values())
    assert_same(results[0][1], results[1][1])
    calls: list[Any] = []
    model.unet.register_forward_hook(
        lambda _m, _a, kwargs, _out: calls.append(kwargs['encoder_hidden_states']), with_kwargs=True)
    sample(model, inputs, steps=4)
    texts = [call[:, :1] - calls[-1][:, :1] for call in calls]
    assert [bool(text.any()) for text in texts] == [True, True, False, False]


@pytest.mark.parametrize('other', [dict(PALETTE, hidden=8), CASES['ip_adapter'].config, CASES['lora'].config])
def test_the_order_of_adapters_changes_nothing(folder: Path, tiny_base: Path, other: dict[str, Any]) -> None:
    """Bitwise, beside another of its kind, image tokens, and a change of the base's own modules."""
    configs, inputs = {'a': PALETTE, 'b': other}, conditions(dict(condition_key='reference'))
    both, swapped = (sample(shaken(build(tiny_base, {name: configs[name] for name in order}),
                                   CASES['lora'], CASES['lora']), inputs, steps=2) for order in ('ab', 'ba'))
    assert torch.equal(both, swapped)


def test_its_files(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The default format is strict; the weights come back bitwise."""
    model = shaken(build(tiny_base, dict(a=PALETTE)), CASES['lora'])
    model.adapters['a'].save(tmp_path / 'a')
    loaded = build(tiny_base, dict(a=dict(PALETTE, weights=str(tmp_path / 'a'), trainable=False)))
    assert_same(loaded.adapters['a'].state_dict(), model.adapters['a'].state_dict())
    with pytest.raises(UserError, match=r"adapter\.safetensors' don't fit: 2 of another shape \(net\.0\.weight, net"):
        build(tiny_base, dict(a=dict(PALETTE, hidden=8, weights=str(tmp_path / 'a'))))
    loaded.adapters['a'].net.append(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r'2 missing \(net\.3\.bias, net\.3\.weight\)'):
        loaded.adapters['a'].load(tmp_path / 'a')


def test_the_histogram(folder: Path) -> None:
    """As numpy's, and all of the pixels are in it."""
    images = torch.rand(2, 3, 16, 24)
    found = sys.modules['my_parts'].histogram(images)
    for image, row in zip(images, found, strict=True):
        cells, _ = np.histogramdd(image.flatten(1).T.numpy(), bins=4, range=[(0, 1)] * 3)
        np.testing.assert_allclose(row.reshape(4, 4, 4), cells / cells.sum(), rtol=1e-5)
    assert sys.modules['my_parts'].histogram(torch.ones(1, 3, 2, 2))[0, -1] == 1


def table(heading: str) -> set[str]:
    """Return the names in the first column of the table whose head begins with `heading`."""
    rows = PAGE.partition(f'| {heading} |')[2].partition('\n\n')[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r'`(\w+)`', row.split('|')[1])}


def test_the_tables_are_complete() -> None:
    """Every method and setting of an adapter and every contribution is listed, and no other; registries exist."""
    own = {name for name in vars(Adapter) if not name.startswith('_')} | {'__init__'}
    assert table('method or attribute') == own
    assert table('method') == {name for name, _ in inspect.getmembers(UNetCall, inspect.isfunction)
                               if name.startswith('add_')}
    rows = PAGE.partition('| part | registry |')[2].splitlines()[2:]
    names = [name for row in rows for name in re.findall(r'`(\w+)`', row.split('|')[2])]
    assert len(names) == 12 and all(hasattr(registry, name) for name in names)
