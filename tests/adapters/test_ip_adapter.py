"""IP-Adapters: bitwise diffusers, a training step against one written by hand, and what they refuse."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import PROMPTS, assert_same, generators, grads, images, make_batch, picture_batch, sampler, stock
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from diffengine_sdxl import rng
from diffengine_sdxl.attention import ImagePrompts
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.prompt_branches import encode_text
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.testing import write_tiny_image_encoder, write_tiny_sdxl

SEEDS = [4, 2]


@pytest.fixture(scope='module')
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_image_encoder(tmp_path_factory.mktemp('encoder') / 'image_encoder')


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many attentions per block as SDXL."""
    return write_tiny_sdxl(tmp_path_factory.mktemp('base') / 'sdxl', layers_per_block=2)


def ip(encoder: Path, **settings: Any) -> dict[str, Any]:
    return dict(type='IPAdapter', image_encoder=str(encoder), image_encoder_subfolder=None, **settings)


def build(base: Path, settings: dict[str, Any], **others: Any) -> SDXL:
    """An SDXL whose IP-Adapters look trained: projection, keys and values are not the fresh ones."""
    model = SDXL(pretrained=str(base), adapters=settings, objective=dict(type='Denoise'), **others)
    with torch.no_grad():
        for name, adapter in model.adapters.items():
            for key, parameter in adapter.named_parameters():
                noise = torch.randn(parameter.shape, generator=rng.generator(name, key))
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def references(num: int = 2, num_images: int = 1, seed: int = 6) -> Tensor:
    return images(num * num_images, seed=seed).unflatten(0, (num, num_images))


def sample(model: SDXL, **conditions: Tensor) -> Tensor:
    return sampler(steps=3)(model, picture_batch(PROMPTS[:2], SEEDS, conditions=conditions))


def diffusers_latents(base: Path, model: SDXL, folder: Path, scale: Any = None,
               masks: list[Tensor | None] | None = None, **conditions: Tensor) -> Tensor:
    """diffusers' latents, from the exported adapters and each sample's own embeddings."""
    from transformers import CLIPVisionModelWithProjection
    pipeline, embeds = stock(base), []
    for name, adapter in model.adapters.items():
        adapter.save(folder / name)
        pixels = conditions[adapter.condition_key]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
        net = CLIPVisionModelWithProjection.from_pretrained(adapter.encoder_source[0]).requires_grad_(False)
        flat = ((pixels - mean) / std).flatten(0, 1)
        if adapter.architecture == 'plus':
            # The pipeline's `encode_image` encodes zero pixels once, as many images as a prompt has.
            null, hidden = (net(x, output_hidden_states=True).hidden_states[-2] for x in (
                torch.zeros_like(flat[:pixels.shape[1]]), flat))
            branches = [null.repeat(len(pixels), 1, 1), hidden]
        else:
            branches = [torch.zeros_like(net(flat).image_embeds), net(flat).image_embeds]
        embeds.append(torch.cat([x.unflatten(0, pixels.shape[:2]) for x in branches]))
    pipeline.load_ip_adapter(folder, subfolder=list(model.adapters), image_encoder_folder=None,
                             weight_name=['ip_adapter.safetensors'] * len(embeds))
    pipeline.unet.requires_grad_(False)
    if scale is not None:
        pipeline.set_ip_adapter_scale(scale)
    # The pipeline repeats all embeddings for each prompt, which mixes up prompts that have their own images: use the
    # first copy, of the unconditional half and of the other.
    pipeline.unet.encoder_hid_proj.register_forward_pre_hook(
        lambda _, args: ([x.unflatten(0, (2, 2, -1))[:, 0].flatten(0, 1) for x in args[0]],))
    return pipeline(
        PROMPTS[:2], height=64, width=64, num_inference_steps=3, generator=generators(SEEDS), output_type='latent',
        ip_adapter_image_embeds=embeds, cross_attention_kwargs={'ip_adapter_masks': masks} if masks else None).images


