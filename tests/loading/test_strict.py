"""Sources that came with the package are found from anywhere, and lead nowhere else."""

from pathlib import Path

import pytest

import diffengine_sdxl
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.strict import SHIPPED, shipped
from diffengine_sdxl.models.sdxl import SDXL

PACKAGE = Path(diffengine_sdxl.__file__).resolve().parent
BASE = f'{SHIPPED}shapes/base'


def test_shipped_sources_are_folders_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped(BASE) == str(PACKAGE / 'shapes' / 'base') and shipped(f'{BASE}/') == shipped(BASE)
    assert shipped(f'{BASE}/vae') == str(PACKAGE / 'shapes' / 'base' / 'vae')


@pytest.mark.parametrize('source', ['stabilityai/stable-diffusion-xl-base-1.0', '~/base', '../x.safetensors', 'a::b',
                                    'diffengine_sdxl/shapes', ''])
def test_other_sources_stay_as_they_are(source: str) -> None:
    assert shipped(source) == source and shipped(None) is None
    assert shipped(Path('x/y')) == 'x/y'


@pytest.mark.parametrize('rest', ['shapes/bas', 'shapes/base/nothing', '', '.', '..', '../tests', 'shapes/../../tests',
                                  '/tmp', '/', 'shapes/draw.py', 'shapes/base/model_index.json'])
def test_what_is_not_in_the_package_is_refused(rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the folder exists, but outside."""
    (tmp_path / 'shapes').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="this package has no folder .*; it has 'diffengine_sdxl::shapes/base'"):
        shipped(f'{SHIPPED}{rest}')


@pytest.mark.parametrize('key', ['pretrained', 'vae', 'config', 'tokenizer'])
def test_every_source_of_a_base_may_be_shipped(key: str, tiny_base: Path) -> None:
    """A wrong one is named before anything is loaded."""
    with pytest.raises(UserError, match="this package has no folder 'shapes/bsae'"):
        SDXL(**{'pretrained': str(tiny_base), key: f'{SHIPPED}shapes/bsae'})


def test_random_weights_in_the_shape_of_the_shipped_base() -> None:
    """Its files alone say what it is: a small VAE, v-prediction, zero terminal SNR."""
    model = SDXL(config=BASE, seed=1)
    assert (model.vae_factor, model.schedule.prediction_type, model.schedule.zero_terminal_snr) == (
        4, 'v_prediction', True)
    assert model.tokenizer.model_max_length == model.tokenizer_2.model_max_length == 32
