"""Adapters, one file a kind; a new kind is a new file here and a line below.

base: what an adapter is. t2i_adapter, controlnet, ip_adapter, textual_inversion, image_encoder: the kinds.
lora: LoRA, DoRA, LoHa, LoKr, OFT. lora_layers: peft's layers injected, switched, removed. lora_checks: the arguments.
image_projection: an IP-Adapter's tokens. frozen_image_encoder: what it reads. untrusted_patterns: a file's patterns.
formats: the files.
"""

from . import controlnet, image_encoder, ip_adapter, lora, t2i_adapter, textual_inversion  # noqa: F401  (the registry)
