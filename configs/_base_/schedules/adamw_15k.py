"""15,000 optimizer steps of AdamW, each of two micro-batches."""
train_cfg = dict(type='StepLoop', max_iters=15000)
optim_wrapper = dict(
    type='StepOptimWrapper',
    constructor='AdapterOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8),
    # Times train_dataloader.batch_size: four samples a step, as 4 x 1 on 12 GB, 2 x 2 on 24 GB, 1 x 4 on 80 GB.
    accumulative_counts=2,
    clip_grad=dict(max_norm=1.0),
    mixed_precision='$mixed_precision')
param_scheduler = dict(type='DiffusersLR', name='constant', num_warmup_steps=0)
auto_scale_lr = dict(enable=False, base_batch_size=1)