@pytest.mark.parametrize('num_images', [1, 2])
@pytest.mark.parametrize('architecture', ['base', 'plus'])
def test_latents_are_bitwise_diffusers(base: Path, encoder: Path, tmp_path: Path, architecture: str,
                                       num_images: int) -> None:
    """Two prompts, each with its own images, guided; in full, at 0.6, and in blocks of different scales."""
    shown = references(2, num_images)
    model = build(base, dict(a=ip(encoder, architecture=architecture)))
    seen = []
    for scale in (1.0, 0.6):
        model.adapters['a'].scale = scale
        seen.append(sample(model, reference=shown))
        assert torch.equal(seen[-1], diffusers_latents(base, model, tmp_path, scale, reference=shown))
    blocks = {'down': {'block_2': [0.0, 0.5]}, 'up': {'block_0': [0.0, 1.0, 0.0], 'block_1': 0.25}}
    model = build(base, dict(a=ip(encoder, architecture=architecture, blocks=blocks)))
    seen.append(sample(model, reference=shown))
    assert torch.equal(seen[-1], diffusers_latents(base, model, tmp_path, blocks, reference=shown))
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(seen))


def test_several_adapters_and_masks_are_bitwise_diffusers(base: Path, encoder: Path, tmp_path: Path) -> None:
    """Two masked images of a base adapter beside one of a plus, at other scales."""
    halves = torch.zeros(1, 2, 64, 64)
    halves[:, 0, :, :24], halves[:, 1, :, 40:] = 1, 1
    settings = dict(a=ip(encoder, condition_key='one', mask='where'),
                    b=ip(encoder, condition_key='two', architecture='plus', scale=0.6))
    shown = dict(one=references(2, 2), two=references(2, 1, seed=9))
    model = build(base, settings)
    unmasked = build(base, {**settings, 'a': ip(encoder, condition_key='one')})
    scales = [1.0, 0.6]
    expected = diffusers_latents(base, model, tmp_path, scales, None, **shown)
    assert torch.equal(sample(unmasked, **shown), expected)
    got = sample(model, where=halves.expand(2, -1, -1, -1), **shown)
    assert (got - expected).abs().max() > 1e-3
    assert torch.equal(got, diffusers_latents(base, model, tmp_path, scales, [halves, None], **shown))


