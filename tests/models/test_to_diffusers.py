"""A model as a diffusers pipeline: bitwise our sampler's latents, and nothing done to it changes the model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from kinds import CASES, SEEDS, build, conditions, ip_adapter, lora, shaken
from parity import PROMPTS, assert_same, generators, images, picture_batch, sampler
from PIL import Image
from torch import Tensor

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.diffusers_pipeline import TASKS, to_diffusers
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Start
from diffengine_sdxl.testing import write_tiny_image_encoder, write_tiny_refiner, write_tiny_sdxl

EDGES, DEPTH = images(2, seed=0), images(2, seed=1)
SHOWN = {'conditioning_image': EDGES, 'reference': images(2, seed=2)}
T2I, CONTROLNET = CASES['t2i_adapter'].config, CASES['controlnet'].config
EVERYWHERE, WORD = CASES['lora_everywhere'].config, CASES['textual_inversion'].config
PARTS = ('unet', 'vae', 'text_encoder', 'text_encoder_2')


def make(base: Path, configs: dict[str, Any], **settings: Any) -> SDXL:
    """A model whose adapters look trained."""
    kinds = {case.config['type']: case for case in CASES.values()}
    return shaken(build(base, configs, **settings), *(kinds[config['type']] for _, config in sorted(configs.items())
                                                      if config.get('trainable', True)))


def ours(model: SDXL, num: int = 2, steps: int = 3, strength: float | None = None,
         conditions: dict[str, Tensor] | None = None, **fields: Any) -> Tensor:
    """Latents of our sampler, of the first `num` images."""
    cut = {name: tensor[:num] for name, tensor in (conditions or {}).items()}
    batch = picture_batch(PROMPTS[:num], SEEDS[:num], conditions=cut, **fields)
    return sampler(steps=steps).changed(strength=strength)(model, batch)


def theirs(pipeline: Any, num: int = 2, steps: int = 3, **arguments: Any) -> Tensor:
    """Latents of a diffusers pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    if 'strength' not in arguments:
        arguments |= {'height': 64, 'width': 64}
    return pipeline(PROMPTS[:num], num_inference_steps=steps, output_type='latent', guidance_scale=5.0,
                    generator=generators(SEEDS[:num]), **pipeline.call_arguments, **arguments).images


def arguments_of(model: SDXL, conditions: dict[str, Tensor], num: int) -> dict[str, Any]:
    """The conditions as arguments of the diffusers pipeline."""
    arguments: dict[str, Any] = {}
    for adapter in (a for a in model.adapters.values() if a.condition_key is not None):
        shown = conditions[adapter.condition_key][:num]
        arguments.setdefault('image' if adapter.condition_has_image_size else 'ip_adapter_image', []).append(
            shown if adapter.condition_has_image_size else adapter.encoder.normalize(shown))
    if len(arguments.get('image', [])) == 1:
        arguments['image'] = arguments['image'][0]
    return arguments


