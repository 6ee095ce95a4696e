"""Shared by the tests of SDXLInferencer and tools/infer.py: small images, configs of the tiny base, calls of the stock
pipelines, and the command in an empty folder."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from mmengine.config import Config
from parity import SOLVERS, generators, load_adapters, stock, stock_like
from PIL import Image

from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.testing import draw_circle

SIZE = dict(height=48, width=64)
PROMPT = 'a red circle'
BASE, TO_IMAGE = 'StableDiffusionXLPipeline', 'StableDiffusionXLImg2ImgPipeline'
INPAINT = 'StableDiffusionXLInpaintPipeline'
NOISE = torch.randn((1, 4, 6, 8), generator=torch.Generator().manual_seed(2))
#: Files of an image folder that are not images of prompts.
MADE = ('index.html', 'grid.png')


def picture(index: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return an image of a circle, of width x height."""
    return draw_circle(index)[0].resize(size)


def mask(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return a mask: white in the lower half, and gray in a part that counts as black."""
    image = Image.new('L', size, 0)
    image.paste(100, (0, 0, size[0] // 2, size[1] // 4))
    image.paste(255, (0, size[1] // 2, *size))
    return image


def config(base: Path, adapters: dict[str, Any] | None = None, solver: str = 'ancestral', steps: int = 3,
           **sections: Any) -> Config:
    """Return a config of the tiny base, with noise in every step."""
    sampler = dict(type='Sampler', scheduler=SOLVERS[solver], num_inference_steps=steps)
    return Config(dict(model=dict(type='SDXL', pretrained=str(base), adapters=adapters or {}, sampler=sampler),
                       **sections))


def asked(pipeline: Any, seed: int = 5, steps: int = 3, output_type: str = 'pt', **call: Any) -> Any:
    """Return an image of a stock pipeline, at our guidance scale (inpainting's default is 7.5)."""
    return pipeline(num_inference_steps=steps, generator=generators([seed])[0], output_type=output_type,
                    **dict(guidance_scale=5.0) | call).images


@dataclass
class Conditioned:
    """Our inferencer with an adapter, and the stock pipeline with the same adapter from its files."""

    ours: SDXLInferencer
    stocks: Callable[..., Any]


def conditioned(kind: str, base: Path, folder: Path, pipelines: dict[str, Any], **settings: Any) -> Conditioned:
    """Save an adapter `a` of `kind` that looks trained, and load it in both."""
    from diffusers import ControlNetModel, T2IAdapter
    case = CASES[kind]
    model = shaken(build(base, dict(a=case.config)), case)
    model.adapters['a'].save(folder / 'a')
    encoder = base.parent / 'image_encoder'
    named = dict(image_encoder=str(encoder), image_encoder_subfolder=None) if 'ip_adapter' in kind else {}
    adapter = {**case.config, **named, 'weights': str(folder / 'a'), 'trainable': False, **settings}
    ours = SDXLInferencer(config(base, dict(a=adapter)), device='cpu')
    if 'ip_adapter' in kind:
        pipeline = stock(base)
        load_adapters(pipeline, ours.model, folder)
        return Conditioned(ours, stock_like(pipeline, BASE, SOLVERS['ancestral'],
                                            **seeing(encoder)))
    cls, part, net = {'t2i_adapter': ('StableDiffusionXLAdapterPipeline', 'adapter', T2IAdapter),
                      'controlnet': ('StableDiffusionXLControlNetPipeline', 'controlnet', ControlNetModel)}[kind]
    loaded = net.from_pretrained(folder / 'a').requires_grad_(False)
    return Conditioned(ours, stock_like(pipelines[BASE], cls, SOLVERS['ancestral'], **{part: loaded}))


def seeing(encoder: Path) -> dict[str, Any]:
    """Return a stock pipeline's image encoder and processor, with PIL's filters: torchvision's give other pixels."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    return dict(image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder).requires_grad_(False),
                feature_extractor=CLIPImageProcessorPil.from_pretrained(encoder))


@dataclass
class Refined:
    """A base and its refiner: our inferencer, and the stock pipelines of two tasks."""

    ours: SDXLInferencer
    refiners: dict[str, Any]


class Here:
    """The infer command in an empty folder, with configs of the tiny base: two steps with noise in each."""

    def __init__(self, main: Callable[[], int], files: Path, capsys: pytest.CaptureFixture[str],
                 monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.files, self.capsys, self.patch = main, files, capsys, monkeypatch
        self.said = self.told = ''

    def infer(self, *words: Any, code: int = 0) -> None:
        """Run the command on the CPU; `said` is its output, `told` its errors."""
        self.capsys.readouterr()
        self.patch.setattr(sys, 'argv', ['infer.py', *map(str, words), '--device', 'cpu'])
        found = self.main()
        self.said, err = self.capsys.readouterr()
        self.told = '\n'.join(line for line in err.splitlines() if line.startswith('error: '))
        assert found == code and 'Traceback' not in err, (found, self.said, err)
        assert bool(self.told) == (code != 0)

    def config(self, name: str = 'c.py', **sections: Any) -> Path:
        """Write a config of the tiny base; `sections` may hold `adapters`, `sampler` and `refiner`."""
        sampler = dict(type='Sampler', scheduler=dict(type='EulerAncestralDiscreteScheduler'), num_inference_steps=2)
        model = dict(type='SDXL', pretrained=str(self.files / 'base'), adapters=sections.pop('adapters', {}),
                     sampler=sections.pop('sampler', sampler))
        path = Path(name)
        Config(dict(model=model, infer_cfg=dict(prompt='a frog', height=48, width=64), **sections)).dump(path)
        return path


def pictures(folder: str | Path) -> dict[str, bytes]:
    """Return the pixels of a folder's images, by name."""
    return {p.name: Image.open(p).convert('RGB').tobytes() for p in sorted(Path(folder).glob('*.png'))
            if p.name not in MADE}


def stamps(folder: str | Path) -> dict[str, tuple[int, bytes]]:
    """Return time and bytes of each image file."""
    return {name: ((Path(folder) / name).stat().st_mtime_ns, (Path(folder) / name).read_bytes())
            for name in pictures(folder)}


def by_hand(config: Path, *calls: dict[str, Any], weights: str | None = None) -> list[bytes]:
    """Return the pixels of the same images, made by SDXLInferencer."""
    ours = SDXLInferencer(str(config), weights, 'cpu')
    return [image.tobytes() for call in calls for image in ours(**call)]


def adapters(files: Path, *names: str) -> dict[str, Any]:
    """Return configs of the adapters in `files`."""
    look = dict(image_encoder=str(files / 'image_encoder'), image_encoder_subfolder=None, condition_key='look')
    known: dict[str, Any] = dict(style=dict(type='LoRA'), depth=dict(type='T2IAdapter', condition_key='depth'),
                                 look=dict(type='IPAdapter', **look))
    return {name: dict(known[name], weights=str(files / name), trainable=False) for name in names}