@pytest.mark.parametrize('num_images', [1, 2])
@pytest.mark.parametrize('architecture', ['base', 'plus'])
def test_images_are_read_as_in_diffusers(
        base: Path, encoder: Path, tmp_path: Path, architecture: str, num_images: int) -> None:
    """From PIL, of another aspect ratio than the encoder's, through diffusers' image encoder and image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    model = build(base, dict(a=ip(encoder, architecture=architecture)))
    model.adapters['a'].save(tmp_path / 'a')
    shown = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (90 + 30 * i, 70, 3), dtype=np.uint8))
             for i in range(num_images)]
    read = model.adapters['a'].read_image(shown if num_images > 1 else shown[0], (64, 64))
    got = sampler(steps=3)(model, picture_batch(PROMPTS[:1], SEEDS[:1], conditions={'reference': read[None]}))
    pipeline = stock(base, image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder).requires_grad_(False),
                     feature_extractor=CLIPImageProcessorPil.from_pretrained(encoder))
    pipeline.load_ip_adapter(tmp_path, subfolder='a', weight_name='ip_adapter.safetensors')
    pipeline.unet.requires_grad_(False)
    expected = pipeline(PROMPTS[:1], height=64, width=64, num_inference_steps=3, generator=generators(SEEDS[:1]),
                        output_type='latent', ip_adapter_image=[shown]).images
    assert torch.equal(got, expected)


class Attends:
    """A cross-attention by its formula, with image prompts; softmax and matrix products written out."""

    def __init__(self, to_k: Tensor, to_v: Tensor, scale: float, mask: Tensor | None) -> None:
        self.to_k, self.to_v, self.scale, self.mask = to_k, to_v, scale, mask
        self.tokens: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        assert self.tokens is not None
        query = hidden_states @ attn.to_q.weight.T

        def attend(keys: Tensor, values: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, keys, values))
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp()
            return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(-2)

        out = attend(encoder_hidden_states @ attn.to_k.weight.T, encoder_hidden_states @ attn.to_v.weight.T)
        groups = [self.tokens.flatten(1, 2)] if self.mask is None else list(self.tokens.unbind(1))
        for i, tokens in enumerate(groups):
            prompt = attend(tokens @ self.to_k.T, tokens @ self.to_v.T)
            if self.mask is not None:
                side = int(prompt.shape[1] ** 0.5)
                prompt = prompt * functional.interpolate(self.mask[:, i:i + 1], (side, side), mode='bicubic').view(
                    len(prompt), -1, 1).double()
            out = out + self.scale * prompt
        return out @ attn.to_out[0].weight.T + attn.to_out[0].bias


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def resampler(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The perceiver of IP-Adapter plus (tencent-ailab/IP-Adapter, resampler.py): [N, T, E] to [N, tokens, D]."""
    x, latents = x @ w['proj_in.weight'].T + w['proj_in.bias'], w['latents'].expand(len(x), -1, -1)
    for i in range(2):
        p = {k.removeprefix(f'layers.{i}.'): v for k, v in w.items() if k.startswith(f'layers.{i}.')}
        normed = norm(latents, p['ln1.weight'], p['ln1.bias'])
        read = torch.cat([norm(x, p['ln0.weight'], p['ln0.bias']), normed], 1)
        weights = (normed @ p['attn.to_q.weight'].T @ (read @ p['attn.to_k.weight'].T).transpose(1, 2) / 8).softmax(-1)
        latents = weights @ (read @ p['attn.to_v.weight'].T) @ p['attn.to_out.0.weight'].T + latents
        inner = functional.gelu(norm(latents, p['ff.0.weight'], p['ff.0.bias']) @ p['ff.1.net.0.proj.weight'].T)
        latents = inner @ p['ff.1.net.2.weight'].T + latents
    return norm(latents @ w['proj_out.weight'].T + w['proj_out.bias'], w['norm_out.weight'], w['norm_out.bias'])


def step_by_hand(model: SDXL, encoder: Path, batch: Batch, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of `Denoise`, fp64, with the model's frozen base; drops as the paper has them."""
    from transformers import CLIPVisionModelWithProjection
    adapter, draws = model.adapters['a'], rng.Draws(batch.seed, batch.key, batch.epoch)
    names = {n.removeprefix('adapters.a.'): p.detach().clone().requires_grad_() for n, p in model.named_parameters()
             if n.startswith('adapters.a.')}
    w = {n.removeprefix('projector.'): p for n, p in names.items() if n.startswith('projector.')}
    net = CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float64).requires_grad_(False)
    shown = batch.conditions['reference']
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    pixels = ((shown - mean) / std).double()
    pixels[batch.drop['a']] = 0
    if adapter.architecture == 'plus':
        tokens = resampler(w, net(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-2])
    else:
        embeds = net(pixels.flatten(0, 1)).image_embeds.unflatten(0, shown.shape[:2])
        embeds = embeds * ~batch.drop['a'].view(-1, 1, 1)
        tokens = (embeds.flatten(0, 1) @ w['image_embeds.weight'].T + w['image_embeds.bias']).unflatten(-1, (4, -1))
        tokens = norm(tokens, w['norm.weight'], w['norm.bias'])
    tokens = tokens.unflatten(0, shown.shape[:2])
    text, pooled, ids = encode_text(model, replace(batch, drop={}), 'cond')
    text, pooled = (x * ~batch.drop['text'].view(-1, *[1] * (x.dim() - 1)) for x in (text, pooled))
    noise, u = draws.normal('noise', (4, 8, 8)).double(), draws.uniform('timestep')
    t = (u.double() * 1000).long()
    latents = model.latents(batch)
    alpha = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float32).square().neg().add(1).cumprod(0)
    alpha = alpha[t].view(-1, 1, 1, 1).double()
    former = model.unet.attn_processors
    try:
        for i, name in enumerate(adapter.layers):
            processor = Attends(names[f'to_k.{i}.weight'], names[f'to_v.{i}.weight'], adapter.scale, mask)
            processor.tokens = tokens
            model.unet.get_submodule(name).set_processor(processor)
        pred = model.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, text,
                          added_cond_kwargs={'text_embeds': pooled, 'time_ids': ids}).sample
    finally:
        model.unet.set_attn_processor(former)
    loss = (pred - noise).square().mean()
    loss.backward()
    return loss.detach(), {f'adapters.a.{n}': p.grad for n, p in names.items() if p.grad is not None}


