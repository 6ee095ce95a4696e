"""Modules of one's own: found beside the config and its bases, never in place of another module, and in workers."""

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffengine_sdxl import config
from diffengine_sdxl.config import custom_modules
from diffengine_sdxl.errors import UserError

HEAD = "_base_ = ['diffengine_sdxl::infer/sdxl_text_to_image.py']\n"


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test imported."""
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(custom_modules, '_appended', set())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, imports: Any = 'own_parts', base: str | None = None, **modules: str) -> Path:
    """Write a config that imports `imports`, and modules beside it; return its path."""
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / f'{name}.py').write_text(text)
    line = '' if imports is None else f'custom_imports = dict(imports={imports!r})\n'
    (folder / 'own.py').write_text((HEAD if base is None else f'_base_ = [{base!r}]\n') + line)
    return folder / 'own.py'


def refused(path: Path, *options: str) -> str:
    with pytest.raises(UserError) as caught:
        config.read(path, options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_beside_the_config_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may import its neighbours, and lie in a package of the user's."""
    path = write(tmp_path / 'a', ['own_parts', 'own_package.parts'], own_parts='import own_help', own_help='')
    (tmp_path / 'a' / 'own_package').mkdir()
    (tmp_path / 'a' / 'own_package' / 'parts.py').write_text('')
    monkeypatch.chdir(tmp_path)
    cfg = config.read('a/own.py')
    assert {'own_parts', 'own_help', 'own_package.parts'} <= sys.modules.keys()
    assert cfg.custom_imports_folders == [str(tmp_path / 'a')] and sys.path[-1] == str(tmp_path / 'a')
    assert config.read(path).custom_imports == cfg.custom_imports  # a second time


def test_beside_an_inherited_config(tmp_path: Path) -> None:
    """And of a dumped one, which names the folder."""
    write(tmp_path / 'a', own_parts='')
    child = write(tmp_path / 'b', None, base='../a/own.py')
    grandchild = write(tmp_path / 'c', ['own_parts', 'own_more'], base='../b/own.py', own_more='')
    assert config.read(child).custom_imports_folders == [str(tmp_path / 'a')]
    cfg = config.read(grandchild)
    assert cfg.custom_imports_folders == [str(tmp_path / 'a'), str(tmp_path / 'c')]
    (tmp_path / 'run').mkdir()
    cfg.dump(str(tmp_path / 'run' / 'own.py'))
    del sys.modules['own_parts'], sys.modules['own_more']
    assert config.read(tmp_path / 'run' / 'own.py').to_dict() == cfg.to_dict()
    assert {'own_parts', 'own_more'} <= sys.modules.keys()


def test_equal_names_are_refused(tmp_path: Path) -> None:
    """In two configs of one process, also if the second has no such module; and in a config and its base."""
    first, second = (write(tmp_path / name, own_parts=f'x = {name!r}') for name in 'ab')
    config.read(first)
    text = refused(second)
    assert str(tmp_path / 'a' / 'own_parts.py') in text and str(tmp_path / 'b' / 'own_parts.py') in text
    (tmp_path / 'b' / 'own_parts.py').unlink()
    assert f"no module 'own_parts' in '{tmp_path / 'b'}'" in refused(second)
    assert sys.modules['own_parts'].x == 'a'
    child = write(tmp_path / 'c', base='../a/own.py', own_parts='')
    assert 'rename one' in refused(child)


def test_nothing_beside_the_config_replaces_other_modules(tmp_path: Path) -> None:
    """Neither Python's nor installed ones, whether the config names them or not."""
    sys.modules.pop('colorsys', None)
    config.read(write(tmp_path, 'own_parts', own_parts='import colorsys', colorsys='1 / 0'))
    assert sys.modules['colorsys'].__file__ != str(tmp_path / 'colorsys.py')
    path = write(tmp_path, 'json', json='1 / 0')
    assert json.__file__ in refused(path) and sys.modules['json'] is json


@pytest.mark.parametrize(('imports', 'text', 'words'), [
    ('own_pats', '', ("no module 'own_pats' in ", "Did you mean 'own_parts'")),
    ('own_parts', 'import no_such_package', ("own_parts.py'", "No module named 'no_such_package'")),
    ('own_parts', 'def f(:', ('SyntaxError', 'own_parts.py')), ('own_parts', '1 / 0', ('ZeroDivisionError',)),
    ('../own_parts', '', ('not the name of a module',)), (['own_parts', 3], '', ('3 is not the name',)),
    ('own_parts.py', '', ("no module 'own_parts.py'",))])
def test_what_cannot_be_imported(tmp_path: Path, imports: Any, text: str, words: tuple[str, ...]) -> None:
    told = refused(write(tmp_path, imports, own_parts=text))
    assert all(word in told for word in words), told


def test_failed_imports_may_be_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, ['own_pats', 'own_parts'], own_parts='')
    assert config.read(path, ['custom_imports.allow_failed_imports=True']).custom_imports_folders == [str(tmp_path)]
    assert "'import'" in refused(path, 'custom_imports.import=x') and 'must be a dict' in refused(
        path, "custom_imports='own_parts'")


def test_a_spawned_worker_finds_it(tmp_path: Path) -> None:
    """As data loaders with mp_start_method='spawn' start theirs."""
    config.read(write(tmp_path, own_parts='def work(path): open(path, "w").write(__file__)'))
    worker = multiprocessing.get_context('spawn').Process(
        target=sys.modules['own_parts'].work, args=(str(tmp_path / 'done'),))
    worker.start()
    worker.join()
    assert (tmp_path / 'done').read_text() == str(tmp_path / 'own_parts.py')
