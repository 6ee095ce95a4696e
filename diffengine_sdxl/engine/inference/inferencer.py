"""Pictures in Python: a config's model, and its refiner, asked in diffusers' words. What tools/infer.py uses, too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from PIL import Image
from torch import Tensor

from diffengine_sdxl.engine import config as configs
from diffengine_sdxl.engine.config_check import check
from diffengine_sdxl.engine.export import load_weights
from diffengine_sdxl.engine.inference.inputs import Crop, crop_of, remembering_urls
from diffengine_sdxl.engine.inference.placing import device_of, place
from diffengine_sdxl.engine.inference.prompts import is_refiner, request_batch, size_of
from diffengine_sdxl.engine.inference.request import OPTIONS, ROWS, SCORES, Request
from diffengine_sdxl.engine.tested import weighted
from diffengine_sdxl.models import stages
from diffengine_sdxl.pictures import labelled_grid, to_pil
from diffengine_sdxl.registry import INFERENCERS, MODELS
from diffengine_sdxl.samplers.sampler import check_size

OUTPUT_TYPES = ('pil', 'pt', 'np', 'latent')
#: Of a Request, what a sampler takes.
OF_SAMPLER = ('num_inference_steps', 'timesteps', 'sigmas', 'eta', 'strength', 'denoising_start', 'denoising_end',
              'guidance_scale', 'guidance_rescale')


@dataclass
class Job:
    """Pictures that are made together.

    Attributes:
        indices: their places among all that was asked for.
        first, second: the base's stage, and the refiner's, if there is one.
        scales, windows: of adapters, while these are made.
        crops: what each picture is a part of, or None.
    """

    indices: list[int]
    first: stages.Stage
    second: stages.Stage | None
    scales: Mapping[str, float]
    windows: Mapping[str, Any]
    crops: Sequence[Crop | None]


@INFERENCERS.register_module()
class SDXLInferencer(BaseInferencer):
    """Makes pictures with the model of a config, and with its `refiner` after it.

    Follows mmengine's conventions: a call runs `preprocess`, `forward` and `postprocess`; `visualize` makes a grid of
    what it returns. What a config's `infer_cfg` says holds unless a call says otherwise.

    Args:
        config: path, name of an installed config, or a Config.
        weights: a step<N>.pth, a work_dir, for its latest, an exported step<N>/ or adapter's folder, or 'none' for the
            base alone; None for the adapters with the `weights` that the config names.
        device: 'cuda', 'cpu', ...; None for the best there is.
        overrides: of the config, as `--cfg-options` takes them, or a dict of dotted keys.

    Raises:
        ValueError: the config or the weights cannot be read, an adapter has no weights, or there is no sampler.
    """

    preprocess_kwargs = {'batch_size'}
    forward_kwargs = {'on_step'}
    postprocess_kwargs = {'output_type'}
    visualize_kwargs: set[str] = set()

    def __init__(self, config: str | Config, weights: str | None = None, device: str | None = None,
                 overrides: Sequence[str] | Mapping[str, Any] = ()) -> None:
        # Not BaseInferencer's: it would look for a test pipeline and a visualizer.
        if isinstance(config, Config) and overrides:
            raise ValueError('Overrides go with the name of a config; change the Config itself.')
        # A copy, as `weighted` changes it.
        cfg = copy.deepcopy(config) if isinstance(config, Config) else configs.load(config, overrides)
        if isinstance(config, Config):
            check(configs.resolve(cfg))
        if not (cfg.get('model') or {}).get('sampler'):
            raise ValueError('The config has no `model.sampler`, which makes the pictures; add one, as '
                             'configs/_base_/samplers/euler.py.')
        path = weighted(cfg, weights)
        self.cfg = configs.resolve(cfg)
        self.defaults, self.options = split(self.cfg)
        Request.of(self.defaults, whole=False)
        self.device = device_of(device)
        seed = int((self.cfg.get('randomness') or {}).get('seed') or 0)
        self.model: Any = MODELS.build({'seed': seed, **self.cfg.model, 'objective': None}).eval()
        if path is not None:
            load_weights(self.model, str(path))
        self.refiner: Any = None
        if self.cfg.get('refiner') is not None:
            self.refiner = MODELS.build({'seed': seed, **self.cfg.refiner, 'base': self.model}).eval()
            if self.refiner.sampler is None:  # the base's, but for the part of the way
                self.refiner.sampler = copy.copy(self.model.sampler)
                vars(self.refiner.sampler).update(dict.fromkeys(('strength', 'denoising_start', 'denoising_end')))
        for model in self.models:
            model.requires_grad_(False)
            # As diffusers' enable_vae_tiling: encoding too.
            model.vae.use_tiling = bool(self.options.get('vae_tiling'))
            model.vae.use_slicing = bool(self.options.get('vae_slicing'))
        self.release = place(self.models, self.device, bool(self.options.get('offload')))

    @property
    def models(self) -> list[Any]:
        """The base, and the refiner, if there is one."""
        return [self.model] if self.refiner is None else [self.model, self.refiner]

    def __call__(self, prompt: str | Sequence[str] | None = None, prompt_2: Any = None,  # type: ignore[override]
                 negative_prompt: Any = None, negative_prompt_2: Any = None, image: Any = None, mask_image: Any = None,
                 strength: float | None = None, conditions: Mapping[str, Any] | None = None, height: int | None = None,
                 width: int | None = None, num_inference_steps: int | None = None,
                 guidance_scale: float | None = None, num_images_per_prompt: int | None = None, seed: Any = None,
                 latents: Any = None, output_type: str = 'pil', batch_size: int = 1,
                 on_step: Callable[[int, int], None] | None = None, **settings: Any) -> Any:
        """Pictures of one prompt, or of several.

        Where `prompt` is a list, every other argument may be a list as long, one for each, or one for all; so may the
        values of `conditions`. `image`, `mask_image` and `latents` may be as many as there are pictures.

        Args:
            prompt, ..., latents, settings: see `engine.inference.request.Request`, which has them all.
            output_type: 'pil', a list of PIL images; 'pt', a tensor [N, 3, H, W] in [0, 1]; 'np', an array
                [N, H, W, 3] in [0, 1]; or 'latent', [N, 4, h, w].
            batch_size: pictures that are made together; in batches of more than one the last bits may differ.
            on_step: called with (steps done, steps in all) of each stage.

        Returns:
            num_images_per_prompt pictures for each prompt, in order.

        Raises:
            ValueError: something that is asked for cannot be made.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type='{output_type}' is not known; choose of "
                             f"{', '.join(map(repr, OUTPUT_TYPES))}.")
        given = {'prompt': prompt, 'prompt_2': prompt_2, 'negative_prompt': negative_prompt,
                 'negative_prompt_2': negative_prompt_2, 'image': image, 'mask_image': mask_image, 'strength': strength,
                 'conditions': conditions, 'height': height, 'width': width,
                 'num_inference_steps': num_inference_steps, 'guidance_scale': guidance_scale,
                 'num_images_per_prompt': num_images_per_prompt, 'seed': seed, 'latents': latents, **settings}
        requests = [self.request(one) for one in _each(given)]
        singles = [r.with_seed(k) for r in requests for k in range(r.num_images_per_prompt)]
        made: list[Tensor | None] = [None] * len(singles)
        with self.remembering():
            if output_type != 'pil':
                self._check_one_tensor(output_type, singles)
            for job in self.preprocess(singles, batch_size):
                for index, tensor in zip(job.indices, self.forward(job, output_type == 'latent', on_step), strict=True):
                    made[index] = tensor
        return self.postprocess(made, output_type=output_type)

    def _check_one_tensor(self, output_type: str, requests: Sequence[Request]) -> None:
        if any(r.padding_mask_crop is not None for r in requests):
            raise ValueError(f"output_type='{output_type}' does not go with padding_mask_crop, which puts parts back "
                             "into pictures of 8 bits; take 'pil'.")
        if len(sizes := {size_of(self.model, r) for r in requests}) > 1:
            said = ', '.join(f'{height} x {width}' for height, width in sorted(sizes))
            raise ValueError(f"output_type='{output_type}' is one tensor, and the sizes differ ({said}); take 'pil', "
                             'or ask for each size alone.')

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, the same prompts are encoded once, and each address is fetched once. Weights must not change."""
        with ExitStack() as stack:
            stack.enter_context(remembering_urls())
            for model in self.models:
                stack.enter_context(model.remembering_prompts())
            yield

    def request(self, settings: Mapping[str, Any]) -> Request:
        """What `settings` ask for, on top of the config's `infer_cfg`."""
        return Request.of(self.defaults, settings)

    def preprocess(self, inputs: Sequence[Request], batch_size: int = 1,  # type: ignore[override]
                   **_: Any) -> Iterator[Job]:
        """Jobs of at most `batch_size` pictures of one size and kind, in the order of the requests.

        Args:
            inputs: requests of one picture each.

        Raises:
            ValueError: see `request_batch`; an adapter misses its picture; a size cannot be made.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f'batch_size={batch_size!r} must be a whole number, at least 1.')
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(inputs):
            request.check_texts()
            # With one picture a job nothing has to be alike.
            groups.setdefault(index if batch_size == 1 else _alike(self.model, self.refiner, request), []).append(index)
        for indices in groups.values():
            for begin in range(0, len(indices), batch_size):
                some = indices[begin:begin + batch_size]
                yield self._job(some, [inputs[i] for i in some])

    def _job(self, indices: list[int], requests: Sequence[Request]) -> Job:
        first = requests[0]
        size = size_of(self.model, first)
        check_size(size, self.model.size_divisor)
        batch = request_batch(self.model, requests, size)
        self._check_conditions(first)
        self._check_scores(requests)
        sampler = self.model.sampler.changed(**{name: getattr(first, name) for name in OF_SAMPLER})
        base = stages.Stage(self.model, batch, sampler)
        second = None
        if self.refiner is not None:
            check_size(size, self.refiner.size_divisor)
            told = [r.for_refiner() for r in requests]
            second = stages.Stage(self.refiner, request_batch(self.refiner, told, size, goes_on=True),
                                  _refiners(self.refiner.sampler, sampler, told[0]))
        elif first.refiner:
            raise ValueError('`refiner` says what the refiner is told, but the config has no `refiner`.')
        return Job(indices, base, second, first.scales, first.windows, [crop_of(r, size) for r in requests])

    def _check_conditions(self, request: Request) -> None:
        given = {self.model.adapters[name].reads for name in request.conditions if name in self.model.adapters}
        for name, adapter in self.model.adapters.items():
            if adapter.reads is not None and adapter.reads not in given:
                raise ValueError(f"Adapter '{name}' ({adapter.kind}) reads a picture, and there is none: give it in "
                                 f'`conditions` (--condition {name}=FILE), or take the adapter out '
                                 f'(model.adapters.{name}=None).')

    def _check_scores(self, requests: Sequence[Request]) -> None:
        if any(is_refiner(model) for model in self.models):
            return
        for name in SCORES:
            given = [value for r in requests for value in (getattr(r, name), r.refiner.get(name)) if value is not None]
            if given:
                raise ValueError(f'{name}={given[0]} is what a refiner is told (a UNet of 5 time ids), and the config '
                                 'has none; leave it out.')

    def forward(self, inputs: Job, latent: bool = False,  # type: ignore[override]
                on_step: Callable[[int, int], None] | None = None, **_: Any) -> Tensor | list[Tensor]:
        """Pictures [B, 3, H, W] in [0, 1], or latents [B, 4, h, w], of a job; with `padding_mask_crop` B whole pictures
        of their own sizes.

        Raises:
            ValueError: see Sampler; or an adapter cannot take its scale.
        """
        try:
            with _set(self.model, inputs.scales, inputs.windows):
                latents = stages.run(inputs.first, inputs.second, on_step)
            if latent:
                return latents
            last = inputs.second or inputs.first
            images: Tensor = last.model.decode(latents)
            if not any(inputs.crops):
                return images
            return [image if crop is None else crop.put_back(image)
                    for image, crop in zip(images, inputs.crops, strict=True)]
        finally:
            self.release()

    def postprocess(self, preds: Sequence[Any], visualization: Any = None,  # type: ignore[override]
                    output_type: str = 'pil', **_: Any) -> Any:
        """What a call returns."""
        if output_type == 'pil':
            return [to_pil(image.float().cpu().numpy()) for image in preds]
        made = torch.stack(list(preds))
        return made.permute(0, 2, 3, 1).float().cpu().numpy() if output_type == 'np' else made

    def visualize(self, inputs: Sequence[Request], preds: Sequence[Image.Image], **_: Any) -> Image.Image:
        """A labelled grid of pictures, one row a prompt."""
        rows: dict[str, list[Image.Image | None]] = {}
        for request, picture in zip(inputs, preds, strict=True):
            rows.setdefault(request.prompt, []).append(picture)
        width = max(len(row) for row in rows.values())
        filled = [(prompt, [*row, *[None] * (width - len(row))]) for prompt, row in rows.items()]
        return labelled_grid(filled, [str(i + 1) for i in range(width)])

    def _init_pipeline(self, cfg: Any) -> Any:
        """mmengine asks for it; pictures are read by `preprocess`."""
        return None


def split(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """What requests begin with, and how all are made, of a resolved config's `infer_cfg`.

    What it says of adapters that are taken out (their value is None) goes with them.
    """
    plain = config.to_dict()
    given = {k: v for k, v in (plain.get('infer_cfg') or {}).items() if v is not None}
    out = {name for name, adapter in ((plain.get('model') or {}).get('adapters') or {}).items() if adapter is None}
    for key in {'conditions', 'scales', 'windows'} & given.keys():
        given[key] = {name: value for name, value in given[key].items() if name not in out}
    return ({k: v for k, v in given.items() if k not in OPTIONS}, {k: v for k, v in given.items() if k in OPTIONS})


def _each(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict of settings for each prompt.

    Raises:
        ValueError: a list is of another length.
    """
    prompts = given['prompt']
    if prompts is None or isinstance(prompts, str):
        return [{k: v for k, v in given.items() if v is not None}]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f'prompt={prompts!r} must be a text, or a list of texts.')
    num = len(prompts)
    if num == 0:
        raise ValueError('prompt=[] asks for nothing.')
    pairs = {f.name for f in fields(Request) if f.name.endswith(('_size', '_top_left'))} | {'timesteps', 'sigmas'}

    def at(name: str, value: Any, i: int) -> Any:
        if name in ('conditions', 'refiner', 'scales', 'windows') and isinstance(value, Mapping):
            return {k: at('', v, i) if name == 'conditions' else v for k, v in value.items()}
        if name in ROWS and (isinstance(value, list | tuple) or getattr(value, 'ndim', 0) == 4):
            each, rest = divmod(len(value), num)
            if not rest and each:  # one of each prompt, or one of each of its pictures
                return value[i] if each == 1 else value[i * each:(i + 1) * each]
        if not isinstance(value, list | tuple) or name in pairs:
            return value
        if len(value) != num:
            raise ValueError(f'There are {num} prompts and {len(value)} of {name or "an adapter"!r}; give one for '
                             'each.')
        return value[i]
    return [{k: at(k, v, i) for k, v in given.items() if v is not None} for i in range(num)]


