"""Find and read weight files safely: no code in pickles (`weights_only=True`), nothing outside the folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffengine_sdxl.adapters.formats.unsupported import refuse_unsupported
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.strict import shipped
from diffengine_sdxl.loading.weights import (
    PICKLES,
    check_dtypes,
    checked,
    keys_to_ignore,
    read_header,
    read_pickle,
    unreadable,
    upcast_fp8,
)

#: Ends of the names of two files that belong together, for the first and the second text encoder; the longest first.
PAIRS = (('text_encoder_1', 'text_encoder_2'), ('text_encoder', 'text_encoder_2'), ('clip_l', 'clip_g'),
         ('clipl', 'clipg'), ('te_1', 'te_2'), ('te1', 'te2'), ('_l', '_g'), ('-l', '-g'), ('_1', '_2'), ('-1', '-2'),
         ('', '_2'), ('', '-2'))
SUFFIXES = ('.safetensors', *PICKLES)


@dataclass(frozen=True)
class WeightFile:
    """A file's tensors (nested if a pickle nests them), its metadata (safetensors only) and its path."""

    tensors: dict[str, Any]
    metadata: dict[str, str]
    path: Path


@dataclass(frozen=True)
class Folder:
    """A local folder, or one of a repository on the hub, whose files are downloaded when they are asked for.

    Attributes:
        path: of the folder; in the repository if there is one, where '.' is its root.
        repo: None for a local folder.
    """

    path: str
    repo: hub.Repo | None = None

    def __str__(self) -> str:
        return os.path.normpath(os.path.join(self.repo.source, self.path)) if self.repo else self.path

    def at(self, path: str) -> Folder:
        """Return the folder at a relative path."""
        return replace(self, path=self._join(path))

    def names(self) -> Collection[str]:
        """Return the names directly in it; none if there is no such folder."""
        if self.repo:
            return self.repo.files_in(None if self.path == '.' else self.path)
        return os.listdir(self.path) if os.path.isdir(self.path) else []

    def has(self, name: str) -> bool:
        """Whether it has a file of this relative path."""
        path = self._join(name)
        return path in self.repo.names if self.repo else os.path.isfile(path)

    def file(self, name: str) -> Path:
        """Return the local path of a file that it has."""
        path = self._join(name)
        return self.repo.fetch([path]) / path if self.repo else Path(path)

    def _join(self, path: str) -> str:
        # Compared by name: in the hub's cache every file is a link to another folder.
        return os.path.normpath(os.path.join(self.path, path))


def locate(source: str | Path, subfolder: str | None = None, weight_name: str | None = None,
           revision: str | None = None) -> tuple[Folder, str | None]:
    """Return the folder of `source`, and the name of its file if one is named. See `find`, which picks the file.

    Raises:
        UserError: there is no such source.
    """
    text = str(shipped(source))
    if linked := hub.parse_file_link(text):
        file = PurePosixPath(linked[2])
        return Folder(str(file.parent), hub.Repo(linked[0], revision or linked[1])), weight_name or file.name
    local = hub.local_path(text)
    if local is not None and local.is_file():
        return Folder(str(local.parent)), local.name
    path, name = os.path.split(os.path.join((subfolder or '').strip('/'), weight_name or ''))
    root = Folder('.', hub.Repo(text, revision)) if local is None else Folder(str(local))
    return root.at(path), name or None


def find(source: str | Path, names: Sequence[str] = (), subfolder: str | None = None, weight_name: str | None = None,
         revision: str | None = None) -> Path:
    """Return the weight file of `source`; files on the hub are downloaded.

    Args:
        source: a file; a folder; 'diffengine_sdxl::<folder>' of this package; a hub id; or a link to a file on the hub.
        names: file names to look for in a folder or on the hub, best first; otherwise the only weight file is taken.
        subfolder, revision: of a folder or hub id.
        weight_name: the file's name in the folder or on the hub, if there are several.

    Raises:
        UserError: there is no such file, or there are several.
    """
    text = str(shipped(source))
    if linked := hub.parse_file_link(text):
        file = PurePosixPath(linked[2])
        return _from_hub(hub.Repo(linked[0], revision or linked[1]), (), None,
                         str(file.with_name(weight_name or file.name)))
    local = hub.local_path(text)
    if local is None:
        return _from_hub(hub.Repo(text, revision), names, subfolder, weight_name)
    if local.is_file():
        return local
    # Compared by name: in the hub's cache every file is a link to another folder.
    folder = Path(os.path.normpath(local / (subfolder or '')))
    path = Path(os.path.normpath(folder / weight_name)) if weight_name else folder
    if Path(os.path.normpath(local)) not in (folder, *folder.parents) or folder not in (path, *path.parents):
        raise UserError(f"'{subfolder or ''}/{weight_name or ''}' leads out of '{source}'.")
    if weight_name:
        if not path.is_file():
            raise UserError(f"'{folder}' holds no file '{weight_name}'.")
        return path
    for name in names:
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.glob('*') if p.suffix in SUFFIXES) if folder.is_dir() else []
    if len(files) != 1:
        raise UserError(f"'{folder}' holds " + (f'{len(files)} weight files ({listed(p.name for p in files)}); name '
                                                'one with weight_name.' if files else 'no weight file.'))
    return files[0]


