"""Components that are loaded at their first use: the same model, and digests of what they are loaded from."""

import json
import shutil
from pathlib import Path
from typing import Any

import original_format
import pytest
import torch
from parity import make_batch, picture_batch, sampler, stock

from diffengine_sdxl.loading.base import load_components, load_tokenizers
from diffengine_sdxl.loading.deferred import Deferred
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_image_encoder, write_tiny_sdxl

PARTS = ('vae', 'text_encoder', 'text_encoder_2')


def is_lazy(model: SDXL) -> list[str]:
    return [part for part in PARTS if isinstance(getattr(model, part), Deferred)]


def test_the_same_model(tiny_base: Path, tmp_path: Path) -> None:
    """Images, trained weights, the order of weights, the pipeline. What trains or is adapted is loaded at once."""
    ip = dict(type='IPAdapter', architecture='plus', image_encoder=str(write_tiny_image_encoder(tmp_path / 'encoder')))
    te = dict(type='LoRA', rank=2, parts=['text_encoder'])
    for adapters, trainable, lazy in (
            (dict(lora=dict(type='LoRA', rank=2), ip=ip), [], [*PARTS]), (dict(te=te), [], ['vae', 'text_encoder_2']),
            (dict(word=dict(type='TextualInversion', token='<x>', init='a')), ['vae'], [])):
        settings: dict[str, Any] = dict(pretrained=str(tiny_base), adapters=adapters, trainable=trainable,
                                        mixed_precision='bf16' if 'ip' in adapters else 'no')
        eager, model = SDXL(**settings), SDXL(**settings, lazy_encoders=True)
        assert is_lazy(model) == lazy and repr(model) == repr(eager)
        assert model.state_dict().keys() == eager.state_dict().keys()
        unloaded = sum(p.numel() * p.itemsize for p in eager.parameters()) - sum(
            p.numel() * p.itemsize for p in model.parameters())
        assert model.deferred_bytes == unloaded and bool(unloaded) == bool(lazy)
        model.train()
        model.to('cpu')
        assert is_lazy(model) == lazy
        batch = picture_batch(['a <x>'], [1], (32, 32))
        if 'ip' in adapters:
            batch.conditions['reference'] = torch.full((1, 3, 64, 64), 0.25)
        images = [one.eval().decode(sampler(steps=1)(one, batch)) for one in (eager, model)]  # type: ignore[union-attr]
        assert torch.equal(*images)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in eager.named_parameters()]
        assert not model.deferred_bytes and not model.vae.training
    pipeline = SDXL(str(tiny_base), lazy_encoders=True).to_diffusers()
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, stock(tiny_base).vae.encoder.conv_in.weight)


def test_every_source(tiny_base: Path, tmp_path: Path) -> None:
    """A single file, another VAE in a file or a folder, and random weights: as if loaded at once."""
    base = original_format.write_tiny_with_two_widths(tmp_path / 'base')
    file, vae = tmp_path / 'whole.safetensors', tiny_base / 'vae'
    original_format.write(file, original_format.original_tensors(base))
    weights = vae / 'diffusion_pytorch_model.safetensors'
    for pretrained, other, config in ((file, vae, base), (None, None, tiny_base), (base, weights, tiny_base)):
        arguments = [None if path is None else str(path) for path in (pretrained, other, config)]
        dtypes = dict.fromkeys(('unet', *PARTS), torch.float32)
        eager, lazy = (load_components(*arguments, None, dtypes, 3, lazy=parts) for parts in ((), PARTS))
        model = torch.nn.Module()
        for part in PARTS:
            lazy[part].place(model, part, lambda: torch.device('cpu'))
            size = 'latent_channels' if part == 'vae' else 'hidden_size'
            assert getattr(lazy[part].config, size) == getattr(eager[part].config, size)
            states = [module.state_dict() for module in (eager[part], getattr(model, part).load())]
            assert all(torch.equal(states[0][key], states[1][key]) for key in {**states[0], **states[1]})
        if pretrained != file:
            loaded = load_tokenizers(arguments[0], arguments[2])
            assert all(loaded[n].get_vocab() == eager[n].get_vocab() for n in ('tokenizer', 'tokenizer_2'))