def both(model: SDXL, conditions: dict[str, Tensor], num: int = 2, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Our latents and those of diffusers, from noise."""
    arguments |= arguments_of(model, conditions, num)
    return ours(model, num, conditions=conditions), theirs(to_diffusers(model), num, **arguments)


@contextmanager
def unchanged(model: SDXL, conditions: dict[str, Tensor], num: int = 1) -> Iterator[None]:
    """Check that what is done inside leaves the model unchanged, in every respect that a pipeline could reach."""
    def seen() -> dict[str, Any]:
        modules = {name: module for name, module in model.named_modules() if name}
        configs = {part: dict(getattr(model, part).config) if part in ('unet', 'vae') else
                   getattr(model, part).config.to_dict() for part in PARTS}
        return {
            'modules': {name: (id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
                               len(module._load_state_dict_pre_hooks)) for name, module in modules.items()},
            'attributes': {name: sorted(vars(module)) for name, module in modules.items()},
            'weights': {name: (id(p), p.dtype, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()},
            'processors': {name: id(p) for name, p in model.unet.attn_processors.items()},
            'configs': json.dumps(configs, default=str), 'words': [len(model.tokenizer), len(model.tokenizer_2)],
            'scalings': [dict(m.scaling) for m in modules.values() if hasattr(m, 'scaling')]}

    latents = ours(model, num, conditions=conditions)  # first: transformers' encoders register hooks when called
    before, values = seen(), {name: p.detach().clone() for name, p in model.named_parameters()}
    yield
    after = seen()
    assert [key for key in after if after[key] != before[key]] == []
    assert_same(dict(model.named_parameters()), values)
    assert torch.equal(ours(model, num, conditions=conditions), latents)


@pytest.mark.parametrize('kind', CASES)
def test_every_kind_is_bitwise_our_sampler(tiny_base: Path, kind: str) -> None:
    """At each scale of the case; the conversion changes neither the model nor the random state."""
    case = CASES[kind]
    model, shown = shaken(build(tiny_base, dict(a=case.config)), case), conditions(case.config)
    # diffusers repeats image embeddings for each prompt, which mixes up the images of several prompts.
    num, seen = 1 if 'reference' in shown else 2, []
    with unchanged(model, shown):
        state = torch.get_rng_state()
        to_diffusers(model)
        assert torch.equal(torch.get_rng_state(), state)
    for scale in case.scales:
        model.adapters['a'].scale = scale
        own, stock = both(model, shown, num)
        assert torch.equal(own, stock)
        seen.append(stock)
    assert all((seen[0] - other).abs().max() > 1e-3 for other in seen[1:])


WEAK_T2I, DEPTH_OF = {**T2I, 'scale': 0.7}, {'condition_key': 'depth', 'scale': 0.4}
COMPOSED: dict[str, dict[str, Any]] = {
    'lora and ip': dict(a=EVERYWHERE, b=ip_adapter(scale=0.6, blocks={'up': {'block_0': [0.0, 0.5]}, 'mid': 1.0})),
    'lora x 2 and t2i': dict(a=lora(scale=0.3), b=lora(kind='loha'), c={**WEAK_T2I, 'active_range': (0.0, 0.7)}),
    't2i x 2 and ip plus': dict(a=WEAK_T2I, b={**T2I, **DEPTH_OF},
                                c=ip_adapter(architecture='plus', num_tokens=8, depth=2, ff_mult=2)),
    'controlnet x 2 and lora': dict(a={**CONTROLNET, 'active_range': (0.3, 1.0)}, b={**CONTROLNET, **DEPTH_OF},
                                    c=EVERYWHERE),
    'controlnet, ip and a word': dict(a={**CONTROLNET, 'scale': 0.5}, b=ip_adapter(num_tokens=6), c=WORD),
    'word x 2 and dora': dict(a=WORD, b=CASES['dora_everywhere'].config, c={**WORD, 'token': 'red'}),
    'ip x 2': dict(a=ip_adapter(scale=0.5), b={**ip_adapter(), 'condition_key': 'depth'}),
    'frozen': dict(a={**T2I, 'trainable': False}, b=ip_adapter(trainable=False)),
    'nothing': {},
}


@pytest.mark.parametrize('kind', COMPOSED)
def test_compositions_are_bitwise_our_sampler(tiny_base: Path, kind: str) -> None:
    """Scales, active ranges, blocks, projectors that diffusers' loader cannot read, several of a kind."""
    configs, shown = COMPOSED[kind], {**SHOWN, 'depth': DEPTH}
    model = make(tiny_base, configs)
    num = 1 if any(config['type'] == 'IPAdapter' for config in configs.values()) else 2
    own, stock = both(model, shown, num)
    assert torch.equal(own, stock)
    for adapter in model.adapters.values():
        name, scale = adapter.name, adapter.scale
        adapter.scale = 0.0
        assert (ours(model, num, conditions=shown) - own).abs().max() > 1e-4, name
        adapter.scale = scale


MASK = torch.zeros(2, 1, 64, 64)
MASK[:, :, 8:40, 16:] = 1


@pytest.mark.parametrize('configs', [dict(a=EVERYWHERE, b=ip_adapter()), dict(a={**CONTROLNET, 'scale': 0.5})])
@pytest.mark.parametrize('task', TASKS[1:])
def test_other_tasks_are_bitwise_our_sampler(tiny_base: Path, task: str, configs: dict[str, Any]) -> None:
    """Image-to-image and inpainting, with adapters inside the base and beside it."""
    model, picture = make(tiny_base, configs), images(2, seed=3)
    num = 1 if 'b' in configs else 2
    mask = MASK[:num] if task == 'inpainting' else None
    own = ours(model, num, 4, 0.6, SHOWN, start=Start(image=picture[:num] * 2 - 1, mask=mask))
    arguments = arguments_of(model, SHOWN, num)
    if 'image' in arguments:
        arguments['control_image'] = arguments.pop('image')
    masked = {} if mask is None else {'mask_image': mask}
    stock = theirs(to_diffusers(model, task), num, 4, image=picture[:num], strength=0.6, **arguments, **masked)
    assert torch.equal(own, stock)


def test_a_mask_of_an_image_prompt(tiny_base: Path) -> None:
    """An argument of the call in diffusers."""
    model = make(tiny_base, dict(a=ip_adapter(mask='where'), b={**ip_adapter(), 'condition_key': 'depth'}))
    shown = {'reference': images(1, seed=2), 'depth': DEPTH[:1], 'where': MASK[:1]}
    own, stock = both(model, shown, 1, cross_attention_kwargs={'ip_adapter_masks': [MASK[:1], None]})
    assert torch.equal(own, stock)
    assert not torch.equal(own, both(model, shown, 1)[1])


@pytest.mark.parametrize('size', [64, 48])
def test_images_go_through_the_feature_extractor(tiny_base: Path, tmp_path: Path, size: int) -> None:
    """Two PIL images of different aspect ratios; with the encoder's own settings."""
    folder = write_tiny_image_encoder(tmp_path / 'encoder', image_size=size)
    settings = json.loads((folder / 'preprocessor_config.json').read_text())
    settings.update(image_mean=[0.4, 0.5, 0.6], size={'shortest_edge': size + 16})
    (folder / 'preprocessor_config.json').write_text(json.dumps(settings))
    model = make(tiny_base, dict(a={**ip_adapter(), 'image_encoder': str(folder)}))
    shown = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (90 + 30 * i, 70, 3), dtype=np.uint8))
             for i in range(2)]
    own = ours(model, 1, conditions={'reference': model.adapters['a'].read_image(shown, (64, 64))[None]})
    assert torch.equal(own, theirs(to_diffusers(model), 1, ip_adapter_image=[shown]))


