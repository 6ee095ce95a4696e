"""CaptionFolder: a folder of images with a caption file beside each."""

import json
import os
import reprlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from diffengine_sdxl.datasets.base import MapDataset, OnBadImage, Sample, Transforms
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.files import Listing, image_suffixes, list_folder, read_text
from diffengine_sdxl.datasets.image_files import ImageReader
from diffengine_sdxl.errors import UserError, first_line, listed
from diffengine_sdxl.registry import DATASETS

#: Suffixes of caption files, the first that there is; and keys of a `.json` that hold a caption.
CAPTIONS = ('.txt', '.caption', '.json')
CAPTION_KEYS = ('caption', 'text', 'prompt', 'tags')


@DATASETS.register_module()
class CaptionFolder(MapDataset):
    """Images of a folder and its subfolders; the caption of `a/b.png` is in `a/b.txt`, `a/b.caption` or `a/b.json`.

    The whole text of a file is the caption; `CaptionLine` takes one of its lines. A `.json` is a dict with a 'caption',
    'text' or 'prompt', or 'tags'; each a text or a list of texts, which become lines, or of tags one text with commas.

    A row's key is the image's path in the folder, so it does not change when files are added. Hidden files and links to
    folders are passed over, which a line in the log counts.

    Args:
        source: the folder.
        condition_folder: a folder with an image of the same path for each (the suffix may differ), read as
            'conditioning_image'; it may be inside `source`. None: no condition.
        default_caption: of images without a caption file; None refuses them.
        transforms, on_bad_image, max_samples, variants: see `SampleBuilder`; the rows are sorted by path.

    Raises:
        UserError: the folder does not exist or has no images, a caption or a condition is missing, or a caption is no
            UTF-8 or no such JSON.
    """

    def __init__(self, source: str | Path, condition_folder: str | Path | None = None,
                 default_caption: str | None = None, transforms: Transforms = (), max_samples: int | None = None,
                 on_bad_image: OnBadImage = 'raise', variants: int | None = None) -> None:
        super().__init__(transforms, on_bad_image, max_samples, variants)
        self.source = str(source)
        self.folder = _existing_folder(source, 'source')
        conditions = None if condition_folder is None else _existing_folder(condition_folder, 'condition_folder')
        listing = list_folder(self.folder)
        if conditions is not None and conditions != self.folder:
            listing.files = [path for path in listing.files if not path.is_relative_to(conditions)]
        images = listing.images()
        self.paths = images[:self.max_samples]
        if not self.paths:
            raise UserError(f"The folder '{source}' holds no images ({', '.join(image_suffixes())}).")
        self.condition_paths = None if conditions is None else self._match_conditions(conditions)
        captions = {_stem(listing, path): path for suffix in reversed(CAPTIONS) for path in listing.files
                    if path.suffix.lower() == suffix}
        found = [captions.get(_stem(listing, path)) for path in self.paths]
        texts = [default_caption if path is None else _read_caption(path, default_caption) for path in found]
        if None in texts:
            path = self.paths[texts.index(None)]
            raise UserError(f"The image '{path}' has no caption: write {path.with_suffix('.txt')}, or set "
                            'default_caption.')
        self.row_texts = [text or '' for text in texts]
        if empty := [listing.relative(path) for path, text in zip(found, texts, strict=True) if path and not text]:
            print_log(f"'{self.folder}': {len(empty)} captions are empty ({listed(empty, 3)})", logger='current')
        of_images = {captions.get(_stem(listing, path)) for path in images}
        listing.pass_over_rest({*images, *(path for path in of_images if path)})
        listing.log(len(images), 'images')
        self.read_image = ImageReader('/')

    def _match_conditions(self, folder: Path) -> Sequence[Path]:
        """Return the image in `folder` with the same path for each row; one with the same suffix comes first."""
        listing, own = list_folder(folder), Listing(self.folder)
        names = {listing.relative(path): path for path in listing.images()}
        stems: dict[str, list[Path]] = {}
        for path in names.values():
            stems.setdefault(_stem(listing, path), []).append(path)
        matches = [[names[own.relative(path)]] if own.relative(path) in names else stems.get(_stem(own, path), [])
                   for path in self.paths]
        if [] in matches:
            raise UserError(f"{matches.count([])} images have no condition of the same name in '{folder}'; the first "
                            f"is '{self.paths[matches.index([])]}'.")
        if several := next((paths for paths in matches if len(paths) > 1), None):
            raise UserError(f"The conditions '{several[0]}' and '{several[1]}' are of one image. Remove one.")
        found = [paths[0] for paths in matches]
        listing.pass_over_rest(found)
        if folder != self.folder:
            listing.log(len(found), 'conditions')
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return self.paths[index].relative_to(self.folder).as_posix()

    def caption_texts(self) -> list[str]:
        """Return the captions."""
        return self.row_texts

    def cells(self, index: int) -> dict[str, Any]:
        conditions = self.condition_paths
        return {'img': self.paths[index], **({} if conditions is None else {'conditioning_image': conditions[index]})}

    def images(self, index: int, draw: Draw) -> Sample:
        what = {'img': 'The image', 'conditioning_image': 'The conditioning image'}
        return {key: self.read_image(path, f"{what[key]} '{path}'") for key, path in self.cells(index).items()}

    def texts(self, index: int, draw: Draw) -> Sample:
        return {'text': self.row_texts[index]}


def _stem(listing: Listing, path: Path) -> str:
    """Return the path in the folder without its suffix; names from macOS are decomposed, others are not."""
    return unicodedata.normalize('NFC', listing.relative(path.with_suffix('')))


def _existing_folder(path: str | Path, option: str) -> Path:
    folder = Path(os.path.expanduser(path)).absolute()
    if not os.path.isdir(folder):  # also of a name that is too long
        raise UserError(f"{option}='{path}' is not a folder; name one that exists.")
    return folder


def _read_caption(path: Path, default: str | None) -> str | None:
    """Return the caption in a file; `default` if it is a `.json` of something else.

    Raises:
        UserError: it cannot be read, or is no JSON, or its caption is not made of texts.
    """
    text = read_text(path, 'The caption')
    if path.suffix.lower() != '.json':
        return text.strip()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The caption '{path}' is no JSON: {first_line(error)}.") from error
    key = next((key for key in CAPTION_KEYS if isinstance(content, dict) and key in content), None)
    if key is None:
        return default
    value = [content[key]] if isinstance(content[key], str) else content[key]
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise UserError(f"The caption '{path}' has '{key}': {reprlib.repr(content[key])}; it must be a text or a list "
                        'of texts.')
    return (', ' if key == 'tags' else '\n').join(value).strip()
