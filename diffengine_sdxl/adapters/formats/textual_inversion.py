"""Files of new words for prompts (textual inversion), as people have them: vectors for each text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl.adapters.formats import files

NAME = 'learned_embeds.safetensors'
NAMES = (NAME, 'learned_embeds.bin')
#: Part of the base -> its key, as diffusers' and kohya's trainers and ComfyUI have it for SDXL.
KEYS = {'text_encoder': 'clip_l', 'text_encoder_2': 'clip_g'}


def read_textual_inversion(
        source: str | Path, widths: Mapping[str, int], subfolder: str | None = None, weight_name: str | None = None,
        revision: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """The vectors of a word: part of the base -> [n, D], and the file that held them.

    Known are: SDXL's `clip_l` and `clip_g`; and of one text encoder diffusers' {word: vectors}, A1111's `emb_params`
    and, pickled, its `string_to_param`, alone for a base of one text encoder, or in two files <name> and <name>_2 side
    by side, as diffusers' trainer writes them for SDXL.

    Args:
        source, subfolder, weight_name, revision: see `files.find`.
        widths: part of the base -> width D of its embeddings.

    Raises:
        ValueError: keys don't match, it holds one text encoder's vectors only, or they are of other widths.
    """
    path = files.find(source, NAMES, subfolder, weight_name, revision)
    tensors = files.read(path).tensors
    keys = {part: KEYS[part] for part in widths}
    alone = None if tensors.keys() & set(KEYS.values()) else _of_one_encoder(tensors)
    if alone is None:
        files.refuse(path, unknown=[str(k) for k in tensors if k not in keys.values()],
                     missing=[key for key in keys.values() if key not in tensors])
        found = {part: tensors[key] for part, key in keys.items()}
    else:
        second = path.with_name(f'{path.stem}_2{path.suffix}')
        both = [alone]
        if len(keys) == 2 and second.is_file():
            other = _of_one_encoder(files.read(second).tensors)
            both += [] if other is None else [other]
        if len(both) != len(keys):
            raise ValueError(f"'{path}' holds the vectors of one text encoder only; this base has two, and the word "
                             "needs vectors for both: a file with 'clip_l' and 'clip_g'.")
        found = dict(zip(keys, both, strict=True))
    return _checked(path, found, widths), path


def write_textual_inversion(folder: str | Path, vectors: Mapping[str, Tensor]) -> None:
    """Write learned_embeds.safetensors with `clip_l` and `clip_g`; `vectors`: part of the base -> [n, D]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({KEYS[part]: value.detach().cpu().contiguous() for part, value in vectors.items()}, Path(folder) / NAME,
              metadata={'format': 'pt'})


def _of_one_encoder(tensors: Mapping[str, Any]) -> Any:
    """The one tensor of a file that knows one text encoder only, or None."""
    inner = tensors.get('string_to_param')
    held = inner if isinstance(inner, Mapping) else tensors
    return next(iter(held.values())) if len(held) == 1 else None


def _checked(path: Path, found: dict[str, Any], widths: Mapping[str, int]) -> dict[str, Tensor]:
    vectors = {}
    for part, value in found.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (1, 2):
            what = f'of shape {tuple(value.shape)}' if isinstance(value, Tensor) else f'a {type(value).__name__}'
            raise ValueError(f"'{path}': the vectors for {part} are {what}; they should be numbers of shape [n, D].")
        vectors[part] = value.view(-1, value.shape[-1])
    wrong = [f'{v.shape[1]} wide for {part}, whose embeddings are {widths[part]} wide' for part, v in vectors.items()
             if v.shape[1] != widths[part]]
    if wrong:
        raise ValueError(f"'{path}' was made for another base: its vectors are {' and '.join(wrong)}.")
    counts = {part: len(value) for part, value in vectors.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"'{path}' holds {' and '.join(f'{n} vectors for {part}' for part, n in counts.items())}; a "
                         'word has as many in each text encoder, and at least one.')
    return vectors