def _alike(model: Any, refiner: Any, request: Request) -> Any:
    """What must be equal in pictures that are made together."""
    from diffengine_sdxl.models.text import num_chunks
    chunks = [num_chunks(model, request), *([] if refiner is None else [num_chunks(refiner, request.for_refiner())])]
    given = {name: value if isinstance(value, Mapping) else {'image': value}
             for name, value in request.conditions.items()}
    shape = {name: [_count(value.get(part)) for part in ('image', 'mask')] for name, value in given.items()}
    image = request.image
    kind = (image.device, tuple(image.shape[-3:])) if isinstance(image, Tensor) else image is not None
    return repr((size_of(model, request), [getattr(request, name) for name in OF_SAMPLER], request.scales,
                 request.windows, shape, kind, request.mask_image is not None, request.latents is not None,
                 [getattr(request, name) is None for name in request.__dict__ if name.startswith('negative_')],
                 request.syntax, request.clip_skip, request.refiner.get('clip_skip'), chunks,
                 {k: v for k, v in request.refiner.items() if k in OF_SAMPLER},
                 [request.refiner.get(name) is None for name in ('negative_prompt', 'negative_prompt_2')]))


def _count(pictures: Any) -> int:
    return len(pictures) if isinstance(pictures, list | tuple) else int(pictures is not None)


