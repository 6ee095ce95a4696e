"""The index.html of an image folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from diffengine_sdxl import pages
from diffengine_sdxl.commands.infer.digests import sha256
from diffengine_sdxl.commands.infer.provenance import effective


@dataclass(frozen=True)
class Shown:
    """An image of the folder: its file, its settings (see `provenance.record`), and its width and height in pixels."""

    path: Path
    settings: Mapping[str, Any]
    size: tuple[int, int]

    @property
    def seed(self) -> int:
        """Seed of its noise."""
        return int(self.settings['request'].get('seed', 0))

    @cached_property
    def inputs(self) -> dict[str, Path]:
        """The files of its input images that are present and unchanged, by key."""
        return {entry['key']: Path(entry['path']) for entry in self.settings['inputs']
                if entry['key'] != 'latents' and entry['sha256'] and entry['path']
                and os.path.isfile(entry['path']) and sha256(entry['path']) == entry['sha256']}


class Input(NamedTuple):
    """An input of an image: a link to it ('' for none), its name, what is said of it, whether it is a file here."""

    link: str
    label: str
    note: str
    is_file: bool


class Card(NamedTuple):
    """What the page shows of an image."""

    link: str
    prompt: str
    width: int
    height: int
    facts: list[str]
    adapters: list[str]
    inputs: list[Input]
    settings: list[tuple[str, str]]
    config: str


def render(folder: Path, shown: Sequence[Shown]) -> str:
    """Return the text of `folder`'s index.html, which shows its images `shown`."""
    return pages.render('image_folder.html', title=folder.resolve().name, cards=[_card(folder, one) for one in shown])


def _card(folder: Path, one: Shown) -> Card:
    width, height = one.size
    facts = [f'seed {one.seed}', f'{width} × {height}']
    facts += [text.format(value) for key, text in (
        ('num_inference_steps', '{:g} steps'), ('guidance_scale', 'guidance {:g}'), ('strength', 'strength {:g}'),
        ('denoising_end', 'base to {:g}')) if isinstance(value := effective(one.settings, key), int | float)]
    return Card(_link(one.path.name), one.settings['request'].get('prompt', ''), width, height, facts,
                _adapters(one.settings), _inputs(folder, one), _settings(one),
                json.dumps(one.settings['config'], indent=1, ensure_ascii=False))


def _link(path: str) -> str:
    return quote(os.fsencode(path))


def _adapters(settings: Mapping[str, Any]) -> list[str]:
    """Return 'style × 0.8' for each adapter; for the base's, the request's scale wins."""
    scales = settings['request'].get('scales') or {}
    return [f'{name} × {scales.get(name, adapter.get("scale", 1)) if part == "model" else adapter.get("scale", 1)}'
            for part in ('model', 'refiner')
            for name, adapter in ((settings['config'].get(part) or {}).get('adapters') or {}).items() if adapter]


def _inputs(folder: Path, one: Shown) -> list[Input]:
    """Return each unchanged input file, and a note for each other input."""
    inputs = []
    for entry in one.settings['inputs']:
        key, path = entry['key'], entry['path']
        label = key.removeprefix('conditions.')
        if key in one.inputs:
            inputs.append(Input(_link(os.path.relpath(path, folder.resolve())), label, '', True))
        elif path and path.startswith(('http://', 'https://')):
            inputs.append(Input(path, label, ': by URL', False))
        elif key != 'latents':
            inputs.append(Input('', label, ': changed or gone' if path else ': no file', False))
    return inputs


def _settings(one: Shown) -> list[tuple[str, str]]:
    settings = one.settings
    rows = {'file': one.path.name, **{k: v for k, v in settings['request'].items() if k not in ('seed', 'conditions')}}
    for entry in [*settings['inputs'], *settings['sources']]:
        digest = f'SHA-256 {entry["sha256"][:16]}…' if entry['sha256'] else \
            f'commit {entry["commit"][:16]}…' if entry.get('commit') else 'not checked'
        rows[entry['key']] = f'{entry["path"] or "in memory"}\n{digest}'
    if settings.get('weights'):
        rows.setdefault('weights', settings['weights'])
    rows.update({f'made, {key}': value for key, value in (settings.get('made') or {}).items()})
    return [(str(key), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for key, value in rows.items()]