@pytest.fixture(scope='module')
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_refiner(tmp_path_factory.mktemp('to_diffusers') / 'refiner')


@pytest.mark.parametrize('task', [None, 'inpainting'])
def test_a_refiner(refiner: Path, task: str | None) -> None:
    """From an image, with an aesthetic score, and with a LoRA and a new token in its only text encoder."""
    model = make(refiner, dict(a=lora(parts=['unet', 'text_encoder_2']), b=WORD))
    picture, mask = images(2, seed=3), None if task is None else MASK
    ids = [[64.0, 64, 0, 0, score] for score in (6.0, 2.5)]
    own = ours(model, 2, 4, 0.6, start=Start(image=picture * 2 - 1, mask=mask), time_ids=torch.tensor(ids[:1] * 2),
               negative_time_ids=torch.tensor(ids[1:] * 2))
    pipeline = to_diffusers(model, task)
    cls = diffusers.StableDiffusionXLInpaintPipeline if task else diffusers.StableDiffusionXLImg2ImgPipeline
    assert type(pipeline) is cls
    assert pipeline.config.requires_aesthetics_score and not pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.text_encoder is None and pipeline.tokenizer is None
    masked = {} if mask is None else {'mask_image': mask}
    assert torch.equal(own, theirs(pipeline, 2, 4, image=picture, strength=0.6, **masked))


