"""The configs of configs/infer: each has its guide's settings, and makes bitwise the image of the guide's pipelines."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from parity import images, stock
from torch import Tensor

from diffengine_sdxl import config
from diffengine_sdxl.config_files import installed_configs
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.request import Request
from diffengine_sdxl.testing.stand_ins import StandIns, few, small

TEXT, IMAGE, INPAINT = (f'StableDiffusionXL{kind}Pipeline' for kind in ('', 'Img2Img', 'Inpaint'))
T2I, PAG = 'StableDiffusionXLAdapterPipeline', 'StableDiffusionXLPAGPipeline'
BASE, REFINER = (f'stabilityai/stable-diffusion-xl-{kind}-1.0' for kind in ('base', 'refiner'))
HUB = 'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers'
BENCH = ('https://raw.githubusercontent.com/CompVis/latent-diffusion/main/data/inpainting_examples/'
         'overture-creations-5sI6fQgYIuo')
REFINE = 'https://refine.rs/guides/adapting_sdxl'
ASTRONAUT = 'Astronaut in a jungle, cold color palette, muted colors, detailed, 8k'
DDIM = dict(type='DDIMScheduler', timestep_spacing='leading', steps_offset=1, clip_sample=False, set_alpha_to_one=False)


@dataclass(frozen=True)
class Guide:
    """What a guide, or a model's card, does.

    Attributes:
        call: what it passes to the pipeline `cls`; what it leaves out has the default of the installed diffusers.
        then: what it passes to the refiner's pipeline, of the same task; None for no refiner.
        solver: the scheduler that it sets; adapters: name -> file and scale.
        sag: scale of self-attention guidance.
        base, refiner, unet: where these come from; None for the base's own UNet.
    """

    call: dict[str, Any]
    cls: str = TEXT
    then: dict[str, Any] | None = None
    solver: dict[str, Any] = field(default_factory=lambda: dict(type='EulerDiscreteScheduler'))
    adapters: dict[str, tuple[str, float]] = field(default_factory=dict)
    seed: int = 0
    sag: float = 0.0
    base: str = BASE
    refiner: str = REFINER
    unet: str | None = None

    @property
    def second(self) -> str:
        """The refiner's pipeline."""
        return INPAINT if self.cls == INPAINT else IMAGE


def refiners(size: int, scifi: float | None = None, pixel_art: float | None = None, cls: str = TEXT,
             adapters: dict[str, tuple[str, float]] | None = None, **call: Any) -> Guide:
    """A step of Refiners' guide; latents of size / 8, and the time ids of 1024 pixels."""
    loras = {'scifi': ('Sci-fi_Environments_sdxl.safetensors', scifi),
             'pixel_art': ('pixel-art-xl-v1.1.safetensors', pixel_art)}
    prompt = 'a futuristic castle surrounded by a forest, mountains in the background'
    return Guide(dict(prompt=prompt + ', best quality, high quality',
                      negative_prompt='monochrome, lowres, bad anatomy, worst quality, low quality',
                      height=size, width=size, original_size=(1024, 1024), target_size=(1024, 1024),
                      num_inference_steps=50, guidance_scale=5.0, **call), cls, solver=DDIM, seed=42, sag=0.75,
                 adapters={**{k: (v[0], v[1]) for k, v in loras.items() if v[1] is not None}, **(adapters or {})})


IP = {'ip': ('h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors', 1.0)}
DEPTH = {'depth': ('TencentARC/t2i-adapter-depth-zoe-sdxl-1.0', 0.72)}
CASTLE = dict(ip_adapter_image=f'{REFINE}/german-castle.jpg')
TIGER: dict[str, Any] = dict(prompt='A majestic tiger sitting on a bench')
BENCHES = dict(image=f'{BENCH}.png', mask_image=f'{BENCH}_mask.png')
LION: dict[str, Any] = dict(prompt='A majestic lion jumping from a big stone at night', num_inference_steps=40)
ENSEMBLE = Guide({**LION, 'denoising_end': 0.8}, then={**LION, 'denoising_start': 0.8})
SIZES: dict[str, Any] = dict(prompt=ASTRONAUT, negative_original_size=(512, 512), negative_target_size=(1024, 1024))

