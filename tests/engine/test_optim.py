"""Optimizers, the step wrapper, groups and learning rates against hand-written torch loops and diffusers."""

import copy
import io
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from diffusers.optimization import (
    get_cosine_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_scheduler,
)
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from diffengine_sdxl.engine.lr_schedulers import DiffusersLR
from diffengine_sdxl.engine.optim import StepOptimWrapper
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS, SCOPE


@pytest.fixture(autouse=True)
def scope():
    """As the runner sets it: mmengine's own build functions then look in our registries first."""
    with DefaultScope.overwrite_default_scope(SCOPE):
        yield


class Model(BaseModel):
    """Two 'adapters' and a frozen base; the loss is the mean squared error against `y`."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.style, self.base, self.pose = (nn.Linear(6, 6, dtype=dtype) for _ in range(3))
        self.base.requires_grad_(False)

    def trainables(self):
        return {'style': list(self.style.named_parameters()), 'pose': list(self.pose.named_parameters())}

    def forward(self, inputs, data_samples=None, mode='loss'):
        x, y = inputs
        return {'loss': (self.pose(self.base(torch.tanh(self.style(x)))) - y).square().mean()}


def batches(num, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    return [{'inputs': tuple(torch.randn(4, 6, generator=rng, dtype=dtype) for _ in range(2))} for _ in range(num)]


def build(model, optimizer=None, paramwise_cfg=None, **cfg):
    return build_optim_wrapper(model, dict(
        type='StepOptimWrapper', constructor='AdapterOptimWrapperConstructor', paramwise_cfg=paramwise_cfg,
        optimizer=optimizer or dict(type='AdamW', lr=1e-2), **cfg))


def by_hand(model, data, counts, max_norm=None, groups=None, **optimizer):
    """The same training as a bare loop; gradients of the mean loss of `counts` micro-batches at once."""
    trained = [*model.style.parameters(), *model.pose.parameters()]
    optim = torch.optim.AdamW(groups or trained, **optimizer)
    for i in range(0, len(data), counts):
        sum(model(**b)['loss'] for b in data[i:i + counts]).div(counts).backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optim.step()
        optim.zero_grad()


def equal(a, b, atol=0.0):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(('counts', 'clip'), [(1, None), (3, None), (3, 0.05)])
def test_accumulation_and_clipping_equal_one_large_step(counts, clip):
    ours, theirs = Model(), Model()
    wrapper = build(ours, accumulative_counts=counts, clip_grad=clip and dict(max_norm=clip))
    wrapper.initialize_count_status(ours, 0, 4)
    before = copy.deepcopy(ours.state_dict())
    for i, batch in enumerate(batches(4 * counts)):
        ours.train_step(batch, wrapper)
        assert torch.equal(before['style.weight'], ours.style.weight) == (i + 1 < counts)
    by_hand(theirs, batches(4 * counts), counts, clip, lr=1e-2)
    equal(ours, theirs, atol=1e-12)
    assert all(p.grad is None for p in ours.parameters())
    assert wrapper.accumulative_counts == counts and wrapper.inner_count == 4 * counts


def test_clipping_by_value_and_the_logged_norm():
    ours = Model()
    wrapper = build(ours, dict(type='SGD', lr=1.0), clip_grad=dict(type='value', clip_value=1e-3),
                    set_grads_to_none=False)
    before, batch = copy.deepcopy(ours), batches(1)[0]
    before(**batch)['loss'].backward()
    grads = [p.grad for p in (*before.style.parameters(), *before.pose.parameters())]
    ours.train_step(batch, wrapper)
    for p, q, grad in zip(ours.style.parameters(), before.style.parameters(), grads, strict=False):
        torch.testing.assert_close(p, q - grad.clamp(-1e-3, 1e-3), rtol=0, atol=1e-15)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    logged = wrapper.message_hub.get_scalar('train/grad_norm').current()
    assert logged == pytest.approx(float(norm), rel=1e-12) and isinstance(logged, float)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ours.style.parameters())


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_gradient_that_is_not_finite_changes_nothing(precision, value):
    model = Model()
    wrapper = build(model, mixed_precision=precision)
    model.train_step(batches(1)[0], wrapper)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(wrapper.state_dict())
    model.pose.weight.register_hook(lambda grad: torch.full_like(grad, value))
    with pytest.raises(FloatingPointError, match="'pose' are not finite.*no weight was changed"):
        model.train_step(batches(2)[1], wrapper)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for i, entry in wrapper.state_dict()['state'].items():
        assert all(torch.equal(entry[k], v) for k, v in state['state'][i].items())


def test_fp16_scales_skips_overflow_and_halves():
    ours, theirs = Model(torch.float32), Model(torch.float32)
    wrapper = build(ours, mixed_precision='fp16', accumulative_counts=2, clip_grad=dict(max_norm=0.05),
                    loss_scale=dict(init_scale=1024.0, growth_interval=100))
    data = batches(4, torch.float32)
    for batch in data[:2]:
        ours.train_step(batch, wrapper)
    by_hand(theirs, data[:2], 2, 0.05, lr=1e-2)
    equal(ours, theirs, atol=1e-6)  # clipping saw the unscaled gradients
    before = copy.deepcopy(ours.state_dict())
    hook = ours.pose.weight.register_hook(lambda grad: torch.full_like(grad, float('inf')))
    for batch in data[2:]:
        ours.train_step(batch, wrapper)
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    assert wrapper.loss_scaler.get_scale() == 512.0
    assert wrapper.message_hub.get_scalar('train/loss_scale').current() == 512.0
    with pytest.raises(FloatingPointError, match="'pose' overflow at every loss scale"):
        for batch in data * 20:
            ours.train_step(batch, wrapper)
    hook.remove()
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def saved(state):
    """Through a file, as a checkpoint is: without pickled classes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(('optimizer', 'precision'), [
    (dict(type='AdamW', lr=1e-2), 'fp16'), (dict(type='AdamW', lr=1e-2), 'no'), (dict(type='Prodigy'), 'no'),
    (dict(type='Adafactor', lr=1e-3), 'no'), (dict(type='Adafactor'), 'no'), (dict(type='TorchAdafactor'), 'no')])
