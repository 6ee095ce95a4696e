"""A folder of pictures that say how they were made: names, what is there already, and two ways to look through it."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffengine_sdxl.datasets.images import BadImageError, ImageReader
from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.identity import differences
from diffengine_sdxl.engine.inference import page
from diffengine_sdxl.engine.inference.provenance import KEY, read_png, sha256, write_png
from diffengine_sdxl.engine.inference.request import Request
from diffengine_sdxl.pictures import labelled_grid, png_text

INDEX, GRID = 'index.html', 'grid.png'
#: Bytes that a folder must have room for before anything is made: a picture of 1024 x 1024.
ROOM = 2 * 2**20
#: Pictures that the grid shows at most; and how large the cells are, in pixels, of a small grid and of a large one.
MOST, LARGE, SMALL = 200, 512, 256
SLUG = 60


class NoRoomError(ValueError):
    """A folder that takes no more pictures."""


@dataclass(frozen=True)
class Shown:
    """A picture of the folder: its file, its settings (see `provenance.record`), and its width and height in pixels."""

    path: Path
    settings: Mapping[str, Any]
    size: tuple[int, int]

    @property
    def seed(self) -> int:
        """Of its noise."""
        return int(self.settings['request'].get('seed', 0))

    @cached_property
    def inputs(self) -> dict[str, Path]:
        """The pictures that it was made of, by their keys, as far as they are there and unchanged."""
        return {entry['key']: Path(entry['path']) for entry in self.settings['inputs']
                if entry['key'] != 'latents' and entry['sha256'] and entry['path']
                and os.path.isfile(entry['path']) and sha256(entry['path']) == entry['sha256']}


class Gallery:
    """A folder of pictures.

    Args:
        folder: made when the first picture is written.

    Raises:
        ValueError: it is a file, or holds an index.html or grid.png that somebody else made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if os.path.exists(folder) and not self.folder.is_dir():
            raise ValueError(f"'{folder}' is a file; choose another --out.")
        self._new = [place for place in (self.folder, *self.folder.parents) if not os.path.lexists(place)]
        for name, is_ours in ((INDEX, page.is_ours), (GRID, _is_our_grid)):
            if os.path.exists(self.folder / name) and not is_ours(self.folder / name):
                raise ValueError(f"'{self.folder / name}' was not written by this engine, and would be written over; "
                                 'choose another --out.')

    def check_room(self) -> None:
        """Find out whether pictures can be written, before they are made. Nothing is left behind.

        Raises:
            NoRoomError: why not.
        """
        probe = self.folder / f'.{os.getpid()}.part'
        try:
            try:
                self._write(probe)
            except FileNotFoundError:
                self._write(probe)  # another command found out the same, and has tidied
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise NoRoomError(f"No pictures can be written into '{self.folder}' ({reason}); choose another --out, or "
                              'make room.') from error
        finally:
            with suppress(OSError, ValueError):
                probe.unlink()
            self.tidy()

    def _write(self, probe: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(probe, 'wb') as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())

    def tidy(self) -> None:
        """Remove the folders that were made for the pictures, if there are none."""
        for place in self._new:
            with suppress(OSError, ValueError):
                place.rmdir()

    def path_of(self, number: int, request: Request) -> Path:
        """Where a picture goes: '00003-seed42-a-futuristic-castle.png', in the folder whatever name and prompt hold.

        Args:
            number: of the picture among all that were asked for. request: for it alone.
        """
        plain = unicodedata.normalize('NFKD', request.name or request.prompt).encode('ascii', 'ignore').decode().lower()
        slug = re.sub(r'[^a-z0-9]+', '-', plain).strip('-')
        # A word stays whole where one ends in the last third.
        end = slug.rfind('-', SLUG * 2 // 3, SLUG + 1) if len(slug) > SLUG else -1
        slug = slug[:SLUG if end < 0 else end]
        return self.folder / ('-'.join(filter(None, [f'{number:05d}', f'seed{request.seed}', slug])) + '.png')

    def done(self, path: str | Path, settings: Mapping[str, Any]) -> bool:
        """Whether the picture at `path` is there, made by the same settings; `made` (versions, time) may differ.

        Raises:
            ValueError: something else is there; what differs.
        """
        path = Path(path)
        if not os.path.lexists(path):
            return False
        try:
            before = read_png(path)
        except ValueError as error:
            raise ValueError(f'{error} A picture would be written over it; choose another --out.') from error
        # As JSON gives it back: tuples are lists there.
        now = json.loads(json.dumps(settings))
        if lines := [line for old, new in zip(_settings(before), _settings(now), strict=True)
                     for line in differences(old, new)]:
            raise ValueError(f"'{path}' was made by other settings: {'; '.join(lines[:5])}"
                             f'{f"; and {len(lines) - 5} more" if len(lines) > 5 else ""}. Choose another --out.')
        return True

    def add(self, path: str | Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
        """Write a picture with its settings, whole or not at all.

        Raises:
            ValueError: see `provenance.write_png`.
        """
        assert Path(path).parent == self.folder, 'see path_of'
        write_png(image, path, settings)

    def finish(self) -> None:
        """Write index.html and grid.png of all pictures in the folder that say how they were made, by name.

        Raises:
            ValueError: no room to write.
        """
        shown = list(self._shown())
        with checkpoint.replacing(self.folder / INDEX) as temporary:
            temporary.write_bytes(page.page(self.folder, shown).encode('utf-8', 'replace'))
        note = PngInfo()
        note.add_itxt('Software', KEY)
        with checkpoint.replacing(self.folder / GRID) as temporary:
            _grid(shown, self.folder.resolve().name).save(temporary, format='PNG', pnginfo=note)

    def _shown(self) -> Iterator[Shown]:
        for path in sorted(self.folder.glob('*.png')):
            try:
                settings = read_png(path)
                with Image.open(path) as image:
                    yield Shown(path, settings, image.size)
            except (ValueError, OSError, Image.DecompressionBombError):
                continue  # not ours, or not whole


def _settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What must be equal: request, config, weights, and what its files hold.

    Not the commits of hub ids: which one it is shows only when they are loaded.
    """
    digests = {f"SHA-256 of {entry['key']}": (entry['sha256'] or 'unknown')[:12]
               for entry in [*settings['inputs'], *settings['sources']]}
    return [settings['request'], settings['config'], {'weights': settings.get('weights')}, digests]


def _is_our_grid(path: Path) -> bool:
    try:
        return png_text(path, 'Software', 256) == KEY
    except ValueError:
        return False


def _grid(shown: Sequence[Shown], name: str) -> Image.Image:
    """Prompts in rows and seeds in columns, behind the pictures that they were made of."""
    title = f'{name}: ' + (f'the first {MOST} of {len(shown)} pictures' if len(shown) > MOST else
                           f'{len(shown)} picture{"s" if len(shown) != 1 else ""}')
    shown = shown[:MOST]
    rows: dict[str, list[Shown]] = {}
    for one in shown:
        same = [{k: v for k, v in one.settings['request'].items() if k != 'seed'}, *_settings(one.settings)[1:]]
        rows.setdefault(json.dumps(same, sort_keys=True), []).append(one)
    groups = list(rows.values())
    brought = [{_column(key): path for key, path in group[0].inputs.items()} for group in groups]
    inputs = sorted({key for own in brought for key in own}, key=lambda key: (key not in ('image', 'mask_image'), key))
    seeds = sorted({one.seed for one in shown})
    # Where each prompt has seeds of its own, a column for each would leave most cells empty.
    wide = max([len(group) for group in groups], default=1)
    shared = len(seeds) == wide and all(len({one.seed for one in group}) == len(group) for group in groups)
    columns = [*inputs, *([f'seed {seed}' for seed in seeds] if shared else [str(i + 1) for i in range(wide)])]
    biggest = max([max(one.size) for one in shown], default=LARGE)
    cell = min(LARGE, max(SMALL, biggest)) if len(groups) * len(columns) <= 40 else SMALL
    labels = _labels(groups, seeds=not shared)
    sheet = []
    for label, group, own in zip(labels, groups, brought, strict=True):
        paths = {one.seed if shared else i: one.path for i, one in enumerate(group)}
        cells = [*map(own.get, inputs), *map(paths.get, seeds if shared else range(wide))]
        sheet.append((label, [_small(path, cell) for path in cells]))
    return labelled_grid(sheet, columns, title, cell)


def _column(key: str) -> str:
    """'depth' of 'conditions.depth', and of the first of several and the picture beside a mask."""
    return re.sub(r'\.(0|image)$', '', key.removeprefix('conditions.'))


def _labels(groups: Sequence[Sequence[Shown]], seeds: bool) -> list[str]:
    """Prompts, with what tells apart those that are the same."""
    labels = []
    for group in groups:
        first = group[0].settings['request']
        twins = [other[0].settings for other in groups
                 if other[0].settings['request'].get('prompt') == first.get('prompt')]
        changed = dict.fromkeys(line.split(' was ')[0] for other in twins for part in ('request', 'config')
                                for line in differences(other[part], group[0].settings[part]))
        told = [f'{key}={_short(value)}' for key in changed
                if key != 'seed' and (value := _at(group[0].settings, key)) not in (None, {})]
        told += [f'seed {", ".join(str(one.seed) for one in group)}'] if seeds else []
        label = ' | '.join(filter(None, [first.get('prompt') or 'no prompt', ', '.join(told[:4])]))
        labels.append(label.encode('utf-8', 'replace').decode())
    return labels


def _at(settings: Mapping[str, Any], key: str) -> Any:
    """The value at dotted `key` of the request or the config."""
    for part in ('request', 'config'):
        node = settings[part]
        for name in key.split('.'):
            node = node.get(name) if isinstance(node, Mapping) else \
                node[int(name)] if isinstance(node, list) and name.isdigit() and int(name) < len(node) else None
        if node is not None:
            return node
    return None


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key}={_short(part)}' for key, part in value.items())})"
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else str(value)


def _small(path: Path | None, cell: int) -> Image.Image | None:
    """The picture at `path`, no larger than a cell; None where it cannot be read."""
    if path is None:
        return None
    try:
        image = ImageReader('/')(str(path.absolute()), path.name)
    except (ValueError, BadImageError):
        return None
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image