GUIDES = {
    # mindone-sdxl-pipelines.md
    'sdxl_text_to_image': Guide(dict(prompt=ASTRONAUT)),
    'sdxl_single_file': replace(ENSEMBLE, base=f'https://huggingface.co/{BASE}/blob/main/sd_xl_base_1.0.safetensors',
                                refiner=f'https://huggingface.co/{REFINER}/blob/main/sd_xl_refiner_1.0.safetensors'),
    'sdxl_image_to_image': Guide(
        dict(prompt='a dog catching a frisbee in the jungle', image=f'{HUB}/sdxl-text2img.png', strength=0.8,
             guidance_scale=10.5), IMAGE),
    'sdxl_inpainting': Guide(
        dict(prompt='A deep sea diver floating', image=f'{HUB}/sdxl-text2img.png',
             mask_image=f'{HUB}/sdxl-inpaint-mask.png', strength=0.85, guidance_scale=12.5), INPAINT),
    'sdxl_base_refiner': ENSEMBLE,
    'sdxl_base_refiner_inpainting': Guide(
        dict(**TIGER, **BENCHES, num_inference_steps=75, denoising_end=0.7), INPAINT,
        then=dict(**TIGER, num_inference_steps=75, denoising_start=0.7)),
    'sdxl_base_to_refiner': Guide(dict(prompt=ASTRONAUT), then=dict(prompt=ASTRONAUT)),
    'sdxl_base_to_refiner_inpainting': Guide(
        dict(**TIGER, **BENCHES, num_inference_steps=75), INPAINT, then=dict(**TIGER, num_inference_steps=30)),
    'sdxl_refiner_alone': Guide(dict(prompt=ASTRONAUT, image=f'{HUB}/sdxl-text2img.png'), IMAGE, base=REFINER),
    'sdxl_size_conditioning': Guide(SIZES),
    'sdxl_crop_conditioning': Guide(dict(prompt=ASTRONAUT, crops_coords_top_left=(256, 0))),
    'sdxl_negative_crop_conditioning': Guide({**SIZES, 'negative_crops_coords_top_left': (0, 0)}),
    'sdxl_two_prompts': Guide(dict(prompt=ASTRONAUT, prompt_2='Van Gogh painting')),
    'sdxl_xformers': ENSEMBLE,
    # diffusers-t2i-adapter-guide.md
    'sdxl_t2i_adapter': Guide(
        dict(prompt='pale golden rod circle with old lace background',
             image=f'{HUB}/controlnet_training/conditioning_image_1.png'), T2I,
        solver=dict(type='EulerAncestralDiscreteScheduler'),
        adapters={'adapter': ('work_dirs/stable_diffusion_xl_t2i_adapter_fill50k/step15000/adapter', 1.0)}),
    # refiners-adapting-sdxl.md
    'sdxl_refiners_vanilla': refiners(2048),
    'sdxl_refiners_lora': refiners(2048, 1.0),
    'sdxl_refiners_two_loras': refiners(2048, 1.0, 1.4),
    'sdxl_refiners_ip_adapter': refiners(1024, 1.5, 1.55, adapters=IP, **CASTLE),
    'sdxl_refiners_t2i_adapter': refiners(1024, 1.5, 1.55, T2I, {**IP, **DEPTH}, **CASTLE,
                                          image=f'{REFINE}/zoe-depth-map-german-castle.png'),
    # Models' cards, and diffusers' guide of PAG.
    'sdxl_lcm_lora': Guide(
        dict(prompt='Self-portrait oil painting, a beautiful cyborg with golden hair, 8k', num_inference_steps=4,
             guidance_scale=1.0), solver=dict(type='LCMScheduler'), seed=42,
        adapters={'lcm': ('latent-consistency/lcm-lora-sdxl', 1.0)}),
    'sdxl_lightning': Guide(
        dict(prompt='A girl smiling', num_inference_steps=4, guidance_scale=0.0),
        solver=dict(type='EulerDiscreteScheduler', timestep_spacing='trailing'),
        adapters={'lightning': ('ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors', 1.0)}),
    'sdxl_lcm': Guide(
        dict(prompt='Self-portrait oil painting, a beautiful cyborg with golden hair, 8k', num_inference_steps=4,
             guidance_scale=8.0), solver=dict(type='LCMScheduler'), unet='latent-consistency/lcm-sdxl'),
    'sdxl_lightning_unet': Guide(
        dict(prompt='A girl smiling', num_inference_steps=4, guidance_scale=0.0),
        solver=dict(type='EulerDiscreteScheduler', timestep_spacing='trailing'),
        unet='https://huggingface.co/ByteDance/SDXL-Lightning/blob/main/sdxl_lightning_4step_unet.safetensors'),
    'sdxl_turbo': Guide(
        dict(prompt='A cinematic shot of a baby racoon wearing an intricate italian priest robe.', height=512,
             width=512, num_inference_steps=1, guidance_scale=0.0), base='stabilityai/sdxl-turbo',
        solver=dict(type='EulerAncestralDiscreteScheduler', timestep_spacing='trailing')),
    'sdxl_inpainting_9_channels': Guide(
        dict(prompt='a tiger sitting on a park bench', **BENCHES, num_inference_steps=20, strength=0.99,
             guidance_scale=8.0), INPAINT, base='diffusers/stable-diffusion-xl-1.0-inpainting-0.1'),
    'sdxl_pag': Guide(dict(prompt='an insect robot preparing a delicious meal, anime style', num_inference_steps=25,
                           guidance_scale=7.0, pag_scale=3.0), PAG),
}
EVERYTHING = 'sdxl_everything'


