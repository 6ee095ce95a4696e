"""Options of training scripts, and what to type here instead; docs/options.md shows the table."""

from __future__ import annotations

from diffengine_sdxl.field_names.place import Place, Topics

TRAINING: Topics = {
    'The base': {
        'pretrained_model_name_or_path pretrained_model base_model ckpt': Place(
            'model.pretrained=<BASE>', 'A diffusers folder, a hub id, or a single `.safetensors` or `.ckpt` file.'),
        'pretrained_vae_model_name_or_path vae': Place(
            'model.vae=<VAE>', "`None` takes the base's own. The SDXL configs name `madebyollin/sdxl-vae-fp16-fix`. It "
            'runs in fp32 unless `model.dtype.vae` says otherwise; the script casts a VAE that is named.'),
        'revision': Place('model.revision=<REVISION>', 'Of the base; a separate VAE is taken at its main revision.'),
        'variant': Place('model.variant=<VARIANT>', 'Of the base only.'),
        'tokenizer_name': Place(
            'model.tokenizer=<TOKENIZERS>', 'A folder or hub id that holds `tokenizer` and `tokenizer_2`. The script '
            'parses its option and does not use it.'),
        'cache_dir': Place('model.cache_dir=<CACHE> train_dataloader.dataset.cache_dir=<CACHE>',
                           'Models and data apart; the script has one for both.'),
        'gradient_checkpointing': Place(
            'model.gradient_checkpointing=<True>', 'The same as `speed.checkpointing=full`; by default a GPU does as '
            'much of it as its memory asks for.'),
        'enable_xformers_memory_efficient_attention xformers': Place(
            'model.attention=xformers', "Needs the package xformers; the default is torch's own attention (`sdpa`)."),
        'sdpa': Place('model.attention=sdpa', 'The default.'),
        'mem_eff_attn enable_npu_flash_attention': Place('', 'Not built in: `model.attention` is sdpa or xformers.'),
        'mixed_precision': Place(
            'mixed_precision=<fp16>', '`no`, `fp16`, `bf16`; the SDXL configs have `bf16`. One key, which model and '
            'optimizer wrapper follow.'),
        'amp': Place('mixed_precision=fp16'),
        'no_half_vae': Place('model.dtype.vae=float32', 'The default, whatever `mixed_precision` says.'),
        'fp8_base fp8_base_unet': Place(
            'speed.base_dtype=fp8', 'Needs torchao and a GPU of compute capability 8.9 or more; `int8` runs anywhere.'),
        'full_bf16 full_fp16': Place(
            '', 'Not built in: what trains is stored in fp32, the rest as `mixed_precision` says.'),
        'allow_tf32': Place('env_cfg.allow_tf32=<True>'),
        'prediction_type': Place('model.prediction_type=<v_prediction>', "Default: the base's."),
        'v_parameterization': Place('model.prediction_type=v_prediction'),
        'zero_terminal_snr': Place('model.zero_terminal_snr=<True>', 'Goes with v-prediction only.'),
        'clip_skip': Place('', "Not built in while training: SDXL is trained on its encoders' penultimate layers. "
                               'Images take `clip_skip` as a setting.'),
        'max_token_length': Place(
            'model.caption_chunks=<3>', 'Chunks of 75 tokens: 3 for 225. They end after a sentence, phrase or word; '
            "kohya's after 75 tokens (docs/captions.md).", {'75': '1', '150': '2', '225': '3'}),
        'weighted_captions': Place(
            '', 'Not built in while training: captions are plain text. Images take weights, with '
            '`prompt_syntax=compel`.'),
        'torch_compile dynamo_backend': Place(
            'speed.compile=blocks', "The UNet's blocks, by Inductor; the default on a GPU from 200 steps on."),
        'blocks_to_swap cpu_offload_checkpointing lowram highvram fused_backward_pass': Place(
            '', 'Not built in. Less memory: `speed.checkpointing=full`, `speed.base_dtype=int8` (docs/configs.md).'),
        'opt_channels_last': Place('', 'Nothing to set: the layout is chosen on the GPU.'),
        'do_edm_style_training v2': Place('', "Not built in: bases are SDXL's, with its own noise schedule."),
        'use_safetensors disable_mmap_load_safetensors save_model_as': Place(
            '', 'Nothing to choose: safetensors are read where there are any, and always written.'),
    },
    'Adapters': {
        'adapter_model_name_or_path controlnet_model_name_or_path network_weights pretrained_ip_adapter_path': Place(
            'model.adapters.NAME.weights=<ADAPTER>', 'Also `subfolder`, `revision`, `variant` or `weight_name` beside '
            "it. Widths that don't fit the base are refused."),
        'rank network_dim lora_rank lora_r r': Place('model.adapters.NAME.rank=<16>', 'Of a LoRA.'),
        'network_alpha lora_alpha': Place('model.adapters.NAME.alpha=<16>', "Of a LoRA; `None` is the rank. kohya's "
                                                                            'default is 1.'),
        'network_dropout lora_dropout': Place('model.adapters.NAME.dropout=<0.1>', 'Of a LoRA.'),
        'network_module': Place('model.adapters.NAME.kind=lora', 'Also `dora`, `loha`, `lokr`, `oft`.'),
        'network_args conv_dim conv_alpha block_dims block_alphas': Place(
            '', 'Set `targets` (which layers, such as conv1), `blocks` (rank, alpha and scale by block), `kind` and '
            '`dropout` of `model.adapters.NAME` (docs/lora.md).'),
        'lora_target_modules lora_layers target_modules': Place(
            'model.adapters.NAME.targets=<[to_q,to_k,to_v,to_out.0]>', 'Full names, patterns or ends of names.'),
        'use_dora': Place('model.adapters.NAME.kind=dora'),
        'use_rslora': Place('model.adapters.NAME.rslora=<True>'),
        'init_lora_weights': Place('model.adapters.NAME.init=<gaussian>', "As peft's."),
        'train_text_encoder': Place('model.adapters.NAME.parts=[unet,text_encoder,text_encoder_2]', 'Of a LoRA.'),
        'network_train_unet_only': Place('model.adapters.NAME.parts=[unet]', 'The default.'),
        'network_train_text_encoder_only': Place('model.adapters.NAME.parts=[text_encoder,text_encoder_2]'),
        'base_weights': Place('model.adapters.OTHER.type=LoRA model.adapters.OTHER.weights=<FILE> '
                              'model.adapters.OTHER.trainable=False',
                              'A frozen LoRA beside the one that trains; it stays a file of its own.'),
        'base_weights_multiplier': Place('model.adapters.OTHER.scale=<0.8>', 'Of that frozen LoRA.'),
        'dim_from_weights': Place('', 'Nothing to set: ranks and alphas are those of `model.adapters.NAME.weights`.'),
        'scale_weight_norms': Place('', 'Not built in; `optim_wrapper.clip_grad` limits the gradient.'),
        'placeholder_token token_string': Place('model.adapters.NAME.token=<TOKEN>', 'Of a textual inversion; its '
                                                                                     'captions must hold it.'),
        'initializer_token init_word': Place('model.adapters.NAME.init=<WORD>', 'Of a textual inversion.'),
        'num_vectors num_vectors_per_token': Place('model.adapters.NAME.num_vectors=<4>', 'Of a textual inversion.'),
        'learnable_property': Place('', 'Write the captions into .txt files beside the images, or one for all into '
                                        '`train_dataloader.dataset.default_caption`.'),
        'image_encoder_path image_encoder': Place(
            'model.adapters.NAME.image_encoder=<ENCODER> model.adapters.NAME.image_encoder_subfolder=None',
            'Of an IP-Adapter.'),
        'output_kohya_format save_as_full_pipeline save_precision no_metadata training_comment': Place(
            '', 'After training, `diffengine-sdxl export CONFIG OUT --checkpoint DIR --format kohya --dtype float16`.'),
    },
    'The data': {
        'dataset_name': Place(
            'train_dataloader.dataset.source=<DATA>', 'A hub id, a saved data set, a folder, or a `.parquet`, '
            '`.jsonl`, `.csv` or `.arrow` file.'),
        'train_data_dir image_dir in_json data_root data_root_path': Place(
            'train_dataloader.dataset.source=<DATA>', "What exists on the disk goes before the hub. kohya's captions "
            "`a.txt` beside `a.png`: type='CaptionFolder' (docs/data.md)."),
        'dataset_config dataset_class': Place('', 'A config of this project names the data set (docs/data.md).'),
        'dataset_config_name': Place('train_dataloader.dataset.name=<SUBSET>'),
        'image_column': Place('train_dataloader.dataset.image_column=<COLUMN>'),
        'conditioning_image_column': Place('train_dataloader.dataset.conditioning_image_column=<COLUMN>',
                                           '`None` where a transform computes the condition.'),
        'conditioning_data_dir': Place('', "A config file names it: `dataset=dict(_delete_=True, type='CaptionFolder', "
                                           'source=..., condition_folder=..., transforms=[...])` (docs/data.md).'),
        'caption_column': Place('train_dataloader.dataset.caption_column=<COLUMN>',
                                'Of a list of captions one is drawn, by (seed, sample, epoch).'),
        'caption_extension caption_extention': Place('', 'Nothing to set: captions of a CaptionFolder are `.txt`, '
                                                         '`.caption` or `.json`.'),
        'max_train_samples': Place('train_dataloader.dataset.max_samples=<4>', 'The first so many rows of the source; '
                                                                               'the script shuffles before it cuts.'),
        'proportion_empty_prompts caption_dropout_rate': Place(
            'proportion_empty_prompts=<0.1>', 'The draw belongs to (seed, sample, epoch), so it is a new one each '
            "epoch; diffusers' script draws once for all epochs."),
        'shuffle_caption keep_tokens caption_separator keep_tokens_separator': Place(
            '', "Write `transforms` in a config file, with dict(type='CaptionShuffle', keep=..., separator=..., "
            'keep_tokens_separator=...) (docs/captions.md).'),
        'caption_tag_dropout_rate': Place('', "Write `transforms` in a config file, with dict(type='CaptionTagDrop', "
                                              'prob=...) (docs/captions.md).'),
        'enable_wildcard': Place('', "Write `transforms` in a config file, with dict(type='CaptionLine') for a random "
                                     'line; alternatives in braces are plain text (docs/captions.md).'),
        'caption_prefix': Place('', "Write `transforms` in a config file, with dict(type='CaptionPrefix', prefix=...) "
                                    '(docs/captions.md).'),
        'caption_suffix': Place('', "Write `transforms` in a config file, with dict(type='CaptionSuffix', suffix=...) "
                                    '(docs/captions.md).'),
        'trigger_word class_tokens': Place('', "Write `transforms` in a config file, with dict(type='CaptionTrigger', "
                                               'word=...) (docs/captions.md).'),
        'caption_dropout_every_n_epochs token_warmup_min token_warmup_step secondary_separator': Place(
            '', 'Not built in; a transform of yours can do it (docs/data.md).'),
        'resolution img_size image_size': Place(
            'resolution=<512>', 'In pixels, or (height,width); kohya writes width first. Transforms, time ids and '
            "sample images follow it. 16 must divide it for SDXL (twice the VAE's factor)."),
        'center_crop': Place('train_dataloader.dataset.transforms.1.mode=center', 'The default.'),
        'random_crop': Place('train_dataloader.dataset.transforms.1.mode=random'),
        'random_flip flip_aug hflip': Place('', "Write `transforms` in a config file, with dict(type='Flip') after the "
                                                'crop (docs/data.md).'),
        'color_aug face_crop_aug_range': Place('', 'Not built in; a transform of yours can do it (docs/data.md).'),
        'image_interpolation_mode resize_interpolation': Place(
            'train_dataloader.dataset.transforms.0.interpolation=<bilinear>'),
        'enable_bucket': Place(
            'image_size=bucket train_dataloader.sampler.type=BucketSampler train_dataloader.sampler.resolution=1024',
            'At most nine shapes of equal area (docs/buckets.md).'),
        'bucket_reso_steps': Place('train_dataloader.sampler.type=BucketSampler train_dataloader.sampler.step=<64>'),
        'bucket_no_upscale': Place(
            'train_dataloader.sampler.type=BucketSampler train_dataloader.sampler.upscale=False',
            'The default: smaller images are refused, or left out with `unfit=skip`.'),
        'min_bucket_reso max_bucket_reso': Place(
            'train_dataloader.sampler.type=BucketSampler train_dataloader.sampler.max_ratio=2.0',
            'The largest ratio of the sides, which follow from it, `resolution` and `step`.'),
        'detection_resolution': Place(
            'condition.detection_resolution=<384>', 'Of the Canny and Depth configs; detectors of controlnet_aux have '
            '`condition.call.detect_resolution`. The script parses its option and does not use it.'),
        'crops_coords_top_left_h': Place(
            'train_dataloader.dataset.transforms.3.crops_coords_top_left=(<0>,0)', '(top, left); `transforms.4` in the '
            "configs with computed conditions. Without it each image's true crop is told to SDXL; the script tells all "
            'images the same.'),
        'crops_coords_top_left_w': Place('train_dataloader.dataset.transforms.3.crops_coords_top_left=(0,<0>)',
                                         'The second of the two.'),
        'train_batch_size batch_size samples_per_gpu': Place('train_dataloader.batch_size=<4>', 'For each process.'),
        'dataloader_num_workers max_data_loader_n_workers num_workers workers_per_gpu': Place(
            'train_dataloader.num_workers=<4>', 'Changes nothing that a sample sees.'),
        'persistent_data_loader_workers': Place('train_dataloader.persistent_workers=<True>'),
        'repeats dataset_repeats num_repeats': Place(
            '', "Of one data set not needed: rows repeat until `train_cfg.max_iters`. Of several: dict(type='Mixture', "
            'sets=dict(NAME=dict(...)), repeats=dict(NAME=10)) in a config file (docs/data.md).'),
        'cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk': Place(
            'cache=<CACHE>', 'A folder, for everything that frozen encoders compute; it is filled on the way '
            '(docs/caching.md).'),
        'vae_batch_size text_encoder_batch_size skip_cache_check': Place(
            '', 'Nothing to set: the cache encodes one by one, and finds entries by their content.'),
        'masked_loss alpha_mask': Place('', "Write `transforms` in a config file, with dict(type='LossMask') "
                                            '(docs/data.md).'),
        'instance_data_dir': Place('instance_folder=<FOLDER>', 'Of stable_diffusion_xl_lora_dreambooth.'),
        'instance_prompt': Place('instance_prompt=<PROMPT>', 'Of stable_diffusion_xl_lora_dreambooth.'),
        'class_data_dir reg_data_dir': Place(
            'class_folder=<FOLDER>', 'Of stable_diffusion_xl_lora_dreambooth, in pairs. Beside other data, as kohya '
            'has them: a `Mixture` with `loss_weights` (docs/data.md).'),
        'is_reg': Place('', "A config file names such a set: dict(type='Mixture', sets=dict(...), "
                            'loss_weights=dict(NAME=1.0)) (docs/data.md).'),
        'class_prompt': Place('class_prompt=<PROMPT>', 'Of stable_diffusion_xl_lora_dreambooth.'),
        'prior_loss_weight': Place('prior_loss_weight=<1.0>', 'Of stable_diffusion_xl_lora_dreambooth.'),
        'with_prior_preservation': Place('', 'Train with the config stable_diffusion_xl_lora_dreambooth.'),
        'num_class_images sample_batch_size prior_generation_precision': Place(
            '', 'Make the class images first: `diffengine-sdxl infer CONFIG --weights none --prompt ... --num-images '
            '200`.'),
    },
    'The objective': {
        'snr_gamma min_snr_gamma': Place(
            'model.objective.weighting.type=MinSNR model.objective.weighting.gamma=<5.0>'),
        'debiased_estimation_loss': Place('model.objective.weighting.type=Debiased'),
        'scale_v_pred_loss_like_noise_pred v_pred_like_loss': Place(
            '', 'Not built in; see `model.objective.weighting`.'),
        'noise_offset': Place('model.objective.noise.type=OffsetNoise model.objective.noise.strength=<0.05>'),
        'input_perturbation ip_noise_gamma': Place(
            'model.objective.noise.type=InputPerturbation model.objective.noise.strength=<0.1>'),
        'multires_noise_iterations': Place(
            'model.objective.noise.type=PyramidNoise model.objective.noise.num_levels=<6>'),
        'multires_noise_discount': Place(
            'model.objective.noise.type=PyramidNoise model.objective.noise.discount=<0.9>'),
        'adaptive_noise_scale noise_offset_random_strength ip_noise_gamma_random_strength': Place(
            '', 'Not built in; strengths of `model.objective.noise` are fixed.'),
        'loss_type': Place(
            'model.objective.loss.type=<HuberLoss>', 'For smooth L1 also `model.objective.loss.smooth_l1=True`. Also '
            '`L2Loss`, `L1Loss`.',
            {'l2': 'L2Loss', 'l1': 'L1Loss', 'huber': 'HuberLoss', 'smoothl1': 'HuberLoss'}),
        'huber_c': Place('model.objective.loss.type=HuberLoss model.objective.loss.delta=<0.1>'),
        'huber_schedule': Place('model.objective.loss.type=HuberLoss model.objective.loss.schedule=<snr>'),
        'huber_scale': Place('', 'Not built in; see `model.objective.loss.delta`.'),
        'min_timestep': Place('model.objective.timesteps.type=UniformTimesteps model.objective.timesteps.low=<0>'),
        'max_timestep': Place('model.objective.timesteps.type=UniformTimesteps model.objective.timesteps.high=<1000>'),
        **{f'timestep_bias_{key}': Place(
            f'model.objective.timesteps.type=BiasedTimesteps model.objective.timesteps.{key}=<{value}>')
           for key, value in (
               ('strategy', 'later'), ('multiplier', 2.0), ('portion', 0.25), ('begin', 0), ('end', 500))},
        'weighting_scheme': Place('model.objective.timesteps.type=LogitNormalTimesteps', 'For `logit_normal`.'),
        'logit_mean': Place('model.objective.timesteps.type=LogitNormalTimesteps model.objective.timesteps.mean=<0.0>'),
        'logit_std': Place('model.objective.timesteps.type=LogitNormalTimesteps model.objective.timesteps.std=<1.0>'),
    },
    'The optimizer': {
        'max_train_steps max_iters num_train_steps total_steps iterations steps': Place('train_cfg.max_iters=<15000>'),
        'num_train_epochs max_train_epochs max_epochs num_epochs epochs': Place(
            'train_cfg.max_iters=None train_cfg.max_epochs=<2>', '`max_iters` goes before it.'),
        'gradient_accumulation_steps gradient_accumulation accumulative_counts': Place(
            'optim_wrapper.accumulative_counts=<4>'),
        'learning_rate lr base_lr unet_lr': Place('optim_wrapper.optimizer.lr=<1e-5>', 'For one adapter of several: '
                                                                                       '`optim_wrapper.paramwise_cfg`.'),
        'text_encoder_lr': Place(
            'optim_wrapper.paramwise_cfg.lr={"NAME.text_encoder":<5e-6>,"NAME.text_encoder_2":<5e-6>}',
            'Of a LoRA whose `parts` hold the text encoders.'),
        'adam_weight_decay_text_encoder': Place(
            'optim_wrapper.paramwise_cfg.weight_decay={"NAME.text_encoder":<1e-3>,"NAME.text_encoder_2":<1e-3>}'),
        'scale_lr auto_scale_lr': Place(
            'auto_scale_lr.enable=<True>', 'Times processes x batch size x accumulation, over '
            '`auto_scale_lr.base_batch_size` (1).'),
        'lr_scheduler': Place('param_scheduler.name=<cosine>', 'The names of diffusers; the factors are computed by '
                                                               "diffusers' own functions."),
        'lr_warmup_steps warmup_steps': Place(
            'param_scheduler.num_warmup_steps=<500>', "The script's default is 500; here it is 0. `constant` has none: "
            'take `constant_with_warmup`.'),
        'lr_num_cycles lr_scheduler_num_cycles': Place(
            'param_scheduler.num_cycles=<1>', 'Of `cosine_with_restarts` and, unlike in the script, of `cosine`.'),
        'lr_power lr_scheduler_power': Place('param_scheduler.power=<2.0>'),
        'lr_scheduler_type lr_scheduler_args lr_decay_steps lr_scheduler_min_lr_ratio lr_scheduler_timescale': Place(
            '', "`param_scheduler` takes a schedule of diffusers by `name`, or a list of mmengine's in a config file."),
        'use_8bit_adam': Place(
            'optim_wrapper.optimizer.type=AdamW8bit', 'Needs bitsandbytes. Also `Prodigy` (with lr=1) and all of '
            '`torch.optim`; `Adafactor` has no betas, so a config file writes '
            "`optimizer=dict(_delete_=True, type='Adafactor')`."),
        'optimizer_type optimizer': Place(
            'optim_wrapper.optimizer.type=<AdamW>', 'All of `torch.optim`, `AdamW8bit`, `Prodigy`, `Adafactor`.',
            {'adamw': 'AdamW', 'adamw8bit': 'AdamW8bit', 'prodigy': 'Prodigy', 'adafactor': 'Adafactor'}),
        'use_lion_optimizer': Place(
            '', 'Not built in; register it with OPTIMIZERS in a module that `custom_imports` names.'),
        'optimizer_args prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup': Place(
            '', "Arguments of the optimizer's class go beside its type: `optim_wrapper.optimizer.KEY=VALUE`."),
        'adam_beta1': Place('optim_wrapper.optimizer.betas=(<0.9>,0.999)', 'Both in one key.'),
        'adam_beta2': Place('optim_wrapper.optimizer.betas=(0.9,<0.999>)', 'The second of the two.'),
        'adam_weight_decay weight_decay': Place('optim_wrapper.optimizer.weight_decay=<1e-2>'),
        'adam_epsilon': Place('optim_wrapper.optimizer.eps=<1e-8>'),
        'max_grad_norm clip_grad_norm': Place('optim_wrapper.clip_grad.max_norm=<1.0>',
                                              'The norm before clipping is logged as `grad_norm`.'),
        'set_grads_to_none': Place('optim_wrapper.set_grads_to_none=<True>',
                                   "The default here, as in torch; the script's default is False."),
        'use_ema ema': Place('default_hooks.ema.type=EMAHook'),
        'ema_decay': Place('default_hooks.ema.type=EMAHook default_hooks.ema.decay=<0.9999>'),
        'foreach_ema offload_ema non_ema_revision': Place('', 'Not built in; see EMAHook.'),
    },
    'The run': {
        'output_dir': Place('--work-dir <DIR>', 'Default: `work_dirs/<config>`. Adapters go to `DIR/step<N>/adapter`.'),
        'output_name': Place('', 'Adapters go to `DIR/step<N>/NAME`, as the config names them.'),
        'seed': Place('randomness.seed=<42>', 'If it is not set, one is drawn at the start, kept in `run.json` and '
                                              'used again by `--resume`.'),
        'checkpointing_steps save_every_n_steps save_steps save_interval': Place(
            'default_hooks.checkpoint.interval=<500>', 'Each also exports the adapter. The last step is always saved.'),
        'save_every_n_epochs save_n_epoch_ratio': Place('default_hooks.checkpoint.interval=500',
                                                        'In optimizer steps; there is none in epochs.'),
        'save_state save_state_on_train_end': Place('', 'Nothing to set: every `step<N>.pth` can be resumed from.'),
        'checkpoints_total_limit max_keep_ckpts': Place('default_hooks.checkpoint.max_keep_ckpts=<3>',
                                                        'Default: all are kept; the script keeps 3.'),
        'save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state': Place(
            'default_hooks.checkpoint.max_keep_ckpts=3', 'The number of checkpoints to keep.'),
        'resume_from_checkpoint resume_from initial_step initial_epoch skip_until_initial_step': Place(
            '--resume', '`--resume` takes the newest, `--resume DIR/step<N>.pth` a given one.'),
        'validation_prompt validation_prompts': Place(
            'default_hooks.samples.prompts=<[PROMPT,PROMPT]>', 'Together with `validation_image`, as in the script. '
            'Without prompts, captions and conditions of the first `num_from_dataset` samples are taken.'),
        'sample_prompts': Place('default_hooks.samples.prompts=[PROMPT,PROMPT]', 'The prompts themselves, not a file.'),
        'validation_image': Place(
            'default_hooks.samples.prompts=[PROMPT,PROMPT] default_hooks.samples.conditions.NAME=<[IMAGE,IMAGE]>',
            'By adapter name; paths or URLs, one for each prompt or one for all. The script also takes one prompt for '
            'several images: repeat the prompt.'),
        'num_validation_images': Place('default_hooks.samples.num_images=<4>', 'The SDXL configs have 2.'),
        'validation_steps sample_every_n_steps': Place('default_hooks.samples.interval=<100>',
                                                       'The SDXL configs have 500.'),
        'validation_epochs sample_every_n_epochs': Place('default_hooks.samples.interval=500',
                                                         'In optimizer steps; there is none in epochs.'),
        'sample_at_first': Place('default_hooks.samples.at_start=<True>'),
        'sample_sampler': Place('model.sampler.scheduler.type=<EulerDiscreteScheduler>', 'A scheduler of diffusers.'),
        'validate_every_n_steps val_interval eval_interval eval_steps': Place(
            'train_cfg.val_interval=<500>', 'Goes with `val_dataloader` and `val_evaluator` (docs/evaluation.md).'),
        'validation_split validation_seed max_validation_steps validate_every_n_epochs': Place(
            '', 'In a config file: for a loss on other data a `ValidationLoss` among `custom_hooks`, for metrics '
            '`val_dataloader`, `val_evaluator` and `val_cfg` (docs/evaluation.md).'),
        'report_to log_with': Place(
            'visualizer.vis_backends.1.type=<WandbVisBackend>', 'TensorBoard by default; also `MLflowVisBackend` with '
            '`tracking_uri=sqlite:///FILE`. Each needs its package. A config file can list several. What is sent: '
            'losses, learning rates, and the labelled grid of samples.',
            {'wandb': 'WandbVisBackend', 'tensorboard': 'TensorboardVisBackend', 'mlflow': 'MLflowVisBackend',
             'trackio': 'TrackioVisBackend', 'clearml': 'ClearMLVisBackend', 'dvclive': 'DVCLiveVisBackend',
             'aim': 'AimVisBackend'}),
        'tracker_project_name log_tracker_name wandb_project': Place(
            'visualizer.vis_backends.1.type=WandbVisBackend visualizer.vis_backends.1.init_kwargs.project=<PROJECT>',
            'Arguments of `wandb.init`.'),
        'wandb_run_name': Place('visualizer.vis_backends.1.type=WandbVisBackend '
                                'visualizer.vis_backends.1.init_kwargs.name=<RUN>'),
        'wandb_api_key log_tracker_config': Place('', 'Log in by hand: `wandb login`.'),
        'logging_dir': Place('visualizer.vis_backends.1.save_dir=<DIR>',
                             'Default: `<work dir>/<time>/vis_data`. Text logs stay in the work dir.'),
        'log_interval logging_steps': Place('default_hooks.logger.interval=<10>'),
        'log_prefix log_config debug_loss debug_dataset': Place('', 'Not built in; logs are in the work dir.'),
        'push_to_hub': Place(
            'push_to_hub=<True>', 'Login and repository are checked before the first step. Uploads the last '
            '`step<N>/`, with its card, when training has ended, under the name of the work dir; if that fails, a '
            'warning names the command: `hf upload OWNER/REPO DIR/step<N>`.'),
        'hub_model_id huggingface_repo_id': Place(
            'push_to_hub=<OWNER/REPO>',
            'A new repository is private; `default_hooks.hub.private=False` makes it public.'),
        'hub_token huggingface_token': Place(
            '', '`hf auth login`, or the environment variable `HF_TOKEN`: a token in a config would end up in files.'),
        'num_processes num_gpus gpus multi_gpu num_machines config_file main_process_port': Place(
            '', 'In place of `accelerate launch`: `torchrun --nproc_per_node=2 -m diffengine_sdxl train CONFIG '
            '--launcher pytorch`.'),
        'ddp_timeout': Place('env_cfg.dist_cfg.timeout=7200', 'In seconds; kohya counts minutes.'),
        'ddp_gradient_as_bucket_view ddp_static_graph deepspeed': Place('', 'Not built in; processes run under DDP.'),
    },
}
