"""field_names: every option that people know from elsewhere has an answer, and every answer works here."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
from options.test_table import OPTIONS

from diffengine_sdxl import config, registry
from diffengine_sdxl.commands import cli, options
from diffengine_sdxl.field_names import SAMPLING, TRAINING, sampling_hint, training_hint
from diffengine_sdxl.field_names.hints import OVERRIDES
from diffengine_sdxl.field_names.place import Topics, by_name
from diffengine_sdxl.field_names.sampling import METHODS
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.request import SETTINGS, Request
from diffengine_sdxl.samplers.schedulers import SCHEDULERS

ROOT = Path(__file__).resolve().parents[1]

# Options of diffusers 0.42's other scripts that are not in the T2I-Adapter's, and of kohya's train_network (2026-02).
OTHER_SCRIPTS = '''
    adam_weight_decay_text_encoder center_crop class_data_dir class_prompt controlnet_model_name_or_path
    do_edm_style_training enable_npu_flash_attention image_interpolation_mode initializer_token input_perturbation
    instance_data_dir instance_prompt learnable_property lora_dropout noise_offset num_class_images num_vectors
    optimizer output_kohya_format placeholder_token prediction_type prior_generation_precision prior_loss_weight
    prodigy_beta3
    prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction random_flip rank repeats sample_batch_size
    save_as_full_pipeline save_steps snr_gamma text_encoder_lr timestep_bias_begin timestep_bias_end
    timestep_bias_multiplier timestep_bias_portion timestep_bias_strategy train_text_encoder use_dora use_ema
    validation_epochs with_prior_preservation debug_loss'''
KOHYA = '''
    adaptive_noise_scale alpha_mask base_weights base_weights_multiplier blocks_to_swap bucket_no_upscale
    bucket_reso_steps cache_latents cache_latents_to_disk cache_text_encoder_outputs
    cache_text_encoder_outputs_to_disk caption_dropout_every_n_epochs caption_dropout_rate caption_extension
    caption_prefix caption_separator caption_suffix caption_tag_dropout_rate clip_skip color_aug conditioning_data_dir
    cpu_offload_checkpointing dataset_config ddp_timeout debiased_estimation_loss dim_from_weights dynamo_backend
    enable_bucket enable_wildcard face_crop_aug_range flip_aug fp8_base full_bf16 full_fp16 fused_backward_pass
    gradient_accumulation_steps gradient_checkpointing highvram huber_c huber_scale huber_schedule huggingface_repo_id
    huggingface_token in_json initial_epoch initial_step ip_noise_gamma ip_noise_gamma_random_strength keep_tokens
    keep_tokens_separator learning_rate log_prefix log_tracker_name log_with logging_dir logit_mean logit_std loss_type
    lowram lr_decay_steps lr_scheduler lr_scheduler_args lr_scheduler_min_lr_ratio lr_scheduler_num_cycles
    lr_scheduler_power lr_scheduler_timescale lr_scheduler_type lr_warmup_steps masked_loss max_bucket_reso
    max_data_loader_n_workers max_grad_norm max_timestep max_token_length max_train_epochs max_train_steps
    max_validation_steps mem_eff_attn min_bucket_reso min_snr_gamma min_timestep mixed_precision multires_noise_discount
    multires_noise_iterations network_alpha network_args network_dim network_dropout network_module
    network_train_text_encoder_only network_train_unet_only network_weights no_half_vae no_metadata noise_offset
    noise_offset_random_strength optimizer_args optimizer_type output_dir output_name persistent_data_loader_workers
    pretrained_model_name_or_path prior_loss_weight random_crop reg_data_dir resize_interpolation resolution
    sample_at_first sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler save_every_n_epochs
    save_every_n_steps save_last_n_epochs save_last_n_steps save_model_as save_n_epoch_ratio save_precision save_state
    scale_v_pred_loss_like_noise_pred scale_weight_norms sdpa seed shuffle_caption skip_until_initial_step
    text_encoder_batch_size text_encoder_lr token_warmup_min token_warmup_step torch_compile train_batch_size
    train_data_dir training_comment unet_lr use_8bit_adam use_lion_optimizer use_safetensors v2 v_parameterization
    v_pred_like_loss vae vae_batch_size validate_every_n_epochs validate_every_n_steps validation_seed validation_split
    wandb_api_key wandb_run_name weighted_captions weighting_scheme xformers zero_terminal_snr'''
MMENGINE = 'base_lr batch_size epochs img_size lr max_epochs max_iters num_workers samples_per_gpu weight_decay'
IMAGE_TOOLS = '''
    cfg_scale ckpt control_net_models control_net_multipliers control_net_ratios ddim_eta denoising_strength enable_hr
    from_file guide_image_path h highres_fix_scale image_path images_per_prompt init_images inpaint_full_res
    mask_blur mask_path max_embeddings_multiples n_iter negative network_mul network_weights outdir refiner_switch_at
    sampler sampler_index sampler_name scale sd_model_checkpoint self_attention_guidance_scale steps styles subseed
    textual_inversion_embeddings w condition_scale clip_image_embedding load_lora_weights enable_model_cpu_offload
    enable_vae_tiling torch_dtype'''


def names(topics: Topics) -> list[str]:
    return [name for rows in topics.values() for line in rows for name in line.split()]


@pytest.mark.parametrize('topics', (TRAINING, SAMPLING), ids=('training', 'sampling'))
def test_a_name_stands_once_and_is_folded(topics: Topics) -> None:
    found = names(topics)
    assert len(found) == len(set(found)) and all(re.fullmatch('[a-z0-9_]+', name) for name in found)
    assert all(place.ours or place.note for rows in topics.values() for place in rows.values())


def test_training_options_have_an_answer() -> None:
    known = f'{OPTIONS} {OTHER_SCRIPTS} {KOHYA} {MMENGINE}'.split()
    assert not [name for name in known if not training_hint(name)]


def test_arguments_of_pipelines_and_image_tools_have_an_answer() -> None:
    import diffusers
    known = set(IMAGE_TOOLS.split())
    pipelines = [cls for name in dir(diffusers) if re.match('StableDiffusionXL.*Pipeline', name)
                 and issubclass(cls := getattr(diffusers, name), diffusers.DiffusionPipeline)]
    for cls in pipelines:
        parameters = [*inspect.signature(cls.__call__).parameters.values()][1:]
        known |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    assert len(pipelines) > 12 and len(known) > 60
    accepted = {*SETTINGS, *inspect.signature(SDXLInferencer.__call__).parameters}
    assert not [name for name in sorted(known) if name not in accepted and not sampling_hint(name)]
    assert not [name for name in sorted(known) if name not in SETTINGS and not sampling_hint(name, where='command')]


# Answers for training

FILL50K, CANNY, LORA, DREAMBOOTH, IP, WORD = (f'stable_diffusion_xl_{name}' for name in (
    't2i_adapter_fill50k', 't2i_adapter_canny', 'lora_text_to_image', 'lora_dreambooth', 'ip_adapter',
    'textual_inversion'))
#: Part of `ours` -> a config where it applies, and its adapter; the first that matches.
WHERE = (
    ('.image_encoder', IP, 'ip'), ('condition.', CANNY, ''),
    *((part, WORD, 'word') for part in ('.token=', '.num_vectors', '=WORD')),
    *((part, DREAMBOOTH, '') for part in ('instance_', 'class_', 'prior_')),
    *((f'.NAME.{key}=', LORA, 'style') for key in ('rank', 'alpha', 'dropout', 'kind', 'targets', 'rslora', 'init',
                                                   'parts')),
    ('OTHER', LORA, 'style'), ('NAME.text_encoder', LORA, 'style'), ('', FILL50K, 'adapter'))


def batches(places: list[tuple[str, str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Return (config, overrides) of places (config, adapter, ours), as many in one as don't touch the same part."""
    made: list[tuple[str, dict[str, str]]] = []
    for name, adapter, ours in places:
        items = dict(part.split('=', 1) for part in ours.replace('NAME', adapter).split())
        free = (batch for config_name, batch in made if config_name == name and not any(
            _same(a, b) for a in items for b in batch))
        if (batch := next(free, None)) is None:
            made.append((name, batch := {}))
        batch.update(items)
    return made