def test_all_are_here() -> None:
    found = {p.stem for p in installed_configs() if p.parent.name == 'infer'}
    assert found == {*GUIDES, EVERYTHING}


# What they say

def full(cls: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a stock pipeline is asked with `given` and its own defaults, of what a Request can hold."""
    known = {f.name for f in fields(Request)} | {'ip_adapter_image', 'pag_scale'}
    defaults = {name: p.default for name, p in inspect.signature(getattr(diffusers, cls).__call__).parameters.items()
                if name in known}
    assert given.keys() <= defaults.keys(), given.keys() - defaults.keys()
    if cls == INPAINT:  # the UNet's sample_size of 128, by 8, whatever the picture
        defaults |= {'height': 1024, 'width': 1024}
    return {**defaults, **given}


def scale_of(sampler: Mapping[str, Any], kind: str) -> float | None:
    """The scale of a sampler's guidance."""
    return next((g['scale'] for g in sampler['guidances'] if g['type'] == kind), None)


def asked(cfg: Any, sampler: Mapping[str, Any], infer_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a config asks, under the names of the stock pipelines."""
    others = ('conditions', 'offload', 'seed', 'refiner')
    given = {'num_inference_steps': sampler['num_inference_steps'], 'guidance_scale': scale_of(sampler, 'CFG'),
             **{k: v for k, v in infer_cfg.items() if k not in others and v is not None}}
    if (pag := scale_of(sampler, 'PAG')) is not None:
        given['pag_scale'] = pag
    for name, picture in infer_cfg.get('conditions', {}).items():
        given['ip_adapter_image' if cfg.model.adapters[name].type == 'IPAdapter' else 'image'] = picture
    return given


@pytest.mark.parametrize('name', GUIDES)
def test_a_config_says_what_its_guide_says(name: str) -> None:
    cfg, guide = config.resolve(config.load(name)), GUIDES[name]
    own, sampler = cfg.to_dict()['infer_cfg'], cfg.model.sampler
    assert full(guide.cls, asked(cfg, sampler, own)) == full(guide.cls, guide.call)
    assert (own.get('seed', 0), dict(sampler.scheduler)) == (guide.seed, guide.solver)
    assert (cfg.model.pretrained, cfg.model.get('unet')) == (guide.base, guide.unet)
    assert scale_of(sampler, 'SAG') == (guide.sag or None)
    assert {name: ('/'.join(filter(None, (a.weights, a.get('subfolder'), a.get('weight_name')))), a.get('scale', 1.0))
            for name, a in (cfg.model.get('adapters') or {}).items()} == guide.adapters
    assert ('refiner' in cfg) == (guide.then is not None)
    if guide.then is not None:
        told = {'prompt': own['prompt'], **own.get('refiner', {})}
        if own.get('denoising_end') is not None:
            told |= {'denoising_start': own['denoising_end'], 'num_inference_steps': own['num_inference_steps']}
        # Its image are the base's latents, and the mask is the base's too.
        assert full(guide.second, asked(cfg, sampler, told)) == full(guide.second, guide.then)
        assert cfg.refiner.pretrained == guide.refiner and cfg.refiner.shared_components == ['text_encoder_2', 'vae']


# What they make

@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    """Tiny weights, and noise as images: smaller, as the guides', than what is made of them; two are no squares."""
    world = StandIns(tmp_path_factory.mktemp('world'))
    sizes = {f'{HUB}/sdxl-text2img.png': (64, 64), f'{HUB}/sdxl-inpaint-mask.png': (64, 64), f'{BENCH}.png': (32, 32),
             f'{BENCH}_mask.png': (32, 32), f'{HUB}/conditioning_image_1.png': (32, 32),
             f'{REFINE}/german-castle.jpg': (48, 80), f'{REFINE}/zoe-depth-map-german-castle.png': (64, 96)}
    for i, (url, size) in enumerate(sizes.items()):
        pixels = images(1, size, seed=i)[0]
        if 'mask' in url:
            pixels = (pixels[:1] > 0.5).float().expand(3, *size)
        to_pil(pixels.numpy()).save(world.image(url))
    return world


def overrides(name: str, world: StandIns) -> dict[str, Any]:
    return world.overrides(config.resolve(config.load(name)))


def made(name: str, world: StandIns, **changes: Any) -> Tensor:
    """The config's picture, [1, 3, H, W], by SDXLInferencer."""
    options = {**overrides(name, world), **changes}
    picture: Tensor = SDXLInferencer(name, device='cpu', cfg_options=options)(output_type='pt')
    return picture


def stocks(name: str, world: StandIns) -> Tensor:
    """The picture of the guide's own pipelines, called as there."""
    guide = GUIDES[name]
    parts: dict[str, Any] = {}
    adapters = config.resolve(config.load(name)).model.get('adapters') or {}
    folders = {kind: {key: world.adapter(adapter) for key, adapter in sorted(adapters.items()) if adapter.type == kind}
               for kind in ('T2IAdapter', 'LoRA', 'IPAdapter')}
    assert sum(map(len, folders.values())) == len(guide.adapters)
    for folder in folders['T2IAdapter'].values():
        parts['adapter'] = diffusers.T2IAdapter.from_pretrained(folder)
    if guide.unet is not None:
        parts['unet'] = diffusers.UNet2DConditionModel.from_pretrained(world.unet(guide.unet))
        if guide.unet.endswith('.safetensors'):
            copied(parts['unet'])
    base = equipped(opened(guide.base, guide.cls, world, **parts), guide, folders, world.image_encoder())
    generator = torch.Generator().manual_seed(guide.seed)
    call = small_call(guide.cls, guide.call, world)
    if guide.cls == T2I:
        call['adapter_conditioning_scale'], = (guide.adapters[key][1] for key in folders['T2IAdapter'])
    if guide.then is None:
        return base(**call, generator=generator, output_type='pt').images
    refiner = opened(guide.refiner, guide.second, world, text_encoder_2=base.text_encoder_2, vae=base.vae)
    latents = base(**call, generator=generator, output_type='latent').images
    mask = {'mask_image': call['mask_image']} if guide.cls == INPAINT else {}
    then = small_call(guide.second, guide.then, world)
    return refiner(**then, **mask, image=latents, generator=generator, output_type='pt').images


def opened(source: str, cls: str, world: StandIns, **parts: Any) -> Any:
    """A stock pipeline with the tiny weights that stand for `source`.

    Not from a single file: stock gives the second encoder the first one's weights where both are as wide. But its
    weights are copies, as of one: a folder's are mapped and may lie anywhere, on which the kernels' last bits depend.
    """
    pipeline = stock(world.base(source), cls, **parts)
    if source.endswith('.safetensors'):
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                copied(module)
    return pipeline


def copied(module: torch.nn.Module) -> None:
    """Copy its weights in memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def small_call(cls: str, call: Mapping[str, Any], world: StandIns) -> dict[str, Any]:
    """A guide's call with small pictures and few steps."""
    new = {**call, 'num_inference_steps': few(full(cls, call)['num_inference_steps'])}
    new |= {key: small(call[key]) for key in ('height', 'width') if key in call}
    return new | {key: diffusers.utils.load_image(world.image(call[key]))
                  for key in ('image', 'mask_image', 'ip_adapter_image') if key in call}


def equipped(pipeline: Any, guide: Guide, folders: Mapping[str, Mapping[str, Path]], encoder: Path) -> Any:
    """The pipeline with a guide's scheduler, LoRAs and IP-Adapter."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    settings = dict(guide.solver)
    pipeline.scheduler = getattr(diffusers, settings.pop('type')).from_config(pipeline.scheduler.config, **settings)
    loras = folders['LoRA']
    for name, folder in loras.items():
        pipeline.load_lora_weights(folder, adapter_name=name)
    if loras:
        pipeline.set_adapters(list(loras), [guide.adapters[name][1] for name in loras])
    for name, folder in folders['IPAdapter'].items():
        pipeline.load_ip_adapter(folder, subfolder='', weight_name='ip_adapter.safetensors', image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(guide.adapters[name][1])
        net = CLIPVisionModelWithProjection.from_pretrained(encoder).requires_grad_(False)
        pipeline.register_modules(image_encoder=net, feature_extractor=CLIPImageProcessorPil.from_pretrained(encoder))
    for part in ('unet', 'text_encoder', 'text_encoder_2'):
        if getattr(pipeline, part) is not None:
            getattr(pipeline, part).requires_grad_(False)
    return pipeline


@pytest.mark.parametrize('name', GUIDES)
def test_the_picture_is_that_of_the_guides_pipelines(name: str, world: StandIns) -> None:
    """Bitwise; of Refiners' steps without self-attention guidance, which stock has not: with it they are others."""
    guide = GUIDES[name]
    without = {'model.sampler.guidances.1.scale': 0.0} if guide.sag else {}
    picture = made(name, world, **without)
    assert torch.equal(picture, stocks(name, world))
    if guide.sag:
        guided = made(name, world)
        assert guided.shape == picture.shape and guided.isfinite().all() and not torch.equal(guided, picture)


def test_everything_has_a_say(world: StandIns) -> None:
    """In the picture with all at once no part is idle: none can be left out without another picture."""
    cfg, changes = config.resolve(config.load(EVERYTHING)), overrides(EVERYTHING, world)
    kinds = sorted(a.type for a in cfg.model.adapters.values())
    assert kinds == ['IPAdapter', 'LoRA', 'LoRA', 'T2IAdapter', 'T2IAdapter'] and 'refiner' in cfg
    inferencer = SDXLInferencer(EVERYTHING, device='cpu', cfg_options=changes)
    picture = inferencer(output_type='pt')
    assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()
    assert torch.equal(inferencer(output_type='pt'), picture)
    others = {name: inferencer(scales={name: 0.0}, output_type='pt') for name in cfg.model.adapters}
    others |= {'the refiner': inferencer(refiner={'prompt': 'other'}, output_type='pt'),
               'the mask': inferencer(mask_image=world.image(f'{HUB}/sdxl-inpaint-mask.png'), output_type='pt'),
               'SAG': made(EVERYTHING, world, **{'model.sampler.guidances.1.scale': 0.0})}
    assert not [name for name, other in others.items() if torch.equal(other, picture)]
