"""Model cards: metadata that the hub reads, numbers, images, code that stock diffusers runs, and nothing private."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from kinds import CASES, WORD, build, run, shaken
from parity import PROMPTS, picture_batch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffengine_sdxl.adapters.formats import modelspec
from diffengine_sdxl.commands import cli
from diffengine_sdxl.commands.infer.digests import sha256
from diffengine_sdxl.engine import model_card, report
from diffengine_sdxl.engine.model_card import facts
from diffengine_sdxl.engine.model_card.loading import how_to_load
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.pages import markdown

BASE = 'stabilityai/stable-diffusion-xl-base-1.0'


def number(value: float | None, width: float = 0.1, **more: Any) -> dict[str, Any]:
    bounds = {} if value is None else {'low': value - width, 'high': value + width}
    return {'value': value, 'low': None, 'high': None, 'num_samples': 6, 'p': None, 'better': 1, **bounds, **more}


RESULTS = {'base': {'clip_t': number(0.25), 'fid': number(20.0, better=-1), 'odd': number(None)},
           'adapted': {'clip_t': number(0.5), 'fid': number(10.0, better=-1), 'odd': number(None)},
           'adapted - base': {'clip_t': number(0.25, p=0.0125), 'fid': number(-10.0, better=-1), 'odd': number(None)}}
MANIFEST: dict[str, Any] = {
    'step': 4, 'contents': ['style'], 'ema': False, 'seed': 3, 'speed': {'compile': 'off'}, 'rows': 16,
    'base': {'pretrained': BASE, 'unet': None, 'vae': '/home/alice/vae', 'revision': None, 'variant': None},
    'dataset': {'type': 'HFDataset', 'source': 'fusing/fill50k', 'split': 'train', 'image_column': 'image'},
    'hub': ['fusing/fill50k', BASE], 'git_commit': None, 'versions': {'torch': '2.0'},
    'command': "diffengine-sdxl train /home/alice/cats.py --work-dir ~/W --cfg-options a.b=['/mnt/x','../y/z'] c=1/2",
    'config': {'model': {'adapters': {'style': {'type': 'LoRA'}, 'pose': {
        'type': 'ControlNet', 'trainable': False, 'scale': 0.5, 'weights': '/home/alice/pose'}, 'none': None}},
        'mixed_precision': 'bf16', 'resolution': [64, 32], 'train_cfg': {'max_iters': 8},
        'optim_wrapper': {'optimizer': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.01}},
        'val_cfg': {'seeds': 2}, 'val_dataloader': {'dataset': {'type': 'Shapes', 'split': 'val'}}}}


@pytest.fixture
def work_dir(tmp_path: Path, tiny_lora: Path) -> Path:
    """A run of a LoRA with an export, a validation of its step and sample images."""
    folder = tmp_path / 'cats'
    shutil.copytree(tiny_lora, folder / 'step4' / 'style')
    modelspec.stamp(folder / 'step4' / 'style', {'modelspec.license': 'CC0-1.0', 'modelspec.trigger_phrase': 'sks, tok',
                                                 'modelspec.description': 'Cats | <script>x</script> __dogs__'})
    (folder / 'step4' / 'manifest.json').write_text(json.dumps(MANIFEST))
    (folder / 'run.json').write_text(json.dumps({'seed': 3, 'identity': {'split': {
        'batch_size': 2, 'accumulative_counts': 4, 'processes': 1}}}))
    (folder / 'val').mkdir()
    report.save(folder / 'val' / 'step4.json', RESULTS)
    images = folder / 'samples' / 'images'
    images.mkdir(parents=True)
    for row in range(2):
        picture(images / f'step4_{row}_seed7.png', row, prompt=f'cat {row}')
        picture(images / f'base_{row}_seed7.png', 100 + row)
    picture(images / 'step4_2_seed7.png', 3)  # without the base's
    return folder


@pytest.fixture(scope='module')
def tiny_lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('lora') / 'style'
    shaken(build(tiny_base, {'style': CASES['lora'].config}), CASES['lora']).adapters['style'].save(folder)
    return folder


def picture(path: Path, gray: int, size: int = 8, **texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new('RGB', (size, size), (gray,) * 3).save(path, pnginfo=info)


def card(work_dir: Path) -> tuple[Any, str]:
    """Write the card; return its metadata, as huggingface_hub reads them back, and its text."""
    model_card.write_card(work_dir, 4)
    loaded = ModelCard.load(str(work_dir / 'step4' / 'README.md'))
    return loaded.data, loaded.text


def test_the_metadata(work_dir: Path) -> None:
    data, _ = card(work_dir)
    assert (data.base_model, data.base_model_relation, data.library_name) == (BASE, 'adapter', 'diffusers')
    assert (data.license, data.pipeline_tag, data.datasets) == ('cc0-1.0', 'text-to-image', ['fusing/fill50k'])
    assert data.instance_prompt == 'sks, tok' and {'lora', 'stable-diffusion-xl'} <= set(data.tags)
    assert data.widget == [{'text': f'cat {row}', 'output': {'url': f'images/{row}_adapted.png'}} for row in range(2)]
    fixed = dict(task_type='text-to-image', task_name='Text-to-Image', dataset_type='Shapes', dataset_name='Shapes',
                 dataset_split='val')
    assert data.eval_results == [
        EvalResult(**fixed, metric_type=name, metric_name=name, metric_value=value, metric_args={
            'num_images': 6, 'interval_95': [value - 0.1, value + 0.1], 'minus_base': minus,
            'minus_base_interval_95': [minus - 0.1, minus + 0.1]})
        for name, value, minus in (('clip_t', 0.5, 0.25), ('fid', 10.0, -10.0))]


def test_the_text(work_dir: Path) -> None:
    _, text = card(work_dir)
    assert ('| `clip_t` (higher is better) | 0.5000 (0.4000 to 0.6000) | 0.2500 (0.1500 to 0.3500) | '
            '+0.2500 (0.1500 to 0.3500), p = 0.0125 |\n| `fid` (lower is better) | 10.0000') in text
    assert '`odd`' not in text
    assert 'By a validation of step 4 on Shapes, split val: 2 seeds each, 6 images.' in text
    assert r'Cats \| \<script\>x\</script\> \_\_dogs\_\_' in text and '**Trigger words:** `sks`, `tok`.' in text
    assert '| cat 1 | ![without](images/1_base.png) | ![with](images/1_adapted.png) |' in text
    for name, gray in (('0_base', 100), ('1_adapted', 1)):
        with Image.open(work_dir / 'step4' / 'images' / f'{name}.png') as image:
            assert image.getpixel((0, 0)) == (gray,) * 3 and not image.info
    assert not (work_dir / 'step4' / 'images' / '2_adapted.png').exists()
    for row in ('steps | `4 of 8, 2 epochs`', 'rows of a step | `8 (batch 2 x 4 accumulated x 1 process)`',
                'optimizer | `AdamW(weight_decay=0.01)`', 'resolution | `32 x 64`', 'rows | 16', 'seed | `3`'):
        assert f'| {row} |' in text, row
    assert '- `pose`, ControlNet from pose, frozen, at scale 0.5\n' in text
    assert "diffengine-sdxl train cats.py --work-dir W --cfg-options a.b=['x','z'] c=1/2" in text
    assert 'alice' not in (work_dir / 'step4' / 'README.md').read_text()


def test_what_is_not_known_is_left_out(work_dir: Path) -> None:
    """A local base and local data, no numbers, no images, and a manifest of an earlier version."""
    shutil.rmtree(work_dir / 'val')
    shutil.rmtree(work_dir / 'samples')
    (work_dir / 'run.json').unlink()
    old = {key: value for key, value in MANIFEST.items() if key not in ('hub', 'rows', 'command')}
    (work_dir / 'step4' / 'manifest.json').write_text(json.dumps(old))
    data, text = card(work_dir)
    assert data.base_model is data.datasets is data.eval_results is None and 'base_model_relation' not in data
    assert '# Measured' not in text and 'With and without' not in text and '```bash\ndiffengine-sdxl train' not in text
    assert 'for `stable-diffusion-xl-base-1.0`, trained on `fill50k`' in text and "'BASE'" in text


def test_a_test_of_this_step_comes_first(work_dir: Path) -> None:
    """Its numbers and its images; a test of another step counts only if the command names it."""
    test = {**RESULTS, 'adapted': {**RESULTS['adapted'], 'clip_t': number(0.75)}}
    report.save(work_dir / 'metrics.json', test)
    images = work_dir / 'test' / 'images'
    text = json.dumps({'key': 'a', 'prompt': 'a drawn cat', 'noise_seed': 1})
    for image_set, gray in (('base', 50), ('adapted', 200)):
        picture(images / image_set / '000000_seed0.png', gray, size=600, sample=text)
    report.save_samples(work_dir / 'test' / 'samples.csv', [
        {'key': 'a', 'seed': 0, 'noise_seed': 1, 'image_set': name, 'file': f'images/{name}/000000_seed0.png'}
        for name in ('base', 'adapted')])
    record = {'step': 2, 'seeds': [0, 1, 2], 'num_samples': 2, 'dataset': {'type': 'HFDataset', 'source': '/data/x'}}
    (images / 'record.json').write_text(json.dumps(record))
    assert [result.metric_value for result in card(work_dir)[0].eval_results] == [0.5, 10.0]
    (images / 'record.json').write_text(json.dumps({**record, 'step': 4}))
    data, written = card(work_dir)
    assert [result.metric_value for result in data.eval_results] == [0.75, 10.0]
    assert {result.dataset_name for result in data.eval_results} == {'x'}
    assert 'By a test of step 4 on x: 2 samples, 3 seeds each, 6 images.' in written
    assert data.widget == [{'text': 'a drawn cat', 'output': {'url': 'images/0_adapted.jpg'}}]
    with Image.open(work_dir / 'step4' / 'images' / '0_adapted.jpg') as image:
        assert image.size == (512, 512) and abs(image.getpixel((9, 9))[0] - 200) <= 2
    elsewhere = shutil.copy(work_dir / 'metrics.json', work_dir.parent / 'metrics.json')
    (images / 'record.json').write_text(json.dumps({**record, 'checkpoint': str(work_dir / 'step2.pth')}))
    assert cli.main('card', [str(work_dir / 'step4'), '--metrics', str(elsewhere), '--repo-id', 'me/cats']) == 0
    again = ModelCard.load(str(work_dir / 'step4' / 'README.md'))
    assert again.data.eval_results[0].metric_value == 0.75 and "load_lora_weights('me/cats', subfolder=" in again.text


def test_the_card_is_no_part_of_the_weights(work_dir: Path) -> None:
    """A PNG's record of an export compares its digest, which stays when the card is written or written again."""
    before = sha256(work_dir / 'step4')
    card(work_dir)
    assert sha256(work_dir / 'step4') == before and (work_dir / 'step4' / 'README.md').is_file()


