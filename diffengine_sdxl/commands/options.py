"""The options of the infer command; those of a request's settings are made of its declarations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.request import SETTINGS
from diffengine_sdxl.settings import Setting, read_text

#: Settings of a request that have options of their own.
SPECIAL = ('prompt', 'conditions')


def extend(parser: Any, flag: str, metavar: str, help: str) -> None:
    """Add an option that takes several values and may be repeated."""
    parser.add_argument(flag, nargs='+', action='extend', metavar=metavar, help=help)


def add_infer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `infer`."""
    parser.usage = '%(prog)s CONFIG [options]; -h lists them'
    parser.add_argument('config', help='path of a config, name of an installed one, or a PNG made here')
    extend(parser, '--prompt', 'TEXT', "prompts (default: the config's)")
    parser.add_argument('--prompts', metavar='FILE',
                        help='file of prompts: .txt, one per line; .jsonl or .csv, with settings per row')
    parser.add_argument('--condition', '--conditions', action='append', metavar='[ADAPTER=]FILE',
                        help="an adapter's image; repeat it for several; ADAPTER.mask=FILE for where it acts; "
                             'without a name it is for the one adapter that reads images')
    parser.add_argument('--adapter', action='append', metavar='NAME=SOURCE[,KEY=VALUE]',
                        help='an adapter from a file, folder or hub id, whose kind is found by itself: '
                             'style=X.safetensors,scale=0.8 or depth=ID,revision=...,subfolder=...')
    parser.add_argument('--weights', help='a step<N>.pth; a work dir (its latest); an exported folder; none for the '
                                          'base without adapters (default: as the config names them)')
    parser.add_argument('--out', help='folder for the images (default: work_dirs/<config>/images)')
    parser.add_argument('--batch-size', type=int, default=1,
                        help='images per batch (default: 1, which makes an image again bitwise)')
    parser.add_argument('--device', help='cuda, cuda:1, cpu, ... (default: the best available)')
    extend(parser, '--cfg-options', 'KEY=VALUE', 'override keys of the config (docs/configs.md)')
    settings = parser.add_argument_group('settings of the images', 'Names as in diffusers; see docs/inference.md.')
    extend(settings, '--set', 'KEY=VALUE', 'any of these: seed=3 scales.style=0.5 refiner.strength=0.2')
    for name, one in SETTINGS.items():
        if name not in SPECIAL:
            _add_setting(settings, name, one)


def _add_setting(group: Any, name: str, one: Setting) -> None:
    flags = (*one.flags, f'--{name.replace("_", "-")}')
    text = f'{one.help} ({one.kind.values})'.replace('%', '%%')
    if one.kind.form == 'dict':
        group.add_argument(*flags, dest=name, nargs='+', action='extend', metavar='NAME=VALUE', help=text)
    else:
        metavar = {'file': 'FILE', 'text': 'TEXT', 'number': 'N', 'list': 'A,B'}[one.kind.form]
        action = 'append' if one.kind.form == 'file' else 'store'
        group.add_argument(*flags, dest=name, action=action, metavar=metavar, help=text,
                           nargs='+' if one.kind.form == 'list' else None)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a request that the command line gives by options of their names.

    Raises:
        UserError: an option's value cannot be read.
    """
    given: dict[str, Any] = {}
    for name, one in SETTINGS.items():
        typed = None if name in SPECIAL else getattr(args, name)
        flag = f'--{name.replace("_", "-")}'
        if typed is None:
            continue
        if one.kind.form == 'file':
            given[name] = typed if len(typed) > 1 else typed[0]
        elif one.kind.form == 'dict':
            given[name] = dict(_pair(flag, item, name) for item in typed)
        else:
            given[name] = read_text(one.kind.form, flag, ','.join(typed) if isinstance(typed, list) else typed)
    return given


def set_settings(items: Sequence[str]) -> dict[str, Any]:
    """Return ['scales.style=0.5', 'name=007'] of `--set` as {'scales': {'style': 0.5}, 'name': '007'}.

    Raises:
        UserError: an item has no '=', its value cannot be read, or a key is both a value and a dict.
    """
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition('=')
        if not equals or not key:
            raise UserError(f"--set '{item}' must have the form KEY=VALUE.")
        *path, last = key.split('.')
        node = settings
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"--set '{key}': '{part}' is {node!r} already.")
        form = _form(*key.split('.'))
        if form == 'file' and text.startswith(('[', '{', 'dict(')):  # several images, or an image and its mask
            form = 'dict'
        node[last] = read_text(form, f"--set '{item}'", text)
    return settings


def _form(name: str, *path: str) -> str:
    """Return the form of a setting, or of an entry of it; '' of what is none: an option of `infer_cfg`."""
    if name not in SETTINGS:
        return ''
    kind = SETTINGS[name].kind
    # Without a form of its own an entry is a setting of the refiner.
    return kind.form if not path else kind.inner or _form(*path)


def _pair(flag: str, item: str, key: str) -> tuple[str, Any]:
    name, equals, value = item.partition('=')
    if not equals or not name:
        raise UserError(f"{flag} '{item}' must have the form NAME=VALUE.")
    return name, read_text(_form(key, name), f'{flag} {name}', value)
