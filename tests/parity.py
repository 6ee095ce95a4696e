"""Shared by the parity tests: batches, our SDXL, and stock pipelines and a loop by hand to compare with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch

PROMPTS = ['a red circle', 'two blue squares on a very long sheet of paper', '']
SIZE = (64, 64)
#: Solvers of first and second order, multistep, and with noise in every step.
SOLVERS: dict[str, dict[str, Any]] = {
    'euler': dict(type='EulerDiscreteScheduler'), 'ancestral': dict(type='EulerAncestralDiscreteScheduler'),
    'ddim': dict(type='DDIMScheduler'), 'dpm++ 2m': dict(type='DPMSolverMultistepScheduler'),
    'dpm++ sde': dict(type='DPMSolverMultistepScheduler', algorithm_type='sde-dpmsolver++', use_karras_sigmas=True),
    'heun': dict(type='HeunDiscreteScheduler'), 'unipc': dict(type='UniPCMultistepScheduler'),
    'lcm': dict(type='LCMScheduler')}


def images(num: int, size: tuple[int, int] = SIZE, channels: int = 3, seed: int = 5) -> Tensor:
    """Random images, [num, channels, H, W] in [0, 1]."""
    return torch.rand((num, channels, *size), generator=torch.Generator().manual_seed(seed))


def make_batch(num: int = 2, size: tuple[int, int] = SIZE, **changes: Any) -> Batch:
    """`num` samples with images, conditions and time ids; `changes` replace fields."""
    ids = [[float(size[0] + 8 * i), float(size[1] + 24 * i), float(i), float(2 * i), *map(float, size)]
           for i in range(num)]
    fields: dict[str, Any] = dict(
        text=[PROMPTS[i % 3] for i in range(num)], time_ids=torch.tensor(ids), key=[f'sample {i}' for i in range(num)],
        epoch=torch.arange(num) + 3, seed=torch.full((num,), 11), img=images(num, size) * 2 - 1,
        conditions={'conditioning_image': images(num, size, seed=6)})
    return Batch(**{**fields, **changes})


def picture_batch(prompts: list[str], seeds: list[int], size: tuple[int, int] = SIZE, **changes: Any) -> Batch:
    """A batch for a sampler: no images, the output size as original and target size."""
    num = len(prompts)
    fields: dict[str, Any] = dict(
        text=prompts, time_ids=torch.tensor([[*size, 0, 0, *size]] * num, dtype=torch.float32), size=size,
        key=[f'prompt {i}' for i in range(num)], epoch=torch.zeros(num, dtype=torch.int64), seed=torch.tensor(seeds))
    return Batch(**{**fields, **changes})


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One generator per seed, as for stock pipelines."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sampler(scheduler: str = 'EulerDiscreteScheduler', steps: int = 4, scale: float = 5.0, eta: float = 0.0,
            active_range: tuple[float, float] = (0.0, 1.0), **settings: Any) -> Sampler:
    """Our sampler, with classifier-free guidance."""
    guidance = dict(type='CFG', scale=scale, active_range=active_range)
    return Sampler({'type': scheduler, **settings}, steps, [guidance], eta)


def stock(base: Path, cls: str = 'StableDiffusionXLPipeline', **parts: Any) -> Any:
    """A stock pipeline of `base`, quiet, its base frozen as ours is.

    torch's matmul chooses another kernel for weights that require gradients, even under `no_grad`: at some sizes
    (latents of 4 x 6) stock's own images differ by 1e-6 between frozen and unfrozen weights.
    """
    import diffusers
    pipeline = getattr(diffusers, cls).from_pretrained(base, **parts)
    pipeline.set_progress_bar_config(disable=True)
    for part in ('unet', 'vae', 'text_encoder', 'text_encoder_2'):
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).requires_grad_(False)
    return pipeline


def set_scheduler(pipeline: Any, name: str, **settings: Any) -> None:
    """Change a stock pipeline's scheduler as diffusers' documentation says."""
    import diffusers
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)


def stock_like(pipeline: Any, cls: str, solver: dict[str, Any] | None = None, **parts: Any) -> Any:
    """A stock pipeline of another class over the same modules, with a scheduler of its own (`type` and settings)."""
    import diffusers
    config = {k: v for k, v in pipeline.config.items() if k in ('requires_aesthetics_score',
                                                                'force_zeros_for_empty_prompt')}
    other = getattr(diffusers, cls)(**{**pipeline.components, **parts})
    other.register_to_config(**config)
    other.set_progress_bar_config(disable=True)
    if solver:
        set_scheduler(other, solver['type'], **{k: v for k, v in solver.items() if k != 'type'})
    return other


def load_adapters(pipeline: Any, model: SDXL, folder: Path) -> None:
    """Give a stock pipeline the LoRAs and IP-Adapters of `model`, by its own loaders from their files."""
    kinds: dict[str, list[str]] = {'LoRA': [], 'IPAdapter': []}
    for name, adapter in model.adapters.items():
        if type(adapter).__name__ in kinds:
            adapter.save(folder / name)
            kinds[type(adapter).__name__].append(name)
    for name in kinds['LoRA']:
        pipeline.load_lora_weights(folder / name, adapter_name=name)
    if kinds['LoRA']:
        pipeline.set_adapters(kinds['LoRA'], [model.adapters[name].scale for name in kinds['LoRA']])
    if names := kinds['IPAdapter']:
        pipeline.load_ip_adapter(folder, subfolder=names, weight_name=['ip_adapter.safetensors'] * len(names),
                                 image_encoder_folder=None)
        pipeline.set_ip_adapter_scale([model.adapters[name].scale for name in names])
    for part in ('unet', 'text_encoder', 'text_encoder_2'):
        getattr(pipeline, part).requires_grad_(False)


def image_embeds(encoder: Path, pixels: Tensor, plus: bool) -> tuple[Tensor, Tensor]:
    """Embeddings of no image, and of images [B, 3, S, S] in [0, 1], by transformers: [B, 1, (T,) E]."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    net = CLIPVisionModelWithProjection.from_pretrained(encoder).requires_grad_(False)
    settings = CLIPImageProcessorPil.from_pretrained(encoder)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (settings.image_mean, settings.image_std))
    pixels = (pixels - mean) / std
    if plus:
        null, own = (net(p, output_hidden_states=True).hidden_states[-2]
                     for p in (torch.zeros_like(pixels[:1]), pixels))
        null = null.expand_as(own)
    else:
        own = net(pixels).image_embeds
        null = torch.zeros_like(own)
    return null.unsqueeze(1), own.unsqueeze(1)


