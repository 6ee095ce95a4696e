"""Conditions that are computed from the image: edges, depth, or whatever a callable of the user's makes."""

import importlib
import operator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.transforms.geometry import covering
from diffengine_sdxl.registry import TRANSFORMS


class ConditionMap:
    """Base: read one picture of the sample, compute a map, write it as an RGB picture of the same size.

    Args:
        source: the sample's picture to read.
        key: the entry to write, which is what the adapter `reads`.
        detection_resolution: short edge in pixels at which the map is computed; it is scaled back then. None: as
            the picture is.
    """

    def __init__(self, source: str = 'img', key: str = 'conditioning_image',
                 detection_resolution: int | None = None) -> None:
        self.source, self.key, self.detection_resolution = source, key, detection_resolution

    def compute(self, image: Image.Image) -> Any:
        """The map of an RGB picture: a picture, or an array [h, w] or [h, w, 3], uint8 or float in [0, 1]."""
        raise NotImplementedError

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample.get(self.source)
        if not isinstance(image, Image.Image):
            raise ValueError(f"{type(self).__name__} reads the picture '{self.source}', which sample "
                             f"'{sample.get('key')}' does not hold; it holds {', '.join(map(repr, sample))}.")
        size = image.size
        if self.detection_resolution is not None:
            height, width = covering(image.height, image.width, (self.detection_resolution,) * 2)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        found = to_picture(self.compute(image), type(self).__name__)
        sample[self.key] = found if found.size == size else found.resize(size, Image.Resampling.BILINEAR)
        return sample


def to_picture(value: Any, what: str) -> Image.Image:
    """RGB of what `ConditionMap.compute` may return.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Image.Image):
        return value.convert('RGB')
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3) or value.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f'{what} made a {type(value).__name__} of shape {getattr(value, "shape", None)}; a picture '
                         'or an array [h, w] or [h, w, 3] is expected.')
    if value.dtype.kind == 'f':
        value = np.rint(np.clip(value, 0, 1) * 255)
    value = value.astype(np.uint8)
    return Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value).convert('RGB')


@TRANSFORMS.register_module()
class Canny(ConditionMap):
    """White edges on black. Source: Canny 1986, by OpenCV on the RGB picture, as the ControlNet examples do.

    Args:
        low, high: thresholds of the gradient, 0 to 255 and beyond.
        options: as for `ConditionMap`.
    """

    def __init__(self, source: str = 'img', key: str = 'conditioning_image', low: float = 100, high: float = 200,
                 detection_resolution: int | None = None) -> None:
        super().__init__(source, key, detection_resolution)
        self.low, self.high = low, high

    def compute(self, image: Image.Image) -> Any:
        """uint8 [h, w], 0 or 255."""
        import cv2
        return cv2.Canny(np.asarray(image), self.low, self.high)


class ModelMap(ConditionMap):
    """Base of maps that a model computes: it is built at the first use, so in the worker that uses it, frozen.

    Args:
        device: where it runs; a worker that is forked can only use 'cpu'.
        options: as for `ConditionMap`.
    """

    def __init__(self, source: str = 'img', key: str = 'conditioning_image',
                 detection_resolution: int | None = None, device: str = 'cpu') -> None:
        super().__init__(source, key, detection_resolution)
        self.device = device
        self._model: Any = None

    def build(self) -> Any:
        """The model."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """The model, built at the first use without a trace in the global random numbers."""
        if self._model is None:
            with rng.fork('condition model'):
                self._model = self.build()
            if isinstance(self._model, nn.Module):
                self._model.eval().requires_grad_(False).to(self.device)
        return self._model

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            return super().__call__(sample)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_model': None}


@TRANSFORMS.register_module()
class Depth(ModelMap):
    """Depth by any model that transformers loads for depth estimation, scaled to [0, 1] in each image.

    Args:
        model: hub id or folder, as 'Intel/dpt-hybrid-midas'.
        revision: of the hub id.
        invert: for models whose output grows with the distance (ZoeDepth, DepthPro): near is white then, too.
        options: as for `ModelMap`.
    """

    def __init__(self, model: str, revision: str | None = None, invert: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.name, self.revision, self.invert = model, revision, invert
        self._processor: Any = None

    def build(self) -> Any:
        """The model; its image processor is kept beside it.

        Raises:
            ValueError: transformers cannot load it.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
        options = {} if self.revision is None else {'revision': self.revision}
        try:
            # Without `backend` it would resize by torchvision where that is installed, to other pixels.
            self._processor = AutoImageProcessor.from_pretrained(self.name, backend='pil', **options)
            return AutoModelForDepthEstimation.from_pretrained(self.name, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"Depth(model='{self.name}') is no folder or hub id of a depth model that transformers "
                             f'can load here: {str(error).splitlines()[0]}') from error

    def compute(self, image: Image.Image) -> Any:
        """float32 [h, w] in [0, 1]; zeros where the depth is constant."""
        model = self.model
        inputs = self._processor(images=image, return_tensors='pt').to(self.device)
        target = [(image.height, image.width)]
        depth = self._processor.post_process_depth_estimation(model(**inputs), target_sizes=target)
        found = depth[0]['predicted_depth'].float().cpu()
        low, high = found.min(), found.max()
        scaled = (found - low) / (high - low) if high > low else torch.zeros_like(found)
        return (1 - scaled if self.invert else scaled).numpy()


@TRANSFORMS.register_module()
class Preprocessor(ModelMap):
    """A condition by any callable from picture to picture that can be imported: line art, pose, a model of one's own.

    `dict(type='Preprocessor', function='controlnet_aux:LineartDetector.from_pretrained',
    init=dict(pretrained_model_or_path='lllyasviel/Annotators'), call=dict(coarse=False))`

    Args:
        function: 'package.module:name', where name may have dots.
        init: arguments with which `function` is called once, to get the callable; None: it is the callable itself
            (a class is always called).
        call: more arguments of each call.
        options: as for `ModelMap`.
    """

    def __init__(self, function: str, init: dict[str, Any] | None = None, call: dict[str, Any] | None = None,
                 **options: Any) -> None:
        super().__init__(**options)
        if not all(function.partition(':')):
            raise ValueError(f"Preprocessor(function='{function}') should read 'package.module:name'.")
        self.function, self.init, self.call = function, init, dict(call or {})

    def build(self) -> Any:
        """The callable.

        Raises:
            ValueError: it cannot be imported or is none.
        """
        module, _, name = self.function.partition(':')
        try:
            found = operator.attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"Preprocessor(function='{self.function}') cannot be imported: {error}") from error
        if self.init is not None or isinstance(found, type):
            found = found(**(self.init or {}))
        if not callable(found):
            raise ValueError(f"Preprocessor(function='{self.function}') is a {type(found).__name__}, which cannot be "
                             'called.')
        return found.to(self.device) if hasattr(found, 'to') else found

    def compute(self, image: Image.Image) -> Any:
        """What the callable returns."""
        return self.model(image, **self.call)
