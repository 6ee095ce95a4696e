"""`plan`: what is counted without weights against a real step's memory, what is proposed, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from torch.profiler import ProfilerActivity, profile

from diffengine_sdxl import config
from diffengine_sdxl.commands.plan import devices, meta_model
from diffengine_sdxl.commands.plan.command import _size, make_plan, run
from diffengine_sdxl.commands.plan.counter import Autocast, Rates, counted
from diffengine_sdxl.commands.plan.estimate import propose, setting, states_of
from diffengine_sdxl.commands.plan.step_counts import set_all_checkpointing
from diffengine_sdxl.commands.plan.table import Plan, report
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL

CONFIG = 'stable_diffusion_xl_t2i_adapter_fill50k'


@pytest.fixture(scope='module')
def options(tiny_base: Path) -> dict[str, Any]:
    return {'model.pretrained': str(tiny_base), 'model.vae': None, 'resolution': 64, 'mixed_precision': 'no',
            'train_dataloader.batch_size': 2, 'optim_wrapper.accumulative_counts': 2, 'train_cfg.max_iters': 3600,
            'speed.checkpointing': 'off', 'default_hooks.samples': None,
            'model.adapters.style': {'type': 'LoRA', 'rank': 4}}


@pytest.fixture(scope='module')
def plan(options: dict[str, Any]) -> Plan:
    return make_plan(config.load(CONFIG, options), 'RTX3090')


def test_an_objective_that_allows_no_checkpointing(options: dict[str, Any]) -> None:
    """It is counted without, with its second pass; and refused where the config asks for it."""
    repair = {**options, 'speed.checkpointing': 'auto',
              'model.adapters.style': dict(type='LoRA', rank=4, weights='a/b')}
    joint = make_plan(config.load('stable_diffusion_xl_repair', repair), 'RTX3090')
    plain = make_plan(config.load('stable_diffusion_xl_repair', {**repair, 'model.objective': dict(
        _delete_=True, type='Denoise'), 'speed.checkpointing': 'off'}), 'RTX3090')
    assert [*joint.counts.at_one] == ['off'] and joint.own.checkpointing == 'off'
    assert joint.counts.at_one['off'].flop > 1.5 * plain.counts.at_one['off'].flop
    with pytest.raises(UserError, match="speed.checkpointing='full' cannot be used with JointDistill"):
        make_plan(config.load('stable_diffusion_xl_repair', {**repair, 'speed.checkpointing': 'full'}), 'RTX3090')


# Counts

def test_counted_kernels() -> None:
    """A linear layer and a norm under autocast: known kernels, bytes, FLOP, seconds and memory."""
    weight = torch.zeros(8, 8, device='meta', requires_grad=True)
    x = torch.zeros(4, 8, device='meta')
    with counted(Rates(copy=1e9, half=1e9, full=1e9, attention=1e9, launch=0.0)) as counter, Autocast(torch.bfloat16):
        y = torch.nn.functional.linear(x, weight)
        z = torch.nn.functional.layer_norm(y, (8,))
    assert y.dtype == torch.bfloat16 and z.dtype == torch.float32
    # Two casts to bf16, the product, a cast to fp32, the norm; the transposed weight is a view.
    assert counter.kernels == 5 and counter.flop == 2 * 4 * 8 * 8
    # x 128 and weight 256 bytes to half of each; the product's FLOP; y 64 to 128; the norm with its statistics.
    assert counter.seconds == pytest.approx((192 + 384 + 512 + 192 + 128 + 128 + 2 * 16) / 1e9)
    before = counter.live
    del z
    assert counter.live < before <= counter.peak


def test_attention_writes_no_map() -> None:
    q = torch.zeros(1, 1, 1024, 64, device='meta', dtype=torch.bfloat16)
    mask = torch.zeros(1024, 1024, device='meta')
    with counted() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert counter.kernels == 1 and counter.flop == 2 * 2 * 1024**2 * 64 and counter.peak < 1024**2


def peak_of_a_step(model: SDXL, batch: Any) -> int:
    """Rise of what PyTorch's CPU allocator holds in a loss and its backward pass, by its own events, in bytes."""
    def work() -> None:
        model(batch, mode='loss')['loss'].backward()
    work()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    live = peak = 0
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    model.zero_grad(set_to_none=True)
    return peak


