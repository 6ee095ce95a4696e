"""Strict loading: every key of a file is used and every weight of a model is loaded, or the file is refused."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from safetensors import SafetensorError
from torch import nn

from diffengine_sdxl.errors import UserError, first_line, is_out_of_memory, listed
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.component_checks import check_settings, read_headers
from diffengine_sdxl.loading.files import weight_files
from diffengine_sdxl.loading.weights import check_finite, keys_to_ignore

#: The weights of a model, also in a variant.
_VARIANT = re.compile(r'(diffusion_pytorch_model|model)(\..+)?\.safetensors')
#: Prefix of sources in this package: 'diffengine_sdxl::shapes/base' is its folder shapes/base.
SHIPPED = 'diffengine_sdxl::'
#: Whether models are built from their configs alone, see `configs_only`.
_CONFIGS_ONLY = ContextVar('configs_only', default=False)


def shipped(source: str | Path | None) -> str | None:
    """Resolve a source in this package to its path; return any other source unchanged.

    Raises:
        UserError: the package has no such folder, or the path leads out of it.
    """
    if source is None or not str(source).startswith(SHIPPED):
        return None if source is None else str(source)
    package = Path(__file__).resolve().parents[1]
    path = (package / str(source).removeprefix(SHIPPED)).resolve()
    if not path.is_dir() or package not in path.parents:
        raise UserError(f"'{source}': this package has no folder '{str(source).removeprefix(SHIPPED)}'; it has "
                        f"'{SHIPPED}shapes/base'.")
    return str(path)


def fingerprint(module: nn.Module, prefixes: tuple[str, ...]) -> str:
    """Return a digest of the weights whose names have one of `prefixes`; the same in fp32 and fp16."""
    digest = blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(name.encode() + value.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def configs_only() -> Iterator[None]:
    """Inside, `load_pretrained` builds a model from its config and reads no weights: to count what it needs."""
    token = _CONFIGS_ONLY.set(True)
    try:
        yield
    finally:
        _CONFIGS_ONLY.reset(token)


def _from_config(cls: Any, folder: Path) -> nn.Module:
    """Build a model of diffusers or transformers from the config in `folder`."""
    from transformers import AutoConfig
    if hasattr(cls, 'load_config'):  # diffusers
        built: nn.Module = cls.from_config(cls.load_config(str(folder)))
        return built
    settings = getattr(cls, 'config_class', None) or AutoConfig
    config = settings.from_pretrained(str(folder))
    built = cls.from_config(config) if hasattr(cls, 'from_config') else cls(config)
    return built


def load_pretrained(cls: Any, source: str, revision: str | None = None, cache_dir: str | None = None,
                    shown: str | None = None, ignore_keys: Sequence[str] = (), **kwargs: Any) -> Any:
    """Call `cls.from_pretrained(source)` of a model class of diffusers or transformers, strictly.

    Args:
        cls: the class.
        source: folder, hub id, or link to the weights or the config of a model on the hub.
        revision, cache_dir: of the hub; `revision` overrides the link's.
        shown: what errors call it; None for `source`.
        ignore_keys: patterns of keys of the weights that the class need not have.
        kwargs: subfolder, variant, dtype and the like; None values are left out.

    Raises:
        UserError: not found, not of this class, or some keys don't match; which.
    """
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if linked := hub.parse_model_link(source):
        shown, source, revision = shown or source, linked[0], revision or linked[1]
        kwargs = {k: v for k, v in zip(('subfolder', 'variant'), linked[2:], strict=True) if v} | kwargs
    subfolder, variant = kwargs.get('subfolder'), kwargs.get('variant')
    shown = f'{shown or source}/{subfolder}' if subfolder and not linked else shown or source
    path = hub.local_path(source)
    if path is None:
        repo = hub.Repo(source, revision, cache_dir)
        path = repo.fetch(repo.model_files(subfolder, variant))
    folder = path / (subfolder or '')
    if _CONFIGS_ONLY.get():
        model: Any = as_user_error(shown, _from_config, cls, folder)
        return nn.Module.to(model, kwargs.get('dtype'))  # diffusers' own warns of parts to keep in fp32: none
    listing = as_user_error(shown, os.listdir, folder) if folder.is_dir() else []
    names = weight_files(listing, variant)
    if not names and (others := [name for name in listing if _VARIANT.fullmatch(name)]):
        raise UserError(f"'{shown}' has no weights " + (f"of variant '{variant}'" if variant else 'without a variant')
                        + f' (it has {listed(sorted(others), 3)}). '
                        + ('Omit `variant`, or name another.' if variant else 'Set `variant`.'))
    if any(name.endswith('.bin') for name in names):
        kwargs['use_safetensors'] = False  # else diffusers logs an error before it falls back to them
    if header := read_headers(folder, names, shown):
        check_settings(cls, folder, shown, header)
    model, info = as_user_error(shown, cls.from_pretrained, str(path), output_loading_info=True, **kwargs)
    ignored = keys_to_ignore(header, ignore_keys, shown)
    refuse_unmatched(shown, {**info, 'unexpected_keys': [k for k in info['unexpected_keys'] if k not in ignored]})
    check_finite(model.state_dict().items(), shown, getattr(model, 'dtype', None))
    return model


def refuse_unmatched(source: str, info: Mapping[str, Any]) -> None:
    """Check that the `output_loading_info` of a load has no unmatched keys.

    Raises:
        UserError: names the first keys of each kind.
    """
    faults = []
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'):
        # position_ids: buffers that old transformers saved and new ones compute; no weight is lost with them.
        keys = sorted(str(k) for k in info.get(kind) or () if 'position_ids' not in str(k))
        if keys:
            faults.append(f'{len(keys)} {kind.replace("_", " ")} ({listed(keys)})')
    if faults:
        raise UserError(f"The weights in '{source}' don't fit: {'; '.join(faults)}.")


def as_user_error(source: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`, which reads local files; re-raise I/O and parsing errors as UserError.

    Raises:
        UserError: what could not be loaded, and why.
    """
    from huggingface_hub.errors import StrictDataclassError  # raised by configs of transformers
    default = torch.get_default_dtype()
    try:
        return function(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        # diffusers and transformers raise all of these for damaged or unsuitable files, also for an empty config;
        # tokenizers raises bare Exceptions.
        expected = isinstance(error, OSError | RuntimeError | ValueError | LookupError | TypeError | AttributeError
                              | ArithmeticError | AssertionError | SafetensorError | StrictDataclassError)
        if is_out_of_memory(error) or not expected and type(error) is not Exception:
            raise
        raise UserError(f"'{source}' could not be loaded: {first_line(error)}") from error
    finally:
        torch.set_default_dtype(default)  # diffusers sets it while it builds, and leaves it so where that fails


def log_loaded(what: str, source: str | Path, num_keys: int) -> None:
    """Log that all keys of a loaded file matched; files with other keys are refused before."""
    print_log(f"{what}: all {num_keys} keys of '{source}' matched.", logger='current')
