"""Registries: an unknown name is refused with the nearest ones and the folder; every entry can be looked up."""

import mmengine.registry as root
import pytest

from diffengine_sdxl import registry
from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.registry import NamedRegistry

OURS = {name: value for name, value in vars(registry).items() if isinstance(value, NamedRegistry)}


@pytest.mark.parametrize(('name', 'unknown', 'near', 'folder'), [
    ('ADAPTERS', 'T2IAdaptor', 'T2IAdapter', 'diffengine_sdxl/adapters'),
    ('OBJECTIVES', 'Denoize', 'Denoise', 'diffengine_sdxl/objectives'),
    ('TIMESTEPS', 'CubicTimestep', 'CubicTimesteps', 'diffengine_sdxl/objectives'),
    ('NOISES', 'ofsetnoise', 'OffsetNoise', 'diffengine_sdxl/objectives'),
    ('SAMPLERS', 'Sampeler', 'Sampler', 'diffengine_sdxl/samplers'),
    ('GUIDANCES', 'cfg', 'CFG', 'diffengine_sdxl/samplers'), ('MODELS', 'SDXXL', 'SDXL', 'diffengine_sdxl/models'),
    ('OPTIMIZERS', 'AdamW2', 'AdamW', 'diffengine_sdxl/engine'), ('HOOKS', 'EmaHook', 'EMAHook', 'hooks')])
def test_an_unknown_name(name: str, unknown: str, near: str, folder: str) -> None:
    """The nearest names, ours or mmengine's, and the folder; by `get` and by `build`."""
    for look_up in (OURS[name].get, lambda key: OURS[name].build({'type': key})):
        with pytest.raises(UserError, match=f"type='{unknown}' is not a known.*Did you mean.*'{near}'.*{folder}"):
            look_up(unknown)
    assert unknown not in OURS[name] and near in OURS[name] and 3 not in OURS[name]


def test_a_name_without_a_near_one() -> None:
    with pytest.raises(UserError, match="type='qqqq' is not a known adapter. The adapters of this package are in"):
        registry.ADAPTERS.get('qqqq')
    assert did_you_mean('qqqq', ['a', 'b']) == ''
    assert did_you_mean('scal', ['scale', 'active_range']) == " Did you mean 'scale'?"
    assert did_you_mean('SCALE', ['scale']) == " Did you mean 'scale'?"


def test_every_registry_fills_itself() -> None:
    """A lookup imports the folder; `get` finds every listed name."""
    for one in OURS.values():
        for entry in one.names():
            one.get(entry)
    for name in ('ADAPTERS', 'OBJECTIVES', 'NOISES', 'TIMESTEPS', 'WEIGHTINGS', 'LOSSES', 'SAMPLERS', 'GUIDANCES',
                 'MODELS', 'DATASETS', 'TRANSFORMS', 'HOOKS', 'LOOPS', 'RUNNERS'):
        assert OURS[name].module_dict, f'{name} is empty'


def test_a_child_for_every_registry_of_mmengine() -> None:
    """mmengine warns once for each without our scope."""
    theirs = {name: value for name, value in vars(root).items() if isinstance(value, root.Registry)}
    missing = [name for name in theirs if name not in OURS or OURS[name].parent is not theirs[name]]
    assert missing == []
    assert {one.scope for one in OURS.values()} == {registry.SCOPE}