def test_a_unet_that_takes_a_mask(tmp_path: Path) -> None:
    """Nine channels; 'inpainting' by default."""
    base = write_tiny_sdxl(tmp_path / 'base', in_channels=9)
    model, picture = make(base, dict(a=lora())), images(2, seed=3)
    own = ours(model, 2, 4, 0.6, start=Start(image=picture * 2 - 1, mask=MASK))
    pipeline = to_diffusers(model)
    assert type(pipeline) is diffusers.StableDiffusionXLInpaintPipeline
    assert torch.equal(own, theirs(pipeline, 2, 4, image=picture, mask_image=MASK, strength=0.6))
    for task in TASKS[:2]:
        with pytest.raises(UserError, match=rf"{task} with a UNet of 9 input channels.*task='inpainting'"):
            to_diffusers(model, task)
    with pytest.raises(UserError, match="'control'.*reads 9 channels.*the 4 of the latents"):
        to_diffusers(make(base, dict(control=CONTROLNET)))


def test_scheduler_and_null_prompt(tiny_base: Path) -> None:
    """The sampler's scheduler with its settings, else Euler's; each with the model's noise schedule."""
    settings = dict(type='DPMSolverMultistepScheduler', algorithm_type='sde-dpmsolver++', use_karras_sigmas=True)
    model = make(tiny_base, dict(a=lora()), zero_terminal_snr=True, prediction_type='v_prediction', null_prompt='empty',
                 sampler=dict(type='Sampler', scheduler=settings, num_inference_steps=4))
    pipeline = to_diffusers(model)
    assert type(pipeline.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert not pipeline.config.force_zeros_for_empty_prompt
    assert torch.equal(model.sampler(model, picture_batch(PROMPTS[:2], SEEDS)), theirs(pipeline, steps=4))
    model.sampler = None
    euler = to_diffusers(model).scheduler
    assert type(euler) is diffusers.EulerDiscreteScheduler and euler.config.prediction_type == 'v_prediction'
    assert euler.config.rescale_betas_zero_snr
    plain = to_diffusers(SDXL(pretrained=str(tiny_base)))
    assert plain.config.force_zeros_for_empty_prompt and plain.watermark is None


ALL = dict(t2i=T2I, style=EVERYWHERE, dora=CASES['dora'].config, face=ip_adapter(), word=WORD)


def test_weights_are_shared_and_nothing_else(tiny_base: Path) -> None:
    """Every weight shares the model's memory, in a frozen Parameter of its own; only the text encoders' embeddings,
    which a new token enlarges, are new."""
    model = make(tiny_base, ALL)
    pipeline = to_diffusers(model)
    own = {p.data_ptr(): p for p in (*model.parameters(), *model.buffers()) if p.numel()}
    found = {f'{name}.{key}': p for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)
             for key, p in (*module.named_parameters(), *module.named_buffers()) if p.numel()}
    new = {key for key, p in found.items() if p.data_ptr() not in own}
    assert {key.split('.')[-2] for key in new} == {'token_embedding'} and len(new) == 2
    shared = {key: own[p.data_ptr()] for key, p in found.items() if key not in new}
    assert {p.data_ptr() for p in shared.values()} >= {p.data_ptr() for p in model.unet.parameters()}
    assert all(found[key] is not p and not found[key].requires_grad for key, p in shared.items())
    assert any(p.requires_grad for p in shared.values())
    assert not any(module.training for module in pipeline.components.values() if isinstance(module, torch.nn.Module))
    inner = {id(m) for module in pipeline.components.values() if isinstance(module, torch.nn.Module)
             for m in module.modules()}
    assert not inner & {id(module) for module in model.modules()}


