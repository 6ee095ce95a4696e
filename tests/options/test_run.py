"""Options of the run, most of them checked on one run of four steps; see test_table.py."""

import argparse
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from options.table import FILL50K, ROOT, TABLE, Cases, Overrides, World
from PIL import Image

from diffengine_sdxl import config, errors
from diffengine_sdxl.commands.common import load_config
from diffengine_sdxl.registry import HOOKS, RUNNERS, VISUALIZERS

case = Cases()


def parsed(*arguments: str) -> argparse.Namespace:
    """Return how tools/train.py parses a command line."""
    import runpy
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', FILL50K, *arguments])
        patch.setattr(errors, 'run_command', lambda name, args: calls.append(args) or 0)
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
    return calls[0]


@case('output_dir')
def output_dir(world: World) -> None:
    flag, _ = world.setting.split()
    assert load_config(parsed(flag, 'some/where')).work_dir == 'some/where'
    assert load_config(parsed()).work_dir == f'work_dirs/{FILL50K}'


@case('seed')
def seed(world: World) -> None:
    runner = world.runner()
    assert runner.seed == runner.model.seed == 42


@pytest.fixture(scope='module')
def run(tiny_base: Path, circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of four steps; each key comes from the table, with a value that is not its default."""
    folder = tmp_path_factory.mktemp('run')
    image = circles / 'conditioning_images' / '00003.png'
    values: Overrides = {
        'max_train_steps': 4, 'checkpointing_steps': 1, 'checkpoints_total_limit': 2, 'validation_steps': 2,
        'num_validation_images': 3, 'validation_prompt': ['red circle', 'blue circle'],
        'validation_image': [str(image), str(image)]}
    overrides = {TABLE[option].split()[-1].partition('=')[0]: value for option, value in values.items()}
    cfg = config.load(FILL50K, {
        'model.pretrained': str(tiny_base), 'model.vae': None, 'resolution': 64, 'mixed_precision': 'no',
        'train_dataloader.dataset.source': str(circles), 'train_dataloader.num_workers': 0,
        'model.sampler.num_inference_steps': 1, 'optim_wrapper.accumulative_counts': 1, **overrides})
    cfg.work_dir = str(folder)
    RUNNERS.build(cfg).train()
    return folder


@case('checkpointing_steps', 'checkpoints_total_limit')
def checkpoints(world: World, run: Path) -> None:
    assert sorted(p.name for p in run.glob('step*.pth')) == ['step3.pth', 'step4.pth']


@case('validation_steps', 'validation_prompt', 'validation_image', 'num_validation_images')
def samples(world: World, run: Path) -> None:
    assert sorted(p.name for p in (run / 'samples').glob('step[0-9].png')) == ['step2.png', 'step4.png']
    width, height = Image.open(run / 'samples' / 'step4.png').size
    # Cells of 128 pixels: condition and three images side by side, a row for each of two prompts.
    assert 4 * 128 < width < 5 * 128 and 2 * 128 < height < 3 * 128


@case('resume_from_checkpoint')
def resume(world: World, run: Path) -> None:
    assert load_config(parsed(world.setting)).resume is True
    work_dir = shutil.copytree(run, world.tmp / 'run')
    (work_dir / 'step4.pth').unlink()
    for arguments in ([], [str(work_dir / 'step3.pth')]):
        cfg = config.load(next(work_dir.glob('*.py')))
        cfg.resume = load_config(parsed(world.setting, *arguments)).resume
        cfg.work_dir, cfg.experiment_name = str(work_dir), f'resume {len(arguments)}'
        RUNNERS.build(cfg).train()
        steps = [json.loads(line)['step'] for line in (work_dir / 'curves.jsonl').read_text().splitlines()]
        assert steps == [1, 2, 3, 4] and (work_dir / 'step4.pth').is_file()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the optional package wandb; return the arguments of each `wandb.init`."""
    calls: list[dict[str, Any]] = []
    module = types.ModuleType('wandb')
    module.init = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    module.log = lambda *_, **__: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return calls


def visualizer(world: World) -> Any:
    from mmengine.visualization import Visualizer
    cfg = dict(world.resolved().visualizer)
    built = VISUALIZERS.build({**cfg, 'name': str(world.tmp), 'save_dir': str(world.tmp)})
    assert isinstance(built, Visualizer)
    built.add_scalar('loss', 1.0, 1)
    return built


@case('report_to')
def report_to(world: World, wandb: list[dict[str, Any]]) -> None:
    assert set(visualizer(world)._vis_backends) == {'LocalVisBackend', 'WandbVisBackend'} and len(wandb) == 1


@case('tracker_project_name')
def tracker_project_name(world: World, wandb: list[dict[str, Any]]) -> None:
    visualizer(world)
    assert wandb[0]['project'] == 'PROJECT'


@case('logging_dir')
def logging_dir(world: World) -> None:
    visualizer(world)
    assert list((world.tmp / 'dir').glob('events.out.tfevents.*'))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace uploads; return their (repository, folder of the card)."""
    import huggingface_hub
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: 'token')
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, 'create_repo', lambda _, name, **__: types.SimpleNamespace(
        repo_id=name if '/' in name else f'me/{name}'))
    monkeypatch.setattr(api, 'auth_check', lambda *_, **__: None)
    monkeypatch.setattr(api, 'create_commit', lambda _, repo_id, operations, **__: calls.extend(
        (repo_id, str(Path(one.path_or_fileobj).parent)) for one in operations if one.path_in_repo == 'README.md'))
    return calls


@case('push_to_hub', 'hub_model_id')
def push_to_hub(world: World, uploads: list[tuple[str, str]], run: Path) -> None:
    import logging
    hook = HOOKS.build(dict(world.resolved().default_hooks.hub))
    runner = types.SimpleNamespace(work_dir=str(run), max_iters=4, logger=logging.getLogger('uploads'))
    hook.before_run(runner)
    hook.after_run(runner)
    name = 'OWNER/REPO' if 'OWNER/REPO' in world.setting else f'me/{run.name}'
    assert uploads == [(name, str(run / 'step4'))]


@pytest.mark.parametrize('option', case.checks)
def test_option(option: str, request: pytest.FixtureRequest) -> None:
    case.run(option, request)
