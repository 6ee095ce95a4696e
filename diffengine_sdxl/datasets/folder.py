"""A plain folder of images with `.txt` captions beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffengine_sdxl.datasets.base import MapDataset, OnBadImage, Sample, Transform
from diffengine_sdxl.datasets.images import ImageReader
from diffengine_sdxl.datasets.sampler import Draw
from diffengine_sdxl.registry import DATASETS

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')


@DATASETS.register_module()
class CaptionFolder(MapDataset):
    """Images of a folder and its subfolders; the caption of `a/b.png` stands in `a/b.txt`.

    A row's key is the image's path inside the folder, so it stays when files are added.

    Args:
        source: the folder.
        condition_folder: a folder with an image of the same path for each (the suffix may differ), read as
            'conditioning_image'; it may lie inside `source`. None: no condition.
        default_caption: of images without a `.txt`; None refuses them.
        transforms, on_bad_image: see `SampleMaker`.
        max_samples: only the first so many, by path.

    Raises:
        ValueError: no such folder, no images in it, a caption or a condition is missing.
    """

    def __init__(self, source: str | Path, condition_folder: str | Path | None = None,
                 default_caption: str | None = None, transforms: Sequence[dict[str, Any] | Transform] = (),
                 max_samples: int | None = None, on_bad_image: OnBadImage = 'raise') -> None:
        super().__init__(transforms, on_bad_image)
        self.source = str(source)
        self.folder = _folder(source, 'source')
        self.default_caption = default_caption
        conditions = None if condition_folder is None else _folder(condition_folder, 'condition_folder')
        self.paths = [path for path in _images(self.folder)
                      if conditions is None or conditions == self.folder or not path.is_relative_to(conditions)]
        self.paths = self.paths[:max_samples]
        if not self.paths:
            raise ValueError(f"The folder '{source}' holds no images ({', '.join(SUFFIXES)}).")
        self.conditions = None if conditions is None else self._pair(conditions)
        if default_caption is None:
            for path in self.paths:
                if not path.with_suffix('.txt').is_file():
                    raise ValueError(f"The image '{path}' has no caption: write {path.with_suffix('.txt')}, or set "
                                     'default_caption.')
        self.images = ImageReader('/')

    def _pair(self, folder: Path) -> list[Path]:
        stems = {path.relative_to(folder).with_suffix(''): path for path in _images(folder)}
        missing = [p for p in self.paths if p.relative_to(self.folder).with_suffix('') not in stems]
        if missing:
            raise ValueError(f"{len(missing)} images have no condition of the same name in '{folder}'; the first is "
                             f"'{missing[0]}'.")
        return [stems[p.relative_to(self.folder).with_suffix('')] for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        """The image's path inside the folder, with slashes."""
        return self.paths[index].relative_to(self.folder).as_posix()

    def load(self, index: int, draw: Draw) -> Sample:
        """Image, caption and condition; see `MapDataset.load`."""
        path = self.paths[index]
        sample: Sample = {'img': self.images(path, f"The image '{path}'")}
        if self.conditions is not None:
            condition = self.conditions[index]
            sample['conditioning_image'] = self.images(condition, f"The conditioning image '{condition}'")
        caption = path.with_suffix('.txt')
        if self.default_caption is not None and not caption.is_file():
            return {**sample, 'text': self.default_caption}
        try:
            return {**sample, 'text': caption.read_text(encoding='utf-8').strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The caption '{caption}' cannot be read as UTF-8 text: {error}") from error


def _folder(path: str | Path, name: str) -> Path:
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"{name}='{path}' is not a folder.")
    return folder


def _images(folder: Path) -> list[Path]:
    # Sorted by the text of the path: the order must not depend on the file system.
    found = [p for p in folder.rglob('*') if p.suffix.lower() in SUFFIXES and p.is_file()]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())
