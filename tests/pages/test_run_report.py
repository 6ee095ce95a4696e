"""report.html, read by a parser: all numbers, no script, nothing from elsewhere, whatever the files hold."""

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.pages import embed as embedding
from diffengine_sdxl.pages.embed import Embedder
from diffengine_sdxl.pages.run_report import examples, write, write_report
from diffengine_sdxl.pages.run_report.files import WorkDir, read_settings
from diffengine_sdxl.pages.run_report.metrics import Number, by_metric, read_results

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\' & \udcff 東京 {{ 7 * 7 }}'
CONFIG = f"model = dict(type='SDXL')\ntrain_cfg = dict(max_iters=60, val_interval=20)\nname = {HOSTILE!r}\n"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ''
        self.source = path.read_text(encoding='utf-8')
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, key: str) -> list[str]:
        return [str(attributes[key]) for name, attributes in self.tags if name == tag and key in attributes]


def result(value: float | None, low: float | None, high: float | None, better: int = 1, p: float | None = None
           ) -> dict[str, Any]:
    return dict(value=value, low=low, high=high, num_samples=12, p=p, better=better)


METRICS = {
    'base': {'iou': result(0.5123456789, 0.41, 0.61), 'fid': result(80.125, 70.5, 90.25, -1), HOSTILE: result(1, 0, 2)},
    'adapted': {'iou': result(0.75, 0.7, 0.8), 'fid': result(95.5, 90.75, 99.5, -1), 'own': result(3.5, None, None)},
    'adapted - base': {'iou': result(0.2376543211, 0.125, 0.35, p=0.0015), 'fid': result(15.375, 2.25, 30.5, -1, 0.02),
                       'grey': result(0.015625, 0.0078125, 0.03125, 0), 'same': result(0.0, -0.0625, 0.046875)}}


