"""A LoRA of 40,000 numbers (80 kB in fp16) for a style of the shapes world.

Dots are as large as one latent, so what has to change lies at the finest level: the last up blocks, their counterparts
and the convolutions at both ends.
"""
fine_lora = dict(
    type='LoRA', weights=None, rank=2, alpha=4, scale=1.0,
    targets=['unet.up_blocks.2.*.conv?', 'unet.up_blocks.2.*.conv_shortcut', 'unet.up_blocks.2.*.time_emb_proj',
             'unet.up_blocks.1.*.to_?', 'unet.up_blocks.1.*.to_out.0', 'unet.up_blocks.1.*.proj_in',
             'unet.up_blocks.1.*.proj_out', 'unet.up_blocks.1.*.ff.net.*', 'unet.up_blocks.1.*.conv2',
             'unet.up_blocks.1.*.conv_shortcut', 'unet.up_blocks.1.*.time_emb_proj',
             'unet.up_blocks.1.upsamplers.0.conv', 'unet.down_blocks.0.*.conv*', 'unet.conv_in', 'unet.conv_out'],
    blocks={'unet.up_blocks.2': dict(rank=8, alpha=16), 'unet.conv_in': dict(rank=4, alpha=8),
            'unet.conv_out': dict(rank=4, alpha=8)})
