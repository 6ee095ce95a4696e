"""Everything at once, which no stock pipeline does, against a loop written out over stock's modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from parity import (
    PROMPTS,
    SOLVERS,
    ByHand,
    generators,
    image_embeds,
    images,
    load_adapters,
    picture_batch,
    stock,
    stock_like,
)
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.inference.stages import Stage, run
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch, Start
from diffengine_sdxl.testing import write_tiny_refiner, write_tiny_sdxl

TEXTS, NEGATIVES, SEEDS, SIZE = PROMPTS[:2], ['blurry', 'ugly'], [3, 1], (96, 64)
STEPS = 5
PICTURES, REFERENCES = images(2, SIZE), images(2, seed=6)
MASK = (images(2, SIZE, channels=1, seed=9) > 0.5).float()
CONTROLS = [images(2, SIZE, seed=seed) for seed in (8, 10)]
#: Where the image prompt acts: the same for both images, as stock has one mask for all.
HALF = torch.zeros(1, 1, *SIZE)
HALF[..., 24:] = 1
NAMES = {'lora_1': 'lora', 'lora_2': 'lora_everywhere', 'plus': 'ip_adapter_plus', 't2i_1': 't2i_adapter',
         't2i_2': 't2i_adapter'}
CHANGES: dict[str, dict[str, Any]] = {
    'lora_1': dict(scale=1.4), 'plus': dict(scale=0.8, mask='where'), 't2i_1': dict(scale=0.6, active_range=(0.0, 0.6)),
    't2i_2': dict(condition_key='sketch')}
ALWAYS, EARLY, LATE = (0.0, 1.0), (0.0, 0.6), (0.4, 1.0)
GUIDANCES = [dict(type='CFG', scale=5.0), dict(type='PAG', scale=2.0, active_range=EARLY),
             dict(type='SAG', active_range=LATE)]
#: Inpainting by blending or by channels; the refiner as an expert for the last steps, or after the base.
EXPERTS: dict[str, Any] = dict(first=dict(denoising_end=0.7), second=dict(denoising_start=0.7))
KINDS: dict[str, dict[str, Any]] = {
    'blended, experts': dict(channels=4, solver='ancestral', **EXPERTS),
    'blended, afterwards': dict(channels=4, solver='ddim', first={}, second=dict(strength=0.6)),
    'by channels, experts': dict(channels=9, solver='euler', **EXPERTS)}


def make_request(refiner: bool, **changes: Any) -> Batch:
    """A batch with negative prompts and negative time ids."""
    own, null = ([*SIZE, 0, 0, 6.0], [*SIZE, 0, 0, 2.5]) if refiner else ([*SIZE, 8, 0, *SIZE], [48, 32, 0, 0, *SIZE])
    return picture_batch(TEXTS, SEEDS, SIZE, negative_text=NEGATIVES, time_ids=torch.tensor([own] * 2).float(),
                         negative_time_ids=torch.tensor([null] * 2).float(), **changes)


def drawn(pipeline: Any, pictures: Tensor, shared: list[torch.Generator]) -> Tensor:
    """The VAE's samples, each from its generator."""
    samples = [pipeline.vae.encode(p[None]).latent_dist.sample(g) for p, g in zip(pictures, shared, strict=True)]
    return torch.cat(samples) * pipeline.vae.config.scaling_factor


