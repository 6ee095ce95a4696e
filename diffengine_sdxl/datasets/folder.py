"""CaptionFolder: a folder of images with a `.txt` caption beside each."""

import os
from pathlib import Path

from diffengine_sdxl.datasets.base import MapDataset, OnBadImage, Sample, Transforms
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.image_files import ImageReader
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import DATASETS

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')


@DATASETS.register_module()
class CaptionFolder(MapDataset):
    """Images of a folder and its subfolders; the caption of `a/b.png` is in `a/b.txt`.

    A row's key is the image's path in the folder, so it does not change when files are added.

    Args:
        source: the folder.
        condition_folder: a folder with an image of the same path for each (the suffix may differ), read as
            'conditioning_image'; it may be inside `source`. None: no condition.
        default_caption: of images without a `.txt`; None refuses them.
        transforms, on_bad_image, max_samples: see `SampleBuilder`; the rows are sorted by path.

    Raises:
        UserError: the folder does not exist or has no images, or a caption or a condition is missing.
    """

    def __init__(self, source: str | Path, condition_folder: str | Path | None = None,
                 default_caption: str | None = None, transforms: Transforms = (), max_samples: int | None = None,
                 on_bad_image: OnBadImage = 'raise') -> None:
        super().__init__(transforms, on_bad_image, max_samples)
        self.source = str(source)
        self.folder = _existing_folder(source, 'source')
        self.default_caption = default_caption
        conditions = None if condition_folder is None else _existing_folder(condition_folder, 'condition_folder')
        self.paths = [path for path in _image_paths(self.folder)
                      if conditions is None or conditions == self.folder or not path.is_relative_to(conditions)]
        self.paths = self.paths[:self.max_samples]
        if not self.paths:
            raise UserError(f"The folder '{source}' holds no images ({', '.join(SUFFIXES)}).")
        self.condition_paths = None if conditions is None else self._match_conditions(conditions)
        if default_caption is None:
            for path in self.paths:
                if not path.with_suffix('.txt').is_file():
                    raise UserError(f"The image '{path}' has no caption: write {path.with_suffix('.txt')}, or set "
                                     'default_caption.')
        self.read_image = ImageReader('/')

    def _match_conditions(self, folder: Path) -> list[Path]:
        """Return the image in `folder` with the same path for each row."""
        stems = {path.relative_to(folder).with_suffix(''): path for path in _image_paths(folder)}
        matches = [stems.get(path.relative_to(self.folder).with_suffix('')) for path in self.paths]
        if None in matches:
            raise UserError(f"{matches.count(None)} images have no condition of the same name in '{folder}'; the first "
                            f"is '{self.paths[matches.index(None)]}'.")
        return [path for path in matches if path is not None]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return self.paths[index].relative_to(self.folder).as_posix()

    def load(self, index: int, draw: Draw) -> Sample:
        path = self.paths[index]
        sample: Sample = {'img': self.read_image(path, f"The image '{path}'")}
        if self.condition_paths is not None:
            condition = self.condition_paths[index]
            sample['conditioning_image'] = self.read_image(condition, f"The conditioning image '{condition}'")
        caption = path.with_suffix('.txt')
        if self.default_caption is not None and not caption.is_file():
            return {**sample, 'text': self.default_caption}
        try:
            return {**sample, 'text': caption.read_text(encoding='utf-8').strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The caption '{caption}' cannot be read as UTF-8 text: {error}") from error


def _existing_folder(path: str | Path, option: str) -> Path:
    folder = Path(os.path.expanduser(path)).absolute()
    if not folder.is_dir():
        raise UserError(f"{option}='{path}' is not a folder.")
    return folder


def _image_paths(folder: Path) -> list[Path]:
    # Sorted as text: the order must not depend on the file system.
    paths = [p for p in folder.rglob('*') if p.suffix.lower() in SUFFIXES and p.is_file()]
    return sorted(paths, key=lambda p: p.relative_to(folder).as_posix())
