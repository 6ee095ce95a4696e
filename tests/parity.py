"""What the parity tests share: a batch, an SDXL of ours and the stock pipelines that it is compared with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch

PROMPTS = ['a red circle', 'two blue squares on a very long sheet of paper', '']
SIZE = (64, 64)


def images(num: int, size: tuple[int, int] = SIZE, channels: int = 3, seed: int = 5) -> Tensor:
    """Random pictures, [num, channels, H, W] in [0, 1]."""
    return torch.rand((num, channels, *size), generator=torch.Generator().manual_seed(seed))


def make_batch(num: int = 2, size: tuple[int, int] = SIZE, **changes: Any) -> Batch:
    """`num` samples with images, control images, and time ids of their own; `changes` replace fields."""
    ids = [[float(size[0] + 8 * i), float(size[1] + 24 * i), float(i), float(2 * i), *map(float, size)]
           for i in range(num)]
    fields: dict[str, Any] = dict(
        text=[PROMPTS[i % 3] for i in range(num)], time_ids=torch.tensor(ids), key=[f'sample {i}' for i in range(num)],
        epoch=torch.arange(num) + 3, seed=torch.full((num,), 11), img=images(num, size) * 2 - 1,
        conditions={'conditioning_image': images(num, size, seed=6)})
    return Batch(**{**fields, **changes})


def picture_batch(prompts: list[str], seeds: list[int], size: tuple[int, int] = SIZE, **changes: Any) -> Batch:
    """What is asked of a sampler: no images, the picture's size as original and target size."""
    num = len(prompts)
    fields: dict[str, Any] = dict(
        text=prompts, time_ids=torch.tensor([[*size, 0, 0, *size]] * num, dtype=torch.float32), size=size,
        key=[f'prompt {i}' for i in range(num)], epoch=torch.zeros(num, dtype=torch.int64), seed=torch.tensor(seeds))
    return Batch(**{**fields, **changes})


def generators(seeds: list[int]) -> list[torch.Generator]:
    """As a user of the stock pipelines makes them."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sampler(scheduler: str = 'EulerDiscreteScheduler', steps: int = 4, scale: float = 5.0, eta: float = 0.0,
            window: tuple[float, float] = (0.0, 1.0), **settings: Any) -> Sampler:
    """Ours, with classifier-free guidance."""
    return Sampler({'type': scheduler, **settings}, steps, [dict(type='CFG', scale=scale, window=window)], eta)


def stock(base: Path, cls: str = 'StableDiffusionXLPipeline', **parts: Any) -> Any:
    """A stock pipeline of `base`, quiet, its base frozen as ours is.

    torch's matmul chooses another kernel for weights that require gradients, even under `no_grad`: at some sizes
    (latents of 4 x 6) stock's own pictures differ by 1e-6 between frozen and unfrozen weights.
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


def t2i(**settings: Any) -> dict[str, Any]:
    """Config of a T2I-Adapter."""
    return dict(type='T2IAdapter', **settings)


def with_t2i(base: Path, **settings: Any) -> SDXL:
    """An SDXL with one T2I-Adapter named `adapter`."""
    return SDXL(pretrained=str(base), adapters=dict(adapter=t2i(**settings)), sampler=dict(type='Sampler'))


def grads(model: SDXL, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of everything that has one."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(batch, mode='loss')['loss']
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """The same names, and values that are bitwise equal, or differ by `tolerance` in the norm of each tensor.

    Tensors that are nothing but rounding (the bias of attention's keys has no gradient, as softmax doesn't see it)
    are measured by the largest one's norm.
    """
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    floor = max(float(t.double().norm()) for t in b.values()) * 1e-7
    far = {k: float((a[k].double() - b[k].double()).norm()) / max(float(b[k].double().norm()), floor) for k in a
           if not torch.equal(a[k], b[k])}
    far = {k: v for k, v in far.items() if not v <= tolerance}
    assert not far, dict(sorted(far.items(), key=lambda kv: -kv[1])[:5])
