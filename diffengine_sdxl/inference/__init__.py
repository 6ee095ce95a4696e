"""Generate images from Python with a config's model and its refiner."""

from . import inferencer  # noqa: F401  (fills the registry)
