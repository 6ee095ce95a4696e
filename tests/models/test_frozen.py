"""A model that trains samples with frozen weights: by its export's kernels, on every processor."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, sample, shaken
from other_kernels import OtherKernels
from parity import make_batch
from torch import Tensor

from diffengine_sdxl.models.sdxl import SDXL

KINDS = ('controlnet', 'ip_adapter_plus', 'lora_everywhere', 'textual_inversion')


def outputs(model: SDXL, inputs: dict[str, Tensor]) -> Tensor:
    """Sampled or decoded images, where every other kernel would give other bits."""
    with OtherKernels():
        return model.decode(inputs['latents']) if 'latents' in inputs else sample(model, inputs)


@pytest.mark.parametrize('trains', [*KINDS, 'base', 'vae'])
def test_what_trains_is_sampled_as_if_frozen(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, trains: str) -> None:
    if trains == 'base':
        model, inputs = SDXL(pretrained=str(tiny_base), trainable=['unet', 'text_encoder', 'text_encoder_2']), {}
    elif trains == 'vae':
        model = SDXL(pretrained=str(tiny_base), trainable=['vae'], objective=dict(type='Reconstruct'))
        inputs = {'latents': torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))}
    else:
        model, inputs = build(tiny_base, dict(a=CASES[trains].config)), conditions(CASES[trains].config)
        shaken(model, CASES[trains])
    result = outputs(model, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(SDXL, 'frozen', lambda _: nullcontext())
        unfrozen = outputs(model, inputs)
    model.requires_grad_(False)
    expected = outputs(model, inputs)
    assert torch.equal(result, expected)
    # Unfrozen, products with inputs that are not contiguous use other kernels.
    if trains in ('controlnet', 'base', 'vae'):
        assert not torch.equal(unfrozen, expected)


def test_flags_gradients_and_hooks_are_as_before(tiny_base: Path) -> None:
    """Also after an error; hooks on gradients, as DDP registers them, still fire."""
    model = build(tiny_base, dict(a=CASES['controlnet'].config))
    inputs, fired = conditions(CASES['controlnet'].config), []
    weights = [p for _, p in model.trainables()['a']]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(fired.append)
    nodes = [weight.view_as(weight).grad_fn.next_functions[0][0] for weight in weights]  # DDP keeps them
    batch = make_batch(2, conditions=inputs)

    def step() -> dict[str, Tensor]:
        fired.clear()
        model.zero_grad()
        model(batch, mode='loss')['loss'].backward()
        assert len(fired) == len(weights)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def seen() -> list[Any]:
        return [(name, id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()]
    expected, before = step(), seen()
    sample(model, inputs)
    assert seen() == before
    with pytest.raises(RuntimeError, match='stopped'), model.frozen():
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError('stopped')
    assert seen() == before
    assert all(weight.view_as(weight).grad_fn.next_functions[0][0] is node
               for weight, node in zip(weights, nodes, strict=True))
    gradients = step()
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
