"""What `print(model)` shows."""

from pathlib import Path

from diffengine_sdxl.models.sdxl import SDXL


def count(model: SDXL, name: str) -> str:
    """Return the number of values of an adapter's network, or of a component."""
    module = model.adapters[name] if name in model.adapters else getattr(model, name)
    return f'{sum(p.numel() for p in module.parameters()):,}'


def test_the_table(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), mixed_precision='bf16', adapters={
        'pose': dict(type='T2IAdapter', condition_key='pose', scale=0.5, active_range=(0.25, 1.0), trainable=False),
        'depth': dict(type='T2IAdapter', condition_key='depth')})
    assert repr(model).splitlines() == [
        f"SDXL '{tiny_base}', bfloat16, the base is frozen",
        '  adapter  kind        attached to            condition_key  trainable  scale  active_range',
        f'  depth    T2IAdapter  after the down blocks  depth          {count(model, "depth"):<9}  1      0-1',
        '  pose     T2IAdapter  after the down blocks  pose           frozen     0.5    0.25-1']


def test_weights_are_named_and_defaults_are_not(tiny_base: Path, tmp_path: Path) -> None:
    """Which files an adapter is of, or starts from; no columns of 1 and 0-1."""
    saved = SDXL(pretrained=str(tiny_base), adapters={'a': dict(type='T2IAdapter')})
    saved.adapters['a'].save(tmp_path / 'inner')
    model = SDXL(pretrained=str(tiny_base), adapters={
        'pose': dict(type='T2IAdapter', weights=str(tmp_path), subfolder='inner', trainable=False),
        'depth': dict(type='T2IAdapter', weights=str(tmp_path / 'inner')), 'new': dict(type='T2IAdapter')})
    lines = repr(model).splitlines()
    assert lines[1].split() == ['adapter', 'kind', 'attached', 'to', 'condition_key', 'trainable']
    assert [line.split()[0] for line in lines[2:5]] == ['depth', 'new', 'pose']
    assert lines[5:] == [f"  depth starts from '{tmp_path / 'inner'}'", f"  pose is '{tmp_path}', subfolder 'inner'"]


def test_a_base_alone(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), trainable=['unet', 'text_encoder_2'])
    assert repr(model) == (f"SDXL '{tiny_base}', float32, unet ({count(model, 'unet')}), "
                           f"text_encoder_2 ({count(model, 'text_encoder_2')}) of the base train; no adapters")
    model = SDXL(pretrained=str(tiny_base), trainable=['unet'])
    assert repr(model).endswith(f"unet ({count(model, 'unet')}) of the base trains; no adapters")
