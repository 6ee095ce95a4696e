"""What is asked for: one prompt with its pictures and settings, in diffusers' words; checked before anything loads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from diffengine_sdxl.models.weighting import SYNTAXES
from diffengine_sdxl.registry import nearest
from diffengine_sdxl.samplers.solver import check_own
from diffengine_sdxl.structures import checked_window

TEXTS = ('prompt', 'prompt_2', 'negative_prompt', 'negative_prompt_2')
SIZES = ('original_size', 'target_size', 'negative_original_size', 'negative_target_size')
CORNERS = ('crops_coords_top_left', 'negative_crops_coords_top_left')
#: Of a config's `infer_cfg`, what is no part of a Request: how the VAE decodes, and whether parts wait in CPU memory.
OPTIONS = ('vae_tiling', 'vae_slicing', 'offload')
#: Of which a later setting takes the place of all.
STEPS = ('num_inference_steps', 'timesteps', 'sigmas')
#: What a refiner is told of how a picture looks.
SCORES = ('aesthetic_score', 'negative_aesthetic_score')
#: What the refiner may be told apart from the base.
REFINER = (*TEXTS, *SIZES, *CORNERS, *SCORES, *STEPS, 'strength', 'guidance_scale', 'guidance_rescale', 'eta',
           'denoising_start', 'denoising_end', 'clip_skip')
WHOLE = ('height', 'width', 'num_inference_steps', 'num_images_per_prompt', 'seed', 'latents_row', 'clip_skip',
         'padding_mask_crop')
#: What may be one for each picture of a prompt.
ROWS = ('image', 'mask_image', 'latents')


@dataclass(frozen=True)
class Request:
    """What is asked for; the names are those of diffusers' SDXL pipelines. None leaves a setting to the config.

    Attributes:
        prompt, prompt_2, negative_prompt, negative_prompt_2: texts; no prompt_2 is the prompt again.
        image: to start from (image-to-image), or to repaint in part: path, URL, PIL image, or a tensor, a picture
            [3, H, W] in [0, 1] or latents [4, h, w]; or an array, [H, W, 3] of uint8 or in [0, 1]. For several pictures
            of a prompt a list or one more dimension gives each its own.
        mask_image: what is white is repainted (inpainting): path, URL, PIL image, tensor [1, H, W] or array [H, W] in
            [0, 1]; several as of `image`.
        padding_mask_crop: cut out what the mask leaves not black, with as many pixels around it, repaint this part at
            height x width, and put it back.
        strength: how far back towards noise an image is taken, in (0, 1]; None: 0.3, with a mask 0.9999.
        conditions: adapter name -> its picture (path, URL, PIL), a list where it takes several, or
            {'image': ..., 'mask': ...} where it acts in a part of the picture only.
        scales, windows: adapter name -> what takes the place of its `scale` and `window`.
        height, width: of the picture, in pixels; None: those of the image, else the base's own.
        original_size, target_size, crops_coords_top_left, negative_original_size, negative_target_size,
            negative_crops_coords_top_left: (height, width) or (top, left) in pixels: SDXL's micro-conditioning.
        aesthetic_score, negative_aesthetic_score: what a refiner is told in place of the target size; None: 6 and 2.5.
        num_inference_steps, timesteps, sigmas, eta: of the solver.
        guidance_scale, guidance_rescale: of classifier-free guidance.
        denoising_start, denoising_end: parts of the way from noise (0) to image (1) at which to begin and to stop.
        num_images_per_prompt: pictures, with the seeds seed, seed + 1, ...
        seed: of the starting noise.
        latents: starting noise [4, h, w], a tensor or a .safetensors file that holds one; of several pictures
            [n, 4, h, w], of which picture k takes row k.
        latents_row: of a file that holds several, the (first) row to take.
        clip_skip: layers of the text encoders that the prompts skip besides the last one; the negative ones skip none.
        syntax: how prompts are written: 'plain', or with weights and of any length ('compel').
        refiner: what the refiner is told otherwise than the base, of REFINER.
        name: of the picture's file, without number and suffix.
    """

    prompt: str = ''
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    image: Any = None
    mask_image: Any = None
    padding_mask_crop: int | None = None
    strength: float | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_original_size: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    num_inference_steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    eta: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    num_images_per_prompt: int = 1
    seed: int = 0
    latents: Any = None
    latents_row: int | None = None
    clip_skip: int | None = None
    syntax: str = 'plain'
    refiner: Mapping[str, Any] = field(default_factory=dict)
    name: str = ''

    @classmethod
    def of(cls, *settings: Mapping[str, Any], whole: bool = True) -> Request:
        """A request of settings, the later ones first; None counts as not given, dicts are put together.

        Args:
            whole: False for a part of what will be asked: what goes with a picture only may come without one.

        Raises:
            ValueError: a key is unknown, or a value is of the wrong kind, out of range, or contradicts another.
        """
        given: dict[str, Any] = {}
        known = [f.name for f in fields(cls)]
        for one in settings:
            for key, value in one.items():
                if key not in known:
                    hint = ' It is no setting of one picture: it goes into the config (infer_cfg) or behind --set.' if \
                        key in OPTIONS else nearest(str(key), [*known, *OPTIONS])
                    raise ValueError(f"'{key}' is nothing that can be asked for.{hint}")
                if value is None:
                    continue
                if key in STEPS:  # three ways to say one thing
                    given = {k: v for k, v in given.items() if k not in STEPS or one.get(k) is not None}
                if isinstance(value, Mapping) and isinstance(given.get(key), Mapping):
                    value = {**given[key], **value}
                given[key] = value
        return cls(**{key: _as_it_should_be(key, value) for key, value in given.items()})._checked(whole)

    def for_refiner(self) -> Request:
        """What the refiner is asked: the same texts, sizes and seed, its own number of steps and strength."""
        kept = {name: getattr(self, name) for name in (*TEXTS, *SIZES, *CORNERS, *SCORES, 'height', 'width', 'seed',
                                                       'syntax')}
        return Request.of(kept, self.refiner, whole=False)

    def _checked(self, whole: bool) -> Request:
        if whole:
            if self.image is None:
                self._check_without_image()
            if self.mask_image is None and self.padding_mask_crop is not None:
                raise ValueError(f'padding_mask_crop={self.padding_mask_crop} cuts out what a mask marks, but there '
                                 'is no `mask_image`.')
            self._check_rows()
        for name in ('strength', 'denoising_start', 'denoising_end'):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f'{name}={value} must be above 0 and at most 1.')
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError('Give timesteps or sigmas, not both.')
        for name, low in (('num_inference_steps', 1), ('num_images_per_prompt', 1), ('height', 1), ('width', 1),
                          ('seed', 0), ('latents_row', 0), ('clip_skip', 0), ('padding_mask_crop', 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f'{name}={value} must be at least {low}.')
        if self.seed + self.num_images_per_prompt > 2 ** 63:
            raise ValueError(f'seed={self.seed} is too large; seeds count up from it and end below 2 ** 63.')
        if self.syntax not in SYNTAXES:
            raise ValueError(f"syntax='{self.syntax}' is not known; choose of {', '.join(map(repr, SYNTAXES))}.")
        if unknown := [key for key in self.refiner if key not in REFINER]:
            raise ValueError(f"'{unknown[0]}' is nothing that the refiner can be told."
                             f'{nearest(unknown[0], list(REFINER))}')
        try:
            if self.refiner:
                self.for_refiner()
        except ValueError as error:
            raise ValueError(f'refiner: {error}') from None
        return self

    def _check_without_image(self) -> None:
        if self.mask_image is not None:
            raise ValueError(f"mask_image={_short(self.mask_image)} says what to repaint, but there is no `image`.")
        if self.strength is not None:
            raise ValueError(f'strength={self.strength} says how far back an image is taken, but there is no `image`.')
        if self.denoising_start is not None:
            raise ValueError(f'denoising_start={self.denoising_start} goes on from an image or latents; give `image`.')

    def _check_rows(self) -> None:
        """Refuse as many images or latents as there are not pictures."""
        num = self.num_images_per_prompt
        for name in ROWS:
            have, enough = _num(getattr(self, name)), (None, num) if name == 'latents' else (None, num, 1)
            if have not in enough:
                raise ValueError(f'{name} holds {have}, and num_images_per_prompt={num}; give each picture of a prompt '
                                 'its own' + ('.' if name == 'latents' else ', or one for all.'))
        if num > 1 and self.latents is not None and _num(self.latents) is None and not _is_file(self.latents):
            raise ValueError(f'latents is the noise of one picture; with num_images_per_prompt={num} it would make the '
                             f'same one {num} times. Give [{num}, 4, h, w].')
        if self.latents_row is not None and not _is_file(self.latents):
            raise ValueError(f'latents_row={self.latents_row} is a row of a file; give its name as `latents`.')

    def check_texts(self) -> None:
        """Refuse letters that no tokenizer takes.

        Raises:
            ValueError: names the text.
        """
        own = {name: getattr(self, name) for name in TEXTS}
        for name, text in {**own, **{f'refiner.{key}': value for key, value in self.refiner.items()}}.items():
            try:
                if isinstance(text, str):
                    text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f'{name}={text[:80]!r}: letter {error.start + 1} is half of one (a surrogate); write '
                                 'it in UTF-8.') from None

    def with_seed(self, number: int) -> Request:
        """Picture `number` of this request, alone, with the images and the noise that are its own."""
        own: dict[str, Any] = {name: value[number if _num(value) != 1 else 0] for name in ROWS
                               if _num(value := getattr(self, name)) is not None}
        # The file keeps its name, by which the picture can be made again.
        if _is_file(self.latents) and self.num_images_per_prompt > 1:
            own['latents_row'] = number + (self.latents_row or 0)
        return replace(self, seed=self.seed + number, num_images_per_prompt=1, **own)


def _num(value: Any) -> int | None:
    """How many images or latents are put together in `value`; None where it is one by itself."""
    several = isinstance(value, list | tuple) or getattr(value, 'ndim', 0) == 4
    return len(value) if several else None


def _is_file(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _as_it_should_be(key: str, value: Any) -> Any:
    """`value` in the type of Request's field `key`.

    Raises:
        ValueError: it cannot be that.
    """
    if key in TEXTS or key in ('syntax', 'name'):
        if not isinstance(value, str):
            raise ValueError(f'{key}={value!r} must be a text.')
        return value
    if key in SIZES or key in CORNERS:
        pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
        try:
            height, width = (_whole(key, side) for side in pair)
        except ValueError:
            raise ValueError(f'{key}={value!r} must be two whole numbers of pixels, vertical first.') from None
        return height, width
    if key in WHOLE:
        return _whole(key, value)
    if key in ('strength', 'denoising_start', 'denoising_end', 'guidance_scale', 'guidance_rescale', 'eta',
               *SCORES):
        return _number(key, value)
    if key in ('timesteps', 'sigmas'):
        check_own(key, value)
        return tuple(map(float if key == 'sigmas' else int, value))
    if key in ('conditions', 'scales', 'windows', 'refiner'):
        if not isinstance(value, Mapping):
            what = 'its own settings' if key == 'refiner' else 'adapter name -> value'
            raise ValueError(f'{key}={value!r} must be a dict: {what}.')
        check = {'scales': _number, 'windows': _window}.get(key, lambda _, part: part)
        return {str(k): check(f'{key}.{k}', v) for k, v in value.items()}
    return value


def _whole(key: str, value: Any) -> int:
    # Any kind of number, numpy's too, as long as it is whole.
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0:
        raise ValueError(f'{key}={value!r} must be a whole number.')
    return int(value)  # type: ignore[call-overload,no-any-return]


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        pass
    raise ValueError(f'{key}={value!r} must be a number.')


def _window(key: str, value: Any) -> tuple[float, float]:
    try:
        return checked_window(value)
    except (ValueError, OverflowError) as error:  # the latter: a whole number of 400 digits
        raise ValueError(f'{key}: {error}') from None


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__