@pytest.mark.parametrize(('architecture', 'num_images', 'masked'),
                         [('base', 1, False), ('base', 2, True), ('plus', 2, False)])
def test_a_training_step_is_the_formula(tiny_base: Path, encoder: Path, architecture: str, num_images: int,
                                        masked: bool) -> None:
    """In fp64, with the image, the text and both dropped in one batch; loss and every gradient."""
    settings = ip(encoder, architecture=architecture, depth=2, scale=0.7, mask='where' if masked else None)
    model = build(tiny_base, dict(a=settings), dtype='float64')
    mask = (images(4, channels=num_images, seed=8) > 0.3).float() if masked else None
    batch = make_batch(4, conditions={'reference': references(4, num_images), **({'where': mask} if masked else {})},
                       drop={'a': torch.tensor([0, 1, 0, 1]).bool(), 'text': torch.tensor([0, 0, 1, 1]).bool()})
    loss, gradients = grads(model, batch)
    expected, theirs = step_by_hand(model, encoder, batch, mask)
    assert_same({'loss': loss, **gradients}, {'loss': expected, **theirs}, 1e-10)
    other, _ = grads(model, replace(batch, drop={**batch.drop, 'a': torch.zeros(4).bool()}))
    assert abs(other - loss) > 1e-6


@pytest.mark.parametrize('architecture', ['base', 'plus'])
def test_gradients_with_checkpointing(base: Path, encoder: Path, architecture: str) -> None:
    """Bitwise the same, even if a call of the UNet with other images comes between forward and backward."""
    results = []
    for checkpointing in (False, True):
        model = build(base, dict(a=ip(encoder, architecture=architecture, mask='where')),
                      gradient_checkpointing=checkpointing)
        batch = make_batch(2, conditions={'reference': references(), 'where': images(2, channels=1)})
        model.train()
        loss = model(batch, mode='loss')['loss']
        with torch.no_grad():
            model(replace(batch, conditions={**batch.conditions, 'reference': references(seed=1)}), mode='loss')
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert set(results[-1]) == {n for n, _ in model.trainables()['a']} == set(model.state_dict())
    assert_same(results[1], results[0])


def test_keys_and_values_that_act_nowhere_do_not_train(base: Path, encoder: Path) -> None:
    """Weight decay would shrink them; all that is declared has a gradient, at scale 0 too, of zeros."""
    model = build(base, dict(a=ip(encoder, blocks='style')))
    adapter = model.adapters['a']
    acting = [i for i, n in enumerate(adapter.layers) if n.startswith('up_blocks.0.attentions.1.')]
    batch = make_batch(2, conditions={'reference': references()})
    _, gradients = grads(model, batch)
    layers = {f'adapters.a.to_{x}.{i}.weight' for i in acting for x in 'kv'}
    assert set(gradients) == layers | {f'adapters.a.projector.{n}' for n, _ in adapter.projector.named_parameters()}
    assert set(gradients) == {n for n, _ in model.trainables()['a']} == set(model.state_dict())
    assert len(adapter.all_parameters()) > len(gradients) and all(g.any() for g in gradients.values())
    adapter.scale = 0.0
    assert not any(g.any() for g in grads(model, batch)[1].values())


