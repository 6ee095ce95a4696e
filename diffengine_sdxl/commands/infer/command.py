"""Images from the command line: prompts and settings, or a PNG made here, to a folder of PNGs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from mmengine.config import Config

from diffengine_sdxl import config as configs
from diffengine_sdxl.commands.common import hide_loading_bars
from diffengine_sdxl.commands.infer import provenance
from diffengine_sdxl.commands.infer.image_folder import ImageFolder
from diffengine_sdxl.commands.infer.run import (
    OUT_OF_MEMORY,
    BatchRunner,
    ImageJob,
    PendingImage,
    RunResult,
    print_summary,
)
from diffengine_sdxl.commands.options import given_settings, set_settings
from diffengine_sdxl.config.check import check
from diffengine_sdxl.config.signatures import accepted
from diffengine_sdxl.datasets.image_files import is_url
from diffengine_sdxl.errors import UserError, first_line, listed, user_message
from diffengine_sdxl.inference.add_adapters import add_adapter, dict_at
from diffengine_sdxl.inference.inferencer import SDXLInferencer, split_infer_cfg
from diffengine_sdxl.limits import set_limits
from diffengine_sdxl.literals import parse_literal
from diffengine_sdxl.loading.trained import NONE, apply_weights, use_exported
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.request import OPTIONS, SETTINGS, Request

#: Limit on the characters of an error about a PNG's settings, which may be of any length.
MAX_ERROR = 1000


@dataclass
class Plan:
    """What to make.

    Attributes:
        config: resolved and checked.
        rows: the number of the first image, the place and the request of each row; a request may be for many images.
        weights: see `SDXLInferencer`.
        recorded: the settings of a PNG that is made again, else None.
    """

    config: Config
    rows: list[tuple[int, str, Request]]
    weights: str | None
    recorded: dict[str, Any] | None = None

    def jobs(self) -> Iterator[ImageJob]:
        """Yield the images, one by one: a row may ask for a million."""
        for number, where, request in self.rows:
            for k in range(request.num_images_per_prompt):
                yield ImageJob(number + k, where, request.with_seed(k))


def run(args: Any, _: Any) -> int:
    """Make images; return the exit code, 1 also if one of several failed.

    Args:
        args: as `cli` parses them.

    Raises:
        UserError: see `infer`.
    """
    if args.batch_size < 1:
        raise UserError(f'--batch-size {args.batch_size} must be at least 1.')
    hide_loading_bars()
    return print_summary(infer(args))


def infer(args: Any) -> RunResult:
    """Make the images of the command line that do not exist yet.

    Rows and images that fail are listed in `errors`; the others are made.

    Args:
        args: as `commands.options` parses them.

    Raises:
        UserError: the config, the weights, an option or the folder is unusable.
    """
    is_png = Path(args.config).suffix.lower() == '.png'
    result = RunResult(Path(args.out or _default_folder(args.config, is_png)))
    folder = ImageFolder(result.folder)
    plan = _plan_from_png(args) if is_png else _plan_from_config(args, result.errors)
    if not plan.rows:
        return result
    folder.check_writable()
    try:
        pending = _pending(plan, folder, result)
        if (first := next(pending, None)) is not None:
            inferencer = _load(plan, args.device)
            images = ((job, path, provenance.add_commits(settings, plan.config))
                      for job, path, settings in chain([first], pending))
            total = sum(request.num_images_per_prompt for *_, request in plan.rows)
            BatchRunner(inferencer, folder, result).make_all(images, args.batch_size, total)
    except KeyboardInterrupt as stop:
        result.fault = stop
    finally:
        try:
            if result.made or result.present:
                folder.finish()
            else:
                folder.remove_if_empty()
        except UserError as error:
            result.errors.append(str(error))
    return result


def _default_folder(name: str, is_png: bool) -> str:
    stem = Path(name).stem
    return str(Path(name).with_name(f'{stem}-again')) if is_png else str(Path('work_dirs') / stem / 'images')


def _pending(plan: Plan, folder: ImageFolder, result: RunResult) -> Iterator[PendingImage]:
    """Yield the images that do not exist yet."""
    for job in plan.jobs():
        try:
            job.request.check_texts()
            path = folder.path_of(job.number, job.request)
            settings = provenance.record(job.request, plan.config, plan.weights)
            if plan.recorded is not None:  # without the commits that `pin` added
                settings['config'] = plan.recorded['config']
            if not folder.done(path, settings):
                yield job, path, settings
                continue
            result.present += 1
        except UserError as error:
            result.add_error(job, str(error))


def _load(plan: Plan, device: str | None) -> SDXLInferencer:
    """Build the models.

    Raises:
        UserError: see SDXLInferencer; or the settings of a PNG, which are untrusted, cannot be built.
    """
    if plan.recorded is None:
        return SDXLInferencer(plan.config, plan.weights, device, checked=True)
    from diffengine_sdxl.commands.infer import untrusted
    try:
        inferencer = SDXLInferencer(plan.config, plan.weights, device, checked=True)
    except Exception as error:
        if (message := user_message(error, OUT_OF_MEMORY)) is not None:
            raise UserError(message) from error
        raise UserError(f'The models cannot be built from the settings in the PNG ({type(error).__name__}: '
                        f'{first_line(error)[:200]}).') from error
    # What is not pinned may have moved on the hub since `pin`.
    untrusted.refuse_moved(plan.recorded, plan.recorded['config'], loaded=True)
    return inferencer


def _plan_from_config(args: Any, errors: list[str]) -> Plan:
    """Plan the images of a config and the command line; add broken rows to `errors`."""
    cfg = configs.resolve(configs.read(args.config, args.cfg_options or ()))
    if not isinstance(cfg.get('model'), Mapping):
        raise UserError(f"The config '{args.config}' has no `model`, so it makes no images.")
    if args.weights == NONE and args.adapter:
        raise UserError(f'--weights {NONE} is the base without adapters; it contradicts --adapter {args.adapter[0]}.')
    for item in args.adapter or ():
        _add_adapter(cfg, item)
    others = set_settings(args.set or ())
    if options := {key: others.pop(key) for key in OPTIONS if key in others}:
        cfg.infer_cfg = {**dict_at(cfg, 'infer_cfg'), **options}
    layers = (given_settings(args), others, {'conditions': _conditions(args.condition or (), cfg)})
    check(cfg)
    set_limits(cfg.get('limits') or {})  # before prompts are read
    weights = use_exported(cfg, args.weights)
    if weights == NONE:
        apply_weights(cfg, NONE)
    defaults, _ = split_infer_cfg(cfg)
    rows: list[tuple[int, str, Request]] = []
    number = 0
    for where, request in _requests(args, (defaults, *layers), errors):
        if where is not None:
            rows.append((number, where, request))
        number += request.num_images_per_prompt
    return Plan(cfg, rows, weights)


def _requests(args: Any, layers: Sequence[Mapping[str, Any]], errors: list[str]) -> list[tuple[str | None, Request]]:
    """Return each row's place, or None if it is broken, and its request; without rows, that of the config's prompt."""
    requests: list[tuple[str | None, Request]] = [('', Request.of(*layers, {'prompt': prompt}))
                                                  for prompt in args.prompt or ()]
    if args.prompts is not None:
        from diffengine_sdxl.commands.infer.prompt_files import read_prompts
        # Broken rows keep their numbers.
        usual = Request.of(*layers, whole=False)
        for row in read_prompts(args.prompts, *layers):
            if row.request is None:
                errors.append(str(row.error))
            requests.append((f"'{args.prompts}', line {row.number}" if row.request else None, row.request or usual))
    return requests or [('', Request.of(*layers))]


def _plan_from_png(args: Any) -> Plan:
    """Plan to make an image again by the settings in its PNG, which are untrusted.

    Raises:
        UserError: they are missing or invalid, a file has changed, or an option contradicts them.
    """
    from diffengine_sdxl.commands.infer import untrusted
    options = ('prompts', 'condition', 'adapter', 'set', 'weights', *SETTINGS)
    raised = configs.parse_overrides(args.cfg_options or ())
    if others := [key for key in raised if not key.startswith('limits.')]:
        raise UserError(f"'{args.config}' is made again by its own settings, so --cfg-options '{others[0]}' cannot be "
                        'changed; only limits.* can.')
    set_limits({key.removeprefix('limits.'): value for key, value in raised.items()})
    if conflicts := [name for name in options if getattr(args, name, None) is not None]:
        raise UserError(f"'{args.config}' is made again by its own settings, so {', '.join(conflicts)} cannot be "
                        'changed. Name the config to make another image.')
    recorded = untrusted.read_png(args.config)
    untrusted.check_image_size(args.config, recorded)
    try:
        unchecked = untrusted.check_unchanged(recorded)
        pinned, notes = untrusted.pin(recorded)
        cfg = configs.resolve(Config(pinned))
        check(cfg)
        request = Request.of(recorded['request'])
    except UserError as error:
        raise UserError(str(error)[:MAX_ERROR]) from error
    if unchecked:
        print(f"Not checked, as they are not local: {', '.join(unchecked)[:MAX_ERROR]}.")
    for note in notes:
        print(note)
    return Plan(cfg, [(0, '', replace(request, num_images_per_prompt=1))], recorded.get('weights'), recorded)


def _conditions(items: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ['depth=d.png', 'ip=a.png', 'ip=b.png'] as {'depth': 'd.png', 'ip': ['a.png', 'b.png']}.

    'ip.mask=m.png' adds a mask; a file without a name is for the only adapter that reads images.
    """
    adapters = dict_at(dict_at(config, 'model'), 'adapters')
    files: dict[str, dict[str, list[str]]] = {}
    for item in items:
        name, equals, source = item.partition('=')
        name, _, part = name.partition('.')
        if not equals or is_url(item) or name not in adapters and Path(item).is_file():
            name, part, source = _only_reader(adapters, item), '', item
        if not name or not source or part not in ('', 'image', 'mask'):
            raise UserError(f"--condition takes ADAPTER=FILE or ADAPTER.mask=FILE, not '{item}'.")
        files.setdefault(name, {}).setdefault(part or 'image', []).append(source)
    single = {name: {part: paths if len(paths) > 1 else paths[0] for part, paths in parts.items()}
              for name, parts in files.items()}
    return {name: parts if 'mask' in parts else parts['image'] for name, parts in single.items()}


def _only_reader(adapters: Mapping[str, Any], item: str) -> str:
    """Return the name of the only adapter that reads images.

    Raises:
        UserError: there are none or several.
    """
    readers = [name for name, adapter in adapters.items() if isinstance(adapter, Mapping)
               and 'condition_key' in (accepted(ADAPTERS.get(str(adapter.get('type')))) or ())]
    if len(readers) != 1:
        several = f'several read images ({listed(readers)}); write --condition NAME={item}'
        raise UserError(f"--condition '{item}' names no adapter, and "
                        f"{several if readers else 'no adapter of the config reads images'}.")
    return readers[0]


def _add_adapter(cfg: Config, item: str) -> None:
    """Add an adapter of the command line to the config: 'style=FILE,scale=0.8'.

    Raises:
        UserError: it is not of that form; or see `add_adapter`.
    """
    name, equals, text = item.partition('=')
    if not equals or not name or text[:1] in ('', ','):
        raise UserError(f"--adapter takes NAME=SOURCE[,scale=0.8][,type=LoRA][,subfolder=...], not '{item}'.")
    add_adapter(cfg, name, parse_literal(f'dict(weights={text})', f"--adapter '{item}'"))
