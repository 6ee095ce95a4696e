"""Tiny local files in place of the hub ids, links and images of a config, which then makes an image offline.

`StandIns(folder).overrides(config)` are the overrides of a config; `make_image` makes its image.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from PIL import Image, ImageDraw

from diffengine_sdxl import config as configs
from diffengine_sdxl import rng
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.loading.single_file import is_single_file
from diffengine_sdxl.testing import single_file
from diffengine_sdxl.testing.adapters import LOCATION, write_tiny_adapter
from diffengine_sdxl.testing.circles import draw_circle
from diffengine_sdxl.testing.models import write_tiny_image_encoder, write_tiny_refiner, write_tiny_sdxl

WEIGHTS = 'diffusion_pytorch_model.safetensors'
#: What a LoRA of a file may have besides the attention of the UNet, as many published ones.
LORA = {'rank': 4, 'alpha': 8, 'parts': ['unet', 'text_encoder', 'text_encoder_2'],
        'targets': ['to_q', 'conv1', 'ff.net.0.proj', 'q_proj', 'fc1']}


class StandIns:
    """Weights and images of the kinds that a config names, written into `folder` when they are first needed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()

    def base(self, source: str) -> Path:
        """Return the folder that stands for a base: by its name a refiner, one that inpaints, or SDXL base."""
        name = next((kind for kind in ('refiner', 'inpaint') if kind in source.lower()), 'base')
        folder = self.folder / name
        if not folder.exists() and name == 'refiner':
            write_tiny_refiner(folder)
        elif not folder.exists():
            write_tiny_sdxl(folder, in_channels=9 if name == 'inpaint' else 4)
        return folder

    def base_file(self, source: str) -> Path:
        """Return the single file that stands for that of a base."""
        folder = self.base(source)
        path = folder.with_suffix('.safetensors')
        if not path.exists():
            single_file.write(path, single_file.original_tensors(folder))
        return path

    def unet(self, source: str) -> Path:
        """Return the folder that stands for a UNet of its own: an LCM by its name, which reads its guidance scale."""
        is_lcm = 'lcm' in source.lower()
        folder = self.folder / ('lcm' if is_lcm else 'distilled')
        if not folder.exists():
            write_tiny_sdxl(folder, seed=2, time_cond_proj_dim=16 if is_lcm else None)
        return folder / 'unet'

    def image_encoder(self) -> Path:
        """Return the folder of the image encoder."""
        folder = self.folder / 'image_encoder'
        return folder if folder.exists() else write_tiny_image_encoder(folder)

    def adapter(self, config: Mapping[str, Any]) -> Path:
        """Return the folder that stands for the weights of an adapter's config."""
        own = {key: value for key, value in config.items() if key not in ('scale', 'trainable')}
        if own['type'] == 'LoRA' and own.get('weights') and 'active_range' not in own:
            own = {**LORA, **own}
        if own['type'] == 'IPAdapter':
            own |= {'image_encoder': str(self.image_encoder()), 'image_encoder_subfolder': None}
        folder = self.folder / f'{own["type"]}-{rng.key_seed(repr(sorted(own.items()))):x}'
        return folder if folder.exists() else write_tiny_adapter(folder, self.base(''), own)

    def image(self, source: str, kind: str = 'image') -> str:
        """Return the file that stands for an image: an 'image' of a circle, its 'outline', or a 'mask'."""
        name = re.sub(r'\W+', '-', source.rpartition('/')[2])
        path = self.folder / 'images' / f'{name}.png'
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image, outline, _ = draw_circle(rng.key_seed(name))
            if kind == 'mask':
                image = Image.new('L', image.size)
                ImageDraw.Draw(image).rectangle((16, 16, 63, 63), fill=255)
            (outline if kind == 'outline' else image).save(path)
        return str(path)

    def overrides(self, config: Config) -> dict[str, Any]:
        """Return what makes a resolved config one of tiny weights, small images and few steps."""
        plain = config.to_dict()
        changed: dict[str, Any] = {}
        for part in ('model', 'refiner'):
            if plain.get(part):
                changed |= {f'{part}.{key}': value for key, value in self._model(plain[part]).items()}
        own = plain.get('infer_cfg') or {}
        changed |= {f'infer_cfg.{key}': value for key, value in self._settings(own).items()}
        for name, value in (own.get('conditions') or {}).items():
            adapter = (plain['model'].get('adapters') or {}).get(name)
            if adapter:
                changed[f'infer_cfg.conditions.{name}'] = self._images(value, condition_kind(adapter))
        return changed

    def _model(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return the changes of an SDXL's config; what a config leaves out keeps its default."""
        source = str(model.get('pretrained') or '')
        changed: dict[str, Any] = {'pretrained': str(self.base(source)), 'mixed_precision': 'no', 'attention': 'sdpa'}
        changed |= {key: None for key in ('vae', 'tokenizer', 'revision', 'variant', 'dtype') if key in model}
        if is_single_file(source):
            changed |= {'pretrained': str(self.base_file(source)), 'config': str(self.base(source))}
        if unet := model.get('unet'):
            changed['unet'] = str(self.unet(unet))
            if is_single_file(unet):
                changed |= {'unet': str(self.unet(unet) / WEIGHTS), 'config': str(self.base(source))}
        if (model.get('sampler') or {}).get('num_inference_steps'):
            changed['sampler.num_inference_steps'] = few(model['sampler']['num_inference_steps'])
        for name, adapter in (model.get('adapters') or {}).items():
            if adapter:
                changed |= {f'adapters.{name}.{key}': value for key, value in self._adapter(adapter).items()}
        return changed

    def _adapter(self, adapter: Mapping[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {key: None for key in LOCATION if key in adapter}
        changed['weights'] = str(self.adapter(adapter))
        if adapter['type'] == 'IPAdapter':
            changed |= {'image_encoder': str(self.image_encoder()), 'image_encoder_subfolder': None}
        return changed

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the changes of a request's settings, and of those of its refiner."""
        changed: dict[str, Any] = {key: small(settings[key]) for key in ('height', 'width') if settings.get(key)}
        changed |= {key: self._images(settings[key], kind) for key, kind in (('image', 'image'), ('mask_image', 'mask'))
                    if settings.get(key)}
        if settings.get('num_inference_steps'):
            changed['num_inference_steps'] = few(settings['num_inference_steps'])
        if settings.get('refiner'):
            changed |= {f'refiner.{key}': value for key, value in self._settings(settings['refiner']).items()}
        return changed

    def _images(self, value: Any, kind: str) -> Any:
        """Return a setting with stand-ins for its images: one, a list, or a dict of `image` and `mask`."""
        if isinstance(value, Mapping):
            return {key: self._images(part, 'mask' if key == 'mask' else kind) for key, part in value.items()}
        return [self._images(part, kind) for part in value] if isinstance(value, list) else self.image(value, kind)


def few(num_steps: int) -> int:
    """Return fewer steps, in proportion."""
    return num_steps if num_steps <= 10 else num_steps // 5


def small(side: int) -> int:
    """Return the side of an image of the tiny base, in pixels, in place of SDXL's."""
    return side // 16 if side <= 1024 else side // 32


def condition_kind(adapter: Mapping[str, Any]) -> str:
    """Return the kind of image that an adapter takes, as `StandIns.image` names it."""
    return 'image' if adapter['type'] == 'IPAdapter' else 'outline'


def make_image(name: str | Path, stand_ins: StandIns) -> Image.Image:
    """Make the image of a config on tiny weights; a prompt and conditions that it lacks, such as one that trains, are
    filled in.

    Raises:
        UserError: the config cannot be read, or makes no images.
    """
    config = configs.resolve(configs.load(name))
    inferencer = SDXLInferencer(configs.load(name, stand_ins.overrides(config)), device='cpu')
    missing: dict[str, Any] = {} if 'prompt' in inferencer.defaults else {'prompt': 'a circle'}
    given = inferencer.defaults.get('conditions') or {}
    missing['conditions'] = given | {
        key: stand_ins.image(key, condition_kind(config.model.adapters[key]))
        for key, adapter in inferencer.model.adapters.items() if adapter.condition_key and key not in given}
    image: Image.Image = inferencer(**missing)[0]
    return image
