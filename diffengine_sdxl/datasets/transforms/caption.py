"""Captions: a line of several chosen, tags shuffled and left out, words added, all of it dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch

from diffengine_sdxl.datasets.transforms.geometry import probability, sample_generator
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.registry import TRANSFORMS

Sample = dict[str, Any]
BRACKETS = {')': '(', ']': '[', '}': '{'}


class CaptionTransform:
    """Base: reads and writes the text of a sample; its draws are keyed by (seed, sample key, epoch, purpose)."""

    #: What of a sample it depends on; the cache keys images by the transforms of images only.
    reads = 'text'
    #: `MapDataset.captions` applies this transform.
    changes_caption = True

    def __call__(self, sample: Sample) -> Sample:
        sample['text'] = self.rewrite(sample['text'], sample)
        return sample

    def rewrite(self, text: str, sample: Sample) -> str:
        """Return the caption in place of `text`; `sample` keys the draws."""
        raise NotImplementedError


class DropTransform:
    """Base of what drops captions or image prompts."""

    reads = 'text'
    #: `SampleBuilder.without_drops` leaves this transform out.
    drops_conditioning = True

    def __init__(self, to: str | None) -> None:
        self.to = to

    def drop_caption(self, sample: Sample, dropped: bool) -> None:
        """Replace the caption by `to` if it is dropped; if `to` is None, record in drop['text'] whether it is."""
        if self.to is None:
            # False too: all samples of a batch must have the same keys.
            sample['drop'] = {**sample.get('drop', {}), 'text': dropped}
        elif dropped:
            sample['text'] = self.to


@TRANSFORMS.register_module()
class CaptionDrop(DropTransform):
    """Drop the caption with a probability; `proportion_empty_prompts` of the diffusers scripts.

    Args:
        prob: probability, 0 to 1.
        to: the caption in its place. None keeps the caption and sets drop['text'], for the model to use its null
            prompt instead.
    """

    def __init__(self, prob: float, to: str | None = '') -> None:
        super().__init__(to)
        self.prob = probability(prob)

    def __call__(self, sample: Sample) -> Sample:
        drawn = float(torch.rand((), generator=sample_generator(sample, 'caption_drop')))
        self.drop_caption(sample, drawn < self.prob)
        return sample


@TRANSFORMS.register_module()
class JointDrop(DropTransform):
    """Drop the image prompt, the caption, both or nothing, by one draw.

    The recipe of the IP-Adapter (Ye et al. 2023, arXiv:2308.06721: 5 % each; `tutorial_train_sdxl.py`), for any
    adapters.

    Args:
        adapters: names of the adapters whose input is dropped with the image; each uses its null instead.
        image, text, both: probabilities, 0 to 1, together at most 1.
        to: as in `CaptionDrop`.

    Raises:
        UserError: a probability is invalid, or they sum to more than 1.
    """

    def __init__(self, adapters: Sequence[str] | str, image: float = 0.05, text: float = 0.05, both: float = 0.05,
                 to: str | None = '') -> None:
        super().__init__(to)
        self.adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        if not self.adapters:
            raise UserError('JointDrop: adapters is empty; name those whose image is dropped.')
        self.image, self.text, self.both = (probability(value, key) for key, value in (
            ('image', image), ('text', text), ('both', both)))
        if image + text + both > 1 + 1e-9:
            raise UserError(f'JointDrop: image={image}, text={text} and both={both} exclude one another, and sum to '
                            f'{image + text + both:g}, more than 1.')

    def __call__(self, sample: Sample) -> Sample:
        drawn = float(torch.rand((), generator=sample_generator(sample, 'joint_drop')))
        image = drawn < self.image
        both = not image and drawn < self.image + self.both
        text = both or not image and drawn < self.image + self.both + self.text
        sample['drop'] = {**sample.get('drop', {}), **dict.fromkeys(self.adapters, image or both)}
        self.drop_caption(sample, text)
        return sample


@TRANSFORMS.register_module()
class CaptionLine(CaptionTransform):
    """Take one of the lines of a caption; empty lines don't count.

    Args:
        line: 'random' draws one (kohya's `enable_wildcard`); a number is that line, from 0 on; of a caption with fewer
            lines, the last one.
    """

    def __init__(self, line: int | Literal['random'] = 'random') -> None:
        self.line = line if line == 'random' else whole_number('CaptionLine: line', line, 0)

    def rewrite(self, text: str, sample: Sample) -> str:
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        if len(lines) < 2:
            return ''.join(lines)
        if self.line != 'random':
            return lines[min(int(self.line), len(lines) - 1)]
        return lines[int(torch.randint(len(lines), (), generator=sample_generator(sample, 'caption_line')))]


class TagTransform(CaptionTransform):
    """Base of what moves or leaves out tags: the first ones, and those in front of a mark, stay.

    A separator inside of brackets (round, square or curly) or behind a backslash separates nothing: of
    `a cat, (red, blue:1.2)` the second tag is `(red, blue:1.2)`. A bracket without its partner is text, as in `:(`.

    Args:
        separator: between tags; spaces around tags are removed, and one is written after each separator.
        keep: how many tags at the beginning stay; kohya's `keep_tokens`.
        keep_tokens_separator: a mark, such as '|||'; where a caption has it, the tags in front of the first one and
            behind the second one stay, in place of `keep`. It is removed.
        leave_mark: leave the mark in, for the next transform of tags.
    """

    def __init__(self, separator: str = ',', keep: int = 0, keep_tokens_separator: str | None = None,
                 leave_mark: bool = False) -> None:
        for key, value in (('separator', separator), ('keep_tokens_separator', keep_tokens_separator)):
            if value == '':
                raise UserError(f"{type(self).__name__}: {key}='' must not be empty.")
        self.separator, self.keep = separator, whole_number('keep', keep, 0)
        self.mark, self.leave_mark = keep_tokens_separator, leave_mark

    def change(self, tags: list[str], sample: Sample) -> list[str]:
        """Return what becomes of the tags that may change."""
        raise NotImplementedError

    def rewrite(self, text: str, sample: Sample) -> str:
        first, *rest = (split_tags(part, self.separator)
                        for part in (text.split(self.mark, 2) if self.mark else [text]))
        parts = ([first, self.change(rest[0], sample), *rest[1:]] if rest else
                 [[*first[:self.keep], *self.change(first[self.keep:], sample)]])
        joint = ' ' if self.separator.isspace() else f'{self.separator.strip()} '
        if self.leave_mark and rest:
            return f' {self.mark} '.join(map(joint.join, parts))
        return joint.join(tag for part in parts for tag in part)


def split_tags(text: str, separator: str) -> list[str]:
    """Split a caption at the separators outside of brackets; strip the tags, and leave out empty ones."""
    signs = list(re.finditer(rf'\\.|({re.escape(separator)})|[()\[\]{{}}]', text, re.DOTALL))
    pairs, opened, num = set[int](), list[re.Match[str]](), Counter[str]()
    for sign in signs:
        if sign[0] in BRACKETS.values() and not sign[1]:
            opened.append(sign)
            num[sign[0]] += 1
        elif not sign[1] and num[opening := BRACKETS.get(sign[0], '')]:
            while (last := opened.pop())[0] != opening:  # brackets without a partner inside of these
                num[last[0]] -= 1
            num[opening] -= 1
            pairs |= {last.start(), sign.start()}
    tags, begin, depth = [], 0, 0
    for sign in signs:
        if sign.start() in pairs:
            depth += 1 if sign[0] in BRACKETS.values() else -1
        elif sign[1] and not depth:
            tags.append(text[begin:sign.start()])
            begin = sign.end()
    return [tag for tag in map(str.strip, [*tags, text[begin:]]) if tag]


@TRANSFORMS.register_module()
class CaptionShuffle(TagTransform):
    """Shuffle the tags of a caption, all but those that stay; kohya's `shuffle_caption`.

    Args:
        options: see `TagTransform`.
    """

    def change(self, tags: list[str], sample: Sample) -> list[str]:
        order = torch.randperm(len(tags), generator=sample_generator(sample, 'caption_shuffle')).tolist()
        return [tags[i] for i in order]


@TRANSFORMS.register_module()
class CaptionTagDrop(TagTransform):
    """Leave out each tag with a probability, except for those that stay; kohya's `caption_tag_dropout_rate`.

    Args:
        prob: probability, 0 to 1.
        options: see `TagTransform`.
    """

    def __init__(self, prob: float, separator: str = ',', keep: int = 0, keep_tokens_separator: str | None = None,
                 leave_mark: bool = False) -> None:
        super().__init__(separator, keep, keep_tokens_separator, leave_mark)
        self.prob = probability(prob)

    def change(self, tags: list[str], sample: Sample) -> list[str]:
        drawn = torch.rand(len(tags), generator=sample_generator(sample, 'caption_tag_drop')).tolist()
        return [tag for tag, value in zip(tags, drawn, strict=True) if value >= self.prob]


@TRANSFORMS.register_module()
class CaptionPrefix(CaptionTransform):
    """Put a prefix before every caption.

    Args:
        prefix: with its space or comma.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def rewrite(self, text: str, sample: Sample) -> str:
        return self.prefix + text


@TRANSFORMS.register_module()
class CaptionSuffix(CaptionTransform):
    """Put a suffix behind every caption.

    Args:
        suffix: with its space or comma.
    """

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def rewrite(self, text: str, sample: Sample) -> str:
        return text + self.suffix


@TRANSFORMS.register_module()
class CaptionTrigger(CaptionTransform):
    """Put a trigger word before every caption that does not have it.

    Args:
        word: one or several words; in a caption, in capitals or not, they count where no letter or digit adjoins.
        separator: between the word and the caption.
    """

    def __init__(self, word: str, separator: str = ', ') -> None:
        if not word.strip():
            raise UserError(f'CaptionTrigger: word={word!r} must not be empty.')
        self.word, self.separator = word.strip(), separator
        self.pattern = re.compile(rf'(?<!\w){re.escape(self.word)}(?!\w)', re.IGNORECASE)

    def rewrite(self, text: str, sample: Sample) -> str:
        if self.pattern.search(text):
            return text
        return f'{self.word}{self.separator}{text}' if text else self.word
