"""Image folders: file names, existing images, the grid by its pixels, the page by a parser."""

import json
import os
import resource
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from diffengine_sdxl.commands.infer import provenance
from diffengine_sdxl.commands.infer.image_folder import ImageFolder
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import labelled_grid
from diffengine_sdxl.request import Request

SIDE = 256
CONFIG: dict[str, Any] = {'model': dict(
    type='SDXL', pretrained='org/base', adapters=dict(style=dict(type='LoRA', weights='org/style', scale=0.8)),
    sampler=dict(type='Sampler', num_inference_steps=30, guidances=[dict(type='CFG', scale=5.0)]))}


def colour(number: int) -> tuple[int, int, int]:
    """Return a colour that no other image has."""
    return (40 + number % 200, 250 - number % 7, 30 + number // 7 % 200)


def add(gallery: ImageFolder, number: int, config: dict[str, Any] | None = None, side: int = SIDE,
        **asked: Any) -> Path:
    """Add an image of one colour; return its path."""
    request = Request.of(asked)
    path = gallery.path_of(number, request)
    settings = provenance.record(request, config or CONFIG, made={'seconds': 1.0})
    assert not gallery.done(path, settings)
    gallery.add(path, Image.new('RGB', (side, side), colour(number)), settings)
    return path


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ''
        self.feed((folder / 'index.html').read_text(encoding='utf-8'))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, key: str) -> list[str]:
        return [str(attributes[key]) for name, attributes in self.tags if name == tag and key in attributes]


