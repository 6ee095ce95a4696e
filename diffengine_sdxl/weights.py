"""Strict loading: every weight of a file is used and every weight of a model is given, or it is refused by name."""

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from safetensors import SafetensorError

from diffengine_sdxl import hub
from diffengine_sdxl.weight_names import weight_files

#: What a source begins with that came with this package: 'diffengine_sdxl::shapes/base' is its folder shapes/base.
SHIPPED = 'diffengine_sdxl::'


def shipped(source: str | Path | None) -> str | None:
    """The path of a source that came with this package; any other as it is.

    Raises:
        ValueError: the package has no such folder, or the path leads out of it.
    """
    if source is None or not str(source).startswith(SHIPPED):
        return None if source is None else str(source)
    package = Path(__file__).resolve().parent
    path = (package / str(source).removeprefix(SHIPPED)).resolve()
    if not path.is_dir() or package not in path.parents:
        raise ValueError(f"'{source}': this package has no folder '{str(source).removeprefix(SHIPPED)}'; it comes with "
                         f"'{SHIPPED}shapes/base'.")
    return str(path)


def fingerprint(module: Any, prefixes: tuple[str, ...]) -> str:
    """A digest of a module's weights whose names begin so, rounded to half precision: the same in fp32 and in fp16."""
    found = blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            found.update(name.encode() + value.detach().half().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def load_pretrained(cls: Any, source: str, revision: str | None = None, cache_dir: str | None = None,
                    shown: str | None = None, **kwargs: Any) -> Any:
    """`cls.from_pretrained(source)` for a model class of diffusers or transformers, strict.

    Args:
        cls: the class.
        source: folder, hub id, or link to the weights or the config of a model on the hub.
        revision, cache_dir: of the hub; a `revision` goes before the link's.
        shown: what errors call it; None for `source`.
        kwargs: subfolder, variant, dtype and the like; None values are left out.

    Raises:
        ValueError: not found, not of this class, or some keys don't match; which.
    """
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if linked := hub.linked_model(source):
        shown, source, revision = shown or source, linked[0], revision or linked[1]
        kwargs = {k: v for k, v in zip(('subfolder', 'variant'), linked[2:], strict=True) if v} | kwargs
    subfolder, variant = kwargs.get('subfolder'), kwargs.get('variant')
    shown = f'{shown or source}/{subfolder}' if subfolder and not linked else shown or source
    place = hub.here(source)
    if place is None:
        repo = hub.Repo(source, revision, cache_dir)
        names = repo.model_files(subfolder, variant)
        place = repo.fetch(names)
    else:
        folder = place / (subfolder or '')
        names = weight_files(said(shown, os.listdir, folder), variant) if folder.is_dir() else []
    if any(name.endswith('.bin') for name in names):
        kwargs['use_safetensors'] = False  # else diffusers tells of an error before it takes them
    model, info = said(shown, cls.from_pretrained, str(place), output_loading_info=True, **kwargs)
    refuse_unmatched(shown, info)
    return model


def refuse_unmatched(source: str, info: Mapping[str, Any]) -> None:
    """Raise if what `output_loading_info` tells holds keys that did not match.

    Raises:
        ValueError: names the first keys of each kind.
    """
    faults = []
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'):
        # position_ids: buffers that old transformers saved and new ones compute; no weight is lost with them.
        keys = sorted(str(k) for k in info.get(kind) or () if 'position_ids' not in str(k))
        if keys:
            faults.append(f'{len(keys)} {kind.replace("_", " ")} ({", ".join(keys[:10])}'
                          f'{", ..." if len(keys) > 10 else ""})')
    if faults:
        raise ValueError(f"The weights in '{source}' don't fit: {'; '.join(faults)}.")


def said(source: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `function`, which reads files of this machine; its errors become one sentence about `source`.

    Raises:
        ValueError: what could not be loaded, and why.
    """
    try:
        return function(*args, **kwargs)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"'{source}' could not be loaded: {first}") from error


def told(what: str, source: str | Path, num_keys: int) -> None:
    """Say in the log that all keys of a loaded file matched; those that don't are refused before."""
    print_log(f"{what}: all {num_keys} keys of '{source}' matched.", logger='current')
