"""Images and captions dropped by one draw."""

from collections import Counter
from typing import Any

import pytest

from diffengine_sdxl.datasets import Draw, Shapes, collate, pack
from diffengine_sdxl.datasets.transforms import JointDrop


def drawn(num: int, epoch: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """What becomes of `num` samples."""
    drop = JointDrop(['ip', 'face'], **settings)
    return [drop({'key': f'row {i}', 'epoch': epoch, 'seed': 3, 'text': 'a circle'}) for i in range(num)]


def counted(samples: list[dict[str, Any]]) -> Counter[tuple[bool, bool]]:
    """(image dropped, text dropped) -> how often."""
    assert all(s['drop']['ip'] == s['drop']['face'] and s['text'] in ('', 'a circle') for s in samples)
    return Counter((s['drop']['ip'], s['text'] == '') for s in samples)


def test_shares_are_exclusive() -> None:
    """4 standard deviations of a binomial count of 4,000."""
    found = counted(drawn(4000, image=0.1, text=0.2, both=0.3))
    for case, share in {(True, False): 0.1, (False, True): 0.2, (True, True): 0.3, (False, False): 0.4}.items():
        assert abs(found[case] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize(('share', 'case'), [('image', (True, False)), ('text', (False, True)), ('both', (True, True))])
def test_all_of_one_kind(share: str, case: tuple[bool, bool]) -> None:
    assert counted(drawn(50, **{**dict.fromkeys(('image', 'text', 'both'), 0.0), share: 1.0})) == {case: 50}


def test_draws_are_keyed() -> None:
    """The same for the same (seed, key, epoch), another in another epoch; other drops don't move it."""
    half = dict(image=0.3, text=0.3, both=0.3)
    assert drawn(60, **half) == drawn(60, **half) != drawn(60, epoch=1, **half)


def test_the_models_own_null() -> None:
    samples = drawn(80, image=0.0, text=0.5, both=0.0, to=None)
    assert {s['text'] for s in samples} == {'a circle'} and {s['drop']['text'] for s in samples} == {True, False}


def test_a_batch_holds_the_drops() -> None:
    """All rows have the entries, dropped or not; other drops stay."""
    dataset = Shapes(length=6, reference=True, transforms=[
        dict(type='CaptionDrop', prob=0.0, to=None),
        dict(type='JointDrop', adapters='ip', image=0.5, text=0.0, both=0.0),
        dict(type='ComputeTimeIds'), dict(type='PackInputs')])
    batch = pack(collate([dataset[Draw(i, 0, 0)] for i in range(6)]))
    assert set(batch.drop) == {'text', 'ip'} and 0 < int(batch.drop['ip'].sum()) < 6 and not batch.drop['text'].any()


@pytest.mark.parametrize(('settings', 'word'), [
    (dict(adapters=[]), 'adapters is empty'), (dict(adapters='ip', image=0.5, text=0.4, both=0.2), 'sum to 1.1'),
    (dict(adapters='ip', image=-0.1), '-0.1')])
def test_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        JointDrop(**settings)
