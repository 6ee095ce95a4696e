"""Keyed draws: what each number depends on and what it does not."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffengine_sdxl import rng


def documented(*key: str | int) -> torch.Generator:
    """Return the generator of a key by the documented formula."""
    text = '\x1f'.join(f'{type(k).__name__}:{k}' for k in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'big') // 2)


def draws(seeds: list[int], keys: list[str], epochs: list[int]) -> rng.Draws:
    return rng.Draws(torch.tensor(seeds), keys, torch.tensor(epochs))


def test_a_row_is_its_keys_own_generator() -> None:
    """The key is (seed, key, epoch, stream), in this order; fp32, the same on every machine."""
    got = draws([1, 2], ['a', 'b'], [3, 4])
    expected = torch.stack([torch.randn((4, 8, 8), generator=documented(s, k, e, 'noise'))
                            for s, k, e in ((1, 'a', 3), (2, 'b', 4))])
    assert torch.equal(got.normal('noise', (4, 8, 8)), expected) and expected.dtype == torch.float32
    assert torch.equal(got.uniform('timestep')[1], torch.rand((), generator=documented(2, 'b', 4, 'timestep')))
    assert rng.key_seed('a', 1) == 8_390_313_410_132_574_505


def test_each_part_of_a_key_matters() -> None:
    """Also its type, and where one part ends."""
    keys = [('a', 1), ('a', '1'), ('a1',), ('a', 1, 0), (1, 'a'), ('a', -1), ('a', 2), ('A', 1), ('str:a', 1),
            ('a', 'b'), ('ab',), ('', 'ab'), ('ab', '')]
    assert len({rng.key_seed(*k) for k in keys}) == len(keys)
    assert all(0 <= rng.key_seed(*k) < 2 ** 63 for k in keys)
    reference = draws([1], ['a'], [3]).normal('noise', (5,))
    for other in (draws([2], ['a'], [3]), draws([1], ['b'], [3]), draws([1], ['a'], [4])):
        assert not torch.equal(other.normal('noise', (5,)), reference)
    assert not torch.equal(draws([1], ['a'], [3]).normal('vae', (5,)), reference)


def test_rows_are_independent() -> None:
    """Of order, split and earlier draws."""
    seeds, keys, epochs = [1, 1, 7, 7], list('abca'), [0, 1, 1, 0]
    whole = draws(seeds, keys, epochs)
    reference = whole.normal('noise', (3, 2))
    for order in ([2, 0, 3, 1], [1], [3, 0]):
        part = draws(*([column[i] for i in order] for column in (seeds, keys, epochs)))
        part.uniform('timestep')
        part.normal('other', (50,))
        assert torch.equal(part.normal('noise', (3, 2)), reference[order])
    torch.manual_seed(3)
    assert torch.equal(whole.normal('noise', (3, 2)), reference)
    with pytest.raises(ValueError):
        rng.Draws(torch.tensor([1]), ['a', 'b'], torch.tensor([0]))


def test_numbers_are_normal_and_uniform() -> None:
    num = 4000
    many = draws([5] * num, [str(i) for i in range(num)], [0] * num)
    uniform, normal = many.uniform('timestep').double(), many.normal('noise', ()).double()
    for moment in (1, 2, 3):
        assert abs(float((uniform ** moment).mean()) - 1 / (moment + 1)) < 0.02
    assert abs(float(normal.mean())) < 0.06 and abs(float(normal.std()) - 1) < 0.05
    assert 0 <= float(uniform.min()) and float(uniform.max()) < 1
    # Neighbouring keys and streams are not alike.
    assert abs(float(torch.corrcoef(torch.stack([normal[1:], normal[:-1]]))[0, 1])) < 0.06
    assert abs(float(torch.corrcoef(torch.stack([normal, many.normal('vae', ()).double()]))[0, 1])) < 0.06


def global_numbers() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_fork_leaves_no_trace() -> None:
    """All three generators follow the key inside and are restored outside, also after an error."""
    rng.seed_all('x', 1)
    before = [global_numbers() for _ in range(2)]
    rng.seed_all('x', 1)
    first = global_numbers()
    with rng.fork('y', 2):
        inside = global_numbers()
    with pytest.raises(KeyError), rng.fork('z'):
        global_numbers()
        raise KeyError
    assert [first, global_numbers()] == before
    with rng.fork('y', 2):
        assert global_numbers() == inside
    with rng.fork('y', 3):
        assert all(a != b for a, b in zip(global_numbers(), inside, strict=True))


def test_another_process_draws_the_same() -> None:
    """Python's own hashing differs from process to process."""
    code = ('from diffengine_sdxl import rng; import torch\n'
            'print(rng.key_seed("ä", 3), torch.randn((), generator=rng.generator("ä", 3)).item())')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == rng.key_seed('ä', 3)
    assert float(out[1]) == torch.randn((), generator=rng.generator('ä', 3)).item()
