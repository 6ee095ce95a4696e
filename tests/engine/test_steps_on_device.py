"""Steps on which the device decides, forced on the CPU (its fused kernel knows `found_inf`), and those that wait."""

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from diffengine_sdxl.engine import optim
from diffengine_sdxl.engine.deferred import DeferredValues
from diffengine_sdxl.engine.hooks.ema import EMAHook
from diffengine_sdxl.engine.hooks.first_steps import FirstStepsHook
from diffengine_sdxl.registry import SCOPE


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope(SCOPE):
        yield


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, 'decides_on_device', lambda parameters: True)


class Model(nn.Module):
    """Two 'adapters'; the loss is the mean squared error against `y`. `broken`: what multiplies pose's gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.broken = 1.0
        self.style, self.pose = (nn.Linear(6, 6, dtype=dtype) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=rng)
        self.pose.weight.register_hook(lambda grad: grad * self.broken)
        self.inputs = torch.randn(8, 2, 4, 6, generator=rng, dtype=dtype)

    def trainables(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        return {'style': list(self.style.named_parameters()), 'pose': list(self.pose.named_parameters())}

    def loss(self, i: int) -> Tensor:
        x, y = self.inputs[i % 8]
        return (self.pose(torch.tanh(self.style(x))) - y).square().mean()


def build(model: nn.Module, optimizer: Any = None, **cfg: Any) -> Any:
    return build_optim_wrapper(model, dict(
        type='StepOptimWrapper', constructor='AdapterOptimWrapperConstructor',
        optimizer=optimizer or dict(type='AdamW', lr=1e-2), **cfg))


def go(model: Model, wrapper: Any, steps: range, counts: int = 1) -> Iterator[int]:
    """Train; yield after each step."""
    for step in steps:
        for micro in range(counts):
            wrapper.update_params(model.loss(step * counts + micro))
        yield step


def state(model: Model, wrapper: Any) -> dict[str, Tensor]:
    """Return copies of the weights, moments and counts."""
    moments = {f'{i}.{k}': v for i, entry in wrapper.state_dict()['state'].items() for k, v in entry.items()}
    return {k: v.clone() for k, v in {**model.state_dict(), **moments}.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize(('counts', 'clip'), [
    (1, None), (2, dict(max_norm=0.05)), (1, dict(type='value', clip_value=1e-3))])
def test_the_same_steps(counts: int, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps; the fused kernel rounds in another order (fp64: 1e-12)."""
    waiting, model = Model(), Model()
    wrapper = build(waiting, accumulative_counts=counts, clip_grad=clip)
    assert not wrapper.on_device and wrapper.optimizer.defaults['fused'] is None
    norms = [wrapper.message_hub.get_scalar('train/grad_norm').current()
             for _ in go(waiting, wrapper, range(6), counts)]
    monkeypatch.setattr(optim, 'decides_on_device', lambda parameters: True)
    on_device = build(model, accumulative_counts=counts, clip_grad=clip)
    assert on_device.on_device and on_device.optimizer.defaults['fused'] is True
    reported = [float(on_device.reports['grad_norm']) for _ in go(model, on_device, range(6), counts)]
    assert reported == pytest.approx(norms, rel=1e-12)
    for name, value in state(waiting, wrapper).items():
        torch.testing.assert_close(state(model, on_device)[name].double(), value.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('clip', [None, dict(max_norm=1.0), dict(type='value', clip_value=1.0)])
def test_after_a_bad_step_nothing_changes(value: float, clip: Any, forced: None) -> None:
    """Though the gradients of later steps are finite, until the host has read which step it was."""
    model = Model()
    wrapper = build(model, clip_grad=clip)
    values, good = DeferredValues(), {}
    for step in go(model, wrapper, range(5)):
        values.push(step, wrapper.reports, wrapper.group_norms)
        if step == 1:
            good = state(model, wrapper)
            model.broken = value
        else:
            model.broken = 1.0
    assert same(state(model, wrapper), good) and float(wrapper.skipped) == 1
    arrived = list(values.pop())
    for _, groups in arrived[:2]:
        wrapper.arrived(*groups)
    with pytest.raises(FloatingPointError, match="^The gradients of 'pose' are not finite.*no weight was changed"):
        wrapper.arrived(*arrived[2][1])


def test_a_loss_that_is_not_finite_stops_the_next_steps(forced: None) -> None:
    model = Model()
    wrapper = build(model)
    for step in go(model, wrapper, range(3)):
        wrapper.stop_if(torch.tensor(step >= 1))
        if step == 1:
            done = state(model, wrapper)
        assert float(wrapper.skipped) == (step >= 1)  # so an average stands still in this step too
    assert same(state(model, wrapper), done)


def test_overflow_in_fp16(forced: None) -> None:
    """A step is left out and the scale halves, all on the device; at the least scale it ends."""
    model = Model(torch.float32)
    wrapper = build(model, mixed_precision='fp16', loss_scale=dict(init_scale=1024.0, growth_interval=100))
    before, model.broken, scales = state(model, wrapper), math.inf, []
    for step in go(model, wrapper, range(4)):
        scales.append(float(wrapper.reports['loss_scale']))
        assert float(wrapper.skipped) == (step < 2)
        if step == 1:
            assert all(torch.equal(state(model, wrapper)[k], v) for k, v in before.items())
            model.broken = 1.0
    assert scales == [512.0, 256.0, 256.0, 256.0] and wrapper.loss_scaler.get_scale() == 256.0
    assert {float(v['step']) for v in wrapper.state_dict()['state'].values()} == {2.0}
    done, model.broken = state(model, wrapper), math.inf
    for _ in go(model, wrapper, range(23)):
        scale = float(wrapper.reports['loss_scale'])
    reports = {name: float(value) for name, value in wrapper.reports.items()}
    assert scale < wrapper.MIN_LOSS_SCALE
    model.broken = 1.0
    list(go(model, wrapper, range(1)))
    assert same(state(model, wrapper), done)
    with pytest.raises(FloatingPointError, match="'pose' overflow at every loss scale"):
        wrapper.arrived(reports, {'style': 1.0, 'pose': math.inf})


@pytest.mark.parametrize('warmup', [True, False])
def test_the_average_stands_still_in_a_step_left_out(warmup: bool) -> None:
    """On the device as by the host, to fp32's rounding; bitwise where nothing shall change. The step counts once."""
    parameter = torch.nn.Parameter(torch.zeros(5))
    hooks = [EMAHook(0.7, warmup) for _ in range(2)]
    for hook in hooks:
        hook.parameters, hook.weights = {'p': parameter}, {'p': torch.zeros(5)}
    for skipped in (False, True, True, False, False):
        before = hooks[1].weights['p'].clone()
        with torch.no_grad():
            parameter += 1.0
        for hook, value in zip(hooks, (skipped, torch.tensor(float(skipped))), strict=True):
            runner: Any = SimpleNamespace(optim_wrapper=SimpleNamespace(skipped=value))
            hook.after_train_iter(runner, 0)
        assert torch.equal(before, hooks[1].weights['p']) == skipped
        torch.testing.assert_close(hooks[0].weights, hooks[1].weights, rtol=1e-6, atol=0)
    saved: dict[str, Any] = {}
    hooks[1].before_save_checkpoint(runner, saved)
    assert saved['ema']['step'] == hooks[0].step == 3


def test_a_step_left_out_does_not_count_as_one_of_the_first() -> None:
    """The optimizer is called though nothing changes, as after fp16's first overflows."""
    hook, unseen = FirstStepsHook(), SimpleNamespace(before_step=lambda: 1 / 0, after_step=lambda: 1 / 0)
    hook.watched = [cast(Any, unseen)]
    for watch in (hook._before_step, hook._after_step):
        watch(SimpleNamespace(found_inf=torch.tensor(1.0)), (), {})
    assert hook._stepped is False


def test_who_decides(forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused Adam and AdamW on an accelerator, unless the config chose otherwise."""
    for cfg, fused in ((dict(type='Adam'), True), (dict(type='AdamW', fused=False), False),
                       (dict(type='AdamW', foreach=True), False), (dict(type='SGD', lr=1.0), None)):
        wrapper = build(Model(), cfg)
        assert wrapper.on_device is bool(fused)
        assert wrapper.optimizer.defaults['fused'] is fused
    monkeypatch.undo()
    meta, host = (nn.Parameter(torch.zeros(1, device=device)) for device in ('meta', 'cpu'))
    assert optim.decides_on_device([meta]) and not optim.decides_on_device([meta, host])
    assert not optim.decides_on_device([]) and not build(Model(), dict(type='AdamW', fused=True)).on_device


@pytest.mark.parametrize('to_device', [True, False])
def test_a_checkpoint_goes_on_elsewhere(to_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved where the host decides is resumed where the device does, and back; each computes in its way."""
    models, wrappers = (Model(), Model()), []
    for model, forced in zip(models, (not to_device, to_device), strict=True):
        monkeypatch.setattr(optim, 'decides_on_device', lambda parameters, forced=forced: forced)
        wrappers.append(build(model))
    list(go(models[0], wrappers[0], range(2)))
    models[1].load_state_dict(models[0].state_dict())
    wrappers[1].load_state_dict(copy.deepcopy(wrappers[0].state_dict()))
    assert wrappers[1].optimizer.param_groups[0]['fused'] is (True if to_device else None)
    for model, wrapper in zip(models, wrappers, strict=True):
        list(go(model, wrapper, range(2, 4)))
    for name, value in state(models[0], wrappers[0]).items():
        torch.testing.assert_close(state(models[1], wrappers[1])[name].double(), value.double(), rtol=0, atol=1e-12)


def test_values_arrive_in_order() -> None:
    values = DeferredValues()
    for step in (3, 4, 5):
        values.push(step, {'a': torch.tensor(step), 'b': torch.tensor([0.5])}, {}, {'c': torch.tensor(-1.0)})
        assert list(values.pop(keep=1)) == ([] if step == 3 else [
            (step - 1, [{'a': step - 1.0, 'b': 0.5}, {}, {'c': -1.0}])])
    assert [step for step, _ in values.pop()] == [5] and list(values.pop()) == []
