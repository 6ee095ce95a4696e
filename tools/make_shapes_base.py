"""Make the tiny base of the shapes world: its components, its latents, and the folder that ships; see docs/shapes.md."""

import argparse
import sys
from pathlib import Path
from typing import Any

# One vocabulary for both encoders: the words of the captions, each a token, and every byte for what is not among them.
SEQUENCE = 32
WIDTHS = (48, 96, 128)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE in which every word of the captions is one token.

    Source: Sennrich et al. 2016; merged until no word is left in parts, in the order of frequency.
    """
    from collections import Counter

    from diffengine_sdxl.shapes import palette, scene
    from diffengine_sdxl.testing import byte_characters
    texts = ' '.join([*scene.TEMPLATES, *palette.NAMES, *scene.SHAPES, *scene.STYLES, *scene.TEXTURES, 'a an on the'])
    words = sorted(set(texts.replace('{', ' ').replace('}', ' ').replace(',', ' ').replace('_', ' ').split()))
    characters = byte_characters()
    tokens, merges = [*characters, *[c + '</w>' for c in characters]], []
    parts = [[*word[:-1], word[-1] + '</w>'] for word in words]
    while any(len(p) > 1 for p in parts):
        counts = Counter(pair for p in parts for pair in zip(p, p[1:], strict=False))
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        if ''.join(best) not in tokens:
            tokens.append(''.join(best))
        parts = [_merge(p, best) for p in parts]
    tokens += ['<|startoftext|>', '<|endoftext|>']
    return {token: i for i, token in enumerate(tokens)}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(parts):
        both = tuple(parts[i:i + 2]) == pair
        merged.append(''.join(pair) if both else parts[i])
        i += 2 if both else 1
    return merged


def components() -> dict[str, Any]:
    """The parts of the base with random weights, of the classes that SDXL has."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffengine_sdxl import testing
    vocab, merges = vocabulary()
    torch.manual_seed(0)
    end = len(vocab) - 1
    text = dict(vocab_size=len(vocab), hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=SEQUENCE, bos_token_id=end - 1, eos_token_id=end)
    tokenizers = [CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=SEQUENCE, pad_token=pad)
                  for pad in ('<|endoftext|>', '!')]
    return dict(
        vae=AutoencoderKL(block_out_channels=(16, 48, 64), norm_num_groups=8, latent_channels=4, layers_per_block=1,
                          down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3,
                          sample_size=64, scaling_factor=1.0, force_upcast=False),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, pad_token_id=end, hidden_act='quick_gelu')),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, pad_token_id=0, hidden_act='gelu',
                                                                  projection_dim=64)),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        unet=testing.tiny_unet(
            WIDTHS, cross_attention_dim=128, pooled=64, sample_size=16, transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=tuple(c // 16 for c in WIDTHS), addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=16 * 6 + 64),
        # Zero terminal SNR, v and trailing steps: on so small a latent the mean of the noise would tell the colours.
        scheduler=testing.sdxl_scheduler(prediction_type='v_prediction', rescale_betas_zero_snr=True,
                                         timestep_spacing='trailing', steps_offset=0))


def write_components(folder: Path) -> None:
    """The configs and tokenizers of the base, without weights: what `model.config` makes random weights from."""
    from diffusers import StableDiffusionXLPipeline
    StableDiffusionXLPipeline(**components(), add_watermarker=False).save_pretrained(str(folder))
    for weights in folder.glob('*/*.safetensors'):
        weights.unlink()


def main() -> int:
    """Parse and do one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('components', help='write configs and tokenizers, without weights')
    command.add_argument('folder', type=Path)
    args = parser.parse_args()
    write_components(args.folder)
    return 0


if __name__ == '__main__':
    sys.exit(main())
