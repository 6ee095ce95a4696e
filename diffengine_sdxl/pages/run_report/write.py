"""Write report.html of a work_dir."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from diffengine_sdxl import atomic_files
from diffengine_sdxl.errors import UserError, count_of, listed
from diffengine_sdxl.pages import html
from diffengine_sdxl.pages.embed import Embedded, Embedder
from diffengine_sdxl.pages.numbers import finite, format_number
from diffengine_sdxl.pages.run_report.curves import draw_curves
from diffengine_sdxl.pages.run_report.examples import find_extremes
from diffengine_sdxl.pages.run_report.files import WorkDir, at, read_settings
from diffengine_sdxl.pages.run_report.metrics import Results, by_metric, read_results, summary

NAME = 'report.html'
#: Bytes of all images together, and the side of a grid of images in pixels.
MAX_IMAGES, SHEET = 8 * 2**20, 1600
#: Bytes of a config that is shown.
MAX_CONFIG = 2**18
#: Files that the report links to, and what they are.
FILES = {'metrics.json': 'results of the test', 'metrics.csv': 'the same as a table',
         'test/samples.csv': 'the numbers of each image of the test', 'val_loss.jsonl': 'losses on held-out data',
         'curves.jsonl': 'loss and learning rate of each step', 'curves.png': 'the curves as an image',
         'best.json': 'the best step', 'data_report.txt': 'the training data'}


class Sheet(NamedTuple):
    """A grid of images: its file, and the image in the page."""

    title: str
    path: str
    link: str
    image: Embedded


class Run(NamedTuple):
    """What is known of the training in a work_dir.

    Attributes:
        step: the last one that left a trace; 0 for none.
        max_steps: what the config asks for; None if unknown.
        config: the file of the dumped config, and its text.
        manifest: of the last export; {} for none.
        stopped: why the run ended before its last step; None if it did not, or has gone on since.
    """

    step: int
    max_steps: int | None
    config: tuple[Path, str] | None
    manifest: Mapping[str, Any]
    stopped: str | None


def write_report(work_dir: Path, tell: Callable[[str], object] = lambda note: None) -> Path:
    """Write `<work_dir>/report.html` of what a training and its tests left there, also while they run.

    Files that are missing or damaged are left out. The page needs no other file and fetches nothing.

    Args:
        tell: called with each sentence on what is left out.

    Returns:
        Its path.

    Raises:
        UserError: the folder holds neither a training nor a test, a report.html of another origin is there, or the
            disk is full.
    """
    path = work_dir / NAME
    if os.path.lexists(path) and not html.is_ours(path):
        raise UserError(f"'{path}' was not written by diffengine_sdxl, and would be overwritten; move it.")
    page = _page(files := WorkDir(work_dir))
    with atomic_files.replacing(path) as temporary:
        temporary.write_bytes(page.encode('utf-8', 'replace'))
    for note in files.notes:
        tell(note)
    return path


def _page(files: WorkDir) -> str:
    """Return the text of the page."""
    validations = {step: results for step, path in files.steps(r'step(\d+)\.json', 'val').items()
                   if (results := read_results(files.json('val', path.name)))}
    test, best = read_results(files.json('metrics.json')), files.json('best.json')
    run = _read_run(files, validations)
    test_config = _config(files, 'test')
    if not (run.step or run.config or test or test_config):
        raise UserError(f"'{files.path}' holds neither a training nor a test; name the work dir of one.")
    embed = Embedder(MAX_IMAGES)
    charts, note = draw_curves(files, validations, best)
    sheets = _sheets(files, embed)
    extremes = find_extremes(files, test, embed)
    files.notes += [note] * bool(note) + _image_notes(files, embed)
    return html.render(
        'report.html', title=files.path.name or str(files.path), status=_status(files, run, best, test, test_config),
        tested=_tested(files), test=by_metric(test), test_summary=summary(test), charts=charts,
        validation=by_metric(validations[max(validations)]) if validations else [],
        validation_step=max(validations, default=0), sheets=sheets, extremes=extremes,
        commands=_commands(files, run, test_config), facts=_facts(run),
        configs=[(str(file.relative_to(files.path)), text) for file, text in filter(None, (run.config, test_config))],
        links=_links(files), notes=files.notes)


def _read_run(files: WorkDir, validations: Mapping[int, Results]) -> Run:
    exports = files.steps(r'step(\d+)')
    manifest = next((found for step in reversed(exports) if (found := files.json(f'step{step}', 'manifest.json'))), {})
    rows, _ = files.rows('curves.jsonl')
    config = _config(files, '.')
    settings = read_settings(config[1]) if config is not None else at(manifest, 'config')
    longest = finite(at(settings, 'train_cfg', 'max_iters')) or finite(manifest.get('max_iters'))
    step = max([0, *validations, *exports, *files.steps(r'step(\d+)\.pth'), *(int(row['step']) for row in rows[-1:])])
    record = files.json('early_stop.json')
    ended = finite(record.get('step'))
    return Run(step, None if longest is None else int(longest), config, manifest,
               str(record.get('reason', '')) if ended is not None and step <= ended else None)


def _config(files: WorkDir, folder: str) -> tuple[Path, str] | None:
    path = files.dumped_config(folder)
    text = None if path is None else files.text(folder, path.name, max_bytes=MAX_CONFIG)
    return None if path is None or text is None else (path, text)


def _status(files: WorkDir, run: Run, best: Mapping[str, Any], test: Results,
            test_config: tuple[Path, str] | None) -> list[str]:
    """Return how far the run is, in a few words each."""
    lines = []
    if run.step:
        total = '' if run.max_steps is None else f' of {run.max_steps:,}'
        lines.append(f'{run.step:,}{total} steps')
        lines += [] if run.stopped is None else [f'stopped early: {run.stopped}']
    elif run.config:
        lines.append('no step is logged yet')
    if (step := finite(best.get('step'))) is not None:
        value = finite(best.get('value'))
        lines.append(f'best step {step:,g} by {best.get("metric", "")}'
                     f'{"" if value is None else f" ({format_number(value)})"}')
    if test_config is not None and not test:
        damaged = files.inside('metrics.json') is not None
        lines.append('metrics.json of the test is damaged' if damaged else 'a test began and has no results yet')
    return lines


def _tested(files: WorkDir) -> str:
    """Return what the test in the folder was of, as far as its files say."""
    record = files.json('test', 'images', 'record.json')
    weights, count, seeds = (record.get(key) for key in ('weights', 'num_samples', 'seeds'))
    parts = [weights] if isinstance(weights, str) else []
    parts += [count_of(int(number), 'sample', 'samples')] if (number := finite(count)) else []
    parts += [count_of(len(seeds), 'seed', 'seeds')] if isinstance(seeds, list) else []
    return ', '.join(parts)


def _sheets(files: WorkDir, embed: Embedder) -> list[Sheet]:
    latest = list(files.steps(r'step(\d+)\.png', 'samples').items())[-1:]
    wanted = [('Samples, step by step, from the same noise', ('samples', 'steps.png')),
              *((f'Samples at step {step:,}', ('samples', path.name)) for step, path in latest),
              ('Test', ('test', 'pictures.png')), ('Last validation', ('val', 'pictures.png'))]
    return [Sheet(title, '/'.join(parts), quote('/'.join(parts)), image) for title, parts in wanted
            if (path := files.inside(*parts)) is not None and (image := embed(path, SHEET)) is not None]


def _image_notes(files: WorkDir, embed: Embedder) -> list[str]:
    def names(paths: Sequence[Path]) -> str:
        return listed((path.relative_to(files.path) for path in paths), 5)
    return ([f'The page holds {MAX_IMAGES / 2**20:g} MiB of images; left out: {names(embed.left_out)}.']
            if embed.left_out else []) + (
            [f'Not readable as images: {names(embed.unreadable)}.'] if embed.unreadable else [])


def _commands(files: WorkDir, run: Run, test_config: tuple[Path, str] | None) -> list[tuple[str, str]]:
    """Return (what it does, command)."""
    folder = str(files.path)
    commands = []
    if isinstance(command := run.manifest.get('command'), str):
        commands.append(('made this run, from the folder in which it was started', command))
    if run.config is not None:
        again = ['diffengine-sdxl', 'train', str(run.config[0])]
        commands.append(('trains it again, with all settings of the config', shlex.join([*again, '--work-dir', 'NEW'])))
        if run.step and run.max_steps is not None and run.step < run.max_steps and run.stopped is None:
            commands.append(('continues it', shlex.join([*again, '--work-dir', folder, '--resume'])))
    settings = {} if test_config is None else read_settings(test_config[1])
    if test_config is not None and (weights := settings.get('load_from')):
        weights = files.json('test', 'images', 'record.json').get('checkpoint') or weights
        compare = at(settings, 'test_cfg', 'compare')
        relative = any(not os.path.isabs(str(path)) for path in (weights, compare) if path)
        where = ', from the folder in which it was started' if relative else ''
        commands.append((f'repeats the test{where}', shlex.join(
            ['diffengine-sdxl', 'test', str(test_config[0]), '--checkpoint', str(weights),
             *(['--compare', str(compare)] if compare else []), '--work-dir', folder])))
    commands.append(('writes this report again', shlex.join(['diffengine-sdxl', 'report', folder])))
    return commands


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what the last export's manifest says of the run: name, value."""
    base, versions = at(run.manifest, 'base', 'pretrained'), run.manifest.get('versions')
    facts = {'base': base, 'exported': run.manifest.get('time'), 'seed': run.manifest.get('seed'),
             'commit': run.manifest.get('git_commit'),
             'versions': ', '.join(f'{name} {version}' for name, version in versions.items())
             if isinstance(versions, dict) else None}
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _links(files: WorkDir) -> list[tuple[str, str, str]]:
    """Return (link, name, what it is) of the files that are there."""
    links = [(quote(name), name, what) for name, what in FILES.items() if files.inside(*name.split('/')) is not None]
    latest = list(files.steps(r'step(\d+)').items())[-3:]
    return links + [(f'{quote(path.name)}/', f'{path.name}/', 'export') for _, path in reversed(latest)]
