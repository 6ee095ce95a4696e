"""LoRA as one autograd function, with compute copies, against peft's layers and formulas; precision beside bf16."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from parity import assert_same, make_batch, sampler
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffengine_sdxl import rng
from diffengine_sdxl.adapters import lora_function, lora_layers
from diffengine_sdxl.models.sdxl import SDXL

Run = Callable[[nn.Module, Tensor], Tensor]
TARGETS = ['to_q', 'to_out.0', 'ff.net.0.proj', 'time_emb_proj', 'conv_shortcut', 'proj_in']


class Layers(nn.Module):
    """Linear layers with and without bias, with LoRAs of other ranks and factors, one of them of two adapters."""

    def __init__(self, dtype: torch.dtype = torch.float64, weights: torch.dtype | None = None, width: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Linear(width, 16, dtype=dtype), nn.Linear(16, width, bias=False, dtype=dtype)
        self.requires_grad_(False)
        self.wrappers = {}
        for name, rank, alpha, targets in (('a', 4, 12, ['first', 'second']), ('b', 2, 1, ['second'])):
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
            self.wrappers[name] = list(lora_layers.inject(self, config, name).values())
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
        for name, wrappers in self.wrappers.items():
            for wrapper in wrappers:
                for parameter in lora_layers.weights(wrapper, name).values():
                    parameter.data = parameter.data.to(weights or dtype)
                    parameter.requires_grad_(True)
                lora_layers.set_precision(wrapper, name)
        self.copies = [lora_function.ComputeCopies(wrappers, name, True) for name, wrappers in self.wrappers.items()]

    def forward(self, x: Tensor) -> Tensor:
        """[..., 12] to [..., 12]."""
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def step(layers: Layers, x: Tensor, run: Run = lambda layers, x: layers(x)) -> dict[str, Tensor]:
    """Output and gradients of a step whose loss is not linear."""
    layers.zero_grad()
    x = x.detach().requires_grad_()
    for copies in layers.copies:
        copies.refresh()
    output = run(layers, x)
    (output.float() if output.dtype == torch.bfloat16 else output).sin().sum().backward()
    assert x.grad is not None
    named = {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}
    return {'output': output.detach(), 'x': x.grad, **named}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """LoRAs compute on the CPU and in any dtype as on an accelerator."""
    monkeypatch.setattr(lora_function, 'used_on', lambda weight: True)
    return monkeypatch


def checkpointed(layers: nn.Module, x: Tensor) -> Tensor:
    """Recompute after another call without gradients has had the wrappers."""
    output = checkpoint(layers, x, use_reentrant=False)
    with torch.no_grad():
        for copies in layers.copies:  # type: ignore[union-attr]
            copies.refresh()
        layers(x)
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize('run', [lambda layers, x: layers(x), checkpointed], ids=['plain', 'checkpointed'])
@pytest.mark.parametrize('shape', [(5, 12), (2, 3, 12), (2, 1, 3, 12)])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], run: Run, everywhere: pytest.MonkeyPatch) -> None:
    """For x, A and B, ranks, factors and nested LoRAs, with and without the copies of a call (fp64, 1e-12)."""
    layers, x = Layers(), inputs(*shape)
    got = step(layers, x, run)
    assert sum('lora' in name for name in got) == 6
    assert all(wrapper.copies for wrappers in layers.wrappers.values() for wrapper in wrappers)
    for wrappers in layers.wrappers.values():
        for wrapper in wrappers:
            wrapper.copies = None
    layers.copies = []
    in_layers = step(layers, x)
    everywhere.setattr(lora_function, 'used_on', lambda weight: False)
    expected = step(layers, x)
    for result in (got, in_layers):
        assert_same(result, expected, 1e-12)


def test_rows_and_dropout(everywhere: pytest.MonkeyPatch) -> None:
    """A row outside is the layer's, bitwise, without gradients; dropout draws as peft's."""
    layers, x = Layers(), inputs(2, 3, 12)
    wrapper = layers.wrappers['a'][0]
    wrapper.rows = torch.tensor([True, False])
    output = wrapper(x)
    assert torch.equal(output[1], wrapper.base_layer(x)[1]) and not torch.equal(output[0], wrapper.base_layer(x)[0])
    output[1].sum().backward()
    assert not wrapper.lora_B['a'].weight.grad.any()
    wrapper.rows, wrapper.lora_dropout['a'] = None, nn.Dropout(0.5)
    results = []
    for own in (True, False):
        everywhere.setattr(lora_function, 'used_on', lambda weight, own=own: own)
        torch.manual_seed(0)
        results.append(wrapper(x))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert (results[0] - wrapper.base_layer(x)).abs().max() > 0.1


def test_bf16_is_no_worse_than_autocast(everywhere: pytest.MonkeyPatch) -> None:
    """fp32 weights beside a bf16 layer: the mean error against fp64 is at most that of peft under autocast."""
    half, x = Layers(torch.bfloat16, torch.float32, 160), inputs(256, 160, dtype=torch.bfloat16) / 4
    exact = copy.deepcopy(half).double()
    exact.copies = []
    for wrapper in (wrapper for wrappers in exact.wrappers.values() for wrapper in wrappers):
        wrapper.mixed = False
    got = step(half, x)
    everywhere.setattr(lora_function, 'used_on', lambda weight: False)
    assert all(wrapper.mixed for wrappers in half.wrappers.values() for wrapper in wrappers)
    peft_way, expected = step(half, x), step(exact, x.double())
    errors = []
    for name, value in expected.items():
        assert got[name].dtype == peft_way[name].dtype == (torch.float32 if 'lora' in name else torch.bfloat16)
        errors.append([float((result[name].double() - value).norm() / value.norm()) for result in (got, peft_way)])
    ours, theirs = torch.tensor(errors).T
    assert ours.mean() <= theirs.mean() and (ours < 1.3 * theirs).all() and ours.max() < 0.02, errors


def test_copies_follow_the_weights(everywhere: pytest.MonkeyPatch) -> None:
    """A step in place, a new scale; in place without gradients; once and for all where nothing steps the weights."""
    layers, x = Layers(torch.bfloat16, torch.float32), inputs(4, 12, dtype=torch.bfloat16)
    wrapper, copies = layers.wrappers['a'][0], layers.copies[0]
    with torch.no_grad():
        copies.refresh()
        before, memory = wrapper(x), wrapper.copies[1].data_ptr()
        wrapper.lora_B['a'].weight.mul_(2)
        copies.refresh()
        assert wrapper.copies[1].data_ptr() == memory
        once, twice, base = (t.float() for t in (before, wrapper(x), wrapper.base_layer(x)))
        assert (twice - base - 2 * (once - base)).norm() < 0.02 * twice.norm()
        copies.changing = False
        wrapper.scaling['a'] *= 2
        copies.stale = True
        copies.refresh()
        assert (wrapper(x).float() - base - 4 * (once - base)).norm() < 0.02 * twice.norm()
        wrapper.lora_B['a'].weight.mul_(2)  # nothing says so
        copies.refresh()
        assert torch.equal(wrapper.copies[1], (wrapper.lora_B['a'].weight * wrapper.scaling['a'] / 2).bfloat16())


def test_wrappers_are_pefts_and_can_be_copied(everywhere: pytest.MonkeyPatch) -> None:
    """isinstance, names, deepcopy and pickle; compute copies stay behind. Autograd's tensors could not be copied."""
    layers, x = Layers(), inputs(2, 12)
    step(layers, x)
    wrapper = layers.wrappers['a'][0]
    assert isinstance(wrapper, Linear) and isinstance(wrapper, LoraLayer) and type(wrapper).__name__ == 'Linear'
    assert type(wrapper) is type(layers.wrappers['b'][0]) and 'forward' not in vars(wrapper)
    layers.copies = []
    for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        other = copied.wrappers['a'][0]
        assert type(other) is type(wrapper) and other.copies is None and wrapper.copies is not None
        assert torch.equal(copied(x), layers(x))
        other.lora_B['a'].weight.data.zero_()
        assert torch.equal(other(x), other.base_layer(x)) and not torch.equal(wrapper(x), other(x))


