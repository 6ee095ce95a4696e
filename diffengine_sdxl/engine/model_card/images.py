"""The images of a card: small copies beside it, made with the adapter and without it from the same noise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine import report
from diffengine_sdxl.models.generate import ADAPTED, BASE

FOLDER = 'images'
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


def write_images(work_dir: Path, step: int, tested: Path | None) -> Images:
    """Write `step<N>/images`, whole or not at all; remove it where there are none.

    Args:
        tested: the work_dir of a test of this step, whose images are preferred to the training's samples.

    Raises:
        UserError: they cannot be written.
    """
    pairs = _test_pairs(tested) if tested is not None else []
    pairs = pairs or _sample_pairs(work_dir / 'samples' / 'images', step)
    sheet, caption = _sheet(work_dir, step, tested)
    target = work_dir / f'step{step}' / FOLDER
    if not pairs and sheet is None and not target.is_dir():
        return Images([], '', '')
    shown = []
    with atomic_files.replacing(target) as folder:
        folder.mkdir()
        for i, (prompt, base, adapted) in enumerate(pairs):
            names = (_shrink(path, folder / f'{i}_{name}', SIDE) for path, name in ((base, BASE), (adapted, ADAPTED)))
            shown.append(Pair(prompt, *(f'{FOLDER}/{name}' for name in names)))
        drawn = '' if sheet is None else f'{FOLDER}/{_shrink(sheet, folder / "sheet", SHEET)}'
    return Images(shown, drawn, caption)


def _test_pairs(tested: Path) -> list[tuple[str, Path, Path]]:
    """Return prompt, base and adapted of the first samples of a test."""
    path = tested / 'test' / 'samples.csv'
    rows = report.read_samples(path) if path.is_file() else []
    files: dict[tuple[str, str], dict[str, Path]] = {}
    for row in rows:
        if row['file']:
            files.setdefault((row['key'], row['seed']), {})[row['image_set']] = path.parent / row['file']
    seed = next(iter(files), ('', ''))[1]
    both = [made for (_, s), made in files.items() if s == seed and {BASE, ADAPTED} <= made.keys()]
    return [(_prompt(made[ADAPTED]), made[BASE], made[ADAPTED]) for made in both[:MAX_PAIRS]
            if made[BASE].is_file() and made[ADAPTED].is_file()]


def _sample_pairs(folder: Path, step: int) -> list[tuple[str, Path, Path]]:
    """Return prompt, base and adapted of a training's samples, the first seed of each row."""
    found: dict[int, tuple[str, Path, Path]] = {}
    for path in sorted(folder.glob(f'step{step}_*.png')):
        match = re.fullmatch(r'step\d+(_(\d+)_seed\d+\.png)', path.name)
        if match and (base := folder / f'base{match[1]}').is_file():
            found.setdefault(int(match[2]), (_prompt(path), base, path))
    return [found[row] for row in sorted(found)][:MAX_PAIRS]


def _prompt(path: Path) -> str:
    """Return the prompt that a PNG names, or ''."""
    try:
        with Image.open(path) as image:
            info = image.info
        return str(info.get('prompt') or json.loads(info.get('sample') or '{}').get('prompt') or '')
    except (OSError, ValueError, AttributeError):
        return ''


def _sheet(work_dir: Path, step: int, tested: Path | None) -> tuple[Path | None, str]:
    """Return the picture that shows most of this step, and what it is."""
    sheets = [] if tested is None else [(tested / 'test' / 'pictures.png', 'Samples of the test.')]
    sheets += [(work_dir / 'samples' / 'steps.png', 'The same prompts and noise while it was trained.'),
               (work_dir / 'samples' / f'step{step}.png', 'Samples of this step.')]
    return next(((path, caption) for path, caption in sheets if path.is_file()), (None, ''))


def _shrink(path: Path, target: Path, side: int) -> str:
    """Write a copy that is at most `side` pixels large, without what the file says of itself; return its name."""
    with Image.open(path) as image:
        copy = image.convert('RGB')
    copy.thumbnail((side, 4 * side) if side == SHEET else (side, side))
    if max(copy.size) <= SMALL or side == SHEET and copy.width * copy.height <= SMALL * SMALL * 16:
        copy.save(target.with_suffix('.png'), optimize=True)
        return f'{target.name}.png'
    copy.save(target.with_suffix('.jpg'), quality=88)
    return f'{target.name}.jpg'
