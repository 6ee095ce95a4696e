"""A gallery's index.html: one file without scripts, for any browser, from the disk or a server, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffengine_sdxl.datasets.images import is_url
from diffengine_sdxl.engine.inference.provenance import effective

MARK = '<meta name="generator" content="diffengine_sdxl">'
# Nothing is fetched but pictures beside this file; a prompt that holds a script could not run it.
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


def is_ours(path: Path) -> bool:
    """Whether the file at `path` was written by `page`."""
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            return MARK in file.read(2048)
    except OSError:
        return False


def page(folder: Path, shown: Sequence[Any]) -> str:
    """The text of index.html.

    Args:
        folder: where it will lie. shown: pictures in it, each a `gallery.Shown`.
    """
    title = escape(folder.resolve().name)
    count = f'{len(shown)} picture{"s" if len(shown) != 1 else ""}'
    cards = '\n'.join(_card(folder, one) for one in shown)
    return (f'{HEAD}<title>{title}</title>\n{STYLE}</head>\n<body>\n<header><h1>{title}</h1>\n'
            f'<p>{count} · <a href="grid.png">all in one grid</a></p></header>\n'
            f'<main>\n{cards}\n</main>\n</body>\n</html>\n')


def _card(folder: Path, one: Any) -> str:
    request = one.settings['request']
    prompt, link = request.get('prompt', ''), _link(one.path.name)
    width, height = one.size
    facts = [f'seed {one.seed}', f'{width} × {height}']
    facts += [words.format(value) for key, words in (
        ('num_inference_steps', '{:g} steps'), ('guidance_scale', 'guidance {:g}'), ('strength', 'strength {:g}'),
        ('denoising_end', 'base to {:g}')) if isinstance(value := effective(one.settings, key), int | float)]
    parts = [
        f'<figure>\n<a href="{link}"><img src="{link}" alt="{escape(prompt)}" loading="lazy" width="{width}" '
        f'height="{height}"{_tiny(width)}></a>\n<figcaption>',
        f'<p class="prompt" title="{escape(prompt)}">{escape(prompt) or "<i>no prompt</i>"}</p>',
        f'<p class="facts">{_pills(facts)}</p>']
    if adapters := _adapters(one.settings):
        parts.append(f'<p class="adapters">{_pills(adapters)}</p>')
    if inputs := _inputs(folder, one):
        parts.append(f'<div class="inputs">{inputs}</div>')
    return '\n'.join([*parts, _details(one), '</figcaption>\n</figure>'])


def _link(path: str) -> str:
    return quote(os.fsencode(path))


def _tiny(width: int) -> str:
    return ' class="tiny"' if width < 256 else ''


def _pills(texts: Sequence[str]) -> str:
    return ''.join(f'<span>{escape(text)}</span>' for text in texts)


def _adapters(settings: Mapping[str, Any]) -> list[str]:
    """'style × 0.8' for each adapter, with what the request says otherwise than the config."""
    found, scales = [], settings['request'].get('scales') or {}
    for part in ('model', 'refiner'):
        for name, adapter in ((settings['config'].get(part) or {}).get('adapters') or {}).items():
            if adapter:
                own = scales.get(name) if part == 'model' else None
                found.append(f'{name} × {adapter.get("scale", 1) if own is None else own}')
    return found


def _inputs(folder: Path, one: Any) -> str:
    """A small picture, with its link, for each input that is still there; words for the others."""
    links = []
    for entry in one.settings['inputs']:
        key, path = entry['key'], entry['path']
        words = escape(key.removeprefix('conditions.'))
        if key in one.inputs:
            link = _link(os.path.relpath(path, folder.resolve()))
            links.append(f'<a href="{link}"><img src="{link}" alt="{words}" loading="lazy">{words}</a>')
        elif path and is_url(path):
            links.append(f'<a href="{escape(path)}" rel="noreferrer">{words}: by address</a>')
        elif key != 'latents':
            links.append(f'<a>{words}: {"changed or gone" if path else "no file"}</a>')
    return ''.join(links)


def _details(one: Any) -> str:
    settings = one.settings
    rows = {'file': one.path.name, **{k: v for k, v in settings['request'].items() if k not in ('seed', 'conditions')}}
    for entry in [*settings['inputs'], *settings['sources']]:
        digest = f'SHA-256 {entry["sha256"][:16]}…' if entry['sha256'] else \
            f'commit {entry["commit"][:16]}…' if entry.get('commit') else 'not checked'
        rows[entry['key']] = f'{entry["path"] or "in memory"}\n{digest}'
    if settings.get('weights'):
        rows.setdefault('weights', settings['weights'])
    made = settings.get('made') or {}
    rows.update({f'made, {key}': value for key, value in made.items()})
    cells = ''.join(f'<dt>{escape(str(key))}</dt><dd>{escape(_text(value))}</dd>' for key, value in rows.items())
    config = escape(json.dumps(settings['config'], indent=1, ensure_ascii=False))
    return (f'<details><summary>Settings</summary>\n<dl>{cells}</dl>\n'
            f'<details><summary>Config</summary><pre>{config}</pre></details></details>')


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
