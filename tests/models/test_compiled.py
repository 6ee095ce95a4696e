"""Compiled blocks: how many graphs, over adapters, scales, active ranges and sizes; equal to the model as it is."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, shaken
from parity import assert_same, grads, images, make_batch
from torch import Tensor

from diffengine_sdxl.adapters import lora_function
from diffengine_sdxl.models import compiled
from diffengine_sdxl.models.compiled import compile_blocks, set_checkpointing
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import tiny_unet

#: Of the tiny UNet: 3 transformer blocks, in down, mid and up blocks, and 9 resnets.
BLOCKS, TRANSFORMERS = 12, 3


class Graphs:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.num += 1
        return graph.forward

    def new(self) -> int:
        """Return how many came since the last call."""
        num, self.num = self.num, 0
        return num


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    monkeypatch.setattr(logging.getLogger('torch.__trace'), 'disabled', True)  # pytest would keep all of it
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def predict(model: SDXL, size: int = 64, progress: float = 0.3) -> Tensor:
    """The UNet's output in sampling."""
    keys = {'conditioning_image', 'reference'} & {a.condition_key for a in model.adapters.values()}
    inputs = {key: images(2, (size, size) if key == 'conditioning_image' else (64, 64)) for key in sorted(keys)}
    x = torch.randn(2, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(size))
    with torch.no_grad(), model.frozen():
        encoded = model.encode(make_batch(2, conditions=inputs), project=True)
        return model.predict(x, torch.tensor(500), encoded, torch.full((2, 2), progress))