def colour(number: int) -> tuple[int, int, int]:
    return (number % 250, number // 7 % 250, 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run of 60 steps and its test leave; sample i of 8 has iou i / 10 by the base and 0.5 adapted."""
    folder = tmp_path / 'a <b> "c" #1 %20'
    for name in ('val', 'samples', 'test/images/base', 'test/images/adapted', 'test/images/conditions', 'step60'):
        (folder / name).mkdir(parents=True)
    (folder / 'config.py').write_bytes(CONFIG.encode('utf-8', 'surrogateescape'))
    rows = [{'step': i, 'loss': 1 / i, 'lr': 1e-4} for i in range(1, 61)]
    (folder / 'curves.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / 'val_loss.jsonl').write_text('{"step": 0, "val/loss": 0.5}\n{"step": 60, "val/loss": 0.25}\n')
    for step in (20, 40, 60):
        (folder / f'val/step{step}.json').write_text(json.dumps({'adapted': {'iou': result(step / 100, 0.1, 0.9)}}))
    (folder / 'best.json').write_text(json.dumps({'metric': 'adapted/iou', 'step': 40, 'value': 0.4}))
    (folder / 'early_stop.json').write_text(json.dumps({'step': 60, 'reason': f'no gain {HOSTILE}'}))
    (folder / 'step60/manifest.json').write_text(json.dumps({
        'step': 60, 'seed': 3, 'versions': {'torch': '2.13.0'}, 'base': {'pretrained': 'org/base'},
        'command': HOSTILE}))
    (folder / 'test/tested.py').write_text("load_from = 'W/step60.pth'\ntest_cfg = dict(compare='W/step20.pth')\n")
    (folder / 'test/images/record.json').write_text(json.dumps({'weights': 'step 60', 'num_samples': 8, 'seeds': [0]}))
    (folder / 'metrics.json').write_text(json.dumps(METRICS))
    Image.new('RGB', (3000, 1000), 'red').save(folder / 'samples/steps.png')
    lines = ['key,seed,noise_seed,image_set,file,prompt,iou']
    for i in range(8):
        Image.new('RGB', (8, 8), colour(2000 + i)).save(folder / f'test/images/conditions/{i:06d}_outline.png')
        for k, (image_set, value) in enumerate((('base', i / 10), ('adapted', 0.5))):
            file = f'images/{image_set}/{i:06d}_seed0.png'
            Image.new('RGB', (64, 64), colour(100 * i + k)).save(folder / 'test' / file)
            prompt = '"' + (HOSTILE if i == 0 else f'p{i}').replace('"', '""') + '"'
            lines.append(f'key{i},0,{i},{image_set},{file},{prompt},{value}')
    (folder / 'test/samples.csv').write_bytes('\n'.join(lines).encode('utf-8', 'surrogateescape'))
    return folder


def test_it_shows_all_and_needs_nothing_else(folder: Path) -> None:
    page = Page(write_report(folder))
    numbers = {float(value) for value in page.all('data', 'value')}
    wanted = {n for metrics in METRICS.values() for one in metrics.values()
              for n in (one['value'], one['low'], one['high'], one['p']) if n is not None}
    assert wanted <= numbers
    for words in ('60 of 60 steps', 'stopped early: no gain', 'best step 40 by adapted/iou (0.4000)', 'lower is better',
                  'better: iou; worse: fid; higher: grey; no difference seen: same.', 'p = 0.0015', 'torch 2.13.0',
                  'step 60, 8 samples, 1 seed', 'test/tested.py', '--checkpoint W/step60.pth --compare W/step20.pth',
                  'best, step 40', 'mean of 5 steps', 'train_cfg = dict(max_iters=60', 'org/base', '0.3500'):
        assert words in ' '.join(page.text.split()), words
    assert HOSTILE.replace('\udcff', '�') in page.text  # prompt, command: text, never markup or a template
    names = {tag for tag, _ in page.tags}
    assert not names & {'script', 'iframe', 'object', 'form', 'base'}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith('on')]
    assert all(source.startswith('data:image/') for source in page.all('img', 'src')) and page.all('img', 'src')
    assert page.all('link', 'href') == ['data:,'] and 'url(' not in page.source
    links = page.all('a', 'href')
    assert links and all((folder / unquote(link)).exists() for link in links)
    assert "default-src 'none'" in page.all('meta', 'content')[1]
    assert '--resume' not in page.text and '/x/step60.pth' not in page.text  # it was stopped
    first = page.source
    assert Page(write_report(folder)).source == first  # over an own one, and the same


def test_the_worst_and_the_best_images(folder: Path) -> None:
    """By adapted - base: sample 7 lost most, sample 0 gained most; each with its condition and both images."""
    files = WorkDir(folder)
    found, = examples.find_extremes(files, write.read_results(METRICS), embed := Embedder(2**20))
    assert (found.metric, found.measure) == ('iou', 'adapted − base')
    assert [(end, [one.prompt for one in chosen][:3]) for end, chosen in found.ends] == [
        ('Worst', ['p7', 'p6', 'p5']), ('Best', [HOSTILE.replace('\udcff', '�'), 'p1', 'p2'])]
    worst = found.ends[0][1][0]
    assert [label for label, _ in worst.images] == ['outline', 'base 0.7000', 'adapted 0.5000']
    assert worst.images[1][1] == embed(folder / 'test/images/base/000007_seed0.png', 256)
    assert worst.facts == '-0.2000 · sample key7, seed 0'
    lower = {'adapted': {'iou': result(1, 0, 2, -1)}}
    found, = examples.find_extremes(files, write.read_results(lower), Embedder(2**20))
    assert found.ends[0][1][0].facts.startswith('+0.5000 · sample key0')
    with open(folder / 'test/samples.csv', 'a') as file:
        file.writelines(f'\nkey{i},0,{i},compared,,p,{0.1 * (i == 3)}' for i in range(8))
    found, = examples.find_extremes(files, write.read_results(METRICS), Embedder(2**20))
    assert found.measure == 'adapted − compared' and 'key3' in found.ends[0][1][0].facts


def test_files_of_all_kinds_of_damage(folder: Path, tmp_path: Path) -> None:
    (folder / 'curves.jsonl').write_bytes(b'{"step": 1, "loss": NaN}\n[1]\n{"step": 2, "loss": 0.5}\n{"st\xff\n'
                                          b'{"step": 3, "loss": "x", "lr": 1e400}\n{"step"')
    (folder / 'val/step20.json').write_text('[' * 100_000)
    (folder / 'val/step40.json').write_text('{"adapted": {"iou": 3, "x": {"value": {}}}, "base": 7}')
    (folder / 'best.json').write_text('{"step": "x"')
    (folder / 'step60/manifest.json').write_text('[]')
    (folder / 'samples/steps.png').write_bytes(b'\x89PNG cut off')
    (folder / 'test/images/base/000007_seed0.png').unlink()
    secret = tmp_path / 'secret.png'
    Image.new('RGB', (64, 64), (1, 2, 3)).save(secret)
    os.symlink(secret, folder / 'test/images/link.png')
    with open(folder / 'test/samples.csv', 'a') as file:
        file.write(f'\nk8,0,0,base,../../secret.png,,-5\nk8,0,0,adapted,{secret},,5\nk10,0,0,base,,,x\n'
                   'k9,0,0,base,images/link.png,,5\nk9,0,0,adapted,images/\0,,-5\n')
    os.mkfifo(folder / 'data_report.txt')
    (folder / 'metrics.json').write_text('{"')
    notes: list[str] = []
    path = write_report(folder, notes.append)
    page = Page(path)
    assert 'metrics.json of the test is damaged' in page.text and 'no results yet' not in page.text
    assert notes and all(note in page.text for note in notes)
    for words in ("'curves.jsonl' has damaged lines (2)", "'best.json' is damaged", "'val/step20.json' is damaged",
                  'Not readable as images: samples/steps.png'):
        assert words in page.text, words
    assert 'sample k8' in page.text and 'sample k9' in page.text
    hidden = Embedder(2**20)(secret, 256)
    assert hidden is not None and hidden.src not in page.source and 'NaN' not in page.source
    for name in ('metrics.json', 'test', 'val', 'curves.jsonl', 'step60', 'samples'):
        (shutil.rmtree if (folder / name).is_dir() else os.unlink)(folder / name)
        Page(write_report(folder))
    (folder / 'config.py').unlink()
    with pytest.raises(UserError, match='neither a training nor a test'):
        write_report(folder)
    path.write_text('<html>mine</html>')
    with pytest.raises(UserError, match="report.html' was not written by diffengine_sdxl"):
        write_report(folder)


def test_images_have_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise does not compress; what has no room is named."""
    noise = np.random.default_rng(0).integers(0, 256, (320, 420, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / 'test/pictures.png')
    assert 'left out' not in Page(write_report(folder)).text
    monkeypatch.setattr(write, 'MAX_IMAGES', 2**17)
    page = Page(path := write_report(folder))
    assert path.stat().st_size < 2**17 + 2**16 and 'left out: test/pictures.png' in page.text
    # A wide one is scaled down, small ones are taken as they are, bombs are not decoded.
    sheet, small = (Embedder(2**20)(folder / name, 1600) for name in ('samples/steps.png',
                                                                      'test/images/base/000000_seed0.png'))
    assert sheet is not None and (sheet.width, sheet.height, sheet.tiny) == (1600, 533, False)
    assert small is not None and (small.width, small.tiny) == (64, True) and 'image/png' in small.src
    monkeypatch.setattr(limits.CURRENT, 'image_pixels', 2**20)
    monkeypatch.setattr(embedding.Image.Image, 'load', lambda _: pytest.fail('decoded'))
    assert Embedder(2**20)(folder / 'samples/steps.png', 1600) is None


@pytest.mark.parametrize(('low', 'high', 'better', 'verdict'), [
    (0.1, 0.2, 1, 'better'), (-0.2, -0.1, 1, 'worse'), (0.1, 0.2, -1, 'worse'), (-0.2, -0.1, -1, 'better'),
    (-0.1, 0.2, 1, 'no difference seen'), (0.0, 0.0, 1, 'no difference seen'), (0.1, 0.2, 0, 'higher'),
    (-0.2, -0.1, 0, 'lower'), (None, 0.2, 1, '')])
def test_verdicts(low: float | None, high: float | None, better: int, verdict: str) -> None:
    assert Number(0.1, low, high, 3, None, better).verdict == verdict


def test_retentions_share_an_axis_from_0() -> None:
    """What differs between them is seen: 1 lies as far from 0 in each row."""
    results = read_results({'adapted': {'iou': dict(value=0.8, low=0.7, high=0.9)}, 'retention': {
        'layout/iou': dict(value=1.0, low=0.9, high=1.1), 'style/style_score': dict(value=0.5, low=0.4, high=2.0)}})
    iou, retention = by_metric(results)
    assert iou.name == 'iou' and [row.label for row in iou.rows] == ['adapted']
    assert retention.name == 'retention' and retention.direction == 'higher is better'
    assert [(row.label, row.bar and (row.bar.zero, row.bar.at), row.verdict) for row in retention.rows] == [
        ('layout/iou', (3, 50), ''), ('style/style_score', (3, 26.5), '')]


def test_a_config_is_read_without_running_it() -> None:
    text = "a = dict(b=[1, dict(c='x')])\nimport os\nd = os.getcwd()\ne = __import__('os').getpid()\nf = None\n"
    found = read_settings(text)
    assert found['a'] == {'b': [1, {'c': 'x'}]} and found['f'] is None
    assert found.get('e', '') == "__import__('os').getpid()" and read_settings('(' * 5000) == {}


def test_ties_are_at_neither_end(folder: Path) -> None:
    """Of a share most images have 0 or most 1; an end without an image is left out."""
    text = 'key,seed,image_set,file,right\n' + ''.join(f'k{i},0,base,,{int(i == 3)}\n' for i in range(6))
    (folder / 'test/samples.csv').write_text(text)
    found, = examples.find_extremes(WorkDir(folder), {'base': {'right': Number(0, 0, 0, 6, None, 1)}}, Embedder(0))
    assert [(end, [one.facts for one in chosen]) for end, chosen in found.ends] == [
        ('Best', ['1.0000 · sample k3, seed 0'])]
    (folder / 'test/samples.csv').write_text(text.replace('k3,0,base,,1', 'k3,0,base,,0'))
    assert examples.find_extremes(WorkDir(folder), {}, Embedder(0)) == []
