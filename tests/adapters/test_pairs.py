"""Every pair of kinds, in both orders."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, sample, shaken
from parity import assert_same, grads, make_batch
from torch import Tensor


def is_lora(kind: str) -> bool:
    return CASES[kind].config['type'] == 'LoRA'


# LoRAs attach last, whatever their names; beside another kind, the other order of names is the same pair.
PAIRS = [*((first, second) for first, second in permutations(CASES, 2) if is_lora(second) or not is_lora(first)),
         *((kind, kind) for kind in CASES)]


def pair_configs(first: str, second: str) -> dict[str, dict[str, Any]]:
    """Configs of a pair, each with its own condition and word."""
    one, two = CASES[first], CASES[second]
    changes = dict(two.other) if first == second else {}
    if one.condition_key is not None and one.condition_key == two.condition_key:
        changes['condition_key'] = 'another'
    return {'a': one.config, 'b': {**two.config, **changes}}


@pytest.fixture(scope='module')
def single(tiny_base: Path) -> Callable[..., Tensor]:
    """(first, second, name) -> latents with one adapter of the pair, computed once for equal configs."""
    results: dict[str, Tensor] = {}

    def latents(first: str, second: str, name: str) -> Tensor:
        configs = pair_configs(first, second)
        key = f'{name}: {configs[name]}'
        if key not in results:
            model = shaken(build(tiny_base, {name: configs[name]}), CASES[first if name == 'a' else second])
            results[key] = sample(model, conditions(*configs.values()), steps=2)
        return results[key]
    return latents


@pytest.mark.parametrize(('first', 'second'), PAIRS)
def test_pairs_compose_in_both_orders(tiny_base: Path, single: Callable[..., Tensor], first: str, second: str) -> None:
    """Both act; the order of the config changes nothing, bitwise; detaching one leaves the other."""
    configs, cases = pair_configs(first, second), (CASES[first], CASES[second])
    inputs = conditions(*configs.values())
    models = [shaken(build(tiny_base, {n: configs[n] for n in order}), *cases) for order in ('ab', 'ba')]
    together = [sample(m, inputs, steps=2) for m in models]
    assert torch.equal(*together)
    results = [grads(m, make_batch(2, conditions=inputs)) for m in models]
    assert set(results[0][1]) == {n for owned in models[0].trainables().values() for n, _ in owned}
    assert_same(results[0][1], results[1][1])
    for model, removed, left in zip(models, 'ba', 'ab', strict=True):
        expected = single(first, second, left)
        assert not torch.equal(together[0], expected)
        model.adapters.pop(removed).detach(model)
        assert torch.equal(sample(model, inputs, steps=2), expected)
