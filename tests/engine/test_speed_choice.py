"""What becomes of `speed` in a run: in its table, its checkpoints and its manifest; taken again on resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from runs import DeathError, build
from torch.nn.attention import SDPBackend

from diffengine_sdxl.engine import determinism, run_identity, speed_choice
from diffengine_sdxl.engine.speed_choice import choose, record
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.speed import Speed

OFF = {'compile': 'off', 'checkpointing': 'off', 'base_dtype': 'fp32'}


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory, tiny_options: dict[str, Any]) -> Path:
    """Two of four steps of a run that has measured something."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    runner = build(folder, tiny_options, die_at=2)
    runner.measured['attention'] = ['flash', 'math']
    with pytest.raises(DeathError):
        runner.train()
    return folder


def test_the_choice_is_recorded(run: Path) -> None:
    meta = checkpoint.load(run / 'step2.pth')['meta']
    assert meta['speed'] == {**OFF, 'device': 'cpu'} and meta['measured'] == {'attention': ['flash', 'math']}
    manifest = json.loads((run / 'step2' / 'manifest.json').read_text())
    assert manifest['speed'] == OFF and manifest['measured'] == meta['measured']


def test_a_resumed_run_takes_what_was_chosen(run: Path, tiny: dict[str, Any]) -> None:
    runner = build(run, {**tiny, 'speed.checkpointing': 'full'}, resume=True)
    applied, lines = [], []
    runner.logger.warning = lines.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('diffengine_sdxl.engine.runner.apply_speed', lambda model, speed: applied.append(speed))
        # As `train` does.
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner.param_schedulers = []
        patch.setattr(checkpoint, 'load', lambda *args, load=checkpoint.load: load(*args) | {'param_schedulers': []})
        runner.load_or_resume()
    assert runner.measured == {'attention': ['flash', 'math']}
    assert applied == [runner.speed] == [Speed('off', 'full', 'fp32')]
    assert not lines  # what is recomputed has the same bits


def test_auto_follows_the_record_on_the_same_kind_of_device(tiny_base: Path) -> None:
    from mmengine.config import Config

    from diffengine_sdxl.models.sdxl import SDXL
    model, config = SDXL(pretrained=str(tiny_base)), Config({'model': {}})
    recorded = record(Speed('blocks', 'full', 'fp32'), torch.device('cpu'))
    assert choose(Speed(), config, model, 9, recorded) == (Speed('blocks', 'full', 'fp32'), None)
    chosen, line = choose(Speed(), config, model, 9, {**recorded, 'device': 'cuda'})
    assert chosen == Speed('off', 'off', 'fp32') and line is not None and "compile was 'blocks', is now 'off'" in line
    assert choose(Speed(), config, model, 9, None)[1] is None


def test_a_quantized_base_is_another_run_and_nothing_else_is(tiny: dict[str, Any]) -> None:
    from mmengine.config import Config
    same = [run_identity.identity(Config({'model': {}, **({} if speed is None else {'speed': speed})}))
            for speed in (None, {}, {'compile': 'blocks', 'checkpointing': 'full'}, {'base_dtype': 'bf16'})]
    assert same[0] == same[1] == same[2] == same[3]
    assert run_identity.identity(Config({'model': {}, 'speed': {'base_dtype': 'int8'}})) != same[0]


def test_what_cannot_be_is_refused_before_the_folder_is_touched(tmp_path: Path, tiny: dict[str, Any]) -> None:
    for option, words in (({'speed.compile': 'graph'}, 'for images only'), ({'speed.base_dtype': 'fp8'}, 'needs a GPU'),
                          ({'speed.compile': 'blocks', 'randomness.deterministic': True}, 'deterministic')):
        with pytest.raises(UserError, match=words):
            build(tmp_path / 'run', {**tiny, **option})
    assert not (tmp_path / 'run').exists()


def test_a_kernel_that_is_not_deterministic_is_named() -> None:
    message = ("cumsum_cuda_kernel does not have a deterministic implementation, but you set "
               "'torch.use_deterministic_algorithms(True)'.")
    with pytest.raises(UserError, match="kernel 'cumsum_cuda_kernel' gives"), determinism.named_kernels():
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match='another'), determinism.named_kernels():
        raise RuntimeError('another')


def test_what_was_measured_is_in_force_while_it_trains(tmp_path: Path, tiny: dict[str, Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """In the training steps, in the checkpoint, and no longer."""
    orders, before = list[int](), torch._C._get_sdp_priority_order()

    class Look(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            orders.append(torch._C._get_sdp_priority_order()[0])
    monkeypatch.setattr(speed_choice, 'measure', lambda *_: {'attention': ['math', 'flash']})
    runner = build(tmp_path / 'run', {**tiny, 'train_cfg.max_iters': 1, 'default_hooks.checkpoint.export': False})
    runner.register_hook(Look())
    runner.train()
    # torch itself does not restore the order of those behind the first one.
    assert orders == [SDPBackend.MATH.value] and torch._C._get_sdp_priority_order()[0] == before[0]
    assert torch.load(tmp_path / 'run' / 'step1.pth')['meta']['measured'] == {'attention': ['math', 'flash']}
