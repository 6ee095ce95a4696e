"""The images of a card: small copies beside it, made with the adapter and without it from the same noise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine import report
from diffengine_sdxl.images import labelled_grid
from diffengine_sdxl.models.generate import ADAPTED, BASE

#: In the export: a name that no adapter can have.
FOLDER = 'card-images'
#: Pairs on a card, and the longest side of their images; the widest sheet. In pixels.
MAX_PAIRS, SIDE, SHEET = 4, 512, 1600
#: Images up to this side stay PNG: drawings of few pixels, which JPEG blurs.
SMALL = 128


class Pair(NamedTuple):
    """A prompt and two images from the same noise, as paths in the export's folder."""

    prompt: str
    base: str
    adapted: str


class Images(NamedTuple):
    """What a card shows: pairs, and a sheet ('' if there is none) with a sentence on it."""

    pairs: list[Pair]
    sheet: str
    caption: str


def write_images(work_dir: Path, step: int, tested: Path | None, own: str = ADAPTED) -> Images:
    """Write `step<N>/card-images`, whole or not at all; leave it empty where there are none.

    Args:
        tested: the work_dir of a test of this step, whose images are preferred to the training's samples.
        own: the image set of the test that is this step's.

    Raises:
        UserError: they cannot be written.
    """
    made = _test_images(tested) if tested is not None else []
    pairs = [(_prompt(one[own]), one[BASE], one[own]) for one in made if own != BASE and {BASE, own} <= one.keys()]
    pairs = pairs[:MAX_PAIRS] or _sample_pairs(work_dir / 'samples' / 'images', step)
    sheet, caption = _sheet(work_dir, step, [] if pairs else [one[own] for one in made if own in one])
    target = work_dir / f'step{step}' / FOLDER
    if not pairs and sheet is None and not target.is_dir():
        return Images([], '', '')
    shown = []
    with atomic_files.replacing(target) as folder:
        folder.mkdir()
        for i, (prompt, base, adapted) in enumerate(pairs):
            files = [_write(_read(path), folder / f'{i}_{name}', SIDE) for path, name in (
                (base, BASE), (adapted, ADAPTED))]
            shown.append(Pair(prompt, *(f'{FOLDER}/{file}' for file in files)))
        drawn = '' if sheet is None else f'{FOLDER}/{_write(sheet, folder / "sheet", SHEET)}'
    return Images(shown, drawn, caption)


def _test_images(tested: Path) -> list[dict[str, Path]]:
    """Return the images of each sample of a test, from the first seed, by image set."""
    path = tested / 'test' / 'samples.csv'
    files: dict[tuple[str, str], dict[str, Path]] = {}
    for row in report.read_samples(path) if path.is_file() else []:
        file = path.parent / row['file']
        if row['file'] and file.is_file():
            files.setdefault((row['key'], row['seed']), {})[row['image_set']] = file
    first = next(iter(files), ('', ''))[1]
    return [made for (_, seed), made in files.items() if seed == first]


def _sample_pairs(folder: Path, step: int) -> list[tuple[str, Path, Path]]:
    """Return prompt, base and adapted of a training's samples, the first seed of each row, if made for the same."""
    found: dict[int, tuple[str, Path, Path]] = {}
    for path in sorted(folder.glob(f'step{step}_*.png')):
        match = re.fullmatch(r'step\d+(_(\d+)_seed\d+\.png)', path.name)
        base = folder / f'base{match[1]}' if match else path
        if match and base.is_file() and _info(base).get('sample') == _info(path).get('sample'):
            found.setdefault(int(match[2]), (_prompt(path), base, path))
    return [found[row] for row in sorted(found)][:MAX_PAIRS]


def _info(path: Path) -> dict[Any, Any]:
    """Return what a PNG says of itself; {} if it is damaged."""
    try:
        with Image.open(path) as image:
            return image.info
    except (OSError, ValueError, SyntaxError):
        return {}


def _prompt(path: Path) -> str:
    """Return the prompt that a PNG names, or ''."""
    info = _info(path)
    try:
        return str(info.get('prompt') or json.loads(info.get('sample') or '{}').get('prompt') or '')
    except (ValueError, TypeError, AttributeError):
        return ''


def _sheet(work_dir: Path, step: int, tested: list[Path]) -> tuple[Image.Image | None, str]:
    """Return the picture that shows most of this step, and what it is.

    Args:
        tested: images of a test of it. The test's own sheet has the path of its weights in its title.
    """
    if tested:
        return labelled_grid([(_prompt(path), [_read(path)]) for path in tested[:MAX_PAIRS]], [''], f'step {step}'), (
            'Samples of the test.')
    sheets = [(work_dir / 'samples' / 'steps.png', 'The same prompts and noise while it was trained.'),
              (work_dir / 'samples' / f'step{step}.png', 'Samples of this step.')]
    return next(((_read(path), caption) for path, caption in sheets if path.is_file()), (None, ''))


def _read(path: Path) -> Image.Image:
    """Return an image without what its file says of itself."""
    with Image.open(path) as image:
        pixels = image.convert('RGB')
    pixels.info.clear()
    return pixels


def _write(image: Image.Image, target: Path, side: int) -> str:
    """Write an image, scaled down to `side` pixels in place; return the file's name."""
    image.thumbnail((side, 4 * side) if side == SHEET else (side, side))
    if max(image.size) <= SMALL or side == SHEET and image.width * image.height <= SMALL * SMALL * 16:
        image.save(target.with_suffix('.png'), optimize=True)
        return f'{target.name}.png'
    image.save(target.with_suffix('.jpg'), quality=88)
    return f'{target.name}.jpg'
