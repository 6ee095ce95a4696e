"""New words for prompts that a LoRA's file brought (OneTrainer and A1111 bundle them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.adapters.formats.lora_weights import PARTS
from diffengine_sdxl.errors import UserError

_ENCODERS = PARTS[1:]


class Words(nn.Module):
    """Words and their vectors for each text encoder; frozen.

    Args:
        words: word -> part -> vectors [n, D]; a part without vectors reads the word as ordinary text.
        source: their file, for errors.
        encoders: part -> text encoder of the base.

    Raises:
        UserError: the vectors don't fit the text encoders, or their numbers differ.
    """

    def __init__(self, words: Mapping[str, Mapping[str, Tensor]], source: str, encoders: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = {word: tuple(part for part in _ENCODERS if part in vectors) for word, vectors in words.items()}
        for number, (word, parts) in enumerate(self.names.items()):
            for part in parts:
                vectors, encoder = words[word][part], encoders.get(part)
                table = None if encoder is None else encoder.get_input_embeddings().weight
                if table is None or vectors.shape[1] != table.shape[1]:
                    raise UserError(f"'{source}' was made for another base: its vectors of the word '{word}' are "
                                    f'{vectors.shape[1]} wide for {part}, ' + (
                                        'which this base lacks.' if table is None else
                                        f'whose embeddings are {table.shape[1]} wide.'))
                dtype = torch.promote_types(table.dtype, torch.float32)
                self.register_buffer(f'{part}_{number}', vectors.detach().to(table.device, dtype, copy=True), False)
            if len({len(words[word][part]) for part in parts}) != 1 or not len(words[word][parts[0]]):
                counts = ' and '.join(f'{len(words[word][part])} vectors for {part}' for part in parts)
                raise UserError(f"'{source}': the word '{word}' has {counts}; it needs the same number for each text "
                                'encoder, and at least one.')

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return word -> part -> vectors [n, D]."""
        return {word: {part: self.get_buffer(f'{part}_{number}') for part in parts}
                for number, (word, parts) in enumerate(self.names.items())}

    def new_tokens(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Return what `Adapter.new_tokens` does."""
        words = self.tensors().items()
        return {word: (vectors.get(_ENCODERS[0]), vectors.get(_ENCODERS[1])) for word, vectors in words}

    @torch.no_grad()
    def load(self, words: Mapping[str, Mapping[str, Tensor]], source: object) -> None:
        """Copy other vectors of the same words.

        Raises:
            UserError: they are of other words, or of another shape.
        """
        theirs, ours = ({(word, part): tuple(v.shape) for word, vectors in held.items() for part, v in vectors.items()}
                        for held in (words, self.tensors()))
        if theirs != ours:
            raise UserError(f"The words in '{source}' ({_shapes(theirs)}) are not those of the adapter "
                            f'({_shapes(ours)}).')
        for word, vectors in self.tensors().items():
            for part, value in vectors.items():
                value.copy_(words[word][part])


def _shapes(held: Mapping[tuple[str, str], tuple[int, ...]]) -> str:
    return ', '.join(f"'{word}' {list(shape)} for {part}" for (word, part), shape in held.items()) or 'none'
