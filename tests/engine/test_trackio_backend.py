"""TrackioVisBackend, with a stand-in for the package that keeps what it is given, as trackio 0.43 does."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import VISBACKENDS


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the optional package; `calls` are in order."""
    calls: list[tuple[str, Any]] = []
    module: Any = types.ModuleType('trackio')
    module.calls = calls

    def init(project: str, name: str, space_id: str | None, resume: str, config: dict[str, Any], embed: bool,
             **more: Any) -> str:
        if space_id == 'frozen':
            raise ValueError('Space is frozen.')
        calls.append(('init', (project, name, space_id, resume, config, embed, more)))
        return 'a run'
    module.init = init
    module.log = lambda values, step: calls.append((f'log {step}', values))
    module.finish = lambda: calls.append(('finish', None))
    module.Image = lambda value, caption: (value.shape, caption)
    monkeypatch.setitem(sys.modules, 'trackio', module)
    return module


def backend(work_dir: Path, **settings: Any) -> Any:
    return VISBACKENDS.build(dict(type='TrackioVisBackend', save_dir=str(work_dir / 'time' / 'vis_data'), **settings))


def test_a_run(trackio: Any, tmp_path: Path) -> None:
    """Nothing before the first value; the config without trackers; numbers, images, and one end."""
    made = backend(tmp_path / 'cats', init_kwargs=dict(private=True))
    made.add_config(Config(dict(a=dict(b=(1, 2)), visualizer=dict(entity='alice'))))
    assert not trackio.calls
    made.add_scalars({'loss': torch.tensor(0.5), 'time': 2, 'step': 9}, step=3, file_path='x.json')
    made.add_scalar('val/adapted/clip_i', np.float32(0.25), 3)
    made.add_image('samples', np.zeros((4, 6, 3), np.uint8), 3)
    assert made.experiment == 'a run'
    made.close()
    made.close()
    assert trackio.calls == [
        ('init', ('diffengine_sdxl', 'cats', None, 'never', {'a': {'b': [1, 2]}}, False, {'private': True})),
        ('log 3', {'loss': 0.5, 'seconds': 2.0}), ('log 3', {'val/adapted/clip_i': 0.25}),
        ('log 3', {'samples': ((4, 6, 3), 'step 3')}), ('finish', None)]


def test_a_run_with_checkpoints_goes_on(trackio: Any, tmp_path: Path) -> None:
    (tmp_path / 'step2.pth').touch()
    backend(tmp_path, project='p', name='n', space_id='me/space').add_scalar('loss', 1, 3)
    assert trackio.calls[0][1][:4] == ('p', 'n', 'me/space', 'allow')


def test_what_is_in_the_way(trackio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="refuses project='diffengine_sdxl', space_id='frozen': Space is frozen"):
        backend(tmp_path, space_id='frozen').add_scalar('loss', 1, 3)
    monkeypatch.setitem(sys.modules, 'trackio', None)
    with pytest.raises(UserError, match=r'pip install "diffengine_sdxl\[trackio\]"'):
        backend(tmp_path).add_scalar('loss', 1, 3)
