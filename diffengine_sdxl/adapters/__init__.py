"""Adapters, one file a kind. A new kind is a new file here and a line below."""

from . import controlnet, image_encoder, ip_adapter, lora, t2i_adapter, textual_inversion  # noqa: F401  (the registry)
