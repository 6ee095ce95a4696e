"""An SDXL as a stock diffusers pipeline, on the disk."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from diffengine_sdxl.adapters.lora_layers import unwrapped


@contextmanager
def without_wrappers(model: Any) -> Iterator[None]:
    """Inside, the base's layers stand under their own names, whatever adapters have put around them."""
    with ExitStack() as stack:
        for part in (model.unet, model.text_encoder, model.text_encoder_2):
            if part is not None:
                stack.enter_context(unwrapped(part))
        yield


def save_pipeline(model: Any, folder: Path) -> None:
    """Write the base in diffusers' layout; adapters stay out of it.

    Args:
        model: an SDXL. folder: made if missing.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae, text_encoder=model.text_encoder, text_encoder_2=model.text_encoder_2,
        tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, unet=model.unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler.from_config(model.scheduler_settings),
        force_zeros_for_empty_prompt=model.null_text == 'zeros')
    with without_wrappers(model):
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    for encoder in ('text_encoder', 'text_encoder_2'):
        _restore_prefix(folder / encoder / 'model.safetensors')


def _restore_prefix(path: Path) -> None:
    """Give CLIP's keys the prefix `text_model.` back: transformers 5 leaves it out, other tools look for it."""
    if not path.is_file():
        return
    state = load_file(path)
    if any(k.startswith('text_model.') for k in state):
        return
    save_file({k if k.startswith('text_projection') else f'text_model.{k}': v for k, v in state.items()}, path,
              metadata={'format': 'pt'})
