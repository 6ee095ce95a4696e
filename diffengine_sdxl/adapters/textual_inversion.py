"""Textual inversion: a new word for prompts, whose embeddings are learned; nothing else changes.

Gal et al. 2022, arXiv:2208.01618; for SDXL the word has vectors of its own in each of the two text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from diffengine_sdxl.adapters.base import Adapter, Range, Tensors
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.textual_inversion import (
    KEYS,
    read_textual_inversion,
    write_textual_inversion,
)
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.loading.strict import log_loaded
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch

#: Part of the base -> its tokenizer.
TOKENIZERS = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}


@ADAPTERS.register_module()
class TextualInversion(Adapter):
    """A new word: wherever a prompt has `token`, the text encoders read its vectors.

    `vectors`: [n, D] for each text encoder of the base, by the encoder's name.

    Args:
        token: the word as it stands in prompts, case-insensitive; one that no tokenizer has, e.g. '<my-thing>'.
        num_vectors: the number of tokens it takes; None for one, or as many as `weights` hold.
        init: one or more words whose token embeddings initialize the vectors in turn, repeated if there are more
            vectors.
        weights: a file, a folder or hub id with learned_embeds.safetensors, or a list of two, of the first and the
            second text encoder; None to start from `init`. An encoder without vectors reads the word as ordinary text.
        subfolder, weight_name, revision: of `weights`, a folder or hub id.
        trainable: see Adapter.
        scale: 1; or 0, which reads the word as ordinary text.
        active_range: (0, 1) only, as a prompt is encoded once.
        ignore_keys: see Adapter.

    Raises:
        UserError: the token is invalid or exists already; `init`, scale or active_range are invalid; or see
            `formats.textual_inversion`.
    """

    brings_precision = True
    attach_point = 'in the vocabulary'
    diffusers_call = (
        "in two calls, one for each text encoder: pipeline.load_textual_inversion(state['clip_l'], token=..., "
        "text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer), and the same of 'clip_g' with "
        'text_encoder_2 and tokenizer_2, where state is safetensors.torch.load_file('
        "'{out}/learned_embeds.safetensors')")

    def __init__(self, token: str, num_vectors: int | None = None, init: str = 'object',
                 weights: str | Sequence[str] | None = None, trainable: bool = True, scale: float = 1.0,
                 active_range: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 weight_name: str | None = None, revision: str | None = None, ignore_keys: Sequence[str] = ()) -> None:
        self.token = token
        # The only kind whose weights may be two files.
        super().__init__(None, weights, trainable, scale, active_range, ignore_keys)  # type: ignore[arg-type]
        if not token or any(c.isspace() for c in token):
            raise UserError(f"token={token!r} is not a valid word: it needs at least one character and no spaces, e.g. "
                            "'<my-thing>'.")
        self.num_vectors = None if num_vectors is None else whole_number('num_vectors', num_vectors, 1)
        self.init = init
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}

    def check_partner(self, scales: Range, start: Range, end: Range) -> None:
        """Refuse draws: its word acts where a caption has it."""
        raise UserError(f"model.partners.{self.name}: the word '{self.token}' acts where a caption has it; leave it "
                        'out of a part of the captions (CaptionTagDrop) instead.')

    def _check_scale(self, scale: float) -> None:
        if scale not in (0, 1):
            raise UserError(f"scale={scale:g} of '{self.token}' must be 1, or 0 to read the word as ordinary text.")

    def _check_active_range(self, active_range: tuple[float, float]) -> None:
        if active_range != (0, 1):
            raise UserError(f"active_range={active_range} of '{self.token}' must be (0, 1): prompts are encoded once "
                            'for all steps.')

    def attach(self, model: AdapterHost) -> None:
        """Make the vectors, for every text encoder that the base has."""
        tables = {part: getattr(model, part).get_input_embeddings().weight for part in TOKENIZERS
                  if getattr(model, part) is not None}
        if self.weights is not None:
            widths = {part: table.shape[1] for part, table in tables.items()}
            initial, path = read_textual_inversion(self.weights, widths, **self.source, ignore_keys=self.ignore_keys)
            num_vectors = len(next(iter(initial.values())))
            if self.num_vectors not in (None, num_vectors):
                raise UserError(f"'{path}' holds {num_vectors} vectors, but '{self.token}' has "
                                f'num_vectors={self.num_vectors}; leave that out.')
            log_loaded(f"TextualInversion '{self.name}'", path, len(initial))
            if absent := tables.keys() - initial:
                print_log(f"'{path}' has no vectors for {', '.join(sorted(absent))}, which reads '{self.token}' as "
                          'ordinary text.', logger='current')
        else:
            initial = {part: self._initial(getattr(model, TOKENIZERS[part]), table) for part, table in tables.items()}
        # What trains is fp32 whatever the encoders are stored in; fp64 in an fp64 model.
        self.vectors = nn.ParameterDict({
            part: nn.Parameter(value.detach().to(
                tables[part].device, torch.promote_types(tables[part].dtype, torch.float32)).clone())
            for part, value in initial.items()})

    def detach(self, model: AdapterHost) -> None:
        """Drop the vectors, which are all there is."""
        del self.vectors

    def new_tokens(self) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
        """Return the word and its vectors; none at scale 0."""
        if self.scale == 0:
            return {}
        first, second = (self.vectors.get(part) for part in TOKENIZERS)
        return {self.token: (first, second)}

    def encode(self, batch: Batch) -> Tensors:
        """Return nothing: the text encoders read the vectors.

        Raises:
            UserError: it would train at scale 0.
        """
        if self.scale == 0 and torch.is_grad_enabled() and self.training and self.trainables():
            raise UserError(f"'{self.name}' has scale=0, which reads its word as ordinary text, so it cannot be "
                            'learned; set scale=1, or trainable=False.')
        return {}

    def add_to_pipeline(self, stock: Any) -> None:
        """Add a token to the tokenizers and rows to the text encoders; in diffusers the word is case-sensitive."""
        for word, vectors in self.new_tokens().items():
            stock.add_token(word, dict(zip(TOKENIZERS, vectors, strict=True)))

    def save(self, folder: str | Path) -> None:
        """Write learned_embeds.safetensors: `clip_l` and `clip_g`, [n, D] each."""
        write_textual_inversion(folder, dict(self.vectors.items()))

    @torch.no_grad()
    def load(self, source: str | Path) -> None:
        """Read a file, or a folder that holds one, in place.

        Raises:
            UserError: see `formats.textual_inversion`; or it has another number of vectors.
        """
        vectors, path = read_textual_inversion(source, {part: v.shape[1] for part, v in self.vectors.items()})
        refuse(path, missing=[KEYS[part] for part in self.vectors if part not in vectors])
        for part, value in vectors.items():
            if len(value) != len(self.vectors[part]):
                raise UserError(f"'{path}' holds {len(value)} vectors; '{self.token}' of adapter '{self.name}' has "
                                f'{len(self.vectors[part])}.')
        for part, value in vectors.items():
            self.vectors[part].copy_(value)
        log_loaded(f"TextualInversion '{self.name}'", path, len(vectors))

    def _initial(self, tokenizer: Any, table: Tensor) -> Tensor:
        """Return the embeddings [n, D] of `init`'s tokens, in turn."""
        ids = tokenizer(self.init, add_special_tokens=False).input_ids
        if not ids or tokenizer.unk_token_id in ids:
            raise UserError(f"init={self.init!r} of '{self.token}' holds tokens unknown to the tokenizer; use a word "
                            'close to what the new one shall mean.')
        num_vectors = self.num_vectors or 1
        if len(ids) > num_vectors:
            print_log(f"'{self.token}': init={self.init!r} is {len(ids)} tokens, of which the first {num_vectors} are "
                      'used.', logger='current')
        return table[list(islice(cycle(ids), num_vectors))]
