"""Logs, checkpoints, images on the way."""
default_scope = 'diffengine_sdxl'
runner_type = 'ExperimentRunner'
default_hooks = dict(
    runtime_info=dict(type='RuntimeInfoHook'),
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # Without prompts, the first samples of the data set are drawn. `conditions`: adapter name -> paths or URLs.
    samples=dict(type='SampleHook', interval=500, prompts=[], conditions=dict(), num_from_dataset=2, num_images=2,
                 size='$resolution'),
    # `keep_best`, a metric of the validations: the best step stays, too (docs/stopping.md).
    checkpoint=dict(type='CheckpointHook', interval=500, max_keep_ckpts=None, keep_best=None),
    curves=dict(type='CurvesHook'),
    progress=dict(type='ProgressHook'),
    utilization=dict(type='UtilizationHook'),
    report=dict(type='ReportHook'),
    hub=dict(type='PushToHubHook', repo_id='$push_to_hub'))
custom_hooks = []
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])
log_processor = dict(type='LogProcessor', by_epoch=False)
log_level = 'INFO'
randomness = dict(seed=None)
env_cfg = dict(cudnn_benchmark=False, allow_tf32=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
# 'auto' is off on a CPU; what it became on a GPU stands in the table that opens the training (docs/configs.md).
speed = dict(compile='auto', checkpointing='auto', base_dtype='auto')
# A folder keeps what frozen encoders compute of the training data, for all runs (docs/caching.md).
cache = None
# 'owner/name', or True for the work_dir's name: upload the last export with its card at the end (docs/cards.md).
push_to_hub = None
load_from = None
resume = False