def test_stopped_and_resumed_is_bitwise_not_stopped(optimizer, precision):
    def start(end):
        model = Model(torch.float32)
        wrapper = build(model, optimizer, mixed_precision=precision, accumulative_counts=2,
                        **({'loss_scale': dict(growth_interval=2)} if precision == 'fp16' else {}))
        schedule = PARAM_SCHEDULERS.build(dict(type='DiffusersLR', name='cosine', num_warmup_steps=2, optimizer=wrapper,
                                               num_training_steps=8, end=end))
        return model, wrapper, schedule

    def go(model, wrapper, schedule, begin, end):
        wrapper.initialize_count_status(model, begin, end)
        for step in range(begin, end):
            for batch in batches(16, torch.float32)[2 * step:2 * step + 2]:
                model.train_step(batch, wrapper)
            schedule.step()

    whole = start(8)
    go(*whole, 0, 8)
    first = start(3)
    go(*first, 0, 3)
    state = saved([part.state_dict() for part in first])
    second = start(8)
    for part, values in zip(second, state, strict=True):
        part.load_state_dict(values)
    go(*second, 3, 8)
    equal(whole[0], second[0])
    if precision == 'fp16':
        assert second[1].loss_scaler.state_dict() == whole[1].loss_scaler.state_dict()
        assert second[1].loss_scaler.get_scale() == 65536.0 * 2**4
    assert second[1].get_lr() == whole[1].get_lr()


