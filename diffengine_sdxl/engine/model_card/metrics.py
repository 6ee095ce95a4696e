"""The measured numbers of an export: of a test of it, else of the validation of its step."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.model_card.facts import data_sets
from diffengine_sdxl.engine.report import Results
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import difference_name
from diffengine_sdxl.loading.trained import PIPELINE
from diffengine_sdxl.models.generate import ADAPTED, BASE
from diffengine_sdxl.pages.numbers import format_number


@dataclass(frozen=True)
class Measured:
    """Results, and what they were measured on.

    Attributes:
        kind: 'test' or 'validation'. results: see `report.Results`.
        own: the image set that this export made.
        dataset: the config of the data set, {} if unknown. num_samples, seeds: of it; None if unknown.
        folder: the work_dir of the test; None of a validation.
    """

    kind: str
    results: Results
    own: str
    dataset: Mapping[str, Any]
    num_samples: int | None = None
    seeds: int | None = None
    folder: Path | None = None


def measured(work_dir: Path, manifest: Mapping[str, Any], metrics: Path | None = None) -> Measured | None:
    """Return the numbers of an export, or None if there are none of it.

    Args:
        manifest: of the export.
        metrics: a metrics.json of a test of this export; None: the work_dir's, if it is of this step.

    Raises:
        UserError: `metrics` or another file is damaged.
    """
    step, path = manifest['step'], metrics or work_dir / 'metrics.json'
    record = _read(path.parent / 'test' / 'images' / 'record.json')
    if metrics is not None or path.is_file() and _is_of(record, work_dir, step):
        results, config, kind = report.read(path), record.get('dataset') or {}, 'test'
    elif (path := work_dir / 'val' / f'step{step}.json').is_file():
        settings = manifest['config']
        results, config, kind = report.read(path), (settings.get('val_dataloader') or {}).get('dataset') or {}, (
            'validation')
        seeds = (settings.get('val_cfg') or {}).get('seeds')
        record = {'seeds': list(range(seeds)) if isinstance(seeds, int) else seeds}
    else:
        return None
    own = BASE if manifest['contents'] == [PIPELINE] and ADAPTED not in results else ADAPTED
    if not results.get(own):
        return None
    seeds = record.get('seeds')
    return Measured(kind, results, own, config, record.get('num_samples'), len(seeds) if seeds else None,
                    path.parent if kind == 'test' else None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it, and test again.") from error
    return found if isinstance(found, dict) else {}


def _is_of(record: Mapping[str, Any], work_dir: Path, step: int) -> bool:
    """Return whether a test was of this step's checkpoint or of its export."""
    tested = record.get('checkpoint')
    if not isinstance(tested, str):
        return bool(record.get('step') == step)
    path, export = Path(tested).resolve(), (work_dir / f'step{step}').resolve()
    return path == export.with_suffix('.pth') or path.is_relative_to(export)


def eval_results(found: Measured, on_hub: Collection[str]) -> list[EvalResult]:
    """Return the values of the export's own images for the hub's metadata, the interval in each one's `metric_args`."""
    data = next(data_sets(found.dataset, on_hub), None)
    minus_base, results = found.results.get(difference_name(ADAPTED, BASE), {}), []
    for name, result in found.results[found.own].items():
        if result['value'] is None:
            continue
        arguments: dict[str, Any] = {'num_images': result['num_samples'], 'interval_95': _interval(result)}
        if (difference := minus_base.get(name)) and difference['value'] is not None:
            arguments |= {'minus_base': difference['value'], 'minus_base_interval_95': _interval(difference)}
        results.append(EvalResult(
            task_type='text-to-image', task_name='Text-to-Image', metric_type=name, metric_name=name,
            metric_value=result['value'], metric_args={k: v for k, v in arguments.items() if v is not None},
            dataset_type=(data.repo or data.kind) if data else 'unknown', dataset_name=data.name if data else 'unknown',
            dataset_split=data.split or None if data else None))
    return results


def _interval(result: Mapping[str, Any]) -> list[float] | None:
    bounds = [result['low'], result['high']]
    return None if None in bounds else bounds


def table(found: Measured) -> list[dict[str, str]]:
    """Return the rows of the table: name, better ('higher', 'lower' or ''), own, base, difference; '' for none."""
    other = BASE if found.own == ADAPTED else ''
    minus, rows = found.results.get(difference_name(ADAPTED, BASE), {}), []
    for name, result in found.results[found.own].items():
        if result['value'] is None:
            continue
        rows.append({'name': name, 'better': {1: 'higher', -1: 'lower'}.get(int(result.get('better') or 0), ''),
                     'own': _text(result), 'base': _text(found.results.get(other, {}).get(name)),
                     'difference': _text(minus.get(name), sign=True)})
    return rows


def _text(result: Mapping[str, Any] | None, sign: bool = False) -> str:
    if not result or result['value'] is None:
        return ''
    plus = '+' if sign and result['value'] > 0 else ''
    interval = '' if _interval(result) is None else (
        f' ({format_number(result["low"])} to {format_number(result["high"])})')
    chance = f', p = {result["p"]:.3g}' if result.get('p') is not None else ''
    return f'{plus}{format_number(result["value"])}{interval}{chance}'


def compares(found: Measured) -> bool:
    """Return whether the table has the base's numbers and the difference."""
    return found.own == ADAPTED and BASE in found.results
