"""What LyCORIS, OneTrainer and ComfyUI make beside peft's kinds, against merging the matrices by hand.

fp64 shows that the rules are right (1e-10). One model serves all tests: adapters are attached to it and detached.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merged_loras import (
    FORMS,
    LAYERS,
    MIXED,
    NORMS,
    SCALES,
    Tensors,
    assert_near,
    attached,
    make,
    merged,
    modules,
    output,
)
from safetensors.torch import save_file

from diffengine_sdxl.adapters.formats import kohya
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL


@pytest.mark.parametrize('form', [*FORMS, 'norm', 'norm, weight', 'mixed'])
def test_every_form_is_the_merged_base(model64: SDXL, tmp_path: Path, form: str) -> None:
    """Linear layers, convolutions, norms, both encoders; at two scales; written again and read."""
    forms = MIXED if form == 'mixed' else dict.fromkeys(NORMS if 'norm' in form else LAYERS, form)
    tensors, at = make(model64, forms)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / 'a.safetensors')
    before, plain = output(model64), str(model64)
    expected = {}
    for scale in SCALES:
        with merged(model64, at(scale)):
            expected[scale] = output(model64)
    with attached(model64, tmp_path / 'a.safetensors') as adapter:
        assert sum(p.numel() for p in adapter.all_parameters()) >= sum(
            t.numel() for k, t in tensors.items() if not k.endswith('.alpha')) - 3 * 3 * 9 * len(LAYERS)
        for scale in SCALES:
            adapter.scale = scale
            assert_near(output(model64), expected[scale], before)
        adapter.scale = 0
        assert torch.equal(output(model64), before)
        adapter.scale = 1
        with adapter.disabled():
            assert torch.equal(output(model64), before)
        kohya.write(tmp_path / 'b.safetensors', adapter.to_weights(), modules(model64))
    assert torch.equal(output(model64), before) and str(model64) == plain
    with attached(model64, tmp_path / 'b.safetensors'):
        assert_near(output(model64), expected[1], before)


SPELLINGS: dict[str, Callable[[str, str, str], str | None]] = {
    # (kohya's name, part, name in memory) -> name; None: the part has no such spelling.
    'kohya, diffusers names': lambda k, part, name: f'lora_unet_{name.replace(".", "_")}' if part == 'unet' else k,
    'lycoris': lambda k, part, name: f'lycoris_{name.replace(".", "_")}' if part == 'unet' else None,
    'ComfyUI': lambda k, part, name: {
        'unet': f'diffusion_model.{ORIGINAL.get(name)}',
        'text_encoder': f'text_encoders.clip_l.transformer.text_model.{name}',
        'text_encoder_2': f'text_encoders.clip_g.transformer.{name}'}[part],
    'the original, bare': lambda k, part, name: ORIGINAL[name] if part == 'unet' else None,
    'diffusers': lambda k, part, name: f'{part}.{"text_model." * (part == "text_encoder")}{name}',
    'peft': lambda k, part, name: f'base_model.model.{name}' if part == 'unet' else None,
    "SD 1.x's text encoder": lambda k, part, name: (
        k.replace('lora_te1_', 'lora_te_') if part != 'text_encoder_2' else None)}
ORIGINAL = {
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q': 'input_blocks.3.1.transformer_blocks.0.attn1.to_q',
    'down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k': 'input_blocks.5.1.transformer_blocks.1.attn2.to_k',
    'mid_block.resnets.1.conv2': 'middle_block.2.out_layers.3',
    'down_blocks.1.resnets.0.conv_shortcut': 'input_blocks.3.0.skip_connection',
    'up_blocks.2.resnets.0.conv1': 'output_blocks.4.0.in_layers.2',
    'down_blocks.1.attentions.0.transformer_blocks.0.norm2': 'input_blocks.3.1.transformer_blocks.0.norm2',
    'mid_block.resnets.0.norm1': 'middle_block.0.in_layers.0', 'conv_norm_out': 'out.0'}
RENAMED = {'lora_up.weight': 'lora_B.weight', 'lora_down.weight': 'lora_A.weight', 'w_norm': 'diff', 'b_norm': 'diff_b'}


def spelled(tensors: Tensors, spelling: str, rename: bool = False) -> Tensors:
    """The same tensors under other names."""
    new = {}
    for full, file in (LAYERS | NORMS).items():
        name = SPELLINGS[spelling](file, *full.split('.', 1))
        for key, value in tensors.items():
            layer, suffix = key.split('.', 1)
            if name and layer == file:
                new[f'{name}.{RENAMED.get(suffix, suffix) if rename else suffix}'] = value
    return new


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_spelling_is_the_same(model64: SDXL, tmp_path: Path, spelling: str) -> None:
    """kohya's and peft's names of tensors, under every name of a layer; and twice in one file."""
    tensors, _ = make(model64, MIXED)
    names = modules(model64)
    reference = kohya.read(tensors, names, 'a')
    for rename in (False, True):
        new = spelled(tensors, spelling, rename)
        assert kohya.is_kohya(new) and len(new) > 20
        for file in (new, {**new, **{key: value.clone() for key, value in tensors.items()}}):
            found = kohya.read(file, names, 'a')
            for part, own in found.parts.items():
                ours = reference.parts[part]
                assert own.tensors.keys() == ours.tensors.keys() or len(file) == len(new)
                assert all(torch.equal(value, ours.tensors[key]) for key, value in own.tensors.items())
                assert own.alpha.items() <= ours.alpha.items() and own.rank.items() <= ours.rank.items()
    key = next(iter(new))
    with pytest.raises(UserError, match=r'1 given under two names with different values \(.* and .*\)'):
        kohya.read({**tensors, key: new[key] + 1}, names, 'a')
