"""Generate images with a config's model and its refiner, asked in diffusers' words; the infer command uses it too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config
from PIL import Image
from torch import Tensor

from diffengine_sdxl import config as configs
from diffengine_sdxl.config.check import check
from diffengine_sdxl.errors import UserError, first_line, one_of, whole_number
from diffengine_sdxl.field_names import method_hint
from diffengine_sdxl.images import labelled_grid, to_pil
from diffengine_sdxl.inference import stages
from diffengine_sdxl.inference.add_adapters import adapter_settings, add_adapter, load_adapter, use_caption_chunks
from diffengine_sdxl.inference.call_arguments import seeds_of, split_prompts
from diffengine_sdxl.inference.stages import Stage
from diffengine_sdxl.limits import set_limits
from diffengine_sdxl.loading.trained import apply_weights, load_trained, use_exported
from diffengine_sdxl.models.apply_speed import apply_speed
from diffengine_sdxl.models.image_inputs import MaskCrop, cached_urls, crop_of
from diffengine_sdxl.models.prompt_branches import encode_text, num_chunks
from diffengine_sdxl.models.request_batch import request_batch, size_of
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import INFERENCERS, MODELS
from diffengine_sdxl.request import OF_SAMPLER, OPTIONS, SCORES, Request
from diffengine_sdxl.samplers.sampler import check_size
from diffengine_sdxl.speed import Speed

if TYPE_CHECKING:
    from diffengine_sdxl.inference.offload import SequentialOffloadHook

OUTPUT_TYPES = ('pil', 'pt', 'np', 'latent')


@dataclass
class Job:
    """Images that are made in one batch.

    Attributes:
        indices: of the images among all requests.
        first, second: stages of the base and of the refiner.
        scales, active_ranges: of adapters, for these images only.
        crops: the crop that each image repaints, or None.
    """

    indices: list[int]
    first: Stage
    second: Stage | None
    scales: Mapping[str, float]
    active_ranges: Mapping[str, Any]
    crops: Sequence[MaskCrop | None]


@INFERENCERS.register_module()
class SDXLInferencer:
    """Generate images with the model of a config and, if it has one, its `refiner`.

    A call runs `preprocess`, `forward` and `postprocess`, as mmengine's inferencers do; `visualize` makes a grid. (Not
    a subclass of BaseInferencer: importing it brings mmengine's runner, strategies and OpenCV.) The config's
    `infer_cfg` holds the defaults of a call.

    Args:
        config: path, name of an installed config, or a Config.
        weights: a step<N>.pth, a work_dir (its latest checkpoint), an exported step<N>/ or adapter's folder, or 'none'
            for the base without adapters; None for the `weights` that the config names.
        device: 'cuda', 'cpu', ...; None for the best available.
        adapters: name -> a file, folder, hub id or link, whose kind is found by itself; or a dict of an adapter's
            settings with such `weights`. They are added to those of the config, or give one of them another file.
        cfg_options: overrides of the config, as `--cfg-options` takes them, or a dict of dotted keys.
        checked: `config` is a resolved and checked Config.

    Raises:
        UserError: the config or the weights cannot be read, an adapter has no weights, or there is no sampler.
    """

    def __init__(self, config: str | Config, weights: str | None = None, device: str | None = None, *,
                 adapters: Mapping[str, Any] | None = None, cfg_options: Sequence[str] | Mapping[str, Any] = (),
                 checked: bool = False) -> None:
        if isinstance(config, Config) and cfg_options:
            raise UserError('cfg_options go with the name of a config; change the Config itself.')
        # Both copy: `apply_weights` changes the config.
        cfg = copy.deepcopy(config) if isinstance(config, Config) and checked else configs.resolve(
            config if isinstance(config, Config) else configs.read(config, cfg_options))
        for name, adapter in (adapters or {}).items():
            add_adapter(cfg, name, adapter if isinstance(adapter, Mapping) else {'weights': adapter})
        if not checked:
            check(cfg)
        set_limits(cfg.get('limits') or {})
        if not (cfg.get('model') or {}).get('sampler'):
            raise UserError('The config has no `model.sampler`, which makes the images; add one, as '
                            'configs/_base_/samplers/euler.py.')
        path = apply_weights(cfg, use_exported(cfg, weights))
        use_caption_chunks(cfg, path)
        self.cfg = cfg
        self.defaults, options = split_infer_cfg(cfg)
        self.device = _device(device)
        speed = Speed.of(cfg.get('speed'), cfg.model)
        speed.check(self.device, cfg.model, training=False, offload=bool(options.get('offload')))
        seed = int((cfg.get('randomness') or {}).get('seed') or 0)
        self.model: SDXL = MODELS.build({'seed': seed, **cfg.model, 'objective': None}).eval()
        if path is not None:
            load_trained(self.model, str(path))
        self.refiner: SDXL | None = None
        if cfg.get('refiner') is not None:
            self.refiner = self._build_refiner(seed)
        for model in self.models:
            model.requires_grad_(False)
            if (dtype := model.unet_weight.dtype).itemsize < 4:  # what trained in fp32 makes images as an export does
                for adapter in model.adapters.values():
                    adapter.to_compute_dtype(dtype)
            # As diffusers' enable_vae_tiling, for encoding too.
            model.vae.use_tiling = bool(options.get('vae_tiling'))
            model.vae.use_slicing = bool(options.get('vae_slicing'))
        self.offload_hook: SequentialOffloadHook | None = None
        if options.get('offload'):
            from diffengine_sdxl.inference.offload import offload_models
            self.offload_hook = offload_models(self.models, self.device)
        else:
            for model in self.models:
                model.to(self.device)
        #: What the config's `speed` became.
        self.speed = speed.resolve(self.device.type, self.model.unet_weight.dtype)
        for model in self.models:
            apply_speed(model, self.speed)

    def __getattr__(self, name: str) -> Any:
        """Answer what diffusers' pipelines have and this class does not."""
        raise AttributeError(f"SDXLInferencer has no '{name}'.{method_hint(name)}")

    def _build_refiner(self, seed: int) -> SDXL:
        refiner: SDXL = MODELS.build({'seed': seed, **self.cfg.refiner, 'base_model': self.model}).eval()
        if refiner.sampler is None:  # the base's, without its part of the steps
            refiner.sampler = copy.copy(self.model.sampler)
            vars(refiner.sampler).update(dict.fromkeys(('strength', 'denoising_start', 'denoising_end')))
        return refiner

    def load_adapter(self, name: str, source: str | Path) -> None:
        """Give an adapter other weights of the same shapes, in place: what is compiled or captured stays.

        Args:
            source: a folder or file of its kind, also one that it was not built with.

        Raises:
            UserError: there is no such adapter; or they do not fit: for a LoRA its layers, ranks and alpha / rank.
        """
        load_adapter(self.model, self.cfg, name, source)

    @property
    def models(self) -> list[SDXL]:
        """The base and, if there is one, the refiner."""
        return [self.model] if self.refiner is None else [self.model, self.refiner]

    def __call__(self, prompt: str | Sequence[str] | None = None, *, output_type: str = 'pil', batch_size: int = 1,
                 on_step: Callable[[int, int], None] | None = None, generator: Any = None, **settings: Any) -> Any:
        """Generate images of one prompt, or of several.

        If `prompt` is a list, every other setting may be a list of the same length, one entry per prompt; so may the
        values of `conditions`. `image`, `mask_image` and `latents` may have one entry per image.

        Args:
            prompt, settings: see `request.Request`, which lists all.
            output_type: 'pil', a list of PIL images; 'pt', a tensor [N, 3, H, W] in [0, 1]; 'np', an array
                [N, H, W, 3] in [0, 1]; or 'latent', [N, 4, h, w].
            batch_size: images per batch; above 1 the last bits may differ.
            on_step: called with (steps done, total steps) of each stage.
            generator: a fresh torch.Generator in place of `seed`; for several images a list, one per image.

        Returns:
            num_images_per_prompt images for each prompt, in order.

        Raises:
            UserError: a setting is unknown, invalid, or does not suit the model.
        """
        one_of('output_type', output_type, OUTPUT_TYPES)
        call = {key: value for key, value in {'prompt': prompt, **settings}.items() if value is not None}
        seeds = seeds_of(generator, call)
        requests = [self.request(one) for one in split_prompts(call)]
        singles = [request.with_seed(k) for request in requests for k in range(request.num_images_per_prompt)]
        if seeds is not None:
            if len(seeds) != len(singles):
                raise UserError(f'There are {len(seeds)} generator(s) for {len(singles)} images; give one per image.')
            singles = [replace(request, seed=seed) for request, seed in zip(singles, seeds, strict=True)]
        outputs: list[Any] = [None] * len(singles)
        with self.cached_inputs():
            if output_type != 'pil':
                self._check_one_tensor(output_type, singles)
            for job in self.preprocess(singles, batch_size):
                for index, tensor in zip(job.indices, self.forward(job, output_type == 'latent', on_step), strict=True):
                    outputs[index] = tensor
        return self.postprocess(outputs, output_type)

    def _check_one_tensor(self, output_type: str, requests: Sequence[Request]) -> None:
        if any(request.padding_mask_crop is not None for request in requests):
            raise UserError(f"output_type='{output_type}' does not go with padding_mask_crop, which pastes crops into "
                            "8-bit images; use 'pil'.")
        if len(sizes := {size_of(self.model, request) for request in requests}) > 1:
            raise UserError(f"output_type='{output_type}' is one tensor, but the sizes differ "
                            f"({', '.join(f'{height} x {width}' for height, width in sorted(sizes))}); use 'pil', or "
                            'one call per size.')

    @contextmanager
    def cached_inputs(self) -> Iterator[None]:
        """Inside, encode equal prompts once and fetch each URL once; the weights must not change."""
        with ExitStack() as stack:
            stack.enter_context(cached_urls())
            for model in self.models:
                stack.enter_context(model.cached_prompts())
            yield

    @torch.no_grad()
    def prompt_embeds(self, prompt: str, **settings: Any) -> dict[str, Tensor]:
        """Embed a prompt for a pipeline of `model.to_diffusers()`, which itself reads 77 tokens and no weights.

        Args:
            prompt, settings: of `request.Request`; those of texts are read.

        Returns:
            prompt_embeds, negative_prompt_embeds [1, S, D], pooled_prompt_embeds, negative_pooled_prompt_embeds [1, P].

        Raises:
            UserError: a setting is unknown, or the syntax of a prompt is wrong.
        """
        request = self.request({'prompt': prompt, **settings})
        batch = request_batch(self.model, [request], size_of(self.model, request))
        embeds = {}
        for prefix, branch in (('', 'cond'), ('negative_', 'uncond')):
            embeds[f'{prefix}prompt_embeds'], embeds[f'{prefix}pooled_prompt_embeds'], _ = encode_text(
                self.model, batch, branch)
        return embeds

    def request(self, settings: Mapping[str, Any]) -> Request:
        """Return the request of `settings` on top of the config's `infer_cfg`."""
        return Request.of(self.defaults, settings)

    def preprocess(self, inputs: Sequence[Request], batch_size: int = 1) -> Iterator[Job]:
        """Yield jobs of at most `batch_size` images of one size and kind, in the order of the requests.

        Args:
            inputs: requests of one image each.

        Raises:
            UserError: see `request_batch`; an adapter lacks its image; a size is not divisible.
        """
        if batch_size != 1:
            batch_size = whole_number('batch_size', batch_size, 1)
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(inputs):
            request.check_texts()
            key = index if batch_size == 1 else _batch_key(self.model, self.refiner, request)
            groups.setdefault(key, []).append(index)
        for indices in groups.values():
            for begin in range(0, len(indices), batch_size):
                batch = indices[begin:begin + batch_size]
                yield self._job(batch, [inputs[i] for i in batch])

    def _job(self, indices: list[int], requests: Sequence[Request]) -> Job:
        first = requests[0]
        size = size_of(self.model, first)
        check_size(size, self.model.size_divisor)
        batch = request_batch(self.model, requests, size)
        self._check_conditions(first)
        self._check_scores(requests)
        sampler = self.model.sampler.changed(**_sampler_settings(first))
        second = None
        if self.refiner is not None:
            check_size(size, self.refiner.size_divisor)
            refining = [request.for_refiner() for request in requests]
            second = Stage(self.refiner, request_batch(self.refiner, refining, size, continues=True),
                           stages.refiner_sampler(self.refiner.sampler, sampler, _sampler_settings(refining[0])))
        elif first.refiner:
            raise UserError('`refiner` holds settings of a refiner, but the config has no `refiner`.')
        crops = [None if request.padding_mask_crop is None else crop_of(request, size) for request in requests]
        return Job(indices, Stage(self.model, batch, sampler), second, first.scales, first.active_ranges, crops)

    def _check_conditions(self, request: Request) -> None:
        adapters = self.model.adapters
        present = {adapters[name].condition_key for name in request.conditions if name in adapters}
        for name, adapter in adapters.items():
            if adapter.condition_key is not None and adapter.condition_key not in present:
                raise UserError(f"Adapter '{name}' ({adapter.kind}) needs an image: give it in `conditions` "
                                f'(--condition {name}=FILE), or remove the adapter (model.adapters.{name}=None).')

    def _check_scores(self, requests: Sequence[Request]) -> None:
        if any(model.is_refiner for model in self.models):
            return
        for name in SCORES:
            for request in requests:
                for value in (getattr(request, name), request.refiner.get(name)):
                    if value is not None:
                        raise UserError(f'{name}={value} is a setting of a refiner (a UNet of 5 time ids), and the '
                                        'config has none; leave it out.')

    def forward(self, inputs: Job, latent: bool = False,
                on_step: Callable[[int, int], None] | None = None) -> Tensor | list[Tensor]:
        """Return the images [B, 3, H, W] in [0, 1], or latents [B, 4, h, w], of a job; with `padding_mask_crop` a list
        of B whole images of their own sizes.

        Raises:
            UserError: see Sampler; or an adapter rejects its scale or range.
        """
        first, second = inputs.first, inputs.second
        try:
            with adapter_settings(self.model, inputs.scales, inputs.active_ranges):
                latents: Tensor = first.sampler(first.model, first.batch, on_step) if second is None else stages.run(
                    first, second, on_step)
            if latent:
                return latents
            images: Tensor = (second or first).model.decode(latents)
            if not any(inputs.crops):
                return images
            return [image if crop is None else crop.put_back(image)
                    for image, crop in zip(images, inputs.crops, strict=True)]
        finally:
            if self.offload_hook is not None:
                self.offload_hook.release()

    def postprocess(self, preds: Sequence[Tensor], output_type: str = 'pil') -> Any:
        """Return images or latents in the form of `output_type`."""
        if output_type == 'pil':
            return [to_pil(image.float().cpu().numpy()) for image in preds]
        tensor = torch.stack(list(preds))
        return tensor.permute(0, 2, 3, 1).float().cpu().numpy() if output_type == 'np' else tensor

    def visualize(self, inputs: Sequence[Request], preds: Sequence[Image.Image]) -> Image.Image:
        """Return a labelled grid of images, one row per prompt."""
        rows: dict[str, list[Image.Image | None]] = {}
        for request, image in zip(inputs, preds, strict=True):
            rows.setdefault(request.prompt, []).append(image)
        width = max(len(row) for row in rows.values())
        filled = [(prompt, [*row, *[None] * (width - len(row))]) for prompt, row in rows.items()]
        return labelled_grid(filled, [str(i + 1) for i in range(width)])


