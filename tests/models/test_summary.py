"""What `print(model)` shows."""

from pathlib import Path

from diffengine_sdxl.models.sdxl import SDXL


def test_the_table(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), mixed_precision='bf16', adapters={
        'pose': dict(type='T2IAdapter', condition_key='pose', scale=0.5, active_range=(0.25, 1.0), trainable=False),
        'depth': dict(type='T2IAdapter', condition_key='depth')})
    count = sum(p.numel() for p in model.adapters['depth'].parameters())
    assert repr(model).splitlines() == [
        f"SDXL '{tiny_base}', bfloat16, nothing of the base trains",
        '  adapter  kind        attached to            condition_key  trainable  scale  active_range',
        f'  depth    T2IAdapter  after the down blocks  depth          {count:<9,}  1      0-1',
        '  pose     T2IAdapter  after the down blocks  pose           frozen     0.5    0.25-1']


def test_a_base_alone(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), trainable=['unet', 'text_encoder'])
    assert repr(model) == f"SDXL '{tiny_base}', float32, unet, text_encoder of the base trains; no adapters"