def _same(a: str, b: str) -> bool:
    """Return whether one key holds the other, or both are of one objective's part, hook or back end."""
    common = ('model.objective.', 'default_hooks.', 'visualizer.vis_backends.')
    return f'{a}.'.startswith(f'{b}.') or f'{b}.'.startswith(f'{a}.') or (
        a.startswith(common) and a.split('.')[:3] == b.split('.')[:3])


def test_overrides_of_training_are_taken() -> None:
    places = [next((name, adapter, plain) for part, name, adapter in WHERE if part in plain)
              for place in by_name(TRAINING).values()
              if (plain := ' '.join(place.parts())) and not plain.startswith('--')]
    made = batches(sorted(set(places)))
    for name, overrides in made:
        config.load(name, [f'{key}={value}' for key, value in overrides.items()])
    assert len(made) < 25, 'a load takes 0.1 s or more'


def test_values_elsewhere_are_registered_here() -> None:
    for key, known in (('report_to', registry.VISBACKENDS.names()), ('loss_type', registry.LOSSES.names()),
                       ('optimizer_type', registry.OPTIMIZERS.names())):
        values = by_name(TRAINING)[key].values
        assert values and set(values.values()) <= {*known}
    assert set(by_name(SAMPLING)['sampler_name'].values.values()) <= {*SCHEDULERS}


