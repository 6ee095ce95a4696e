"""Textual inversion: a new word for prompts, whose embeddings are learned; nothing else changes.

Gal et al. 2022, arXiv:2208.01618; for SDXL the word has vectors of its own in each of the two text encoders.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from diffengine_sdxl.adapters.base import Adapter, Tensors
from diffengine_sdxl.adapters.formats.textual_inversion import read_textual_inversion, write_textual_inversion
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.weights import told

#: Part of the base -> its tokenizer.
TOKENIZERS = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}


@ADAPTERS.register_module()
class TextualInversion(Adapter):
    """A word of its own: wherever a prompt has `token`, the text encoders read its vectors.

    `vectors`: [n, D] for each text encoder of the base, named after it.

    Args:
        token: the word as it stands in prompts, in any case of letters; one that no tokenizer has, e.g. '<my-thing>'.
        num_vectors: how many tokens it takes; None: one, or as many as `weights` hold.
        init: a word or several whose tokens' embeddings start the vectors, one each, again from the first if there are
            more vectors.
        weights: a file, a folder or hub id with learned_embeds.safetensors; None for `init`.
        subfolder, weight_name, revision: of `weights`, a folder or hub id.
        trainable: see Adapter.
        scale: 1; or 0, with which the word is read as any text.
        window: the whole way only: a prompt is read once.

    Raises:
        ValueError: the token is none, or is taken; `init` is none; another scale or window; or see
            `formats.textual_inversion`.
    """

    place = 'in the vocabulary'

    def __init__(self, token: str, num_vectors: int | None = None, init: str = 'object', weights: str | None = None,
                 trainable: bool = True, scale: float = 1.0, window: Sequence[float] = (0.0, 1.0),
                 subfolder: str | None = None, weight_name: str | None = None, revision: str | None = None) -> None:
        self.token = token
        super().__init__(None, weights, trainable, scale, window)
        if not token or any(c.isspace() for c in token):
            raise ValueError(f"token={token!r} cannot be a new word: it needs letters or signs, and no space, e.g. "
                             "'<my-thing>'.")
        if num_vectors is not None and num_vectors < 1:
            raise ValueError(f"num_vectors={num_vectors} of '{token}' must be at least 1.")
        self.num_vectors, self.init = num_vectors, init
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}

    def _check_window(self, window: tuple[float, float]) -> None:
        if window != (0, 1):
            raise ValueError(f"window={window} of '{self.token}': a prompt is read once, for all of the way; a textual "
                             'inversion has no window but (0, 1).')

    def attach(self, model: Any) -> None:
        """Make the vectors, for every text encoder that the base has."""
        tables = {part: getattr(model, part).get_input_embeddings().weight for part in TOKENIZERS
                  if getattr(model, part) is not None}
        if self.weights is not None:
            read, path = read_textual_inversion(self.weights, {k: v.shape[1] for k, v in tables.items()}, **self.source)
            if self.num_vectors not in (None, len(next(iter(read.values())))):
                raise ValueError(f"'{path}' holds {len(next(iter(read.values())))} vectors, but '{self.token}' has "
                                 f'num_vectors={self.num_vectors}; leave that out.')
            told(f"TextualInversion '{self.name}'", path, len(read))
        else:
            read = {part: self._initial(getattr(model, TOKENIZERS[part]), table) for part, table in tables.items()}
        # What trains is fp32 whatever the encoders are stored in; fp64 in an fp64 model.
        self.vectors = nn.ParameterDict({
            part: nn.Parameter(value.detach().to(table.device, torch.promote_types(table.dtype, torch.float32)).clone())
            for (part, value), table in zip(read.items(), tables.values(), strict=True)})

    def ready(self, model: Any) -> None:
        """See that the word is new.

        Raises:
            ValueError: another adapter brings it, or a tokenizer has it.
        """
        model.words()

    def detach(self, model: Any) -> None:
        """Nothing of it lives in the base."""
        del self.vectors

    def words(self) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
        """The word and its vectors; none at scale 0."""
        if self.scale == 0:
            return {}
        first, second = (self.vectors.get(part) for part in TOKENIZERS)
        return {self.token: (first, second)}

    def encode(self, batch: Batch) -> Tensors:
        """Nothing: the text encoders do it.

        Raises:
            ValueError: it should train at scale 0.
        """
        if self.scale == 0 and torch.is_grad_enabled() and self.training and self.trainables():
            raise ValueError(f"'{self.name}' has scale=0, so its word is read as any text and cannot be learned; set "
                             'scale=1, or trainable=False.')
        return {}

    def to_stock(self, stock: Any) -> None:
        """A word of the tokenizers, and rows of the text encoders; diffusers reads it in the letters' own case only."""
        for word, vectors in self.words().items():
            stock.add_word(word, dict(zip(TOKENIZERS, vectors, strict=True)))

    def save(self, folder: str | Path) -> None:
        """Write learned_embeds.safetensors: `clip_l` and `clip_g`, [n, D] each."""
        write_textual_inversion(folder, dict(self.vectors.items()))

    @torch.no_grad()
    def load(self, source: str | Path) -> None:
        """Read a file, or a folder that holds one, in place.

        Raises:
            ValueError: see `formats.textual_inversion`; or it has another number of vectors.
        """
        read, path = read_textual_inversion(source, {part: v.shape[1] for part, v in self.vectors.items()})
        for part, value in read.items():
            if len(value) != len(self.vectors[part]):
                raise ValueError(f"'{path}' holds {len(value)} vectors; '{self.token}' of adapter '{self.name}' has "
                                 f'{len(self.vectors[part])}.')
        for part, value in read.items():
            self.vectors[part].copy_(value)
        told(f"TextualInversion '{self.name}'", path, len(read))

    def _check_scale(self, scale: float) -> None:
        if scale not in (0, 1):
            raise ValueError(f"scale={scale:g} of '{self.token}': a word is read as itself (scale=1) or as any "
                             'text (scale=0), nothing between.')

    def _initial(self, tokenizer: Any, table: Tensor) -> Tensor:
        """The embeddings [n, D] of `init`'s tokens, in turn."""
        ids = tokenizer(self.init, add_special_tokens=False).input_ids
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"init={self.init!r} of '{self.token}' holds what the tokenizer does not know; take a "
                             'word for what the new one shall mean.')
        wanted = self.num_vectors or 1
        if len(ids) > wanted:
            print_log(f"'{self.token}': init={self.init!r} is {len(ids)} tokens, of which the first {wanted} are used.",
                      logger='current')
        return table[list(islice(cycle(ids), wanted))]
