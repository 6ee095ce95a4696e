"""Write `step<N>/README.md`: the metadata by huggingface_hub, the text by pages/templates/card.md."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import is_main_process

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine.model_card import facts, metrics
from diffengine_sdxl.engine.model_card.images import Images, write_images
from diffengine_sdxl.engine.model_card.loading import Loading, how_to_load
from diffengine_sdxl.engine.model_card.metrics import Measured
from diffengine_sdxl.errors import UserError, count_of, first_line
from diffengine_sdxl.loading.trained import PIPELINE, read_manifest
from diffengine_sdxl.pages.html import without_turns
from diffengine_sdxl.pages.markdown import Markdown, code, render_markdown

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from diffengine_sdxl.engine.runner import ExperimentRunner

FILE = 'README.md'
#: Kinds that read an image, whose condition `infer` is given by the adapter's name.
_READ_IMAGES = ('T2IAdapter', 'ControlNet', 'IPAdapter')


def update(runner: ExperimentRunner, step: int, repo_id: str | None = None) -> None:
    """Write the card of a step's export in the main process, if there is an export; warn if that fails."""
    work_dir = Path(runner.work_dir)
    if not is_main_process() or not (work_dir / f'step{step}' / 'manifest.json').is_file():
        return
    try:
        write_card(work_dir, step, repo_id=repo_id)
    except Exception as error:  # a card is no reason to lose a training
        folder = str(work_dir / f'step{step}')
        runner.logger.warning(f"The card '{folder}/{FILE}' could not be written: {first_line(error)} Write it later "
                              f"with: {shlex.join(['diffengine-sdxl', 'card', folder])}",
                              exc_info=not isinstance(error, UserError))


def write_card(work_dir: Path, step: int, test: Path | None = None, repo_id: str | None = None) -> None:
    """Write the README.md of the export `step<N>` and the images that it shows, from files alone.

    Args:
        work_dir: of the training.
        test: metrics.json of a test of this export; None: that of `work_dir`, if it is of this export, else the numbers
            of the step's validation.
        repo_id: of the hub, for the examples; None: they name the folder.

    Raises:
        UserError: there is no such export, a file is damaged, or the card cannot be written.
    """
    from huggingface_hub import ModelCard
    folder = work_dir / f'step{step}'
    private = read_manifest(folder)
    if private is None:
        raise UserError(f"'{folder}' has no manifest.json, so it is not an export of a training.")
    manifest = facts.public_manifest(private)
    run = work_dir / 'run.json'
    try:
        recorded = json.loads(run.read_text()) if run.is_file() else {}
    except ValueError as error:
        raise UserError(f"'{run}' is damaged ({first_line(error)}).") from error
    found = metrics.measured(work_dir, manifest, test)
    images = write_images(work_dir, step, *((found.folder, found.own) if found is not None else (None,)))
    headers = {name: facts.header(folder / name) for name in manifest['contents']}
    parts = _parts(folder, manifest, headers, images, repo_id)
    title = _title(headers, f'{work_dir.resolve().name}, step {step}')
    text = render_markdown('card.md', title=title, images=images, parts=parts,
                           **_text(manifest, recorded, headers, parts, found, repo_id or folder.name))
    card = ModelCard(f'---\n{_metadata(title, manifest, headers, parts, images, found).to_yaml()}\n---\n\n{text}')
    with atomic_files.replacing(folder / FILE) as temporary:
        temporary.write_text(without_turns(str(card)), encoding='utf-8')


def _title(headers: Mapping[str, Mapping[str, str]], default: str) -> str:
    """Return the title that all files have, or the default."""
    titles = {header['title'] for header in headers.values() if header.get('title')}
    return titles.pop() if len(titles) == 1 else default


def _first(headers: Mapping[str, Mapping[str, str]], key: str) -> str | None:
    return next((header[key] for header in headers.values() if header.get(key)), None)


