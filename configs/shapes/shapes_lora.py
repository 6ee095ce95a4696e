"""A LoRA of 40,000 numbers (80 kB in fp16) that learns a style which the base never saw: dots."""
_base_ = ['../_base_/recipes/shapes.py', '../_base_/adapters/fine_lora.py', '../_base_/objectives/denoise.py']
model = dict(
    adapters=dict(style=_base_.fine_lora),
    objective=_base_.objective)
# Half of the captions name some attributes only, and one in ten is empty, so that the style comes without being named, too.
proportion_empty_prompts = 0.1
# Images are encoded once, not in each step.
cache = 'work_dirs/shapes_cache'
train_dataloader = dict(dataset=dict(styles=['dotted'], conditioning=None, partial_captions=0.5, length=10000))
test_dataloader = dict(dataset=dict(styles=['dotted'], conditioning=None))
test_evaluator = [dict(type='StyleScore'), dict(type='ShapeAccuracy'), dict(type='FillAccuracy'),
                  dict(type='GroundAccuracy')]
train_cfg = dict(max_iters=4000)
optim_wrapper = dict(optimizer=dict(lr=5e-3, weight_decay=0.0))
default_hooks = dict(
    samples=dict(interval=1000, num_images=6, prompts=[
        'a dotted cyan circle on brown', 'a dotted red triangle on white', 'a dotted yellow star on blue',
        'dotted green square on pink']),
    checkpoint=dict(interval=1000, max_keep_ckpts=1))