def test_fresh_keys_and_values_are_the_bases(tiny_base: Path, encoder: Path) -> None:
    """Also if a LoRA wraps the base's layers; targets of peft that are short names don't match the adapter's."""
    from peft import LoraConfig, inject_adapter_in_model
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=ip(encoder)))
    adapter = model.adapters['a']

    def same() -> bool:
        return all(torch.equal(getattr(adapter, x)[i].weight, getattr(
            model.unet.get_submodule(f'{name}.{x}'), 'base_layer', model.unet.get_submodule(f'{name}.{x}')).weight)
            for i, name in enumerate(adapter.layers) for x in ('to_k', 'to_v'))

    assert same() and not any(a is b for a in adapter.parameters() for b in model.unet.parameters())
    adapter.detach(model)
    inject_adapter_in_model(LoraConfig(target_modules=['to_k', 'to_v'], init_lora_weights=False), model.unet)
    with rng.fork(0, 'adapter', 'a'):
        adapter.attach(model)
    assert same() and not any('lora' in n for n, _ in adapter.named_parameters())
    assert all(type(layer) is nn.Linear for layer in (*adapter.to_k, *adapter.to_v))


@pytest.mark.parametrize('architecture', ['base', 'plus'])
def test_embeddings_may_come_from_the_data(tiny_base: Path, encoder: Path, architecture: str) -> None:
    """The encoder's output as a condition gives the same latents and gradients; 'average' is the mean."""
    model = build(tiny_base, dict(a=ip(encoder, architecture=architecture)))
    adapter, shown = model.adapters['a'], references(2, 2)
    embeds = adapter.encode(make_batch(conditions={'reference': shown}))['embeds']
    assert embeds.shape[:2] == (2, 2) and embeds.shape[-1] == (24 if architecture == 'base' else 32)
    assert torch.equal(sample(model, reference=shown), sample(model, reference_embeds=embeds))
    rows = adapter.encode_rows(make_batch(conditions={'reference': shown}))['embeds']  # training reads row by row
    steps = [grads(model, make_batch(conditions=c, drop={'a': torch.tensor([False, True])}))
             for c in ({'reference': shown}, {'reference_embeds': rows})]
    assert_same(*(step[1] for step in steps))
    one, several = (adapter.encode(make_batch(conditions={'reference': s}))['embeds']
                    for s in (shown[:, :1], shown[:, 0]))
    assert torch.equal(one, several) and torch.equal(one, adapter.encode(make_batch(
        conditions={'reference_embeds': one[:, 0]}))['embeds'])
    for multi_image in ('average', 'concat'):
        adapter.multi_image = multi_image
        results = [sample(model, reference=shown), sample(model, reference_embeds=embeds.mean(1, keepdim=True))]
        assert torch.equal(*results) == (multi_image == 'average')
    with pytest.raises(UserError, match="'reference_embeds' is .*adapter 'a' takes"):
        sample(model, reference_embeds=embeds[..., 1:])


def test_adapters_share_an_image_encoder(tiny_base: Path, encoder: Path, tmp_path: Path) -> None:
    """Loaded once, registered once, in the model's dtype; dropped with the last adapter that uses it."""
    other = write_tiny_image_encoder(tmp_path / 'other', seed=1)
    settings = dict(a=ip(encoder), b=ip(encoder, architecture='plus', condition_key='two'),
                    c=ip(other, condition_key='three'))
    model = build(tiny_base, settings, dtype='float64')
    a, b, c = (model.adapters[name] for name in 'abc')
    assert a.encoder is b.encoder is not c.encoder and len(model.shared_encoders) == 2
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.shared_encoders.parameters())
    assert not any('encoder' in n for x in (a, b, c) for n, _ in x.named_parameters())
    shown = dict(reference=references(), two=references(seed=1), three=references(seed=2))
    model.train()
    assert not a.encoder.net.training
    alone = sample(build(tiny_base, {n: settings[n] for n in 'bc'}, dtype='float64'), **shown)
    model.adapters.pop('a').detach(model)
    assert len(model.shared_encoders) == 2 and torch.equal(sample(model, **shown), alone)
    model.adapters.pop('b').detach(model)
    model.adapters.pop('c').detach(model)
    assert len(model.shared_encoders) == 0
    assert not any(isinstance(p, ImagePrompts) for p in model.unet.attn_processors.values())