def test_changes_to_the_pipeline_do_not_change_the_model(tiny_base: Path, tmp_path: Path) -> None:
    """Loading, scaling, fusing, deleting and unloading LoRAs, scales of image prompts, processors, embeddings, configs,
    weights, dtype, FreeU, tiling, a scheduler's steps, calls."""
    from safetensors.torch import load_file
    other = make(tiny_base, dict(other=lora(parts=list(PARTS[::2]), targets=['to_k', 'ff.net.2', 'q_proj'])))
    other.adapters['other'].save(tmp_path)
    model = make(tiny_base, ALL)
    with unchanged(model, SHOWN):
        pipeline = to_diffusers(model)
        call = partial(theirs, pipeline, 1, **arguments_of(model, SHOWN, 1))
        made = [call()]
        assert torch.equal(made[0], ours(model, 1, conditions=SHOWN))
        pipeline.set_adapters(['style', 'dora'], [0.4, 0.7])
        made.append(call())
        model.adapters['style'].scale, model.adapters['dora'].scale = 0.4, 0.7
        assert torch.equal(made[1], ours(model, 1, conditions=SHOWN))
        model.adapters['style'].scale = model.adapters['dora'].scale = 1.0
        pipeline.load_lora_weights(load_file(tmp_path / 'pytorch_lora_weights.safetensors'), adapter_name='other')
        assert set(pipeline.get_list_adapters()['unet']) == {'style', 'dora', 'other'}
        pipeline.set_adapters(['style', 'other'], [0.4, 1.0])
        made.append(call())
        pipeline.delete_adapters(['dora'])
        pipeline.fuse_lora(lora_scale=0.7)
        made.append(call())
        pipeline.unfuse_lora()
        pipeline.unet.fuse_lora()
        pipeline.set_ip_adapter_scale(0.1)
        made.append(call())
        pipeline.unload_lora_weights()
        made.append(call())
        pipeline.unload_ip_adapter()
        pipeline.enable_freeu(0.9, 0.2, 1.1, 1.2)
        pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        pipeline.load_textual_inversion(torch.ones(32), token='<new>', text_encoder=pipeline.text_encoder,
                                        tokenizer=pipeline.tokenizer)
        made.append(theirs(pipeline, 1, image=EDGES[:1]))
        pipeline.unet.load_state_dict({k: torch.zeros_like(v) for k, v in pipeline.unet.state_dict().items()})
        pipeline.text_encoder.load_state_dict({k: v + 1 for k, v in pipeline.text_encoder.state_dict().items()})
        pipeline.text_encoder_2.resize_token_embeddings(7)
        pipeline.unet.register_to_config(sample_size=3)
        pipeline.text_encoder.config.hidden_act = 'relu'
        pipeline.vae.enable_tiling()
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.to(torch.bfloat16)
        for part in PARTS:
            getattr(pipeline, part).requires_grad_(True).train()
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(made) for b in made[:i])


def test_a_token_has_its_own_rows(tiny_base: Path) -> None:
    """Also if the encoders have spare rows, which diffusers writes to in place."""
    model = make(tiny_base, dict(a=WORD))
    for encoder in (model.text_encoder, model.text_encoder_2):
        encoder.resize_token_embeddings(516).requires_grad_(False)
    with unchanged(model, {}, 2):
        own, stock = both(model, {})
    assert torch.equal(own, stock)


def test_loras_fused_and_saved(tiny_base: Path, tmp_path: Path) -> None:
    """Fused and unloaded, the pipeline is saved as any other; fusing rounds by 1e-5."""
    model = make(tiny_base, dict(a=EVERYWHERE, b=lora(scale=0.5)))
    with unchanged(model, {}):
        pipeline, own = to_diffusers(model), ours(model)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path / 'fused')
        fused = theirs(pipeline)
    assert 0 < (fused - own).norm() < 1e-5 * own.norm()
    torch.testing.assert_close(ours(SDXL(pretrained=str(tmp_path / 'fused'))), fused, rtol=0, atol=0)


def test_training_changes_the_pipeline(tiny_base: Path) -> None:
    """The weights are the model's, also in a pipeline made before a training step."""
    model = make(tiny_base, dict(t2i=T2I, style=EVERYWHERE))
    pipeline, shown = to_diffusers(model), {'image': EDGES}
    before = theirs(pipeline, **shown)
    shaken(model, CASES['lora'], CASES['t2i_adapter'])
    after = theirs(pipeline, **shown)
    assert not torch.equal(before, after) and torch.equal(after, ours(model, conditions=SHOWN))
    with model.disable_adapters():
        assert torch.equal(theirs(to_diffusers(model)), ours(SDXL(pretrained=str(tiny_base))))


