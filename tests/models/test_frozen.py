"""A model that trains samples with frozen weights: by its export's kernels, on every processor."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, pictures, shaken
from other_kernels import OtherKernels
from parity import make_batch
from torch import Tensor

from diffengine_sdxl.models.sdxl import SDXL

KINDS = ('controlnet', 'ip_adapter_plus', 'lora_everywhere', 'textual_inversion')


def made(model: SDXL, given: dict[str, Tensor]) -> Tensor:
    """Latents, or the images of given ones, where every other kernel would give other bits."""
    with OtherKernels():
        return model.decode(given['latents']) if 'latents' in given else pictures(model, given)


@pytest.mark.parametrize('trains', [*KINDS, 'base', 'vae'])
def test_what_trains_is_sampled_as_if_frozen(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, trains: str) -> None:
    if trains == 'base':
        model, given = SDXL(pretrained=str(tiny_base), trainable=['unet', 'text_encoder', 'text_encoder_2']), {}
    elif trains == 'vae':
        model = SDXL(pretrained=str(tiny_base), trainable=['vae'], objective=dict(type='Reconstruct'))
        given = {'latents': torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))}
    else:
        model, given = build(tiny_base, dict(a=CASES[trains].config)), conditions(CASES[trains].config)
        shaken(model, CASES[trains])
    found = made(model, given)
    with monkeypatch.context() as patch:
        patch.setattr(SDXL, 'frozen', lambda _: nullcontext())
        unfrozen = made(model, given)
    model.requires_grad_(False)
    expected = made(model, given)
    assert torch.equal(found, expected)
    # Without it, what multiplies inputs that lie scattered in memory by its weights takes other kernels.
    if trains in ('controlnet', 'base', 'vae'):
        assert not torch.equal(unfrozen, expected)


def test_flags_gradients_and_hooks_are_as_before(tiny_base: Path) -> None:
    """Also when sampling fails; a hook on a gradient, as DDP has them, still fires."""
    model = build(tiny_base, dict(a=CASES['controlnet'].config))
    given, fired = conditions(CASES['controlnet'].config), []
    weights = [p for _, p in model.trainables()['a']]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(fired.append)
    nodes = [weight.view_as(weight).grad_fn.next_functions[0][0] for weight in weights]  # DDP keeps them
    batch = make_batch(2, conditions=given)

    def step() -> dict[str, Tensor]:
        fired.clear()
        model.zero_grad()
        model(batch, mode='loss')['loss'].backward()
        assert len(fired) == len(weights)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def seen() -> list[Any]:
        return [(name, id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()]
    expected, before = step(), seen()
    pictures(model, given)
    assert seen() == before
    with pytest.raises(RuntimeError, match='stopped'), model.frozen():
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError('stopped')
    assert seen() == before
    assert all(weight.view_as(weight).grad_fn.next_functions[0][0] is node
               for weight, node in zip(weights, nodes, strict=True))
    found = step()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
