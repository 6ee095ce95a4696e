"""Reconstruction against diffusers' VAE, written out in fp64; what trains, what is refused, and that it learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from parity import assert_same, make_batch, t2i
from runs import curves, train
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import OBJECTIVES
from diffengine_sdxl.structures import Batch

SIZE = (32, 24)


def build(base: Path, dtype: str | None = 'float64', **options: Any) -> SDXL:
    """A model that trains its VAE."""
    model = SDXL(pretrained=str(base), dtype=dtype, trainable=['vae'], objective=dict(type='Reconstruct', **options))
    model.train()
    return model


def batch_of(num: int = 3, **changes: Any) -> Batch:
    return make_batch(num, SIZE, conditions={}, **changes)


def reference(base: Path, batch: Batch, kl_weight: float, power: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients by diffusers' VAE and the formulas of the docstring."""
    vae = AutoencoderKL.from_pretrained(base, subfolder='vae').double()
    assert batch.img is not None
    x = batch.img.double()
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    variance = log_variance.exp()
    keys = zip(batch.seed.tolist(), batch.key, batch.epoch.tolist(), strict=True)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=rng.generator(*key, 'vae')) for key in keys])
    found = vae.decoder(vae.post_quant_conv(mean + variance.sqrt() * noise.double()))
    off = found - x
    kl = (0.5 * (mean ** 2 + variance - 1 - log_variance)).flatten(1).sum(dim=1)
    # In [0, 1], where the peak is 1.
    psnr = -10 * torch.log10((off / 2).square().flatten(1).mean(dim=1))
    losses = {'loss_reconstruction': (off ** 2 if power == 2 else off.abs()).mean(), 'loss_kl': kl_weight * kl.mean()}
    sum(losses.values()).backward()
    return ({**losses, 'psnr': psnr.mean()},
            {f'vae.{name}': p.grad for name, p in vae.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(('kl_weight', 'power'), [(1e-6, 2), (0.1, 2), (0.01, 1)])
def test_losses_and_gradients(tiny_base: Path, kl_weight: float, power: int) -> None:
    """1e-10, of encoder and decoder; the base's other parts have none."""
    model, batch = build(tiny_base, kl_weight=kl_weight, power=power), batch_of()
    expected, gradients = reference(tiny_base, batch, kl_weight, power)
    losses = model(batch, mode='loss')
    assert {v.dtype for v in losses.values()} == {torch.float64} and not losses['psnr'].requires_grad
    assert_same({k: v.detach() for k, v in losses.items()}, {k: v.detach() for k, v in expected.items()}, 1e-10)
    total, logged = model.parse_losses(losses)
    assert set(logged) == {'loss', 'loss_reconstruction', 'loss_kl', 'psnr'}
    torch.testing.assert_close(total, losses['loss_reconstruction'] + losses['loss_kl'], rtol=1e-12, atol=0)
    total.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(found, gradients, 1e-10)
    assert set(found) == set(model.state_dict()) == {n for n, p in model.named_parameters() if p.requires_grad}
    for part in ('encoder', 'decoder', 'quant_conv', 'post_quant_conv'):
        assert any(n.startswith(f'vae.{part}.') and g.abs().max() > 0 for n, g in found.items()), part


def test_decoder_only(tiny_base: Path) -> None:
    """The same reconstruction and decoder's gradients; the encoder has none, and there is no KL."""
    batch = batch_of()
    expected, gradients = reference(tiny_base, batch, 0.0, 2)
    model = build(tiny_base, decoder_only=True)
    losses = model(batch, mode='loss')
    assert set(losses) == {'loss_reconstruction', 'psnr'}
    model.parse_losses(losses)[0].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected.pop('loss_kl')
    assert_same({k: v.detach() for k, v in losses.items()}, {k: v.detach() for k, v in expected.items()}, 1e-10)
    assert_same(found, {k: v for k, v in gradients.items() if k.startswith(('vae.decoder.', 'vae.post_quant_conv.'))},
                1e-10)
    assert set(found) == set(model.state_dict()) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_draw_depends_on_the_sample_only(tiny_base: Path) -> None:
    """Of (seed, key, epoch), not of the place in the batch or of torch's generator; fp32 for an fp32 VAE."""
    model, batch = build(tiny_base, dtype=None), batch_of()

    def loss(batch: Batch) -> float:
        with torch.no_grad():
            found = model(batch, mode='loss')
        assert {v.dtype for v in found.values()} == {torch.float32}
        return float(found['loss_reconstruction'])
    assert batch.img is not None
    first = loss(batch)
    torch.manual_seed(4)
    assert loss(batch) == first
    turned = replace(batch, img=batch.img.flip(0), key=batch.key[::-1], epoch=batch.epoch.flip(0))
    assert loss(turned) == pytest.approx(first, rel=1e-5)
    others = [replace(batch, **change) for change in (
        {'epoch': batch.epoch + 1}, {'key': ['a', 'b', 'c']}, {'seed': batch.seed + 1}, {'img': batch.img.flip(0)})]
    assert len({loss(other) for other in [batch, *others]}) == 5


@pytest.mark.parametrize(('options', 'words'), [
    (dict(trainable=[]), r"trains the VAE alone, but model.trainable is \[\] and nothing would train; set trainable"),
    (dict(trainable=['vae', 'unet']), r"\['vae', 'unet'\] and vae, unet would train"),
    (dict(trainable=['vae'], adapters=dict(a=t2i())), 'vae, a would train.*remove the adapters'),
    (dict(trainable=[], adapters=dict(a=t2i())), r'model.trainable is \[\] and a would train')])
def test_what_else_trains_is_refused(tiny_base: Path, options: dict[str, Any], words: str) -> None:
    model = SDXL(pretrained=str(tiny_base), objective=dict(type='Reconstruct'), **options)
    with pytest.raises(ValueError, match=words):
        model(make_batch(1, SIZE), mode='loss')


def test_a_frozen_adapter_is_allowed(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), objective=dict(type='Reconstruct'), trainable=['vae'],
                 adapters=dict(a=t2i(trainable=False)))
    assert model(make_batch(1, (32, 32)), mode='loss')['loss_reconstruction'] > 0


def test_invalid_batches_and_settings(tiny_base: Path) -> None:
    model = build(tiny_base, dtype=None)
    for batch in (batch_of(1, img=None), batch_of(1, img=None, latents=torch.zeros(1, 4, 4, 3))):
        with pytest.raises(ValueError, match="have no 'img', which Reconstruct needs; .* cached latents"):
            model(batch, mode='loss')
    with pytest.raises(ValueError, match=r"'img' is 32 x 20; its sides must be divisible by 8"):
        model(make_batch(1, (32, 20)), mode='loss')
    for options, words in ((dict(kl_weight=-1e-9), 'kl_weight=-1e-09 must not be negative'),
                           (dict(power=3), 'power=3 is unknown; choose one of 1, 2'), (dict(power=0), 'power=0')):
        with pytest.raises(ValueError, match=f'Reconstruct: {words}'):
            OBJECTIVES.build(dict(type='Reconstruct', **options))


def test_denoising_neither_trains_the_vae_nor_its_decoder(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), objective=dict(type='Denoise'), trainable=['vae'])
    names = [name for name, _ in model.trainables()['vae']]
    assert names and not [n for n in names if n.startswith(('vae.decoder.', 'vae.post_quant_conv.'))]
    with pytest.raises(ValueError, match='Denoise cannot train the VAE'):
        model(make_batch(1), mode='loss')


