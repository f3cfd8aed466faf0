"""Which test proves which parameter: it fails if the recipe ignores the field it is listed for."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

PROOFS: Final[Mapping[str, str]] = {
    "recipe": "test_epochs_count_batches_of_all_pictures",
    "method": "test_only_the_adapters_learn_and_the_base_keeps_its_bits",
    "lora": "test_alpha_scales_what_is_added",
    "concepts": "test_concepts_prompts_reach_the_text_encoder",
    "seed": "test_seed_decides_all_weights",
    "resolution": "test_resolution_sets_the_size_the_unet_sees",
    "center_crop": "test_center_crop_changes_wide_pictures_and_not_square_ones",
    "flip_probability": "test_flip_probability_mirrors_its_share_of_uses_before_they_are_encoded",
    "num_train_epochs": "test_num_train_epochs_counts_passes_over_the_longer_list",
    "max_train_steps": "test_max_train_steps_counts_updates_and_wins_over_epochs",
    "train_batch_size": "test_train_batch_size_is_the_instance_half_of_what_the_unet_sees",
    "gradient_accumulation_steps": "test_gradient_accumulation_steps_make_the_update_of_one_large_batch",
    "gradient_checkpointing": "test_gradient_checkpointing_recomputes_and_gives_the_same_weights",
    "mixed_precision": "test_mixed_precision_sets_the_type_of_activations",
    "disable_fused_attention": "test_disable_fused_attention_swaps_the_kernels",
    "learning_rate": "test_learning_rate_is_the_size_of_the_first_update",
    "text_encoder_learning_rate": "test_text_encoder_learning_rate_applies_to_the_text_encoder_alone",
    "scale_learning_rate": "test_scale_learning_rate_multiplies_by_batch_and_accumulation",
    "lr_scheduler": "test_lr_scheduler_gives_each_name_its_curve",
    "lr_warmup_steps": "test_lr_warmup_steps_count_updates",
    "lr_decay_steps": "test_lr_decay_steps_end_the_curve",
    "lr_num_cycles": "test_lr_num_cycles_restarts_the_cosine",
    "optimizer_precision": "test_optimizer_precision_is_obeyed",
    "adam_beta1": "test_each_adam_parameter_changes_the_second_update",
    "adam_beta2": "test_each_adam_parameter_changes_the_second_update",
    "adam_weight_decay": "test_each_adam_parameter_changes_the_second_update",
    "adam_epsilon": "test_adam_epsilon_of_one_all_but_stops_learning_and_is_warned_about",
    "max_grad_norm": "test_max_grad_norm_limits_the_joint_norm",
    "with_prior_preservation": "test_with_prior_preservation_reads_class_pictures",
    "prior_loss_weight": "test_prior_loss_weight_scales_the_class_term",
    "train_unet": "test_train_unet_false_leaves_the_unet",
    "train_text_encoder": "test_train_text_encoder_false_leaves_the_text_encoder",
    "pad_tokens": "test_pad_tokens_sets_the_length_the_unet_attends_to",
    "clip_models_separately": "test_clip_models_separately_limits_each_models_norm",
    "unet_steps": "test_a_part_is_frozen_after_its_own_steps",
    "text_encoder_steps": "test_a_part_is_frozen_after_its_own_steps",
    "clip_skip": "test_clip_skip_trains_and_conditions_on_an_inner_layer",
    "caption_dropout": "test_caption_dropout_of_one_makes_the_weights_independent_of_captions",
    "shuffle_tags": "test_tags_of_a_prompt_are_shuffled_and_left_out_as_asked",
    "tag_dropout": "test_tags_of_a_prompt_are_shuffled_and_left_out_as_asked",
    "aspect_ratio_bucketing": "test_each_picture_trains_at_the_size_of_its_bucket",
    "crop_jitter": "test_crop_jitter_moves_the_crops_of_large_pictures",
    "rated_dataset": "test_a_rated_dataset_shrinks_to_its_share",
    "rated_dataset_final_percent": "test_a_rated_dataset_shrinks_to_its_share",
    "min_snr_gamma": "test_min_snr_gamma_weights_each_sample_by_its_own_timestep",
    "offset_noise": "test_offset_noise_moves_the_mean_of_whole_channels",
    "ema_decay": "test_ema_decay_publishes_the_moving_average",
    "zero_terminal_snr": "test_zero_terminal_snr_trains_to_no_signal_and_draws_from_there",
    "balance_concepts": "test_balance_concepts_draws_all_concepts_equally_often",
    "export_formats": "test_export_formats_are_published_beside_the_model",
    "save_optimizer": "test_save_optimizer_publishes_a_state_that_another_training_goes_on_from",
    "preview_prompts": "test_previews_are_drawn_of_each_prompt_at_their_updates_and_at_the_end",
    "preview_steps": "test_previews_are_drawn_of_each_prompt_at_their_updates_and_at_the_end",
    "publish_every_minutes": "test_publish_every_minutes_makes_models_of_unfinished_weights_and_changes_none",
    "save_full_precision": "test_save_full_precision_sets_the_type_of_the_published_weights",
}


@cache
def places() -> Mapping[str, str]:
    """Every test of the trainer, with the name of the file that it is in.

    Raises:
        ValueError: two have one name, so that nobody could say which of them proves a field.
    """
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name in re.findall(
            r"^(?:async )?def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if name in PROOFS.values() and name in found:
                raise ValueError(f"{name} is in {found[name]} and in {path.name}")
            found[name] = path.name
    return found
