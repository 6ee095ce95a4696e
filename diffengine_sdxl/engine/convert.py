"""One adapter of a config as a file for other tools: written, read again by a fresh model, compared, then kept."""

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

from diffengine_sdxl import rng
from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.adapters.formats import diffusers_lora, kohya, peft_lora
from diffengine_sdxl.adapters.formats.weights import LoRAWeights
from diffengine_sdxl.engine import checkpoint as checkpoints
from diffengine_sdxl.engine.config import resolve, to_plain
from diffengine_sdxl.engine.export import PIPELINE, read_manifest
from diffengine_sdxl.engine.inference.prompts import prompt_batch
from diffengine_sdxl.engine.tested import find
from diffengine_sdxl.registry import ADAPTERS, MODELS, nearest

FORMATS = ('diffusers', 'peft', 'kohya', 'original')
DTYPES = ('float16', 'bfloat16', 'float32')
#: What the kinds of LoRA are called.
NAMES = {'lora': 'LoRA', 'dora': 'DoRA', 'loha': 'LoHa', 'lokr': 'LoKr', 'oft': 'OFT'}
#: How far a reloaded adapter's output may be from what was written: of the output's norm, and of what it changes.
OF_OUTPUT, OF_EFFECT = 1e-5, 0.05
#: Class of an adapter -> the formats that its `save` writes, and how stock diffusers loads them.
OWN: dict[str, tuple[tuple[str, ...], str]] = {
    'T2IAdapter': (('diffusers',), "T2IAdapter.from_pretrained('{out}')"),
    'ControlNet': (('diffusers',), "ControlNetModel.from_pretrained('{out}')"),
    # h94's layout, which is diffusers' too.
    'IPAdapter': (('original', 'diffusers'), "pipeline.load_ip_adapter('{out}', subfolder='', weight_name="
                  "'ip_adapter.safetensors', image_encoder_folder=None), the pipeline with its image_encoder"),
    'TextualInversion': (('original',), (
        "in two calls, one for each text encoder: pipeline.load_textual_inversion(state['clip_l'], token=..., "
        "text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer), and the same of 'clip_g' with "
        "text_encoder_2 and tokenizer_2, where state is safetensors.torch.load_file('{out}/learned_embeds.safetensors')"
    ))}


def convert(config: Config, out: Path, checkpoint: str | None = None, name: str | None = None,
            form: str | None = None, dtype: str | None = None) -> list[str]:
    """Write adapter `name` of `config` to `out`, whole and compared or not at all.

    All is computed in fp32 (fp64 where the config's dtype is), at scale 1 and without window, mask and blocks, which
    are no part of a file.

    Args:
        config: as `engine.config.load` gives it.
        out: a folder, or for 'kohya' a file '*.safetensors'; must not exist.
        checkpoint: whose weights: a step<N>.pth (its EMA's, if it has one), a work_dir, for its latest, an export's
            folder, or one adapter's; None for the `weights` that the config names.
        name: of the adapter; None if there is one only.
        form: of FORMATS; None for the one of the adapter's own ecosystem.
        dtype: of DTYPES, to round the weights to; None keeps them as they are.

    Returns:
        What was written, how it compares, and what loads it: a sentence each.

    Raises:
        ValueError: there is no such adapter, checkpoint or format for it, `out` exists, or what was written does not
            give the same output.
    """
    model_config, name = _model_config(config, name)
    out = out.expanduser()
    if out.exists():
        raise ValueError(f"'{out}' exists; name another file or folder, or remove it.")
    model = _loaded(model_config, checkpoint, name)
    adapter = model.adapters[name]
    target = _target(adapter, model, form, out)
    before = _prediction(model, name)
    with model.without_adapters():
        effect = float((before - _prediction(model, name)).norm())
    if effect == 0:
        raise ValueError(f"Adapter '{name}' changes nothing in what the denoiser gives: its weights are as fresh as at "
                         "the beginning, and what is written could not be checked. Train it, or name its weights.")
    said = []
    if dtype is not None:
        rounded = _round(model, name, getattr(torch, dtype))
        far = float((rounded - before).norm()) / effect
        said.append(f'Rounding to {dtype} changes what it does by {far:.2g} of it.')
        before = rounded
    fresh = _reading(model_config, adapter, name)
    with checkpoints.replacing(out) as temporary:
        if dtype is not None:
            _cast(adapter, getattr(torch, dtype))
        target.write(temporary)
        form, readers = target.form, target.readers
        # Two SDXLs need not lie in memory at once.
        del model, adapter, target
        gc.collect()
        fresh['adapters'][name]['weights'] = str(temporary)
        said.append(_compared(before, _prediction(_build(fresh), name), effect, out))
        said.insert(0, f"'{out}': {_num_tensors(temporary)} tensors, format '{form}'; all matched when read again.")
    return [*said, readers]


