"""Weight files, opened safely: safetensors first, pickles with `weights_only=True`, and nothing outside the folder."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffengine_sdxl import hub
from diffengine_sdxl.weights import shipped

PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
SUFFIXES = ('.safetensors', *PICKLES)
SHOWN = 10


@dataclass(frozen=True)
class WeightFile:
    """A file's tensors (nested where a pickle nests them), its metadata (safetensors only) and its path."""

    tensors: dict[str, Any]
    metadata: dict[str, str]
    path: Path


def find(source: str | Path, names: Sequence[str] = (), subfolder: str | None = None, weight_name: str | None = None,
         revision: str | None = None) -> Path:
    """The file that `source` stands for.

    Args:
        source: a file; a folder; 'diffengine_sdxl::<folder>' of this package; a hub id; or a link to a file of the hub.
        names: of files to look for in a folder or on the hub, the best first; a folder may also hold one weight file of
            any name.
        subfolder, revision: of a folder or hub id.
        weight_name: the file's name in the folder or on the hub, where there are several.

    Raises:
        ValueError: there is none, or several.
    """
    text = str(shipped(source))
    if linked := hub.link(text):
        file = PurePosixPath(linked[2])
        return _from_hub(hub.Repo(linked[0], revision or linked[1]), (), None,
                         str(file.with_name(weight_name or file.name)))
    found = hub.here(text)
    if found is None:
        return _from_hub(hub.Repo(text, revision), names, subfolder, weight_name)
    if found.is_file():
        return found
    # By their names: in the hub's cache every file is a link to another folder.
    folder = Path(os.path.normpath(found / (subfolder or '')))
    wanted = Path(os.path.normpath(folder / weight_name)) if weight_name else folder
    if Path(os.path.normpath(found)) not in (folder, *folder.parents) or folder not in (wanted, *wanted.parents):
        raise ValueError(f"'{subfolder or ''}/{weight_name or ''}' leads out of '{source}'.")
    if weight_name:
        if not wanted.is_file():
            raise ValueError(f"'{folder}' holds no file '{weight_name}'.")
        return wanted
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(p for p in folder.glob('*') if p.suffix in SUFFIXES) if folder.is_dir() else []
    if len(there) == 1:
        return there[0]
    raise ValueError(f"'{folder}' holds " + (f'{len(there)} weight files ({shown([p.name for p in there])}); name one '
                                             'with weight_name.' if there else 'no weight file.'))


def _from_hub(repo: hub.Repo, names: Sequence[str], subfolder: str | None, weight_name: str | None) -> Path:
    there = repo.inside(subfolder)
    if weight_name is not None:
        name = f'{subfolder.strip("/")}/{weight_name}' if subfolder else weight_name
    elif best := [there[name] for name in names if name in there]:
        name = best[0]
    else:
        found = [there[name] for name in there if name.endswith(SUFFIXES[:1])]
        found = found or [there[name] for name in there if name.endswith(PICKLES)]
        if repo.partial and found:
            raise ValueError(f'{repo} may be a part of the repository only ({shown(found)}); name the file with '
                             'weight_name.')
        if len(found) != 1:
            where = f" in '{subfolder}'" if subfolder else ''
            raise ValueError(f'{repo} holds {len(found)} weight files{where} ({shown(found)}); name one with '
                             'weight_name.' if found else f'{repo} holds no weight file{where}.')
        name = found[0]
    # A word of textual inversion may lie in two files, <name> and <name>_2.
    second = str(PurePosixPath(name).with_stem(f'{PurePosixPath(name).stem}_2'))
    return repo.fetch([name, second] if second in repo.names else [name]) / name


def parts_folder(source: str | Path, ends: tuple[str, ...], subfolder: str | None, revision: str | None) -> Path:
    """The folder of a source whose parts have folders of their own; of one on the hub these are brought here.

    Args:
        ends: the names of a part's files.
        source, subfolder, revision: see `find`.
    """
    text = str(shipped(source))
    found = Path(text) if hub.link(text) else hub.here(text)
    if found is not None:
        return found / (subfolder or '')
    repo = hub.Repo(text, revision)
    begin = f'{subfolder.strip("/")}/' if subfolder else ''
    inner = [n for n in repo.names if n.startswith(begin) and n.count('/') == begin.count('/') + 1 and n.endswith(ends)]
    return (repo.fetch(inner) if inner else Path(text)) / begin


def read(path: Path) -> WeightFile:
    """Read a weight file.

    Raises:
        ValueError: it is damaged, or a pickle that holds more than tensors.
    """
    if path.suffix in PICKLES:
        try:
            tensors = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"'{path}' is a pickle that holds more than tensors, perhaps code; it was not opened. Ask "
                             'for a .safetensors file.') from error
        except Exception as error:  # torch raises many kinds for a damaged file
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"'{path}' cannot be read: {first[:200]}") from error
        if not isinstance(tensors, dict):
            raise ValueError(f"'{path}' holds a {type(tensors).__name__}, not named tensors.")
        return WeightFile(tensors, {}, path)
    try:
        with safe_open(path, framework='pt') as file:
            found: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return WeightFile(found, dict(file.metadata() or {}), path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error


def shown(keys: Sequence[str]) -> str:
    """The first ten of them, for a sentence."""
    return ', '.join(keys[:SHOWN]) + (', ...' if len(keys) > SHOWN else '')


def refuse(source: str | Path, **faults: Sequence[str]) -> None:
    """Raise if some keys did not match.

    Args:
        source: the file. faults: what is wrong with them ('unknown', 'missing', ...) -> the keys.

    Raises:
        ValueError: names the first ten of each and how many there are.
    """
    found = [f'{len(keys)} {kind.replace("_", " ")} ({shown(sorted(keys))})' for kind, keys in faults.items() if keys]
    if found:
        raise ValueError(f"The weights in '{source}' don't fit: {'; '.join(found)}.")
