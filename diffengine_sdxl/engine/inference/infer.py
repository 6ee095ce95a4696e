"""Pictures from the command line: prompts and settings to a folder of PNGs, each of which can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from diffengine_sdxl.engine import config as configs
from diffengine_sdxl.engine.config_check import accepted, check
from diffengine_sdxl.engine.inference import provenance
from diffengine_sdxl.engine.inference.gallery import Gallery
from diffengine_sdxl.engine.inference.inferencer import SDXLInferencer, split
from diffengine_sdxl.engine.inference.making import Asked, Making, Outcome, words
from diffengine_sdxl.engine.inference.prompt_files import read_prompts
from diffengine_sdxl.engine.inference.request import OPTIONS, Request
from diffengine_sdxl.engine.tested import NONE, weighted
from diffengine_sdxl.registry import ADAPTERS, nearest

#: Where in `infer_cfg` the options of the command line go.
OPTION_KEYS = ('prompt_2', 'negative_prompt', 'negative_prompt_2', 'image', 'mask_image', 'strength', 'height', 'width',
               'num_inference_steps', 'guidance_scale', 'num_images_per_prompt', 'seed', 'denoising_end')


@dataclass
class Plan:
    """What shall be made: the config, the pictures, what is loaded in place of the config's weights, and, of a picture
    that is made again, what it says of itself."""

    cfg: Config
    asked: list[Asked]
    weights: str | None
    before: dict[str, Any] | None = None


def infer(args: Any) -> Outcome:
    """Make what the command line asks for; what is there already is left as it is.

    Rows and pictures that cannot be made are told in `errors`; the others are made.

    Args:
        args: config (a config, or a PNG that was made here), prompt, prompts, OPTION_KEYS, condition, adapter, set,
            weights, out, device, batch_size, cfg_options; as tools/infer.py parses them.

    Raises:
        ValueError: nothing can be made: the config, the weights, an option, a folder that cannot be written.
    """
    again = Path(args.config).suffix.lower() == '.png'
    outcome = Outcome(Path(args.out or _default_folder(args.config, again)))
    gallery = Gallery(outcome.folder)
    plan = _again(args) if again else _from_config(args, outcome.errors)
    if not plan.asked:
        return outcome
    gallery.check_room()
    record = configs.resolve(plan.cfg)
    todo = []
    for one in plan.asked:
        try:
            one.request.check_texts()
            path = gallery.path_of(one.number, one.request)
            settings = provenance.record(one.request, record, plan.weights)
            if plan.before is not None:  # without the commits that were put in
                settings['config'] = plan.before['config']
            if gallery.done(path, settings):
                outcome.present += 1
            else:
                todo.append((one, path, settings))
        except ValueError as error:
            outcome.note(one, str(error))
    try:
        if todo:
            inferencer = _load(plan, args.device)
            told = [(one, path, provenance.with_commits(settings, record)) for one, path, settings in todo]
            Making(inferencer, gallery, outcome).make_all(told, args.batch_size)
    except KeyboardInterrupt as stop:
        outcome.fault = stop
    finally:
        try:
            if outcome.made or outcome.present:
                gallery.finish()
        except ValueError as error:
            outcome.errors.append(str(error))
    return outcome


def _load(plan: Plan, device: str | None) -> SDXLInferencer:
    """The models.

    Raises:
        ValueError: see SDXLInferencer; or they cannot be built of what a picture says, which may be a stranger's.
    """
    try:
        inferencer = SDXLInferencer(plan.cfg, plan.weights, device)
    except Exception as error:
        if (told := words(error)) is not None:
            raise ValueError(told) from error
        if plan.before is None:
            raise
        raise ValueError('The models that the picture names cannot be built of what it says of them '
                         f'({type(error).__name__}: {str(error)[:200]}).') from error
    if plan.before is None:
        return inferencer
    # With a network, what is not pinned may have moved just now.
    provenance.refuse_moved(plan.before, plan.before['config'], loaded=True)
    return inferencer


def _default_folder(name: str, again: bool) -> str:
    stem = Path(name).stem
    return str(Path(name).with_name(f'{stem}-again')) if again else str(Path('work_dirs') / stem / 'images')


def _from_config(args: Any, errors: list[str]) -> Plan:
    """Config and pictures of the command line; broken rows are noted in `errors`."""
    cfg = configs.load(args.config, args.cfg_options or ())
    if not cfg.get('model'):
        raise ValueError(f"The config '{args.config}' has no `model`, so it makes no pictures.")
    if args.weights == NONE and args.adapter:
        raise ValueError(f"--weights {NONE} is the base alone; it contradicts --adapter {args.adapter[0]}.")
    _add_adapters(cfg, args.adapter or ())
    given = {key: getattr(args, key) for key in OPTION_KEYS if getattr(args, key) is not None}
    given.update(_nested(configs.parse_overrides(args.set or (), '--set')))
    if conditions := _conditions(args.condition or ()):
        given['conditions'] = {**given.get('conditions', {}), **conditions}
    options = {key: given.pop(key) for key in OPTIONS if key in given}
    cfg.infer_cfg = {**(cfg.get('infer_cfg') or {}), **options}
    if args.weights == NONE:
        weighted(cfg, NONE)
    check(configs.resolve(cfg))
    defaults, _ = split(configs.resolve(cfg))
    rows: list[tuple[str, Mapping[str, Any] | None]] = [('', {'prompt': prompt}) for prompt in args.prompt or ()]
    if args.prompts is not None:
        for read in read_prompts(args.prompts, {**defaults, **given}):
            if read.error is not None:
                errors.append(read.error)
            rows.append((f"'{args.prompts}', line {read.number}", None if read.error else read.settings))
    elif not rows:
        rows = [('', {})]
    usual = Request.of(defaults, given, whole=False)
    asked: list[Asked] = []
    number = 0
    for where, row in rows:
        request = usual if row is None else Request.of(defaults, given, row)
        if row is not None:
            asked += [Asked(number + k, where, request.with_seed(k)) for k in range(request.num_images_per_prompt)]
        number += request.num_images_per_prompt
    return Plan(cfg, asked, args.weights)


def _again(args: Any) -> Plan:
    """Config and picture as a PNG tells them of itself. It may be a stranger's: what it names is checked first.

    Raises:
        ValueError: it tells nothing, what it was made of has changed, or an option contradicts it.
    """
    known = ('prompt', 'prompts', 'condition', 'adapter', 'set', 'weights', 'cfg_options', *OPTION_KEYS)
    if others := [name for name in known if getattr(args, name) not in (None, [])]:
        raise ValueError(f"'{args.config}' is made again as it says of itself; {', '.join(others)} cannot be changed. "
                         'Name the config to make another picture.')
    settings = provenance.read_png(args.config)
    provenance.check_size(args.config, settings)
    try:
        unchecked = provenance.check_unchanged(settings)
        config, moved = provenance.pin(settings)
        cfg = Config(config)
        check(cfg)
        request = Request.of(settings['request'])
    except ValueError as error:
        # What a stranger wrote may be of any length.
        raise ValueError(str(error)[:1000]) from error
    if unchecked:
        print(f"Not checked, as they come from elsewhere: {', '.join(unchecked)[:1000]}.")
    for line in moved:
        print(line)
    return Plan(cfg, [Asked(0, '', request.with_seed(0))], settings.get('weights'), settings)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """{'scales.style': 0.5} as {'scales': {'style': 0.5}}.

    Raises:
        ValueError: what should hold others has a value.
    """
    given: dict[str, Any] = {}
    for key, value in options.items():
        *path, last = key.split('.')
        node = given
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set '{key}': '{part}' is {node!r} already.")
        node[last] = value
    return given


def _conditions(items: Sequence[str]) -> dict[str, Any]:
    """['depth=d.png', 'ip=a.png', 'ip=b.png'] as {'depth': 'd.png', 'ip': ['a.png', 'b.png']}; 'ip.mask=m.png' too."""
    found: dict[str, dict[str, list[str]]] = {}
    for item in items:
        name, equals, source = item.partition('=')
        name, _, part = name.partition('.')
        if not equals or not name or not source or part not in ('', 'image', 'mask'):
            raise ValueError(f"--condition takes ADAPTER=FILE, or ADAPTER.mask=FILE; '{item}' is not of that form.")
        found.setdefault(name, {}).setdefault(part or 'image', []).append(source)
    single = {name: {part: files if len(files) > 1 else files[0] for part, files in parts.items()}
              for name, parts in found.items()}
    return {name: parts if 'mask' in parts else parts['image'] for name, parts in single.items()}


def _add_adapters(cfg: Config, items: Sequence[str]) -> None:
    """Put adapters of the command line into the config: 'style=FILE,scale=0.8,type=LoRA'.

    Raises:
        ValueError: it is not of that form, or names what the adapter's class does not know.
    """
    for item in items:
        head, *rest = item.split(',')
        name, equals, source = head.partition('=')
        pairs = dict(part.partition('=')[::2] for part in rest)
        if not equals or not name or not source or not all('=' in part for part in rest):
            raise ValueError(f"--adapter takes NAME=SOURCE[,scale=0.8][,type=LoRA][,subfolder=...]; '{item}' is not of "
                             'that form.')
        adapters = cfg.model.get('adapters') or {}
        old = adapters.get(name) or {}
        kind = pairs.pop('type', old.get('type', 'LoRA'))
        same = kind == old.get('type')
        known = list(accepted(ADAPTERS.get(kind)) or ())
        if unknown := [key for key in pairs if key not in known]:
            raise ValueError(f"--adapter '{item}': a {kind} has no '{unknown[0]}'.{nearest(unknown[0], known)}")
        values = configs.parse_overrides([f'{key}={value}' for key, value in pairs.items()], '--adapter')
        # Another file is not in the folder of the first.
        kept = {k: v for k, v in old.items() if k not in ('subfolder', 'weight_name', 'revision', 'variant')
                or k == 'variant' and kind == 'IPAdapter'} if same else {}
        cfg.model.adapters = ConfigDict({**adapters, name: {**kept, 'type': kind, 'weights': source, 'trainable': False,
                                                            **values}})
