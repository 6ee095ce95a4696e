"""Weight files, opened safely: safetensors first, pickles with `weights_only=True`, and nothing outside the folder."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffengine_sdxl.weights import said, shipped

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
        source: a file; a folder; 'diffengine_sdxl::<folder>' of this package; or a hub id.
        names: of files to look for in a folder or on the hub, the best first; a folder may also hold one weight file of
            any name.
        subfolder, revision: of a folder or hub id.
        weight_name: the file's name in the folder or on the hub, where there are several.

    Raises:
        ValueError: there is none, or several.
    """
    path = Path(str(shipped(source))).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if path.is_absolute() or str(source).startswith(('.', '~')) or path.suffix in SUFFIXES:
            raise ValueError(f"There is no file or folder '{source}'.")
        return _from_hub(str(source), [weight_name] if weight_name else names, subfolder, revision)
    folder = (path / (subfolder or '')).resolve()
    wanted = (folder / weight_name).resolve() if weight_name else folder
    if path.resolve() not in (folder, *folder.parents) or folder not in (wanted, *wanted.parents):
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


def _from_hub(source: str, names: Sequence[str], subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    failed: ValueError | None = None
    for name in names:
        try:
            return Path(said(source, hf_hub_download, source, name, subfolder=subfolder, revision=revision))
        except ValueError as error:
            failed = failed or error
    raise failed or ValueError(f"'{source}' is no file or folder here; to take it from the hub, name its weight_name.")


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