@pytest.mark.parametrize('trainable', [True, False])
def test_half_precision(tiny_base: Path, encoder: Path, trainable: bool) -> None:
    """Beside a bf16 base a trained adapter is fp32 and a frozen one bf16; both are close to the fp32 latents."""
    settings = ip(encoder, architecture='plus', trainable=trainable)
    model, exact = (build(tiny_base, dict(a=settings), **s) for s in (dict(mixed_precision='bf16'), {}))
    dtype = torch.float32 if trainable else torch.bfloat16
    assert {p.dtype for p in model.adapters['a'].parameters()} == {dtype}
    assert model.adapters['a'].encoder.net.dtype == torch.bfloat16
    batch = make_batch(2, conditions={'reference': references()})
    if trainable:
        assert all(g.dtype == dtype and g.isfinite().all() and g.any() for g in grads(model, batch)[1].values())
    far = (sample(model, reference=references()) - sample(exact, reference=references())).norm()
    assert far < 0.1 * sample(exact, reference=references()).norm()
    base = SDXL(pretrained=str(tiny_base), mixed_precision='bf16')
    with model.disable_adapters():
        assert torch.equal(sample(model, reference=references()), sample(base))


@pytest.mark.parametrize(('conditions', 'message'), [
    ({}, "'a' reads 'reference', but the samples hold"),
    ({'reference': (2, 3, 48, 64)}, r'is \(3, 48, 64\).*takes \(3, 64, 64\).*ImagePrompt.*size=64'),
    ({'reference': (2, 1, 64, 64)}, r'is \(1, 64, 64\)'),
    ({'reference': (2, 3, 64, 64), 'where': None}, "needs the mask 'where', but the samples hold"),
    ({'reference': (2, 3, 64, 64), 'where': (2, 32, 64)}, r"'where' of adapter 'a' is 32 x 64.*output's size, 64 x 64"),
    ({'reference': (2, 3, 64, 64), 'where': (2, 2, 64, 64)}, r'\(2, 2, 64, 64\).*takes \[B, 1, H, W\]'),
    ({'reference': (2, 2, 3, 64, 64), 'where': (2, 64, 64)}, r'one for each of its 2 images')])
def test_conditions_that_do_not_fit_are_refused(tiny_base: Path, encoder: Path, conditions: dict[str, Any],
                                                message: str) -> None:
    """An image that is missing or of another size; masks of another size or number."""
    model = SDXL(pretrained=str(tiny_base), objective=dict(type='Denoise'),
                 adapters=dict(a=ip(encoder, mask='where' if 'where' in conditions else None)))
    tensors = {k: torch.rand(v) for k, v in conditions.items() if v is not None}
    with pytest.raises(UserError, match=message):
        model(make_batch(2, conditions=tensors), mode='loss')


def test_a_gray_image_is_one_mask(tiny_base: Path, encoder: Path) -> None:
    """[B, H, W], [B, 1, H, W] and the RGB that PackInputs makes of it: the same latents."""
    model = build(tiny_base, dict(a=ip(encoder, mask='where')))
    mask = (images(2, channels=1, seed=3) > 0.5).float()
    made = [sample(model, reference=references(), where=m) for m in (mask, mask[:, 0], mask.expand(-1, 3, -1, -1))]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(architecture='full'), "architecture='full'.*'base'"),
    (dict(multi_image='sum'), "multi_image='sum'.*'concat'"), (dict(active_range=(1, 0)), 'active_range'),
    (dict(blocks='layout'), r'down_blocks\.2\.attentions\.1.*does not have'),
    (dict(image_encoder='nowhere/at/all'), 'nowhere/at/all'), (dict(image_encoder_subfolder='sub'), 'sub')])
def test_options_that_do_not_fit_are_refused(tiny_base: Path, encoder: Path, settings: dict[str, Any],
                                             message: str) -> None:
    with pytest.raises(UserError, match=message):
        SDXL(pretrained=str(tiny_base), adapters=dict(a={**ip(encoder), **settings}))
