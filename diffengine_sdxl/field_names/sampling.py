"""Arguments of diffusers' pipelines and options of other image tools, and what to type here instead.

Names that a request has itself (`request.SETTINGS`, mostly diffusers') are not listed.
"""

from __future__ import annotations

from diffengine_sdxl.field_names.place import Place, Topics

#: Names of samplers in A1111, k-diffusion and kohya's scripts -> scheduler.
SCHEDULERS = {
    'euler': 'EulerDiscreteScheduler', 'eulera': 'EulerAncestralDiscreteScheduler', 'heun': 'HeunDiscreteScheduler',
    'lms': 'LMSDiscreteScheduler', 'dpm2': 'KDPM2DiscreteScheduler', 'dpm2a': 'KDPM2AncestralDiscreteScheduler',
    'ddim': 'DDIMScheduler', 'ddpm': 'DDPMScheduler', 'pndm': 'PNDMScheduler', 'plms': 'PNDMScheduler',
    'unipc': 'UniPCMultistepScheduler', 'lcm': 'LCMScheduler', 'deis': 'DEISMultistepScheduler',
    'dpmsolver': 'DPMSolverMultistepScheduler', 'dpmsolver++': 'DPMSolverMultistepScheduler',
    'dpm++2m': 'DPMSolverMultistepScheduler', 'dpm++2mkarras': 'DPMSolverMultistepScheduler',
    'dpmsingle': 'DPMSolverSinglestepScheduler', 'dpm++sde': 'DPMSolverSDEScheduler',
    'dpm++sdekarras': 'DPMSolverSDEScheduler'}

