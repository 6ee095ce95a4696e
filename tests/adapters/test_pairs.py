"""Pairs of kinds, in both orders where that differs."""

import os
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


#: LoRAs of several parts differ from the others by what they are put into, as IP-Adapters do from one another.
EVERYWHERE = ('lora_everywhere', 'dora_everywhere')


def runs_here(first: str, second: str) -> bool:
    """Whether a pair's code differs from that of every other pair here. `make parity` runs all of them."""
    if not is_lora(second):  # one after the other in attention or at the UNet's blocks; else one order of names will do
        return first <= second or {first, second} in ({'ip_adapter', 'ip_adapter_plus'}, {'t2i_adapter', 'controlnet'})
    if is_lora(first):
        return first <= second or not {first, second} & {*EVERYWHERE}
    # What doesn't read the base's modules meets the same LoRA layers, whatever they compute.
    return first == 'ip_adapter_plus' or second in EVERYWHERE or (first, second) == ('textual_inversion', 'lora')


# LoRAs attach last, whatever their names; beside another kind, the other order of names is the same pair.
PAIRS = [*((first, second) for first, second in permutations(CASES, 2) if is_lora(second) or not is_lora(first)),
         *((kind, kind) for kind in CASES)]
if 'OTHER_KERNELS' not in os.environ:
    PAIRS = [pair for pair in PAIRS if runs_here(*pair)]


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
