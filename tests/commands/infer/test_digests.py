"""Digests, cached between processes and never used for a changed file; the commits of hub ids."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffengine_sdxl.commands.infer import digests
from diffengine_sdxl.loading import hub


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[str, bool]]:
    """Return a file's digest in a new process, and whether the file was read. All files count as large."""
    monkeypatch.setattr(digests, 'LARGE', 0)
    monkeypatch.setattr(digests, 'SETTLED', 0)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    real = open

    def run(path: Path) -> tuple[str, bool]:
        read: list[str] = []
        digests._read.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('builtins.open', lambda file, *a, **k: (read.append(str(file)), real(file, *a, **k))[1])
            return digests.sha256(path), str(path) in read
    return run


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(tmp_path: Path, start: Any) -> None:
    """Read again only after a change, also one that sets the modification time back."""
    path, other = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'
    path.write_bytes(b'x' * 99)
    other.write_bytes(b'z' * 99)
    before = path.stat()
    assert [start(path), start(path), start(other), start(path)] == [
        (sha(path), True), (sha(path), False), (sha(other), True), (sha(path), False)]
    path.write_bytes(b'y' * 99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and start(path) == (sha(path), True)
    os.replace(other, path)
    assert start(path) == (sha(path), True) and start(path) == (sha(path), False)
    (tmp_path / 'base').mkdir()
    os.replace(path, tmp_path / 'base' / 'w')
    whole = start(tmp_path / 'base')[0]
    assert start(tmp_path / 'base' / 'w')[1] is False and start(tmp_path / 'base')[0] == whole
    assert [p.name for p in (tmp_path / 'cache' / 'diffengine_sdxl').iterdir()] == ['digests.json']


def test_a_file_that_just_changed_is_not_cached(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within a tick of the file system's clock. Small files are not cached either."""
    (tmp_path / 'a').write_bytes(b'x')
    monkeypatch.setattr(digests, 'SETTLED', 2 * 10**9)
    assert [start(tmp_path / 'a')[1] for _ in range(2)] == [True, True]
    monkeypatch.setattr(digests, 'SETTLED', 0)
    monkeypatch.setattr(digests, 'LARGE', 2)
    assert [start(tmp_path / 'a')[1] for _ in range(2)] == [True, True] and not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('text', [b'', b'{', b'[1]', b'{"files": 3}', b'{"files": {"PATH": 3}}', b'[' * 9999,
                                  b'{"files": {"PATH": [1, 2, 3, 4, "x"]}}', b'\xff', b' ' * 2**23])
def test_a_damaged_cache_is_ignored(tmp_path: Path, start: Any, text: bytes) -> None:
    path, place = tmp_path / 'a', tmp_path / 'cache' / 'diffengine_sdxl' / 'digests.json'
    path.write_bytes(b'x')
    place.parent.mkdir(parents=True)
    place.write_bytes(text.replace(b'PATH', str(path).encode()))
    assert [start(path), start(path)] == [(sha(path), True), (sha(path), False)]


def test_an_unusable_cache_folder(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, a relative path; and the limit on entries."""
    path = tmp_path / 'a'
    path.write_bytes(b'x')
    (tmp_path / 'cache').write_text('a file')
    assert start(path) == start(path) == (sha(path), True)
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(digests, 'MAX_CACHED', 2)
    for name in 'bcd':
        (tmp_path / name).write_text(name)
        start(tmp_path / name)
    kept = json.loads((tmp_path / 'home/.cache/diffengine_sdxl/digests.json').read_text())['files']
    assert list(kept) == [str(tmp_path / 'c'), str(tmp_path / 'd')] and not Path('relative').exists()


def test_file_sizes_are_limited(tmp_path: Path) -> None:
    """A file that claims to be huge, and one that claims to be empty but is not."""
    with open(tmp_path / 'a', 'wb') as file:
        file.truncate(2**41)
    with pytest.raises(ValueError, match='has 2199023255552 bytes'):
        digests.sha256(tmp_path / 'a')
    if Path('/proc/version').is_file():
        assert digests.sha256('/proc/version') == hashlib.sha256().hexdigest()


A, B = 'a' * 40, 'b' * 40


def cached(cache: Path, repo: str, **refs: str) -> Path:
    """Add `refs` (branch -> commit) to a hub cache; return the repository's folder."""
    folder = cache / f'models--{repo.replace("/", "--")}'
    for name, commit in refs.items():
        (folder / 'snapshots' / commit).mkdir(parents=True, exist_ok=True)
        (folder / 'refs').mkdir(exist_ok=True)
        (folder / 'refs' / name).write_text(commit)
    return folder


def test_commits_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ids, files in them and links, as huggingface_hub finds them; None if not in the cache."""
    from huggingface_hub import constants, try_to_load_from_cache
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    folder = cached(tmp_path / 'hub', 'org/name', main=A, v1=B)
    cached(tmp_path / 'own', 'org/name', main=B)
    for commit in (A, B):
        (folder / 'snapshots' / commit / 'x.json').write_text('{}')
    link = 'https://huggingface.co/org/name'
    for source, revision, commit in (
            ('org/name', None, A), ('org/name', 'v1', B), ('org/name', A, A), ('org/name/file.safetensors', None, A),
            (f'{link}/blob/v1/x.safetensors', None, B), (f'{link}/resolve/main/a/x.safetensors', 'v1', B)):
        assert hub.commit_in_cache(source, revision) == commit
        found = try_to_load_from_cache('org/name', 'x.json', revision=revision)
        assert '://' in source or isinstance(found, str) and commit in found
    assert hub.commit_in_cache('org/name', cache_dir=str(tmp_path / 'own')) == B
    (folder / 'refs' / 'odd').write_text('x' * 99)
    (folder / 'refs' / 'gone').write_text('c' * 40)
    (tmp_path / 'file').write_text(A)
    for source, revision in (('org/other', None), ('name', None), ('../name', None), ('org/name', 'v2'), ('', None),
                             ('org/name', 'c' * 40), ('org/name', 'odd'), ('org/name', 'gone'), ('org/name', '\0'),
                             ('org/name', str(tmp_path / 'file')), ('org/name', '../../../file'),
                             ('https://x.org/org/name/blob/main/x', None), ('/org/name', None)):
        assert hub.commit_in_cache(source, revision) is None, (source, revision)