SAMPLING: Topics = {
    'What is made': {
        'text text_prompt positive positive_prompt': Place('prompt=<PROMPT>'),
        'negative uc negative_text': Place('negative_prompt=<PROMPT>'),
        'prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds': Place(
            '', 'Not built in: a request holds texts, so that its PNG can say how it was made; long prompts are '
            '`prompt_syntax=long`, weights `compel`.'),
        'max_embeddings_multiples': Place('prompt_syntax=long', 'Of any length; `compel` takes weights, too.'),
        'emphasis prompt_weighting weighted_prompt': Place(
            'prompt_syntax=compel', 'Weights are written as in compel, `word++` or `(a phrase)1.3`.'),
        'clip_stop_at_last_layers': Place('clip_skip=0', 'How SDXL was trained; n of A1111 is n - 2 here.'),
        'h': Place('height=<1024>'),
        'w': Place('width=<1024>'),
        'original_height': Place('original_size=(<1024>,1024)', '(height, width).'),
        'original_width': Place('original_size=(1024,<1024>)', '(height, width).'),
        'original_height_negative': Place('negative_original_size=(<1024>,1024)', '(height, width).'),
        'original_width_negative': Place('negative_original_size=(1024,<1024>)', '(height, width).'),
        'crop_top': Place('crops_coords_top_left=(<0>,0)', '(top, left).'),
        'crop_left': Place('crops_coords_top_left=(0,<0>)', '(top, left).'),
        'generator manual_seed seeds noise_seed': Place(
            'seed=<0>', 'Image k of a prompt has the seed `seed + k`, and its noise is drawn on the CPU.'),
        'num_images num_samples n_samples n_iter batch_count images_per_prompt': Place('num_images_per_prompt=<4>'),
        'subseed subseed_strength variation_seed iter_same_seed seed_resize_from_h seed_resize_from_w': Place(
            '', 'Not built in: the noise is that of one seed, or `latents`.'),
        'restore_faces tiling styles hypernetwork': Place('', 'Not built in.'),
        'enable_hr hr_scale hr_upscaler hr_second_pass_steps highres_fix_scale highres_fix_steps highres_fix_strength '
        'highres_fix_upscaler': Place(
            '', 'Not built in: upscale the image, and give it as `image` with a `strength`.'),
    },
    'Steps and guidance': {
        'steps ddim_steps num_steps sampling_steps': Place('num_inference_steps=<30>'),
        'scale cfg cfg_scale guidance condition_scale unconditional_guidance_scale': Place('guidance_scale=<5.0>'),
        'sampler sampler_name sampler_index sample_sampler scheduler solver': Place(
            'model.sampler.scheduler.type=<EulerDiscreteScheduler>', 'A scheduler of diffusers.', SCHEDULERS),
        'use_karras_sigmas karras': Place(
            'model.sampler.scheduler.use_karras_sigmas=<True>', "An argument of the scheduler's class."),
        'timestep_spacing': Place('model.sampler.scheduler.timestep_spacing=<trailing>'),
        'ddim_eta': Place('eta=<1.0>', 'For schedulers that read it, such as DDIM.'),
        'pag_adaptive_scale': Place('model.sampler.guidances=[{"type":"CFG","scale":5.0},{"type":"PAG",'
                                    '"adaptive_scale":<0.1>}]'),
        'pag_applied_layers': Place('model.sampler.guidances=[{"type":"CFG","scale":5.0},{"type":"PAG",'
                                    '"layers":<["mid"]>}]'),
        'self_attention_guidance_scale': Place('sag_scale=<0.75>'),
        'cfg_rescale rescale_cfg': Place('guidance_rescale=<0.7>'),
        'image_guidance_scale': Place('', 'Not built in: it belongs to InstructPix2Pix, whose UNet has 8 channels.'),
        'negative_scale image_cfg_scale s_churn s_noise s_tmin s_tmax eta_noise_seed_delta': Place('', 'Not built in.'),
        'freeu enable_freeu': Place('', 'Not built in: `pipeline.enable_freeu(...)` on `model.to_diffusers()` '
                                        '(docs/inference.md).'),
        'refiner_switch_at refiner_switch high_noise_frac': Place(
            'denoising_end=<0.8>', "The refiner is the config's `refiner`, as in sdxl_base_refiner."),
    },
    'Images to go on from': {
        'init_image init_images init_img image_path input_image': Place('image=<IMAGE>'),
        'mask mask_path inpaint_mask': Place('mask_image=<MASK>', 'White is repainted.'),
        'denoising_strength image_strength': Place('strength=<0.7>'),
        'masked_image masked_image_latents': Place('', 'Nothing to give: it follows from `image` and `mask_image`.'),
        'inpaint_full_res': Place('padding_mask_crop=32', 'The margin around the mask, in pixels.'),
        'inpaint_full_res_padding': Place('padding_mask_crop=<32>'),
        'mask_blur inpainting_fill inpainting_mask_invert resize_mode': Place(
            '', 'Not built in: prepare `mask_image` and `image` before.'),
    },
    'Adapters': {
        'control_image controlnet_image guide_image_path adapter_image ip_adapter_image image_prompt': Place(
            'conditions.NAME=<IMAGE>', 'Of T2I-Adapters, ControlNets and IP-Adapters alike; `image` is what to start '
            'from.'),
        'ip_adapter_image_embeds clip_image_embedding': Place(
            '', 'Not built in: give the image, `conditions.NAME`; it is encoded once a call.'),
        'ip_adapter_masks ip_adapter_mask': Place('conditions.NAME.image=IMAGE conditions.NAME.mask=<MASK>'),
        'adapter_conditioning_scale controlnet_conditioning_scale control_net_multipliers ip_adapter_scale lora_scale '
        'network_mul adapter_weights set_ip_adapter_scale': Place(
            'scales.NAME=<0.8>', 'By adapter; 1 is the adapter as it was trained.'),
        'cross_attention_kwargs set_adapters': Place('scales.NAME=0.8', 'For `scale`, or the weights of LoRAs.'),
        'adapter_conditioning_factor control_net_ratios': Place(
            'active_ranges.NAME=(0,<0.5>)', 'A fraction of the whole denoising process.'),
        'control_guidance_start controlnet_start': Place(
            'active_ranges.NAME=(<0>,1)', 'A fraction of the whole denoising process.'),
        'control_guidance_end controlnet_end': Place(
            'active_ranges.NAME=(0,<0.5>)', 'A fraction of the whole denoising process.'),
        'guess_mode': Place(
            'model.adapters.NAME.type=ControlNet model.adapters.NAME.guess_mode=<True>', 'Of its config.'),
        'control_mode': Place(
            'model.adapters.NAME.type=ControlNet model.adapters.NAME.control_type=<openpose>', 'Of a union.'),
        'lora loras lora_weights lora_path load_lora_weights network_weights t2i_adapter adapter_path controlnet '
        'controlnet_path control_net_models ip_adapter ip_adapter_path load_ip_adapter': Place(
            'adapters.NAME=<FILE>', 'A file, folder or hub id, whose kind is found by itself.'),
        'network_merge fuse_lora': Place('', 'Not needed: a LoRA is an adapter beside others, with a scale.'),
        'network_module network_args': Place('', 'Nothing to give: kind and ranks are those of the file.'),
        'textual_inversion textual_inversion_embeddings load_textual_inversion': Place(
            'model.adapters.NAME.type=TextualInversion model.adapters.NAME.weights=<FILE> '
            'model.adapters.NAME.token=TOKEN'),
    },
    'The model': {
        'ckpt checkpoint model_id pretrained_model_name_or_path sd_model_checkpoint model_path': Place(
            'model.pretrained=<BASE>', 'A folder, a hub id, or a single file.'),
        'vae sd_vae': Place('model.vae=<VAE>'),
        'unet': Place('model.unet=<UNET>'),
        'revision': Place('model.revision=<REVISION>'),
        'variant': Place('model.variant=<fp16>'),
        'cache_dir': Place('model.cache_dir=<CACHE>'),
        'refiner_checkpoint': Place('refiner.pretrained=<REFINER>', 'Of a config that has a `refiner`, as '
                                                                    'sdxl_base_refiner.'),
        'fp16 half': Place('mixed_precision=fp16'),
        'bf16': Place('mixed_precision=bf16'),
        'torch_dtype dtype precision': Place('mixed_precision=<fp16>', '`no`, `fp16` or `bf16`.', {
            'float16': 'fp16', 'bfloat16': 'bf16', 'float32': 'no', 'fp32': 'no'}),
        'no_half_vae upcast_vae': Place('model.dtype.vae=float32', 'The default.'),
        'xformers enable_xformers_memory_efficient_attention diffusers_xformers': Place('model.attention=xformers'),
        'sdpa opt_sdp_attention': Place('model.attention=sdpa', 'The default.'),
        'enable_model_cpu_offload enable_sequential_cpu_offload cpu_offload medvram lowvram': Place(
            'infer_cfg.offload=True'),
        'enable_vae_slicing vae_slices': Place('infer_cfg.vae_slicing=True'),
        'enable_vae_tiling tiled_vae': Place('infer_cfg.vae_tiling=True'),
        'use_safetensors safety_checker add_watermarker': Place(
            '', 'Nothing to set: safetensors go before pickles, and images are neither checked nor marked.'),
        'torch_compile': Place('speed.compile=blocks', 'For many images of one size; also `graph`, a CUDA graph.'),
        'opt_channels_last': Place('', 'Not built in for images.'),
    },
    'The run': {
        'outdir out_dir output output_dir output_path': Place('--out <DIR>', 'In Python, calls return images.'),
        'from_file prompt_file prompts_file': Place('--prompts <FILE>', 'In Python, `prompt` takes a list.'),
        'output_type return_dict': Place(
            '', "A call in Python returns a list of images, or with `output_type='pt'`, `'np'` or `'latent'` a tensor "
            'or array; the command writes PNG files.'),
        'callback callback_steps callback_on_step_end callback_on_step_end_tensor_inputs callback_kwargs': Place(
            '', 'In Python, `on_step=FUNCTION` is called with (steps done, all steps) of each stage; latents cannot be '
            'changed on the way.'),
        'interactive no_preview sequential_file_name use_original_file_name network_show_meta': Place(
            '', 'Not built in.'),
    },
}