def test_memory_is_that_of_a_real_step(tiny_base: Path, plan: Plan) -> None:
    """Within 15 %, the counted batch and a larger one; parameters are those of the built model."""
    adapters = dict(adapter=dict(type='T2IAdapter'), style=dict(type='LoRA', rank=4))
    settings: dict[str, Any] = dict(pretrained=str(tiny_base), adapters=adapters, objective=dict(type='Denoise'))
    meta, notes = meta_model.build({'type': 'SDXL', **settings})
    assert not notes
    model = SDXL(**settings).train()
    assert [(n, p.shape, p.dtype) for n, p in meta.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()]
    for mode in ('off', 'full'):
        set_all_checkpointing(model, mode)
        for num in (2, 5):
            batch = meta_model.batch_of(meta, num, (64, 64), {})
            here = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in vars(batch).items()
                    if isinstance(value, torch.Tensor) and value.device.type == 'meta'}
            images = {name: torch.zeros(value.shape) for name, value in batch.conditions.items()}
            assert plan.counts.at(num, mode).peak == pytest.approx(
                peak_of_a_step(model, replace(batch, **here, conditions=images)), rel=0.15), (mode, num)


def test_states_of_optimizers() -> None:
    assert states_of({'type': 'AdamW', 'lr': 1e-4}) == pytest.approx(2, abs=1e-3)
    assert states_of({'type': 'SGD', 'lr': 1e-4}) == 0 and states_of({'type': 'AdamW8bit', 'lr': 1e-4}) == 0.5
    assert states_of({'type': 'SGD', 'lr': 1e-4, 'momentum': 0.9}) == 1
    assert states_of({'type': 'Adafactor', 'lr': 1e-4}) < 0.05
    with pytest.raises(UserError, match='AdamW'):
        states_of({'type': 'AdamW', 'rate': 1})


# The plan

