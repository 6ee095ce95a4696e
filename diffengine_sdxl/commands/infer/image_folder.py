"""A folder of images with their settings: file names, what is made already, and an overview as a page and a grid."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffengine_sdxl import atomic_files, pages
from diffengine_sdxl.commands.infer import html
from diffengine_sdxl.commands.infer.html import Shown
from diffengine_sdxl.commands.infer.provenance import KEY, write_png
from diffengine_sdxl.config.references import differences
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import labelled_grid, png_text
from diffengine_sdxl.request import Request

INDEX, GRID = 'index.html', 'grid.png'
#: Limit on the images in the grid; sides of its cells, in pixels, if there are few and if there are many.
MAX_SHOWN, LARGE, SMALL = 200, 512, 256
MAX_SLUG = 60


class FolderError(UserError):
    """A folder in which no image can be written."""


class ImageFolder:
    """A folder of images.

    Args:
        folder: made when the first image is written.

    Raises:
        UserError: it is a file, or holds an index.html or grid.png of another origin.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if os.path.exists(folder) and not self.folder.is_dir():
            raise UserError(f"'{folder}' is a file; choose another --out.")
        self._missing = [place for place in (self.folder, *self.folder.parents) if not os.path.lexists(place)]
        #: Images of this process, which need not be read again.
        self._shown: dict[Path, Shown] = {}
        for name, is_ours in ((INDEX, pages.is_ours), (GRID, _is_our_grid)):
            if os.path.exists(self.folder / name) and not is_ours(self.folder / name):
                raise UserError(f"'{self.folder / name}' was not written by diffengine_sdxl, and would be overwritten; "
                                'choose another --out.')

    def check_writable(self) -> None:
        """Check that the folder can be made and written, and leave nothing behind.

        Raises:
            FolderError: gives the reason.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise FolderError(f"No images can be written into '{self.folder}' (Permission denied); choose another "
                                  '--out.')
        except OSError as error:
            raise FolderError(f"No images can be written into '{self.folder}' ({error.strerror}); choose another "
                              '--out.') from error
        finally:
            self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Remove the folders that were made for images if there are none."""
        for place in self._missing:
            with suppress(OSError):
                place.rmdir()

    def path_of(self, number: int, request: Request) -> Path:
        """Return an image's path: '00003-seed42-a-futuristic-castle.png', in the folder whatever name and prompt are.

        Args:
            number: of the image among all of the command.
            request: of this image only.
        """
        plain = unicodedata.normalize('NFKD', request.name or request.prompt).encode('ascii', 'ignore').decode().lower()
        slug = re.sub(r'[^a-z0-9]+', '-', plain).strip('-')
        # Cut between words if one ends in the last third.
        end = slug.rfind('-', MAX_SLUG * 2 // 3, MAX_SLUG + 1) if len(slug) > MAX_SLUG else -1
        slug = slug[:MAX_SLUG if end < 0 else end]
        return self.folder / ('-'.join(filter(None, [f'{number:05d}', f'seed{request.seed}', slug])) + '.png')

    def done(self, path: Path, settings: Mapping[str, Any]) -> bool:
        """Return whether the image at `path` exists, made with the same settings; `made` (versions, time) may differ.

        Raises:
            UserError: a file of other settings or another origin is there; names what differs.
        """
        if not os.path.lexists(path):
            return False
        from diffengine_sdxl.commands.infer.untrusted import read_png
        try:
            before = read_png(path)
        except UserError as error:
            raise UserError(f'{error} An image would overwrite it; choose another --out.') from error
        if lines := [line for old, new in zip(_settings(before), _settings(_through_json(settings)), strict=True)
                     for line in differences(old, new)]:
            raise UserError(f"'{path}' was made with other settings: {'; '.join(lines[:5])}"
                            f'{f"; and {len(lines) - 5} more" if len(lines) > 5 else ""}. Choose another --out.')
        return True

    def add(self, path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
        """Write an image with its settings, whole or not at all.

        Raises:
            FolderError: the disk is full or not writable.
            UserError: see `provenance.write_png`.
        """
        assert path.parent == self.folder, 'see path_of'
        try:
            write_png(image, path, settings)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise FolderError(str(error)) from error
            raise
        self._shown[path] = Shown(path, _through_json(settings), image.size)

    def finish(self) -> None:
        """Write index.html and grid.png of all images in the folder that have settings, by name.

        Raises:
            UserError: the disk is full.
        """
        shown = list(self._all_shown())
        with atomic_files.replacing(self.folder / INDEX) as temporary:
            temporary.write_bytes(html.render(self.folder, shown).encode('utf-8', 'replace'))
        mark = PngInfo()
        mark.add_itxt('Software', KEY)
        with atomic_files.replacing(self.folder / GRID) as temporary:
            _grid(shown, self.folder.resolve().name).save(temporary, format='PNG', pnginfo=mark)

    def _all_shown(self) -> Iterator[Shown]:
        for path in sorted(self.folder.glob('*.png')):
            if path in self._shown:
                yield self._shown[path]
            elif path.name != GRID:
                from diffengine_sdxl.commands.infer.untrusted import read_png
                try:
                    settings = read_png(path)
                    with Image.open(path) as image:
                        yield Shown(path, settings, image.size)
                except (UserError, OSError, Image.DecompressionBombError):
                    continue  # of another origin, or cut off


def _through_json(settings: Mapping[str, Any]) -> Any:
    """Return settings as they are read from a PNG, with lists for tuples."""
    return json.loads(json.dumps(settings))


def _settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what must be equal: request, config, weights, and the digests of files.

    The commits of hub ids are left out: they are known only once loaded.
    """
    digests = {f"SHA-256 of {entry['key']}": (entry['sha256'] or 'unknown')[:12]
               for entry in [*settings['inputs'], *settings['sources']]}
    digests |= {f"SHA-256 of module '{one['name']}'": one['sha256'][:12] for one in settings.get('modules') or ()}
    return [settings['request'], settings['config'], {'weights': settings.get('weights')}, digests]


def _is_our_grid(path: Path) -> bool:
    try:
        return png_text(path, 'Software', 256) == KEY
    except UserError:
        return False


def _grid(shown: Sequence[Shown], name: str) -> Image.Image:
    """Return a grid with prompts in rows and seeds in columns, behind their input images."""
    title = f'{name}: ' + (f'the first {MAX_SHOWN} of {len(shown)} images' if len(shown) > MAX_SHOWN else
                           f'{len(shown)} image{"s" if len(shown) != 1 else ""}')
    shown = shown[:MAX_SHOWN]
    rows: dict[str, list[Shown]] = {}
    for one in shown:
        same = [{k: v for k, v in one.settings['request'].items() if k != 'seed'}, *_settings(one.settings)[1:]]
        rows.setdefault(json.dumps(same, sort_keys=True), []).append(one)
    groups = list(rows.values())
    group_inputs = [{_column(key): path for key, path in group[0].inputs.items()} for group in groups]
    inputs = sorted({key for paths in group_inputs for key in paths},
                    key=lambda key: (key not in ('image', 'mask_image'), key))
    seeds = sorted({one.seed for one in shown})
    # If each prompt has seeds of its own, a column per seed would leave most cells empty.
    width = max([len(group) for group in groups], default=1)
    shared = len(seeds) == width and all(len({one.seed for one in group}) == len(group) for group in groups)
    columns = [*inputs, *([f'seed {seed}' for seed in seeds] if shared else [str(i + 1) for i in range(width)])]
    largest = max([max(one.size) for one in shown], default=LARGE)
    cell = min(LARGE, max(SMALL, largest)) if len(groups) * len(columns) <= 40 else SMALL
    sheet = []
    for label, group, paths in zip(_labels(groups, seeds=not shared), groups, group_inputs, strict=True):
        by_column = {one.seed if shared else i: one.path for i, one in enumerate(group)}
        images = [*(_thumbnail(paths.get(key), cell, is_input=True) for key in inputs),
                  *(_thumbnail(by_column.get(key), cell) for key in (seeds if shared else range(width)))]
        sheet.append((label, images))
    return labelled_grid(sheet, columns, title, cell)


def _column(key: str) -> str:
    """Return 'depth' for 'conditions.depth', for the first of several, and for the image beside a mask."""
    return re.sub(r'\.(0|image)$', '', key.removeprefix('conditions.'))


def _labels(groups: Sequence[Sequence[Shown]], seeds: bool) -> list[str]:
    """Return prompts, with the settings that distinguish equal ones."""
    labels = []
    for group in groups:
        request = group[0].settings['request']
        others = [other[0].settings for other in groups
                  if other[0].settings['request'].get('prompt') == request.get('prompt')]
        changed = dict.fromkeys(line.split(' was ')[0] for other in others for part in ('request', 'config')
                                for line in differences(other[part], group[0].settings[part]))
        settings = [f'{key}={_short(value)}' for key in changed
                    if key != 'seed' and (value := _at(group[0].settings, key)) not in (None, {})]
        settings += [f'seed {", ".join(str(one.seed) for one in group)}'] if seeds else []
        label = ' | '.join(filter(None, [request.get('prompt') or 'no prompt', ', '.join(settings[:4])]))
        labels.append(label.encode('utf-8', 'replace').decode())
    return labels


def _at(settings: Mapping[str, Any], key: str) -> Any:
    """Return the value at dotted `key` of the request or the config, or None."""
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


def _thumbnail(path: Path | None, cell: int, is_input: bool = False) -> Image.Image | None:
    """Return the image at `path`, no larger than a cell, or None if it cannot be read."""
    if path is None:
        return None
    if is_input:
        from diffengine_sdxl.datasets.image_files import ImageReader
        try:
            image = ImageReader('/')(str(path.absolute()), path.name)
        except UserError:
            return None
    else:
        try:
            image = Image.open(path).convert('RGB')
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's errors over a damaged file
            return None
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image
