"""Model cards: metadata that the hub reads, numbers, images, code that stock diffusers runs, and nothing private."""

import json
import re
import shlex
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
from diffengine_sdxl.images import labelled_grid
from diffengine_sdxl.pages import markdown

BASE = 'stabilityai/stable-diffusion-xl-base-1.0'


def number(value: float | None, width: float = 0.1, **more: Any) -> dict[str, Any]:
    bounds = {} if value is None else {'low': value - width, 'high': value + width}
    return {'value': value, 'low': None, 'high': None, 'num_samples': 6, 'p': None, 'better': 1, **bounds, **more}


RESULTS = {'base': {'clip_t': number(0.25), 'fid': number(20.0, better=-1), 'odd': number(None)},
           'adapted': {'clip_t': number(0.5), 'fid': number(10.0, better=-1), 'odd': number(None)},
           'adapted - base': {'clip_t': number(0.25, p=0.0125), 'fid': number(-10.0, better=-1), 'odd': number(None)}}
MANIFEST: dict[str, Any] = {
    'step': 4, 'max_iters': 8, 'contents': ['style'], 'weights': {'style': 'd4'}, 'ema': False,
    'seed': 3, 'speed': {'compile': 'off'}, 'rows': 16,
    'base': {'pretrained': BASE, 'unet': None, 'vae': '/home/alice/vae', 'revision': None, 'variant': None},
    'dataset': {'type': 'HFDataset', 'source': 'fusing/fill50k', 'split': 'train', 'image_column': 'image'},
    'hub': ['fusing/fill50k', BASE], 'git_commit': None, 'versions': {'torch': '2.0'},
    'command': shlex.join([
        'diffengine-sdxl', 'train', '/home/alice/cats.py', '--work-dir', 'work_dirs/alice/W',
        '--resume=runs/alice/1.pth', '--cfg-options', "a.b=['/mnt/x','../y/alice b/z']", 'c=data/alice/x',
        'load_from=/data/(alice) x/5.pth', "e=dict(type='E', model=alice/m y)", 'd.source=fusing/fill50k',
        'x.keep_best=val/loss']),
    'config': {'model': {'adapters': {'style': {'type': 'LoRA'}, 'pose': {
        'type': 'ControlNet', 'trainable': False, 'scale': 0.5, 'weights': '/home/alice/pose'}, 'none': None},
        'objective': {'type': 'Mine', 'teacher': 'alice/secret/t.pth'}},
        'mixed_precision': 'bf16', 'resolution': [64, 32], 'work_dir': 'runs/alice/x',
        'train_cfg': {'max_iters': None, 'max_epochs': 2},
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
    assert data.widget == [{'text': f'cat {row}', 'output': {'url': f'card-images/{row}_adapted.png'}}
                           for row in range(2)]
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
    assert '| cat 1 | ![without](card-images/1_base.png) | ![with](card-images/1_adapted.png) |' in text
    for name, gray in (('0_base', 100), ('1_adapted', 1)):
        with Image.open(work_dir / 'step4' / 'card-images' / f'{name}.png') as image:
            assert image.getpixel((0, 0)) == (gray,) * 3 and not image.info
    assert not (work_dir / 'step4' / 'card-images' / '2_adapted.png').exists()
    for row in ('steps | `4 of 8, 2 epochs`', 'rows of a step | `8 (batch 2 x 4 accumulated x 1 process)`',
                'optimizer | `AdamW(weight_decay=0.01)`', 'resolution | `32 x 64`', 'rows | 16', 'seed | `3`'):
        assert f'| {row} |' in text, row
    assert '- `pose`, ControlNet from pose, frozen, at scale 0.5\n' in text
    line = next(line for line in text.splitlines() if line.startswith('diffengine-sdxl train'))
    assert shlex.split(line) == [
        'diffengine-sdxl', 'train', 'cats.py', '--resume=1.pth', '--cfg-options', "a.b=['x','z']", 'c=x',
        'load_from=5.pth', "e=dict(type='E', model=m y)", 'd.source=fusing/fill50k', 'x.keep_best=val/loss']
    assert '| objective | `Mine(teacher=t.pth)` |' in text
    assert 'alice' not in (work_dir / 'step4' / 'README.md').read_text()
    assert 'alice' not in str(model_card.public_manifest(MANIFEST))


def test_what_is_not_known_is_left_out(work_dir: Path) -> None:
    """A local base and local data, no numbers, no images, and a manifest of an earlier version."""
    shutil.rmtree(work_dir / 'val')
    shutil.rmtree(work_dir / 'samples')
    (work_dir / 'run.json').unlink()
    later = ('hub', 'rows', 'command', 'max_iters', 'weights')
    old = {key: value for key, value in MANIFEST.items() if key not in later}
    (work_dir / 'step4' / 'manifest.json').write_text(json.dumps(old))
    data, text = card(work_dir)
    assert data.base_model is data.datasets is data.eval_results is None and 'base_model_relation' not in data
    assert '# Measured' not in text and 'With and without' not in text and '```bash\ndiffengine-sdxl train' not in text
    assert '| steps | `4 of 4` |' in text
    assert 'for `stable-diffusion-xl-base-1.0`, trained on `fill50k`' in text and "'BASE'" in text


def test_a_test_of_this_step_comes_first(work_dir: Path) -> None:
    """Its numbers and its images, wherever it lies; a test of other weights is never taken for one of these."""
    test = {**RESULTS, 'adapted': {**RESULTS['adapted'], 'clip_t': number(0.75)}}
    report.save(work_dir / 'metrics.json', test)
    images = work_dir / 'test' / 'images'
    text = json.dumps({'key': 'a', 'prompt': 'a drawn cat', 'noise_seed': 1})
    for image_set, gray in (('base', 50), ('adapted', 200)):
        picture(images / image_set / '000000_seed0.png', gray, size=600, sample=text)
    report.save_samples(work_dir / 'test' / 'samples.csv', [
        {'key': 'a', 'seed': 0, 'noise_seed': 1, 'image_set': name, 'file': f'images/{name}/000000_seed0.png'}
        for name in ('base', 'adapted')])
    weights = {'base': 'b', 'style': 'd2'}
    record = {'step': 4, 'checkpoint': str(work_dir / 'step4.pth'), 'weights': "'W/step2', step 2", 'image_sets': {
        'base': {'weights': {'base': 'b'}}, 'adapted': {'weights': weights}},
        'seeds': [0, 1, 2], 'num_samples': 2, 'dataset': {'type': 'HFDataset', 'source': '/data/x'}}
    (images / 'record.json').write_text(json.dumps(record))
    assert [result.metric_value for result in card(work_dir)[0].eval_results] == [0.5, 10.0]
    with pytest.raises(UserError, match="not of a test of step 4: .* It was of 'W/step2', step 2. Test these"):
        model_card.write_card(work_dir, 4, work_dir / 'metrics.json')
    weights['style'] = 'd4'
    (images / 'record.json').write_text(json.dumps(record))
    data, written = card(work_dir)
    assert [result.metric_value for result in data.eval_results] == [0.75, 10.0]
    assert {result.dataset_name for result in data.eval_results} == {'x'}
    assert 'By a test of step 4 on x: 2 samples, 3 seeds each, 6 images.' in written
    assert data.widget == [{'text': 'a drawn cat', 'output': {'url': 'card-images/0_adapted.jpg'}}]
    with Image.open(work_dir / 'step4' / 'card-images' / '0_adapted.jpg') as image:
        assert image.size == (512, 512) and abs(image.getpixel((9, 9))[0] - 200) <= 2
    elsewhere = work_dir.parent / 'T'
    elsewhere.mkdir()
    for name in ('metrics.json', 'test'):
        shutil.move(work_dir / name, elsewhere / name)
    assert [result.metric_value for result in card(work_dir)[0].eval_results] == [0.5, 10.0]
    assert cli.main('card', [str(work_dir / 'step4'), '--metrics', str(elsewhere / 'metrics.json'), '--repo-id',
                             'me/cats']) == 0
    again = ModelCard.load(str(work_dir / 'step4' / 'README.md'))
    assert again.data.eval_results[0].metric_value == 0.75 and "load_lora_weights('me/cats', subfolder=" in again.text


def test_a_test_that_compared_with_it(work_dir: Path) -> None:
    """The numbers of the image set 'compared'; and its images, without the test's title, which has a path."""
    results = {'adapted': RESULTS['base'], 'compared': RESULTS['adapted'], 'adapted - compared': RESULTS['base']}
    report.save(work_dir / 'metrics.json', results)
    picture(work_dir / 'test' / 'pictures.png', 33)
    picture(work_dir / 'test' / 'images' / 'compared' / '000000_seed0.png', 90, sample='{"prompt": "a cat"}')
    report.save_samples(work_dir / 'test' / 'samples.csv', [{
        'key': 'a', 'seed': 0, 'noise_seed': 1, 'image_set': 'compared', 'file': 'images/compared/000000_seed0.png'}])
    (work_dir / 'test' / 'images' / 'record.json').write_text(json.dumps({'image_sets': {
        'adapted': {'weights': {'base': 'b', 'style': 'd2'}}, 'compared': {'weights': {'base': 'b', 'style': 'd4'}}}}))
    shutil.rmtree(work_dir / 'samples')
    data, text = card(work_dir)
    assert [result.metric_value for result in data.eval_results] == [0.5, 10.0] and '| base alone |' not in text
    assert '## Images' in text and 'Samples of the test' in text
    title = labelled_grid([('a cat', [Image.new('RGB', (8, 8), (90,) * 3)])], [''], 'step 4')
    with Image.open(work_dir / 'step4' / 'card-images' / 'sheet.png') as sheet:
        assert sheet.tobytes() == title.tobytes()


@pytest.mark.parametrize('text', [
    '[]', 'null', '{', '{"step": 3}', json.dumps({'adapted': {'iou': number(float('nan'))}})])
def test_files_that_are_no_results(text: str, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work_dir / 'x.json').write_text(text)
    assert cli.main('card', [str(work_dir / 'step4'), '--metrics', str(work_dir / 'x.json')]) == 1
    assert f"'{work_dir}/x.json' is no metrics.json of a test (" in (error := capsys.readouterr().err)
    assert 'remove it' not in error and 'Traceback' not in error


def test_bases_of_the_package_and_turned_text(work_dir: Path) -> None:
    manifest = {**MANIFEST, 'base': {'pretrained': 'diffengine_sdxl::shapes/base'}, 'hub': []}
    (work_dir / 'step4' / 'manifest.json').write_text(json.dumps(manifest))
    picture(work_dir / 'samples' / 'images' / 'step4_0_seed7.png', 1, prompt='cat \u202egod')
    _, text = card(work_dir)
    assert 'for `diffengine_sdxl::shapes/base`' in text and "from_pretrained('diffengine_sdxl::shapes/base'" in text
    assert '| cat god |' in text and '\u202e' not in (work_dir / 'step4' / 'README.md').read_text()


def test_images_of_another_sampler_are_no_pair(work_dir: Path) -> None:
    picture(work_dir / 'samples' / 'images' / 'step4_0_seed7.png', 1, prompt='cat 0', sample='new')
    assert '| cat 0 |' not in (text := card(work_dir)[1]) and '| cat 1 |' in text


def test_the_card_is_no_part_of_the_weights(work_dir: Path) -> None:
    """A PNG's record of an export compares its digest, which stays when the card is written or written again.

    An adapter of any name is.
    """
    (work_dir / 'step4' / 'images').mkdir()
    (work_dir / 'step4' / 'images' / 'x').write_text('an adapter')
    before = sha256(work_dir / 'step4')
    card(work_dir)
    assert sha256(work_dir / 'step4') == before and (work_dir / 'step4' / 'README.md').is_file()
    assert (work_dir / 'step4' / 'images' / 'x').read_text() == 'an adapter'
    (work_dir / 'step4' / 'images' / 'x').write_text('another')
    assert sha256(work_dir / 'step4') != before


def test_failures(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence of the command; in a training a warning, and no export is no failure."""
    with pytest.raises(UserError, match='has no manifest.json'):
        model_card.write_card(work_dir, 3)
    assert cli.main('card', [str(work_dir / 'step3')]) == cli.main(
        'card', [str(work_dir / 'step4'), '--metrics', 'gone.json']) == cli.main(
        'card', [str(work_dir / 'step4'), '--repo-id', 'x y z']) == 1
    assert 'is no export of a training' in (err := capsys.readouterr().err) and "no file 'gone.json'" in err
    assert "--repo-id 'x y z' is no name for a repository" in err
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
    ('/home/a/b c', 'b c'), ('~/x', 'x'), ('~alice', '~'), ('a/b', 'b'), ('my data/x y', 'x y'), (r'C:\a\b', 'b'),
    ('file:///home/a/b', 'b'), ('s3://alice/b', 'b'), ('cat', 'cat'), (BASE, BASE),
    ('https://me:key@host/x.png?token=1', 'x.png'), (f'https://huggingface.co/{BASE}/blob/main/a.safetensors',) * 2])
def test_private_paths(text: str, public: str) -> None:
    values = {'a': [text, 1, None], 'prompts': ['a cat/dog'], 'caption': f'at /home/{BASE}'}
    assert facts.public_values(values, [BASE]) == {
        'a': [public, 1, None], 'prompts': ['a cat/dog'], 'caption': f'at {Path(BASE).name}'}


@pytest.mark.parametrize(('value', 'span'), [('a', '`a`'), ('a`b', '``a`b``'), ('`', '`` ` ``'), ('a|b', r'`a\|b`')])
def test_code_in_cells(value: str, span: str) -> None:
    assert markdown.cell(value) == span


@pytest.mark.parametrize(('text', 'shown'), [
    ('# a', r'\# a'), ('- a', r'\- a'), ('+ a', r'\+ a'), ('---', r'\---'), ('===', r'\==='), ('1. a', r'1\. a'),
    ('> a', r'\> a'), ('-0.5', '-0.5'), ('+0.5 (0 to 1)', '+0.5 (0 to 1)'), ('2.13', '2.13'), ('a # - b', 'a # - b')])
def test_texts_that_begin_a_line(text: str, shown: str) -> None:
    assert markdown.escaped(text) == shown


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
