"""Rows of a batch, keys, and the comparison of entries with what would be computed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffengine_sdxl.cache import verify
from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.cache.plan import CachePlan
from diffengine_sdxl.cache.rows import by_row
from diffengine_sdxl.cache.store import Store
from diffengine_sdxl.cache.verify import Verifier, difference, discard, prune
from diffengine_sdxl.structures import Lookups


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / 'cache')


def value(number: float) -> dict[str, Tensor]:
    return {'x': torch.full((2, 3), float(number))}


def test_digests_depend_on_each_part() -> None:
    """Values, types, order and nesting; dicts go by their keys, lists are tuples."""
    parts = [(), ('',), (None,), ('None',), (1,), (1.0,), (True,), ('1',), (b'1',), ('a', 'b'), ('ab',), ('b', 'a'),
             (('a', 'b'),), (('a',), 'b'), ({'a': 1},), ({'a': 2},), ({'b': 1},), ([['a', 1]],), ('\ud800',)]
    found = [digest(*part) for part in parts]
    assert len(set(found)) == len(parts) and all(len(one) == 32 for one in found)
    assert digest({'a': 1, 'b': 2}) == digest({'b': 2, 'a': 1}) and digest([1, 2]) == digest((1, 2))
    plan = CachePlan(None, moments='v', text='t', images={'a': 'i', 'b': 'i'})  # type: ignore[arg-type]
    keys = [plan.sample_key('r'), plan.moments_key('r'), plan.moments_key('s'), plan.image_key('a', 'r'),
            plan.image_key('b', 'r'), plan.text_key('r'), plan.text_key('r', 's'), plan.text_key('s', 'r')]
    assert len(set(keys)) == len(keys) and plan.text_key('r', 'r') == plan.text_key('r')
    assert CachePlan(None, moments='w').moments_key('r') != keys[1]  # type: ignore[arg-type]


def test_rows_are_found_shared_or_computed(store: Store) -> None:
    """In their order; one key once, no key never shared; what came in after the lookup is found; all is counted."""
    computed: list[int] = []

    def compute(i: int) -> dict[str, Tensor]:
        computed.append(i)
        return value(i)
    late, new, old = digest('late'), digest('new'), digest('old')
    store.put(late, 'text', value(70))
    lookups = Lookups([new, '', old, new, '', late], [None, None, value(50), None, None, None])
    rows = by_row(6, compute, 'text', lookups, store)['x']
    assert rows[:, 0, 0].tolist() == [0, 1, 50, 0, 4, 70] and rows.shape == (6, 2, 3) and computed == [0, 1, 4]
    assert store.counts == {'text': [3, 3]}
    found = store.get(new)
    assert found is not None and torch.equal(found['x'], value(0)['x']) and store.get(old) is None
    computed.clear()
    assert by_row(2, compute, 'text')['x'][:, 0, 0].tolist() == [0, 1]
    assert by_row(2, compute, 'text', Lookups(['', ''], [None, None]))['x'][:, 0, 0].tolist() == [0, 1]
    assert computed == [0, 1, 0, 1] and store.counts == {'text': [3, 3]}
    store.close()


@pytest.mark.parametrize(('dtype', 'by', 'exact', 'words'), [
    (torch.float32, 0.0, True, None), (torch.float32, 1e-6, True, "'x' differs"), (torch.float32, 1e-6, False, None),
    (torch.float32, 1e-2, False, "'x' differs by 0.0099 of"), (torch.bfloat16, 1e-2, False, None),
    (torch.bfloat16, 1e-1, False, "'x' differs by"), (torch.float32, float('nan'), False, "'x' differs by nan"),
    (torch.uint8, 1, False, "'x' differs")])
def test_what_counts_as_a_difference(dtype: torch.dtype, by: float, exact: bool, words: str | None) -> None:
    one = torch.ones(3, 4)
    other = one.clone()
    other[1, 2] += by
    found = difference({'x': one.to(dtype)}, {'x': other.to(dtype)}, exact)
    assert (found is None) if words is None else (found is not None and words in found)
    assert difference({'x': one}, {'y': one}, False) and difference({'x': one}, {'x': one[:2]}, False)


def test_wrong_entries_are_found_and_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared bit by bit where the same processor made them; the others of their shard stay, for good."""
    keys = [digest(i) for i in range(4)]
    for i, key in enumerate(keys[:3]):
        store.put(key, 'text', value(i))
    store.close()
    verifier = Verifier(store)
    assert verifier.get(keys[0]) is None
    for key, number in zip(keys, (0, 1 + 1e-6, 2, 3), strict=True):
        verifier.put(key, 'text', value(number))
    assert verifier.right == {keys[0], keys[2]} and verifier.missing == {keys[3]} and [*verifier.wrong] == [keys[1]]
    assert verifier.get(keys[1]) is None and verifier.get(keys[2]) is not None
    discard(store, verifier.wrong)
    for place in (store, Store(store.folder)):
        assert [place.get(key) is not None for key in keys] == [True, False, True, False]
    (store.folder / 'index.sqlite').unlink()
    again = Store(store.folder)
    assert [again.get(key) is not None for key in keys] == [True, False, True, False]
    monkeypatch.setattr(verify.shards, 'device_name', lambda device: 'cpu of another kind')
    elsewhere = Verifier(again)
    elsewhere.put(keys[2], 'text', value(2 + 1e-6))
    assert elsewhere.right == {keys[2]}


def test_pruning(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that no run used or that others repeat, digests of files that changed, what dead writers left."""
    from diffengine_sdxl.cache import store as store_file
    monkeypatch.setattr(store_file, 'SETTLED', -10**12)
    names = []
    for number in range(2):
        store.put(digest(number), 'text', value(number))
        store.flush()
        names += [path.name for path in store.folder.glob('*.safetensors') if path.name not in names]
    for name in ('stays', 'changes', 'goes'):
        (tmp_path / name).write_text(name)
        store.file_digest(tmp_path / name)
    (tmp_path / 'changes').write_text('anew')
    (tmp_path / 'goes').unlink()
    copy = store.folder / names[1].replace('00001', '00007')
    copy.write_bytes((store.folder / names[1]).read_bytes())
    dead = store.folder / f'.{names[1]}.abcd1234.part'
    dead.mkdir()
    store.close()
    with store.index.transaction() as db:
        db.execute('UPDATE shards SET used = used - 10 * 86400')
    store = Store(store.folder)
    assert store.get(digest(1)) is not None  # used now
    store.close()
    number, size = prune(store, days=7)
    assert number == 2 and size > 0 and not dead.exists(), 'the old one, and the copy'
    assert [path.name for path in store.folder.glob('*.safetensors')] == names[1:]
    assert store.get(digest(0)) is None and store.get(digest(1)) is not None
    assert [Path(str(row[0], 'utf-8')).name for row in store.index.query('SELECT path FROM files')] == ['stays']
    assert prune(store, days=7) == (0, 0)
    store.close()
