"""Export one adapter of a config for other tools: write it, load it into a fresh model, and compare the outputs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffengine_sdxl import atomic_files, rng
from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.adapters.formats import diffusers_lora, kohya, modelspec, peft_lora
from diffengine_sdxl.adapters.lora import LoRA
from diffengine_sdxl.commands.common import hide_loading_bars
from diffengine_sdxl.config import load, resolve, to_plain
from diffengine_sdxl.errors import UserError, did_you_mean, one_of
from diffengine_sdxl.loading import checkpoint as checkpoints
from diffengine_sdxl.loading.trained import (
    PIPELINE,
    read_manifest,
    resolve_checkpoint,
    trained_weights,
    use_trained_base,
)
from diffengine_sdxl.models.request_batch import request_batch
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import ADAPTERS, MODELS
from diffengine_sdxl.request import Request

FORMATS = ('diffusers', 'peft', 'kohya', 'original')
DTYPES = ('float16', 'bfloat16', 'float32')
#: Largest difference after reloading, relative to the norm of the output and to that of the adapter's effect.
MAX_OF_OUTPUT, MAX_OF_EFFECT = 1e-5, 0.05
STOPPED = 'Stopped; nothing was written.'


def run(args: Any, _: Any) -> None:
    """Export one adapter.

    Args:
        args: config, out, checkpoint, adapter, format, dtype, cfg_options; as `cli` parses them.

    Raises:
        UserError: see `convert`.
    """
    hide_loading_bars()
    cfg = load(args.config, args.cfg_options or ())
    for line in convert(cfg, args.out, args.checkpoint, args.adapter, args.format, args.dtype):
        print(line)


def convert(config: Config, out: Path, checkpoint: str | None = None, name: str | None = None,
            form: str | None = None, dtype: str | None = None) -> list[str]:
    """Write adapter `name` of `config` to `out`, complete and compared or not at all.

    Computes in fp32 (fp64 if the config's dtype is), at scale 1 and without active_range, mask and blocks, which files
    don't store.

    Args:
        config: as `config.load.load` returns it.
        out: a folder, or for 'kohya' a file '*.safetensors'; must not exist.
        checkpoint: where the weights are: a step<N>.pth (its EMA weights, if it has some), a work_dir, for its latest,
            an export's folder, or one adapter's; None for the `weights` in the config.
        name: of the adapter; None if there is only one.
        form: of FORMATS; None for that of the adapter's own ecosystem.
        dtype: of DTYPES, to round the weights to; None keeps them as they are.

    Returns:
        Sentences: what was written, how it compares, and what loads it.

    Raises:
        UserError: the adapter, checkpoint or format does not exist, or `out` does.
        RuntimeError: the file does not give the same output.
    """
    if form is not None:
        one_of('format', form, FORMATS)
    if dtype is not None:
        one_of('dtype', dtype, DTYPES)
    model_config, name = _model_config(config, name)
    out = out.expanduser()
    if out.exists():
        raise UserError(f"'{out}' exists; name another file or folder, or remove it.")
    model = _load_model(model_config, checkpoint, name)
    adapter = model.adapters[name]
    target = _target(adapter, model, form, out)
    before = _predict(model, name)
    with model.disable_adapters():
        effect = float((before - _predict(model, name)).norm())
    if effect == 0:
        raise UserError(f"Adapter '{name}' does not change the denoiser's output, so its export could not be checked: "
                        'its weights are untrained. Train it, or name its weights.')
    report = []
    if dtype is not None:
        rounded = _round(model, name, getattr(torch, dtype))
        report.append(f'Rounding to {dtype} changes its effect by {float((rounded - before).norm()) / effect:.2g} of '
                      'it.')
        before = rounded
    reload_config, header = _reload_config(model_config, adapter, name), _header(config, adapter, model, out)
    with atomic_files.replacing(out) as temporary:
        if dtype is not None:
            _cast(adapter, getattr(torch, dtype))
        target.write(temporary)
        modelspec.stamp(temporary, header)
        form, readers = target.form, target.readers
        # Free the memory: two SDXLs may not fit.
        del model, adapter, target
        gc.collect()
        reload_config['adapters'][name]['weights'] = str(temporary)
        report.append(_compare(before, _predict(_build(reload_config), name), effect, out))
        report.insert(0, f"'{out}': {_num_tensors(temporary)} tensors, format '{form}'; all matched when loaded again.")
    return [*report, readers]


def _model_config(config: Config, name: str | None) -> tuple[dict[str, Any], str]:
    """Return the config of the model to build, in fp32, and the adapter's name."""
    cfg = to_plain(resolve(config))
    model = cfg.get('model') or {}
    adapters = {n: a for n, a in (model.get('adapters') or {}).items() if a}
    if name is None and len(adapters) == 1:
        name = next(iter(adapters))
    if name is None or name not in adapters:
        hint = did_you_mean(name, list(adapters)) if name else ''
        raise UserError((f"The config has no adapter '{name}'.{hint}" if name else 'Name the adapter (--adapter).')
                        + f' It has {", ".join(adapters) or "none"}.')
    kind: Any = ADAPTERS.get(adapters[name]['type'])
    if not kind.modifies_base and kind.contribute is Adapter.contribute and kind.new_tokens is Adapter.new_tokens:
        raise UserError(f"'{name}' is a {kind.__name__}, which does not change the denoiser; its folder in an export "
                        '(step<N>/) is what other tools load.')
    dtype = 'float64' if model.get('dtype') == 'float64' else None
    adapters = {n: _without_use(a) if n == name else a for n, a in adapters.items()}
    return {'seed': int((cfg.get('randomness') or {}).get('seed') or 0), **model, 'adapters': adapters,
            'mixed_precision': 'no', 'dtype': dtype, 'partners': None, 'objective': None, 'sampler': None}, name


def _without_use(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's config without the settings of its use, which files don't store."""
    stored = {**config, 'scale': 1.0, 'active_range': (0.0, 1.0), 'trainable': True}
    stored.pop('mask', None)
    kind: Any = ADAPTERS.get(config['type'])
    blocks = stored.pop('blocks', None)
    if kind.modifies_base and blocks:  # they also set ranks, or exclude layers
        stored['blocks'] = {prefix: block and {k: v for k, v in block.items() if k != 'scale'}
                            for prefix, block in blocks.items()}
    return stored


def _build(config: Mapping[str, Any]) -> SDXL:
    from mmengine.device import get_device
    model: SDXL = MODELS.build(dict(config))
    return model.to(get_device()).eval()


def _load_model(config: dict[str, Any], checkpoint: str | None, name: str) -> SDXL:
    """Build the model with adapter `name` only, with the weights of `checkpoint`.

    Changes `config` if the checkpoint has the base too.
    """
    only = {name: config['adapters'][name]}
    if checkpoint is None:
        if not only[name].get('weights'):
            raise UserError(f"Adapter '{name}' has no `weights` in the config; name a --checkpoint.")
        return _build({**config, 'adapters': only, 'trainable': []})
    path = resolve_checkpoint(checkpoint)
    if path.is_file():
        return _load_checkpoint(config, path, name)
    folder, manifest = path, read_manifest(path)
    if manifest is not None:
        if name not in manifest['contents']:
            raise UserError(f"'{path}' has {', '.join(manifest['contents']) or 'nothing'}, but not '{name}'.")
        if PIPELINE in manifest['contents']:
            use_trained_base(config, path)
    if manifest is not None or path.name != name and (path / name).is_dir():
        folder = path / name
    config['trainable'] = []
    model = _build({**config, 'adapters': only})
    model.adapters[name].load(folder)
    return model


def _load_checkpoint(config: dict[str, Any], path: Path, name: str) -> SDXL:
    """Build the model with all adapters, whose names a step<N>.pth has; load it and drop the other adapters."""
    if config.get('trainable'):
        raise UserError(f"'{path}' was trained together with its base; name the folder '{path.with_suffix('')}' "
                        '(its export), which has both.')
    model = _build(config)
    checkpoints.load_strict(model, trained_weights(checkpoints.load(path))[0], str(path))
    for other in [n for n in model.adapters if n != name]:
        model.adapters.pop(other).detach(model)
    return model


def _reload_config(config: Mapping[str, Any], adapter: Adapter, name: str) -> dict[str, Any]:
    """Return the config of a model that reads the adapter's shape from its file alone."""
    settings = config['adapters'][name]
    if adapter.modifies_base:
        settings = {k: settings[k] for k in ('type', 'scale', 'active_range', 'trainable')}
    source = ('subfolder', 'revision', 'variant', 'weight_name')
    return {**config, 'trainable': [],
            'adapters': {name: {k: v for k, v in settings.items() if k not in source}}}


def _header(config: Config, adapter: Adapter, model: SDXL, out: Path) -> dict[str, str]:
    """Return the metadata of the file, with what the config's CheckpointHook says of exports."""
    plain = to_plain(resolve(config))
    hook = (plain.get('default_hooks') or {}).get('checkpoint') or {}
    return {**modelspec.of_export(plain, type(adapter).__name__, out.stem, model.schedule.prediction_type,
                                  adapter.new_tokens()),
            **modelspec.from_user(hook.get('metadata'), 'default_hooks.checkpoint.metadata')}


class Target(NamedTuple):
    """A format: its name, what writes it to a path, and a sentence for the user on what loads it."""

    form: str
    write: Callable[[Path], Any]
    readers: str


def _target(adapter: Adapter, model: SDXL, form: str | None, out: Path) -> Target:
    """Choose the format.

    Raises:
        UserError: this kind does not support it.
    """
    if isinstance(adapter, LoRA):
        return _lora_target(adapter, model, form, out)
    kind = type(adapter).__name__
    if form not in (None, *adapter.file_formats):
        raise UserError(f"A {kind} is written as {' or '.join(map(repr, adapter.file_formats))}, not as '{form}'.")
    call = adapter.diffusers_call.format(out=out)
    return Target(form or adapter.file_formats[0], adapter.save, f'Stock diffusers loads it: {call}.' if call else
                  f"It loads as `weights` of a {kind} in a config here.")


def _lora_target(adapter: LoRA, model: SDXL, form: str | None, out: Path) -> Target:
    """As `_target`, for a LoRA and its relatives."""
    weights = adapter.to_weights()
    kind, title, only = weights.kind, weights.title(), weights.only_in_kohya()
    in_stock = not only and diffusers_lora.loads_in_stock(weights)
    modules = {part: lora_layers.plain(getattr(model, part)) | lora_layers.norms(getattr(model, part))
               for part in weights.parts}
    form = form or ('kohya' if only else 'diffusers' if in_stock else 'peft')
    if form == 'original':
        raise UserError("A LoRA has no original format; choose 'diffusers', 'peft' or 'kohya'.")
    if form == 'kohya' and kind == 'oft':
        raise UserError("kohya's sd-scripts, LyCORIS and ComfyUI have no common format for an OFT; choose 'peft'.")
    if only and form in ('diffusers', 'peft'):
        raise UserError(f"Only a kohya file can hold {only}; choose 'kohya'.")
    if form == 'diffusers' and not in_stock:
        what = 'the DoRA of a text encoder' if kind == 'dora' else f'a {title}'
        raise UserError(f"Stock diffusers cannot load {what}; choose 'peft'{'' if kind == 'oft' else ' or kohya'}.")
    if form == 'diffusers':
        return Target(form, adapter.save, "For ComfyUI choose 'kohya': it drops some keys of diffusers' names. "
                      f"Stock diffusers loads it: pipeline.load_lora_weights('{out}').")
    if form == 'peft':
        return Target(form, lambda path: peft_lora.write(path, adapter.to_weights(), modules), (
            'Stock diffusers does not: its load_lora_weights mistakes a peft folder for another format and silently '
            f"loads it wrong. peft loads it: PeftModel.from_pretrained(pipeline.unet, '{out}/unet'), and so on."))
    if out.suffix != '.safetensors':
        raise UserError(f"'{out}' must end in .safetensors: the format 'kohya' is one file.")
    readers = {'lora': f"Stock diffusers loads it too: pipeline.load_lora_weights('{out}').",
               'dora': 'Stock diffusers does not: it drops the magnitudes (dora_scale) with a warning. '
               "ComfyUI and Forge compute W + strength (W' - W), which agrees at scale 1 only."}.get(
        kind, f'Stock diffusers does not: it does not support {title}.')
    if kind == 'lora' and any(part != 'unet' and not any(name.endswith('out_proj') for name in content.rank)
                              for part, content in weights.parts.items()):
        readers = 'Stock diffusers does not: it loads the LoRA of a text encoder only if it includes out_proj.'
    if kind == 'lora' and any(len(set(kohya.written_alphas(weights, part).values())) > 1 for part in weights.parts):
        readers = "Stock diffusers does not: it uses one alpha for all attentions; for it choose 'diffusers'."
    tools = "kohya's sd-scripts, LyCORIS, ComfyUI and A1111" if kind == 'lora' else 'LyCORIS, ComfyUI and A1111'
    return Target(form, lambda path: kohya.write(path, adapter.to_weights(), modules),
                  f"{tools} load it. {readers}")


@torch.no_grad()
def _predict(model: SDXL, name: str) -> Tensor:
    """Return the denoiser's output for one keyed noise, prompt and condition."""
    adapter = model.adapters[name]
    side = model.size_divisor * math.ceil(128 / model.size_divisor)
    pixels = torch.randint(0, 256, (side, side, 3), generator=rng.generator('convert', 'picture'), dtype=torch.uint8)
    conditions = {name: Image.fromarray(pixels.numpy())} if adapter.condition_key else {}
    prompt = ' '.join(['a picture of', *adapter.new_tokens()])
    batch = request_batch(model, [Request(prompt=prompt, conditions=conditions)], (side, side))
    x = torch.randn(1, model.unet.config.in_channels, *[side // model.vae_factor] * 2,
                    generator=rng.generator('convert', 'noise')).to(model.unet_weight.device)
    with model.frozen():
        prediction = model.predict(x, torch.tensor(500, device=x.device), model.encode(batch, project=True),
                                   torch.zeros(1, 2))
    return prediction.double().cpu()


@torch.no_grad()
def _round(model: SDXL, name: str, dtype: torch.dtype) -> Tensor:
    """Round the adapter's weights to `dtype`; return the denoiser's output with them."""
    for parameter in model.adapters[name].all_parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return _predict(model, name)


def _cast(adapter: Adapter, dtype: torch.dtype) -> None:
    """Store the weights in `dtype`, for saving only."""
    for parameter in adapter.all_parameters():
        parameter.data = parameter.data.to(dtype)


def _num_tensors(path: Path) -> int:
    count = 0
    for file in [path] if path.is_file() else sorted(path.rglob('*.safetensors')):
        with safe_open(file, framework='pt') as tensors:
            count += len(tensors.keys())
    return count


def _compare(before: Tensor, after: Tensor, effect: float, out: Path) -> str:
    """Report how the output differs after reloading.

    Raises:
        RuntimeError: by too much, so the writer or the reader has a bug.
    """
    if torch.equal(before, after):
        return "The denoiser's output with the exported file is bitwise the same."
    difference = float((before - after).norm())
    of_output = difference / float(before.norm())
    if not (of_output <= MAX_OF_OUTPUT and difference <= MAX_OF_EFFECT * effect):
        raise RuntimeError(f"'{out}' was not kept: loaded again, it changes the denoiser's output by {of_output:.2g} "
                           f"({difference / effect:.2g} of the adapter's effect)")
    return f"The denoiser's output with the exported file is the same to {of_output:.1g} of it (rounding)."