def places(sheet: Path, numbers: list[int]) -> list[tuple[int, int] | None]:
    """Return row and column of each image in the grid, found by its colour; None if missing."""
    pixels = np.asarray(Image.open(sheet).convert('RGB'))
    corners: dict[int, tuple[int, int]] = {}
    for number in numbers:
        ys, xs = np.nonzero((pixels == colour(number)).all(-1))
        if len(ys):
            assert (np.ptp(ys), np.ptp(xs)) == (SIDE - 1, SIDE - 1), 'an image is whole and at its own size'
            corners[number] = (int(ys.min()), int(xs.min()))
    tops = sorted({y for y, _ in corners.values()})
    return [(tops.index(corners[n][0]), (corners[n][1] - 6) // (SIDE + 6)) if n in corners else None for n in numbers]


@pytest.mark.parametrize(('settings', 'name'), [
    ({'prompt': 'A futuristic Castle, at night!', 'seed': 42}, '00003-seed42-a-futuristic-castle-at-night'),
    ({'prompt': 'a', 'name': '../../etc/passwd'}, '00003-seed0-etc-passwd'), ({'prompt': '/..\\\0\n'}, '00003-seed0'),
    ({'prompt': 'Ünïcode été'}, '00003-seed0-unicode-ete'), ({'prompt': '東京'}, '00003-seed0'),
    ({'prompt': 'x' * 300}, f'00003-seed0-{"x" * 60}'), ({'prompt': '\udcff ok'}, '00003-seed0-ok'),
    ({'prompt': f'{"word " * 11}longer-than-that'}, f'00003-seed0-{"-".join(["word"] * 11)}'),
])
def test_file_names(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    path = ImageFolder(tmp_path).path_of(3, Request.of(settings))
    assert path == tmp_path / f'{name}.png' and len(path.name) < 100


def test_existing_images_are_done_or_differ(tmp_path: Path) -> None:
    (tmp_path / 'a.png').write_bytes(b'one')
    gallery = ImageFolder(tmp_path / 'out')
    asked = Request.of({'prompt': 'p', 'image': str(tmp_path / 'a.png'), 'original_size': (8, 8),
                        'num_inference_steps': 50})
    path = gallery.path_of(0, asked)

    def settings(config: Any = CONFIG, weights: str | None = None, **changes: Any) -> dict[str, Any]:
        return provenance.record(Request.of({'prompt': 'p', 'image': str(tmp_path / 'a.png'), 'original_size': (8, 8),
                                             'num_inference_steps': 50, **changes}), config, weights)
    assert gallery.done(path, settings()) is False and not (tmp_path / 'out').exists()
    gallery.add(path, Image.new('RGB', (8, 8)), {**settings(), 'made': {'seconds': 1, 'versions': {'torch': '1'}}})
    before = path.read_bytes()
    assert gallery.done(path, {**settings(), 'made': {'seconds': 2}}) is True
    other = json.loads(json.dumps(CONFIG))
    other['model']['adapters']['style']['scale'] = 0.5
    for changed, words in ((settings(num_inference_steps=30), 'num_inference_steps was 50, is now 30'),
                           (settings(eta=0.5), 'eta was None, is now 0.5'),
                           (settings(other), 'model.adapters.style.scale was 0.8, is now 0.5'),
                           (settings(weights='none'), "weights was None, is now 'none'")):
        with pytest.raises(UserError, match=f'{words}.*--out') as caught:
            gallery.done(path, changed)
        assert str(path) in str(caught.value)
    (tmp_path / 'a.png').write_bytes(b'another')
    with pytest.raises(UserError, match='SHA-256 of image was'):
        gallery.done(path, settings())
    assert path.read_bytes() == before


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    gallery = ImageFolder(tmp_path)
    request = Request.of({'prompt': 'p'})
    path, settings = gallery.path_of(0, request), provenance.record(request, CONFIG)
    Image.new('RGB', (2, 2)).save(path)
    with pytest.raises(UserError, match='holds no settings.*--out'):
        gallery.done(path, settings)
    path.unlink()
    path.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='cannot be read.*--out'):
        gallery.done(path, settings)
    for name in ('index.html', 'grid.png'):
        (tmp_path / name).write_text('<html>mine</html>')
        with pytest.raises(UserError, match=f"{name}' was not written by diffengine_sdxl.*--out"):
            ImageFolder(tmp_path)
        (tmp_path / name).unlink()
    Image.new('RGB', (2, 2)).save(tmp_path / 'grid.png')
    with pytest.raises(UserError, match='grid.png'):
        ImageFolder(tmp_path)
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='is a file'):
        ImageFolder(tmp_path / 'file')


def test_the_grid_has_prompts_in_rows_and_seeds_in_columns(tmp_path: Path) -> None:
    """With images of earlier runs and, before them, their inputs; foreign images are left out."""
    for number, name in ((100, 'in.png'), (101, 'depth.png'), (102, 'gone.png'), (103, 'changed.png')):
        Image.new('RGB', (SIDE, SIDE), colour(number)).save(tmp_path / name)
    out, inputs = tmp_path / 'out', {name: str(tmp_path / f'{name}.png') for name in ('in', 'depth', 'gone', 'changed')}
    for seed in (7, 5):
        add(ImageFolder(out), 7 - seed, prompt='one', seed=seed, image=inputs['in'],
            conditions={'depth': inputs['depth']})
        add(ImageFolder(out), 10 + seed, prompt='two', seed=seed, conditions={'depth': [inputs['depth']] * 2,
                                                                          'other': inputs['gone']})
    add(ImageFolder(out), 30, prompt='two', seed=5, conditions={'other': inputs['changed']})
    (tmp_path / 'gone.png').unlink()
    Image.new('RGB', (SIDE, SIDE)).save(tmp_path / 'changed.png')
    Image.new('RGB', (SIDE, SIDE), colour(104)).save(out / 'foreign.png')
    ImageFolder(out).finish()
    # Columns: image, depth, depth.1, seed 5, seed 7.
    assert places(out / 'grid.png', [100, 2, 0, 15, 17, 30, 102, 103, 104]) == [
        (0, 0), (0, 3), (0, 4), (1, 3), (1, 4), (2, 3), None, None, None]
    # The depth map is in two rows, which `places` cannot tell.
    pixels = np.asarray(Image.open(out / 'grid.png').convert('RGB'))
    xs = np.unique(np.nonzero((pixels == colour(101)).all(-1))[1] // (SIDE + 6))
    assert xs.tolist() == [1, 2]
    again = (out / 'grid.png').read_bytes(), (out / 'index.html').read_bytes()
    ImageFolder(out).finish()
    assert again == ((out / 'grid.png').read_bytes(), (out / 'index.html').read_bytes())
    assert not list(out.glob('.*'))


def test_prompts_with_different_seeds_share_columns(tmp_path: Path) -> None:
    gallery = ImageFolder(tmp_path)
    for number in range(6):
        add(gallery, number, prompt=f'p{number // 2}', seed=10 * number)
    add(gallery, 6, prompt='p3', seed=1)
    add(gallery, 7, prompt='p3', seed=1)  # the same twice
    gallery.finish()
    assert places(tmp_path / 'grid.png', list(range(8))) == [(n // 2, n % 2) for n in range(8)]


def test_labels_in_other_alphabets() -> None:
    """Characters that the font lacks would all be the same box."""
    sheets = [np.asarray(labelled_grid([(letter, [None])], [''])) for letter in 'äößéñЖДΩΣ']
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets)


def test_the_grid_shows_at_most_two_hundred(tmp_path: Path) -> None:
    gallery = ImageFolder(tmp_path)
    for number in range(203):
        add(gallery, number, side=8, prompt='p', seed=number)
    gallery.finish()
    assert Image.open(tmp_path / 'grid.png').width == 6 + 200 * (SIDE + 6)
    assert Page(tmp_path).text.count('seed ') == 203


def test_an_empty_folder_and_a_damaged_image(tmp_path: Path) -> None:
    """An image that is cut off after its settings is left out."""
    ImageFolder(tmp_path / 'new').finish()
    assert '0 images' in Page(tmp_path / 'new').text
    gallery = ImageFolder(tmp_path)
    whole, cut = add(gallery, 0, prompt='p'), add(gallery, 1, prompt='q')
    cut.write_bytes(cut.read_bytes()[:-20])
    ImageFolder(tmp_path).finish()  # as in another process
    assert Page(tmp_path).all('img', 'alt') == ['p'] and whole.name in Page(tmp_path).text
    assert places(tmp_path / 'grid.png', [0, 1]) == [(0, 0), None]


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\' & \udcff 東京'


def test_the_page_shows_all_and_runs_no_script(tmp_path: Path) -> None:
    """Whatever prompts and names of files and adapters hold; links lead to existing files."""
    folder = tmp_path / 'a "b" #1 <i>%20'
    folder.mkdir()
    Image.new('RGB', (8, 8)).save(folder / "x'&?.png")
    gallery = ImageFolder(folder / 'out')
    config = json.loads(json.dumps(CONFIG))
    config['model']['adapters']['</pre><script>'] = dict(type='LoRA', weights='javascript:alert(1)')
    add(gallery, 0, config, prompt=HOSTILE, negative_prompt='not this', scales={'style': 0.25}, seed=3,
        image=str(folder / "x'&?.png"), conditions={'far': 'https://x.org/a.png?"><script>'})
    add(gallery, 1, side=300, prompt='plain', guidance_scale=7.5)
    gallery.finish()
    page = Page(folder / 'out')
    names = {tag for tag, _ in page.tags}
    assert 'script' not in names and not [key for _, a in page.tags for key in a if key.startswith('on')]
    assert "default-src 'none'" in page.all('meta', 'content')[1]
    assert HOSTILE.replace('\udcff', '?') in page.text and 'not this' in page.text
    assert '</pre><script> × 1' in page.text and 'style × 0.25' in page.text and 'style × 0.8' in page.text
    for words in ('seed 3', '256 × 256', '30 steps', 'guidance 5', 'guidance 7.5', 'far: by URL', 'made, seconds'):
        assert words in page.text
    # The two images and the input's thumbnail; nothing is fetched.
    sources = [unquote(urlsplit(src).path) for src in page.all('img', 'src')]
    assert len(sources) == 3 and all((folder / 'out' / src).is_file() for src in sources)
    assert os.path.samefile(folder / 'out' / sources[1], folder / "x'&?.png")
    links = page.all('a', 'href')
    assert [link for link in links if ':' in link] == ['https://x.org/a.png?"><script>']
    assert all((folder / 'out' / unquote(link)).is_file() for link in links if ':' not in link)
    (folder / "x'&?.png").unlink()
    ImageFolder(folder / 'out').finish()
    assert 'image: changed or gone' in Page(folder / 'out').text and len(Page(folder / 'out').all('img', 'src')) == 2


def test_a_full_disk_leaves_the_old_page(tmp_path: Path) -> None:
    """Simulated by a limit of 1 KiB on files: the old page stays whole, and no temporary file is left."""
    gallery = ImageFolder(tmp_path)
    add(gallery, 0, prompt='p')
    gallery.finish()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(UserError, match='index.html. could not be written'):
            gallery.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(shutil.which('chromium') is None, reason='chromium is not installed')
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """From the disk, under its content policy: the image and its input's thumbnail are drawn."""
    Image.new('RGB', (64, 64), (255, 0, 255)).save(tmp_path / 'in #1.png')
    gallery = ImageFolder(tmp_path / 'out')
    add(gallery, 0, prompt='p', image=str(tmp_path / 'in #1.png'))
    gallery.finish()
    shot = tmp_path / 'shot.png'
    subprocess.run(['chromium', '--headless', '--no-sandbox', '--window-size=800,900', f'--screenshot={shot}',
                    f'--user-data-dir={tmp_path / "profile"}', (tmp_path / 'out' / 'index.html').as_uri()],
                   capture_output=True, check=False, timeout=120)
    pixels = np.asarray(Image.open(shot).convert('RGB')).astype(int)
    for wanted, least in ((colour(0), 200 ** 2), ((255, 0, 255), 50 ** 2)):
        assert (np.abs(pixels - wanted).max(-1) < 8).sum() > least
