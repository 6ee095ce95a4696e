"""Loss and every gradient of a training step against the same step written with the classes of diffusers."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers import T2IAdapter as Network
from diffusers.training_utils import compute_snr
from parity import assert_same, grads, images, make_batch, t2i
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch

CUBIC = dict(type='Denoise', timesteps=dict(type='CubicTimesteps'))
ADAPTER = dict(adapters=dict(adapter=t2i(scale=0.8)))


class Reference:
    """One training step as diffusers' example scripts write it."""

    def __init__(self, base: Path, adapter: Path | None, dtype: torch.dtype, trains: tuple[str, ...],
                 scheduler: dict[str, Any]) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(base, subfolder='unet')
        self.vae = AutoencoderKL.from_pretrained(base, subfolder='vae')
        self.text_encoder = CLIPTextModel.from_pretrained(base, subfolder='text_encoder')
        self.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(base, subfolder='text_encoder_2')
        self.tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder=f'tokenizer{n}') for n in ('', '_2')]
        self.adapter = Network.from_pretrained(adapter) if adapter else None
        config = {**DDPMScheduler.load_config(base, subfolder='scheduler'), **scheduler}
        self.scheduler = DDPMScheduler.from_config(config)
        self.modules: dict[str, nn.Module] = {
            n: getattr(self, n) for n in ('unet', 'vae', 'text_encoder', 'text_encoder_2', 'adapter')
            if getattr(self, n) is not None}
        for name, module in self.modules.items():
            # As the scripts do; a dropout of 0 in training mode changes strides, and with them the last bits.
            module.to(dtype).requires_grad_(name in trains).train(name in trains)
        self.dtype = dtype

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """`encode_prompt` of train_t2i_adapter_sdxl.py."""
        states = []
        for tokenizer, encoder in zip(self.tokenizers, (self.text_encoder, self.text_encoder_2), strict=True):
            ids = tokenizer(texts, padding='max_length', max_length=77, truncation=True, return_tensors='pt').input_ids
            out = encoder(ids, output_hidden_states=True)
            pooled = out[0]
            states.append(out.hidden_states[-2].view(len(texts), 77, -1))
        return torch.cat(states, -1), pooled.view(len(texts), -1)

    def step(self, batch: Batch, cubic: bool = True, scale: float = 0.8,
             gamma: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients; noise, timestep and VAE sample by their documented keys."""
        draws = rng.Draws(batch.seed, batch.key, batch.epoch)
        assert batch.img is not None
        # One image and one caption a call, as ours: what is frozen may be cached, and kernels go by the batch size.
        posteriors = [self.vae.encode(image).latent_dist for image in batch.img.to(self.dtype).split(1)]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ('mean', 'std'))
        latents = (mean + std * draws.normal('vae', mean.shape[1:]).to(self.dtype)) * self.vae.config.scaling_factor
        # In the memory layout of the VAE's output for the whole batch.
        latents = latents.detach().contiguous(memory_format=torch.channels_last if len(batch) > 1 else
                                              torch.contiguous_format)
        noise, u = draws.normal('noise', latents.shape[1:]).to(self.dtype), draws.uniform('timestep')
        timesteps = ((1 - u ** 3) * 1000 if cubic else u.double() * 1000).long().clamp(0, 999)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        trains = any(p.requires_grad for e in (self.text_encoder, self.text_encoder_2) for p in e.parameters())
        text, pooled = self.encode(batch.text) if trains else map(torch.cat, zip(
            *(self.encode([caption]) for caption in batch.text), strict=True))
        kwargs = {}
        if self.adapter is not None:
            features = self.adapter(batch.conditions['conditioning_image'].to(self.dtype))
            kwargs['down_intrablock_additional_residuals'] = [f * scale for f in features]
        pred = self.unet(noisy, timesteps, text, added_cond_kwargs={'text_embeds': pooled, 'time_ids': batch.time_ids},
                         **kwargs).sample
        if self.scheduler.config.prediction_type == 'epsilon':
            target = noise
        else:
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(pred, target, reduction='none').mean(dim=(1, 2, 3))
        if gamma is not None:
            snr = compute_snr(self.scheduler, timesteps)
            weight = torch.stack([snr, gamma * torch.ones_like(snr)], 1).min(1)[0]
            loss = loss * (weight / (snr + (self.scheduler.config.prediction_type == 'v_prediction')))
        total = loss.mean()
        total.backward()
        found = {f'{"adapters.adapter.net" if name == "adapter" else name}.{n}': p.grad
                 for name, module in self.modules.items() for n, p in module.named_parameters() if p.grad is not None}
        return total.detach(), found


CASES: dict[str, dict[str, Any]] = {
    'epsilon': dict(model=ADAPTER),
    'uniform timesteps': dict(model={**ADAPTER, 'objective': dict(type='Denoise')}, step=dict(cubic=False)),
    'v_prediction': dict(model={**ADAPTER, 'prediction_type': 'v_prediction'},
                         scheduler=dict(prediction_type='v_prediction')),
    'zero terminal snr': dict(model={**ADAPTER, 'prediction_type': 'v_prediction', 'zero_terminal_snr': True},
                              scheduler=dict(prediction_type='v_prediction', rescale_betas_zero_snr=True)),
    # With the usual gamma of 5 all of these timesteps would weigh 1.
    'min-snr': dict(model={**ADAPTER, 'objective': {**CUBIC, 'weighting': dict(type='MinSNR', gamma=0.02)}},
                    step=dict(gamma=0.02)),
    'unet': dict(model=dict(trainable=('unet',))),
    'unet and adapter': dict(model={**ADAPTER, 'trainable': ('unet',)}),
    'text encoders': dict(model=dict(trainable=('text_encoder', 'text_encoder_2'))),
    'everything but the vae': dict(model={**ADAPTER, 'trainable': ('unet', 'text_encoder', 'text_encoder_2')})}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['fp64', 'fp32'])
@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradients(tiny_base: Path, tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """fp64: 1e-10. fp32: bitwise."""
    spec = CASES[case]
    model = SDXL(pretrained=str(tiny_base), **{'objective': CUBIC, **spec['model']})
    adapter = None
    if model.adapters:
        adapter = tmp_path / 'adapter'
        model.adapters['adapter'].save(adapter)
    trains = (*spec['model'].get('trainable', ()), *(['adapter'] if adapter else []))
    reference = Reference(tiny_base, adapter, dtype, trains, spec.get('scheduler', {}))
    batch = make_batch(3)
    expected_loss, expected = reference.step(batch, **spec.get('step', {}))
    loss, found = grads(model.to(dtype), batch)
    assert loss.dtype == dtype and torch.isfinite(loss) and all(g.dtype == dtype for g in found.values())
    assert_same({'loss': loss}, {'loss': expected_loss}, 1e-12 if dtype == torch.float64 else 0)
    assert_same(found, expected, 1e-10 if dtype == torch.float64 else 0)
    declared = {n for parameters in model.trainables().values() for n, _ in parameters}
    assert declared == set(found) == set(model.state_dict())
    assert all(g.abs().max() > 0 for g in found.values())


def test_dtype_float64_is_the_whole_step(tiny_base: Path, tmp_path: Path) -> None:
    """With the option instead of `.to`, a fresh adapter follows."""
    model = SDXL(pretrained=str(tiny_base), dtype='float64', objective=CUBIC, **ADAPTER)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.adapters['adapter'].save(tmp_path)
    reference = Reference(tiny_base, tmp_path, torch.float64, ('adapter',), {})
    loss, found = grads(model, make_batch())
    expected_loss, expected = reference.step(make_batch())
    assert_same({'loss': loss, **found}, {'loss': expected_loss, **expected}, 1e-10)


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> SDXL:
    return SDXL(pretrained=str(tiny_base), objective=CUBIC, **ADAPTER)


def rows(batch: Batch, index: list[int]) -> Batch:
    """Some samples of a batch."""
    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: take(v) for k, v in value.items()}
        return [value[i] for i in index] if isinstance(value, list) else value if value is None else value[index]
    names = ('text', 'time_ids', 'key', 'epoch', 'seed', 'img', 'latents', 'conditions', 'drop', 'weight', 'mask')
    return replace(batch, **{n: take(getattr(batch, n)) for n in names})


def with_latents(batch: Batch) -> Batch:
    """Latents in place of the images."""
    num = len(batch)
    latents = torch.randn((num, 4, 8, 8), generator=torch.Generator().manual_seed(8))
    return replace(batch, img=None, latents=latents)


@pytest.mark.parametrize('parts', [[[0], [1]], [[0, 1], [2, 3]], [[3, 1], [2, 0]]])
def test_a_batch_is_the_mean_of_its_parts(tiny_base: Path, parts: list[list[int]]) -> None:
    """Loss and gradients, fp64: any split, any order; with drops, weights and masks."""
    model = SDXL(pretrained=str(tiny_base), objective=CUBIC, dtype='float64', **ADAPTER)
    num = sum(map(len, parts))
    batch = make_batch(num, drop={'text': torch.arange(num) % 2 == 1, 'adapter': torch.arange(num) == 0},
                       weight=torch.linspace(0.5, 2, num), mask=images(num, (8, 8), 1))
    loss, found = grads(model, batch)
    halves = [grads(model, rows(batch, part)) for part in parts]
    mean = {k: sum(g[k] for _, g in halves) / len(parts) for k in found}
    assert_same({'loss': loss, **found}, {'loss': sum(x for x, _ in halves) / len(parts), **mean}, 1e-10)


def inputs_of_unet(model: SDXL, batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t and t that the UNet gets in training."""
    seen: list[Any] = []
    handle = model.unet.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    model.train()
    model(batch, mode='loss')
    handle.remove()
    return seen[0]['sample'], seen[0]['timestep']


def test_noise_and_timestep_depend_on_the_key_only(model: SDXL) -> None:
    """Noise, timestep and VAE sample: bitwise under any split or order (the VAE itself: 1e-6)."""
    batch = with_latents(make_batch(4))
    x, t = inputs_of_unet(model, batch)
    for index in ([2, 0, 3, 1], [1], [3, 2]):
        other_x, other_t = inputs_of_unet(model, rows(batch, index))
        assert torch.equal(other_x, x[index]) and torch.equal(other_t, t[index])
    assert len(t.unique()) == 4
    again = inputs_of_unet(model, batch)
    torch.manual_seed(99)
    assert torch.equal(again[0], inputs_of_unet(model, batch)[0])
    for change in (dict(epoch=batch.epoch + 1), dict(seed=batch.seed + 1), dict(key=[f'{k}x' for k in batch.key])):
        other_x, other_t = inputs_of_unet(model, replace(batch, **change))
        assert not torch.equal(other_x, x) and not torch.equal(other_t, t)
    with_images = make_batch(4)
    latents = model.latents(with_images)
    for index in ([2, 0, 3, 1], [1]):
        torch.testing.assert_close(model.latents(rows(with_images, index)), latents[index], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.latents(replace(with_images, epoch=batch.epoch + 1)), latents, atol=1e-3)


def test_gradient_checkpointing_changes_nothing(tiny_base: Path) -> None:
    """Bitwise the same, while the blocks really run twice."""
    trainable = ('unet', 'text_encoder', 'text_encoder_2')
    results, counts = [], []
    for on in (False, True):
        model = SDXL(pretrained=str(tiny_base), objective=CUBIC, trainable=trainable, gradient_checkpointing=on,
                     adapters=dict(adapter=t2i(active_range=(0.2, 1.0))))
        count = [0, 0]
        block = model.unet.mid_block.attentions[0].transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        layers = [m for n, m in model.text_encoder_2.named_modules() if n.endswith('layers.0.self_attn')]
        layers[0].register_forward_pre_hook(lambda *_, c=count: c.__setitem__(1, c[1] + 1))
        results.append(grads(model, make_batch(2)))
        counts.append(count)
    assert counts == [[1, 1], [2, 2]]
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1])


