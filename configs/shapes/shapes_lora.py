"""A LoRA of 40,000 numbers (80 kB in fp16) that learns a style which the base never saw: dots.

Dots are as large as one latent, so what has to change lies at the finest level: the last up blocks, their counterparts
and the convolutions at both ends.
"""
_base_ = ['../_base_/recipes/shapes.py', '../_base_/adapters/lora.py', '../_base_/objectives/denoise.py']
model = dict(
    adapters=dict(style=dict(
        _base_.lora, rank=2, alpha=4,
        targets=['unet.up_blocks.2.*.conv?', 'unet.up_blocks.2.*.conv_shortcut', 'unet.up_blocks.2.*.time_emb_proj',
                 'unet.up_blocks.1.*.to_?', 'unet.up_blocks.1.*.to_out.0', 'unet.up_blocks.1.*.proj_in',
                 'unet.up_blocks.1.*.proj_out', 'unet.up_blocks.1.*.ff.net.*', 'unet.up_blocks.1.*.conv2',
                 'unet.up_blocks.1.*.conv_shortcut', 'unet.up_blocks.1.*.time_emb_proj',
                 'unet.up_blocks.1.upsamplers.0.conv', 'unet.down_blocks.0.*.conv*', 'unet.conv_in', 'unet.conv_out'],
        blocks={'unet.up_blocks.2': dict(rank=8, alpha=16), 'unet.conv_in': dict(rank=4, alpha=8),
                'unet.conv_out': dict(rank=4, alpha=8)})),
    objective=_base_.objective)
# Part of the captions are empty, so that the style comes without being named, too.
proportion_empty_prompts = 0.1
train_dataloader = dict(dataset=dict(styles=['dotted'], conditioning=None))
test_dataloader = dict(dataset=dict(styles=['dotted'], conditioning=None))
test_evaluator = [dict(type='StyleScore'), dict(type='ShapeAccuracy'), dict(type='FillAccuracy'),
                  dict(type='GroundAccuracy')]
train_cfg = dict(max_iters=3000)
optim_wrapper = dict(optimizer=dict(lr=5e-3, weight_decay=0.0))
default_hooks = dict(
    samples=dict(interval=1000, num_images=6, prompts=[
        'a dotted cyan circle on brown', 'a dotted red triangle on white', 'a dotted yellow star on blue',
        'dotted green square on pink']),
    checkpoint=dict(interval=1000, max_keep_ckpts=1))
