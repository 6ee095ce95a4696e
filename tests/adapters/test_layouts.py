"""Adapters in every layout, as other programs write them, against merging by hand (diffengine_sdxl.testing.layouts)."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffengine_sdxl.adapters.formats.detect import adapter_settings
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.testing.__main__ import main

Tensors = dict[str, Tensor]


class Tried:
    """The layouts in a folder, and what a model with one of them gives."""

    def __init__(self, folder: Path) -> None:
        assert main(['layouts', str(folder)]) == 0
        self.folder = folder
        text = json.loads((folder / 'layouts.json').read_text())
        self.layouts: dict[str, Any] = text['layouts']
        self.prompts, self.tolerance = text['prompts'], text['tolerance']
        self.inputs = load_file(folder / 'inputs.safetensors')
        self.expected = load_file(folder / 'expected.safetensors')
        self.sdxl = SDXL(pretrained=str(folder / 'base'))
        self.before = self.outputs()

    def attach(self, name: str, find_kind: bool = True) -> None:
        """Attach a layout's adapter in place of the last one, by the config that its file shows, or by its kind."""
        layout = self.layouts[name]
        source = str(self.folder / layout['source'])
        config = adapter_settings(source) if find_kind else {'type': layout['kind']}
        assert config['type'] == layout['kind'], config
        config |= {'weights': source, 'trainable': False, **layout.get('settings', {})}
        if layout['kind'] == 'IPAdapter':
            config |= {'image_encoder': str(self.folder / 'image_encoder'), 'image_encoder_subfolder': None}
        config |= {'token': layout['word']} if 'word' in layout else {}
        self.replace({'adapter': config})

    def replace(self, configs: dict[str, Any]) -> None:
        """Detach what is attached, and attach other adapters."""
        for adapter in self.sdxl.adapters.values():
            adapter.detach(self.sdxl)
        self.sdxl._attach(configs)

    def base_is_unchanged(self) -> bool:
        """Whether detached and refused adapters have left nothing behind, bitwise."""
        self.replace({})
        return all(torch.equal(value, self.before[output]) for output, value in self.outputs().items())

    @torch.no_grad()
    def outputs(self) -> Tensors:
        """What README.txt says a change has."""
        x, model = self.inputs, self.sdxl
        adapter = next(iter(model.adapters.values()), None)
        plus = getattr(adapter, 'architecture', 'base') == 'plus'
        batch = Batch(text=list(self.prompts), time_ids=x['time_ids'], key=['a', 'b'], epoch=torch.zeros(2).long(),
                      seed=torch.zeros(2).long(), size=(64, 64), conditions={
                          'conditioning_image': x['image'],
                          'reference_embeds': x['image_hidden_states' if plus else 'image_embeds']})
        conditioning = model.encode(batch, project=True)
        fixed = replace(conditioning, text=x['encoder_hidden_states'], pooled=x['text_embeds'])
        return {'sample': model.predict(x['latents'], x['timestep'], fixed, torch.zeros(2, 2)),
                'prompt_embeds': conditioning.text, 'pooled': conditioning.pooled}

    def errors(self, name: str, change: str) -> dict[str, float]:
        """The distance of each output to what is expected, relative to the change, or to the base."""
        self.attach(name)
        errors = {}
        for output, value in self.outputs().items():
            base = self.expected[f'base.{output}'].double()
            key = f'{change}.{output}'
            expected = self.expected.get(key, base).double()
            size = expected - base if key in self.expected else base
            errors[output] = float((value.double() - expected).norm() / size.norm())
        return errors


@pytest.fixture(scope='module')
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return Tried(tmp_path_factory.mktemp('layouts'))


@pytest.mark.parametrize('kind', ['LoRA', 'TextualInversion', 'IPAdapter', 'T2IAdapter', 'ControlNet'])
def test_every_layout_is_right(tried: Tried, kind: str) -> None:
    """To 1e-5 of the change that merging by hand makes; all that are not are shown."""
    wrong: dict[str, Any] = {}
    for name, layout in tried.layouts.items():
        if layout['kind'] == kind and 'expected' in layout:
            try:
                errors = tried.errors(name, layout['expected'])
            except Exception as error:  # the others are tried all the same
                wrong[name] = f'{type(error).__name__}: {error}'
                continue
            if not max(errors.values()) <= tried.tolerance:
                wrong[name] = errors
    assert tried.base_is_unchanged()
    assert not wrong, '\n'.join(f'{name}: {what}' for name, what in wrong.items())


@pytest.mark.parametrize('find_kind', [True, False], ids=['by its file', 'by type'])
def test_what_is_not_supported_is_refused_by_name(tried: Tried, find_kind: bool) -> None:
    """By a sentence, whether the kind of the file is looked for, or the config says what it should be."""
    wrong = {}
    for name, layout in tried.layouts.items():
        if 'refused' in layout:
            try:
                tried.attach(name, find_kind)
            except UserError as error:
                said = str(error).replace(str(tried.folder / name), '')  # where the layout is named, too
                if not re.search(layout['refused'], said):
                    wrong[name] = said
            except Exception as error:  # a traceback to a user
                wrong[name] = f'{type(error).__name__}: {error}'
            else:
                wrong[name] = 'loads'
    assert tried.base_is_unchanged()
    assert not wrong, '\n'.join(f'{name}: {what}' for name, what in wrong.items())