def test_failures(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence of the command; in a training a warning, and no export is no failure."""
    with pytest.raises(UserError, match='has no manifest.json'):
        model_card.write_card(work_dir, 3)
    assert cli.main('card', [str(work_dir / 'step3')]) == cli.main(
        'card', [str(work_dir / 'step4'), '--metrics', 'gone.json']) == 1
    assert 'is no export of a training' in (err := capsys.readouterr().err) and "no file 'gone.json'" in err
    warnings: list[str] = []
    runner: Any = SimpleNamespace(work_dir=str(work_dir), logger=SimpleNamespace(
        warning=lambda text, **_: warnings.append(text)))
    model_card.update(runner, 3)
    (work_dir / 'val' / 'step4.json').write_text('{')
    model_card.update(runner, 4)
    assert len(warnings) == 1 and 'is damaged' in warnings[0]
    assert f'diffengine-sdxl card {work_dir}/step4' in warnings[0]
    assert not (work_dir / 'step4' / 'README.md').exists()


@pytest.mark.parametrize(('text', 'public'), [
    ('/home/a/b', 'b'), ('~/x', 'x'), ('x=/a/b,y', 'x=b,y'), ('a/b', 'a/b'), ('1/2 cat/dog', '1/2 cat/dog'),
    ('https://me:key@host/x.png?token=1', 'x.png'), (f'https://huggingface.co/{BASE}/blob/main/a.safetensors',) * 2])
def test_private_paths(text: str, public: str) -> None:
    assert facts.public_values({'a': [text, 1, None]}) == {'a': [public, 1, None]}


@pytest.mark.parametrize(('value', 'span'), [('a', '`a`'), ('a`b', '``a`b``'), ('`', '`` ` ``'), ('a|b', r'`a\|b`')])
def test_code_in_cells(value: str, span: str) -> None:
    assert markdown.cell(value) == span


def code_of(kind: str, base: Path, folder: Path) -> str:
    """Return the card's code for a kind, on the tiny base and the CPU."""
    settings = {key: str(base.parent / 'image_encoder') if key == 'image_encoder' else value
                for key, value in CASES[kind].config.items()}
    code = how_to_load(folder, 'it', settings, str(base), None, PROMPTS[0]).code
    code = code.replace("'cuda'", "'cpu'").replace('float16', 'float32').replace(repr(folder.name), repr(str(folder)))
    code = code.replace(f"{folder.name}'\n", f"{folder}'\n")
    return re.sub(r'\)\.images', ', num_inference_steps=1, height=64, width=64).images', code)


EXACT: dict[str, Callable[..., Any]] = {
    'lora': torch.equal, 'textual_inversion': torch.equal, 't2i_adapter': torch.equal,
    'loha': lambda a, b: torch.allclose(a, b, atol=1e-4)}


@pytest.mark.parametrize('kind', [*EXACT, 'ip_adapter'])
def test_the_code_runs_in_stock_diffusers(kind: str, tiny_base: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """And loads what the ecosystem's own loaders load: equal latents."""
    case = CASES[kind]
    shaken(build(tiny_base, {'it': case.config}), case).adapters['it'].save(tmp_path / 'step4' / 'it')
    monkeypatch.chdir(tmp_path)
    for name in ('CONDITION.png', 'REFERENCE.png'):
        picture(tmp_path / name, 200, size=64)
    names: dict[str, Any] = {}
    exec(code_of(kind, tiny_base, Path('step4')), names)
    assert names['image'].size == (64, 64)
    if kind in EXACT:
        batch = picture_batch([f'a {WORD}'], [4], conditions={'conditioning_image': torch.rand(1, 3, 64, 64)})
        image = {'image': batch.conditions['conditioning_image']} if kind == 't2i_adapter' else {}
        theirs = case.stock(tiny_base, tmp_path / 'step4' / 'it', batch)
        assert EXACT[kind](run(names['pipeline'], batch, **image), theirs)
