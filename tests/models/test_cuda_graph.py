"""Graphs of the UNet's calls, on a stand-in that holds what a CUDA graph holds: kernels, their memory and numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, shaken
from parity import PROMPTS, picture_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffengine_sdxl.models.cuda_graph import MOST, UNetGraphs
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch


class Tape(TorchDispatchMode):
    """Record operations with the numbers that they have at that time; run them again on the same tensors."""

    captured, replayed = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError('operation not permitted when stream is capturing')
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def capture(self, function: Any) -> Tensor:
        Tape.captured += 1
        with self:
            self.output: Tensor = function()
        return self.output

    def replay(self) -> None:
        Tape.replayed += 1
        new: dict[int, Any] = {}
        for func, args, kwargs, output in self.calls:
            args, kwargs = tree_map(lambda value: new.get(id(value), value), (args, kwargs))
            new.update(zip(map(id, tree_leaves(output)), tree_leaves(func(*args, **kwargs)), strict=True))
        self.output.copy_(new[id(self.output)])


@pytest.fixture(autouse=True)
def counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count from 0."""
    monkeypatch.setattr(Tape, 'captured', 0)
    monkeypatch.setattr(Tape, 'replayed', 0)


KINDS = {'controlnet': dict(active_range=(0.0, 0.7)), 'ip_adapter': dict(active_range=(0.3, 1.0)),
         'lora': dict(active_range=(0.0, 0.5)), 't2i_adapter': {}}
CONFIGS = {kind: {**CASES[kind].config, **changes} for kind, changes in KINDS.items()}
SAMPLER = Sampler(num_inference_steps=5, guidances=[dict(type='CFG', scale=4.0, active_range=(0.0, 0.7))])
SMALL, WIDE = (32, 32), (32, 48)


@pytest.fixture(scope='module')
def everything(tiny_base: Path) -> SDXL:
    """A model with every kind of contribution to the UNet's call."""
    return shaken(build(tiny_base, CONFIGS), *(CASES[kind] for kind in sorted(KINDS))).eval()


def batch(size: tuple[int, int] = SMALL, seed: int = 3) -> Batch:
    own = conditions(*CONFIGS.values(), num=1)
    own['conditioning_image'] = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    return picture_batch(PROMPTS[seed % 2:seed % 2 + 1], [seed], size, conditions=own)


def compare(model: SDXL, request: Batch, sampler: Sampler = SAMPLER) -> None:
    """Sample with the model's graphs and without."""
    graphs = model.unet_graphs
    got = sampler(model, request)
    model.unet_graphs = None
    expected = sampler(model, request)
    model.unet_graphs = graphs
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_samples_are_those_of_the_unet(everything: SDXL) -> None:
    """Over active ranges, guidance that skips rows, scales, sizes, other inputs, and weights changed in place."""
    model = everything
    model.unet_graphs = UNetGraphs(model, Tape)
    compare(model, batch())
    compare(model, batch())
    captured, replayed = Tape.captured, Tape.replayed
    assert captured and replayed
    with torch.no_grad():
        for parameter in (*model.adapters['lora'].all_parameters(), *model.adapters['ip_adapter'].to_k.parameters()):
            parameter.mul_(1.5)
    compare(model, batch(seed=8))
    assert Tape.captured == captured and Tape.replayed == replayed + 5
    model.adapters['ip_adapter'].scale, model.adapters['lora'].scale = 0.4, 2.0
    compare(model, batch())
    compare(model, batch(WIDE))
    assert not model.unet_graphs.failed and len(model.unet_graphs.calls) <= MOST
    with model.disable_adapters():
        compare(model, batch())
    for name in model.adapters:
        with model.only_adapter(name):
            compare(model, batch())
    replayed = Tape.replayed
    compare(model, batch(), Sampler(num_inference_steps=2, guidances=[dict(type='PAG', scale=3.0)]))
    assert Tape.replayed == replayed  # attention is probed


class Scaled:
    """A model whose UNet multiplies by a number of the CPU, and pops from a list."""

    adapters: dict[str, Any] = {}
    adapters_disabled = False
    unet_weight = torch.ones(1, device='meta')

    def unet(self, sample: Tensor, scale: Tensor, features: list[Tensor]) -> tuple[Tensor]:
        return (sample * scale + features.pop(0),)


@torch.no_grad()
def test_numbers_of_the_cpu_are_held() -> None:
    """A CUDA kernel holds the value of a tensor on the CPU, so another value is another graph."""
    graphs, device = UNetGraphs(Scaled(), Tape), torch.device('meta')  # type: ignore[arg-type]
    for value in (0.5, 0.5, 0.5, 0.7, 0.7):
        features = [torch.ones(2, device=device), torch.ones(2, device=device)]
        graphs(sample=torch.ones(2, device=device), scale=torch.tensor(value, dtype=torch.float64), features=features)
        assert len(features) == 1  # replayed or not, the caller sees what the UNet has left
    assert (Tape.captured, Tape.replayed) == (2, 3)
    with torch.enable_grad():
        graphs(sample=torch.ones(2, device=device), scale=torch.tensor(0.5, dtype=torch.float64), features=features)
    assert Tape.replayed == 3


@torch.no_grad()
def test_what_cannot_be_captured_is_called() -> None:
    """One warning, and the UNet's own output from then on."""
    class Fails(Tape):
        def capture(self, function: Any) -> Tensor:
            raise torch.OutOfMemoryError('CUDA out of memory')
    model = Scaled()
    graphs, model.unet_weight = UNetGraphs(model, Fails), torch.ones(1)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match='cannot be captured, .*: CUDA out of memory') as caught:
        for _ in range(4):
            output, = graphs(sample=torch.ones(2), scale=torch.tensor(0.5), features=[torch.ones(2)])
            assert output.tolist() == [1.5, 1.5]
    assert len(caught) == 1 and Tape.replayed == 0
