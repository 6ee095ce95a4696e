"""The report on the training data: printed before step 1, and by `diffengine-sdxl data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.datasets.report import CaptionLimit, describe_data
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.models.text_encoders import split_tokens

FILE = 'data_report.txt'


def caption_limit(tokenizers: Sequence[Any], num_chunks: int) -> CaptionLimit:
    """Return how much of a caption is read: `num_chunks` chunks of both text encoders' tokens.

    Args:
        tokenizers: of the text encoders; None for one that a refiner lacks.
    """
    present = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    length = min(tokenizer.model_max_length for tokenizer in present)

    def ids(texts: Sequence[str]) -> list[list[list[int]]]:
        # Without the begin and end tokens.
        return [[row[1:-1] for row in tokenizer(list(texts), verbose=False).input_ids] for tokenizer in present]

    def chunks(texts: Sequence[str]) -> list[int]:
        split = [[len(split_tokens(tokenizer, row, length - 2)) for row in rows]
                 for tokenizer, rows in zip(present, ids(texts), strict=True)]
        return list(map(max, *split)) if len(split) > 1 else split[0]

    if num_chunks == 1:
        return CaptionLimit(length, ('token', 'tokens'), lambda texts: [max(map(len, rows)) + 2
                                                             for rows in zip(*ids(texts), strict=True)])
    return CaptionLimit(num_chunks, (f'chunk of {length - 2} tokens', f'chunks of {length - 2} tokens'), chunks)


def log_data_report(runner: ExperimentRunner) -> None:
    """Log the report on the runner's training data, and write it to the work_dir; call it in the main process."""
    model = runner.bare_model
    limit = caption_limit((model.tokenizer, model.tokenizer_2), model.caption_chunks)
    text = describe_data(runner.train_dataloader.dataset, limit, runner.train_dataloader.sampler)
    with replacing(Path(runner.work_dir) / FILE) as path:
        path.write_text(text + '\n', encoding='utf-8')
    runner.log_lines(text)