def test_notes_name_what_exists() -> None:
    notes = [place.note for topics in (TRAINING, SAMPLING) for rows in topics.values() for place in rows.values()]
    types = {name for reg in (registry.TRANSFORMS, registry.DATASETS, registry.OPTIMIZERS) for name in reg.names()}
    types |= {*registry.ADAPTERS.names()}
    for note in notes:
        assert set(re.findall(r"(?<!_)type='(\w+)'", note)) <= types, note
        assert all((ROOT / page).is_file() for page in re.findall(r'docs/\w+\.md', note)), note
        assert not note or note.endswith('.') and '|' not in note, note


# Answers for images

def test_settings_of_sampling_exist_and_take_the_example() -> None:
    for name, place in by_name(SAMPLING).items():
        if not place.ours or place.ours.startswith(('--', 'adapters.', *OVERRIDES)):
            continue
        for key, value in config.parse_overrides(place.parts()).items():
            top, *path = key.split('.')
            assert top in SETTINGS, name
            for part in reversed(path):
                value = {part: value}
            Request.of({top: value}, whole=False)


def test_overrides_of_sampling_are_taken() -> None:
    plain = {' '.join(place.parts()).replace('NAME', 'style') for place in by_name(SAMPLING).values()
             if place.ours.startswith(OVERRIDES)}
    for name, overrides in batches([('sdxl_base_refiner', '', ours) for ours in sorted(plain)]):
        config.load(name, [f'{key}={value}' for key, value in overrides.items()])


@pytest.mark.parametrize('command', ('train', 'infer'))
def test_the_command_takes_what_the_hint_says(command: str) -> None:
    for name in names(TRAINING if command == 'train' else SAMPLING):
        hint = training_hint(name) if command == 'train' else sampling_hint(name, where='command')
        if match := re.match(' In this project it is `(.+?)`[.]', hint):
            args = cli.parse(command, ['CONFIG', *shlex.split(match[1])])
            if command == 'infer':
                options.given_settings(args)


def test_the_hint_for_python_is_python() -> None:
    for name in names(SAMPLING):
        if match := re.match(' In this project it is `(.+?)`[.]', sampling_hint(name)):
            ast.parse(f'inferencer({match[1]})')


# How a hint reads

