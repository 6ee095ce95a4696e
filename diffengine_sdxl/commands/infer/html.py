"""The index.html of an image folder: one file without scripts, for any browser, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffengine_sdxl.commands.infer.digests import sha256
from diffengine_sdxl.commands.infer.provenance import effective

MARK = '<meta name="generator" content="diffengine_sdxl">'
# The policy allows only images beside this file; a script in a prompt cannot run.
HEAD = f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
'''
STYLE = '''<style>
:root { --paper: #f6f6f4; --card: #fff; --ink: #1d1d1f; --soft: #62626a; --line: #deded9; --link: #0b57c4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #151517; --card: #202024; --ink: #ececef; --soft: #a0a0aa; --line: #36363d; --link: #8ab4ff; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.35rem; overflow-wrap: anywhere; }
header p { margin: .2rem 0 1.2rem; color: var(--soft); }
a { color: var(--link); }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure > a { display: block; }
figure > a img { display: block; width: 100%; height: auto; }
img.tiny { image-rendering: pixelated; }
figcaption { padding: .7rem .85rem .8rem; }
figcaption p { margin: 0 0 .45rem; overflow-wrap: anywhere; }
.prompt { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.facts, .adapters, summary, dl, pre { font-size: .84rem; color: var(--soft); }
.facts span, .adapters span { display: inline-block; margin: 0 .3rem .25rem 0; padding: 0 .45rem;
  border: 1px solid var(--line); border-radius: 99px; overflow-wrap: anywhere; }
.inputs { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .45rem; }
.inputs a { width: 4.6rem; font-size: .74rem; line-height: 1.25; text-decoration: none; color: var(--soft);
  overflow-wrap: anywhere; }
.inputs img { display: block; width: 100%; height: 4.6rem; object-fit: cover; border-radius: 6px;
  border: 1px solid var(--line); margin-bottom: .15rem; }
summary { cursor: pointer; }
dl { margin: .5rem 0; }
dt { margin-top: .35rem; overflow-wrap: anywhere; }
dd { margin: 0; color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: .5rem 0 0; max-height: 22rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
'''


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


def is_ours(path: Path) -> bool:
    """Return whether the file at `path` was written by `render`."""
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            return MARK in file.read(2048)
    except OSError:
        return False


def render(folder: Path, shown: Sequence[Shown]) -> str:
    """Return the text of `folder`'s index.html, which shows its images `shown`."""
    title = escape(folder.resolve().name)
    cards = '\n'.join(_card(folder, one) for one in shown)
    return (f'{HEAD}<title>{title}</title>\n{STYLE}</head>\n<body>\n<header><h1>{title}</h1>\n'
            f'<p>{len(shown)} image{"s" if len(shown) != 1 else ""} · <a href="grid.png">all in one grid</a></p>'
            f'</header>\n<main>\n{cards}\n</main>\n</body>\n</html>\n')


def _card(folder: Path, one: Shown) -> str:
    prompt, link = one.settings['request'].get('prompt', ''), _link(one.path.name)
    width, height = one.size
    facts = [f'seed {one.seed}', f'{width} × {height}']
    facts += [text.format(value) for key, text in (
        ('num_inference_steps', '{:g} steps'), ('guidance_scale', 'guidance {:g}'), ('strength', 'strength {:g}'),
        ('denoising_end', 'base to {:g}')) if isinstance(value := effective(one.settings, key), int | float)]
    parts = [
        f'<figure>\n<a href="{link}"><img src="{link}" alt="{escape(prompt)}" loading="lazy" width="{width}" '
        f'height="{height}"{" class=" + repr("tiny") if width < 256 else ""}></a>\n<figcaption>',
        f'<p class="prompt" title="{escape(prompt)}">{escape(prompt) or "<i>no prompt</i>"}</p>',
        f'<p class="facts">{_pills(facts)}</p>']
    if adapters := _adapters(one.settings):
        parts.append(f'<p class="adapters">{_pills(adapters)}</p>')
    if inputs := _inputs(folder, one):
        parts.append(f'<div class="inputs">{inputs}</div>')
    return '\n'.join([*parts, _details(one), '</figcaption>\n</figure>'])


def _link(path: str) -> str:
    return quote(os.fsencode(path))


def _pills(texts: Sequence[str]) -> str:
    return ''.join(f'<span>{escape(text)}</span>' for text in texts)


def _adapters(settings: Mapping[str, Any]) -> list[str]:
    """Return 'style × 0.8' for each adapter; for the base's, the request's scale wins."""
    scales = settings['request'].get('scales') or {}
    return [f'{name} × {scales.get(name, adapter.get("scale", 1)) if part == "model" else adapter.get("scale", 1)}'
            for part in ('model', 'refiner')
            for name, adapter in ((settings['config'].get(part) or {}).get('adapters') or {}).items() if adapter]


def _inputs(folder: Path, one: Shown) -> str:
    """Return a linked thumbnail for each unchanged input file, and a note for each other input."""
    links = []
    for entry in one.settings['inputs']:
        key, path = entry['key'], entry['path']
        label = escape(key.removeprefix('conditions.'))
        if key in one.inputs:
            link = _link(os.path.relpath(path, folder.resolve()))
            links.append(f'<a href="{link}"><img src="{link}" alt="{label}" loading="lazy">{label}</a>')
        elif path and path.startswith(('http://', 'https://')):
            links.append(f'<a href="{escape(path)}" rel="noreferrer">{label}: by URL</a>')
        elif key != 'latents':
            links.append(f'<a>{label}: {"changed or gone" if path else "no file"}</a>')
    return ''.join(links)


def _details(one: Shown) -> str:
    settings = one.settings
    rows = {'file': one.path.name, **{k: v for k, v in settings['request'].items() if k not in ('seed', 'conditions')}}
    for entry in [*settings['inputs'], *settings['sources']]:
        digest = f'SHA-256 {entry["sha256"][:16]}…' if entry['sha256'] else \
            f'commit {entry["commit"][:16]}…' if entry.get('commit') else 'not checked'
        rows[entry['key']] = f'{entry["path"] or "in memory"}\n{digest}'
    if settings.get('weights'):
        rows.setdefault('weights', settings['weights'])
    rows.update({f'made, {key}': value for key, value in (settings.get('made') or {}).items()})
    texts = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
             for key, value in rows.items()}
    cells = ''.join(f'<dt>{escape(str(key))}</dt><dd>{escape(text)}</dd>' for key, text in texts.items())
    config = escape(json.dumps(settings['config'], indent=1, ensure_ascii=False))
    return (f'<details><summary>Settings</summary>\n<dl>{cells}</dl>\n'
            f'<details><summary>Config</summary><pre>{config}</pre></details></details>')
