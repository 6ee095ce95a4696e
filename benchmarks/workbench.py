"""What the benchmarks share: a base of random weights that is built once, data, and runners that train on them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl import config, testing
from diffengine_sdxl.datasets import Draw
from diffengine_sdxl.datasets.base import MapDataset, Sample, Transforms
from diffengine_sdxl.loading import base as loading
from diffengine_sdxl.models.sdxl import PRECISIONS, SDXL
from diffengine_sdxl.registry import DATASETS, RUNNERS

#: Kind of adapter -> the shipped config that trains it.
CONFIGS = {'t2i': 'stable_diffusion_xl_t2i_adapter_fill50k', 'lora': 'stable_diffusion_xl_lora_text_to_image',
           'ip': 'stable_diffusion_xl_ip_adapter_plus', 'controlnet': 'stable_diffusion_xl_controlnet_fill50k'}
#: Rows of the data.
NUM_ROWS = 16
#: Drops of the shipped IP-Adapter config.
DROPS = dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.05, both=0.05)


@DATASETS.register_module()
class HeldRows(MapDataset):
    """Rows whose latents and embeddings were made before, in a file that `Workbench.cache` writes."""

    def __init__(self, source: str, transforms: Transforms = ()) -> None:
        super().__init__(transforms)
        self.source, self.file = source, None  # type: str, Any

    def __len__(self) -> int:
        return NUM_ROWS

    def key(self, index: int) -> str:
        return str(index)

    def load(self, index: int, draw: Draw) -> Sample:
        if self.file is None:  # in the worker: an open file cannot be pickled
            self.file = safe_open(self.source, 'pt')
        tensors = {name: self.file.get_slice(name)[index] for name in list(self.file.keys())}
        return {'text': f'circle {index}', **tensors}


class Workbench:
    """SDXL with random weights on a device, at 1024 px; or a tiny SDXL at 64 px.

    Args:
        folder: for data, weights and work_dirs.
        device: where the base lives.
        tiny: the tiny SDXL.
        precision: `mixed_precision` of what is built here.
    """

    def __init__(self, folder: str | Path, device: str | torch.device, tiny: bool = False,
                 precision: str = 'bf16', resolution: int | None = None, **sizes: Any) -> None:
        self.folder, self.device, self.tiny = Path(folder), torch.device(device), tiny
        self.precision, self.resolution = precision, resolution or (64 if tiny else 1024)
        self._parts: dict[str, Any] | None = None
        self._num_runs = 0
        self.source = str(testing.write_tiny_sdxl(self.folder / 'base', **sizes)) if tiny else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights."""
        return PRECISIONS[self.precision] or torch.float32

    @property
    def parts(self) -> dict[str, Any]:
        """The base's components, built when they are first asked for, on the device itself."""
        if self._parts is None:
            dtypes = {name: torch.float32 if name == 'vae' else self.dtype for name in loading.MODULES}
            # Drawing 2.6 billion weights on a CPU takes 40 s.
            with torch.device('cpu' if self.tiny else self.device):
                self._parts = loading.load_components(self.source, None, None, None, dtypes, 0)
            for name in loading.MODULES:
                self._parts[name].to(self.device).eval().requires_grad_(False)
        return self._parts

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Give every SDXL that is built inside the components of this base."""
        parts = self.parts

        def load(*args: Any, **kwargs: Any) -> dict[str, Any]:
            dtypes = kwargs.get('dtypes') or next(a for a in args if isinstance(a, Mapping))
            for name, dtype in dtypes.items():
                parts[name].to(dtype)
            return dict(parts)

        with mock.patch.object(loading, 'load_components', load):
            yield

    def restore(self, model: SDXL) -> None:
        """Take a model's adapters, compiled blocks, layout and checkpointing from the base, for the next model."""
        for adapter in reversed(list(model.adapters.values())):
            adapter.detach(model)
        for part in (model.unet, model.vae, model.text_encoder, model.text_encoder_2):
            part.requires_grad_(False).eval()
        model.unet.to(memory_format=torch.contiguous_format).disable_gradient_checkpointing()
        compiled = [module for module in model.unet.modules() if module._compiled_call_impl is not None]
        for module in compiled:
            module._compiled_call_impl = None
        if compiled:
            torch._dynamo.reset()
        self.free()

    @staticmethod
    def fell_back(model: SDXL) -> bool:
        """Return whether blocks could not be compiled, or no graph be captured: then a row is of plain calls."""
        calls = [module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None]
        return any(call.func.__self__.failed for call in calls) or getattr(model.unet_graphs, 'failed', False)

    def forget(self) -> None:
        """Drop the base: a failure may have left something in it."""
        self._parts = None
        self.free()

    def free(self) -> None:
        """Give memory back to the device."""
        if self.device.type == 'cuda':
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sample(self, num: int) -> dict[str, Tensor]:
        """Return the inputs of `num` samples on the CPU, as a cache holds them."""
        unet, encoder, size = self.parts['unet'].config, self.parts['text_encoder_2'].config, self.resolution
        generator, factor = torch.Generator().manual_seed(0), self.vae_factor

        def normal(*shape: int) -> Tensor:
            return torch.randn(num, *shape, generator=generator)
        return {
            'latents': normal(4, size // factor, size // factor),
            'time_ids': torch.tensor([[size, size, 0, 0, size, size]] * num, dtype=torch.float32),
            'text_embeds': normal(77, unet.cross_attention_dim).to(self.dtype),
            'pooled': normal(encoder.projection_dim).to(self.dtype),
            'conditioning_image': torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8),
            'reference_embeds': normal(1, *((17, 32) if self.tiny else (257, 1280))).to(self.dtype)}

    @property
    def vae_factor(self) -> int:
        """Pixels of a latent."""
        return int(2 ** (len(self.parts['vae'].config.block_out_channels) - 1))

    def cache(self, kind: str) -> Path:
        """Write what a cache holds of the rows, without encoding anything; return the folder."""
        folder = self.folder / f'cache_{kind}'
        if not folder.exists():
            folder.mkdir()
            own = {'t2i': 'conditioning_image', 'controlnet': 'conditioning_image', 'ip': 'reference_embeds'}.get(kind)
            names = ['latents', 'time_ids', 'text_embeds', 'pooled', *([own] if own else [])]
            rows = self.sample(NUM_ROWS)
            save_file({name: rows[name] for name in names}, folder / '0.safetensors')
        return folder

    def images(self) -> Path:
        """Write drawn images with their outlines; return the folder."""
        folder = self.folder / 'images'
        return folder if folder.exists() else testing.write_circles(folder, NUM_ROWS, self.resolution)

    def image_encoder(self) -> Path:
        """Write an image encoder of CLIP ViT-H's size, or a tiny one, with random weights; return the folder."""
        folder = self.folder / 'image_encoder'
        if not folder.exists() and self.tiny:
            testing.write_tiny_image_encoder(folder)
        elif not folder.exists():
            from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection
            settings = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14,
                                        num_attention_heads=16, image_size=224, projection_dim=1024, hidden_act='gelu')
            with torch.device(self.device):
                CLIPVisionModelWithProjection(settings).to(self.dtype).save_pretrained(str(folder))
            CLIPImageProcessorPil().save_pretrained(str(folder))
        return folder

    def config(self, kind: str, batch_size: int, max_iters: int, cached: bool = True, compile: str = 'off',
               work_dir: str | Path | None = None, **overrides: Any) -> Any:
        """Return the shipped config of a kind on this base and data, without images and checkpoints on the way.

        Args:
            cached: latents and text from a cache; else images from files, which the VAE and the text encoders read.
            compile: of the key `speed`.
            overrides: further ones, with '__' for each dot.
        """
        options = {
            'model.pretrained': self.source, 'model.vae': None, 'mixed_precision': self.precision,
            'resolution': self.resolution, 'train_cfg.max_iters': max_iters, 'train_dataloader.batch_size': batch_size,
            'train_dataloader.num_workers': 0 if self.tiny else 4, 'optim_wrapper.accumulative_counts': 1,
            'train_dataloader.dataset.source': str(self.images()) if not cached else 'data', 'log_level': 'ERROR',
            'default_hooks.samples': None, 'default_hooks.checkpoint': None, 'speed.compile': compile,
            'speed.checkpointing': 'off', 'randomness.seed': 0,
            **{key.replace('__', '.'): value for key, value in overrides.items()}}
        if kind == 'ip':
            options |= {'model.adapters.ip.image_encoder': str(self.image_encoder()),
                        'model.adapters.ip.image_encoder_subfolder': None}
        if kind == 'controlnet':
            options['model.gradient_checkpointing'] = False
        cfg = config.load(CONFIGS[kind], options)
        if cached:
            cfg.train_dataloader.dataset = dict(type='HeldRows', source=str(self.cache(kind) / '0.safetensors'),
                                                transforms=[DROPS] if kind == 'ip' else [])
        if self.tiny:  # without what a short run spends most of its time on
            cfg.visualizer = dict(type='Visualizer', vis_backends=[])
            cfg.default_hooks.curves = None
        self._num_runs += 1
        cfg.work_dir = str(work_dir or self.folder / f'run{self._num_runs}')
        return cfg

    @contextmanager
    def runner(self, cfg: Any, hooks: Sequence[Any] = ()) -> Iterator[Any]:
        """Build the runner of a config, with further hooks; afterwards the base is as before."""
        try:
            with self.installed():
                runner = RUNNERS.build(cfg)
        except BaseException:
            self.forget()
            raise
        try:
            for hook in hooks:
                runner.register_hook(hook)
            yield runner
        finally:
            self.restore(runner.bare_model)
