"""Rules for every file: imports go down only, sizes, docstrings, no untrusted code is run."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'diffengine_sdxl'
FILES = sorted(p for folder in (PACKAGE, 'tools') for p in (ROOT / folder).rglob('*.py') if '.mim' not in p.parts)
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))

# From the ground up; the modules of one storey don't import each other. A folder stands for all files in it.
STOREYS = (
    ('errors',),
    ('limits', 'speed'),
    ('atomic_files', 'config_files', 'field_names', 'literals', 'versions', 'registry', 'rng', 'structures', 'images'),
    ('pixel_values', 'noise_schedule', 'attention', 'settings', 'shapes', 'cache', 'pages'),
    ('protocols', 'request'),
    ('config',),
    ('loading',),
    ('adapters', 'objectives', 'samplers', 'datasets', 'evaluation'),
    ('models',),
    ('engine', 'inference'),
    ('commands',),
    ('testing',),  # the tiny models of the tests and of tools/make_shapes_base.py
    ('tools', '__main__'),
)


def name_of(path: Path) -> str:
    """'diffengine_sdxl/models/sdxl.py' -> 'models.sdxl'; 'tools/train.py' -> 'tools.train'; '' for the package."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    parts = parts[1:] if parts[0] == PACKAGE else parts
    return '.'.join(parts[:-1] if parts[-1:] == ('__init__',) else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Yield the modules of the package and of tools that a file imports, anywhere in it, without the package's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = f'{PACKAGE}.{module}'.rstrip('.').split('.')
                base = '.'.join(parts[:len(parts) - node.level + is_package] + ([base] if base else []))
            names = [f'{base}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            if name.split('.')[0] in (PACKAGE, 'tools'):
                yield name.removeprefix(PACKAGE).lstrip('.')


def storey(name: str) -> tuple[int, str] | None:
    """Return the number of the storey of `name` and its entry there, or None if it has none."""
    return next(((number, entry) for number, entries in enumerate(STOREYS) for entry in entries
                 if f'{name}.'.startswith(f'{entry}.')), None)


def fault(module: str, imported: str) -> str | None:
    """Return why `module` must not import `imported`, or None if it may."""
    if imported in ('', '__version__'):
        return None
    here, target = storey(module), storey(imported)
    if here is None or target is None:
        return f'{module if here is None else imported} is in no storey; name it in STOREYS'
    if here[0] > target[0] or here[1] == target[1]:
        return None
    return f'{module} imports {imported}, which is {"beside" if here[0] == target[0] else "above"} it'


def graph() -> dict[str, set[str]]:
    """Return each file of the package with the files of the package that it imports, anywhere in it."""
    names = {name_of(path) for path in FILES}
    edges: dict[str, set[str]] = {}
    for path in FILES:
        module = name_of(path)
        targets = {name if name in names else name.rpartition('.')[0]
                   for name in imports(parse(path), module, path.name == '__init__.py')}
        edges[module] = {name for name in targets if name in names and name not in ('', module)}
    return edges


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the names on or before cycles: what is left after removing those that lead nowhere, again and again."""
    left = {name: set(targets) for name, targets in edges.items()}
    while ends := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ends:
            del left[name]
    return [sorted(left)] if left else []


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'), str(path))


@pytest.mark.parametrize(('module', 'imported', 'allowed'), [
    ('engine.train_loop', 'models.sdxl.SDXL', True), ('models.sdxl', 'engine.train_loop', False),
    ('adapters.t2i_adapter', 'attention', True), ('adapters.t2i_adapter', 'models.text_encoders', False),
    ('attention', 'adapters.base', False), ('adapters.formats.kohya', 'adapters.lora', True),
    ('samplers.sampler', 'objectives.noises', False), ('samplers.sampler', 'samplers.guidance', True),
    ('images', 'rng', False), ('noise_schedule', 'registry', True), ('engine.runner', 'inference.inferencer', False),
    ('inference.inferencer', 'engine.export', False), ('commands.train', 'engine.runner', True),
    ('engine.runner', 'commands.train', False), ('tools.train', 'commands.train', True),
    ('datasets.x', 'newfile', False), ('newfile', 'rng', False), ('tools.train', '__version__', True),
    ('tools.make_shapes_base', 'testing', True),
    ('engine.hooks.x', 'testing', False),
])
def test_the_rules_themselves(module: str, imported: str, allowed: bool) -> None:
    assert (fault(module, imported) is None) == allowed


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse('from . import a\nfrom ..rng import b\nimport torch, diffengine_sdxl.noise_schedule\n'
                     'def f():\n    from diffengine_sdxl.engine import c\n')
    assert list(imports(tree, 'models.text_encoders', False)) == ['models.a', 'rng.b', 'noise_schedule', 'engine.c']
    assert list(imports(ast.parse('from . import a'), 'models', True)) == ['models.a']


def test_imports_go_down_only() -> None:
    assert FILES
    # An __init__ fills its folder's registry, and runs with any import from the folder.
    faults = {reason for path in FILES if path.name != '__init__.py' for module in [name_of(path)]
              for imported in imports(parse(path), module, False) if (reason := fault(module, imported))}
    assert not faults, '\n'.join(sorted(faults))


def test_no_import_cycles() -> None:
    """Also inside a folder. An __init__ runs with any file of its folder, so it is excluded."""
    assert cycles({'a': {'b'}, 'b': {'c'}, 'c': set()}) == []
    assert cycles({'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': set()}) == [['a', 'b', 'c']]
    inits = {name_of(path) for path in FILES if path.name == '__init__.py'}
    edges = graph()
    assert len(edges) > 100 and edges['commands.train']
    assert cycles({name: targets - inits for name, targets in edges.items() if name not in inits}) == []


def test_an_init_imports_from_its_own_folder_only() -> None:
    faults = [f'{name_of(path)}: {imported}' for path in FILES if path.name == '__init__.py'
              for imported in imports(parse(path), name_of(path), True)
              # The package itself is named '', and every file is in its folder.
              if name_of(path) and not f'{imported}.'.startswith(f'{name_of(path)}.')]
    assert not faults, faults


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        assert first.end_lineno is not None
        total -= first.end_lineno - first.lineno + 1
    return total


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_files_and_functions_are_short() -> None:
    long = [f'{path.relative_to(ROOT)}: {count} lines' for path in FILES
            if (count := len(path.read_text(encoding='utf-8').splitlines())) > 400]
    long += [f'{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count} lines' for path in FILES
             for node in functions(path) if (count := code_lines(node)) > 60]
    assert not long, '\n'.join(long)


def test_a_docstring_is_not_counted() -> None:
    node = ast.parse('def f():\n    """a\n\n    b\n    """\n    return 1\n').body[0]
    assert isinstance(node, ast.FunctionDef) and code_lines(node) == 2


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield public or registered functions and classes at the top of a file without a docstring."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        registered = any('register_module' in ast.unparse(d) for d in node.decorator_list)
        if (registered or not node.name.startswith('_')) and ast.get_docstring(node) is None:
            yield node.name


def test_public_things_have_docstrings() -> None:
    bare = [f'{path.relative_to(ROOT)}: {name}' for path in FILES for name in undocumented(parse(path))]
    bare += [f'{path.relative_to(ROOT)}: the file' for path in FILES
             if path.read_text() and ast.get_docstring(parse(path)) is None]
    assert not bare, '\n'.join(bare)
    tree = ast.parse("@MODELS.register_module()\nclass _A: pass\ndef b(): pass\ndef _c(): pass\ndef d(): 'doc'")
    assert list(undocumented(tree)) == ['_A', 'b']


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Yield calls that may run code from data, or a shell."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if keywords.get('trust_remote_code', 'False') != 'False':
            yield f'{node.lineno}: trust_remote_code'
        if name == 'torch.load' and keywords.get('weights_only') != 'True':
            yield f'{node.lineno}: torch.load without weights_only=True'
        if keywords.get('shell', 'False') != 'False' or name in ('os.system', 'os.popen', 'eval', 'exec'):
            yield f'{node.lineno}: {name} runs a shell or code'
        if re.fullmatch(r'(c?[pP]ickle|dill|joblib|yaml)\.(loads?|unsafe_load|Unpickler)', name):
            yield f'{node.lineno}: {name}'


def test_no_code_from_data_is_run() -> None:
    calls = [f'{path.relative_to(ROOT)}:{what}' for path in FILES for what in unsafe(parse(path))]
    assert not calls, '\n'.join(calls)


@pytest.mark.parametrize('line', [
    'load_dataset(x, trust_remote_code=True)', 'torch.load(x)', 'torch.load(x, weights_only=False)',
    'subprocess.run(x, shell=True)', 'os.system(x)', 'pickle.load(x)', 'eval(x)'])
def test_unsafe_calls_are_recognised(line: str) -> None:
    assert list(unsafe(ast.parse(line)))
    assert not list(unsafe(ast.parse('torch.load(x, weights_only=True); model.eval(); yaml.safe_load(x)')))


def duplicates(configs: list[Path], others: list[Path]) -> list[str]:
    """Return names of configs (not of pieces in `_base_`) that another file has too."""
    count = Counter(p.name for p in [*configs, *others])
    return sorted({p.name for p in configs if '_base_' not in p.parts and count[p.name] > 1})


def test_config_names_are_unique() -> None:
    """mim finds a config by its base name, among all files of the package."""
    assert duplicates(CONFIGS, FILES) == []
    a, b, piece = Path('configs/x/a.py'), Path('configs/y/a.py'), Path('configs/_base_/x/a.py')
    assert duplicates([a, b], []) == duplicates([a, piece], []) == duplicates([a], [Path('tools/a.py')]) == ['a.py']
    assert duplicates([a, piece.with_name('b.py'), piece.parents[1] / 'y/b.py'], []) == []