def normal(shared: list[torch.Generator]) -> Tensor:
    return torch.cat([torch.randn((1, 4, SIZE[0] // 8, SIZE[1] // 8), generator=g) for g in shared])


def blended(scheduler: Any, kept: Tensor, noise: Tensor, last: int) -> Any:
    """The blending after each step of inpainting; there is no noise after the last one."""
    mask = functional.interpolate(MASK, size=kept.shape[-2:])

    def after(i: int, x: Tensor) -> Tensor:
        back = kept if i + 1 == last else scheduler.add_noise(kept, noise, scheduler.timesteps[i + 1:i + 2])
        return (1 - mask) * back + mask * x
    return after


def base_by_hand(pipeline: Any, model: SDXL, encoder: Path, kind: dict[str, Any], shared: list[torch.Generator],
                 folder: Path) -> tuple[Tensor, float]:
    """The base's latents: inpainting at strength 0.8, to the end or to where the refiner takes over."""
    from diffusers import T2IAdapter
    load_adapters(pipeline, model, folder)
    controls = []
    for name, shown in zip(('t2i_1', 't2i_2'), CONTROLS, strict=True):
        model.adapters[name].save(folder / name)
        with torch.no_grad():
            features = T2IAdapter.from_pretrained(folder / name)(shown)
        controls.append((features, (0.6, EARLY) if name == 't2i_1' else (1.0, ALWAYS)))
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    batch, first = make_request(False), STEPS - int(STEPS * 0.8)
    last = STEPS if not kind['first'] else int((scheduler.timesteps >= round(1000 - 0.7 * 1000)).sum())
    assert first < last - 1
    scheduler.set_begin_index(first) if hasattr(scheduler, 'set_begin_index') else None
    with torch.no_grad():
        kept, noise = drawn(pipeline, PICTURES * 2 - 1, shared), normal(shared)
        seen = drawn(pipeline, (PICTURES * 2 - 1) * (MASK < 0.5), shared)
    x = scheduler.add_noise(kept, noise, scheduler.timesteps[first:first + 1].repeat(2))
    wide = kind['channels'] == 9
    loop = ByHand(pipeline, TEXTS, (batch.time_ids, batch.negative_time_ids), NEGATIVES, controls,
                  [image_embeds(encoder, REFERENCES, plus=True)], [HALF],
                  torch.cat([functional.interpolate(MASK, size=x.shape[-2:]), seen], dim=1) if wide else None)
    more = dict(generator=shared) if kind['solver'] == 'ancestral' else {}
    after = None if wide else blended(scheduler, kept, noise, last)
    made = loop(x, first, last, (5.0, ALWAYS), (2.0, EARLY), (0.75, LATE), after, **more)
    return made, loop.margin


def refiner_by_hand(pipeline: Any, latents: Tensor, kind: dict[str, Any], shared: list[torch.Generator]) -> Tensor:
    """The refiner's latents, with the same mask."""
    scheduler, batch = pipeline.scheduler, make_request(True)
    scheduler.set_timesteps(STEPS)
    experts = 'denoising_start' in kind['second']
    first = int((scheduler.timesteps >= 300).sum()) if experts else STEPS - int(STEPS * 0.6)
    scheduler.set_begin_index(first) if hasattr(scheduler, 'set_begin_index') else None
    noise = normal(shared)
    x = latents if experts else scheduler.add_noise(latents, noise, scheduler.timesteps[first:first + 1].repeat(2))
    loop = ByHand(pipeline, TEXTS, (batch.time_ids, batch.negative_time_ids), NEGATIVES)
    more = dict(generator=shared) if kind['solver'] == 'ancestral' else {}
    return loop(x, first, cfg=(4.0, ALWAYS), after=blended(scheduler, latents, noise, STEPS), **more)


@pytest.mark.parametrize('kind', KINDS)
def test_everything_is_a_loop_by_hand(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Inpainting with two LoRAs, an IP-Adapter plus in a part of the image, two T2I-Adapters, one of them early, CFG,
    PAG early, SAG late, and a refiner: 1e-5 relative, as SAG is computed in fp64 by hand."""
    case = KINDS[kind]
    folder = tiny_base
    if case['channels'] == 9:
        folder = write_tiny_sdxl(tmp_path / 'base', in_channels=9)
    configs = {name: {**CASES[known].config, **CHANGES.get(name, {})} for name, known in NAMES.items()}
    model = shaken(build(folder, configs), *(CASES[NAMES[name]] for name in sorted(NAMES)))
    refiner_folder = write_tiny_refiner(tmp_path / 'refiner')
    refiner = SDXL(pretrained=str(refiner_folder), shared_components=['text_encoder_2', 'vae'], base_model=model)
    batch = make_request(False, start=Start(image=PICTURES * 2 - 1, mask=MASK), conditions={
        'reference': REFERENCES, 'where': HALF.expand(2, -1, -1, -1), 'conditioning_image': CONTROLS[0],
        'sketch': CONTROLS[1]})
    solver = SOLVERS[case['solver']]
    got = run(Stage(model, batch, Sampler(solver, STEPS, GUIDANCES, strength=0.8, **case['first'])),
              Stage(refiner, make_request(True),
                    Sampler(solver, STEPS, [dict(type='CFG', scale=4.0)], **case['second'])))

    plain, shared = stock(folder), generators(SEEDS)
    refining = stock(refiner_folder, 'StableDiffusionXLImg2ImgPipeline', vae=plain.vae,
                     text_encoder_2=stock(folder).text_encoder_2)
    pipeline = stock_like(plain, 'StableDiffusionXLPipeline', solver)
    latents, margin = base_by_hand(pipeline, model, folder.parent / 'image_encoder', case, shared, tmp_path)
    expected = refiner_by_hand(stock_like(refining, 'StableDiffusionXLImg2ImgPipeline', solver), latents, case, shared)
    assert margin > 1e-5, f'choose other inputs: the map comes within {margin:.1e} of the threshold'
    assert torch.isfinite(expected).all() and float((got - expected).norm() / expected.norm()) < 1e-5
    for name in NAMES if kind == 'blended, experts' else ():  # each adapter has an effect
        adapter = model.adapters[name]
        scale, adapter.scale = adapter.scale, 0.0
        without = Sampler(solver, STEPS, GUIDANCES, strength=0.8, **case['first'])(model, batch)
        assert float((without - latents).norm() / latents.norm()) > 1e-4, name
        adapter.scale = scale


@pytest.mark.parametrize('solver', SOLVERS)
def test_two_t2i_adapters_are_bitwise_stocks(tiny_base: Path, tmp_path: Path, solver: str) -> None:
    """With a scale each, in the first half of denoising. One prompt: stock's MultiAdapter takes single images."""
    from diffusers import MultiAdapter, T2IAdapter
    config, names = CASES['t2i_adapter'].config, ('a', 'b')
    scales, factor = (0.6, 1.2), 0.5
    if solver == 'heun':  # stock counts evaluations against steps: 3 of 7 lie in the first half
        factor = 3 / 4
    configs = {name: {**config, 'condition_key': name, 'scale': scale, 'active_range': (0.0, 0.5)}
               for name, scale in zip(names, scales, strict=True)}
    model = shaken(build(tiny_base, configs), *[CASES['t2i_adapter']] * 2)
    for name in names:
        model.adapters[name].save(tmp_path / name)
    nets = MultiAdapter([T2IAdapter.from_pretrained(tmp_path / name) for name in names])
    pipe = stock_like(stock(tiny_base), 'StableDiffusionXLAdapterPipeline', SOLVERS[solver], adapter=nets)
    shown = [control[:1] for control in CONTROLS]
    expected = pipe(TEXTS[0], image=shown, height=SIZE[0], width=SIZE[1], num_inference_steps=4, guidance_scale=5.0,
                    adapter_conditioning_scale=list(scales), adapter_conditioning_factor=factor,
                    generator=generators(SEEDS[:1]), output_type='latent').images
    batch = picture_batch(TEXTS[:1], SEEDS[:1], SIZE, conditions=dict(zip(names, shown, strict=True)))
    got = Sampler(SOLVERS[solver], 4, [dict(type='CFG', scale=5.0)])(model, batch)
    assert torch.isfinite(expected).all() and torch.equal(got, expected)
    for adapter in model.adapters.values():
        adapter.scale = 0.0
    assert not torch.equal(got, Sampler(SOLVERS[solver], 4, [dict(type='CFG', scale=5.0)])(model, batch))
