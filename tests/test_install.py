"""Whichever way the package is installed, `mim` finds its configs and tools, and nothing of it is missing.

All is built from a copy of the checkout, offline, with the setuptools of the running environment. That environment
may hold this very package: a virtual environment of the test's own comes before it on the path.
"""

import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from installs import KINDS, NAME, ROOT, build, copy_checkout, environment, install, run
from packaging.requirements import Requirement

PROBE = 'probe_of_the_install.py'
TOOLS = sorted((ROOT / 'tools').glob('*.py'))
HEAVY = ('torch', 'mmengine.runner', 'diffusers', 'transformers', 'datasets', 'matplotlib')
# What mim runs in place of the real train.py: it answers at once and says what it was called with.
TRAIN = "import sys\nprint('usage' if '-h' in sys.argv else f'PROBE {__file__} {sys.argv[1:]}')\n"


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hold, with a config and a train.py of the test's own."""
    folder = copy_checkout(tmp_path_factory.mktemp('checkout') / 'project')
    (folder / 'configs' / 'probes').mkdir()
    (folder / 'configs' / 'probes' / PROBE).write_text('a = 1\n')
    (folder / 'tools' / 'train.py').write_text(TRAIN)
    return folder


@pytest.fixture(scope='module')
def wheel(checkout: Path) -> Path:
    """The second wheel of the checkout; the first left its build folder behind, with a config that is gone now."""
    stale = checkout / 'configs' / 'probes' / 'stale.py'
    stale.write_text('')
    build('wheel', checkout)
    stale.unlink()
    return build('wheel', checkout)


def names_in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {n for n in archive.namelist() if '.dist-info/' not in n}


def expected(checkout: Path) -> set[str]:
    """Every file of the package, and below `.mim` every config and tool."""
    def files(folder: str) -> list[Path]:
        return [p.relative_to(checkout) for p in (checkout / folder).rglob('*')
                if p.is_file() and '__pycache__' not in p.parts and '.mim' not in p.parts]

    shipped = [*files('configs'), *files('tools'), Path('model-index.yml')]
    return {*map(str, files(NAME)), *(f'{NAME}/.mim/{p}' for p in shipped)}


def test_the_wheel_holds_all(checkout: Path, wheel: Path) -> None:
    names = names_in_wheel(wheel)
    assert names == expected(checkout)
    assert {f'{NAME}/loading/sdxl_files/tokenizer_2/merges.txt', f'{NAME}/loading/sdxl_files/unet/config.json',
            f'{NAME}/.mim/configs/probes/{PROBE}', f'{NAME}/.mim/model-index.yml'} <= names


def test_the_sdist_holds_all_once(checkout: Path, tmp_path: Path) -> None:
    # As in a checkout that was installed editable: its `.mim` has links to what is in the sdist anyway.
    links = checkout / NAME / '.mim'
    links.mkdir(exist_ok=True)
    if not (links / 'configs').exists():
        (links / 'configs').symlink_to(checkout / 'configs')
    with tarfile.open(build('sdist', checkout)) as archive:
        names = archive.getnames()
        # Python before 3.11.4 knows no filter.
        archive.extractall(tmp_path, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    assert not [n for n in names if '.mim' in n.split('/')]
    assert sum(n.endswith(PROBE) for n in names) == 1
    assert names_in_wheel(build('wheel', tmp_path / names[0].split('/')[0])) == expected(checkout)


@pytest.fixture(scope='module')
def pythons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('pythons')


@pytest.mark.parametrize('kind', KINDS)
def test_mim_finds_configs_and_tools(checkout: Path, wheel: Path, pythons: Path, tmp_path: Path, kind: str) -> None:
    python = environment(pythons / kind)
    install(python, kind, wheel if kind == 'wheel' else checkout, tmp_path)
    output = run([python, '-m', 'mim', 'train', NAME, PROBE, '--work-dir', 'W'], tmp_path)
    found = re.search(r"PROBE (\S+) \['(\S+?)', (.*)\]", output)
    assert found, output
    home = pythons / kind if kind == 'wheel' else checkout
    assert Path(found[1]).resolve().is_relative_to(home) and found[1].endswith('.mim/tools/train.py')
    assert Path(found[2]).is_relative_to(home) and Path(found[2]).name == PROBE
    assert found[3] == "'--launcher', 'none', '--work-dir', 'W'"
    code = (f'import {NAME}, pathlib; from mim.commands.search import load_metadata_from_local as load; '
            f'print([m.name for m in load({NAME!r}).models]); here = pathlib.Path({NAME}.__file__).parent; '
            'print(here.resolve(), (here / "loading/sdxl_files/tokenizer/vocab.json").stat().st_size)')
    models, place = run([python, '-c', code], tmp_path).splitlines()[-2:]
    assert 'stable_diffusion_xl_t2i_adapter_fill50k' in models
    assert Path(place.split()[0]).is_relative_to(home) and int(place.split()[1]) > 800_000


def requirements() -> dict[str, Requirement]:
    """The direct dependencies by name."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    return {r.name: r for r in map(Requirement, project['dependencies'])}


def test_what_was_tested_fits_what_is_required() -> None:
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pins = {name.lower().replace('-', '_'): version for name, _, version in
            (line.partition('==') for line in lines if not line.startswith('#'))}
    required = requirements()
    assert len(required) >= 15
    for name, requirement in required.items():
        assert requirement.specifier.contains(pins[name.lower().replace('-', '_')]), requirement
        # An exact pin would shut out every other Python; one dependency of mim's needs it.
        assert name == 'openxlab' or '==' not in str(requirement.specifier)
    for name, version in {'torch': '2.11', 'transformers': '5.17'}.items():
        assert required[name].specifier.contains(version)
    assert 'torchvision' not in {*required, *pins}


@pytest.mark.parametrize('tool', TOOLS, ids=lambda p: p.name)
def test_help_comes_before_heavy_imports(tool: Path, tmp_path: Path) -> None:
    code = ('import runpy, sys; tool = sys.argv[1]; sys.argv = [tool, "-h"]; sys.path.insert(0, sys.argv[0] + "/..")\n'
            'try:\n    runpy.run_path(tool, run_name="__main__")\n'
            'except SystemExit as end:\n    assert not end.code\n'
            f'print("LOADED", [m for m in {HEAVY} if m in sys.modules])')
    output = run([sys.executable, '-c', code, tool], tmp_path, PYTHONPATH=str(ROOT))
    assert 'usage' in output.lower() and output.strip().endswith('LOADED []')
    # mim passes `--gpus N` to a script whose help has that word.
    assert '--gpus' not in output
