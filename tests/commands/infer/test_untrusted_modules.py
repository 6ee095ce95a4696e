"""Modules that a PNG names: none of their code runs before they are found where the user put them, and are the same."""

import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffengine_sdxl.commands.infer import provenance, untrusted, untrusted_modules
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.request import Request

#: Writes a file if it runs.
SOURCE = """
from pathlib import Path
from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.registry import {registry}
Path(__file__ + '.ran').touch()
@{registry}.register_module({arguments})
class OwnAdapter(Adapter):
    pass
"""
HERE = 'own_adapters'


def source(registry: str = 'ADAPTERS', arguments: str = '') -> str:
    return SOURCE.format(registry=registry, arguments=arguments)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on PYTHONPATH; the current one is another."""
    for name in ('installed', 'current'):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'current')
    monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path / 'installed')])
    before = set(sys.modules)
    yield tmp_path / 'installed'
    for name in set(sys.modules) - before:
        del sys.modules[name]
    for name in ('OwnAdapter', 'Other'):
        ADAPTERS.module_dict.pop(name, None)


def settings(kind: str = 'OwnAdapter', modules: Any = None) -> dict[str, Any]:
    """The settings of an image whose adapter has type `kind`."""
    config = {'model': {'type': 'SDXL', 'pretrained': 'org/base', 'adapters': {'a': {'type': kind}}}}
    found: dict[str, Any] = json.loads(json.dumps(provenance.record(Request.of({'prompt': 'p'}), config)))
    return found if modules is None else {**found, 'modules': modules}


def refused(found: dict[str, Any]) -> str:
    """Return why the image is not made again."""
    with pytest.raises(UserError) as caught:
        untrusted.check_form(found)
        untrusted.check_unchanged(found)
    return str(caught.value)


def test_recorded_and_found_again(installed: Path) -> None:
    """By name and digest; the module runs once, from that file, and its class can be built."""
    path = installed / f'{HERE}.py'
    path.write_text(source())
    found = settings(modules=[{'name': HERE, 'sha256': digest(source())}])
    untrusted.check_form(found)
    assert untrusted.check_unchanged(found) == ['model.pretrained'] and sys.modules[HERE].__file__ == str(path)
    assert ADAPTERS.build(dict(type='OwnAdapter')).scale == 1
    assert settings()['modules'] == found['modules']
    # One's own class is no type of this package, though it is registered by now.
    assert "'OwnAdapter' is not a type of diffengine_sdxl" in refused(settings(modules=[]))
    assert 'modules' not in settings('LoRA')
    # It is not imported twice, and no other module is taken for it.
    untrusted.check_unchanged(found)
    sys.modules[HERE] = types.ModuleType(HERE)
    assert f"another module '{HERE}' is" in refused(found)


@pytest.mark.parametrize('arguments', ["name='Other'", "force=True, name='Other'"])
def test_registered_under_another_name(installed: Path, arguments: str) -> None:
    text = source(arguments=arguments)
    (installed / f'{HERE}.py').write_text(text)
    recorded = [{'name': HERE, 'sha256': digest(text)}]
    assert 'is not a type' in refused(settings(modules=recorded))
    untrusted.check_unchanged(settings('Other', recorded))


@pytest.mark.parametrize(('text', 'kind', 'words'), [
    (source(), 'OwnAdapter', None), (source(arguments="name='Other'"), 'OwnAdapter', "'OwnAdapter' is not a type"),
    (source(), 'LoRA', 'registers no type that the config in the PNG names'),
    (source().replace('from diffengine_sdxl.registry', 'from mmengine.registry'), 'OwnAdapter', 'is not a type'),
    (source().replace('@', '#'), 'OwnAdapter', 'is not a type'),
    ('x = """' + source() + '"""', 'OwnAdapter', 'is not a type'),
    ('if True:' + source().replace('\n', '\n  '), 'OwnAdapter', 'is not a type'),
    (source() + '\x00', 'OwnAdapter', 'is not a type'), (source() + 'x' * 9 + ' (', 'OwnAdapter', 'is not a type'),
    (source() + '1 / 0', 'OwnAdapter', 'cannot be imported: ZeroDivisionError')])
def test_only_what_registers_the_type(installed: Path, text: str, kind: str, words: str | None) -> None:
    """The digest is right each time."""
    (installed / f'{HERE}.py').write_text(text)
    found = settings(kind, [{'name': HERE, 'sha256': digest(text)}])
    if words is None:
        untrusted.check_unchanged(found)
    else:
        assert words in refused(found)
        assert (installed / f'{HERE}.py.ran').exists() == ('cannot be imported' in words) and HERE not in sys.modules


@pytest.mark.parametrize('name', ['antigravity', 'this', 'os', 'json', 'torch', 'a.b', 'os.path', '../x', '/etc/x', '',
                                  'x y', '-', 'x' * 5000, 'own_adapters\0', 'sys', '__main__', 'diffengine_sdxl'])
def test_hostile_names(installed: Path, name: str) -> None:
    """Even with the right digest, and even if such a file is there."""
    (installed.parent / 'x.py').write_text(source())
    (installed / 'a').mkdir()
    (installed / 'a' / 'b.py').write_text(source())
    for module in ('this', 'antigravity'):
        sys.modules.pop(module, None)
    file = getattr(sys.modules.get(name), '__file__', None) or untrusted.__file__
    for sha256 in (digest(source()), hashlib.sha256(Path(file).read_bytes()).hexdigest(), '', 'x' * 5000):
        told = refused(settings(modules=[{'name': name, 'sha256': sha256}]))
        assert 8 < len(told) < 600 and 'type of diffengine' in told or 'made with parts of' in told
    assert not {'this', 'antigravity', 'a'} & sys.modules.keys() and not [*installed.parent.rglob('*.ran')]


@pytest.mark.parametrize('entries', [['', '.'], ['CURRENT'], ['CURRENT/../current'], ['LINK'], []])
def test_the_current_folder_is_not_searched(installed: Path, entries: list[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive may hold an image and a module, and the user may have gone into it."""
    Path(f'{HERE}.py').write_text(source())
    (installed.parent / 'link').symlink_to(Path.cwd())
    words = {'CURRENT': str(Path.cwd()), 'LINK': str(installed.parent / 'link')}
    own = [entry.replace('CURRENT', words['CURRENT']).replace('LINK', words['LINK']) for entry in entries]
    monkeypatch.setattr(sys, 'path', [*own, *sys.path])
    told = refused(settings(modules=[{'name': HERE, 'sha256': digest(source())}]))
    assert f"made with parts of '{HERE}' (SHA-256 {digest(source())[:12]}). Read that module" in told
    assert 'put its folder on PYTHONPATH (not the current folder)' in told and HERE not in sys.modules


