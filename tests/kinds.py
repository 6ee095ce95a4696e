"""Every kind of adapter: its config, and how its ecosystem loads what it saves. A new kind is an entry of CASES."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from parity import PROMPTS, generators, images, picture_batch, sampler, stock
from safetensors.torch import load_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.testing import write_tiny_image_encoder

SEEDS = [4, 2]
STEPS = 3
#: Stands in a config for the folder of a tiny image encoder, beside the base.
ENCODER = 'IMAGE ENCODER'
#: In half of the tests' prompts; not a single token of any tokenizer.
WORD = 'circle'
Stock = Callable[[Path, Path, Batch], Tensor]


@dataclass(frozen=True)
class Case:
    """A kind of adapter.

    Attributes:
        config: its config; a `condition_key` gets random images.
        stock: (base, exported folder, batch) -> latents of the ecosystem's own loader and pipeline, STEPS Euler steps.
        scales: scales that it supports, 0 first, which is the base.
        active_ranges: whether it supports an active range.
        other: settings by which a second adapter of this kind must differ.
        noise: deviation of the noise that makes it look trained.
    """

    config: dict[str, Any]
    stock: Stock
    scales: tuple[float, ...] = (0.0, 0.5, 1.0)
    active_ranges: bool = True
    other: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.02

    @property
    def condition_key(self) -> str | None:
        """The condition that it takes."""
        return self.config.get('condition_key')


def run(pipeline: Any, batch: Batch, **arguments: Any) -> Tensor:
    """Latents of a stock pipeline."""
    for part in ('unet', 'text_encoder', 'text_encoder_2'):
        # After loading, for what the loader added too: torch's matmul chooses another kernel for weights that require
        # gradients.
        getattr(pipeline, part).requires_grad_(False)
    return pipeline(batch.text, height=64, width=64, num_inference_steps=STEPS, output_type='latent',
                    generator=generators(SEEDS[:len(batch)]), **arguments).images


def stock_t2i(base: Path, folder: Path, batch: Batch) -> Tensor:
    """diffusers' T2IAdapter in its pipeline."""
    from diffusers import T2IAdapter
    pipeline = stock(base, 'StableDiffusionXLAdapterPipeline', adapter=T2IAdapter.from_pretrained(folder))
    return run(pipeline, batch, image=batch.conditions['conditioning_image'])


def stock_controlnet(base: Path, folder: Path, batch: Batch) -> Tensor:
    """diffusers' ControlNetModel in its pipeline."""
    from diffusers import ControlNetModel
    net = ControlNetModel.from_pretrained(folder).requires_grad_(False)
    pipeline = stock(base, 'StableDiffusionXLControlNetPipeline', controlnet=net)
    return run(pipeline, batch, image=batch.conditions['conditioning_image'], controlnet_conditioning_scale=1.0)


def stock_lora(base: Path, folder: Path, batch: Batch) -> Tensor:
    """`load_lora_weights`."""
    pipeline = stock(base)
    pipeline.load_lora_weights(str(folder))
    return run(pipeline, batch)


def stock_peft(base: Path, folder: Path, batch: Batch) -> Tensor:
    """peft's own loader, part by part, for kinds without a loader in diffusers."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    pipeline = stock(base)
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        module = getattr(pipeline, part.name)
        inject_adapter_in_model(PeftConfig.from_pretrained(str(part)), module, 'default')
        state = {k.removeprefix('base_model.model.'): v
                 for k, v in load_file(part / 'adapter_model.safetensors').items()}
        assert not set_peft_model_state_dict(module, state, 'default').unexpected_keys
    return run(pipeline, batch)


def stock_ip_adapter(base: Path, folder: Path, batch: Batch) -> Tensor:
    """`load_ip_adapter`, and the embeddings by transformers' own encoder."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    source = base.parent / 'image_encoder'
    encoder = CLIPVisionModelWithProjection.from_pretrained(source).requires_grad_(False)
    settings = CLIPImageProcessorPil.from_pretrained(source)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (settings.image_mean, settings.image_std))
    pixels = (batch.conditions['reference'] - mean) / std
    pipeline = stock(base)
    pipeline.load_ip_adapter(str(folder), subfolder='', weight_name='ip_adapter.safetensors', image_encoder_folder=None)
    if 'Plus' in type(pipeline.unet.encoder_hid_proj.image_projection_layers[0]).__name__:
        # The pipeline's `encode_image` encodes zero pixels once for a prompt, which has one image here.
        embeds, null = (encoder(p, output_hidden_states=True).hidden_states[-2]
                        for p in (pixels, torch.zeros_like(pixels[:1])))
        null = null.expand_as(embeds)
    else:
        embeds = encoder(pixels).image_embeds
        null = torch.zeros_like(embeds)
    # The pipeline repeats all of them for every prompt, so that prompts cannot have their own images: take one copy.
    pipeline.unet.encoder_hid_proj.register_forward_pre_hook(
        lambda _, args: ([x.unflatten(0, (2, len(pixels), -1))[:, 0].flatten(0, 1) for x in args[0]],))
    return run(pipeline, batch, ip_adapter_image_embeds=[torch.cat([null, embeds]).unsqueeze(1)])