def test_a_state_of_other_precision_loads_and_of_other_groups_does_not():
    wrapper = build(Model(torch.float32), mixed_precision='fp16')
    half = saved(wrapper.state_dict())
    build(Model(torch.float32)).load_state_dict(half)
    assert 'loss_scaler' in half
    wrapper.load_state_dict(build(Model(torch.float32)).state_dict())
    half['param_groups'].reverse()
    with pytest.raises(UserError, match=r"\['pose', 'style'\].*\['style', 'pose'\]"):
        wrapper.load_state_dict(half)


def test_each_adapter_has_its_own_rate():
    ours, theirs = Model(), Model()
    wrapper = build(ours, paramwise_cfg=dict(lr={'style': 1e-3}, weight_decay={'pose': 0.3}))
    for batch in batches(3):
        ours.train_step(batch, wrapper)
    by_hand(theirs, batches(3), 1, lr=1e-2, groups=[{'params': list(theirs.style.parameters()), 'lr': 1e-3},
                                                    {'params': list(theirs.pose.parameters()), 'weight_decay': 0.3}])
    equal(ours, theirs, atol=1e-12)
    assert [g['name'] for g in wrapper.optimizer.param_groups] == ['style', 'pose']
    assert wrapper.get_lr() == {'lr': [1e-3], 'style_lr': [1e-3], 'pose_lr': [1e-2]}


class Nested(nn.Module):
    """An adapter of its own and one that lives in the base, as `SDXL.trainables` names them."""

    def trainables(self):
        def weights(*names):
            return [(name, nn.Parameter(torch.zeros(1))) for name in names]
        return {'ip': weights('adapters.ip.projector.weight', 'adapters.ip.to_k.weight'),
                'style': weights('unet.mid.a.style', 'unet.middle.a.style', 'text_encoder.b.style',
                                 'text_encoder_2.b.style', 'unet.mid.c.style')}


def test_modules_within_an_adapter_have_their_own_rate():
    """The longest name wins, whatever the order; what an adapter is given holds for its modules without one."""
    wrapper = build(Nested(), paramwise_cfg=dict(
        lr={'style.unet.mid': 3.0, 'style': 2.0, 'style.unet.mid.c': 4.0, 'ip.projector': 5.0,
            'style.text_encoder': 6.0},
        weight_decay={'style': 0.5, 'style.unet.mid.c': 0.25}))
    groups = {g['name']: (len(g['params']), g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups}
    rest = torch.optim.AdamW([torch.zeros(1)]).defaults['weight_decay']
    assert groups == {'ip.projector': (1, 5.0, rest), 'ip': (1, 1e-2, rest), 'style.unet.mid': (1, 3.0, 0.5),
                      'style': (2, 2.0, 0.5), 'style.text_encoder': (1, 6.0, 0.5), 'style.unet.mid.c': (1, 4.0, 0.25)}
    nested = build(Nested(), paramwise_cfg=dict(lr={'style': {'unet': {'mid': 3.0}}}))
    assert [g['lr'] for g in nested.optimizer.param_groups] == [1e-2, 3.0, 1e-2]
    with pytest.raises(UserError, match=r"names 'style.unet.mi', which is not trained"):
        build(Nested(), paramwise_cfg=dict(lr={'style.unet.mi': 1.0}))


@pytest.mark.parametrize(('paramwise', 'word'), [
    (dict(lr={'styl': 1e-3}), "Did you mean 'style'"), (dict(lr=1e-3), 'must be a dict'),
    (dict(lr_rate={'style': 1}), 'lr_rate is not an argument of AdamW')])
def test_wrong_group_settings_are_refused(paramwise, word):
    with pytest.raises(UserError, match=word):
        build(Model(), paramwise_cfg=paramwise)


def test_nothing_to_train_is_refused():
    model = Model()
    model.trainables = lambda: {'style': []}
    with pytest.raises(UserError, match='Nothing to train'):
        build(model)


@pytest.mark.parametrize(('cfg', 'word'), [
    (dict(accumulative_counts=0), 'accumulative_counts=0'), (dict(mixed_precision='fp8'), "'fp8'.*'bf16'"),
    (dict(clip_grad=dict(max_nrom=1.0)), "Did you mean 'max_norm'"), (dict(clip_grad=dict(max_norm=0)), 'max_norm=0'),
    (dict(clip_grad=dict(type='norms', max_norm=1)), "type='norms'"), (dict(clip_grad={}), 'max_norm=None'),
    (dict(optimizer=dict(type='AdamW', lr=-1)), 'Invalid learning rate: -1'),
    (dict(optimizer=dict(type='AdamW', lrate=1)), "type='AdamW'.*lrate"),
    (dict(mixed_precision='fp16', loss_scale=dict(growth_factor=0.5)), 'loss_scale=.*growth factor'),
    (dict(optimizer=dict(type='AdmaW')), "Did you mean 'AdamW'"),
    (dict(optimizer=dict(type='Adafactor', lr=1e-3, relative_step=True)), 'relative_step')])
def test_wrong_settings_are_refused(cfg, word):
    with pytest.raises(UserError, match=word):
        build(Model(), **cfg)
    with pytest.raises(UserError, match='fp32'):
        StepOptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1).half())], lr=1), mixed_precision='fp16')


