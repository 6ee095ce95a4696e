"""Guidances: PAG and Rescale bitwise stock's, SAG against its formulas, active ranges, costs, and refusals."""

from dataclasses import replace
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

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Start

TEXTS, SEEDS, SIZE = PROMPTS[:2], [3, 1], (40, 56)
PICTURES = images(2, SIZE)
MASK = (images(2, SIZE, channels=1, seed=9) > 0.5).float()
ALWAYS = (0.0, 1.0)


def guided(cfg: float = 5.0, **others: Any) -> list[dict[str, Any]]:
    """Configs of guidances: CFG, and PAG=dict(...) and the like."""
    return [*(dict(type=name, **settings) for name, settings in others.items()), dict(type='CFG', scale=cfg)]


def ours(model: SDXL, guidances: list[dict[str, Any]], solver: Any = 'euler', steps: int = 3,
         start: Start | None = None, size: tuple[int, int] = SIZE, **settings: Any) -> Tensor:
    sampler = Sampler(SOLVERS[solver] if isinstance(solver, str) else solver, steps, guidances, **settings)
    return sampler(model, picture_batch(TEXTS, SEEDS, size, start=start))


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all() and torch.equal(got, expected), float((got - expected).abs().max())


def noise(size: tuple[int, int], scheduler: Any) -> Tensor:
    """The initial latents of text-to-image."""
    drawn = [torch.randn((1, 4, size[0] // 8, size[1] // 8), generator=g) for g in generators(SEEDS)]
    return torch.cat(drawn) * scheduler.init_noise_sigma


def by_hand(pipeline: Any, solver: dict[str, Any], steps: int, size: tuple[int, int], **more: Any) -> ByHand:
    """A loop over stock's modules, its scheduler laid out."""
    pipe = stock_like(pipeline, 'StableDiffusionXLPipeline', solver)
    pipe.scheduler.set_timesteps(steps)
    ids = torch.tensor([[*size, 0, 0, *size]] * 2, dtype=torch.float32)
    return ByHand(pipe, TEXTS, (ids, ids), **more)


def assert_close(got: Tensor, expected: Tensor, margin: float) -> None:
    """1e-5 relative, for each picture; the map of SAG did not come so near to its threshold that rounding decides."""
    assert margin > 1e-5, f'choose other inputs: the map comes within {margin:.1e} of the threshold'
    for one, other in zip(got, expected, strict=True):
        assert torch.isfinite(other).all() and float((one - other).norm() / other.norm()) < 1e-5


def with_pag(pipeline: Any, cls: str, solver: str, layers: Any = 'mid', **call: Any) -> Tensor:
    """Latents of a stock pipeline. Given latents, those from an image leave PAG in the UNet."""
    pipe = stock_like(pipeline, cls, SOLVERS[solver], pag_applied_layers=layers)
    before = pipe.unet.attn_processors
    made = pipe(TEXTS, generator=generators(SEEDS), output_type='latent', **call).images
    pipe.unet.set_attn_processor(before)
    return made


PAGS: list[tuple[float, float, dict[str, Any]]] = [  # CFG, rescale, PAG
    (5.0, 0.0, {}), (1.0, 0.0, dict(scale=2.0)), (5.0, 0.6, dict(scale=1.5, adaptive_scale=0.002)),
    (1.0, 0.6, dict(layers=['down_blocks.1', 'up_blocks.(0|1).attentions.0', 'mid'])),
    (3.0, 0.0, dict(layers=['up_blocks.0.attentions.1'], adaptive_scale=0.001))]


@pytest.mark.parametrize('solver', SOLVERS)
def test_pag_is_bitwise_stocks(model: SDXL, pipeline: Any, solver: str) -> None:
    """With and without CFG, its layers, a scale that falls, and rescaled; all in one call of the UNet."""
    pairs = []
    for cfg, rescale, pag in PAGS if solver in ('euler', 'dpm++ sde') else PAGS[2:4]:
        expected = with_pag(
            pipeline, 'StableDiffusionXLPAGPipeline', solver, pag.get('layers', 'mid'), height=SIZE[0], width=SIZE[1],
            num_inference_steps=2, guidance_scale=cfg, guidance_rescale=rescale, pag_scale=pag.get('scale', 3.0),
            pag_adaptive_scale=pag.get('adaptive_scale', 0.0))
        got = ours(model, guided(cfg, PAG=pag, Rescale=dict(scale=rescale)), solver, 2)
        assert_same(got, expected)
        pairs.append(got)
        without = ours(model, guided(cfg, Rescale=dict(scale=rescale)), solver, 2)
        assert all((got - other).abs().max() > 1e-4 for other in (*pairs[:-1], without))


@pytest.mark.parametrize('solver', ['euler', 'ancestral', 'ddim'])
def test_pag_from_an_image_is_bitwise_stocks(model: SDXL, pipeline: Any, solver: str) -> None:
    """Image-to-image and inpainting, 4 channels."""
    call: dict[str, Any] = dict(image=PICTURES, strength=0.7, num_inference_steps=4, guidance_scale=5.0, pag_scale=2.0)
    guidances = guided(PAG=dict(scale=2.0))
    got = ours(model, guidances, solver, 4, Start(image=PICTURES * 2 - 1), strength=0.7)
    assert_same(got, with_pag(pipeline, 'StableDiffusionXLPAGImg2ImgPipeline', solver, **call))
    got = ours(model, guidances, solver, 4, Start(image=PICTURES * 2 - 1, mask=MASK), strength=0.7)
    assert_same(got, with_pag(pipeline, 'StableDiffusionXLPAGInpaintPipeline', solver, mask_image=MASK, height=SIZE[0],
                              width=SIZE[1], **call))


@pytest.mark.parametrize('solver', ['euler', 'dpm++ 2m', 'heun'])
def test_rescale_is_bitwise_stocks(model: SDXL, pipeline: Any, solver: str) -> None:
    """guidance_rescale; without CFG it does nothing."""
    pipe = stock_like(pipeline, 'StableDiffusionXLPipeline', SOLVERS[solver])
    for cfg in (7.5, 1.0):
        expected = pipe(TEXTS, height=SIZE[0], width=SIZE[1], num_inference_steps=3, guidance_scale=cfg,
                        guidance_rescale=0.7, generator=generators(SEEDS), output_type='latent').images
        assert_same(ours(model, guided(cfg, Rescale=dict(scale=0.7)), solver), expected)
        assert (cfg == 1) == torch.equal(expected, ours(model, guided(cfg), solver))


@pytest.mark.parametrize('cfg', [5.0, 1.0])
@pytest.mark.parametrize(('solver', 'size'), [
    (SOLVERS['euler'], (64, 64)),
    (dict(SOLVERS['euler'], prediction_type='v_prediction', use_karras_sigmas=True), (128, 96)),
    (SOLVERS['ddim'], (40, 56)), (SOLVERS['heun'], (72, 40)),
    (dict(SOLVERS['euler'], prediction_type='v_prediction'), (64, 64)),
    (dict(SOLVERS['ddim'], prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing'),
     (64, 96))], ids=['Euler', 'velocity, Karras', 'DDIM', 'Heun', 'velocity', 'zero SNR'])
def test_sag_is_its_formulas(tiny_base: Path, pipeline: Any, solver: dict[str, Any], size: tuple[int, int],
                             cfg: float) -> None:
    """Map, mask, blur and alpha-bar by other means, at several sizes; 1e-5, as they are computed in fp64. Karras sigmas
    lie between those of training, and so do their timesteps; predicted velocity depends on alpha-bar most."""
    settings = {k: v for k, v in solver.items() if k not in ('prediction_type', 'rescale_betas_zero_snr')}
    model = SDXL(pretrained=str(tiny_base), prediction_type=solver.get('prediction_type'),
                 zero_terminal_snr=solver.get('rescale_betas_zero_snr', False))
    reference = by_hand(pipeline, solver, 4, size)
    x = noise(size, reference.pipeline.scheduler)
    expected = reference(x, cfg=(cfg if cfg > 1 else 0.0, ALWAYS), sag=(0.75, ALWAYS))
    got = ours(model, guided(cfg, SAG={}), settings, 4, size=size)
    assert_close(got, expected, reference.margin)
    assert float((got - ours(model, guided(cfg), settings, 4, size=size)).norm() / got.norm()) > 1e-3


@pytest.mark.parametrize('solver', ['euler', 'ddim'])
def test_sag_with_all_adapters_of_the_guide(tiny_base: Path, tmp_path: Path, solver: str) -> None:
    """Two LoRAs, an IP-Adapter plus and a T2I-Adapter; the degraded pass has the unconditional rows' conditioning."""
    size, names = (96, 64), ('lora', 'lora_everywhere', 'ip_adapter_plus', 't2i_adapter')
    configs = [CASES[n].config for n in names]
    configs[0] = {**configs[0], 'scale': 1.4}
    model = shaken(build(tiny_base, dict(zip('abcd', configs, strict=True))), *(CASES[n] for n in names))
    pipeline = stock(tiny_base)
    load_adapters(pipeline, model, tmp_path)
    references, shown = images(2, seed=6), images(2, size, seed=8)
    with torch.no_grad():
        features = model.adapters['d'].net(shown)  # its network is diffusers' own
    reference = by_hand(pipeline, SOLVERS[solver], 3, size, controls=[(features, (1.0, ALWAYS))],
                        embeds=[image_embeds(tiny_base.parent / 'image_encoder', references, plus=True)])
    expected = reference(noise(size, reference.pipeline.scheduler), cfg=(5.0, ALWAYS), sag=(0.75, ALWAYS))
    batch = picture_batch(TEXTS, SEEDS, size, conditions={'reference': references, 'conditioning_image': shown})
    got = Sampler(SOLVERS[solver], 3, guided(SAG={}))(model, batch)
    assert_close(got, expected, reference.margin)


def counted(model: SDXL, call: Any) -> list[int]:
    """The rows of each call of the UNet."""
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(
        lambda _unet, _args, kwargs: rows.append(len(kwargs['sample'])), with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return rows


def test_outside_its_active_range_a_guidance_costs_nothing(model: SDXL, pipeline: Any) -> None:
    """All rows in one call, SAG's in a second one; the result is that of a loop by hand."""
    size, made = (64, 64), []
    # A step that is partly in an active range is not in it.
    ranges: dict[str, tuple[float, float]] = dict(SAG=(0.2, 0.85), PAG=(0.3, 1.0), CFG=(0.0, 0.7))
    guidances = [dict(type='SAG', active_range=ranges['SAG']),
                 dict(type='PAG', scale=2.0, active_range=ranges['PAG']),
                 dict(type='CFG', scale=5.0, active_range=ranges['CFG'])]
    # u + c; and SAG; and PAG; no CFG; neither
    expected_rows = [4, 4, 2, 6, 2, 4, 2, 4]
    assert counted(model, lambda: made.append(ours(model, guidances, steps=5, size=size))) == expected_rows
    reference = by_hand(pipeline, SOLVERS['euler'], 5, size)
    x = noise(size, reference.pipeline.scheduler)
    expected = reference(x, cfg=(5.0, ranges['CFG']), sag=(0.75, ranges['SAG']), pag=(2.0, ranges['PAG']))
    assert_close(made[0], expected, reference.margin)
    for off in ([dict(type='SAG', scale=0.0), dict(type='PAG', scale=0.0), dict(type='CFG', scale=1.0)], []):
        assert counted(model, lambda off=off: ours(model, off)) == [2, 2, 2]
    assert counted(model, lambda: ours(model, guided(SAG={}, PAG={}))) == [6, 2] * 3


def test_rows_are_unconditional_conditional_perturbed(model: SDXL) -> None:
    """In this order; the perturbed have the conditioning of the conditional."""
    told: list[Tensor] = []
    hook = model.unet.register_forward_pre_hook(
        lambda _unet, _args, kwargs: told.append(kwargs['encoder_hidden_states']), with_kwargs=True)
    ours(model, guided(PAG={}), steps=1)
    ours(model, [dict(type='PAG')], steps=1)
    hook.remove()
    null, own, perturbed = told[0].chunk(3)
    assert not null.any() and own.any() and torch.equal(own, perturbed) and torch.equal(told[1], torch.cat([own, own]))


def test_an_image_does_not_depend_on_its_batch(tiny_base: Path) -> None:
    """Image k of a batch of 4 against itself alone, with all guidances and adapters, and noise in every step: 1e-5."""
    size = (64, 64)
    names = ('ip_adapter_plus', 't2i_adapter')
    model = shaken(build(tiny_base, dict(zip('ab', (CASES[n].config for n in names), strict=True))),
                   *(CASES[n] for n in names))
    prompts, seeds = [*PROMPTS, 'a frog'], [7, 3, 9, 5]
    conditions = {'reference': images(4, seed=6), 'conditioning_image': images(4, size, seed=8)}
    sampler = Sampler(SOLVERS['ancestral'], 3, guided(SAG={}, PAG={}, Rescale=dict(scale=0.3)))
    together = sampler(model, picture_batch(prompts, seeds, size, conditions=conditions))
    for k in range(4):
        cut = {name: tensor[k:k + 1] for name, tensor in conditions.items()}
        alone = sampler(model, picture_batch(prompts[k:k + 1], seeds[k:k + 1], size, conditions=cut))
        assert float((alone - together[k:k + 1]).norm() / alone.norm()) < 1e-5
        assert float((alone - together[k - 1]).norm() / alone.norm()) > 0.1


def test_probes_are_removed(tiny_base: Path, model: SDXL) -> None:
    """Processors are the same objects afterwards, also after an error, and beside image prompts."""
    case = CASES['ip_adapter']
    with_images = shaken(build(tiny_base, dict(a=case.config)), case)
    conditions = {'reference': images(2, seed=6)}
    batch = picture_batch(TEXTS, SEEDS, (64, 64), conditions=conditions)
    for one in (model, with_images):
        before = {name: id(processor) for name, processor in one.unet.attn_processors.items()}
        plain = Sampler(None, 2)(one, batch)
        Sampler(None, 2, guided(PAG=dict(layers=['attn1']), SAG={}))(one, batch)
        hook = one.unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Sampler(None, 2, guided(PAG={}, SAG={}))(one, batch)
        hook.remove()
        assert {name: id(processor) for name, processor in one.unet.attn_processors.items()} == before
        assert torch.equal(Sampler(None, 2)(one, batch), plain)
    with with_images.disable_adapters():
        assert torch.equal(ours(with_images, guided(PAG={}, SAG={})), ours(model, guided(PAG={}, SAG={})))


@pytest.mark.parametrize(('guidances', 'sentence'), [
    (guided(PAG=dict(layers=['mid', 'middle'])), "needs the self-attention 'middle', which this UNet does not have; "
                                                 'it has down_blocks'),
    (guided(PAG=dict(layers=['attn2'])), "the self-attention 'attn2', which this UNet does not have"),
    (guided(SAG={}), 'latents of 4 x 7 are too small for kernel_size=9'),
    (guided(1.0, SAG=dict(kernel_size=15)), '4 x 7 are too small for kernel_size=15')])
def test_guidances_that_do_not_fit_are_refused(model: SDXL, guidances: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ours(model, guidances, size=(32, 56))


@pytest.mark.parametrize(('guidance', 'sentence'), [
    (dict(type='SAG', kernel_size=8), 'SAG: kernel_size=8 must be an odd number'),
    (dict(type='SAG', sigma=0), 'SAG: sigma=0 must be above 0'),
    (dict(type='Rescale', scale=1.5), 'Rescale: scale=1.5 must be from 0'),
    (dict(type='PAG', layers=[]), 'names no self-attention'),
    (dict(type='PAG', layers='up_blocks.('), r"PAG: layers: 'up_blocks.\(' is not a regular expression"),
    (dict(type='PAG', active_range=(0.5, 0.5)), r'active_range=\(0.5, 0.5\) must be \(start, end\)')])
def test_wrong_settings_are_refused(guidance: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(guidances=[guidance])


@pytest.mark.parametrize(('guidances', 'at', 'sentence'), [
    ([dict(type='CFG', scale=1e39)], None, r'step 1 of 3 on \(timestep 667\).*the output of CFG\(scale=1e\+39\)'),
    (guided(SAG={}), 4, r"step 3 of 3 on \(timestep 1\).*the output of the UNet \('uncond'\)"),
    (guided(SAG={}), 3, r'step 2 of 3 on \(timestep 334\).*the output of SAG\(scale=0.75\)'),
    (guided(PAG=dict(scale=1e39)), None, r'step 1 of 3 .*the output of PAG\(scale=1e\+39\)')])
def test_non_finite_latents_are_traced_to_their_source(tiny_base: Path, guidances: list[dict[str, Any]], at: int | None,
                                     sentence: str) -> None:
    """The step, the timestep, and whose part it was: `at` is the call of the UNet that gives NaN."""
    model, calls = SDXL(pretrained=str(tiny_base)), []

    def spoil(_unet: Any, _args: Any, out: tuple[Tensor]) -> Any:
        calls.append(0)
        return (out[0] * float('nan'),) if len(calls) - 1 == at else None
    model.unet.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=f'not finite from {sentence}'):
        ours(model, guidances)


def test_a_control_image_of_another_size_is_refused(tiny_base: Path) -> None:
    model = build(tiny_base, dict(a=CASES['t2i_adapter'].config))
    batch = picture_batch(TEXTS, SEEDS, (64, 64), conditions={'conditioning_image': images(2, (64, 96))})
    start = Start(image=images(2, (64, 64)) * 2 - 1)
    with pytest.raises(ValueError, match=r"output's size \(64 x 64\)"):
        Sampler(None, 4, guided(SAG={}))(model, replace(batch, start=start))