def _model_config(config: Config, name: str | None) -> tuple[dict[str, Any], str]:
    """What to build, and the adapter's name; all in fp32, and each adapter as its file has it."""
    cfg = to_plain(resolve(config))
    model = cfg.get('model') or {}
    adapters = {n: a for n, a in (model.get('adapters') or {}).items() if a}
    if name is None and len(adapters) == 1:
        name = next(iter(adapters))
    if name is None or name not in adapters:
        hint = nearest(name, list(adapters)) if name else ''
        raise ValueError((f"The config has no adapter '{name}'.{hint}" if name else 'Say which adapter (--adapter).')
                         + f' It has {", ".join(adapters) or "none"}.')
    kind: Any = ADAPTERS.get(adapters[name]['type'])
    if not kind.in_base and kind.contribute is Adapter.contribute and kind.words is Adapter.words:
        raise ValueError(f"'{name}' is a {kind.__name__}, which adds nothing to the denoiser; its folder in an export "
                         '(step<N>/) is already the one that others load.')
    wide = 'float64' if model.get('dtype') == 'float64' else None
    adapters = {n: _as_in_a_file(a) if n == name else a for n, a in adapters.items()}
    return {'seed': int((cfg.get('randomness') or {}).get('seed') or 0), **model, 'adapters': adapters,
            'mixed_precision': 'no', 'dtype': wide, 'objective': None, 'sampler': None}, name


def _as_in_a_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config without what says how it is used."""
    kept = {**config, 'scale': 1.0, 'window': (0.0, 1.0), 'trainable': True}
    kept.pop('mask', None)
    kind: Any = ADAPTERS.get(config['type'])
    blocks = kept.pop('blocks', None)
    if kind.in_base and blocks:  # they also give ranks, or leave layers out
        kept['blocks'] = {prefix: own and {k: v for k, v in own.items() if k != 'scale'}
                          for prefix, own in blocks.items()}
    return kept


def _build(config: Mapping[str, Any]) -> Any:
    from mmengine.device import get_device
    model: Any = MODELS.build(dict(config))
    return model.to(get_device()).eval()


def _loaded(config: dict[str, Any], checkpoint: str | None, name: str) -> Any:
    """The model with adapter `name` only, with the weights that `checkpoint` stands for.

    Changes `config` where the checkpoint brings the base.
    """
    own = config['adapters'][name]
    if checkpoint is None:
        if not own.get('weights'):
            raise ValueError(f"Adapter '{name}' has no `weights` in the config; name a --checkpoint.")
        return _build({**config, 'adapters': {name: own}, 'trainable': []})
    path = find(checkpoint)
    if path.is_file():
        return _from_checkpoint(config, path, name)
    folder, notes = path, read_manifest(path)
    if notes is None and path.name != name and (path / name).is_dir():
        folder = path / name
    if notes is not None:
        if name not in notes['contents']:
            raise ValueError(f"'{path}' holds {', '.join(notes['contents']) or 'nothing'}, but not '{name}'.")
        folder = path / name
        if PIPELINE in notes['contents']:
            config.update(pretrained=str(path / PIPELINE), unet=None, vae=None, revision=None, variant=None)
    config['trainable'] = []
    model = _build({**config, 'adapters': {name: own}})
    model.adapters[name].load(folder)
    return model


def _from_checkpoint(config: dict[str, Any], path: Path, name: str) -> Any:
    """As `_loaded`, of a step<N>.pth, whose names are those of a model with all the adapters."""
    if config.get('trainable'):
        raise ValueError(f"'{path}' was trained together with its base; name the folder '{path.with_suffix('')}' "
                         '(its export), which holds both.')
    state = checkpoints.load(path)
    model = _build(config)
    checkpoints.load_strict(model, state.get('ema', {}).get('weights') or state['state_dict'], str(path))
    for other in [n for n in model.adapters if n != name]:
        model.adapters.pop(other).detach(model)
    return model


def _reading(config: Mapping[str, Any], adapter: Any, name: str) -> dict[str, Any]:
    """The config of a model that reads the adapter's file, which alone says of what shape it is."""
    own = config['adapters'][name]
    if adapter.in_base:
        own = {k: own[k] for k in ('type', 'scale', 'window', 'trainable')}
    given = {'subfolder', 'revision', 'weight_name', *getattr(adapter, 'source', ())}
    return {**config, 'trainable': [], 'adapters': {name: {k: v for k, v in own.items() if k not in given}}}


class Target(NamedTuple):
    """A format: its name, what writes it to a path, and what a user is told of who reads it."""

    form: str
    write: Callable[[Path], Any]
    readers: str


def _target(adapter: Any, model: Any, form: str | None, out: Path) -> Target:
    """The format to write.

    Raises:
        ValueError: there is none such for this kind.
    """
    if hasattr(adapter, 'to_weights'):
        return _lora_target(adapter, model, form, out)
    kind = type(adapter).__name__
    formats, call = OWN.get(kind, (('original',), ''))
    if form not in (None, *formats):
        raise ValueError(f"A {kind} is written as {' or '.join(map(repr, formats))}, not as '{form}'.")
    call = call.format(out=out)
    return Target(form or formats[0], adapter.save, f'Stock diffusers loads it: {call}.' if call else
                  f"It loads as `weights` of a {kind} in a config here.")