def test_it_learns(tiny_base: Path, tmp_path: Path) -> None:
    """The shapes world's VAE config on a tiny VAE: the loss falls, and the export holds the trained weights."""
    runner = train(tmp_path, {
        'model.pretrained': str(tiny_base), 'model.config': None, 'resolution': 32, 'train_cfg.max_iters': 24,
        'train_dataloader.batch_size': 4, 'train_dataloader.dataset.length': 4, 'optim_wrapper.optimizer.lr': 5e-3,
        'param_scheduler.num_warmup_steps': 0, 'default_hooks.logger.interval': 1, 'custom_hooks': [],
        'default_hooks.checkpoint.interval': 24}, name='shapes_vae')
    rows = curves(tmp_path)
    first, last = ([sum(row[k] for row in part) / 6 for k in ('loss_reconstruction', 'psnr')]
                   for part in (rows[:6], rows[-6:]))
    assert last[0] < 0.9 * first[0] and last[1] > first[1] + 0.5, (first, last)
    exported = AutoencoderKL.from_pretrained(tmp_path / 'step24' / 'pipeline', subfolder='vae').state_dict()
    begun = AutoencoderKL.from_pretrained(tiny_base, subfolder='vae').state_dict()
    assert_same(exported, runner.bare_model.vae.state_dict())
    assert all(not torch.equal(exported[name], begun[name]) for name in ('encoder.conv_in.weight',
                                                                         'decoder.conv_out.weight'))
