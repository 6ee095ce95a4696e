"""One LoRA: "Single LoRA" of Refiners' guide."""
_base_ = ['sdxl_refiners_vanilla.py']
# 1.0 is the file as it was trained, alpha / rank included, as in diffusers. Refiners leaves alpha out: its scale s is
# s * rank / alpha here. The numbers of these configs are the guide's.
model = dict(adapters=dict(
    scifi=dict(type='LoRA', weights='Sci-fi_Environments_sdxl.safetensors', trainable=False, scale=1.0)))