def _lora_target(adapter: Any, model: Any, form: str | None, out: Path) -> Target:
    """As `_target`, for a LoRA and its relatives."""
    weights: LoRAWeights = adapter.to_weights()
    kind = weights.kind
    stock = diffusers_lora.loads_in_stock(weights)
    modules = {part: lora_layers.plain(getattr(model, part)) for part in weights.parts}
    form = form or ('diffusers' if stock else 'peft')
    if form == 'original':
        raise ValueError("A LoRA has no original format; choose of 'diffusers', 'peft' and 'kohya'.")
    if form == 'kohya' and kind == 'oft':
        raise ValueError("An OFT has no form that kohya's sd-scripts, LyCORIS and ComfyUI share; choose 'peft'.")
    if form == 'diffusers' and not stock:
        what = 'the DoRA of a text encoder' if kind == 'dora' else f'a {NAMES[kind]}'
        raise ValueError(f"Stock diffusers cannot load {what}; choose 'peft'{'' if kind == 'oft' else ' or kohya'}.")
    if form == 'diffusers':
        return Target(form, adapter.save, f"Stock diffusers loads it: pipeline.load_lora_weights('{out}').")
    if form == 'peft':
        return Target(form, lambda path: peft_lora.write(path, adapter.to_weights(), modules), (
            "Stock diffusers does not: its load_lora_weights takes a peft folder for another format and gets it wrong "
            f"without a word. peft loads it: PeftModel.from_pretrained(pipeline.unet, '{out}/unet'), and so on."))
    if out.suffix != '.safetensors':
        raise ValueError(f"'{out}' must end in .safetensors: the format 'kohya' is one file.")
    notes = {'modelspec.title': out.stem,
             'modelspec.prediction_type': {'v_prediction': 'v'}.get(*[model.schedule.prediction_type] * 2)}
    readers = {'lora': f"Stock diffusers loads it too: pipeline.load_lora_weights('{out}').",
               'dora': 'Stock diffusers does not: it drops the magnitudes (dora_scale) with a warning.'}.get(
        kind, f'Stock diffusers does not: it knows no {NAMES[kind]}.')
    if kind == 'lora' and any(part != 'unet' and not any(name.endswith('out_proj') for name in held.rank)
                              for part, held in weights.parts.items()):
        readers = 'Stock diffusers does not: of a text encoder it reads such a file only where out_proj is in it.'
    if kind == 'lora' and any(len(set(kohya.written_alphas(weights, part).values())) > 1 for part in weights.parts):
        readers = "Stock diffusers does not: it gives all attentions one alpha; for it choose 'diffusers'."
    return Target(form, lambda path: kohya.write(path, adapter.to_weights(), modules, notes),
                  f"kohya's sd-scripts, LyCORIS, ComfyUI and A1111 load it. {readers}")


@torch.no_grad()
def _prediction(model: Any, name: str) -> Tensor:
    """What the denoiser gives for one keyed noise, prompt and picture."""
    adapter = model.adapters[name]
    side = model.size_divisor * math.ceil(128 / model.size_divisor)
    pixels = torch.randint(0, 256, (side, side, 3), generator=rng.generator('convert', 'picture'), dtype=torch.uint8)
    pictures = {name: [Image.fromarray(pixels.numpy())]} if adapter.reads else {}
    prompt = ' '.join(['a picture of', *adapter.words()])
    batch = prompt_batch(model, [prompt], pictures, (side, side), [0])
    x = torch.randn(1, model.unet.config.in_channels, *[side // model.vae_factor] * 2,
                    generator=rng.generator('convert', 'noise')).to(model.unet_weight.device)
    with model.frozen():
        prediction: Tensor = model.predict(x, torch.tensor(500, device=x.device), model.encode(batch, project=True),
                                           torch.zeros(1, 2))
    return prediction.double().cpu()


@torch.no_grad()
def _round(model: Any, name: str, dtype: torch.dtype) -> Tensor:
    """Round the adapter's weights, and predict with what is left of them."""
    for parameter in model.adapters[name].owned():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return _prediction(model, name)


def _cast(adapter: Any, dtype: torch.dtype) -> None:
    """Store its weights in `dtype`; it is only saved after this."""
    for parameter in adapter.owned():
        parameter.data = parameter.data.to(dtype)


def _num_tensors(path: Path) -> int:
    count = 0
    for file in [path] if path.is_file() else sorted(path.rglob('*.safetensors')):
        with safe_open(file, framework='pt') as held:
            count += len(held.keys())
    return count


def _compared(before: Tensor, after: Tensor, effect: float, out: Path) -> str:
    """How far the output of what was read again is.

    Raises:
        ValueError: too far.
    """
    if torch.equal(before, after):
        return "The denoiser's output of what was read again is bitwise the same."
    far = float((before - after).norm())
    of_output = far / float(before.norm())
    if not (of_output <= OF_OUTPUT and far <= OF_EFFECT * effect):
        raise ValueError(f"'{out}' was not kept: read again, it changes the denoiser's output by {of_output:.2g} of it "
                         f'({far / effect:.2g} of what the adapter does). This is a fault of its writer; please '
                         'report it.')
    return f"The denoiser's output of what was read again is the same to {of_output:.1g} of it (rounding)."
