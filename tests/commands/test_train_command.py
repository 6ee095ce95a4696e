"""The commands of the issue, as real processes, from an empty folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from runs import curves

ROOT = Path(__file__).resolve().parents[2]
NAME = 'stable_diffusion_xl_t2i_adapter_fill50k.py'


def tool(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / 'tools' / 'train.py', *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'})


def test_help_comes_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = tool('-h', cwd=tmp_path)
    assert done.returncode == 0 and '--cfg-options' in done.stdout and '--gpus' not in done.stdout
    assert time.monotonic() - begin < 2  # 0.1 s; the imports alone would be 4
    assert list(tmp_path.iterdir()) == []


def test_train_and_resume(tmp_path: Path, tiny_base: Path, circles: Path) -> None:
    """Four steps, then eight with --resume, in bf16 with two workers and pictures, as the config has it."""
    options = ['--work-dir', 'W', '--cfg-options', f'model.pretrained={tiny_base}', 'model.vae=None',
               f'train_dataloader.dataset.source={circles}', 'resolution=64', 'default_hooks.checkpoint.interval=2']
    done = tool(NAME, *options, 'train_cfg.max_iters=4', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in tmp_path.iterdir()] == ['W']
    assert {p.name for p in (tmp_path / 'W').glob('step*')} == {'step2', 'step2.pth', 'step4', 'step4.pth'}
    done = tool(NAME, '--resume', *options, 'train_cfg.max_iters=8', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row['step'] for row in curves(tmp_path / 'W')] == list(range(1, 9))
    assert (tmp_path / 'W' / 'curves.png').is_file()
    state = torch.load(tmp_path / 'W' / 'step8.pth', weights_only=True)
    assert state['meta']['step'] == 8 and all(v.dtype == torch.float32 for v in state['state_dict'].values())
    from diffusers import T2IAdapter
    loaded = T2IAdapter.from_pretrained(str(tmp_path / 'W' / 'step4'), subfolder='adapter')
    assert loaded.config.adapter_type == 'full_adapter_xl'
    # And a mistake: one sentence on stderr, exit code 1.
    done = tool(NAME, *options, 'train_cfg.max_itres=4', cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert "error: train_cfg (StepLoop) has no key 'max_itres'. Did you mean 'max_iters'" in done.stderr
