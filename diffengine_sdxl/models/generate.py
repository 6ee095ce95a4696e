"""Generate the images of a batch, with the adapters and without them, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from diffengine_sdxl.errors import one_of
from diffengine_sdxl.protocols import Model
from diffengine_sdxl.samplers.sampler import output_size
from diffengine_sdxl.structures import Batch

#: Images of the base without adapters, and of the model with all of them.
BASE, ADAPTED = IMAGE_SETS = ('base', 'adapted')
#: Begins the name of the images of one adapter alone.
ONLY = 'only_'
#: Images of the model with the weights of a second checkpoint, in a test that compares two.
COMPARED = 'compared'


def generate(model: Model, batch: Batch, image_sets: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return one dict a sample: key, seed, prompt, images {image_set: [3, H, W] in [0, 1], fp32}.

    All image sets start from the noise of the sample's seed.

    Args:
        model: has a sampler.
        batch: B samples.
        image_sets: of `model.image_sets` and `model.only_sets`; None generates the last of them, with all adapters.

    Raises:
        UserError: an image set is unknown; or see Sampler.
    """
    assert model.sampler is not None, 'the runner checks that a model that samples has a sampler'
    # Of all adapters: without an image prompt's own, its image would pass for one that sets the size.
    batch = replace(batch, size=output_size(batch, model))
    images = {}
    for image_set in model.image_sets[-1:] if image_sets is None else image_sets:
        one_of('image_sets', image_set, (*model.image_sets, *model.only_sets))
        with _adapters_of(model, image_set):
            images[image_set] = model.decode(model.sampler(model, batch))
    return [{'key': batch.key[i], 'seed': int(batch.seed[i]), 'prompt': batch.text[i],
             'images': {image_set: images[image_set][i] for image_set in images}} for i in range(len(batch))]


def _adapters_of(model: Model, image_set: str) -> AbstractContextManager[None]:
    """Let only the adapters act that an image set is made with."""
    if image_set == BASE and model.adapters:
        return model.disable_adapters()
    return model.only_adapter(image_set.removeprefix(ONLY)) if image_set in model.only_sets else nullcontext()
