"""Adapters, one file a kind. A new kind is a new file here and a line below."""

from . import image_encoder, t2i_adapter  # noqa: F401  (fills the registry)
