"""Textual inversions: the vectors of a word, for both text encoders.

Sources of the layouts: diffusers' examples/textual_inversion/textual_inversion_sdxl.py, sd-scripts'
sdxl_train_textual_inversion.py, OneTrainer, and A1111's modules/textual_inversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from diffengine_sdxl.testing.layouts.base import WORD
from diffengine_sdxl.testing.layouts.layout import Layout
from diffengine_sdxl.testing.layouts.single_files import Writer, words


def layouts(write: Writer) -> Iterator[Layout]:
    """Yield all."""
    kind, change = 'TextualInversion', 'word'
    vectors = words()
    first, second = vectors.values()
    write.outputs[change] = write.base.encode(vectors=vectors)
    both = {'clip_l': first, 'clip_g': second}

    def pickle(tensor: torch.Tensor) -> dict[str, Any]:
        return {'string_to_token': {'*': 265}, 'string_to_param': {'*': tensor}, 'name': 'mark', 'step': 500,
                'sd_checkpoint': None, 'sd_checkpoint_name': None}

    def layout(name: str, title: str, by: str, files: dict[str, Any]) -> Layout:
        return Layout(f'word_{name}', f'textual inversion: {title}', by, files, change, next(iter(files)), kind)

    yield layout('clip_l_clip_g', 'clip_l and clip_g in one file', 'sd-scripts, OneTrainer, ComfyUI',
                 {'mark.safetensors': both})
    yield layout('pickle', 'the same, pickled', 'A1111', {'mark.pt': both})
    yield layout('two_files', 'a file for each encoder, <name> and <name>_2, by the word', 'diffusers', {
        'learned_embeds.safetensors': {WORD: first}, 'learned_embeds_2.safetensors': {WORD: second}})
    yield layout('two_files_te', 'a file for each encoder, <name>_te1 and <name>_te2', 'trainers', {
        'mark_te1.safetensors': {'emb_params': first}, 'mark_te2.safetensors': {'emb_params': second}})
    yield layout('two_pickles', 'a pickle for each encoder, string_to_param', 'A1111', {
        'mark.pt': pickle(first), 'mark_2.pt': pickle(second)})
    write.outputs['word_clip_l'] = write.base.encode(vectors={'text_encoder': first})
    yield Layout('word_clip_l', 'textual inversion: clip_l alone; the second encoder reads the word as ordinary text',
                 'trainers of one encoder', {'mark.safetensors': {'clip_l': first}}, 'word_clip_l', 'mark.safetensors',
                 kind)
    rounded = {part: value.half() for part, value in vectors.items()}
    write.outputs['word_float16'] = write.base.encode(vectors=rounded)
    yield Layout('word_float16', 'textual inversion: clip_l and clip_g in fp16', 'sd-scripts', {
        'mark.safetensors': dict(zip(('clip_l', 'clip_g'), rounded.values(), strict=True))}, 'word_float16',
        'mark.safetensors', kind)
