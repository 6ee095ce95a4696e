"""Conditions computed from an image: edges, depth, or the result of a user's callable."""

import importlib
import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.row_digests import FileDigest, package_digest
from diffengine_sdxl.datasets.transforms.geometry import covering
from diffengine_sdxl.errors import UserError, first_line, whole_number
from diffengine_sdxl.loading.hub import commit_in_cache
from diffengine_sdxl.loading.strict import as_user_error
from diffengine_sdxl.registry import TRANSFORMS


class ConditionMap:
    """Base: read an image of the sample, compute a map, write it as an RGB image of the same size.

    Args:
        source: the image's key in the sample.
        key: the key to write, which is the adapter's `condition_key`.
        detection_resolution: short edge in pixels at which the map is computed; it is scaled back. None: the image's.
    """

    reads = 'images'

    def __init__(self, source: str = 'img', key: str = 'conditioning_image',
                 detection_resolution: int | None = None) -> None:
        self.source, self.key = source, key
        self.detection_resolution = None if detection_resolution is None else whole_number(
            'detection_resolution', detection_resolution, 1)

    def compute(self, image: Image.Image) -> Any:
        """Return the map of an RGB image: an image, or an array [h, w] or [h, w, 3], uint8 or float in [0, 1]."""
        raise NotImplementedError

    def made_of(self, file_digest: FileDigest) -> Any:
        """Return what decides the maps besides code and settings of this class, by digests: weights and packages."""
        raise NotImplementedError

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample.get(self.source)
        if not isinstance(image, Image.Image):
            raise UserError(f"{type(self).__name__} reads the image '{self.source}', which sample "
                            f"'{sample.get('key')}' lacks; it has {', '.join(map(repr, sample))}.")
        size = image.size
        if self.detection_resolution is not None:
            height, width = covering(image.height, image.width, (self.detection_resolution,) * 2)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        result = _to_image(self.compute(image), type(self).__name__)
        sample[self.key] = result if result.size == size else result.resize(size, Image.Resampling.BILINEAR)
        return sample


def _to_image(value: Any, what: str) -> Image.Image:
    """Convert the result of `ConditionMap.compute` to RGB."""
    if isinstance(value, Image.Image):
        return value.convert('RGB')
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3) or value.shape[2:] not in ((), (1,), (3,)):
        raise UserError(f'{what} returned a {type(value).__name__} of shape {getattr(value, "shape", None)}; an image '
                        'or an array [h, w] or [h, w, 3] is expected.')
    if value.dtype.kind == 'f':
        value = np.rint(np.clip(value, 0, 1) * 255)
    value = value.astype(np.uint8)
    return Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value).convert('RGB')


@TRANSFORMS.register_module()
class Canny(ConditionMap):
    """White edges on black. Source: Canny 1986, by OpenCV on the RGB image, as in the ControlNet examples.

    Args:
        low, high: thresholds of the gradient, 0 to 255 and beyond.
        options: see `ConditionMap`.
    """

    def __init__(self, low: float = 100, high: float = 200, **options: Any) -> None:
        super().__init__(**options)
        for key, value in (('low', low), ('high', high)):
            if not isinstance(value, int | float):
                raise UserError(f'Canny: {key}={value!r} must be a number.')
        self.low, self.high = low, high

    def compute(self, image: Image.Image) -> Any:
        import cv2
        return cv2.Canny(np.asarray(image), self.low, self.high)

    def made_of(self, file_digest: FileDigest) -> Any:
        """Return the version of OpenCV."""
        return package_digest('cv2')


