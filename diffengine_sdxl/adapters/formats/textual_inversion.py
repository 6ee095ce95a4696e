"""Files of textual inversion: the vectors of a new token for each text encoder."""

from __future__ import annotations

from collections.abc import Mapping
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


def read_textual_inversion(
        source: str | Path, widths: Mapping[str, int], subfolder: str | None = None, weight_name: str | None = None,
        revision: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """Return a new token's vectors, part of the base -> [n, D], and the file that holds them.

    Formats: SDXL's `clip_l` and `clip_g`; or one text encoder's: diffusers' {token: vectors}, A1111's `emb_params` and,
    pickled, its `string_to_param`. A base with two text encoders needs two such files, <name> and <name>_2, as
    diffusers' trainer writes them for SDXL.

    Args:
        source, subfolder, weight_name, revision: see `files.find`.
        widths: part of the base -> width D of its embeddings.

    Raises:
        UserError: keys don't match, a text encoder's vectors are missing, or the widths are another base's.
    """
    path = files.find(source, NAMES, subfolder, weight_name, revision)
    tensors = files.read(path).tensors
    keys = {part: KEYS[part] for part in widths}
    single = None if tensors.keys() & set(KEYS.values()) else of_one_encoder(tensors)
    if single is None:
        files.refuse(path, unknown=[str(k) for k in tensors if k not in keys.values()],
                     missing=[key for key in keys.values() if key not in tensors])
        return _check(path, {part: tensors[key] for part, key in keys.items()}, widths), path
    vectors = [single[1]]
    if len(keys) == 2 and (second := second_file(path)).is_file():
        entry = of_one_encoder(files.read(second).tensors)
        vectors += [] if entry is None else [entry[1]]
    if len(vectors) != len(keys):
        raise UserError(f"'{path}' holds the vectors of one text encoder only; this base has two, so it needs a file "
                        "with 'clip_l' and 'clip_g'.")
    return _check(path, dict(zip(keys, vectors, strict=True)), widths), path


def write_textual_inversion(folder: str | Path, vectors: Mapping[str, Tensor]) -> None:
    """Write learned_embeds.safetensors with `clip_l` and `clip_g`; `vectors`: part of the base -> [n, D]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({KEYS[part]: value.detach().cpu().contiguous() for part, value in vectors.items()}, Path(folder) / NAME,
              metadata={'format': 'pt'})


def second_file(path: Path) -> Path:
    """Return the name of the file with the second encoder's vectors, <name>_2, for one with the first's."""
    return path.with_name(f'{path.stem}_2{path.suffix}')


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
