"""The Hugging Face hub: download the files of a repository that are needed, safetensors first, into a local folder.

diffusers and transformers are given that folder, not an id. Their own downloading falls back to pickles if a connection
breaks, repeats requests for every file, and loads each component from whatever `main` is at that moment.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from mmengine.logging import print_log

from diffengine_sdxl.errors import WRITE_ERRORS, UserError, did_you_mean, first_line, listed
from diffengine_sdxl.loading.files import STEMS, WEIGHTS, in_safetensors, weight_files

HOSTS = ('https://huggingface.co', 'https://hf.co')
#: Weights that may hold code, or are another framework's.
PICKLES = ('.bin', '.ckpt', '.pt', '.pth', '.msgpack', '.h5', '.onnx')
TOKENIZER_SUFFIXES = ('.json', '.txt', '.jinja', '.model')
#: How many names of a folder are compared with one that does not exist.
MAX_SIBLINGS = 1000
#: Seconds for which a listing is valid, so that one load, which asks in several places, lists once.
LISTING_SECONDS = 20.0
COMMIT = re.compile('[0-9a-f]{40}')
_ID = re.compile(r'[A-Za-z0-9_][\w.-]*(/[\w.-]+)?', re.ASCII)
_RESUME = ' Complete files are kept; the same command downloads the others.'
# (id, revision, folder of the cache) -> time, names and commit of a listing; and the commit that was loaded last.
_LISTINGS: dict[tuple[str, str, Path], tuple[float, list[str], str]] = {}
_LOADED: dict[tuple[str, str, Path], str] = {}


def parse_file_link(source: str) -> tuple[str, str, str] | None:
    """Return repository, revision and file of a link to a file of the hub or its mirror in HF_ENDPOINT, else None."""
    match = _match_hub(source, r'([^/]+/[^/]+)/(?:blob|resolve)/(refs/(?:pr|convert)/[^/]+|[^/]+)/([^?]+)(?:\?.*)?')
    return (match[1], unquote(match[2]), unquote(match[3])) if match else None


def parse_model_link(source: str) -> tuple[str, str, str | None, str | None] | None:
    """Return repository, revision, subfolder and variant of a link to a model's weights or config, else None.

    Raises:
        UserError: it links to another file.
    """
    linked = parse_file_link(source)
    if linked is None:
        return None
    file = PurePosixPath(linked[2])
    weights = WEIGHTS.fullmatch(file.name)
    if weights is None and file.name != 'config.json':
        raise UserError(f"'{source}' links to a file that is neither a config.json nor weights named "
                        f'{", ".join(f"{stem}.safetensors" for stem in STEMS)} or the like. Link one of these, or '
                        f"give the repository's id, '{linked[0]}', and `subfolder`.")
    return linked[0], linked[1], None if file.parent.name == '' else str(file.parent), weights[1] if weights else None


def local_path(source: str) -> Path | None:
    """Return the local file or folder that `source` names; None if it may be an id of the hub.

    Raises:
        UserError: it does not exist and is not an id, or it cannot be read.
    """
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: unknown user in '~user'
        name = source if len(source) <= 200 else f'{source[:200]}...'
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"'{name}' cannot be read: {reason}. Check the name and the permissions of its "
                        'folder.') from error
    if _ID.fullmatch(source) and not source.endswith(('.safetensors', *PICKLES)):
        return None
    if page := _match_hub(source, r'([^/?]+/[^/?]+)(?:[/?].*)?'):
        raise UserError(f"'{source}' is a page of the hub; give the repository's id, '{page[1]}'.")
    raise UserError(f"There is no file or folder '{source}'.{suggest_sibling(path)}")


def suggest_sibling(path: Path) -> str:
    """Return " Did you mean ...?" with names like that of a missing `path` in its folder, or ''."""
    try:
        with os.scandir(path.parent) as entries:
            return did_you_mean(path.name, sorted(entry.name for entry in itertools.islice(entries, MAX_SIBLINGS)))
    except OSError:
        return ''


class Repo:
    """A model repository at one revision, listed once; everything is downloaded from the commit that was listed.

    Without network it is what the cache has of it.

    Args:
        source: 'owner/name'.
        revision: branch, tag or commit; None for `main`.
        cache_dir: None for the hub's own.

    Attributes:
        names: of the files, with '/' between folders.
        partial: whether there may be more files than `names`, as the cache has no record of the repository's listing.

    Raises:
        UserError: it cannot be listed; why, and what to do.
    """

    def __init__(self, source: str, revision: str | None = None, cache_dir: str | None = None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RevisionNotFoundError
        _check_revision(source, revision)
        self.source, self.revision, self.cache_dir = source, revision, cache_dir
        self._key = (source, revision or constants.DEFAULT_REVISION, _cache_folder(source, cache_dir))
        self._offline: Path | None = None  # the snapshot in the cache, if the hub cannot be reached
        self.partial = False
        listed_at, self.names, self._commit = _LISTINGS.get(self._key, (-LISTING_SECONDS, [], ''))
        if time.monotonic() - listed_at < LISTING_SECONDS:
            return
        try:
            info = HfApi().model_info(source, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except RevisionNotFoundError as error:
            raise _unknown_revision(source, revision) from error
        except hub_errors() as error:
            self._offline = self._list_cache(error)
            print_log(f"'{source}' is loaded from the cache: {_sentence(error)}", logger='current')
        else:
            assert info.sha is not None  # the hub always names the commit
            self.names, self._commit = sorted(file.rfilename for file in info.siblings or ()), info.sha
            _LISTINGS[self._key] = time.monotonic(), self.names, self._commit

    def _list_cache(self, hub_error: Exception) -> Path:
        """Return the snapshot in the cache and set `names`, after the hub failed with `hub_error`."""
        from huggingface_hub import snapshot_download
        try:
            # With no pattern for files, it accepts an incomplete snapshot.
            folder = Path(snapshot_download(self.source, revision=self.revision, cache_dir=self.cache_dir,
                                            local_files_only=True, allow_patterns=[]))
        except (OSError, ValueError):
            raise UserError(_unavailable(self.source, hub_error)) from hub_error
        names = _recorded_names(self.source, folder.name, self.cache_dir)
        self.partial = names is None
        self.names = sorted(names or (p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()))
        return folder

    def __str__(self) -> str:
        return (f"'{self.source}'" + (f" (revision '{self.revision}')" if self.revision else '')
                + (' in the cache, without network,' if self._offline else ''))

    def files_in(self, folder: str | None) -> dict[str, str]:
        """Return the files directly in `folder`: name there -> name in the repository."""
        prefix = f'{folder.strip("/")}/' if folder else ''
        return {name.removeprefix(prefix): name for name in self.names
                if name.startswith(prefix) and '/' not in name.removeprefix(prefix)}

    def missing(self, name: str) -> UserError:
        """Return the error for a missing file, with the nearest names."""
        near = did_you_mean(name, self.names) or did_you_mean(name.rpartition('/')[2], self.names)
        return UserError(f"{self} has no file '{name}'.{near or f' It has {_listed(self.names)}.'}")

    def fetch(self, names: Iterable[str]) -> Path:
        """Download the files that are not in the cache; return the folder that holds all by their names.

        Raises:
            UserError: the repository has no file of that name, or the connection broke.
        """
        names = list(names)
        for name in names:
            if name not in self.names:
                raise self.missing(name)
        folder = self._offline or self._download(names)
        # If the connection breaks between listing and download, huggingface_hub silently returns what the cache has.
        absent = [name for name in names if not (folder / name).is_file()]
        if absent and self._offline:
            raise UserError(f'{self} lacks {_listed(absent)}; with network they are downloaded.')
        if absent:
            raise UserError(f"'{self.source}' was not downloaded completely: {_listed(absent)} are missing.{_RESUME}")
        _LOADED[self._key] = folder.name
        return folder

    def _download(self, names: list[str]) -> Path:
        """Download from the listed commit, as the branch may move meanwhile."""
        from huggingface_hub import hf_hub_download, snapshot_download
        try:
            folder = Path(snapshot_download(self.source, revision=self._commit, cache_dir=self.cache_dir,
                                            allow_patterns=[glob.escape(name) for name in names]))
        except hub_errors() as error:
            _raise_if_disk_full(error)
            if _status(error) in (401, 403):
                raise UserError(_unavailable(self.source, error)) from error
            raise UserError(f"'{self.source}' was not downloaded completely: {_sentence(error)}{_RESUME}") from error
        if _LISTINGS.get(self._key, (0, [], ''))[2] == self._commit:  # a load may take longer than LISTING_SECONDS
            _LISTINGS[self._key] = time.monotonic(), self.names, self._commit
        if commit_in_cache(self.source, self.revision, self.cache_dir, prefer_loaded=False) != self._commit:
            # Downloads by commit leave no ref in the cache, without which the branch cannot be found offline.
            # Requested by branch, huggingface_hub writes it.
            with contextlib.suppress(*hub_errors()):
                hf_hub_download(self.source, names[0], revision=self.revision, cache_dir=self.cache_dir)
        return folder

    def model_files(self, folder: str | None, variant: str | None = None) -> list[str]:
        """Return the files of a model of diffusers or transformers: its config, and its weights once.

        If there are no safetensors: pickles of tensors (.bin), which are read with torch's `weights_only`.

        Raises:
            UserError: the folder has no weights of that variant, or only ones that may hold code.
        """
        files = self.files_in(folder)
        place = f"{self}{f' in {folder!r}' if folder else ''}"
        if 'config.json' not in files:
            raise self.missing(f'{folder}/config.json' if folder else 'config.json')
        if weights := weight_files(files, variant):
            return [files[name] for name in ('config.json', *weights)]
        if tensors := in_safetensors(files):
            raise UserError(f'{place} has no weights ' + (f"of variant '{variant}'" if variant else 'without a variant')
                            + f' (it has {_listed(tensors)}). '
                            + ('Omit `variant`, or name another.' if variant else 'Set `variant`.'))
        if others := [name for name in files if name.endswith(PICKLES)]:
            raise UserError(f'{place} has no weights in safetensors, and no .bin that diffusers or transformers would '
                            f'read; it has {_listed(others)}, which may hold code and are not downloaded. Use another '
                            'repository, or convert them if you trust them.')
        raise UserError(f'{place} has no weights; it has {_listed(files)}.')

    def tokenizer_files(self, folder: str) -> list[str]:
        """Return the files of a tokenizer or of settings in `folder`: no weights."""
        return [name for short, name in self.files_in(folder).items() if short.endswith(TOKENIZER_SUFFIXES)]


def fetch_file(source: str, name: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Return one file of a model repository, from the hub or its cache.

    Raises:
        UserError: it cannot be downloaded; why, and what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RevisionNotFoundError
    _check_revision(source, revision)
    try:
        path = Path(hf_hub_download(source, name, revision=revision, cache_dir=cache_dir))
    except RevisionNotFoundError as error:
        raise _unknown_revision(source, revision) from error
    except RemoteEntryNotFoundError as error:
        raise Repo(source, revision, cache_dir).missing(name) from error
    except hub_errors() as error:
        _raise_if_disk_full(error)
        if _status(error) in (401, 403, 404):
            raise UserError(_unavailable(source, error)) from error
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise UserError(f"'{name}' of '{source}' cannot be downloaded from the hub: {_sentence(cause)} Check the name, "
                        'the network and HF_HUB_OFFLINE, or give the path of a file.') from error
    commit = path.parents[len(PurePosixPath(name).parts) - 1].name
    _LOADED[source, revision or 'main', _cache_folder(source, cache_dir)] = commit
    return path


def commit_in_cache(source: str, revision: str | None = None, cache_dir: str | None = None,
                    prefer_loaded: bool = True) -> str | None:
    """Return the commit that an id stands for in the local cache, without network; None if it is not there.

    Args:
        source: 'owner/name', 'owner/name/file', or a link to a file of the hub.
        revision: a branch, tag or commit; None for the link's own, else 'main'.
        cache_dir: None for the hub's own.
        prefer_loaded: return the commit that this process loaded last, if it did; the cache may have moved on since.
    """
    linked = parse_file_link(source)
    name = linked[0] if linked else '/'.join(source.split('/')[:2])
    if '/' not in name or not _ID.fullmatch(name):
        return None
    revision = revision or (linked[1] if linked else 'main')
    folder = _cache_folder(name, cache_dir)
    ref = Path(os.path.abspath(folder / 'refs' / revision))
    try:
        # A revision may come from an untrusted file and lead anywhere.
        is_ref = ref.is_file() and ref.is_relative_to(os.path.abspath(folder / 'refs'))
        loaded = _LOADED.get((name, revision, folder)) if prefer_loaded else None
        commit = loaded or (ref.read_text(encoding='utf-8').strip() if is_ref else revision)
        return commit if COMMIT.fullmatch(commit) and (folder / 'snapshots' / commit).is_dir() else None
    except (OSError, ValueError):  # ValueError: a null byte, or not UTF-8
        return None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises if something cannot be downloaded.

    Its HTTP client is httpx or httpx2, depending on its version; hf_xet raises RuntimeError.
    """
    from huggingface_hub.errors import HfHubHTTPError
    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def _recorded_names(source: str, commit: str, cache_dir: str | None) -> list[str] | None:
    """Return the names of all files of a commit as huggingface_hub recorded them in the cache, or None."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # older versions record nothing
        return None
    try:
        return [file.path for file in get_cached_repo_tree(source, revision=commit, cache_dir=cache_dir)]
    except CachedRepoTreeNotFoundError:
        return None


def _cache_folder(source: str, cache_dir: str | None) -> Path:
    """Return a repository's folder in the cache, of huggingface_hub's documented form: refs/, snapshots/<commit>/."""
    from huggingface_hub import constants
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve() / f'models--{source.replace("/", "--")}'


def _match_hub(source: str, pattern: str) -> re.Match[str] | None:
    """Match what follows the hub's address in `source`."""
    if not source.startswith(('http://', 'https://')):
        return None
    from huggingface_hub import constants
    hosts = '|'.join(re.escape(host.rstrip('/')) for host in (*HOSTS, constants.ENDPOINT))
    return re.fullmatch(f'(?:{hosts})/{pattern}', source)


