"""SDXL, and what it is made of.

sdxl: the model: attaching adapters, encode, predict, trainables.
text_encoders: a prompt tokenized and encoded by both text encoders.
prompt_weighting: prompts with weights and of any length, by compel.
prompt_branches: which prompt each guidance branch reads, dropped captions, the cache of embeddings.
vae: images to latents and back, in training one image a call.
cache_plan: which frozen encoders a run keeps the outputs of; their digests.
components: dtypes of the components, which are shared, names of adapters.
request_batch: requests to a Batch.
image_inputs: images, masks and latents that a user gives, read and checked.
data_preprocessor: collated samples to a Batch on the device.
generate: images by the adapted model and by its base.
diffusers_pipeline: the model as a stock pipeline.
summary: print(model).
"""

from . import sdxl  # noqa: F401  (fills the registry)
