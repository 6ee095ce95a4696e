"""The T2I-Adapter of shapes_t2i_adapter.py, trained for about ten minutes on two cores."""
_base_ = ['shapes_t2i_adapter.py']
train_cfg = dict(max_iters=3000)
default_hooks = dict(samples=dict(interval=1000), checkpoint=dict(interval=1000, max_keep_ckpts=2),
                     logger=dict(interval=50))
