"""A request: one prompt with its images and settings, in diffusers' words; checked before anything loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.field_names import sampling_hint
from diffengine_sdxl.settings import (
    CUSTOM_STEPS,
    FRACTION,
    IMAGE,
    NUMBER,
    POSITION,
    RANGE,
    SIZE,
    TEXT,
    Kind,
    Setting,
    by_adapter,
    choice,
    setting,
    whole,
)

#: How prompts may be written.
SYNTAXES = ('plain', 'long', 'compel')
#: Keys of a config's `infer_cfg` that are not part of a Request: how the VAE decodes, and where the components wait.
OPTIONS = ('vae_tiling', 'vae_slicing', 'offload')


def _refiner(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f'{key}={value!r} must be a dict of the settings in which the refiner differs from the base.')
    for name in value:
        if name not in REFINER:
            raise UserError(f"Unknown refiner setting '{name}'.{did_you_mean(str(name), REFINER)}")
    return dict(value)


@dataclass(frozen=True)
class Request:
    """What to generate; names as in diffusers' SDXL pipelines. None leaves a setting to the config.

    An image is a path, an http(s) URL, a PIL image, a tensor [3, H, W] in [0, 1] or latents [4, h, w], or an array
    [H, W, 3] of uint8 or in [0, 1]; a mask is a path, URL, PIL image, tensor [1, H, W] or array [H, W] in [0, 1]. A
    list, or one more dimension, gives each image of a prompt its own. Sizes are (height, width) in pixels.
    """

    prompt: str = setting(TEXT, 'what the image shows', '', group='text')
    prompt_2: str | None = setting(TEXT, 'prompt of the second text encoder; default: the prompt', group='text')
    negative_prompt: str | None = setting(TEXT, 'what the image must not show', group='text')
    negative_prompt_2: str | None = setting(TEXT, 'negative prompt of the second text encoder', group='text')
    prompt_syntax: str | None = setting(
        choice(*SYNTAXES), "'plain': 77 tokens; 'long': of any length; 'compel': with weights, too; default: as the "
        "model's captions were read, see caption_chunks", refiner='base')
    image: Any = setting(IMAGE, 'what to start from, or to repaint in part', group='image')  # noqa: RUF009
    mask_image: Any = setting(IMAGE, 'where to repaint `image`: white (inpainting)', group='image')  # noqa: RUF009
    strength: float | None = setting(
        FRACTION, 'how far towards noise `image` is taken; default: 0.3, with a mask 0.9999', sampler=True)
    padding_mask_crop: int | None = setting(
        whole(0), 'repaint only what the mask marks, with a margin of so many pixels, at height x width')
    conditions: Mapping[str, Any] = setting(by_adapter(IMAGE), "adapter -> its image, a list of several, or "
                                            "{'image': ..., 'mask': ...} to act in a part of the output", dict)
    scales: Mapping[str, float] = setting(by_adapter(NUMBER), 'in place of the scales of adapters', dict)
    active_ranges: Mapping[str, Any] = setting(
        by_adapter(RANGE), 'the part of sampling in which an adapter acts, from noise (0) to image (1)', dict)
    height: int | None = setting(whole(1), 'in pixels; default: that of the image, else of the base', refiner='base')
    width: int | None = setting(whole(1), 'in pixels; default: that of the image, else of the base', refiner='base')
    original_size: tuple[int, int] | None = setting(SIZE, 'time ids: size before cropping', group='size')
    target_size: tuple[int, int] | None = setting(SIZE, 'time ids: size of the image', group='size')
    crops_coords_top_left: tuple[int, int] = setting(POSITION, 'time ids: where the crop began', (0, 0), group='size')
    negative_original_size: tuple[int, int] | None = setting(SIZE, 'of the negative prompt', group='size')
    negative_target_size: tuple[int, int] | None = setting(SIZE, 'of the negative prompt', group='size')
    negative_crops_coords_top_left: tuple[int, int] | None = setting(POSITION, 'of the negative prompt', group='size')
    aesthetic_score: float | None = setting(NUMBER, "a refiner's time ids; default: 6", group='score')
    negative_aesthetic_score: float | None = setting(NUMBER, 'of the negative prompt; default: 2.5', group='score')
    num_inference_steps: int | None = setting(whole(1), 'steps of the solver', group='steps', flags=('--steps',))
    timesteps: tuple[int, ...] | None = setting(CUSTOM_STEPS, 'custom timesteps, in 0 to 999', group='steps')
    sigmas: tuple[float, ...] | None = setting(CUSTOM_STEPS, 'custom sigmas; the last is where sampling ends',
                                               group='steps')
    guidance_scale: float | None = setting(NUMBER, 'classifier-free guidance; 1 or less: none', sampler=True)
    guidance_rescale: float | None = setting(NUMBER, 'rescaling of the guided prediction, in 0 to 1', sampler=True)
    pag_scale: float | None = setting(NUMBER, 'perturbed-attention guidance; 0: none', sampler=True)
    sag_scale: float | None = setting(NUMBER, 'self-attention guidance; 0: none', sampler=True)
    eta: float | None = setting(NUMBER, 'noise that DDIM adds in each step, in 0 to 1', sampler=True)
    denoising_start: float | None = setting(FRACTION, 'begin here, from noise (0) to image (1)', sampler=True)
    denoising_end: float | None = setting(FRACTION, 'stop here (a refiner goes on), from noise (0) to image (1)',
                                          sampler=True)
    num_images_per_prompt: int = setting(whole(1), 'images of the seeds seed, seed + 1, ...', 1,
                                         flags=('--num-images',))
    seed: int = setting(whole(0), 'seed of the initial noise', 0, refiner='base')
    latents: Any = setting(  # noqa: RUF009
        IMAGE, 'initial noise: a tensor [4, h, w], of n images [n, 4, h, w], or a .safetensors file', group='image')
    latents_row: int | None = setting(whole(0), 'the (first) row to take of a `latents` file that holds several')
    clip_skip: int | None = setting(whole(0), 'layers of the text encoders that the prompt skips besides the last; '
                                    'negative prompts skip none', refiner='own')
    refiner: Mapping[str, Any] = setting(Kind(_refiner, 'dict', 'setting -> value'),
                                         'settings in which the refiner differs from the base', dict)
    name: str = setting(TEXT, "of the image's file, without number and suffix", '')

    @classmethod
    def of(cls, *settings: Mapping[str, Any], whole: bool = True) -> Request:
        """Build a request; later settings win, None counts as not set, and dicts are merged.

        `height` and `width` that came in the layer of an `image` go when a later layer brings another one.

        Args:
            whole: False for defaults, to which an image may be added: settings that need one may come without it.

        Raises:
            UserError: a key is unknown, or a value has the wrong type, is out of range, or contradicts another.
        """
        merged: dict[str, Any] = {}
        of_image: set[str] = set()  # what came in the image's layer, and in no later one
        for layer in settings:
            size = {key for key in ('height', 'width') if layer.get(key) is not None}
            if layer.get('image') is None:
                of_image -= size
            else:
                merged = {key: value for key, value in merged.items() if key not in of_image}
                of_image = size
            for key, value in layer.items():
                if key not in SETTINGS:
                    raise UserError(f"Unknown setting '{key}'.{_unknown_hint(str(key), value)}")
                if value is None:
                    continue
                if key in STEPS:  # three ways to give the steps
                    merged = {k: v for k, v in merged.items() if k not in STEPS or layer.get(k) is not None}
                if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                    value = {**merged[key], **value}
                merged[key] = value
        request = cls(**{key: SETTINGS[key].kind.check(key, value) for key, value in merged.items()})
        request._check(whole)
        return request

    def for_refiner(self) -> Request:
        """Return the refiner's request: the base's texts, sizes and seed, its own number of steps and strength."""
        inherited = {name: getattr(self, name) for name, meta in SETTINGS.items()
                     if meta.refiner in ('base', 'both')}
        return Request.of(inherited, self.refiner, whole=False)

    def _check(self, whole: bool) -> None:
        if whole:
            self._check_images()
            self._check_counts()
        if self.timesteps is not None and self.sigmas is not None:
            raise UserError('Give timesteps or sigmas, not both.')
        if self.seed + self.num_images_per_prompt > 2 ** 63:
            raise UserError(f'seed={self.seed} is too large; seeds count up from it and end below 2 ** 63.')
        if self.refiner:
            try:
                self.for_refiner()
            except UserError as error:
                raise UserError(f'refiner: {error}') from None

    def _check_images(self) -> None:
        """Check that settings of an image or a mask have one."""
        if self.image is None:
            if self.mask_image is not None:
                mask = repr(self.mask_image) if isinstance(self.mask_image, str) else type(self.mask_image).__name__
                raise UserError(f'mask_image={mask} needs an `image` to repaint.')
            if self.strength is not None:
                raise UserError(f'strength={self.strength} needs an `image` to start from.')
            if self.denoising_start is not None:
                raise UserError(f'denoising_start={self.denoising_start} needs an `image`, or latents as `image`.')
        if self.mask_image is None and self.padding_mask_crop is not None:
            raise UserError(f'padding_mask_crop={self.padding_mask_crop} needs a `mask_image` to crop to.')

    def _check_counts(self) -> None:
        """Check that the number of images, masks and latents matches num_images_per_prompt."""
        num = self.num_images_per_prompt
        for name in ROWS:
            count, allowed = _count(getattr(self, name)), (None, num) if name == 'latents' else (None, num, 1)
            if count not in allowed:
                raise UserError(f'{name} holds {count}, and num_images_per_prompt={num}; give each image of a prompt '
                                 'its own' + ('.' if name == 'latents' else ', or one for all.'))
        if num > 1 and self.latents is not None and _count(self.latents) is None and not _is_file(self.latents):
            raise UserError(f'latents is the noise of one image; with num_images_per_prompt={num} it would make the '
                            f'same one {num} times. Give [{num}, 4, h, w].')
        if self.latents_row is not None and not _is_file(self.latents):
            raise UserError(f'latents_row={self.latents_row} is a row of a file; give its name as `latents`.')

    def check_texts(self) -> None:
        """Check that a tokenizer can read all texts.

        Raises:
            UserError: one has a lone surrogate; names the text.
        """
        texts = {name: getattr(self, name) for name in TEXTS}
        for name, text in {**texts, **{f'refiner.{key}': value for key, value in self.refiner.items()}}.items():
            try:
                if isinstance(text, str):
                    text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f'{name}={text[:80]!r}: character {error.start + 1} is a lone surrogate; write it in '
                                'UTF-8.') from None

    def with_seed(self, number: int) -> Request:
        """Return a request for image `number` of this one only, with the input images and the noise of that image."""
        inputs: dict[str, Any] = {name: value[number if _count(value) != 1 else 0] for name in ROWS
                                  if _count(value := getattr(self, name)) is not None}
        # The file keeps its name, so that the image can be made again.
        if _is_file(self.latents) and self.num_images_per_prompt > 1:
            inputs['latents_row'] = number + (self.latents_row or 0)
        return replace(self, seed=self.seed + number, num_images_per_prompt=1, **inputs)


#: All settings, by name.
SETTINGS: dict[str, Setting] = {f.name: f.metadata['setting'] for f in fields(Request)}
TEXTS, SIZES, SCORES, STEPS, ROWS = (tuple(name for name, meta in SETTINGS.items() if meta.group == group)
                                     for group in ('text', 'size', 'score', 'steps', 'image'))
#: Settings that the refiner may have apart from the base.
REFINER = tuple(name for name, meta in SETTINGS.items() if meta.refiner in ('own', 'both'))
#: Settings that `Sampler.changed` takes.
OF_SAMPLER = tuple(name for name, meta in SETTINGS.items() if meta.sampler)


def of_form(*forms: str) -> tuple[str, ...]:
    """Return the settings that are typed in one of `forms`, see `settings.Kind`."""
    return tuple(name for name, meta in SETTINGS.items() if meta.kind.form in forms)


def _unknown_hint(name: str, value: Any) -> str:
    """Return what to set in place of an unknown setting, as a sentence after a blank; '' if nothing is near."""
    if name in OPTIONS:
        return ' It does not belong to one image: set it in `infer_cfg`, or with --set.'
    return sampling_hint(name, value) or did_you_mean(name, [*SETTINGS, *OPTIONS])


def _count(value: Any) -> int | None:
    """Return how many images or latents `value` stacks, or None if it is a single one."""
    return len(value) if isinstance(value, list | tuple) or getattr(value, 'ndim', 0) == 4 else None


def _is_file(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)
