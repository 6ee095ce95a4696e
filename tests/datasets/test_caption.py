"""Captions dropped, alone or with images; lines chosen, tags shuffled and left out, words added."""

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from diffengine_sdxl.datasets import Draw, Shapes, collate
from diffengine_sdxl.datasets.transforms import JointDrop
from diffengine_sdxl.datasets.transforms.caption import split_tags
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
    assert build('CaptionSuffix', suffix=', photo')(sample())['text'] == 'a, b, c, d, photo'


@pytest.mark.parametrize(('text', 'tags'), [
    ('a cat, (red, blue:1.2), [x, {y, z}], b', ['a cat', '(red, blue:1.2)', '[x, {y, z}]', 'b']),
    (r'miku \(voc, a\), b', [r'miku \(voc', r'a\)', 'b']), (r'a\, b, c', [r'a\, b', 'c']),
    (':(, a, (b, c', [':(', 'a', '(b', 'c']), ('a), b, (c, d)', ['a)', 'b', '(c, d)']),
    ('[a :(, b], c', ['[a :(, b]', 'c']), ('[a, (b], c), d', ['[a, (b]', 'c)', 'd']), (' ,a,, b,', ['a', 'b']),
    ('', [])])
def test_tags_respect_brackets(text: str, tags: list[str]) -> None:
    """A bracket without its partner, and one behind a backslash, is text."""
    assert split_tags(text, ',') == tags


def test_many_brackets_take_no_time() -> None:
    """A caption from outside may be of a mebibyte; with a search of each bracket's partner this would take hours."""
    start = time.process_time()
    assert len(split_tags('([{,' * 5_000 + ')}]' * 5_000, ',')) > 0
    assert time.process_time() - start < 2


@pytest.mark.parametrize('kind', [dict(type='CaptionShuffle'), dict(type='CaptionTagDrop', prob=0.4)])
def test_tags_that_stay(kind: dict[str, Any]) -> None:
    """The first `keep`; or those outside of two marks, which win over `keep`, and can be left for the next."""
    texts = {'keep': 'x, y, a, b, c, d', 'marks': 'x, y ||| a, b, (c, d), e, f ||| z', 'one mark': 'x, y|||a, b, c, d'}
    for name, options in (('keep', dict(keep=2)), ('marks', dict(keep=1, keep_tokens_separator='|||')),
                          ('one mark', dict(keep_tokens_separator='|||'))):
        out = [TRANSFORMS.build({**kind, **options})({**sample(epoch=e), 'text': texts[name]})['text']
               for e in range(40)]
        assert len(set(out)) > 8 and all(text.startswith('x, y') and '|' not in text for text in out)
        assert all(text.endswith(', z') == (name == 'marks') for text in out)
        assert all(('(c, d)' in text) == ('(c' in text) for text in out)
    left = TRANSFORMS.build({**kind, 'keep_tokens_separator': '|||', 'leave_mark': True})
    assert left({**sample(), 'text': texts['marks']})['text'].split(' ||| ')[::2] == ['x, y', 'z']


def test_tag_drop() -> None:
    """Each tag by itself, 4 standard deviations; the order stays; anew in each epoch; in validations too."""
    texts = [build('CaptionTagDrop', prob=0.3)(sample(key=str(k)))['text'] for k in range(500)]
    kept = Counter(tag for text in texts for tag in text.split(', ') if tag)
    assert set(kept) == set('abcd') and all(abs(n / 500 - 0.7) < 4 * (0.21 / 500) ** 0.5 for n in kept.values())
    assert all(list(text) == sorted(text) for text in (t.replace(', ', '') for t in texts))
    assert len({build('CaptionTagDrop', prob=0.5)(sample(epoch=e))['text'] for e in range(30)}) > 8
    with pytest.raises(UserError, match='prob=2'):
        build('CaptionTagDrop', prob=2)


def test_lines() -> None:
    lines = dict(sample(), text='one \n\n two\nthree\n')
    assert [build('CaptionLine', line=i)(dict(lines))['text'] for i in (0, 1, 7)] == ['one', 'two', 'three']
    drawn = Counter(build('CaptionLine')({**lines, 'epoch': e})['text'] for e in range(300))
    assert set(drawn) == {'one', 'two', 'three'} and min(drawn.values()) > 60
    assert [build('CaptionLine')(dict(sample(), text=text))['text'] for text in ('', ' \n a')] == ['', 'a']
    with pytest.raises(UserError, match='line=-1'):
        build('CaptionLine', line=-1)


@pytest.mark.parametrize(('text', 'expected'), [
    ('a dog', 'sks dog, a dog'), ('A SKS Dog runs', 'A SKS Dog runs'), ('sks doggy', 'sks dog, sks doggy'),
    ('', 'sks dog'), ('(sks dog:1.1)', '(sks dog:1.1)')])
def test_trigger(text: str, expected: str) -> None:
    assert build('CaptionTrigger', word='sks dog')(dict(sample(), text=text))['text'] == expected


def test_what_the_words_of_captions_are_counted_in() -> None:
    """`captions` applies what changes them and drops none; the cache knows that they read no image."""
    dataset = Shapes(length=3, transforms=[
        dict(type='CaptionTrigger', word='sks'), dict(type='CaptionLine', line=1),
        dict(type='CaptionSuffix', suffix='!'), dict(type='CaptionDrop', prob=1.0)])
    dataset.caption_texts = lambda: ['a\nb', 'c']  # type: ignore[method-assign]
    assert list(dataset.captions()) == ['b!', 'sks, c!']
    assert [getattr(t, 'reads', None) for t in dataset.transforms] == ['text'] * 4


@pytest.mark.parametrize('paired', [False, True])
@pytest.mark.parametrize('drop', [dict(type='CaptionDrop', prob=1.0), dict(type='CaptionDrop', prob=1.0, to=None),
                                  dict(type='JointDrop', adapters='ip', both=1.0, image=0.0, text=0.0)])
def test_sample_grids_show_the_captions(drop: dict[str, Any], paired: bool) -> None:
    """SampleHook leaves the drops out, and the data set of the training keeps them."""
    half = dict(type='Shapes', length=2, transforms=[dict(type='CaptionPrefix', prefix='a drawing, '), drop,
                                                     dict(type='ComputeTimeIds'), dict(type='PackInputs')])
    config = dict(type='PriorPreservation', instance=half, prior=half) if paired else half
    dataset: Any = DATASETS.build(config)
    loader = SimpleNamespace(dataset=dataset, sampler=None)
    runner: Any = SimpleNamespace(train_dataloader=loader, seed=0, bare_model=SimpleNamespace(
        data_preprocessor=lambda samples: {'inputs': pack(samples)}))
    batches = SampleHook(num_from_dataset=2, size=64)._from_dataset(runner)
    captions = [f'a drawing, {Shapes(length=2)[i]["text"]}' for i in range(2)]
    assert [batch.text for batch in batches] == [[caption] for caption in captions]
    row = dataset[0][0] if paired else dataset[0]
    assert row['text'] == '' if drop.get('to', '') == '' else row['drop']['text']
