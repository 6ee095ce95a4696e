"""Configs that mmengine wrote, with all that they inherited: `Config.dump`, and mim gridsearch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from runs import CONFIG

from diffengine_sdxl import config
from diffengine_sdxl.config_files import find
from diffengine_sdxl.errors import UserError

FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'


@pytest.mark.parametrize('name', [FILL50K, 'stable_diffusion_xl_ip_adapter', 'shapes_t2i_adapter'])
def test_what_mmengine_dumps_is_the_same_config(name: str, tmp_path: Path) -> None:
    """Pieces that were used are at its top level still, where nothing reads them; references stay references."""
    Config.fromfile(str(find(name))).dump(str(tmp_path / 'flat.py'))
    assert config.load(tmp_path / 'flat.py').to_dict() == config.load(name).to_dict()
    options = ['resolution=128'] if name == FILL50K else []
    assert config.resolve(config.load(tmp_path / 'flat.py', options)).to_dict() == config.resolve(
        config.load(name, options)).to_dict()


def test_only_what_was_dumped(tmp_path: Path) -> None:
    """A key that somebody added by hand is refused, and so is an override or a search of a used piece."""
    flat = tmp_path / 'flat.py'
    Config.fromfile(str(find(FILL50K))).dump(str(flat))
    with pytest.raises(UserError, match=r"'objective' is a piece that the config has already used.*model\.objective"):
        config.load(flat, ['objective.type=Denoise'])
    for name, searched in (('x_search_objective.loss.type_L1Loss.py', True), ('x_search_a.b_1_objective.c_2.py', True),
                           ('x_search_model.objective.loss.type_L1Loss.py', False)):
        (tmp_path / name).write_text(flat.read_text())
        if searched:
            with pytest.raises(UserError, match='already used'):
                config.load(tmp_path / name)
        else:
            config.load(tmp_path / name)
    flat.write_text(f'{flat.read_text()}trian_cfg = dict()\n')
    with pytest.raises(UserError, match='which nothing reads'):
        config.load(flat)


@pytest.mark.parametrize('head', ['import os', 'from os import path as os_path\nfrom torch import nn\nimport os',
                                  'from pathlib import Path\nimport os'])
def test_a_config_may_import_before_its_base(head: str, tmp_path: Path) -> None:
    """mmengine alone would take it for one of its other dialect."""
    path = tmp_path / 'own.py'
    path.write_text(f"{head}\n_base_ = ['diffengine_sdxl::t2i_adapter/{FILL50K}.py']\n"
                    "work_dir = os.path.join('a', 'b')\n")
    cfg = config.load(path)
    assert cfg.work_dir == 'a/b' and 'Path' not in cfg
    cfg.dump(str(tmp_path / 'again.py'))
    assert config.load(tmp_path / 'again.py').to_dict() == cfg.to_dict()


def test_the_other_dialect_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'own.py'
    path.write_text('from mmengine.config import read_base\nwith read_base():\n    from .other import *\n')
    with pytest.raises(UserError, match=r'own\.py.*`read_base` is not supported: name the inherited files in _base_'):
        config.load(path)


def test_mim_gridsearch(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """It searches a key that other parts refer to, and trains."""
    (tmp_path / 'own.py').write_text(f'_base_ = [{str(find(CONFIG))!r}]\n')
    options = {**tiny, 'train_cfg.max_iters': 1, 'default_hooks.curves': None}
    del options['resolution']
    run = subprocess.run(
        [str(Path(sys.executable).with_name('mim')), 'gridsearch', 'diffengine_sdxl', 'own.py', '--work-dir', 'W',
         '--gpus', '0', '--search-args', '--resolution 32', '--cfg-options', *(f'{k}={v}' for k, v in options.items())],
        cwd=tmp_path, env={**os.environ, 'MKL_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    work_dir = tmp_path / 'W_search_resolution_32'
    assert (work_dir / 'step1.pth').is_file()
    identity = json.loads((work_dir / 'run.json').read_text())['identity']
    assert identity['train_dataloader']['dataset']['transforms'][0]['size'] == 32
