"""15,000 optimizer steps of AdamW, each of four micro-batches."""
train_cfg = dict(type='StepLoop', max_iters=15000)
optim_wrapper = dict(
    type='StepOptimWrapper',
    constructor='AdapterOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8),
    accumulative_counts=4,
    clip_grad=dict(max_norm=1.0),
    mixed_precision='$mixed_precision')
param_scheduler = dict(type='DiffusersLR', name='constant', num_warmup_steps=0)
auto_scale_lr = dict(enable=False, base_batch_size=1)