def first_copies(pipeline: Any, num: int) -> Any:
    """Give each prompt its own image prompt; return the hook's handle.

    The pipelines repeat all embeddings for each of `num` prompts, which mixes them up; the hook takes the first copy
    of each half.
    """
    return pipeline.unet.encoder_hid_proj.register_forward_pre_hook(
        lambda _, args: ([x.unflatten(0, (2, num, -1))[:, 0].flatten(0, 1) for x in args[0]],))

def t2i(**settings: Any) -> dict[str, Any]:
    """Config of a T2I-Adapter."""
    return dict(type='T2IAdapter', **settings)


def with_t2i(base: Path, **settings: Any) -> SDXL:
    """An SDXL with one T2I-Adapter named `adapter`."""
    return SDXL(pretrained=str(base), adapters=dict(adapter=t2i(**settings)), sampler=dict(type='Sampler'))


def grads(model: SDXL, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(batch, mode='loss')['loss']
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """The same names, and values that are bitwise equal, or differ by `tolerance` in the norm of each tensor.

    Tensors that are rounding errors only (softmax cancels the bias of attention's keys) are compared with the largest
    norm.
    """
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    floor = max(float(t.double().norm()) for t in b.values()) * 1e-7
    far = {k: float((a[k].double() - b[k].double()).norm()) / max(float(b[k].double().norm()), floor) for k in a
           if not torch.equal(a[k], b[k])}
    far = {k: v for k, v in far.items() if not v <= tolerance}
    assert not far, dict(sorted(far.items(), key=lambda kv: -kv[1])[:5])


#: The self-attention whose map steers SAG.
MIDDLE = 'mid_block.attentions.0.transformer_blocks.0.attn1'
#: A scale and its active_range.
Act = tuple[float, tuple[float, float]]
OFF: Act = (0.0, (0.0, 1.0))


@dataclass
class ByHand:
    """A sampling loop written out over stock's modules, for what no stock pipeline does; nothing of ours is in it.

    Attributes:
        pipeline: stock's, with its scheduler, LoRAs and IP-Adapters.
        prompts: B texts; null: those of the unconditional rows, None for stock's zeros.
        time_ids: [B, N] of the conditional and of the unconditional rows.
        controls: for each T2I-Adapter its features of B rows, and its scale and active_range.
        embeds: for each IP-Adapter what `image_embeds` gives; masks: likewise, [1, 1, H, W] or None.
        channels: [B, 5, h, w] beside the latents.
        margin: how close to its threshold SAG's map has come.
    """

    pipeline: Any
    prompts: list[str]
    time_ids: tuple[Tensor, Tensor]
    null: list[str] | None = None
    controls: list[tuple[list[Tensor], Act]] = field(default_factory=list)
    embeds: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    masks: list[Tensor | None] | None = None
    channels: Tensor | None = None
    margin: float = 1.0

    @torch.no_grad()
    def __call__(self, x: Tensor, first: int = 0, last: int | None = None, cfg: Act = OFF, pag: Act = OFF,
                 sag: Act = OFF, after: Any = None, **options: Any) -> Tensor:
        """Latents after the scheduler's timesteps `first` to `last`; `after(i, x)` changes x after step i."""
        scheduler = self.pipeline.scheduler
        timesteps = scheduler.timesteps
        text = self.pipeline.encode_prompt(self.prompts, negative_prompt=self.null)
        for i in range(first, len(timesteps) if last is None else last):
            t, part = timesteps[i], (i / len(timesteps), (i + 1) / len(timesteps))
            g, p, s = (_acting(act, part) for act in (cfg, pag, sag))
            rows = 'u' * (g > 0) + 'c' + 'p' * (p > 0)
            row = scheduler.scale_model_input(x, t)
            # From here on alpha-bar is known: stock looks its place up in `scale_model_input`.
            out, attention = self._unet(torch.cat([row] * len(rows)), t, rows, text, part)
            made = dict(zip(rows, out.chunk(len(rows)), strict=True))
            anchor = made[rows[0]]
            guided = anchor + (g * (made['c'] - anchor) if g else 0) + (p * (made['c'] - made['p']) if p else 0)
            if s:
                degraded = self._degraded(row, anchor, attention, alpha_bar(scheduler, t))
                guided = guided + s * (anchor - self._unet(degraded, t, rows[0], text, part)[0])
            x = scheduler.step(guided, t, x, **options).prev_sample
            x = after(i, x) if after else x
        return x

    def _unet(self, x: Tensor, t: Tensor, rows: str, text: tuple[Tensor, ...], part: tuple[float, float]
              ) -> tuple[Tensor, Tensor]:
        """The UNet's output, and how much attention each position of the middle gets in the first of `rows`."""
        from diffusers.models.attention_processor import (
            PAGCFGIdentitySelfAttnProcessor2_0,
            PAGIdentitySelfAttnProcessor2_0,
        )
        unet, num = self.pipeline.unet, len(x) // len(rows)

        def stacked(null: Tensor, own: Tensor) -> Tensor:
            return torch.cat([null if row == 'u' else own for row in rows])
        added: dict[str, Any] = dict(text_embeds=stacked(text[3], text[2]),
                                     time_ids=stacked(self.time_ids[1], self.time_ids[0]))
        if self.embeds:
            added['image_embeds'] = [stacked(*embeds) for embeds in self.embeds]
        call: dict[str, Any] = dict(added_cond_kwargs=added, encoder_hidden_states=stacked(text[1], text[0]))
        if self.masks:
            call['cross_attention_kwargs'] = {'ip_adapter_masks': self.masks}
        acting = [[_acting(act, part) * f.repeat(len(rows), 1, 1, 1) for f in features]
                  for features, act in self.controls if _acting(act, part)]
        if acting:
            call['down_intrablock_additional_residuals'] = [sum(same) for same in zip(*acting, strict=True)]
        if self.channels is not None:
            x = torch.cat([x, torch.cat([self.channels] * len(rows))], dim=1)
        middle = unet.get_submodule(MIDDLE)
        seen: dict[str, Tensor] = {}
        hooks = [layer.register_forward_hook(lambda _layer, _args, out, name=name: seen.update({name: out[:num]}))
                 for name, layer in (('q', middle.to_q), ('k', middle.to_k))]
        before, (with_cfg, without) = unet.attn_processors, (PAGCFGIdentitySelfAttnProcessor2_0,
                                                             PAGIdentitySelfAttnProcessor2_0)
        for name, layer in unet.mid_block.named_modules():
            if 'p' in rows and name.endswith('attn1'):
                layer.processor = with_cfg() if 'u' in rows else without()
        try:
            out = unet(x, t, **call).sample
        finally:
            unet.set_attn_processor(before)
            for hook in hooks:
                hook.remove()
        q, k = (seen[name].double().unflatten(-1, (middle.heads, -1)).transpose(1, 2) for name in 'qk')
        return out, (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1).sum(1)

    def _degraded(self, x: Tensor, prediction: Tensor, attention: Tensor, alpha_bar: float) -> Tensor:
        """`shared/sdxl_facts.md`, in fp64; of v by way of Salimans & Ho's formulas."""
        a, s = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5
        noisy, out = x.double().numpy(), prediction.double().numpy()
        if self.pipeline.scheduler.config.prediction_type == 'v_prediction':
            eps, clean = a * out + s * noisy, a * noisy - s * out
        else:
            eps, clean = out, (noisy - s * out) / a
        self.margin = min(self.margin, float((attention - 1).abs().min()))
        smaller = 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        (high, wide), (h, w) = x.shape[-2:], [-(-side // smaller) for side in x.shape[-2:]]
        mask = (attention > 1.0).numpy().reshape(-1, 1, h, w)
        mask = mask[:, :, np.arange(high) * h // high][..., np.arange(wide) * w // wide]
        gauss = np.exp(-np.arange(-4, 5) ** 2 / 2)
        gauss /= gauss.sum()
        padded = np.pad(clean, ((0, 0), (0, 0), (4, 4), (4, 4)), mode='reflect')
        blurred = sum(gauss[i] * gauss[j] * padded[:, :, i:i + high, j:j + wide] for i in range(9) for j in range(9))
        return torch.from_numpy(a * np.where(mask, blurred, clean) + s * eps).to(x)


def _acting(act: Act, part: tuple[float, float]) -> float:
    scale, (start, end) = act
    return scale if part[0] >= start and part[1] <= end else 0.0


def alpha_bar(scheduler: Any, t: Tensor) -> float:
    """Alpha-bar of the UNet's input: by sigma for schedulers that use it (Euler, Heun), else by t."""
    if scheduler.init_noise_sigma != 1:
        return float(1 / (1 + scheduler.sigmas[scheduler.step_index].double() ** 2))
    return float(scheduler.alphas_cumprod[int(t)])