def _from_hub(repo: hub.Repo, names: Sequence[str], subfolder: str | None, weight_name: str | None) -> Path:
    in_folder = repo.files_in(subfolder)
    if weight_name is not None:
        path = f'{subfolder.strip("/")}/{weight_name}' if subfolder else weight_name
    elif best := [in_folder[name] for name in names if name in in_folder]:
        path = best[0]
    else:
        files = ([in_folder[name] for name in in_folder if name.endswith(SUFFIXES[:1])]
                 or [in_folder[name] for name in in_folder if name.endswith(PICKLES)])
        if repo.partial and files:
            raise UserError(f'{repo} may be a part of the repository only ({listed(files)}); name the file with '
                            'weight_name.')
        if len(files) != 1:
            where = f" in '{subfolder}'" if subfolder else ''
            raise UserError(f'{repo} holds {len(files)} weight files{where} ({listed(files)}); name one with '
                            'weight_name.' if files else f'{repo} holds no weight file{where}.')
        path = files[0]
    # A textual inversion may be split into two files, as <name> and <name>_2.
    return repo.fetch([path, *(name for name in siblings(path) if name in repo.names)]) / path


def siblings(path: str | PurePosixPath) -> list[str]:
    """Return the names that the file of the other text encoder may have, for one of the first or the second."""
    path = PurePosixPath(path)
    stems = [path.stem[:len(path.stem) - len(own)] + other for first, second in PAIRS
             for own, other in ((first, second), (second, first)) if path.stem.endswith(own)]
    return [str(path.with_stem(stem)) for stem in stems if stem]


def parts_folder(source: str | Path, suffixes: tuple[str, ...], subfolder: str | None, revision: str | None) -> Path:
    """Return the folder of a source that has a subfolder per part; from the hub, download the parts' files.

    Args:
        suffixes: of the names of a part's files.
        source, subfolder, revision: see `find`.
    """
    text = str(shipped(source))
    local = Path(text) if hub.parse_file_link(text) else hub.local_path(text)
    if local is not None:
        return local / (subfolder or '')
    repo = hub.Repo(text, revision)
    prefix = f'{subfolder.strip("/")}/' if subfolder else ''
    files = [name for name in repo.names if name.startswith(prefix) and name.endswith(suffixes)
             and name.count('/') == prefix.count('/') + 1]
    return (repo.fetch(files) if files else Path(text)) / prefix


def read(path: Path, header_only: bool = False, ignore_keys: Sequence[str] = ()) -> WeightFile:
    """Read a weight file, whose values must be finite; fp8 is read as fp16.

    Args:
        path: the file.
        header_only: leave the tensors' data on the disk: those of safetensors are fp32 on the meta device, those of a
            pickle are mapped into memory; values are not checked.
        ignore_keys: patterns of keys to leave out ('*.bias').

    Raises:
        UserError: it is damaged, a pickle that holds more than tensors, holds what are no weights, or is of a kind that
            is never read; or a pattern matches no key.
    """
    if path.suffix in PICKLES:
        tensors, metadata = read_pickle(path, mmap=header_only), {}
    elif header_only:
        tensors = {key: torch.empty(info.shape, device='meta') for key, info in read_header(path).items()}
        with safe_open(path, framework='pt') as file:
            metadata = dict(file.metadata() or {})
    else:
        header = read_header(path)
        kept = header.keys() - keys_to_ignore(header, ignore_keys, path, log=False)
        check_dtypes(((key, header[key].dtype) for key in header if key in kept), path)
        try:
            with safe_open(path, framework='pt') as file:
                # Those to ignore may be of a dtype that torch doesn't have.
                tensors = {key: file.get_tensor(key) if key in kept else None for key in header}
                metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise UserError(unreadable(path, error)) from error
    if not isinstance(tensors, dict):
        raise UserError(f"'{path}' holds a {type(tensors).__name__}, not named tensors.")
    refuse_unsupported(path, tensors)
    ignored = keys_to_ignore(tensors, ignore_keys, path)
    tensors = {key: value for key, value in tensors.items() if key not in ignored}
    if not header_only:
        checked(tensors, path)
        tensors = upcast_fp8(tensors)
    return WeightFile(tensors, metadata, path)


def refuse(source: str | Path, **faults: Sequence[str]) -> None:
    """Raise if some keys of a file do not fit.

    Args:
        source: the file. faults: what is wrong ('unknown', 'missing', ...) -> the keys.

    Raises:
        UserError: names the number of keys and the first ten of each.
    """
    texts = [f'{len(keys)} {fault.replace("_", " ")} ({listed(sorted(keys))})'
             for fault, keys in faults.items() if keys]
    if texts:
        hint = ' Set ignore_keys to patterns of keys that may be left out.' if faults.get('unknown') else ''
        raise UserError(f"The weights in '{source}' don't fit: {'; '.join(texts)}.{hint}")
