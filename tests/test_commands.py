"""The README's commands as they are typed, from an empty folder: `mim train` of an installed wheel; `mim test` and
`mim run ... infer` of an editable install. (test_install.py finds configs and tools in every kind of install.)"""

import json
import os
from pathlib import Path

import torch
from diffusers import T2IAdapter
from installs import NAME, build, copy_checkout, environment, install, run
from runs import curves

CONFIG = 'stable_diffusion_xl_t2i_adapter_fill50k.py'


def test_test_and_infer(tiny_base: Path, tmp_path: Path) -> None:
    """A trained adapter beside its base, by one process and by two, from one small training; an image."""
    here = tmp_path / 'empty'
    here.mkdir()
    python = environment(tmp_path / 'python')
    install(python, 'editable', copy_checkout(tmp_path / 'project'), tmp_path)

    def mim_run(*arguments: str) -> str:
        return run([python, '-m', 'mim', *arguments], here, OMP_NUM_THREADS='1',
                   PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}')

    def mim(what: str, *arguments: str, options: list[str]) -> str:
        return mim_run(what, NAME, 'shapes_t2i_adapter.py', *arguments, '--cfg-options',
                       f'model.pretrained={tiny_base}', 'model.sampler.num_inference_steps=2', *options)

    mim('train', '--work-dir', 'W', options=['train_cfg.max_iters=2', 'train_dataloader.batch_size=2',
                                             'default_hooks.samples=None'])
    run_file = (here / 'W' / 'run.json').read_bytes()
    options = ['test_dataloader.dataset.length=5', 'test_cfg.seeds=2']
    found = {}
    runs = {'W': ['--checkpoint', 'W/step2.pth'], 'W2': ['--checkpoint', 'W', '--gpus', '2', '--launcher', 'pytorch']}
    for folder, arguments in runs.items():
        said = mim('test', *arguments, '--work-dir', folder, options=options)
        found[folder] = json.loads((here / folder / 'metrics.json').read_text())
        assert said.count('shape_accuracy') == len(found[folder]) and (here / folder / 'test/pictures.png').is_file()
    assert list(found['W']) == ['base', 'adapted', 'adapted - base'] and found['W2'] == found['W']
    assert found['W']['adapted']['iou']['num_samples'] == 10
    assert (here / 'W' / 'run.json').read_bytes() == run_file
    mim_run('run', NAME, 'infer', 'sdxl_text_to_image.py', '--prompt', 'a cat', '--steps', '1', '--height', '48',
            '--width', '64', '--out', 'P', '--cfg-options', f'model.pretrained={tiny_base}', 'mixed_precision=no')
    assert (here / 'P' / '00000-seed0-a-cat.png').is_file()
    assert {p.name for p in here.iterdir()} == {*runs, 'P'}


def test_train_resume_and_two_processes(tiny_base: Path, circles: Path, tmp_path: Path) -> None:
    """Train, resume to a longer end, train on two processes, in bf16 with loader workers and samples, as the config has
    it; each export loads in diffusers."""
    here = tmp_path / 'empty'
    here.mkdir()
    python = environment(tmp_path / 'python')
    install(python, 'wheel', build('wheel', copy_checkout(tmp_path / 'project')), tmp_path)

    def train(*arguments: str, max_iters: int) -> str:
        return run([python, '-m', 'mim', 'train', NAME, CONFIG, *arguments, '--cfg-options',
                    f'model.pretrained={tiny_base}', 'model.vae=None', f'train_dataloader.dataset.source={circles}',
                    'resolution=64', f'train_cfg.max_iters={max_iters}', 'default_hooks.checkpoint.interval=2'], here,
                   PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}', HF_HOME=str(tmp_path / 'cache'))

    train('--work-dir', 'W', max_iters=4)
    assert [p.name for p in here.iterdir()] == ['W']
    assert sorted(p.name for p in (here / 'W').glob('step*')) == ['step2', 'step2.pth', 'step4', 'step4.pth']
    train('--work-dir', 'W', '--resume', max_iters=8)
    assert [row['step'] for row in curves(here / 'W')] == list(range(1, 9)) and (here / 'W' / 'curves.png').is_file()
    state = torch.load(here / 'W' / 'step8.pth', weights_only=True)
    assert state['meta']['step'] == 8 and all(v.dtype == torch.float32 for v in state['state_dict'].values())
    train('--gpus', '2', '--launcher', 'pytorch', '--work-dir', 'W2', max_iters=4)
    for folder in (here / 'W' / 'step4', here / 'W2' / 'step4'):
        assert T2IAdapter.from_pretrained(folder, subfolder='adapter').config.adapter_type == 'full_adapter_xl'
