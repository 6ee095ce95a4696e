"""model-index.yml lists every config as it is, and mim searches and downloads by it."""

import importlib
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffengine_sdxl import config
from diffengine_sdxl.config_files import installed_configs

ROOT = Path(__file__).resolve().parents[1]
NAME = 'diffengine_sdxl'
FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'
# By import_module: mim's package hides these modules behind their functions.
search, download = (importlib.import_module(f'mim.commands.{name}') for name in ('search', 'download'))


@pytest.fixture(autouse=True)
def this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mim find this checkout, whatever is installed."""
    (tmp_path / NAME / '.mim').mkdir(parents=True)
    for name in ('configs', 'model-index.yml'):
        (tmp_path / NAME / '.mim' / name).symlink_to(ROOT / name)
    for module in (search, download):
        monkeypatch.setattr(module, 'is_installed', lambda package: True)
        monkeypatch.setattr(module, 'get_installed_path', lambda package: str(tmp_path / package))


def found(**filters: Any) -> list[str]:
    """Return the names that `mim search` shows with these options."""
    return sorted(search.get_model_info(NAME, **filters).index)


def test_it_is_that_of_the_configs() -> None:
    tool = runpy.run_path(str(ROOT / 'tools' / 'make_model_index.py'), run_name='tool')
    assert (ROOT / 'model-index.yml').read_text() == tool['model_index'](), 'Run `python tools/make_model_index.py`.'


def test_every_config_is_listed_and_is_there() -> None:
    models = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Models']
    assert {m['Name']: (ROOT / m['Config']).resolve() for m in models} == {
        p.stem: p.resolve() for p in installed_configs()}


def test_mim_searches() -> None:
    paths = installed_configs()
    assert found() == sorted(p.stem for p in paths)
    assert found(models=['T2I-Adapter']) == sorted(p.stem for p in paths if p.parent.name == 't2i_adapter')
    assert found(training_datasets=['data/instance']) == ['stable_diffusion_xl_textual_inversion']
    assert found(models=['shapes'], filter_conditions='iterations>3000') == [
        'shapes_ip_adapter', 'shapes_lora', 'shapes_pretrain', 'shapes_pretrain_partial']
    shown = search.get_model_info(NAME, configs=[FILL50K], to_dict=True)[FILL50K]
    assert {key: shown[key] for key in ('model', 'task', 'architecture', 'training_data', 'iterations', 'config')} == {
        'model': 't2i-adapter', 'task': 'train,test,infer', 'architecture': 't2iadapter',
        'training_data': 'fusing/fill50k',
        'iterations': 15000, 'config': f'configs/t2i_adapter/{FILL50K}.py'}


def test_mim_downloads_the_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mim has no entry without weights; ours names none that it would fetch. What it writes can be run."""
    download.download(NAME, ['shapes_base', FILL50K], str(tmp_path / 'D'))
    assert capsys.readouterr().out.splitlines()[-1].endswith(f'Successfully dumped {FILL50K}.py to {tmp_path / "D"}')
    assert {p.name for p in (tmp_path / 'D').iterdir()} == {'shapes_base.py', f'{FILL50K}.py'}
    for name in ('shapes_base', FILL50K):
        assert config.load(tmp_path / 'D' / f'{name}.py').to_dict() == config.load(name).to_dict()
