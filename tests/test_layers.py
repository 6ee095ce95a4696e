"""What holds for every file: imports go down only, sizes, docstrings, nothing that runs what others wrote."""

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

# From the bottom up. The names of one line don't import each other; a name stands for all below it, unless a longer
# one is given.
LAYERS = (
    ('registry', 'structures', 'rng', 'schedule', 'pictures', 'hub', 'weight_names', 'weights',
     'shapes'),
    ('models.attention', 'models.text', 'models.weighting', 'models.single_file', 'adapters', 'objectives', 'samplers',
     'datasets', 'evaluation'),
    ('models',),
    ('engine',),
    ('tools',),
)
# The pairs of siblings: the attention slots have one owner, and adapters ask it for theirs; `models.weighting` is the
# half of `models.text` that knows compel.
ALLOWED = {('adapters', 'models.attention'), ('models.text', 'models.weighting')}
# The lowest layer stands on itself: a keyed draw, a batch and a picture may use one another.
BOTTOM = 0


def name_of(path: Path) -> str:
    """'diffengine_sdxl/models/text.py' -> 'models.text'; 'tools/train.py' -> 'tools.train'; '' for the package."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    parts = parts[1:] if parts[0] == PACKAGE else parts
    return '.'.join(parts[:-1] if parts[-1:] == ('__init__',) else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it, without the package's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                own = f'{PACKAGE}.{module}'.rstrip('.').split('.')
                base = '.'.join(own[:len(own) - node.level + is_package] + ([base] if base else []))
            found = [f'{base}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in found:
            if name.split('.')[0] in (PACKAGE, 'tools'):
                yield name.removeprefix(PACKAGE).lstrip('.')


def layer(name: str) -> tuple[int, str] | None:
    """The layer and the longest entry of LAYERS that `name` lies in; None for the package itself and `testing`."""
    hits = [(len(entry), level, entry) for level, entries in enumerate(LAYERS) for entry in entries
            if name == entry or name.startswith(f'{entry}.')]
    return max(hits)[1:] if hits else None


def fault(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None if it may."""
    if imported.split('.')[0] == 'testing':
        allowed = module in ('testing', 'tools.make_shapes_base')
        return None if allowed else f'{module} imports testing, which is for tests'
    if module == 'testing':
        return None
    here, there = layer(module), layer(imported)
    if there is None:
        return None if imported in ('', '__version__') else f'{imported} has no layer; name it in LAYERS'
    if here is None:
        return f'{module} has no layer; name it in LAYERS'
    if here[0] > there[0] or here[1] == there[1] or (here[1], there[1]) in ALLOWED or here[0] == there[0] == BOTTOM:
        return None
    return f'{module} imports {imported}, which is {"beside" if here[0] == there[0] else "above"} it'


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'), str(path))


@pytest.mark.parametrize(('module', 'imported', 'allowed'), [
    ('engine.loops', 'models.sdxl.SDXL', True), ('models.sdxl', 'engine.loops', False),
    ('adapters.t2i_adapter', 'models.attention.Slots', True), ('adapters.t2i_adapter', 'models.text', False),
    ('adapters.t2i_adapter', 'models.sdxl', False), ('models.attention', 'adapters.base', False),
    ('models.loading', 'models.single_file', True), ('models.single_file', 'models.loading', False),
    ('samplers.sampler', 'objectives.noises', False), ('samplers.sampler', 'samplers.guidance', True),
    ('pictures', 'rng', True), ('pictures', 'datasets', False), ('tools.train', 'engine.launch', True),
    ('engine.launch', 'tools.train', False), ('tools.make_shapes_base', 'testing', True),
    ('engine.hooks.x', 'testing', False), ('tools.demo', 'testing', False),
    ('datasets.x', 'newfile', False), ('newfile', 'rng', False), ('tools.train', '__version__', True),
])
def test_the_rules_themselves(module: str, imported: str, allowed: bool) -> None:
    assert (fault(module, imported) is None) == allowed


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse('from . import a\nfrom ..rng import b\nimport torch, diffengine_sdxl.schedule\n'
                     'def f():\n    from diffengine_sdxl.engine import c\n')
    assert list(imports(tree, 'models.text', False)) == ['models.a', 'rng.b', 'schedule', 'engine.c']
    assert list(imports(ast.parse('from . import a'), 'models', True)) == ['models.a']


def test_imports_go_down_only() -> None:
    assert FILES
    # An __init__ only fills its folder's registry; whoever imports a part of the folder runs it, whatever the layer.
    faults = {found for path in FILES if path.name != '__init__.py' for module in [name_of(path)]
              for imported in imports(parse(path), module, False) if (found := fault(module, imported))}
    assert not faults, '\n'.join(sorted(faults))


def test_an_init_imports_from_its_own_folder_only() -> None:
    faults = [f'{name_of(path)}: {imported}' for path in FILES if path.name == '__init__.py'
              for imported in imports(parse(path), name_of(path), True)
              # The package itself is named '', and all lies in its folder.
              if name_of(path) and not f'{imported}.'.startswith(f'{name_of(path)}.')]
    assert not faults, faults


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
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
    """Public or registered functions and classes at the top of a file without a docstring."""
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
    """Calls that run code which came with data, or a shell."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if given.get('trust_remote_code', 'False') != 'False':
            yield f'{node.lineno}: trust_remote_code'
        if name == 'torch.load' and given.get('weights_only') != 'True':
            yield f'{node.lineno}: torch.load without weights_only=True'
        if given.get('shell', 'False') != 'False' or name in ('os.system', 'os.popen', 'eval', 'exec'):
            yield f'{node.lineno}: {name} runs a shell or code'
        if re.fullmatch(r'(c?[pP]ickle|dill|joblib|yaml)\.(loads?|unsafe_load|Unpickler)', name):
            yield f'{node.lineno}: {name}'


def test_nothing_runs_what_came_with_data() -> None:
    found = [f'{path.relative_to(ROOT)}:{what}' for path in FILES for what in unsafe(parse(path))]
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('line', [
    'load_dataset(x, trust_remote_code=True)', 'torch.load(x)', 'torch.load(x, weights_only=False)',
    'subprocess.run(x, shell=True)', 'os.system(x)', 'pickle.load(x)', 'eval(x)'])
def test_the_unsafe_is_seen(line: str) -> None:
    assert list(unsafe(ast.parse(line)))
    assert not list(unsafe(ast.parse('torch.load(x, weights_only=True); model.eval(); yaml.safe_load(x)')))


def twice(configs: list[Path], others: list[Path]) -> list[str]:
    """Names of configs (not of pieces in `_base_`) that another file has too."""
    count = Counter(p.name for p in [*configs, *others])
    return sorted({p.name for p in configs if '_base_' not in p.parts and count[p.name] > 1})


def test_config_names_are_unique() -> None:
    """mim finds a config by its base name, among all files of the package."""
    assert twice(CONFIGS, FILES) == []
    a, b, piece = Path('configs/x/a.py'), Path('configs/y/a.py'), Path('configs/_base_/x/a.py')
    assert twice([a, b], []) == twice([a, piece], []) == twice([a], [Path('tools/a.py')]) == ['a.py']
    assert twice([a, piece.with_name('b.py'), piece.parents[1] / 'y/b.py'], []) == []
