"""Check before a training that the captions hold the new words that shall be learned."""

from __future__ import annotations

from itertools import islice

from torch import Tensor

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError

#: Captions that are looked at.
MAX_CAPTIONS = 20_000


def learned_words(adapter: Adapter) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the new words of an adapter whose vectors train; a LoRA's file may bring words that don't."""
    return {word: pair for word, pair in adapter.new_tokens().items()
            if any(vectors is not None and vectors.requires_grad for vectors in pair)}


def check_new_words(runner: ExperimentRunner) -> None:
    """Count the captions with the new words that train (textual inversion); log it if some lack them.

    A stream, and a data set whose captions a user's own transform may change, are not looked at.

    Raises:
        UserError: no caption has the word, or only after the tokens that the text encoders read.
    """
    model, dataset = runner.bare_model, runner.train_dataloader.dataset
    learned = {name: words for name, adapter in model.adapters.items() if (words := learned_words(adapter))}
    captions = list(islice(dataset.captions() or (), MAX_CAPTIONS)) if learned and hasattr(dataset, 'captions') else []
    for name, words in learned.items() if captions else ():
        having = [text for text in captions if any(word.lower() in text.lower() for word in words)]
        num_read = sum(model.reads_word(text, words) for text in having)
        what = f"{' or '.join(map(repr, words))} of adapter '{name}'"
        length = model.tokenizer_2.model_max_length
        if not having:
            raise UserError(f'None of the {len(captions):,} captions has {what}, so it cannot be learned; the first is '
                            f"'{captions[0][:200]}'. Write the word into them, or add dict(type='CaptionPrefix', "
                            f"prefix='{next(iter(words))}, ') to the transforms.")
        if not num_read:
            raise UserError(f'{len(having):,} of {len(captions):,} captions have {what}, all of them after the '
                            f'{length} tokens that the text encoders read, so it cannot be learned; move it to the '
                            'beginning.')
        if num_read < len(captions):
            late = len(having) - num_read
            runner.logger.warning(f'{num_read:,} of {len(captions):,} captions have {what}'
                                  + (f'; in {late:,} more it stands after the {length} tokens that are read.' if late
                                     else '; the others do not train it.'))