@pytest.mark.parametrize(('name', 'module', 'package'), [('AdamW8bit', 'bitsandbytes.optim', 'bitsandbytes'),
                                                         ('Prodigy', 'prodigyopt', 'prodigyopt')])
def test_optimizers_of_other_packages(monkeypatch, name, module, package):
    parameters = [nn.Parameter(torch.zeros(2))]
    fake = types.ModuleType(module)
    setattr(fake, name, torch.optim.RMSprop)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module, fake)
    built = OPTIMIZERS.build(dict(type=name, params=parameters, lr=0.5))
    assert type(built) is torch.optim.RMSprop and built.defaults['lr'] == 0.5
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"type='{name}' needs.*pip install {package}"):
        OPTIMIZERS.build(dict(type=name, params=parameters))


def test_adafactor_is_that_of_transformers():
    from transformers import Adafactor
    built = build(Model(), dict(type='Adafactor', scale_parameter=False)).optimizer
    assert type(built) is Adafactor and all(g['relative_step'] for g in built.param_groups)
    given = build(Model(), dict(type='Adafactor'), paramwise_cfg=dict(lr={'style': 1e-3, 'pose': 1e-4})).optimizer
    assert not any(g['relative_step'] for g in given.param_groups)
    wrapper = OPTIM_WRAPPERS.build(dict(type='StepOptimWrapper', optimizer=built))
    schedule = DiffusersLR(wrapper, 'cosine', num_training_steps=4)
    wrapper.step()
    schedule.step()
    assert wrapper.get_lr() == {} and all(g['lr'] is None for g in built.param_groups)