@pytest.mark.parametrize('null_prompt', ['zeros', 'empty'])
@pytest.mark.parametrize('embedded', [False, True])
def test_dropped_text(tiny_base: Path, null_prompt: str, embedded: bool) -> None:
    """A dropped row is the null text, of prompts and of precomputed embeddings."""
    model = SDXL(pretrained=str(tiny_base), objective=CUBIC, null_prompt=null_prompt)
    batch = make_batch(3, text=['a', 'b', 'c'], drop={'text': torch.tensor([False, True, False])})
    if embedded:
        full = model.encode(replace(batch, drop={}))
        batch = replace(batch, text=['wrong'] * 3, text_embeds=full.text, pooled=full.pooled)
    got = model.encode(batch)
    empty = model.encode(make_batch(3, text=['a', '', 'c']))
    expected = [empty.text.clone(), empty.pooled.clone()]
    if null_prompt == 'zeros':
        expected[0][1], expected[1][1] = 0, 0
    torch.testing.assert_close(got.text, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pooled, expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(got.time_ids, batch.time_ids)


def test_weight_and_mask(model: SDXL) -> None:
    """Factors of a sample's and of a latent's loss."""
    batch = make_batch(2)
    loss = [float(model(rows(batch, [i]), mode='loss')['loss']) for i in range(2)]
    weighted = float(model(replace(batch, weight=torch.tensor([3.0, 0.5])), mode='loss')['loss'])
    assert weighted == pytest.approx((3 * loss[0] + 0.5 * loss[1]) / 2, rel=1e-5)
    halves = []
    for half in range(2):
        mask = torch.zeros(2, 1, 8, 8)
        mask[..., half * 4:half * 4 + 4] = 1
        halves.append(float(model(replace(batch, mask=mask), mode='loss')['loss']))
    assert sum(halves) == pytest.approx(sum(loss) / 2, rel=1e-5) and min(halves) > 0.1 * sum(halves)


def test_precomputed_latents_and_embeddings(model: SDXL) -> None:
    """They are used, bitwise, and the encoders are not called."""
    batch = make_batch(2)
    conditioning = model.encode(batch)
    expected, _ = grads(model, batch)
    full = replace(batch, img=None, latents=model.latents(batch), text=['wrong'] * 2, text_embeds=conditioning.text,
                   pooled=conditioning.pooled)
    called: list[str] = []
    handles = [getattr(model, n).register_forward_hook(lambda *_, n=n: called.append(n))
               for n in ('text_encoder', 'text_encoder_2')]
    handles.append(model.vae.encoder.register_forward_hook(lambda *_: called.append('vae')))
    got, _ = grads(model, full)
    assert torch.equal(got, expected) and called == []
    grads(model, batch)
    assert called == ['vae', 'vae', 'text_encoder', 'text_encoder_2', 'text_encoder', 'text_encoder_2']  # row by row
    for handle in handles:
        handle.remove()
    # One of the two embeddings is not enough: the prompt is encoded.
    half = model.encode(replace(batch, text_embeds=torch.zeros_like(conditioning.text)))
    assert torch.equal(half.text, conditioning.text)


@pytest.mark.parametrize(('change', 'sentence'), [
    (dict(img=None), "neither 'img' nor 'latents'"),
    (dict(img=images(2, (60, 64))), "'img' is 60 x 64.*divisible by 16 .the VAE 8")])
def test_images_that_cannot_be_encoded(model: SDXL, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model(make_batch(2, **change), mode='loss')


def test_a_step_changes_neither_batch_nor_model(model: SDXL) -> None:
    """The UNet pops from the lists it gets and adds in place; a second step is bitwise the first."""
    batch = make_batch(2)
    before = copy.deepcopy(batch)
    first = grads(model, batch)
    second = grads(model, batch)
    assert torch.equal(first[0], second[0])
    assert_same(first[1], second[1])
    assert torch.equal(batch.img, before.img) and torch.equal(batch.time_ids, before.time_ids)
    assert torch.equal(batch.conditions['conditioning_image'], before.conditions['conditioning_image'])


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_mixed_precision(tiny_base: Path, model: SDXL, precision: str) -> None:
    """Frozen parts are stored in half, what trains in fp32; the loss is fp32 and close to the fp32 one."""
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    half = SDXL(pretrained=str(tiny_base), objective=CUBIC, mixed_precision=precision, **ADAPTER)
    assert half.unet.dtype == half.text_encoder.dtype == half.text_encoder_2.dtype == dtype
    assert half.vae.dtype == torch.float32
    batch = make_batch(3)
    expected, expected_grads = grads(model, batch)
    loss, found = grads(half, batch)
    assert loss.dtype == torch.float32 and {g.dtype for g in found.values()} == {torch.float32}
    assert float(loss) == pytest.approx(float(expected), rel=0.01) and float(loss) != float(expected)
    flat = [torch.cat([g[k].flatten() for k in sorted(g)]) for g in (found, expected_grads)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99
    with torch.no_grad():
        out = half.predict(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), half.encode(batch), torch.zeros(3, 2))
    assert out.dtype == dtype


@pytest.mark.parametrize('part', ['unet', 'text_encoder_2'])
def test_mixed_precision_of_parts_that_train(tiny_base: Path, part: str) -> None:
    """They are stored in fp32 and compute in bf16."""
    full = SDXL(pretrained=str(tiny_base), objective=CUBIC, trainable=(part,))
    half = SDXL(pretrained=str(tiny_base), objective=CUBIC, trainable=(part,), mixed_precision='bf16')
    dtypes = {n: getattr(half, n).dtype for n in ('unet', 'text_encoder', 'text_encoder_2')}
    assert dtypes == {n: torch.float32 if n == part else torch.bfloat16 for n in dtypes}
    seen: set[torch.dtype] = set()
    module = half.unet.mid_block if part == 'unet' else half.text_encoder_2.text_projection
    module.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    loss, found = grads(half, make_batch())
    expected, expected_grads = grads(full, make_batch())
    assert seen == {torch.bfloat16} and {g.dtype for g in found.values()} == {torch.float32}
    assert found.keys() == expected_grads.keys()
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    flat = [torch.cat([g[k].flatten() for k in sorted(g)]) for g in (found, expected_grads)]
    assert F.cosine_similarity(*flat, dim=0) > 0.98