def stock_word(base: Path, folder: Path, batch: Batch) -> Tensor:
    """`load_textual_inversion`, once for each text encoder."""
    pipeline = stock(base)
    state = load_file(folder / 'learned_embeds.safetensors')
    for key, number in (('clip_l', ''), ('clip_g', '_2')):
        pipeline.load_textual_inversion(state[key], token=WORD, text_encoder=getattr(pipeline, f'text_encoder{number}'),
                                        tokenizer=getattr(pipeline, f'tokenizer{number}'))
    return run(pipeline, batch)


def lora(**settings: Any) -> dict[str, Any]:
    """Config of a LoRA of low rank."""
    return dict(type='LoRA', rank=4, **settings)


def ip_adapter(**settings: Any) -> dict[str, Any]:
    """Config of an IP-Adapter with the tiny image encoder."""
    return dict(type='IPAdapter', condition_key='reference', image_encoder=ENCODER, image_encoder_subfolder=None,
                **settings)


EVERYWHERE = ['unet', 'text_encoder', 'text_encoder_2']
CASES: dict[str, Case] = {
    't2i_adapter': Case(dict(type='T2IAdapter', condition_key='conditioning_image'), stock_t2i),
    'controlnet': Case(dict(type='ControlNet', condition_key='conditioning_image'), stock_controlnet),
    'ip_adapter': Case(ip_adapter(), stock_ip_adapter),
    'ip_adapter_plus': Case(ip_adapter(architecture='plus', depth=4, ff_mult=4), stock_ip_adapter),
    'lora': Case(lora(), stock_lora, noise=0.1),
    'lora_everywhere': Case(
        lora(alpha=8, parts=EVERYWHERE, targets=['to_q', 'conv1', 'ff.net.0.proj', 'q_proj', 'fc1']), stock_lora,
        active_ranges=False, noise=0.1),
    'dora': Case(lora(kind='dora'), stock_lora, noise=0.1),
    'dora_everywhere': Case(lora(kind='dora', parts=EVERYWHERE), stock_peft, active_ranges=False, noise=0.1),
    'loha': Case(lora(kind='loha'), stock_peft, noise=0.1),
    'lokr': Case(lora(kind='lokr'), stock_peft, noise=0.1),
    'oft': Case(lora(kind='oft'), stock_peft, scales=(0.0, 1.0), noise=0.1),
    'textual_inversion': Case(dict(type='TextualInversion', token=WORD, num_vectors=2, init='red'), stock_word,
                              scales=(0.0, 1.0), active_ranges=False, other=dict(token='blue')),
}


def conditions(*configs: dict[str, Any], num: int = 2) -> dict[str, Tensor]:
    """Images for every condition, of the output's size, which is also the tiny image encoder's."""
    return {c['condition_key']: images(num, seed=i) for i, c in enumerate(configs) if c.get('condition_key')}


def build(base: Path, adapters: dict[str, Any], **settings: Any) -> SDXL:
    """A model that can train."""
    encoder = base.parent / 'image_encoder'
    if not encoder.is_dir():
        write_tiny_image_encoder(encoder)
    configs = {name: {k: str(encoder) if v == ENCODER else v for k, v in config.items()}
               for name, config in adapters.items()}
    return SDXL(pretrained=str(base), adapters=configs, objective=dict(type='Denoise'), **settings)


def sample(model: SDXL, conditions: dict[str, Tensor], rows: Sequence[int] = (0, 1), steps: int = STEPS) -> Tensor:
    """Latents of two images, or of one of them."""
    batch = picture_batch([PROMPTS[i] for i in rows], [SEEDS[i] for i in rows],
                          conditions={name: tensor[list(rows)] for name, tensor in conditions.items()})
    return sampler(steps=steps)(model, batch)


def shaken(model: SDXL, *cases: Case) -> SDXL:
    """Make the adapters look trained; a fresh LoRA would be an identity."""
    with torch.no_grad():
        for (name, parameters), case in zip(sorted(model.trainables().items()), cases, strict=True):
            for i, (_, parameter) in enumerate(parameters):
                noise = torch.randn(parameter.shape, generator=rng.generator('shaken', name, i))
                parameter.add_(case.noise * noise.to(parameter.dtype))
    return model
