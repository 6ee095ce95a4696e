"""SDXL's components from a diffusers folder, a hub id, a single file, or (random weights) from configs alone."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from diffengine_sdxl import hub, rng
from diffengine_sdxl.models.single_file import SDXL_FILES, is_single_file, load_single_file, load_single_part
from diffengine_sdxl.weight_names import variants, weight_files
from diffengine_sdxl.weights import load_pretrained, said, shipped

MODULES = ('unet', 'vae', 'text_encoder', 'text_encoder_2')
TOKENIZERS = ('tokenizer', 'tokenizer_2')


def module_class(name: str) -> Any:
    """The class of component `name`."""
    import diffusers
    import transformers
    return {'unet': diffusers.UNet2DConditionModel, 'vae': diffusers.AutoencoderKL,
            'text_encoder': transformers.CLIPTextModel, 'text_encoder_2': transformers.CLIPTextModelWithProjection,
            'tokenizer': transformers.CLIPTokenizer, 'tokenizer_2': transformers.CLIPTokenizer}[name]


def load_components(pretrained: str | None, vae: str | None, config: str | None, tokenizer: str | None,
                    dtypes: Mapping[str, torch.dtype], seed: int, given: Mapping[str, Any] | None = None,
                    unet: str | None = None, revision: str | None = None, variant: str | None = None,
                    cache_dir: str | None = None) -> dict[str, Any]:
    """All parts of a base: unet, vae, text_encoder (None in a refiner), text_encoder_2, tokenizers, scheduler config.

    Also 'null_text': what the base's pipeline takes for no text, where its index says so.

    Args:
        pretrained: folder, hub id, single file, or 'diffengine_sdxl::<folder>' for what came with this package (so for
            the other sources, too); None makes random weights, keyed by `seed`.
        vae, unet: folder, hub id or single file of another VAE or UNet; None takes the base's own.
        config: folder of component configs for a single file or for random weights; None means SDXL base 1.0's.
        tokenizer: folder or hub id of other tokenizers; None takes the base's own.
        dtypes: component name -> dtype of its weights.
        given: components of another model that this one shares, as they are.
        revision, variant, cache_dir: of the hub; `revision` and `variant` are the base's. Another UNet or VAE is taken
            in a variant where it has no other weights.

    Raises:
        ValueError: something is missing, is not SDXL, or cannot be had without a network.
    """
    pretrained, unet, vae, config, tokenizer = map(shipped, (pretrained, unet, vae, config, tokenizer))
    given = dict(given or {})
    others = {name: source for name, source in (('unet', unet), ('vae', vae)) if source and name not in given}
    skip = {*given, *others}
    if pretrained is None:
        parts = _random_components(Path(config or SDXL_FILES), dtypes, seed, skip)
    elif is_single_file(pretrained):
        parts = load_single_file(pretrained, config=config, dtypes=dtypes, skip=tuple(skip),
                                 revision=revision, cache_dir=cache_dir)
        parts |= {'scheduler': dict(parts['scheduler'].config), 'null_text': _null_text(parts.pop('index'))}
    else:
        folder = _base_folder(pretrained, skip, revision, variant, cache_dir)
        parts = _folder_components(folder, pretrained, dtypes, skip, variant)
    parts.update(given)
    for name, source in others.items():
        parts[name] = _load_other(name, source, config, dtypes[name], cache_dir, variant)
    check_sdxl(parts['unet'], str(unet or pretrained or config or 'SDXL'))
    _check_widths(parts, str(unet or pretrained or config))
    check_vae(parts['vae'], parts['unet'], str(vae or pretrained or config))
    if tokenizer:
        folder = _tokenizer_folder(tokenizer, cache_dir)
        for name in TOKENIZERS:
            parts[name] = said(tokenizer, module_class(name).from_pretrained, str(folder), subfolder=name)
    for name in MODULES:
        if parts.get(name) is not None and name not in given and parts[name].dtype != dtypes[name]:
            parts[name].to(dtypes[name])
    return parts


def check_sdxl(unet: nn.Module, source: str) -> None:
    """Refuse a UNet that is not SDXL's kind.

    Raises:
        ValueError: it has no size and crop conditioning, so it is another architecture, e.g. SD 1.5.
    """
    kind = unet.config.addition_embed_type  # type: ignore[union-attr]
    if kind != 'text_time':
        width = unet.config.cross_attention_dim  # type: ignore[union-attr]
        raise ValueError(f"'{source}' is not an SDXL: its UNet has addition_embed_type={kind!r} (SDXL: 'text_time') "
                         f'and cross_attention_dim={width}. Stable Diffusion 1.x and 2.x cannot be used as a base.')


def _check_widths(parts: Mapping[str, Any], source: str) -> None:
    """Refuse a UNet that reads another width than the text encoders write.

    Raises:
        ValueError: both widths.
    """
    encoders = [parts[name] for name in ('text_encoder', 'text_encoder_2') if parts.get(name) is not None]
    wrote, read = sum(e.config.hidden_size for e in encoders), parts['unet'].config.cross_attention_dim
    if wrote != read:
        raise ValueError(f"The UNet of '{source}' reads text of width {read}; the text encoders write {wrote}.")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors are of `dtype`."""
    held = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(held)


