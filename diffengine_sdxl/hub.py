"""The Hugging Face hub: what is needed of a repository comes here, safetensors first, and is a folder from then on.

diffusers and transformers fetch for themselves where they are given an id. They are given folders here: their fetching
falls back to pickles when a connection breaks, asks again for every file, takes each part from whatever `main` is at
that moment, and tells of a missing repository in ten lines. One listing says what there is; what is taken is named.
"""

from __future__ import annotations

import contextlib
import errno
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

from diffengine_sdxl.registry import nearest
from diffengine_sdxl.weight_names import STEMS, WEIGHTS, in_safetensors, weight_files

HOSTS = ('https://huggingface.co', 'https://hf.co')
#: Weights that may hold code, or are another framework's.
PICKLES = ('.bin', '.ckpt', '.pt', '.pth', '.msgpack', '.h5', '.onnx')
#: What a tokenizer is made of.
TEXTS = ('.json', '.txt', '.jinja', '.model')
SHOWN = 10
#: How many names of a folder are compared with one that it does not hold.
LOOKED_AT = 1000
#: Seconds for which a listing holds, so that one load, which asks from several places, has one.
FRESH = 20.0
COMMIT = re.compile('[0-9a-f]{40}')
_ID = re.compile(r'[A-Za-z0-9_][\w.-]*(/[\w.-]+)?', re.ASCII)
_AGAIN = ' The files that have come whole are kept; the same command fetches the others.'
# Id, revision and folder of the cache -> the time, names and commit of a listing; and the commit taken last.
_LISTED: dict[tuple[str, str, Path], tuple[float, list[str], str | None]] = {}
_TAKEN: dict[tuple[str, str, Path], str] = {}


def link(source: str) -> tuple[str, str, str] | None:
    """Repository, revision and file of a link to a file of the hub, or of its mirror in HF_ENDPOINT; else None."""
    found = _at_hub(source, r'([^/]+/[^/]+)/(?:blob|resolve)/(refs/(?:pr|convert)/[^/]+|[^/]+)/([^?]+)(?:\?.*)?')
    return (found[1], unquote(found[2]), unquote(found[3])) if found else None


def linked_model(source: str) -> tuple[str, str, str | None, str | None] | None:
    """Repository, revision, subfolder and variant of the model whose weights or config a link names; else None.

    Raises:
        ValueError: it is a link to a file, but not to such a one.
    """
    linked = link(source)
    if linked is None:
        return None
    file = PurePosixPath(linked[2])
    weights = WEIGHTS.fullmatch(file.name)
    if weights is None and file.name != 'config.json':
        raise ValueError(f"'{source}' is a link to a file; this is loaded from a folder with a config.json and weights "
                         f'called {", ".join(f"{stem}.safetensors" for stem in STEMS)} or the like. Link these, or '
                         f"give the repository's id, '{linked[0]}', and `subfolder`.")
    return linked[0], linked[1], None if file.parent.name == '' else str(file.parent), weights[1] if weights else None


def here(source: str) -> Path | None:
    """The file or folder of this machine that `source` names; None if it may be an id of the hub.

    Raises:
        ValueError: there is none, and it is no id; or it cannot be looked at.
    """
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: '~' of a user whom nobody knows
        name = source if len(source) <= 200 else f'{source[:200]}...'
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"'{name}' cannot be looked at: {why}. Check the name, and that its folder may be "
                         'read.') from error
    if _ID.fullmatch(source) and not source.endswith(('.safetensors', *PICKLES)):
        return None
    if page := _at_hub(source, r'([^/?]+/[^/?]+)(?:[/?].*)?'):
        raise ValueError(f"'{source}' is a page of the hub; give the repository's id, '{page[1]}'.")
    raise ValueError(f"There is no file or folder '{source}'.{beside(path)}")


def beside(path: Path) -> str:
    """Words that name what is called nearly so in the folder of a path that does not exist, or none."""
    try:
        with os.scandir(path.parent) as entries:
            return nearest(path.name, sorted(entry.name for entry in itertools.islice(entries, LOOKED_AT)))
    except OSError:
        return ''