def test_fp32_inputs_under_autocast(everywhere: pytest.MonkeyPatch) -> None:
    """As norms give them to a half-precision layer beside one that trains."""
    layers, x = Layers(torch.bfloat16, torch.float32), inputs(5, 12, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.allclose(layers(x.float()), layers(x), rtol=0.02, atol=0.02)


def test_compiled_once_for_all_layers(everywhere: pytest.MonkeyPatch) -> None:
    """No graph more for another layer of equal shapes, the copies of another step, another scale."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward
    blocks = [Layers(), Layers()]
    for block in blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    for scale in (1.0, 3.0, 0.7):
        for block in blocks:
            block.wrappers['a'][0].scaling['a'] = scale
            got = step(block, inputs(4, 12))
    assert len(graphs) == 1
    assert_same(got, step(block, inputs(4, 12), lambda layers, x: layers.forward(x)), 1e-12)


def build(base: Path, **settings: Any) -> SDXL:
    """A tiny SDXL with two LoRAs that look trained, on the same layers in part, one of them with an active range."""
    one = dict(type='LoRA', rank=4, alpha=8, targets=[*TARGETS, 'q_proj'], parts=('unet', 'text_encoder_2'))
    other = dict(type='LoRA', rank=2, active_range=(0.0, 0.5), blocks={'unet.mid_block': dict(scale=0.0)})
    model = SDXL(pretrained=str(base), adapters={'a': one, 'b': other}, objective=dict(type='Denoise'), **settings)
    with torch.no_grad():
        for adapter in model.adapters.values():
            for i, parameter in enumerate(adapter.all_parameters()):
                noise = torch.randn(parameter.shape, generator=rng.generator('shaken', adapter.name, i))
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def gradients(model: SDXL) -> dict[str, Tensor]:
    """Loss and gradients of two calls of the UNet in one step, with sampling without gradients in between."""
    model.zero_grad()
    batch = make_batch(2)
    loss = model(batch, mode='loss')['loss'] + model(make_batch(2, seed=torch.tensor([5, 5])), mode='loss')['loss']
    with torch.no_grad(), model.frozen():
        sample = sampler(steps=2)(model, make_batch(2, size=(64, 64)))
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {'loss': loss.detach(), 'sample': sample, **named}


def test_a_model_computes_as_with_peft(tiny_base: Path, everywhere: pytest.MonkeyPatch) -> None:
    """Loss, latents and every gradient of UNet and text encoder, recomputed ones too (fp64, 1e-11)."""
    model = build(tiny_base, dtype='float64')
    model.train()
    got = gradients(model)
    assert all(w.copies is not None for w in lora_layers.layers(model.unet, 'a').values() if w.plain_lora)
    everywhere.setattr(lora_function, 'used_on', lambda weight: False)
    assert len(got) == len(model._trained) + 2
    assert_same(got, gradients(model), 1e-11)
    everywhere.setattr(lora_function, 'used_on', lambda weight: True)
    # What an active range leaves out must not change before a pass is recomputed; for the other adapter nothing does.
    model.adapters['b'].active_range = (0, 1)
    expected = gradients(model)
    model.unet.enable_gradient_checkpointing()
    assert_same(gradients(model), expected, 1e-11)


def test_only_wrappers_compute_under_autocast(tiny_base: Path) -> None:
    """On a GPU autocast computes every norm in fp32. (A base that trains is all under autocast, see test_denoise.)"""
    model = build(tiny_base, mixed_precision='bf16')
    seen: dict[str, set[tuple[bool, torch.dtype]]] = {'base': set(), 'wrapped': set()}

    def note(place: str) -> Callable[..., None]:
        return lambda _module, args: seen[place].add((torch.is_autocast_enabled('cpu'), args[0].dtype))
    for part in (model.unet, model.text_encoder_2):
        for module in part.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.register_forward_pre_hook(note('base'))
        for wrapper in lora_layers.layers(part, 'a').values():
            wrapper.lora_A['a'].register_forward_pre_hook(note('wrapped'))
    loss = model(make_batch(1), mode='loss')['loss']
    assert seen['base'] == {(False, torch.bfloat16)} and {enabled for enabled, _ in seen['wrapped']} == {True}
    assert torch.isfinite(loss)


def test_weights_are_stored_once_in_the_dtype_of_the_base(tiny_base: Path) -> None:
    """For images; those of an OFT, which has no inverse in bf16, stay in fp32."""
    model = SDXL(pretrained=str(tiny_base), mixed_precision='bf16', adapters={
        'lora': dict(type='LoRA', rank=4, targets=['to_q']), 'oft': dict(type='LoRA', kind='oft', rank=4)})
    for adapter, dtype in zip(model.adapters.values(), (torch.bfloat16, torch.float32), strict=True):
        assert {p.dtype for p in adapter.all_parameters()} == {torch.float32}
        adapter.to_compute_dtype(torch.bfloat16)
        assert {p.dtype for p in adapter.all_parameters()} == {dtype}
        assert {w.mixed for _, _, w in adapter._all_wrappers()} == {dtype == torch.float32}
    with torch.no_grad(), model.frozen():
        output = model.predict(torch.randn(1, 4, 8, 8), torch.tensor(500), model.encode(make_batch(1)),
                               torch.zeros(1, 2))
    assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()