def _refiners(sampler: Any, base: Any, told: Request) -> Any:
    """The refiner's sampler: it goes on where the base's stops, or takes the finished latents back by its strength."""
    own = {name: getattr(told, name) for name in OF_SAMPLER}
    if own['denoising_start'] not in (None, base.denoising_end):
        raise ValueError(f"refiner.denoising_start={own['denoising_start']} must be where the base stops "
                         f'(denoising_end={base.denoising_end}); leave it out.')
    if base.denoising_end is not None and base.denoising_end < 1:
        own['denoising_start'] = own['denoising_start'] or base.denoising_end
        # Both halves are parts of the same way.
        if own['num_inference_steps'] is own['timesteps'] is own['sigmas'] is None:
            own.update({name: getattr(base, name) for name in ('num_inference_steps', 'timesteps', 'sigmas')})
    return sampler.changed(**own)


@contextmanager
def _set(model: Any, scales: Mapping[str, float], windows: Mapping[str, Any]) -> Iterator[None]:
    """Inside, adapters have other scales and windows.

    Raises:
        ValueError: there is no such adapter, or it cannot take the value.
    """
    with ExitStack() as stack:
        for name, value, attribute in (*((n, v, 'scale') for n, v in scales.items()),
                                       *((n, v, 'window') for n, v in windows.items())):
            if name not in model.adapters:
                raise ValueError(f"{attribute}s name '{name}', and there is no such adapter; there are "
                                 f'{", ".join(model.adapters) or "none"}.')
            adapter = model.adapters[name]
            stack.callback(setattr, adapter, attribute, getattr(adapter, attribute))
            setattr(adapter, attribute, value)
        yield
