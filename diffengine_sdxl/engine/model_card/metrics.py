"""The measured numbers of an export: of a test of it, else of the validation of its step."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.model_card.facts import data_sets
from diffengine_sdxl.engine.report import Results
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.evaluation.base import difference_name
from diffengine_sdxl.loading.trained import PIPELINE
from diffengine_sdxl.models.generate import ADAPTED, BASE, COMPARED
from diffengine_sdxl.pages.numbers import format_number, format_p


@dataclass(frozen=True)
class Measured:
    """Results, and what they were measured on.

    Attributes:
        kind: 'test' or 'validation'. results: see `report.Results`.
        own: the image set that this export made; 'compared' if it is the one that a test compared with.
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

    A test is of the export if it was of the weights whose digests the manifest has, wherever these lay.

    Args:
        manifest: of the export.
        metrics: a metrics.json of a test of this export; None: the work_dir's, if it is of this export.

    Raises:
        UserError: `metrics` is none of a test, or of a test of other weights; or another file is damaged.
    """
    step, path = manifest['step'], metrics or work_dir / 'metrics.json'
    if path.is_file():
        record = _read(path.parent / 'test' / 'images' / 'record.json')
        results, own = _results(path), _own_images(record, manifest)
        if own is not None and results.get(own):
            return _measured('test', results, own, record.get('dataset'), record.get('seeds'),
                             record.get('num_samples'), path.parent)
        if metrics is not None:
            of = f" It was of {record['weights']}." if record.get('weights') else ''
            raise UserError(f"'{metrics}' is not of a test of step {step}: the weights recorded beside it, in "
                            f"test/images/record.json, are not those of '{work_dir}/step{step}'.{of} Test these, with "
                            f'--checkpoint {work_dir}/step{step} and a --work-dir of its own.')
    path = work_dir / 'val' / f'step{step}.json'
    if not path.is_file():
        return None
    config, results = manifest['config'], report.read(path)
    own = BASE if manifest['contents'] == [PIPELINE] and ADAPTED not in results else ADAPTED
    seeds = (config.get('val_cfg') or {}).get('seeds')
    return _measured('validation', results, own, (config.get('val_dataloader') or {}).get('dataset'),
                     list(range(seeds)) if isinstance(seeds, int) else seeds) if results.get(own) else None


def _measured(kind: str, results: Results, own: str, dataset: Any, seeds: Any, num_samples: int | None = None,
              folder: Path | None = None) -> Measured:
    return Measured(kind, results, own, dataset or {}, num_samples, len(seeds) if seeds else None, folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it, and test again.") from error
    return found if isinstance(found, dict) else {}


def _results(path: Path) -> Results:
    """Read a metrics.json, which a user may have named.

    Raises:
        UserError: it is none.
    """
    try:
        results = json.loads(path.read_text())
        for number in (one[key] for metrics in results.values() for one in metrics.values()
                       for key in ('value', 'low', 'high', 'num_samples', 'p', 'better')):
            if number is not None and not math.isfinite(number):
                raise ValueError(number)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"'{path}' is no metrics.json of a test ({type(error).__name__}: {first_line(error)})."
                        ) from error
    return results


def _own_images(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """Return the image set of a test that the export's weights made; None if there is none."""
    own = manifest.get('weights') or {}
    for image_set in (ADAPTED, COMPARED, BASE) if own else ():
        made = ((record.get('image_sets') or {}).get(image_set) or {}).get('weights') or {}
        if all(made.get(name) == digest for name, digest in own.items()):
            return image_set
    return None


def eval_results(found: Measured, on_hub: Collection[str]) -> list[EvalResult]:
    """Return the values of the export's own images for the hub's metadata, the interval in each one's `metric_args`."""
    data = next(data_sets(found.dataset, on_hub), None)
    minus_base, results = found.results.get(difference_name(found.own, BASE), {}), []
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
    other = BASE if compares(found) else ''
    minus, rows = found.results.get(difference_name(found.own, BASE), {}), []
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
    chance = f', p {format_p(result["p"])}' if result.get('p') is not None else ''
    return f'{plus}{format_number(result["value"])}{interval}{chance}'


def compares(found: Measured) -> bool:
    """Return whether the table has the base's numbers and the difference."""
    return found.own == ADAPTED and BASE in found.results
