"""Write all layouts into a folder, with what describes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffengine_sdxl.testing.layouts import folders, networks, refused, single_files, words
from diffengine_sdxl.testing.layouts.base import PROMPTS, WORD, Base, Tensors
from diffengine_sdxl.testing.layouts.layout import Layout, Outputs, plain
from diffengine_sdxl.testing.layouts.single_files import Writer
from diffengine_sdxl.testing.models import write_tiny_image_encoder

TOLERANCE = 1e-5
README = f"""One adapter in every layout
===========================

base/                  a tiny SDXL in diffusers' layout, random weights
image_encoder/         a tiny CLIP image encoder, for programs that need one to build an IP-Adapter
layouts.json           the layouts. `source` is what a loader is given, in this folder. `expected` is the change's name
                       in expected.safetensors; or `refused`, a regular expression of what a refusal must say besides
                       the path.
                       `settings` is what a loader must be told, `word` that of a textual inversion;
                       `kind`, `title` and `written_by` are for people
inputs.safetensors     inputs of the UNet: latents, timestep, encoder_hidden_states, text_embeds, time_ids;
                       image [2, 3, 64, 64] in [0, 1] for ControlNet and T2I-Adapter; image_embeds and
                       image_hidden_states, an image encoder's outputs, for the two kinds of IP-Adapter;
                       input_ids and input_ids_2, the prompts' tokens as the base reads them
expected.safetensors   '<change>.<output>', computed in fp64 and stored in fp32; the base's own are 'base.<output>'.
                       A change has the outputs that it changes:
                         sample         the UNet's output for the inputs, which hold the text as the base encodes it
                         prompt_embeds  the prompts' penultimate hidden states of both text encoders, side by side
                         pooled         the projected output of the second

A loader is right if for each output
    norm(yours - expected) <= {TOLERANCE:g} * norm(expected - base)
with everything at strength 1 in fp32. Files in fp16, bf16 and fp8 are held to that too: what is expected is the
change of the numbers as the file has them.

The prompts are {' and '.join(map(repr, PROMPTS))}. '{WORD}' is ordinary text to the base, and two tokens
where a file has vectors for it. An IP-Adapter gets image_embeds (base) or image_hidden_states (plus) as they are, one
image a row. DoRA decomposes the weight with the whole change, W' = m (W + s B A) / norm(W + s B A).
"""


def write_layouts(folder: str | Path) -> dict[str, Layout]:
    """Write base, layouts, inputs, expected outputs and README.txt; return the layouts by name.

    The same version of torch gives the same tensors.
    """
    folder = Path(folder)
    write = Writer(Base(folder / 'base'))
    write_tiny_image_encoder(folder / 'image_encoder')
    made = [*single_files.layouts(write), *folders.layouts(write), *words.layouts(write), *networks.layouts(write),
            *refused.layouts(write)]
    for layout in made:
        layout.write(folder)
    layouts = {layout.name: layout for layout in made}
    assert len(layouts) == len(made), 'names of layouts are unique'
    base: Tensors = {'sample': write.base.denoise(), **write.base.encode()}
    outputs: Outputs = {'base': base, **{change: {name: value for name, value in own.items()
                                                  if not torch.equal(value, base[name])}
                                         for change, own in write.outputs.items()}}
    small = [f'{change}.{name}' for change, own in outputs.items() for name, value in own.items()
             if change != 'base' and (value - base[name]).norm() < 0.1 * base[name].norm()]
    assert not small, f'fp32 rounds these changes to more than {TOLERANCE}: {small}'
    save_file({name: plain(value) for name, value in write.base.inputs.items()}, folder / 'inputs.safetensors')
    save_file({f'{change}.{name}': plain(value) for change, own in outputs.items() for name, value in own.items()},
              folder / 'expected.safetensors')
    (folder / 'layouts.json').write_text(json.dumps(
        {'tolerance': TOLERANCE, 'prompts': PROMPTS, 'layouts': {name: one.entry() for name, one in layouts.items()}},
        indent=2))
    (folder / 'README.txt').write_text(README)
    return layouts
