"""Every pair of kinds, in both orders, and the compositions of all."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, pictures, shaken
from parity import assert_same, grads, make_batch

PAIRS = [*permutations(CASES, 2), *((kind, kind) for kind in CASES)]


def configs_of(first: str, second: str) -> list[dict[str, Any]]:
    """Those of a pair, each with a condition and a word of its own."""
    one, two = CASES[first], CASES[second]
    changes = dict(two.other) if first == second else {}
    if one.reads is not None and one.reads == two.reads:
        changes['reads'] = 'another'
    return [one.config, {**two.config, **changes}]


@pytest.mark.parametrize(('first', 'second'), PAIRS)
def test_pairs_compose_in_both_orders(tiny_base: Path, first: str, second: str) -> None:
    """Both act; the order of the config changes nothing, bitwise; detaching one leaves the other."""
    pair = configs_of(first, second)
    configs, cases, given = dict(zip('ab', pair, strict=True)), (CASES[first], CASES[second]), conditions(*pair)
    models = [shaken(build(tiny_base, {n: configs[n] for n in order}), *cases) for order in ('ab', 'ba')]
    together = [pictures(m, given, steps=2) for m in models]
    assert torch.equal(*together)
    results = [grads(m, make_batch(2, conditions=given)) for m in models]
    assert set(results[0][1]) == {n for owned in models[0].trainables().values() for n, _ in owned}
    assert_same(results[0][1], results[1][1])
    for gone, left in ('ba', 'ab'):
        case = cases['ab'.index(left)]
        alone = pictures(shaken(build(tiny_base, {left: configs[left]}), case), given, steps=2)
        assert not torch.equal(together[0], alone)
        model = models['ab'.index(gone)]
        model.adapters.pop(gone).detach(model)
        assert torch.equal(pictures(model, given, steps=2), alone)