def rates(make, num):
    """The rates that a scheduler gives two groups over `num` steps."""
    optimizer = torch.optim.SGD([{'params': [nn.Parameter(torch.zeros(1))], 'lr': 3e-4},
                                 {'params': [nn.Parameter(torch.zeros(1))]}], lr=1e-3)
    scheduler, seen = make(optimizer), []
    for _ in range(num):
        seen.append([g['lr'] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


NAMES = {'constant': {}, 'constant_with_warmup': {}, 'linear': {}, 'cosine': {},
         'cosine_with_restarts': dict(num_cycles=3), 'polynomial': dict(power=2.0),
         'piecewise_constant': dict(step_rules='1:4,0.1:12,0.01')}


@pytest.mark.parametrize('name', NAMES)
def test_rates_are_bitwise_those_of_diffusers(name):
    cfg = dict(num_warmup_steps=5, num_training_steps=20, **NAMES[name])
    theirs = rates(lambda o: get_scheduler(name, o, **cfg), 26)
    ours = dict(type='DiffusersLR', name=name, **cfg)
    assert rates(lambda o: PARAM_SCHEDULERS.build(dict(ours, optimizer=o)), 26) == theirs
    assert len({tuple(r) for r in theirs}) > 2 or name == 'constant'
    # mmengine's `end` is the number of training steps when none is given; after it the rate stays
    del cfg['num_training_steps']
    assert rates(lambda o: DiffusersLR(o, name, end=20, **cfg), 20) == theirs[:20]


def test_rates_of_arguments_that_get_scheduler_does_not_pass_on():
    ours = rates(lambda o: DiffusersLR(o, 'cosine', 2, 20, num_cycles=1.5), 20)
    assert ours == rates(lambda o: get_cosine_schedule_with_warmup(o, 2, 20, num_cycles=1.5), 20)
    ours = rates(lambda o: DiffusersLR(o, 'polynomial', 2, 20, lr_end=1e-5), 20)
    assert ours == rates(lambda o: get_polynomial_decay_schedule_with_warmup(o, 2, 20, lr_end=1e-5), 20)


def test_a_schedule_that_begins_later_counts_from_there():
    ours = rates(lambda o: DiffusersLR(o, 'linear', 2, 10, begin=3), 13)
    assert ours[3:] == rates(lambda o: get_scheduler('linear', o, num_warmup_steps=2, num_training_steps=10), 10)
    assert ours[:3] == [[3e-4, 1e-3]] * 3


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('stop', 'first_end'), [(7, 26), (7, 7), (20, 20)])
def test_resumed_rates_are_those_not_stopped(name, stop, first_end):
    """Also when the first part was configured as shorter: its last step must not hold the schedule back."""
    cfg = dict(name=name, num_warmup_steps=5, num_training_steps=20, **NAMES[name])
    whole = rates(lambda o: DiffusersLR(o, end=26, **cfg), 26)

    def resumed(optimizer):
        start = torch.optim.SGD([{'params': [nn.Parameter(torch.zeros(1))], 'lr': g['lr']}
                                 for g in optimizer.param_groups], lr=1e-3)
        first = DiffusersLR(start, end=first_end, **cfg)
        for _ in range(stop):
            start.step()
            first.step()
        state = saved([start.state_dict(), first.state_dict()])
        second = DiffusersLR(optimizer, end=26, **cfg)
        optimizer.load_state_dict(state[0])
        second.load_state_dict(state[1])
        return second
    assert rates(resumed, 26 - stop) == whole[stop:]


@pytest.mark.parametrize(('cfg', 'word'), [
    (dict(name='cosin'), "'cosin' is unknown.*'cosine'"), (dict(num_warmup_steps=0.5), 'num_warmup_steps=0.5'),
    (dict(name='piecewise_constant', step_rules='1:ten,0.1'), "literal for int.*'1:ten,0.1'"),
    (dict(name='polynomial', num_training_steps=4, lr_end=1.0), 'lr_end'),
    (dict(name='linear'), 'needs num_training_steps'),
    (dict(name='piecewise_constant'), 'needs step_rules'), (dict(by_epoch=True), 'by_epoch')])
def test_wrong_schedules_are_refused(cfg, word):
    with pytest.raises(UserError, match=word):
        DiffusersLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3), **cfg)


def test_ddp_sends_gradients_once_a_step(tmp_path):
    """And resuming counts from iterations, not from micro-batches."""
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'store'), 1), rank=0, world_size=1)
    try:
        ours, theirs, sent = Model(), Model(), OrderedDict()
        ddp = MMDistributedDataParallel(ours, broadcast_buffers=False)

        def count(state, bucket):
            sent[wrapper.inner_count] = sent.get(wrapper.inner_count, 0) + 1
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        ddp.register_comm_hook(None, count)
        wrapper = build(ddp, accumulative_counts=3)
        wrapper.initialize_count_status(ddp, 2, 4)
        assert wrapper.inner_count == 6
        for batch in batches(6):
            ddp.train_step(batch, wrapper)
        assert list(sent) == [8, 11]  # during the third backward pass of each step
        by_hand(theirs, batches(6), 3, lr=1e-2)
        equal(ours, theirs, atol=1e-12)
    finally:
        dist.destroy_process_group()