@pytest.mark.parametrize(('name', 'value', 'hint'), (
    ('--learning-rate', '3e-4', '`--cfg-options optim_wrapper.optimizer.lr=3e-4`.'),
    ('LR', 0.001, '`--cfg-options optim_wrapper.optimizer.lr=0.001`.'),
    ('output_dir', 'my run', "`--work-dir 'my run'`."),
    ('adam_beta2', '0.99', "`--cfg-options 'optim_wrapper.optimizer.betas=(0.9,0.99)'`."),
    ('report_to', 'wandb', '`--cfg-options visualizer.vis_backends.1.type=WandbVisBackend`.'),
    ('validation_prompt', ['a, b', 'c'], '`--cfg-options \'default_hooks.samples.prompts=["a, b","c"]\'`.'),
    ('gradient_checkpointing', None, '`--cfg-options model.gradient_checkpointing=True`.'),
    ('network_dim', '8', "`--cfg-options model.adapters.NAME.rank=8`. NAME is the adapter's name."),
))
def test_training_hints(name: str, value: Any, hint: str) -> None:
    assert training_hint(name, value).startswith(f' In this project it is {hint}')


@pytest.mark.parametrize(('name', 'value', 'python', 'command'), (
    ('adapter_conditioning_scale', 0.5, "scales={'NAME': 0.5}", '--scales NAME=0.5'),
    ('ip_adapter_masks', object(), "conditions={'NAME': {'image': IMAGE, 'mask': MASK}}",
     '--condition NAME=IMAGE --condition NAME.mask=MASK'),
    ('cfg_scale', 7, 'guidance_scale=7', '--guidance-scale 7'),
    ('control-guidance-end', 0.3, "active_ranges={'NAME': (0, 0.3)}", "--active-ranges 'NAME=(0,0.3)'"),
    ('Sampler_Name', 'DPM++ 2M', "SDXLInferencer(CONFIG, cfg_options=['model.sampler.scheduler.type="
     "DPMSolverMultistepScheduler'])", '--cfg-options model.sampler.scheduler.type=DPMSolverMultistepScheduler'),
    ('load_lora_weights', 'x.safetensors', "SDXLInferencer(CONFIG, adapters={'NAME': 'x.safetensors'})",
     '--adapter NAME=x.safetensors'),
    ('controlnet_conditioning_scale', [0.5, 0.8], "scales={'NAME': 0.8}", '--scales NAME=0.8'),
    ('negative', 'it is "bad"', 'negative_prompt=\'it is "bad"\'', '--negative-prompt \'it is "bad"\''),
))
def test_sampling_hints(name: str, value: Any, python: str, command: str) -> None:
    assert sampling_hint(name, value).startswith(f' In this project it is `{python}`.')
    assert sampling_hint(name, value, 'command').startswith(f' In this project it is `{command}`.')


def test_a_flag_of_the_command_is_no_answer_in_python() -> None:
    assert sampling_hint('outdir', 'P', 'command').startswith(' In this project it is `--out P`.')
    assert sampling_hint('outdir', 'P') == ' In Python, calls return images.'


def test_what_is_not_here_says_why_and_what_is_unknown_nothing() -> None:
    assert training_hint('full_bf16').startswith(' Not built in: ')
    assert sampling_hint('prompt_embeds').startswith(' Not built in: ')
    assert training_hint('nonsense') == sampling_hint('nonsense') == ''


def test_imports_nothing_heavy() -> None:
    code = 'import sys, diffengine_sdxl.field_names; print([m for m in ("torch", "numpy") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == '[]\n'


def test_methods_of_a_pipeline_are_answered() -> None:
    """By an AttributeError; what is named there exists, and methods that are answered are no attributes of ours."""
    inferencer = SDXLInferencer.__new__(SDXLInferencer)
    with pytest.raises(AttributeError, match="has no 'load_lora_weights'. In this project it is `SDXLInferencer"):
        inferencer.load_lora_weights('x')
    with pytest.raises(AttributeError, match=r"has no 'nosuch'\.$"):
        inferencer.nosuch  # noqa: B018
    names = [name for names in METHODS for name in names.split()]
    assert len(names) == len(set(names)) and not [name for name in names if name in vars(SDXLInferencer)]
    for ours in METHODS.values():
        ast.parse(ours)
    pipeline = dir(diffusers.StableDiffusionXLPipeline)
    # Those of an instance, of other pipelines, and of earlier versions.
    instance = {'scheduler', 'unet', 'vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'watermark', 'cuda', 'cpu',
                'load_controlnet', 'enable_vae_tiling', 'enable_vae_slicing'}
    assert not [name for name in names if name not in pipeline and name not in instance]