def check_vae(vae: nn.Module, unet: nn.Module, source: str) -> None:
    """Refuse a VAE whose latents the UNet does not work on.

    Raises:
        ValueError: their channels differ.
    """
    theirs, ours = vae.config.latent_channels, unet.config.out_channels  # type: ignore[union-attr]
    if theirs != ours:
        raise ValueError(f"'{source}' is a VAE of {theirs} channels; the UNet works on {ours}.")


def _random_components(folder: Path, dtypes: Mapping[str, torch.dtype], seed: int, skip: set[str]) -> dict[str, Any]:
    import diffusers
    index = _index(folder)
    parts: dict[str, Any] = {'null_text': _null_text(index)}
    for name in (n for n in MODULES if n not in skip and index.get(n, [None])[0]):
        cls = module_class(name)
        # Made in their own dtype: the full UNet would take 10 GB on its way through fp32.
        with rng.fork(seed, 'base', name), default_dtype(dtypes[name]):
            if issubclass(cls, diffusers.ModelMixin):
                parts[name] = cls.from_config(cls.load_config(folder, subfolder=name))
            else:
                parts[name] = cls(cls.config_class.from_pretrained(folder, subfolder=name))
    for name in (n for n in TOKENIZERS if index.get(n, [None])[0]):
        parts[name] = module_class(name).from_pretrained(folder, subfolder=name)
    parts['scheduler'] = _scheduler_config(str(folder))
    return parts


def _base_folder(source: str, skip: set[str], revision: str | None, variant: str | None,
                 cache_dir: str | None) -> Path:
    """The folder of a base; of one on the hub, what is needed of it is brought here."""
    if (place := hub.here(source)) is not None:
        return place
    repo = hub.Repo(source, revision, cache_dir)
    if 'model_index.json' not in repo.names:
        raise ValueError(f"{repo} has no model_index.json, so it is no base in diffusers' layout. A single file of it "
                         f"is named as '{source}/<file>.safetensors'.")
    index = _index(repo.fetch(['model_index.json']))
    wanted = ['model_index.json', *repo.texts('scheduler')]
    for name in (n for n in (*MODULES, *TOKENIZERS) if n not in skip and index.get(n, [None])[0]):
        if repo.inside(name):  # else it is told where the folder is read
            wanted += repo.model_files(name, variant) if name in MODULES else repo.texts(name)
    return repo.fetch(wanted)


def _tokenizer_folder(source: str, cache_dir: str | None) -> Path:
    """The folder of other tokenizers, with one for each; of those on the hub it is brought here."""
    place, wanted = hub.here(source), []
    repo = hub.Repo(source, cache_dir=cache_dir) if place is None else None
    for name in TOKENIZERS:
        files = repo.texts(name) if repo else []
        if not files and (place is None or not (place / name).is_dir()):
            raise ValueError(f"'{source}' has no folder '{name}'. `tokenizer` takes a folder or hub id with "
                             f"{' and '.join(map(repr, TOKENIZERS))}, as a base has them.")
        wanted += files
    return repo.fetch(wanted) if repo else Path(str(place))