def split_infer_cfg(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the defaults of requests, and the OPTIONS, of a resolved config's `infer_cfg`.

    Settings of adapters that the config removes (their value is None) are left out.
    """
    plain = config.to_dict()
    settings = {k: v for k, v in (plain.get('infer_cfg') or {}).items() if v is not None}
    removed = {name for name, adapter in ((plain.get('model') or {}).get('adapters') or {}).items() if adapter is None}
    for key in {'conditions', 'scales', 'active_ranges'} & settings.keys():
        settings[key] = {name: value for name, value in settings[key].items() if name not in removed}
    options = {key: settings.pop(key) for key in OPTIONS if key in settings}
    return settings, options


def _device(name: str | torch.device | None) -> torch.device:
    """Return the device of that name; None for the best available.

    Raises:
        UserError: it is unknown or not available.
    """
    if name is None:
        from mmengine.device import get_device
        name = get_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device='{name}' cannot be used here: {first_line(error)}") from error
    return device


def _batch_key(model: SDXL, refiner: SDXL | None, request: Request) -> str:
    """Return what must be equal in images of one batch."""
    chunks = [num_chunks(model, request), *([] if refiner is None else [num_chunks(refiner, request.for_refiner())])]
    conditions = {name: value if isinstance(value, Mapping) else {'image': value}
                  for name, value in request.conditions.items()}
    counts = {name: [_count(value.get(part)) for part in ('image', 'mask')] for name, value in conditions.items()}
    image = request.image
    kind = (image.device, tuple(image.shape[-3:])) if isinstance(image, Tensor) else image is not None
    return repr((size_of(model, request), _sampler_settings(request), request.scales,
                 request.active_ranges, counts, kind, request.mask_image is not None, request.latents is not None,
                 [getattr(request, name) is None for name in vars(request) if name.startswith('negative_')],
                 request.prompt_syntax, request.clip_skip, request.refiner.get('clip_skip'), chunks,
                 {k: v for k, v in request.refiner.items() if k in OF_SAMPLER},
                 [request.refiner.get(name) is None for name in ('negative_prompt', 'negative_prompt_2')]))


def _sampler_settings(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in OF_SAMPLER}


def _count(images: Any) -> int:
    return len(images) if isinstance(images, list | tuple) else int(images is not None)