def test_the_scripts_folder_is_not_searched(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed / f'{HERE}.py').write_text(source())
    monkeypatch.setattr(sys.modules['__main__'], '__file__', str(installed / 'run.py'), raising=False)
    assert 'PYTHONPATH' in refused(settings(modules=[{'name': HERE, 'sha256': digest(source())}]))


def test_another_module_of_that_name_is_named(installed: Path) -> None:
    """Nor is one before it on the path imported in its place."""
    first = installed.parent / 'first'
    first.mkdir()
    (first / f'{HERE}.py').write_text(source() + '# changed')
    sys.path.insert(0, str(first))
    found = settings(modules=[{'name': HERE, 'sha256': digest(source())}])
    assert f'{first / HERE}.py is another one' in refused(found)
    (installed / f'{HERE}.py').write_text(source())
    untrusted.check_unchanged(found)
    assert sys.modules[HERE].__file__ == str(installed / f'{HERE}.py') and not [*first.glob('*.ran')]


def test_files_are_compared_before_anything_is_imported(installed: Path, tmp_path: Path) -> None:
    (installed / f'{HERE}.py').write_text(source())
    (tmp_path / 'a.png').write_bytes(b'x')
    found = settings(modules=[{'name': HERE, 'sha256': digest(source())}])
    found['request']['image'] = str(tmp_path / 'a.png')
    assert 'image is ' in refused(found) and HERE not in sys.modules


@pytest.mark.parametrize('modules', [{}, 3, [3], [{}], [{'name': 'x'}], [{'name': 3, 'sha256': ''}],
                                     [{'name': 'x', 'sha256': None}], [{'name': 'x', 'sha256': ''}] * 33])
def test_other_forms_are_refused(modules: Any) -> None:
    with pytest.raises(UserError, match='modules'):
        untrusted.check_form(settings('LoRA', modules))


def test_all_types_of_this_package_are_known() -> None:
    assert {'SDXL', 'LoRA', 'T2IAdapter', 'IPAdapter', 'Sampler', 'CFG'} <= untrusted_modules.known_types()
