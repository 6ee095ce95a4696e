"""The projection of an IP-Adapter: image embeddings or hidden states to tokens."""

from torch import nn

#: Architecture -> its default number of tokens.
NUM_TOKENS = {'base': 4, 'plus': 16}


def image_projection(architecture: str, embed_dim: int, token_dim: int, num_tokens: int | None = None,
                     hidden: int | None = None, depth: int = 4, heads: int | None = None, dim_head: int = 64,
                     ff_mult: float = 4) -> nn.Module:
    """Build the projection from diffusers' own classes, freshly initialized.

    Args:
        architecture: 'base', a linear layer and a norm from one embedding [N, E] (Ye et al. 2023, section 3.2.1);
            'plus', a perceiver resampler of all hidden states [N, T, E] (tencent-ailab/IP-Adapter, resampler.py).
        embed_dim, token_dim: E, and the width of the UNet's text.
        num_tokens: None for 4, or 16 for plus.
        hidden, depth, heads, dim_head, ff_mult: of the resampler; None for 1280, or `token_dim` if that is smaller,
            and for as many heads as fit into it.

    Returns:
        A module whose output is [N, num_tokens, token_dim].
    """
    from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
    tokens = num_tokens or NUM_TOKENS[architecture]
    if architecture == 'base':
        return ImageProjection(embed_dim, token_dim, tokens)
    hidden = hidden or min(1280, token_dim)
    return IPAdapterPlusImageProjection(embed_dim, token_dim, hidden, depth, dim_head,
                                        heads or max(1, hidden // dim_head), tokens, ff_mult)
