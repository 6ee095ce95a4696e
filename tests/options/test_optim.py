"""Options of the optimizer; see test_table.py."""

from typing import Any

import pytest
import torch
from options.table import Cases, World

from diffengine_sdxl.errors import UserError

case = Cases()


@case('max_train_steps', max_iters=7)
def max_train_steps(world: World) -> None:
    runner = world.runner()
    assert runner.build_train_loop(runner._train_loop).max_iters == 7


@case('num_train_epochs')
def num_train_epochs(world: World) -> None:
    runner = world.runner()
    assert runner.build_train_loop(runner._train_loop).max_iters == 2 * 16 // 4  # 4 samples a step


@case('gradient_accumulation_steps', accumulative_counts=3)
def gradient_accumulation_steps(world: World) -> None:
    wrapper = world.optim_wrapper()
    weight = wrapper.param_groups[0]['params'][0]
    steps = []
    for _ in range(6):
        before = weight.detach().clone()
        wrapper.update_params(weight.sum())
        steps.append(not torch.equal(before, weight))
    assert steps == [False, False, True] * 2


@case('learning_rate', lr=3e-4)
def learning_rate(world: World) -> None:
    assert world.group()['lr'] == 3e-4


@case('scale_lr')
def scale_lr(world: World) -> None:
    runner = world.runner(**{'train_dataloader.batch_size': 2})
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    assert wrapper.param_groups[0]['lr'] == pytest.approx(1e-5 * 2 * 2)  # batch size x accumulation


def diffusers_rates(num: int, name: str, **options: Any) -> list[float]:
    from diffusers.optimization import get_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_training_steps=num, **{'num_warmup_steps': 0, **options})
    rates = []
    for _ in range(num):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


@case('lr_scheduler')
def lr_scheduler(world: World) -> None:
    assert world.rates(8) == pytest.approx(diffusers_rates(8, 'cosine'), abs=0)


@case('lr_warmup_steps', num_warmup_steps=3)
def lr_warmup_steps(world: World) -> None:
    world.overrides['param_scheduler.name'] = 'constant_with_warmup'
    rates = world.rates(8)
    assert rates == diffusers_rates(8, 'constant_with_warmup', num_warmup_steps=3) and rates[:2] == [0, 1 / 3]


@case('lr_num_cycles', num_cycles=2)
def lr_num_cycles(world: World) -> None:
    world.overrides['param_scheduler.name'] = 'cosine_with_restarts'
    rates = world.rates(8)
    assert rates == diffusers_rates(8, 'cosine_with_restarts', num_cycles=2) and rates.count(1.0) == 2


@case('lr_power')
def lr_power(world: World) -> None:
    world.overrides['param_scheduler.name'] = 'polynomial'
    rates = world.rates(8)
    assert rates == diffusers_rates(8, 'polynomial', power=2.0) and rates != diffusers_rates(8, 'polynomial')


@case('use_8bit_adam')
def use_8bit_adam(world: World) -> None:
    try:
        import bitsandbytes
    except ImportError:
        with pytest.raises(UserError, match='needs the package bitsandbytes'):
            world.optim_wrapper()
    else:
        assert isinstance(world.optim_wrapper().optimizer, bitsandbytes.optim.AdamW8bit)


@case('adam_beta1', 'adam_beta2', betas=(0.8, 0.95))
def adam_betas(world: World) -> None:
    assert tuple(world.group()['betas']) == (0.8, 0.95)


@case('adam_weight_decay', weight_decay=0.5)
def adam_weight_decay(world: World) -> None:
    assert world.group()['weight_decay'] == 0.5


@case('adam_epsilon', eps=1e-3)
def adam_epsilon(world: World) -> None:
    assert world.group()['eps'] == 1e-3


@case('max_grad_norm', max_norm=0.25)
def max_grad_norm(world: World) -> None:
    wrapper = world.optim_wrapper()
    weight = wrapper.param_groups[0]['params'][0]
    weight.grad = torch.tensor([30.0, 40.0])
    wrapper.step()
    assert float(weight.grad.norm()) == pytest.approx(0.25, rel=1e-4)


@case('set_grads_to_none')
def set_grads_to_none(world: World) -> None:
    for enabled in (True, False):
        world.overrides['optim_wrapper.set_grads_to_none'] = enabled
        wrapper = world.optim_wrapper()
        weight = wrapper.param_groups[0]['params'][0]
        weight.grad = torch.ones(2)
        wrapper.zero_grad()
        assert (weight.grad is None) == enabled


@pytest.mark.parametrize('option', case.checks)
def test_option(option: str, request: pytest.FixtureRequest) -> None:
    case.run(option, request)