class ModelMap(ConditionMap):
    """Base of maps that a frozen model computes; it is built at its first use, in the worker that uses it.

    Args:
        device: where it runs; a forked worker can only use 'cpu'.
        options: see `ConditionMap`.
    """

    def __init__(self, device: str = 'cpu', **options: Any) -> None:
        super().__init__(**options)
        self.device = device
        self._model: Any = None
        self._placed_on = ''

    def build(self) -> Any:
        """Build the model."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """Return the model, on `device`; building it does not change the global random state."""
        if self._model is None:
            with rng.fork('condition model'):
                self._model = self.build()
            self._placed_on = ''
            if isinstance(self._model, nn.Module):
                self._model.eval().requires_grad_(False)
        if self._placed_on != self.device and hasattr(self._model, 'to'):
            self._model = self._model.to(self.device)
            self._placed_on = self.device
        return self._model

    def release(self) -> None:
        """Drop the model; the next use builds it again."""
        self._model = None

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            return super().__call__(sample)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_model': None}


@TRANSFORMS.register_module()
class Depth(ModelMap):
    """Depth by any depth estimation model of transformers, scaled to [0, 1] in each image.

    Args:
        model: hub id or folder, such as 'Intel/dpt-hybrid-midas'.
        revision: of the hub id.
        invert: for models whose output grows with the distance (ZoeDepth, DepthPro), so that near is white.
        options: see `ModelMap`.
    """

    def __init__(self, model: str, revision: str | None = None, invert: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.name, self.revision, self.invert = model, revision, invert
        self._processor: Any = None

    def build(self) -> Any:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
        options = {} if self.revision is None else {'revision': self.revision}
        shown = f'Depth(model={self.name})'
        # Without `backend`, torchvision would resize where it is installed, to other pixels.
        self._processor = as_user_error(shown, AutoImageProcessor.from_pretrained, self.name, backend='pil', **options)
        return as_user_error(shown, AutoModelForDepthEstimation.from_pretrained, self.name, **options)

    def made_of(self, file_digest: FileDigest) -> Any:
        """Return the content of the model's files; of the hub's, those of the commit that is in its cache."""
        folder = Path(os.path.expanduser(self.name))
        if not folder.is_dir():
            if commit_in_cache(self.name, self.revision) is None:
                _ = self.model  # downloads it
            weights: Any = commit_in_cache(self.name, self.revision)
        else:
            weights = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
        return [weights, *map(package_digest, ('transformers', 'torch'))]

    def compute(self, image: Image.Image) -> Any:
        model = self.model
        inputs = self._processor(images=image, return_tensors='pt').to(self.device)
        target = [(image.height, image.width)]
        results = self._processor.post_process_depth_estimation(model(**inputs), target_sizes=target)
        depth = results[0]['predicted_depth'].float().cpu()
        low, high = depth.min(), depth.max()
        scaled = (depth - low) / (high - low) if high > low else torch.zeros_like(depth)
        return (1 - scaled if self.invert else scaled).numpy()


@TRANSFORMS.register_module()
class Preprocessor(ModelMap):
    """A condition by any importable callable from image to image: line art, pose, a user's own model.

    `dict(type='Preprocessor', function='controlnet_aux:LineartDetector.from_pretrained',
    init=dict(pretrained_model_or_path='lllyasviel/Annotators'), call=dict(coarse=False))`

    Args:
        function: 'package.module:name', where name may have dots.
        init: arguments with which `function` is called once, to build the callable; None: it is the callable (a class
            is always called).
        call: more arguments of each call.
        options: see `ModelMap`.
    """

    def __init__(self, function: str, init: dict[str, Any] | None = None, call: dict[str, Any] | None = None,
                 **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(function, str) or not all(function.partition(':')) or function.startswith('.'):
            raise UserError(f"Preprocessor(function={function!r}) must be 'package.module:name'.")
        self.function, self.init, self.call = function, init, dict(call or {})

    def build(self) -> Any:
        shown = f"Preprocessor(function='{self.function}')"
        module, _, name = self.function.partition(':')
        try:
            function = operator.attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise UserError(f'{shown} cannot be imported: {error}') from error
        if self.init is not None or isinstance(function, type):
            try:
                function = function(**(self.init or {}))
            except (OSError, TypeError, ValueError) as error:  # files and arguments of `init`
                raise UserError(f'{shown} cannot be built with init={self.init}: {first_line(error)}') from error
        if not callable(function):
            raise UserError(f'{shown} is a {type(function).__name__}, which cannot be called.')
        return function

    def made_of(self, file_digest: FileDigest) -> Any:
        """Return the version of the function's package; of a module without one, its content."""
        return package_digest(self.function.partition(':')[0])

    def compute(self, image: Image.Image) -> Any:
        return self.model(image, **self.call)