def _check_revision(source: str, revision: str | None) -> None:
    """Refuse a revision that leads out of the cache, where it becomes part of a path; a PNG may name any."""
    if revision is not None and ('..' in revision or revision.startswith('/')):
        raise UserError(f"'{revision}' is not a valid revision of '{source}'; give a branch, a tag or a commit.")


def _unavailable(source: str, error: Exception) -> str:
    """Return why a repository is not available, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    if isinstance(error, GatedRepoError):
        return (f"'{source}' is gated: accept its terms at {constants.ENDPOINT}/{source}, and log in here with "
                '`hf auth login` or the variable HF_TOKEN.')
    if isinstance(error, RepositoryNotFoundError):
        return (f"'{source}' is not a local file or folder, and the hub has no such repository. Check the name; for a "
                'private one log in with `hf auth login` or the variable HF_TOKEN.')
    if _status(error) in (401, 403):
        return (f"The hub refuses access to '{source}': {_sentence(error)} Check the token of `hf auth login` or of "
                'the variable HF_TOKEN.')
    return (f"'{source}' is not a local file or folder, and cannot be downloaded from the hub: {_sentence(error)} "
            'Check the name, the network and HF_HUB_OFFLINE, or give the path of a folder.')


def _unknown_revision(source: str, revision: str | None) -> UserError:
    """Return the error for a revision that does not exist, with the branches and tags if they can be listed."""
    from huggingface_hub import HfApi
    hint = ''
    with contextlib.suppress(*hub_errors()):
        refs = HfApi().list_repo_refs(source)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        hint = did_you_mean(str(revision), names) or f' It has {_listed(names)}.'
    return UserError(f"'{source}' has no revision '{revision}'.{hint}")


def _status(error: Any) -> int | None:
    return getattr(getattr(error, 'response', None), 'status_code', None)


def _raise_if_disk_full(error: Exception) -> None:
    """Re-raise the operating system's refusals to write: they are not the hub's fault."""
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        raise error


def _sentence(error: BaseException) -> str:
    first = first_line(error).strip()
    return first if first.endswith(('.', '!', '?')) else f'{first}.'


def _listed(names: Iterable[str]) -> str:
    return listed(names) or 'nothing'