#: Methods and attributes of diffusers' pipelines -> what stands for them beside a call of SDXLInferencer.
METHODS = {
    'to cuda cpu': "SDXLInferencer(CONFIG, device='cuda')",
    'from_pretrained from_single_file': "SDXLInferencer(CONFIG, cfg_options=['model.pretrained=BASE'])",
    'load_lora_weights load_ip_adapter load_textual_inversion load_controlnet':
        "SDXLInferencer(CONFIG, adapters={'NAME': 'FILE'})",
    'set_adapters set_ip_adapter_scale fuse_lora': "inferencer(PROMPT, scales={'NAME': 0.8})",
    'unload_lora_weights unload_ip_adapter disable_lora delete_adapters': "inferencer(PROMPT, scales={'NAME': 0})",
    'enable_model_cpu_offload enable_sequential_cpu_offload':
        "SDXLInferencer(CONFIG, cfg_options=['infer_cfg.offload=True'])",
    'enable_vae_tiling': "SDXLInferencer(CONFIG, cfg_options=['infer_cfg.vae_tiling=True'])",
    'enable_vae_slicing': "SDXLInferencer(CONFIG, cfg_options=['infer_cfg.vae_slicing=True'])",
    'enable_xformers_memory_efficient_attention': "SDXLInferencer(CONFIG, cfg_options=['model.attention=xformers'])",
    'scheduler': "SDXLInferencer(CONFIG, cfg_options=['model.sampler.scheduler.type=DDIMScheduler'])",
    'unet': 'inferencer.model.unet', 'vae': 'inferencer.model.vae', 'text_encoder': 'inferencer.model.text_encoder',
    'text_encoder_2': 'inferencer.model.text_encoder_2', 'tokenizer': 'inferencer.model.tokenizer',
    'save_pretrained components enable_freeu watermark': 'inferencer.model.to_diffusers()'}
