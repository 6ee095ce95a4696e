"""The README's commands as they are typed: `mim train` from an empty folder, for a wheel and an editable install."""

import os
from pathlib import Path

import pytest
from diffusers import T2IAdapter
from installs import NAME, build, copy_checkout, environment, install, run

CONFIG = 'stable_diffusion_xl_t2i_adapter_fill50k.py'


@pytest.mark.parametrize('kind', ['wheel', 'editable'])
def test_train_resume_and_two_processes(kind: str, tiny_base: Path, circles: Path, tmp_path: Path) -> None:
    """Train, resume to a longer end, train on two processes; each export loads in diffusers."""
    checkout, here = copy_checkout(tmp_path / 'project'), tmp_path / 'empty'
    here.mkdir()
    python = environment(tmp_path / 'python')
    install(python, kind, build('wheel', checkout) if kind == 'wheel' else checkout, tmp_path)

    def train(*arguments: str, max_iters: int) -> str:
        return run([python, '-m', 'mim', 'train', NAME, CONFIG, *arguments, '--cfg-options',
                    f'model.pretrained={tiny_base}', 'model.vae=None', f'train_dataloader.dataset.source={circles}',
                    'resolution=64', f'train_cfg.max_iters={max_iters}', 'default_hooks.checkpoint.interval=2'], here,
                   PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}', HF_HOME=str(tmp_path / 'cache'))

    train('--work-dir', 'W', max_iters=4)
    assert sorted(p.name for p in (here / 'W').glob('step*')) == ['step2', 'step2.pth', 'step4', 'step4.pth']
    train('--work-dir', 'W', '--resume', max_iters=8)
    assert (here / 'W' / 'step8.pth').is_file() and (here / 'W' / 'curves.png').is_file()
    train('--gpus', '2', '--launcher', 'pytorch', '--work-dir', 'W2', max_iters=4)
    for folder in (here / 'W' / 'step4', here / 'W2' / 'step4'):
        assert T2IAdapter.from_pretrained(folder, subfolder='adapter').config.adapter_type == 'full_adapter_xl'
