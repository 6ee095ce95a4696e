"""A tiny SDXL, its refiner and an image encoder, from the real diffusers and transformers classes, with random weights.

`write_tiny_sdxl(folder)` writes a folder that `DiffusionPipeline.from_pretrained` and `SDXL(pretrained=folder)`
both load: two text encoders, micro-conditioning, VAE, scheduler.
"""

from pathlib import Path
from typing import Any

from diffengine_sdxl import rng


def byte_characters() -> list[str]:
    """Return the 256 printable characters that represent bytes in CLIP's vocabulary, in the order of its ids.

    Source: Radford et al. 2019, GPT-2's byte-level BPE, as CLIP uses it.
    """
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


def tiny_tokenizer(pad_token: str = '<|endoftext|>') -> Any:
    """Return a CLIPTokenizer of 514 tokens without merges: each byte is a token, so it reads any text."""
    from transformers import CLIPTokenizer
    characters = byte_characters()
    tokens = [*characters, *[c + '</w>' for c in characters], '<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77,
                         pad_token=pad_token)


def tiny_text_encoders(hidden: int = 32, pooled: int = 32) -> tuple[Any, Any]:
    """Return the two text encoders, of two layers each: CLIPTextModel and CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    common = dict(vocab_size=514, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=77, bos_token_id=512, eos_token_id=513)
    return (CLIPTextModel(CLIPTextConfig(**common, pad_token_id=513, hidden_act='quick_gelu')),
            CLIPTextModelWithProjection(CLIPTextConfig(**common, pad_token_id=0, hidden_act='gelu',
                                                       projection_dim=pooled)))


def tiny_unet(channels: tuple[int, ...] = (16, 32, 64), cross_attention_dim: int = 64, pooled: int = 32,
              num_time_ids: int = 6, **changes: Any) -> Any:
    """Return a UNet of SDXL's block layout: no attention in the first block, transformers in the others."""
    from diffusers import UNet2DConditionModel
    num = len(channels) - 1
    config: dict[str, Any] = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1,
        norm_num_groups=8, down_block_types=('DownBlock2D', *['CrossAttnDownBlock2D'] * num),
        up_block_types=(*['CrossAttnUpBlock2D'] * num, 'UpBlock2D'), cross_attention_dim=cross_attention_dim,
        attention_head_dim=tuple(max(1, c // 16) for c in channels), use_linear_projection=True,
        transformer_layers_per_block=tuple([1] * num + [2]), addition_embed_type='text_time',
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * num_time_ids + pooled)
    return UNet2DConditionModel(**{**config, **changes})


#: The down blocks of SDXL's refiner.
REFINER_BLOCKS = ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D')


def tiny_vae(num_blocks: int = 4) -> Any:
    """Return a VAE whose latents are 2 ** (num_blocks - 1) times smaller than its images."""
    from diffusers import AutoencoderKL
    return AutoencoderKL(block_out_channels=(8, 8, 16, 16)[:num_blocks], norm_num_groups=4, latent_channels=4,
                         down_block_types=('DownEncoderBlock2D',) * num_blocks, layers_per_block=1,
                         up_block_types=('UpDecoderBlock2D',) * num_blocks, sample_size=64,
                         scaling_factor=0.13025)


def tiny_image_encoder(projection: int = 24, image_size: int = 64) -> Any:
    """Return a CLIP image encoder of two layers, with 17 tokens of width 32."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    return CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=projection, num_hidden_layers=2, num_attention_heads=4,
        image_size=image_size, patch_size=image_size // 4))


def write_tiny_image_encoder(folder: str | Path, seed: int = 0, projection: int = 24, image_size: int = 64) -> Path:
    """Write an image encoder and the settings of its CLIPImageProcessorPil. The same arguments give the same bytes."""
    from transformers import CLIPImageProcessorPil
    with rng.fork(seed, 'tiny image encoder'):
        tiny_image_encoder(projection, image_size).save_pretrained(str(folder))
    CLIPImageProcessorPil(size={'shortest_edge': image_size}, crop_size={'height': image_size, 'width': image_size}
                          ).save_pretrained(str(folder))
    return Path(folder)


def sdxl_scheduler(**changes: Any) -> Any:
    """Return the scheduler of SDXL base 1.0."""
    from diffusers import EulerDiscreteScheduler
    return EulerDiscreteScheduler(**{**dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', num_train_timesteps=1000,
        prediction_type='epsilon', timestep_spacing='leading', steps_offset=1), **changes})


def write_tiny_sdxl(folder: str | Path, seed: int = 0, vae_blocks: int = 4, hidden: int = 32,
                    scheduler: dict[str, Any] | None = None, **unet: Any) -> Path:
    """Write a tiny SDXL in diffusers' layout. The same arguments give the same bytes.

    Args:
        vae_blocks: 4 for SDXL's factor of 8, 3 for a factor of 4.
        hidden: width of each text encoder; `cross_attention_dim` of the UNet is twice that.
        scheduler: changes to the scheduler's config, e.g. `dict(prediction_type='v_prediction')`.
        unet: changes to the UNet, e.g. `channels`, or `in_channels=9` for inpainting.
    """
    from diffusers import StableDiffusionXLPipeline
    with rng.fork(seed, 'tiny sdxl'):
        text_encoder, text_encoder_2 = tiny_text_encoders(hidden)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(vae_blocks), text_encoder=text_encoder, text_encoder_2=text_encoder_2,
            tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer('!'), unet=tiny_unet(**unet),
            scheduler=sdxl_scheduler(**(scheduler or {})), add_watermarker=False)
    pipeline.save_pretrained(str(folder))
    return Path(folder)


def write_tiny_refiner(folder: str | Path, seed: int = 1, hidden: int = 32, scheduler: dict[str, Any] | None = None,
                       **unet: Any) -> Path:
    """Write a tiny refiner in diffusers' layout: one text encoder, four blocks, five time ids. See `write_tiny_sdxl`.

    It can share VAE and text encoder with a base of the same `hidden`.
    """
    from diffusers import StableDiffusionXLImg2ImgPipeline
    blocks = {'channels': (16, 32, 64, 64), 'down_block_types': REFINER_BLOCKS, 'transformer_layers_per_block': 1,
              'up_block_types': tuple(name.replace('Down', 'Up') for name in REFINER_BLOCKS)}
    with rng.fork(seed, 'tiny refiner'):
        pipeline = StableDiffusionXLImg2ImgPipeline(
            vae=tiny_vae(), text_encoder=None, text_encoder_2=tiny_text_encoders(hidden)[1], tokenizer=None,
            tokenizer_2=tiny_tokenizer('!'), scheduler=sdxl_scheduler(**(scheduler or {})), add_watermarker=False,
            unet=tiny_unet(**{**blocks, **dict(cross_attention_dim=hidden, num_time_ids=5), **unet}),
            requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(str(folder))
    return Path(folder)
