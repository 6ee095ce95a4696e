"""The worst and the best images of a test, by each metric that single images have."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffengine_sdxl.pages.embed import Embedded, Embedder
from diffengine_sdxl.pages.numbers import finite, format_number
from diffengine_sdxl.pages.run_report.files import WorkDir
from diffengine_sdxl.pages.run_report.metrics import Results

#: Columns of samples.csv that are no metrics.
COLUMNS = ('key', 'seed', 'noise_seed', 'image_set', 'file', 'prompt')
#: Images at each end; the side of a thumbnail, in pixels; metrics that are shown; characters of a prompt.
NUM, SIDE, MAX_METRICS, MAX_PROMPT = 4, 256, 16, 300


class Example(NamedTuple):
    """A sample and seed: its images by label, and by what it was chosen."""

    prompt: str
    facts: str
    images: list[tuple[str, Embedded]]


class Extremes(NamedTuple):
    """The ends of one metric; `measure` says what was sorted."""

    metric: str
    measure: str
    ends: list[tuple[str, list[Example]]]


class _Sample(NamedTuple):
    """The rows of a sample and seed, by image set."""

    rows: dict[str, dict[str, str]]

    def value(self, image_set: str, metric: str) -> float | None:
        try:
            return finite(float(self.rows[image_set][metric]))
        except (KeyError, ValueError):
            return None

    def score(self, image_sets: Sequence[str], metric: str) -> float | None:
        """Return the number of a set, or of two sets the first's minus the second's."""
        values = [self.value(image_set, metric) for image_set in image_sets]
        known = [value for value in values if value is not None]
        return None if len(known) < len(values) else known[0] - sum(known[1:])


def find_extremes(work_dir: WorkDir, results: Results, embed: Embedder) -> list[Extremes]:
    """Return the worst and best images by each metric in test/samples.csv; [] if there are none."""
    rows = work_dir.csv('test', 'samples.csv')
    samples: dict[tuple[str, str], _Sample] = {}
    for row in rows:
        samples.setdefault((row.get('key', ''), row.get('seed', '')), _Sample({})).rows[row.get('image_set', '')] = row
    names = [name for name in (rows[0] if rows else ()) if name not in COLUMNS]
    found = [_extremes(work_dir, list(samples.values()), name, results, embed) for name in names[:MAX_METRICS]]
    return [extremes for extremes in found if extremes is not None]


def _extremes(work_dir: WorkDir, samples: Sequence[_Sample], name: str, results: Results, embed: Embedder
              ) -> Extremes | None:
    """Return the ends of a metric; None if all samples are equal."""
    for compared in (('adapted', 'compared'), ('adapted', 'base'), ('adapted',), ('base',)):
        scored = [(score, sample) for sample in samples if (score := sample.score(compared, name)) is not None]
        if scored:
            break
    if len({score for score, _ in scored}) < 2:
        return None
    better = next((metrics[name].better for metrics in results.values() if name in metrics), 0)
    scored.sort(key=lambda one: one[0] * (better or 1))  # equal ones stay in the data's order
    # Those at the median, often most of a metric of 0 and 1, are at neither end.
    middle = statistics.median(score for score, _ in scored)
    low, high = ('Worst', 'Best') if better else ('Lowest', 'Highest')
    ends = [(end, [one for one in ordered if (one[0] - middle) * (ordered[0][0] - middle) > 0][:NUM])
            for end, ordered in ((low, scored), (high, scored[::-1]))]
    return Extremes(name, ' − '.join(compared),
                    [(end, [_example(work_dir, sample, name, compared, score, embed) for score, sample in chosen])
                     for end, chosen in ends if chosen])


def _example(work_dir: WorkDir, sample: _Sample, metric: str, compared: Sequence[str], score: float, embed: Embedder
             ) -> Example:
    first = next(iter(sample.rows.values()))
    files: dict[str, Path] = {}
    for image_set, row in sample.rows.items():
        value = sample.value(image_set, metric)
        file = row.get('file', '')
        if file and (path := work_dir.inside('test', file)) is not None:
            files[image_set if value is None else f'{image_set} {format_number(value)}'] = path
    conditions = _conditions(work_dir, first.get('file', ''))
    images = [(label, image) for label, path in {**conditions, **files}.items() if (image := embed(path, SIDE))]
    prompt = first.get('prompt', '')
    prompt = prompt if len(prompt) <= MAX_PROMPT else f'{prompt[:MAX_PROMPT]} ...'
    sign = format_number(score) if len(compared) == 1 or score <= 0 else f'+{format_number(score)}'
    return Example(prompt, f'{sign} · sample {first.get("key", "")}, seed {first.get("seed", "")}', images)


def _conditions(work_dir: WorkDir, file: str) -> Mapping[str, Path]:
    """Return the images of conditions that the test kept, by name, of the sample whose image is `file`."""
    folder, position = work_dir.path / 'test' / 'images' / 'conditions', Path(file).name.partition('_')[0]
    if not position.isdigit() or not folder.is_dir():
        return {}
    paths = sorted(folder.glob(f'{position}_*.png'))
    return {path.stem.partition('_')[2]: path for path in paths
            if work_dir.inside('test', 'images', 'conditions', path.name)}
