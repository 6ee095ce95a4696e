"""Captions dropped, alone or with images, shuffled and prefixed."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from diffengine_sdxl.datasets import Draw, Shapes, collate
from diffengine_sdxl.datasets.transforms import JointDrop
from diffengine_sdxl.engine.hooks.samples import SampleHook
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import pack
from diffengine_sdxl.registry import DATASETS, TRANSFORMS


def dropped(num: int, epoch: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """Return `num` samples after JointDrop."""
    drop = JointDrop(['ip', 'face'], **settings)
    return [drop({'key': f'row {i}', 'epoch': epoch, 'seed': 3, 'text': 'a circle'}) for i in range(num)]


def count_drops(samples: list[dict[str, Any]]) -> Counter[tuple[bool, bool]]:
    """Count the samples by (image dropped, text dropped)."""
    assert all(s['drop']['ip'] == s['drop']['face'] and s['text'] in ('', 'a circle') for s in samples)
    return Counter((s['drop']['ip'], s['text'] == '') for s in samples)


def test_shares_are_exclusive() -> None:
    """4 standard deviations of a binomial count of 4,000."""
    counts = count_drops(dropped(4000, image=0.1, text=0.2, both=0.3))
    for case, share in {(True, False): 0.1, (False, True): 0.2, (True, True): 0.3, (False, False): 0.4}.items():
        assert abs(counts[case] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize(('share', 'case'), [('image', (True, False)), ('text', (False, True)), ('both', (True, True))])
def test_a_probability_of_one(share: str, case: tuple[bool, bool]) -> None:
    assert count_drops(dropped(50, **{**dict.fromkeys(('image', 'text', 'both'), 0.0), share: 1.0})) == {case: 50}


def test_draws_are_keyed() -> None:
    """Equal for equal (seed, key, epoch), different in another epoch."""
    half = dict(image=0.3, text=0.3, both=0.3)
    assert dropped(60, **half) == dropped(60, **half) != dropped(60, epoch=1, **half)


def test_the_model_uses_its_null_prompt() -> None:
    samples = dropped(80, image=0.0, text=0.5, both=0.0, to=None)
    assert {s['text'] for s in samples} == {'a circle'} and {s['drop']['text'] for s in samples} == {True, False}


def test_a_batch_holds_the_drops() -> None:
    """All samples have the entries, dropped or not; other drops stay."""
    dataset = Shapes(length=6, reference=True, transforms=[
        dict(type='CaptionDrop', prob=0.0, to=None),
        dict(type='JointDrop', adapters='ip', image=0.5, text=0.0, both=0.0),
        dict(type='ComputeTimeIds'), dict(type='PackInputs')])
    batch = pack(collate([dataset[Draw(i, 0, 0)] for i in range(6)]))
    assert set(batch.drop) == {'text', 'ip'} and 0 < int(batch.drop['ip'].sum()) < 6 and not batch.drop['text'].any()


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(adapters=[]), 'adapters is empty'), (dict(adapters='ip', image=0.5, text=0.4, both=0.2), 'sum to 1.1'),
    (dict(adapters='ip', image=-0.1), 'image=-0.1'), (dict(adapters='ip', both='1'), "both='1'")])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JointDrop(**settings)


def build(name: str, **options: Any) -> Any:
    return TRANSFORMS.build(dict(type=name, **options))


def sample(key: str = 'a', epoch: int = 0) -> dict[str, Any]:
    return dict(text='a, b, c, d', key=key, epoch=epoch, seed=0)


def test_caption_drop() -> None:
    texts = [build('CaptionDrop', prob=0.3)(sample(key=str(k)))['text'] for k in range(400)]
    assert 0.23 < texts.count('') / 400 < 0.37
    assert texts == [build('CaptionDrop', prob=0.3)(sample(key=str(k)))['text'] for k in range(400)]
    epochs = [build('CaptionDrop', prob=0.3)(sample(key='1', epoch=e))['text'] for e in range(50)]
    assert 5 < epochs.count('') < 25
    assert build('CaptionDrop', prob=1, to='nothing')(sample())['text'] == 'nothing'
    marks = [build('CaptionDrop', prob=0.3, to=None)(sample(key=str(k))) for k in range(400)]
    assert [m['drop']['text'] for m in marks] == [text == '' for text in texts]
    assert {m['text'] for m in marks} == {'a, b, c, d'}


def test_caption_shuffle_and_prefix() -> None:
    out = [build('CaptionShuffle', keep=1)(sample(key=str(k)))['text'] for k in range(60)]
    assert all(sorted(text.split(', ')) == ['a', 'b', 'c', 'd'] and text.startswith('a, ') for text in out)
    assert len(set(out)) == 6
    assert out == [build('CaptionShuffle', keep=1)(sample(key=str(k)))['text'] for k in range(60)]
    assert build('CaptionPrefix', prefix='sks, ')(sample())['text'] == 'sks, a, b, c, d'


@pytest.mark.parametrize('paired', [False, True])
@pytest.mark.parametrize('drop', [dict(type='CaptionDrop', prob=1.0), dict(type='CaptionDrop', prob=1.0, to=None),
                                  dict(type='JointDrop', adapters='ip', both=1.0, image=0.0, text=0.0)])
def test_sample_grids_show_the_captions(drop: dict[str, Any], paired: bool) -> None:
    """SampleHook leaves the drops out, and the data set of the training keeps them."""
    half = dict(type='Shapes', length=2, transforms=[dict(type='CaptionPrefix', prefix='a drawing, '), drop,
                                                     dict(type='ComputeTimeIds'), dict(type='PackInputs')])
    config = dict(type='PriorPreservation', instance=half, prior=half) if paired else half
    dataset: Any = DATASETS.build(config)
    runner: Any = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=dataset), seed=0, bare_model=SimpleNamespace(
        data_preprocessor=lambda samples: {'inputs': pack(samples)}))
    batches = SampleHook(num_from_dataset=2, size=64)._from_dataset(runner)
    captions = [f'a drawing, {Shapes(length=2)[i]["text"]}' for i in range(2)]
    assert [batch.text for batch in batches] == [[caption] for caption in captions]
    row = dataset[0][0] if paired else dataset[0]
    assert row['text'] == '' if drop.get('to', '') == '' else row['drop']['text']