def _words(headers: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the trigger words of all parts."""
    phrases = [word.strip() for header in headers.values() for word in header.get('trigger_phrase', '').split(',')]
    return [word for word in dict.fromkeys(phrases) if word]


def _base(manifest: Mapping[str, Any]) -> str:
    return str(manifest['base'].get('unet') or manifest['base'].get('pretrained') or 'random weights')


def _parts(folder: Path, manifest: Mapping[str, Any], headers: Mapping[str, Mapping[str, str]], images: Images,
           repo_id: str | None) -> dict[str, Loading]:
    """Return how each part of the export is loaded, by its name."""
    adapters, on_hub = manifest['config']['model'].get('adapters') or {}, manifest.get('hub') or ()
    pretrained = manifest['base'].get('pretrained')
    base = pretrained if facts.in_package(pretrained) else facts.hub_id(pretrained, on_hub) or 'BASE'
    if PIPELINE in manifest['contents']:  # the hub loads no pipeline from a subfolder
        base = f'{folder.name}/{PIPELINE}' if repo_id is None else 'PIPELINE'
    prompt, words = next((pair.prompt for pair in images.pairs if pair.prompt), 'a photo'), _words(headers)
    if not any(word in prompt for word in words):
        prompt = ', '.join([*words[:1], prompt])
    parts = {}
    for name in manifest['contents']:
        parts[name] = how_to_load(folder, name, adapters.get(name) or {}, base, repo_id, prompt)
        if facts.in_package(base):
            parts[name].notes.append(f'`{base}` is a folder in the Python package of that name; diffusers needs its '
                                     'path.')
        if base == 'PIPELINE' and name != PIPELINE:
            parts[name].notes.append(f'PIPELINE: the folder of the fine-tuned base, `{PIPELINE}/` of this repository.')
    return parts


def _shown(name: str, repo: str | None) -> Markdown:
    """Return a repository as a link, another name as code."""
    return Markdown(f'[{repo}](https://huggingface.co/{repo})') if repo else code(name)


def _text(manifest: Mapping[str, Any], run: Mapping[str, Any], headers: Mapping[str, Mapping[str, str]],
          parts: Mapping[str, Loading], found: Measured | None, source: str) -> dict[str, Any]:
    """Return what the template reads beside title, images and parts."""
    on_hub, config = manifest.get('hub') or (), manifest['config']
    base, vae = _base(manifest), manifest['base'].get('vae')
    titles = [part.title for part in parts.values()]
    what = titles[0] if len(titles) == 1 else f'{", ".join(titles[:-1])} and {titles[-1]}'
    sets = [{**one._asdict(), 'shown': _shown(one.name, one.repo)} for one in
            facts.data_sets(manifest.get('dataset'), on_hub)]
    base_id = facts.hub_id(base, on_hub)
    chosen = _first(headers, 'license')
    beside = [{'name': name, 'title': adapter.get('type'), 'scale': adapter.get('scale', 1.0),
               'weights': facts.public_name(adapter['weights'], on_hub) if adapter.get('weights') else ''}
              for name, adapter in (config['model'].get('adapters') or {}).items()
              if adapter and name not in manifest['contents']]
    return {
        'what': what[:1].upper() + what[1:], 'base': _shown(facts.public_name(base, on_hub), base_id),
        'vae': facts.public_name(vae, on_hub) if vae else '', 'data': sets,
        'rows': f'{manifest["rows"]:,}' if manifest.get('rows') else '',
        **{key: _first(headers, key) for key in ('description', 'author', 'usage_hint')},
        'words': _words(headers), 'beside': beside,
        'together': ', '.join(parts) if len(parts) > 1 else '', 'recipe': facts.recipe(manifest, run),
        'versions': manifest.get('versions') or {}, 'commit': manifest.get('git_commit'),
        'command': manifest['command'] or '',
        'infer': _infer(manifest, source), 'tested': found is not None and found.folder is not None,
        'license': _license_text(chosen, base_id), 'measured': metrics.table(found) if found else [],
        'compares': bool(found and metrics.compares(found)), 'measured_on': _measured_on(found, manifest, on_hub)}


def _infer(manifest: Mapping[str, Any], source: str) -> str:
    """Return the command that makes an image here with all adapters of the export; '' without adapters."""
    adapters, words = manifest['config']['model'].get('adapters') or {}, ['diffengine-sdxl', 'infer',
                                                                          'sdxl_text_to_image']
    for name in manifest['contents']:
        kind = (adapters.get(name) or {}).get('type')
        if name == PIPELINE or kind == 'ImageEncoder':
            continue
        words += ['--adapter', f'{name}={source},subfolder={name}']
        words += ['--condition', f'{name}=IMAGE.png'] if kind in _READ_IMAGES else []
    return shlex.join([*words, '--prompt', 'PROMPT']) if len(words) > 3 else ''


def _license_text(chosen: str | None, base: str | None) -> str | Markdown:
    if chosen:
        return chosen
    of_base = facts.license_of(None, base).get('license')
    return f"No licence was chosen; the base's is {of_base}." if of_base else (
        "No licence was chosen; the base's holds for what is made with it.")


def _measured_on(found: Measured | None, manifest: Mapping[str, Any], on_hub: Any) -> str:
    """Return the sentence on what the numbers were measured on."""
    if found is None:
        return ''
    names = [f'{one.name}{f", split {one.split}" if one.split else ""}' for one in
             facts.data_sets(found.dataset, on_hub)]
    images = int(max(result['num_samples'] or 0 for result in found.results[found.own].values()))
    counts = [count_of(number, one, several) for number, one, several in (
        (found.num_samples, 'sample', 'samples'), (found.seeds, 'seed each', 'seeds each'),
        (images, 'image', 'images')) if number]
    on = f' on {" and ".join(names)}' if names else ''
    return f'By a {found.kind} of step {manifest["step"]:,}{on}{": " if counts else ""}{", ".join(counts)}.'


def _metadata(title: str, manifest: Mapping[str, Any], headers: Mapping[str, Mapping[str, str]],
              parts: Mapping[str, Loading], images: Images, found: Measured | None) -> ModelCardData:
    """Return the hub's metadata."""
    from huggingface_hub import ModelCardData
    on_hub = manifest.get('hub') or ()
    base, words = facts.hub_id(_base(manifest), on_hub), _words(headers)
    tuned = PIPELINE in parts
    tags = ['stable-diffusion-xl', 'diffusers', *(tag for part in parts.values() for tag in part.tags), 'diffengine']
    tags += [tag.strip() for header in headers.values() for tag in header.get('tags', '').split(',')]
    datasets = [one.repo for one in facts.data_sets(manifest.get('dataset'), on_hub) if one.repo]
    fields: dict[str, Any] = {
        'base_model_relation': ('finetune' if tuned else 'adapter') if base else None,
        'instance_prompt': ', '.join(words) or None, **facts.license_of(_first(headers, 'license'), base),
        'widget': [{'text': pair.prompt, 'output': {'url': pair.adapted}} for pair in images.pairs if pair.prompt]}
    return ModelCardData(
        base_model=base, library_name='diffusers', pipeline_tag='text-to-image', datasets=datasets or None,
        tags=[tag for tag in dict.fromkeys(tags) if tag], model_name=title,
        eval_results=metrics.eval_results(found, on_hub) or None if found else None,
        **{key: value for key, value in fields.items() if value})
