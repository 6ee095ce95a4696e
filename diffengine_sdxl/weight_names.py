"""What diffusers and transformers call the files of a model's weights, and which of them are read."""

import re
from collections.abc import Collection

#: What model classes of diffusers and of transformers call their weights.
STEMS = ('diffusion_pytorch_model', 'model')
BINS = ('diffusion_pytorch_model', 'pytorch_model')
_STEM, _SHARD = '|'.join(dict.fromkeys((*STEMS, *BINS))), r'-\d{5}-of-\d{5}'
#: A file of a model's weights; its group is the variant.
WEIGHTS = re.compile(rf'(?:{_STEM})(?:{_SHARD})?(?:\.([^.]+?))?(?:{_SHARD})?\.(?:safetensors|bin)')
_VARIANT = re.compile(rf'(?:{"|".join(STEMS)})'
                      rf'(?:\.([^.]+?)(?:{_SHARD})?\.safetensors|\.safetensors\.index\.([^.]+)\.json)')


def weight_files(names: Collection[str], variant: str | None = None) -> list[str]:
    """Of the files of a model's folder those of its weights, once: whole, else an index and its parts; or none.

    In safetensors. A pickle of tensors (.bin), which is read with torch's `weights_only`, where there are none at all.
    """
    kind = f'.{variant}' if variant else ''
    for stems, end in ((STEMS, 'safetensors'), (BINS, 'bin')):
        for stem in stems:
            if (whole := f'{stem}{kind}.{end}') in names:
                return [whole]
            if (index := f'{stem}.{end}.index{kind}.json') in names:
                part = re.escape(kind)
                shards = re.compile(rf'{stem}({part}{_SHARD}|{_SHARD}{part})\.{end}')
                return [index, *sorted(name for name in names if shards.fullmatch(name))]
        if in_safetensors(names):
            break
    return []


def variants(names: Collection[str]) -> list[str]:
    """The variants that there are of a model's weights in safetensors, e.g. ['fp16']."""
    return sorted({found[1] or found[2] for name in names if (found := _VARIANT.fullmatch(name))})


def in_safetensors(names: Collection[str]) -> list[str]:
    """A model's weights of any variant; a file of another name is somebody else's."""
    return [name for name in names if name.startswith(STEMS) and name.endswith('.safetensors')
            and WEIGHTS.fullmatch(name)]
