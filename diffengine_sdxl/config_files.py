"""Find config files by path or name; imports neither mmengine nor torch, so that a wrong name is answered at once."""

from __future__ import annotations

import ast
from pathlib import Path

from diffengine_sdxl.errors import UserError, did_you_mean, first_line

PACKAGE = Path(__file__).resolve().parent


def configs_folder() -> Path:
    """Return the folder of the installed configs, in a wheel or in a checkout."""
    return next(f for f in (PACKAGE / '.mim' / 'configs', PACKAGE.parent / 'configs') if f.is_dir())


def installed_configs() -> list[Path]:
    """Return all installed config files except the pieces in `_base_`."""
    return sorted(p for p in configs_folder().rglob('*.py') if '_base_' not in p.parts)


def find(name: str | Path) -> Path:
    """Return the config file at path `name`, or the installed one of that name (with or without '.py').

    Raises:
        UserError: there is none; names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {p.stem: p for p in installed_configs()}
    wanted = path.name.removesuffix('.py')
    # By name; or as it is written in the checkout, 'configs/lora/x.py'.
    if wanted in known and str(path.with_name(wanted)) in (wanted, f'{known[wanted].parent.name}/{wanted}',
                                                           f'configs/{known[wanted].parent.name}/{wanted}'):
        return known[wanted]
    hint = did_you_mean(wanted, list(known)) or ' `diffengine-sdxl list` shows the installed ones.'
    if path.is_dir():
        hint = f' A folder may be a base: take a config, and override model.pretrained={name}.'
    raise UserError(f"There is no config file '{name}' and no installed config of that name.{hint}")


def description(path: Path) -> str:
    """Return the first line of a config's docstring, '' if it has none.

    Raises:
        UserError: the file is not Python.
    """
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'), str(path))) or ''
    except (SyntaxError, ValueError) as error:
        raise UserError(f"The config '{path}' cannot be read: {first_line(error)}") from error
    return text.partition('\n')[0]
