"""Files of textual inversion: the vectors of a new token for each text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.errors import UserError

NAME = 'learned_embeds.safetensors'
NAMES = (NAME, 'learned_embeds.bin')
#: Part of the base -> its key in SDXL files of diffusers' and kohya's trainers and ComfyUI.
KEYS = {'text_encoder': 'clip_l', 'text_encoder_2': 'clip_g'}

#: Width of the text of other Stable Diffusions -> the models. SDXL's first text encoder is as wide as that of 1.x.
OTHER_WIDTHS = {768: 'Stable Diffusion 1.x', 1024: 'Stable Diffusion 2.x'}


def read_textual_inversion(
        source: str | Path | Sequence[str | Path], widths: Mapping[str, int], subfolder: str | None = None,
        weight_name: str | None = None, revision: str | None = None, ignore_keys: Sequence[str] = ()
        ) -> tuple[dict[str, Tensor], Path]:
    """Return a new token's vectors, part of the base -> [n, D], and the file that holds them.

    Formats: SDXL's `clip_l` and `clip_g`, or one of them; or one text encoder's: diffusers' {token: vectors}, A1111's
    `emb_params` and, pickled, its `string_to_param`. A base with two text encoders needs two of the latter: given as
    two sources, or side by side under names as in `files.PAIRS`, <name> and <name>_2 of diffusers' trainer.

    Args:
        source, subfolder, weight_name, revision: see `files.find`; or a list of two sources.
        widths: part of the base -> width D of its embeddings.
        ignore_keys: see `files.read`.

    Raises:
        UserError: keys don't match, the widths are another base's, or one text encoder's vectors do not say whose.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not 1 <= len(sources) <= len(KEYS):
        raise UserError(f'weights={sources} of a textual inversion must be one source, or a list of two.')
    paths = [files.find(one, NAMES, subfolder, weight_name, revision) for one in sources]
    contents = {path: files.read(path, ignore_keys=ignore_keys).tensors for path in paths}
    if len(sources) == 1 and len(widths) == 2 and len(_by_key(contents[paths[0]])) < 2:
        paths = pair(paths[0])
        contents |= {path: files.read(path, ignore_keys=ignore_keys).tensors for path in paths if path not in contents}
    found: dict[str, Tensor] = {}
    for number, path in enumerate(paths):
        vectors = _vectors(path, contents[path], widths, number if len(paths) == 2 else None)
        if twice := found.keys() & vectors:
            raise UserError(f"'{paths[0]}' and '{path}' both hold vectors for {', '.join(sorted(twice))}.")
        found |= vectors
    return _check(paths[0], {part: found[part] for part in widths if part in found}, widths), paths[0]


def _by_key(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vectors that are named for a text encoder, by the encoder."""
    return {part: tensors[key] for part, key in KEYS.items() if key in tensors}


def _vectors(path: Path, tensors: Mapping[str, Any], widths: Mapping[str, int], number: int | None) -> dict[str, Any]:
    """Return part -> vectors of one file.

    Args:
        number: of the file among two; None: it is the only one.
    """
    named = _by_key(tensors)
    single = None if named else of_one_encoder(tensors)
    if single is None:
        keys = [KEYS[part] for part in widths]
        files.refuse(path, unknown=[str(k) for k in tensors if k not in keys], missing=[] if named else keys)
        return named
    width = single[1].shape[-1] if isinstance(single[1], Tensor) and single[1].dim() else None
    fitting = [part for part, size in widths.items() if size == width]
    if number is None and len(widths) == 2 and (len(fitting) > 1 or width in OTHER_WIDTHS):
        raise UserError(f"'{path}' holds the vectors of one text encoder only; this base has two, and it does not say "
                        "which it is for. Give a file with 'clip_l' and 'clip_g' (or one of them), or the files of "
                        "both: weights=['FIRST', 'SECOND'].")
    return {fitting[0] if len(fitting) == 1 else list(widths)[number or 0]: single[1]}


def write_textual_inversion(folder: str | Path, vectors: Mapping[str, Tensor]) -> None:
    """Write learned_embeds.safetensors with `clip_l` and `clip_g`; `vectors`: part of the base -> [n, D]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({KEYS[part]: value.detach().cpu().contiguous() for part, value in vectors.items()}, Path(folder) / NAME,
              metadata={'format': 'pt'})


def pair(path: Path) -> list[Path]:
    """Return the files of the first and the second text encoder, of which `path` is one; only itself if it is alone."""
    other = next((Path(name) for name in files.siblings(str(path)) if Path(name).is_file()), None)
    if other is None:
        return [path]
    is_first = any(path.stem.endswith(first) and other.stem.endswith(second) for first, second in files.PAIRS)
    return [path, other] if is_first else [other, path]


def of_one_encoder(tensors: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return key and value of the only tensor of a file for one text encoder, or None."""
    inner = tensors.get('string_to_param')
    entries = inner if isinstance(inner, Mapping) else tensors
    return next(iter(entries.items())) if len(entries) == 1 else None


def _check(path: Path, tensors: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the vectors as [n, D], with widths and numbers checked."""
    vectors = {}
    for part, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() not in (1, 2):
            what = f'of shape {tuple(tensor.shape)}' if isinstance(tensor, Tensor) else f'a {type(tensor).__name__}'
            raise UserError(f"'{path}': the vectors for {part} are {what}; they must be numbers of shape [n, D].")
        vectors[part] = tensor.view(-1, tensor.shape[-1])
    wrong = [f'{v.shape[1]} wide for {part}, whose embeddings are {widths[part]} wide' for part, v in vectors.items()
             if v.shape[1] != widths[part]]
    if wrong:
        raise UserError(f"'{path}' was made for another base: its vectors are {' and '.join(wrong)}.")
    counts = {part: len(v) for part, v in vectors.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise UserError(f"'{path}' holds {' and '.join(f'{n} vectors for {part}' for part, n in counts.items())}; a "
                        'token needs the same number for each text encoder, and at least one.')
    return vectors
