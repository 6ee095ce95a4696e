"""Which tests claim that numbers are equal to the last bit, read from their source, so that none has to be marked."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
#: What compares bits.
COMPARES = frozenset(('equal', 'array_equal', 'assert_array_equal', 'assert_same', 'tobytes', 'getdata'))


def claims(path: Path, function: str) -> bool:
    """Whether a function of a test file compares bits, a fixture or helper that it names does, or it says 'bitwise'."""
    return 'bitwise' in function or _claims(path, function, frozenset())


@cache
def _claims(path: Path, function: str, above: frozenset[tuple[Path, str]]) -> bool:
    names = _functions(path).get(function, frozenset())
    if names & COMPARES or 'bitwise' in names:
        return True
    above |= {(path, function)}
    called = [(p, name) for name in names for p in ([path] if name in _functions(path) else _helpers(name))]
    return any(_claims(*one, above) for one in called if one not in above)


@cache
def _functions(path: Path) -> dict[str, frozenset[str]]:
    """Each function or method of a file, with the names in it (what it calls, and the fixtures that it asks for), and
    'bitwise' where its docstring says so."""
    found: dict[str, frozenset[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            inside = list(ast.walk(node))
            found[node.name] = frozenset(
                [n.attr for n in inside if isinstance(n, ast.Attribute)]
                + [n.id for n in inside if isinstance(n, ast.Name)] + [n.arg for n in inside if isinstance(n, ast.arg)]
                + re.findall('bitwise', (ast.get_docstring(node) or '').lower()))
    return found


@cache
def _helpers(name: str) -> list[Path]:
    """The files beside the tests that define a function of this name."""
    return [path for path in sorted(TESTS.rglob('*.py')) if not path.name.startswith('test_')
            and name in _functions(path)]
