"""One adapter in every layout that programs write, and the change of the denoiser's output that it must make.

`write_layouts(folder)`, or `python -m diffengine_sdxl.testing layouts FOLDER`. Nothing here reads or writes with the
code under test: each change is merged by hand, in fp64, into the weights of a tiny base.
"""

from diffengine_sdxl.testing.layouts.write import write_layouts

__all__ = ['write_layouts']