def test_the_page_and_the_file(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('diffengine_sdxl.commands.plan.command.make_plan', lambda *_: plan)
    run(SimpleNamespace(config=CONFIG, device='RTX3090', json=tmp_path / 'plan.json', cfg_options=()), None)
    page, figures = capsys.readouterr().out, json.loads((tmp_path / 'plan.json').read_text())
    assert page == report(plan) + '\n' and max(map(len, page.splitlines())) <= 130
    own, proposed = figures['own'], figures['proposed']
    assert own['peak'] == pytest.approx(sum(own['memory'].values())) and own['seconds'] > proposed['seconds'] > 0
    assert figures['weights']['num_trained'] == 343088 and figures['steps'] == 3600
    assert own['images_per_second'] == pytest.approx(4 / own['seconds'])
    for path, words in ((tmp_path, 'is no file'), (tmp_path / 'no' / 'plan.json', 'which is no folder')):
        monkeypatch.setattr('diffengine_sdxl.commands.plan.command.make_plan', lambda *_: pytest.fail('it was counted'))
        with pytest.raises(UserError, match=words):
            run(SimpleNamespace(config=CONFIG, device='RTX3090', json=path, cfg_options=()), None)
    assert [path.name for path in tmp_path.iterdir()] == ['plan.json']
    # What the page says can be pasted.
    options = page.replace('\n', ' ').split('--cfg-options ')[1].split('  ')[0].split()
    assert 'train_dataloader.batch_size=4' in options and 'optim_wrapper.accumulative_counts=1' in options
    assert 'cache=FOLDER' in options and re.search(rf'hours for 3,600 steps +{plan.own.seconds:.3g} ', page)


def test_memory_goes_by_what_the_config_says(plan: Plan) -> None:
    def memory(**changes: Any) -> dict[str, float]:
        training = replace(plan.training, **changes)
        weights = replace(plan.weights, ema=plan.weights.trained * training.has_ema)
        return dict(setting(plan.counts, weights, plan.device, training, batch_size=2, checkpointing='off',
                            cached=training.cached).memory)
    now, trained = memory(), plan.weights.trained
    assert now['optimizer states'] == pytest.approx(2 * trained, rel=1e-3) and 'EMA' not in now
    assert memory(has_ema=True)['EMA'] == trained and 'frozen encoders' not in memory(cached=True)
    # Gradients of the first micro-batch stay while the second one's activations come.
    assert now['gradients and workspace'] >= trained
    assert sum(memory(accumulation=1).values()) < sum(now.values())
    # All weights in fp32, and few buffers.
    assert now['frozen base'] + now['frozen encoders'] + now['adapters'] == pytest.approx(
        plan.weights.num_frozen * 4 + trained, rel=1e-3)


def test_sides_with_buckets_are_those_of_their_step() -> None:
    sampled = ConfigDict(resolution=1000, train_dataloader=dict(sampler=dict(type='BucketSampler')))
    assert _size(sampled, 16) == (992, 992)


def test_a_cpu_waits_for_its_host(plan: Plan) -> None:
    def seconds(kind: str, host: float) -> float:
        device = replace(plan.device, type=kind, rates=replace(plan.device.rates, host=host))
        own = setting(plan.counts, plan.weights, device, plan.training, batch_size=2, checkpointing='off', cached=True)
        return own.seconds
    kernels = 2 * plan.counts.at(2, 'off').kernels
    assert seconds('cpu', 1e-3) == pytest.approx(seconds('cpu', 0.0) + kernels * 1e-3)
    assert seconds('cuda', 1e-3) == pytest.approx(kernels * 1e-3, rel=0.01)
    page = report(replace(plan, device=replace(plan.device, type='cpu', memory=2**34)))
    assert '16.0 GiB of memory' in page


def test_the_fastest_setting_that_fits_is_proposed(plan: Plan) -> None:
    """Less memory: a smaller batch or checkpointing, then nothing; the samples of a step stay."""
    def proposal(memory: float) -> Any:
        return propose(plan.counts, plan.weights, replace(plan.device, memory=int(memory)), plan.training)
    best = proposal(1e12)
    assert (best.batch_size, best.accumulation, best.checkpointing, best.cached) == (4, 1, 'off', True)
    tight = proposal(best.peak - 1)
    assert tight.peak < best.peak and tight.seconds > best.seconds and tight.batch_size * tight.accumulation == 4
    assert proposal(1e5) is None
    small = replace(plan, device=replace(plan.device, memory=10**5), proposed=None)
    assert 'Nothing fits into' in report(small) and ', too much' in report(small)


def test_sources_that_are_not_here_are_replaced_and_named(tmp_path: Path, tiny_base: Path) -> None:
    """A hub id, a single file, an image encoder: nothing is downloaded, and the config is not changed."""
    model = {'pretrained': 'nobody/nothing', 'vae': 'nobody/vae', 'revision': 'main', 'config': str(tiny_base),
             'adapters': {'ip': {'type': 'IPAdapter'}, 'c': {'type': 'ControlNet', 'weights': 'nobody/canny',
                                                             'variant': 'fp16'}, 'off': None}}
    before = json.dumps(model)
    local, notes = meta_model._local_sources(model, tmp_path)
    assert local['pretrained'] is None and local['vae'] is None and 'revision' not in local
    assert local['adapters']['c'] == {'type': 'ControlNet'} and local['adapters']['off'] is None
    assert local['adapters']['ip']['image_encoder'] == str(tmp_path)
    assert len(notes) == 4 and 'nobody/nothing' in notes[0] and 'nobody/canny' in notes[3] and 'ViT-H' in notes[2]
    assert json.dumps(json.loads(before)['adapters']) == json.dumps(model['adapters'])
    assert 'single file' in meta_model._local_sources({'pretrained': 'a/b/x.safetensors'}, tmp_path)[1][0]


# Devices and mistakes

def test_devices() -> None:
    h100 = devices.find('H100')
    assert h100.rates.half == pytest.approx(593e12, rel=0.01) and h100.rates.copy == pytest.approx(2.7e12, rel=0.01)
    assert devices.find('rtx 4090') == devices.find('RTX4090') and not devices.find('T4').has_bf16
    assert devices.find('A100', tf32=True).rates.full > devices.find('A100').rates.full
    rates = devices.probe(torch.device('cpu'), seconds=0.01)
    assert all(1e6 < rate < 1e14 for rate in (rates.copy, rates.half, rates.full)) and rates.launch == 0
    # A kernel that does nothing takes autograd and Python more than 2 us, and far less than 1 ms.
    assert 2e-6 < rates.host < 1e-3


@pytest.mark.parametrize(('changes', 'device', 'words'), [
    ({}, 'H10', "'H10' is unknown. Did you mean 'H100'"), ({'train_cfg': None}, 'T4', 'no `train_cfg`'),
    ({'model.adapters.adapter.trainable': False, 'model.adapters.style.trainable': False}, 'T4', 'Nothing to train'),
    ({'model.adapters.adapter.channels': [32]}, 'T4', 'It was made for another base'),
    ({'train_dataloader.batch_size': 0}, 'T4', 'batch_size=0 must be at least 1'),
    ({'resolution': 72}, 'T4', 'resolution: Images of 72 x 72 cannot be made: 16 must divide both sides')])
def test_mistakes_are_sentences(changes: dict[str, Any], device: str, words: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(config.load(CONFIG, {**options, **changes}), device)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match='no GPU that PyTorch finds'):
        devices.find('cuda')