class Repo:
    """A repository of models at one revision, its files listed once.

    Without network it is what the cache knows of it. All that is fetched is of the commit that was listed.

    Args:
        source: 'owner/name'. revision: branch, tag or commit; None for `main`. cache_dir: None for the hub's own.

    Attributes:
        names: of the files, with '/' between folders.
        partial: whether there may be others, as nobody noted in the cache what the repository has.

    Raises:
        ValueError: it cannot be had; why, and what to do.
    """

    def __init__(self, source: str, revision: str | None = None, cache_dir: str | None = None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RevisionNotFoundError
        _check(source, revision)
        self.source, self._name = source, f" (revision '{revision}')" if revision else ''
        self._where: dict[str, Any] = {'revision': revision, 'cache_dir': cache_dir}
        self._key = (source, revision or constants.DEFAULT_REVISION, _store(source, cache_dir))
        self._cached: Path | None = None
        self.partial = False
        when, self.names, self._commit = _LISTED.get(self._key, (-FRESH, [], None))
        if time.monotonic() - when < FRESH:
            return
        try:
            info = HfApi().model_info(source, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            self.names = sorted(file.rfilename for file in info.siblings or ())
            self._commit = info.sha
            _LISTED[self._key] = time.monotonic(), self.names, self._commit
        except RevisionNotFoundError as error:
            raise ValueError(f"'{source}' has no revision '{revision}'.{_revisions(source, str(revision))}") from error
        except Exception as error:  # the hub's errors, of httpx or requests by its version, have no base of their own
            self._cached = self._of_cache(error)
            print_log(f"'{source}' is taken from the cache, as it is there: {_first(error)}", logger='current')

    def _of_cache(self, error: Exception) -> Path:
        """The snapshot in the cache, and the names it is known to have; `error` is why the hub was of no use."""
        from huggingface_hub import snapshot_download
        try:
            # With no file asked for, it does not mind that some are missing.
            folder = Path(snapshot_download(self.source, **self._where, local_files_only=True, allow_patterns=[]))
        except Exception:
            raise ValueError(_denied(self.source, error)) from error
        try:
            from huggingface_hub import get_cached_repo_tree  # of late versions, which write down what there is
            found = get_cached_repo_tree(self.source, revision=folder.name, cache_dir=self._where['cache_dir'])
            self.names = sorted(file.path for file in found)
        except Exception:  # nothing is written down
            self.partial = True
            self.names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
        return folder

    def __str__(self) -> str:
        return f"'{self.source}'{self._name}{' in the cache, without network,' if self._cached else ''}"

    def inside(self, folder: str | None) -> dict[str, str]:
        """The files right in a folder of it: their names there -> their names in the repository."""
        begin = f'{folder.strip("/")}/' if folder else ''
        return {name.removeprefix(begin): name for name in self.names
                if name.startswith(begin) and '/' not in name.removeprefix(begin)}

    def missing(self, name: str) -> ValueError:
        """The error for a file that it does not hold, with the nearest names that it does."""
        near = nearest(name, self.names) or nearest(name.rpartition('/')[2], self.names)
        return ValueError(f"{self} holds no file '{name}'.{near or f' It holds {_some(self.names)}.'}")

    def fetch(self, names: Iterable[str]) -> Path:
        """Bring these files here, those that are not; the folder in which all lie by their names.

        Raises:
            ValueError: the repository has no file of that name, or the connection broke.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self.names:
                raise self.missing(name)
        folder = self._cached or self._download(wanted)
        # A break between listing and files gives what the cache has of the commit, without a word.
        absent = [name for name in wanted if not (folder / name).is_file()]
        if absent and self._cached:
            raise ValueError(f'{self} lacks {_some(absent)}; with network they are fetched.')
        if absent:
            raise ValueError(f"'{self.source}' could not be fetched whole: {_some(absent)} did not come.{_AGAIN}")
        _TAKEN[self._key] = folder.name
        return folder

    def _download(self, names: list[str]) -> Path:
        """Fetch by the commit, so that all is of one even if the name moves meanwhile; the cache learns the name."""
        from huggingface_hub import snapshot_download
        where = self._where if self._commit is None else {**self._where, 'revision': self._commit}
        try:
            folder = Path(snapshot_download(self.source, **where, allow_patterns=[glob.escape(n) for n in names]))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if _status(error) in (401, 403):
                raise ValueError(_denied(self.source, error)) from error
            raise ValueError(f"'{self.source}' could not be fetched whole: {_first(error)}{_AGAIN}") from error
        assert self._commit in (None, folder.name)
        if self._commit is not None:
            _write_ref(self._key[2], self._key[1], self._commit)
            if _LISTED.get(self._key, (0, [], None))[2] == self._commit:  # a load may take longer than a listing holds
                _LISTED[self._key] = time.monotonic(), self.names, self._commit
        return folder

    def model_files(self, folder: str | None, variant: str | None = None) -> list[str]:
        """The files of a model of diffusers or transformers: its config and its weights, once, in safetensors.

        Where there are none, a pickle of tensors (.bin), which is read with torch's `weights_only`.

        Raises:
            ValueError: it has none in that folder, none of that variant, or others' only.
        """
        there = self.inside(folder)
        place = f"{self}{f' in {folder!r}' if folder else ''}"
        if 'config.json' not in there:
            raise self.missing(f'{folder}/config.json' if folder else 'config.json')
        if weights := weight_files(there, variant):
            return [there[name] for name in ('config.json', *weights)]
        if tensors := in_safetensors(there):
            raise ValueError(f'{place} has no weights of ' + (f"variant '{variant}'" if variant else 'that name')
                             + f' (it has {_some(tensors)}). '
                             + ('Leave `variant` out, or name another.' if variant else 'Name a `variant`.'))
        if others := [name for name in there if name.endswith(PICKLES)]:
            raise ValueError(f'{place} has no weights in safetensors, and no .bin that diffusers or transformers would '
                             f'read; it has {_some(others)}, which may hold code and are not fetched. Take another '
                             'repository, or convert them where you trust them.')
        raise ValueError(f'{place} has no weights; it has {_some(list(there))}.')

    def texts(self, folder: str) -> list[str]:
        """The files of a tokenizer or of settings: no weights."""
        return [name for short, name in self.inside(folder).items() if short.endswith(TEXTS)]


def fetch_file(source: str, name: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """One file of a repository of models, from the hub or its cache.

    Raises:
        ValueError: it cannot be had; why, and what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RevisionNotFoundError
    _check(source, revision)
    try:
        path = Path(hf_hub_download(source, name, revision=revision, cache_dir=cache_dir))
        commit = path.parents[len(PurePosixPath(name).parts) - 1].name
        _TAKEN[source, revision or 'main', _store(source, cache_dir)] = commit
        return path
    except RevisionNotFoundError as error:
        raise ValueError(f"'{source}' has no revision '{revision}'.{_revisions(source, str(revision))}") from error
    except RemoteEntryNotFoundError as error:
        raise Repo(source, revision, cache_dir).missing(name) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if _status(error) in (401, 403, 404):
            raise ValueError(_denied(source, error)) from error
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise ValueError(f"'{name}' of '{source}' could not be had from the hub: {_first(cause)} Check the name, the "
                         'network and HF_HUB_OFFLINE, or give the path of a file.') from error


def commit_in_cache(source: str, revision: str | None = None, cache_dir: str | None = None,
                    taken: bool = True) -> str | None:
    """The commit that an id stands for in the local cache; None where that holds none. No network is asked.

    Args:
        source: 'owner/name', with a file behind it or not, or a link to a file of the hub.
        revision: a branch, tag or commit; None for the link's own, else 'main'.
        cache_dir: None for the hub's own.
        taken: what this process last took of it goes before what the cache says now.
    """
    linked = link(source)
    name = linked[0] if linked else '/'.join(source.split('/')[:2])
    if '/' not in name or not _ID.fullmatch(name):
        return None
    revision = revision or (linked[1] if linked else 'main')
    folder = _store(name, cache_dir)
    place = Path(os.path.abspath(folder / 'refs' / revision))
    try:
        # A revision may be a stranger's, and name any file.
        inside = place.is_file() and place.is_relative_to(os.path.abspath(folder / 'refs'))
        # By another process the name may have moved since.
        known = _TAKEN.get((name, revision, folder)) if taken else None
        commit = known or (place.read_text().strip() if inside else revision)
        return commit if COMMIT.fullmatch(commit) and (folder / 'snapshots' / commit).is_dir() else None
    except (OSError, ValueError):
        return None


def _store(source: str, cache_dir: str | None) -> Path:
    """The folder of a repository in the cache, whose form huggingface_hub documents: refs/, snapshots/<commit>/."""
    from huggingface_hub import constants
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve() / f'models--{source.replace("/", "--")}'


def _write_ref(store: Path, revision: str, commit: str) -> None:
    """Note what a branch or tag stands for, as huggingface_hub does where it is asked for it, for a time offline."""
    place = store / 'refs' / revision
    if revision == commit:
        return
    with contextlib.suppress(OSError):  # a cache that is shared may be read-only
        if place.is_file() and place.read_bytes() == commit.encode():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f'.{place.name}.{os.getpid()}')
        part.write_text(commit)
        os.replace(part, place)


def _at_hub(source: str, rest: str) -> re.Match[str] | None:
    """The match of what follows the hub's address in `source`."""
    if not source.startswith(('http://', 'https://')):
        return None
    from huggingface_hub import constants
    hosts = '|'.join(re.escape(host.rstrip('/')) for host in (*HOSTS, constants.ENDPOINT))
    return re.fullmatch(f'(?:{hosts})/{rest}', source)


def _check(source: str, revision: str | None) -> None:
    """Refuse a revision that leads out of the cache, where it becomes a part of a path; a PNG may name any."""
    if revision is not None and ('..' in revision or revision.startswith('/')):
        raise ValueError(f"'{revision}' cannot be a revision of '{source}'; it takes a branch, a tag or a commit.")


def _denied(source: str, error: Exception) -> str:
    """Why a repository cannot be had, in a sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    if isinstance(error, GatedRepoError):
        return (f"'{source}' asks for a consent: give it at {constants.ENDPOINT}/{source}, and log in here with "
                '`hf auth login` or the variable HF_TOKEN.')
    if isinstance(error, RepositoryNotFoundError):
        return (f"'{source}' is no file or folder here, and the hub has no such repository. Check the name; for a "
                'private one log in with `hf auth login` or the variable HF_TOKEN.')
    if _status(error) in (401, 403):
        return (f"The hub does not give out '{source}': {_first(error)} Check the token of `hf auth login` or of the "
                'variable HF_TOKEN.')
    return (f"'{source}' is no file or folder here, and it could not be had from the hub: {_first(error)} Check the "
            'name, the network and HF_HUB_OFFLINE, or give the path of a folder.')


def _revisions(source: str, revision: str) -> str:
    """Words that name the branches and tags there are, if they can be had."""
    from huggingface_hub import HfApi
    try:
        refs = HfApi().list_repo_refs(source)
    except Exception:  # only the end of a sentence
        return ''
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return nearest(revision, names) or f' It has {_some(names)}.'


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, 'response', None), 'status_code', None)


def _first(error: BaseException) -> str:
    """The first line of an error, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first if first.endswith(('.', '!', '?')) else f'{first}.'


def _some(names: list[str]) -> str:
    return ', '.join(names[:SHOWN]) + (', ...' if len(names) > SHOWN else '') if names else 'nothing'
