"""field_names maps each option of diffusers' train_t2i_adapter_sdxl.py to a config key; these tests set the keys.

The keys come from the table, so that the two cannot differ.
"""

from options import test_base, test_data, test_optim, test_run
from options.page import PAGE, page
from options.table import TABLE

# All options of the script's `parse_args` (diffusers 0.42).
OPTIONS = '''
    pretrained_model_name_or_path pretrained_vae_model_name_or_path adapter_model_name_or_path revision variant
    tokenizer_name output_dir cache_dir seed resolution detection_resolution crops_coords_top_left_h
    crops_coords_top_left_w train_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32
    report_to mixed_precision enable_xformers_memory_efficient_attention set_grads_to_none dataset_name
    dataset_config_name train_data_dir image_column conditioning_image_column caption_column max_train_samples
    proportion_empty_prompts validation_prompt validation_image num_validation_images validation_steps
    tracker_project_name'''


def test_each_option_of_the_script_is_set_and_looked_at() -> None:
    assert not [option for option in OPTIONS.split() if option not in TABLE]
    checked = [option for file in (test_base, test_data, test_optim, test_run) for option in file.case.checks]
    assert sorted(option for option in OPTIONS.split() if TABLE[option]) == sorted(checked)


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text()
    assert page(text) == text, 'run: python tests/options/page.py'
