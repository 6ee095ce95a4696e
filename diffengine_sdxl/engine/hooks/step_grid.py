"""The sample images of a run, one file each, and how they change with the steps on the same noise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffengine_sdxl import atomic_files
from diffengine_sdxl.images import labelled_grid
from diffengine_sdxl.structures import Batch

#: Columns of the grid for steps, evenly chosen with the first and the last one.
MAX_STEPS = 10
#: Side of its cells in pixels, at most.
CELL = 256
_NAME = re.compile(r'step(\d+)_\d+_seed-?\d+\.png')


class StepGrid:
    """Files `images/<step<N> or base>_<row>_seed<s>.png` in a folder, and `steps.png` with the first seed's.

    Each file's text has the prompt, and a digest of what the image was made for and by: a resumed run may have other
    prompts or another sampler, and its grid begins anew.

    Args:
        folder: of the run's samples.
        batches: one sample each, a row of the grid.
        seed: the first one.
        made_by: what decides the images beside the samples and the weights that train, as plain data.
    """

    def __init__(self, folder: Path, batches: Sequence[Batch], seed: int, made_by: Any) -> None:
        self.folder, self.seed = folder, seed
        (folder / 'images').mkdir(parents=True, exist_ok=True)
        self.prompts = [batch.text[0] for batch in batches]
        self.digests = [_digest(batch, made_by) for batch in batches]

    def _files(self) -> dict[int, list[Path]]:
        """Return step -> its images, in order of steps."""
        files: dict[int, list[Path]] = {}
        for path in (self.folder / 'images').glob('step*.png'):
            if match := _NAME.fullmatch(path.name):
                files.setdefault(int(match[1]), []).append(path)
        return dict(sorted(files.items()))

    def remove_after(self, step: int) -> None:
        """Remove images of later steps, which an interrupted run left."""
        self._remove({later: paths for later, paths in self._files().items() if later > step})

    def thin_out(self) -> None:
        """Of more than twice MAX_STEPS steps keep MAX_STEPS, and those with an export, whose cards show them."""
        files = self._files()
        alone = [step for step in files if not (self.folder.parent / f'step{step}').is_dir()]
        if len(alone) > 2 * MAX_STEPS:
            kept = _evenly(alone, MAX_STEPS)
            self._remove({step: files[step] for step in alone if step not in kept})

    def _remove(self, files: Mapping[int, Sequence[Path]]) -> None:
        for path in itertools.chain.from_iterable(files.values()):
            path.unlink()

    def path(self, of: str, row: int, seed: int) -> Path:
        """Return the file of an image.

        Args:
            of: 'step<N>' or 'base'.
        """
        return self.folder / 'images' / f'{of}_{row}_seed{seed}.png'

    def save(self, image: Image.Image, of: str, row: int, seed: int) -> None:
        """Write an image."""
        info = PngInfo()
        info.add_itxt('prompt', self.prompts[row])
        info.add_text('sample', self.digests[row])
        with atomic_files.replacing(self.path(of, row, seed)) as temporary:
            image.save(temporary, format='PNG', pnginfo=info)

    def read(self, of: str, row: int) -> Image.Image | None:
        """Return the first seed's image; None if there is none, or it was made for something else."""
        path = self.path(of, row, self.seed)
        if not path.is_file():
            return None
        with Image.open(path) as image:
            image.load()
            return image if image.info.get('sample') == self.digests[row] else None

    def draw(self, conditions: Sequence[Sequence[Image.Image]], names: Sequence[str]) -> None:
        """Write `steps.png`: a row for each prompt; its conditions, the base's image, and those of up to MAX_STEPS.

        Args:
            conditions: of each row, an image for each of `names`.
        """
        rows = range(len(self.prompts))
        steps = [step for step in self._files() if any(self.path(f'step{step}', row, self.seed).is_file()
                                                       for row in rows)]
        chosen = _evenly(steps, MAX_STEPS)
        columns = {of: [self.read(of, row) for row in rows] for of in ('base', *(f'step{step}' for step in chosen))}
        columns = {of: images for of, images in columns.items() if any(images)}
        largest = max(max(image.size) for images in columns.values() for image in images if image is not None)
        sheet = labelled_grid([(self.prompts[row], [*conditions[row], *(images[row] for images in columns.values())])
                               for row in rows], [*names, *(of.replace('step', 'step ') for of in columns)],
                              f'seed {self.seed}: without the adapters, and after more and more steps'
                              if 'base' in columns else f'seed {self.seed}, after more and more steps',
                              cell=min(CELL, max(128, largest)))
        with atomic_files.replacing(self.folder / 'steps.png') as temporary:
            sheet.save(temporary, format='PNG')


def _evenly(steps: Sequence[int], num: int) -> list[int]:
    """Return about `num` of some steps, evenly chosen with the first and the last one; all if they are not more."""
    if len(steps) <= num:
        return list(steps)
    return sorted({min(steps, key=lambda step: abs(step - at)) for at in np.linspace(steps[0], steps[-1], num)})


def _digest(batch: Batch, made_by: Any) -> str:
    """Return a digest of what a batch of one sample asks for, and of what makes it."""
    asked = repr((batch.text, batch.negative_text, batch.size, made_by))
    digest = blake2b(asked.encode('utf-8', 'surrogatepass'), digest_size=16)
    for name, condition in sorted(batch.conditions.items()):
        digest.update(name.encode() + condition.float().cpu().numpy().tobytes())
    return digest.hexdigest()