def test_half_precision(tiny_base: Path) -> None:
    """Components keep their dtypes; fp32 networks beside a bf16 base are cast, as diffusers has no autocast."""
    model = make(tiny_base, dict(t2i=T2I, style=EVERYWHERE, face=ip_adapter()), mixed_precision='bf16')
    pipeline = to_diffusers(model)
    assert all(getattr(pipeline, name).dtype == getattr(model, name).dtype for name in PARTS)
    assert pipeline.vae.dtype == torch.float32 and pipeline.adapter.dtype == torch.bfloat16
    assert model.adapters['t2i'].net.dtype == torch.float32
    own, stock = both(model, SHOWN, 1)
    assert (own - stock).norm() < 0.03 * own.norm()


@pytest.mark.parametrize(('configs', 'task', 'parts'), [
    (dict(pose=T2I), 'image-to-image', ['image-to-image', 'T2I-Adapters']),
    (dict(pose=T2I, edges=CONTROLNET), 'text-to-image', ['T2I-Adapters and ControlNets']),
    (dict(pose={**T2I, 'active_range': (0.2, 1.0)}), 'text-to-image', ["'pose'", '(0.2, 1.0)', 'first step']),
    (dict(pose=T2I, depth={**T2I, 'active_range': (0.0, 0.5)}), 'text-to-image', ["'depth' has 0.5", "'pose' 1"]),
    (dict(style=lora(active_range=(0.0, 0.5))), 'text-to-image', ["'style'", '(0.0, 0.5)']),
    (dict(face=ip_adapter(active_range=(0.5, 1.0))), 'text-to-image', ["'face'", '(0.5, 1.0)']),
    (dict(face=ip_adapter(multi_image='average')), 'text-to-image', ["'face'", "multi_image='average'"]),
    (dict(style=lora()), 'text-to-imagee', ["'text-to-imagee'", "Did you mean 'text-to-image'"]),
])
def test_unsupported_by_diffusers(tiny_base: Path, configs: dict[str, Any], task: str, parts: list[str]) -> None:
    """The error names the adapter and the setting."""
    with pytest.raises(UserError) as caught:
        to_diffusers(make(tiny_base, configs), task)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_other_bases_and_kinds_are_refused(tiny_base: Path, refiner: Path, tmp_path: Path) -> None:
    """Text-to-image by a refiner, channels of no pipeline, two image encoders, a kind without `add_to_pipeline`."""
    with pytest.raises(UserError, match="no text-to-image pipeline for a refiner.*task='image-to-image'"):
        to_diffusers(SDXL(pretrained=str(refiner)), 'text-to-image')
    base = write_tiny_sdxl(tmp_path / 'base', in_channels=8)
    with pytest.raises(UserError, match='inpainting with a UNet of 8 input channels'):
        to_diffusers(SDXL(pretrained=str(base)))
    encoder = write_tiny_image_encoder(tmp_path / 'other', seed=1)
    with pytest.raises(UserError, match="'face' and 'style' have different ones"):
        to_diffusers(make(tiny_base, dict(face=ip_adapter(), style={**ip_adapter(), 'image_encoder': str(encoder)})))
    model = SDXL(pretrained=str(tiny_base))
    model.adapters['mine'] = adapter = Adapter()
    adapter.name = 'mine'
    with pytest.raises(UserError, match="'mine' cannot be part of a .*diffusers pipeline: .*Adapter"):
        to_diffusers(model)


def test_the_models_method(tiny_base: Path) -> None:
    """By task; an image encoder has no part in sampling, here as there."""
    settings = dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = build(tiny_base, dict(eye=dict(type='ImageEncoder', **settings)))
    assert torch.equal(theirs(model.to_diffusers()), ours(model))
    assert type(model.to_diffusers(task='inpainting')) is diffusers.StableDiffusionXLInpaintPipeline