def test_graphs_of_adapters(tiny_base: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, each of four kinds and each pair, a LoRA as an accelerator computes it; over scales, active ranges and
    sizes; bitwise as not compiled."""
    monkeypatch.setattr(lora_function, 'used_on', lambda weight: weight.dtype == torch.bfloat16)
    kinds = ('t2i_adapter', 'controlnet', 'ip_adapter', 'lora')
    model = shaken(build(tiny_base, {kind: CASES[kind].config for kind in kinds}, mixed_precision='bf16'),
                   *(CASES[k] for k in sorted(kinds)))
    adapters = model.adapters
    everything = dict.fromkeys(kinds, 0.9)
    #: What is set, the side of the image, the progress of sampling -> at most so many new graphs.
    states: list[tuple[dict[str, float], int, float, int]] = [
        ({}, 64, 0.3, BLOCKS), ({'t2i_adapter': 1.0}, 64, 0.3, 0), ({'controlnet': 1.0}, 64, 0.3, 0),
        ({'ip_adapter': 1.0}, 64, 0.3, TRANSFORMERS), ({'lora': 1.0}, 64, 0.3, TRANSFORMERS),
        ({'t2i_adapter': 0.7, 'controlnet': 0.4}, 64, 0.3, 0), ({'t2i_adapter': 1.0, 'ip_adapter': 0.6}, 64, 0.3, 0),
        ({'controlnet': 1.0, 'ip_adapter': 0.2}, 64, 0.3, 0), ({'t2i_adapter': 1.0, 'lora': 0.6}, 64, 0.3, 0),
        ({'controlnet': 1.0, 'lora': -0.5}, 64, 0.3, 0), ({'ip_adapter': 1.0, 'lora': 0.2}, 64, 0.3, TRANSFORMERS),
        (everything, 64, 0.3, 0), (everything, 64, 0.9, 0), (everything, 32, 0.3, BLOCKS), (everything, 64, 0.3, 0)]

    def outputs() -> Iterator[Tensor]:
        for scales, size, progress, _ in states:
            for name, adapter in adapters.items():
                adapter.scale, adapter.active_range = scales.get(name, 0.0), (0.0, 0.8)
            yield predict(model, size, progress)

    with monkeypatch.context() as patch:  # compiled, a LoRA is added by its formula, not by its own function
        patch.setattr(torch.compiler, 'is_compiling', lambda: True)
        expected = list(outputs())
    undo = compile_blocks(model.unet, graphs)
    for state, out, theirs in zip(states, outputs(), expected, strict=True):
        assert torch.equal(out, theirs) and graphs.new() <= state[-1], state
    undo()
    predict(model, 96)
    assert graphs.new() == 0 and not any(m._compiled_call_impl for m in model.unet.modules())


def test_graphs_of_a_training_step(tiny_base: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA, as an accelerator computes it, beside an IP-Adapter in bf16: a scale adds none, the first range some."""
    monkeypatch.setattr(lora_function, 'used_on', lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(compiled, 'COMPILED', compiled.COMPILED[:1])  # where these adapters are
    model = shaken(build(tiny_base, dict(ip=CASES['ip_adapter'].config, lora=CASES['lora'].config),
                         mixed_precision='bf16'), CASES['ip_adapter'], CASES['lora'])
    batch = make_batch(2, conditions=conditions(CASES['ip_adapter'].config))
    assert model.adapters['ip'].to_k[0].weight.dtype == torch.float32 and model.unet_weight.dtype == torch.bfloat16
    undo = compile_blocks(model.unet, graphs)
    loss, gradients = grads(model, batch)
    assert graphs.new() <= 2 * TRANSFORMERS and all(g.dtype == torch.float32 for g in gradients.values())
    set_checkpointing(model.unet, 'blocks')  # the recomputed pass finds the same graphs
    assert_same({'loss': loss, **gradients}, dict(zip(['loss', *gradients], [*(r := grads(model, batch))[:1],
                                                                             *r[1].values()], strict=True)))
    assert graphs.new() == 0
    for scale in (0.7, 0.3):
        for adapter in model.adapters.values():
            adapter.scale = scale
        grads(model, batch)
        assert graphs.new() == 0
    for active_range, most in (((0.0, 0.5), 2 * TRANSFORMERS), ((0.2, 0.9), 0)):
        for adapter in model.adapters.values():
            adapter.active_range = active_range
        grads(model, batch)
        assert graphs.new() <= most
    undo()


def test_drawn_scales_are_no_new_graphs(tiny_base: Path, graphs: Graphs) -> None:
    """In fp32, where the scale of a LoRA is not in a copy of its weights."""
    drawn = dict(lora=dict(prob=1, scale=(0.2, 1.0)))
    model = shaken(build(tiny_base, dict(lora=CASES['lora'].config), partners=drawn), CASES['lora'])
    undo, batch, found = compile_blocks(model.unet, graphs), make_batch(2), []
    for i in range(3):
        batch.key = [f'{i}/0', f'{i}/1']
        found.append(grads(model, batch)[0])
        assert graphs.new() == 0 or i == 0
    undo()
    assert len(set(map(float, found))) == 3


def test_a_failing_compiler_leaves_the_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch, graphs: Graphs) -> None:
    """One line says why, though every block fails, in the forward pass or in compiling the backward pass."""
    lines: list[str] = []
    monkeypatch.setattr(compiled, 'print_log', lambda message, logger, level: lines.append(message) or
                        (level == logging.WARNING) or pytest.fail('no warning'))
    unet = tiny_unet()
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    call = dict(timestep=torch.tensor(5), encoder_hidden_states=torch.randn(1, 7, 64), added_cond_kwargs={
        'text_embeds': torch.randn(1, 32), 'time_ids': torch.full((1, 6), 64.0)})
    expected, = torch.autograd.grad(unet(x, **call).sample.sum(), x)

    def broken(*_: Any) -> Any:
        raise RuntimeError('no C++ compiler found\nsecond line')

    def broken_backward(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        return aot_autograd(fw_compiler=lambda gm, _: gm.forward, bw_compiler=broken)(graph, inputs)

    for backend in (broken, broken_backward):
        lines.clear()
        torch._dynamo.reset()
        undo = compile_blocks(unet, backend)
        got, = torch.autograd.grad(unet(x, **call).sample.sum(), x)
        undo()
        assert torch.equal(got, expected)
        assert len(lines) == 1 and 'no C++ compiler found' in lines[0] and '\n' not in lines[0], lines


def test_recomputed_blocks_change_nothing(tiny_base: Path) -> None:
    """Loss and gradients bitwise; 'blocks' saves less than 'full', a ControlNet's as its base's."""
    model = shaken(build(tiny_base, {'control': CASES['controlnet'].config}), CASES['controlnet'])
    batch, results, saved = make_batch(2, conditions=conditions(CASES['controlnet'].config)), {}, {}
    for mode in compiled.CHECKPOINTING:
        set_checkpointing(model.unet, mode)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.__setitem__(t.untyped_storage().data_ptr(), t.numel()) or t, lambda t: t):
            loss, gradients = grads(model, batch)
        results[mode], saved[mode] = {'loss': loss, **gradients}, sum(sizes.values())
        for net in (model.unet, model.adapters['control'].net):
            flags = {m.gradient_checkpointing for m in net.modules() if hasattr(m, 'gradient_checkpointing')}
            assert flags == {'off': {False}, 'blocks': {False, True}, 'full': {True}}[mode]
    assert_same(results['blocks'], results['off'])
    assert_same(results['full'], results['off'])
    assert saved['off'] > saved['blocks'] > saved['full']