def _folder_components(folder: Path, shown: str, dtypes: Mapping[str, torch.dtype], skip: set[str],
                       variant: str | None) -> dict[str, Any]:
    """The parts of a base in a folder, which errors call `shown`."""
    index = _index(folder, shown)
    parts: dict[str, Any] = {'null_text': _null_text(index)}
    for name in (n for n in (*MODULES, *TOKENIZERS) if n not in skip and index.get(n, [None])[0]):
        if not (folder / name).is_dir():
            raise ValueError(f"'{shown}' has no folder '{name}', but its model_index.json names one.")
        if name in MODULES:
            parts[name] = load_pretrained(module_class(name), str(folder), dtype=dtypes[name], subfolder=name,
                                          variant=variant, shown=shown)
        else:
            parts[name] = said(shown, module_class(name).from_pretrained, str(folder), subfolder=name)
    for name in ('unet', 'text_encoder_2', 'tokenizer_2'):
        if name not in parts and name not in skip:
            raise ValueError(f"'{shown}' has no '{name}', so it is no SDXL base "
                             f'(it holds {", ".join(sorted(k for k in index if not k.startswith("_")))}).')
    parts['scheduler'] = said(shown, _scheduler_config, str(folder))
    return parts


def _load_other(name: str, source: str, config: str | None, dtype: torch.dtype, cache_dir: str | None,
                variant: str | None) -> Any:
    """A UNet or VAE of another source than the base, whose `variant` is taken where there are no plain weights."""
    if is_single_file(source):
        return load_single_part(name, source, config=config, dtype=dtype, cache_dir=cache_dir)
    place = hub.here(source)
    if place is None:
        repo = hub.Repo(source, cache_dir=cache_dir)
        inner = name if 'config.json' not in repo.names and repo.inside(name) else None
        variant = _variant_of(source, inner, list(repo.inside(inner)), variant)
        place = repo.fetch(repo.model_files(inner, variant))
    else:
        inner = name if not (place / 'config.json').is_file() and (place / name).is_dir() else None
        folder = place / (inner or '')
        variant = _variant_of(source, inner, os.listdir(folder) if folder.is_dir() else [], variant)
    return load_pretrained(module_class(name), str(place), dtype=dtype, subfolder=inner, variant=variant, shown=source)


def _variant_of(source: str, inner: str | None, names: Sequence[str], wanted: str | None) -> str | None:
    """None where there are plain weights or none at all; else the variant wanted, or the only one.

    Raises:
        ValueError: there are several, none of which is wanted.
    """
    found = [] if weight_files(names) else [v for v in variants(names) if weight_files(names, v)]
    if not found:
        return None
    if wanted not in found and len(found) > 1:
        file = '/'.join(part for part in (source, inner, weight_files(names, found[0])[0]) if part)
        raise ValueError(f"'{source}' has its weights in the variants {', '.join(found)} only; name the file of one, "
                         f"e.g. '{file}'.")
    taken = wanted if wanted in found else found[0]
    print_log(f"'{source}' has no plain weights; its variant '{taken}' is taken.", logger='current')
    return taken


def _index(folder: Path, shown: str | None = None) -> dict[str, Any]:
    path = folder / 'model_index.json'
    if not path.is_file():
        raise ValueError(f"'{shown or folder}' holds no model_index.json, so it is not a diffusers folder.")
    return json.loads(path.read_text())


def _null_text(index: Mapping[str, Any]) -> str:
    """What stands for no text in the pipeline of `index`: SDXL's base says zeros, the refiner the empty prompt."""
    return 'zeros' if index.get('force_zeros_for_empty_prompt', True) else 'empty'


def _scheduler_config(folder: str) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler
    config = EulerDiscreteScheduler.load_config(folder, subfolder='scheduler')
    return {k: v for k, v in dict(config).items() if not k.startswith('_')}

