"""The tools of `make parity`: which tests it runs, and the kernels that round differently."""

from pathlib import Path

import pytest
import torch
from bitwise import claims
from other_kernels import OtherKernels

TESTS = Path(__file__).parent


@pytest.mark.parametrize(('file', 'name', 'expected'), [
    ('adapters/test_cases.py', 'test_scale_zero_is_the_base', True),  # torch.equal
    ('engine/test_resume.py', 'test_of_every_kind', True),  # by a helper of tests/runs.py
    ('engine/test_optim.py', 'test_rates_are_bitwise_those_of_diffusers', True),  # it says so
    ('samplers/test_sampler.py', 'test_an_image_does_not_depend_on_its_place', False),  # close
    ('test_layers.py', 'test_imports_go_down_only', False)])
def test_what_claims_bitwise_equality(file: str, name: str, expected: bool) -> None:
    assert f'def {name}(' in (TESTS / file).read_text()
    assert claims(TESTS / file, name) == expected


def test_only_equal_kernels_give_equal_bits() -> None:
    """By name of the operation, shapes and strides; exact products and what has one kernel only stay as they are."""
    x, y = torch.rand((2, 4, 64, 64), generator=torch.Generator().manual_seed(0))
    plain = x @ y
    with OtherKernels():
        again, folded = x @ y, torch.stack([a @ b for a, b in zip(x, y, strict=True)])
        scattered = x.mT.contiguous().mT @ y
        assert torch.equal(x @ torch.eye(64).expand(4, 64, 64), x) and torch.equal(x + y, y + x)
        assert torch.equal(again, x @ y)
    for other in (plain, folded, scattered):
        assert not torch.equal(again, other)
        torch.testing.assert_close(again, other, rtol=1e-5, atol=1e-5)
