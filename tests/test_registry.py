"""Registries: an unknown name is answered with the nearest ones and the folder; every entry can be had."""

import mmengine.registry as root
import pytest

from diffengine_sdxl import registry
from diffengine_sdxl.registry import NamedRegistry, nearest

OURS = {name: value for name, value in vars(registry).items() if isinstance(value, NamedRegistry)}


@pytest.mark.parametrize(('name', 'asked', 'found', 'folder'), [
    ('ADAPTERS', 'T2IAdaptor', 'T2IAdapter', 'diffengine_sdxl/adapters'),
    ('OBJECTIVES', 'Denoize', 'Denoise', 'diffengine_sdxl/objectives'),
    ('TIMESTEPS', 'CubicTimestep', 'CubicTimesteps', 'diffengine_sdxl/objectives'),
    ('NOISES', 'ofsetnoise', 'OffsetNoise', 'diffengine_sdxl/objectives'),
    ('SAMPLERS', 'Sampeler', 'Sampler', 'diffengine_sdxl/samplers'),
    ('GUIDANCES', 'cfg', 'CFG', 'diffengine_sdxl/samplers'), ('MODELS', 'SDXXL', 'SDXL', 'diffengine_sdxl/models'),
    ('OPTIMIZERS', 'AdamW2', 'AdamW', 'diffengine_sdxl/engine'), ('HOOKS', 'EmaHook', 'EMAHook', 'hooks')])
def test_an_unknown_name(name: str, asked: str, found: str, folder: str) -> None:
    """The nearest names, ours or mmengine's, and where the folder is; by `get` and by `build`."""
    for ask in (OURS[name].get, lambda key: OURS[name].build({'type': key})):
        with pytest.raises(ValueError, match=f"type='{asked}' is not a known.*Did you mean.*'{found}'.*{folder}"):
            ask(asked)
    assert asked not in OURS[name] and found in OURS[name] and 3 not in OURS[name]


def test_a_name_that_is_near_none() -> None:
    with pytest.raises(ValueError, match="type='qqqq' is not a known adapter. The adapters of this package are in"):
        registry.ADAPTERS.get('qqqq')
    assert nearest('qqqq', ['a', 'b']) == ''
    assert nearest('scal', ['scale', 'window']) == " Did you mean 'scale'?"
    assert nearest('SCALE', ['scale']) == " Did you mean 'scale'?"


def test_every_registry_fills_itself() -> None:
    """A lookup imports the folder; what a registry lists can be had from it."""
    for name, one in OURS.items():
        for entry in one.names():
            assert one.get(entry) is not None, (name, entry)
    for name in ('ADAPTERS', 'OBJECTIVES', 'NOISES', 'TIMESTEPS', 'WEIGHTINGS', 'LOSSES', 'SAMPLERS', 'GUIDANCES',
                 'MODELS', 'DATASETS', 'TRANSFORMS', 'HOOKS', 'LOOPS', 'RUNNERS'):
        assert OURS[name].module_dict, f'{name} has nothing of its own'


def test_a_child_for_every_registry_of_mmengine() -> None:
    """mmengine warns once for each that lacks our scope."""
    theirs = {name: value for name, value in vars(root).items() if isinstance(value, root.Registry)}
    missing = [name for name in theirs if name not in OURS or OURS[name].parent is not theirs[name]]
    assert missing == []
    assert {one.scope for one in OURS.values()} == {registry.SCOPE}