def test_digests_go_by_content(tiny_base: Path, tmp_path: Path, model: SDXL) -> None:
    """Weights, settings and dtype; not the path, who wrote it, or how latents are scaled."""
    def digests(source: Path | None = tiny_base, config: Path | None = None, seed: int = 0,
                dtype: torch.dtype = torch.float32) -> dict[str, str]:
        parts = load_components(source and str(source), None, config and str(config), None, dict.fromkeys(
            ('unet', *PARTS), dtype), seed, {'unet': model.unet}, lazy=PARTS)
        return {part: parts[part].digest(lambda path: path.read_bytes().hex()) for part in PARTS}

    copy, own = shutil.copytree(tiny_base, tmp_path / 'copy'), digests()
    path = copy / 'vae' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, 'scaling_factor': 0.5, '_diffusers_version': '0', '_name_or_path': 'x'}))
    assert digests(copy) == own
    path.write_text(json.dumps({**config, 'norm_num_groups': 2}))
    assert {part for part in PARTS if digests(copy)[part] != own[part]} == {'vae'}
    others = [digests(write_tiny_sdxl(tmp_path / 'other', seed=1)), digests(dtype=torch.bfloat16),
              *(digests(None, tiny_base, seed) for seed in (0, 1))]
    assert all(len({each[part] for each in (own, *others)}) == 5 for part in PARTS)


def test_image_prompts_go_by_encoder_and_architecture(tiny_base: Path, tmp_path: Path) -> None:
    """And a condition that two adapters read differently is not kept."""
    from diffengine_sdxl.models.cache_plan import cache_plan
    encoders = [write_tiny_image_encoder(tmp_path / str(seed), seed) for seed in (0, 1)]

    class Files:
        def file_digest(self, path: Path) -> str:
            return path.read_bytes().hex()

    def images(**adapters: dict[str, Any]) -> dict[str, str]:
        configs = {name: dict(type='IPAdapter', **{'image_encoder': str(encoders[0]), **config})
                   for name, config in adapters.items()}
        model = SDXL(str(tiny_base), lazy_encoders=True, adapters=configs)
        plan = cache_plan(model, Files())  # type: ignore[arg-type]
        assert plan.moments and plan.text and not plan.empty_when_dropped
        return plan.images

    one = images(a={}, b=dict(condition_key='b', architecture='plus'))
    assert images(x=dict(image_encoder=str(shutil.copytree(encoders[0], tmp_path / 'copy')))) == {
        'reference': one['reference']}
    (tmp_path / 'copy' / 'preprocessor_config.json').unlink()  # CLIP's own size, of the encoder
    settings = json.loads((encoders[0] / 'preprocessor_config.json').read_text())
    (tmp_path / 'copy' / 'preprocessor_config.json').write_text(json.dumps({**settings, 'image_std': [1.0, 1.0, 1.0]}))
    others = [images(a=dict(image_encoder=str(e)))['reference'] for e in (encoders[1], tmp_path / 'copy')]
    assert len({*one.values(), *others}) == 4
    assert images(a={}, b=dict(architecture='plus')) == {} and images(a={}, b={}) == {'reference': one['reference']}


def test_an_objective_that_reads_images_has_no_latents_cached(tiny_base: Path) -> None:
    """Nor has a VAE that trains, nor text that is adapted."""
    from diffengine_sdxl.models.cache_plan import cache_plan

    class Files:
        def file_digest(self, path: Path) -> str:
            return path.name

    def plan(**settings: Any) -> Any:
        return cache_plan(SDXL(str(tiny_base), lazy_encoders=True, **settings), Files())  # type: ignore[arg-type]

    assert plan(objective=dict(type='Denoise')).moments and plan(null_prompt='empty').empty_when_dropped
    assert plan(objective=dict(type='ImageTextContrast')).moments is None
    assert plan(objective=dict(type='Reconstruct'), trainable=['vae']).moments is None
    assert plan(adapters=dict(a=dict(type='LoRA', rank=2, parts=['text_encoder_2']))).text is None


def test_a_load_draws_no_number_of_the_step(tiny_base: Path) -> None:
    """The global random state is as before."""
    model = SDXL(None, config=str(tiny_base), lazy_encoders=True)
    state = torch.get_rng_state()
    model.latents(make_batch(2))
    model.encode(make_batch(2))
    assert is_lazy(model) == [] and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AttributeError):
        _ = model.vae.no_such_thing
