"""Fixtures of runs and of inference, for several folders of tests."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import BASE, INPAINT, TO_IMAGE, Here, Refined, config
from kinds import CASES, build, shaken
from parity import SOLVERS, stock, stock_like
from PIL import Image

from diffengine_sdxl.commands import cli
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.testing import draw_circle, write_tiny_refiner


@pytest.fixture(scope='session')
def tiny_options(tiny_base: Path, circles: Path) -> dict[str, Any]:
    """Options of a run of one second: the tiny base, circles of 32 pixels, four steps, no samples."""
    return {'model.pretrained': str(tiny_base), 'train_dataloader.dataset.source': str(circles), 'resolution': 32,
            'train_cfg.max_iters': 4, 'optim_wrapper.accumulative_counts': 1, 'default_hooks.samples': None,
            'default_hooks.checkpoint.interval': 2, 'model.sampler.num_inference_steps': 2}


@pytest.fixture
def tiny(tiny_options: dict[str, Any]) -> dict[str, Any]:
    """A copy of those options, to change."""
    return dict(tiny_options)


@pytest.fixture(scope='module')
def inferencer(tiny_base: Path) -> SDXLInferencer:
    return SDXLInferencer(config(tiny_base), device='cpu')


@pytest.fixture(scope='module')
def pipelines(tiny_base: Path) -> dict[str, Any]:
    """The stock pipelines of the three tasks, which share their modules."""
    base = stock(tiny_base)
    return {cls: stock_like(base, cls, SOLVERS['ancestral']) for cls in (BASE, TO_IMAGE, INPAINT)}


@pytest.fixture(scope='module')
def refined(tiny_base: Path, pipelines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Refined:
    folder = write_tiny_refiner(tmp_path_factory.mktemp('refiner') / 'refiner')
    ours = SDXLInferencer(config(tiny_base, refiner=dict(type='SDXL', pretrained=str(folder),
                                                         shared_components=['text_encoder_2', 'vae'])), device='cpu')
    base = pipelines[TO_IMAGE]
    second = stock(folder, TO_IMAGE, text_encoder_2=base.text_encoder_2, vae=base.vae)
    return Refined(ours, {cls: stock_like(second, cls, SOLVERS['ancestral']) for cls in (TO_IMAGE, INPAINT)})


@pytest.fixture(scope='module')
def infer_main() -> Callable[[], int]:
    """What tools/infer.py calls, which reads sys.argv."""
    return partial(cli.main, 'infer')


@pytest.fixture(scope='module')
def infer_files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, images, and adapters that look trained, in their own formats. Read only."""
    folder = tmp_path_factory.mktemp('files')
    shutil.copytree(tiny_base, folder / 'base')
    cases = {'style': CASES['lora'], 'depth': CASES['t2i_adapter'], 'look': CASES['ip_adapter']}
    model = shaken(build(folder / 'base', {name: case.config for name, case in cases.items()}), *[
        cases[name] for name in sorted(cases)])
    for name, adapter in model.adapters.items():
        adapter.save(folder / name)
    for i in range(3):
        for what, image in zip(('image', 'outline'), draw_circle(i)[:2], strict=True):
            image.save(folder / f'{what}{i}.png')
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 32, axis=1).repeat(64, axis=0)).save(folder / 'mask.png')
    return folder


@pytest.fixture
def here(infer_main: Callable[[], int], infer_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
         monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    # mmengine's loggers keep the streams of the previous test.
    monkeypatch.setattr(logging, 'raiseExceptions', False)
    return Here(infer_main, infer_files, capsys, monkeypatch)
