"""What is slow, and is left out by `tests/run.sh --quick`; no test has a deadline."""

import importlib

import pytest
from hypothesis import HealthCheck, settings

# What a test says counts, not how long a busy machine takes for it.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A file, or one test of a file with all its cases. To see what belongs here:
# pytest --durations=40 --durations-min=3
SLOW = (
    "test_against_megatron",
    "test_alike_runs",
    "test_applied",
    "test_audit_save",
    "test_balancing_against_megatron",
    "test_bench_overlap",
    "test_distill",
    "test_development",
    "test_divergence",
    "test_hybrid",
    "test_hybrid_plan",
    "test_model_class_chosen::test_a_new_run_is_a_hybrid_with_the_losses_of_the_gpt_and_goes_on",
    "test_benchmark_scripts::test_the_fastest_way_at_each_ep_counts_beside_one_rank",
    "test_bounds",
    "test_by_nature",
    "test_check_save",
    "test_choice",
    "test_combined",
    "test_commands",
    "test_config_keys",
    "test_convert::test_source_saved_by_two_ranks",
    "test_convert_formats",
    "test_convert_hybrid_hf::test_the_models_compute_the_same",
    "test_convert_megatron",
    "test_convert_scale::test_memory_is_that_of_two_tensors",
    "test_cpu",
    "test_cpu_flags",
    "test_damaged_inputs::test_the_figures_of_a_bench_are_printed_before_they_are_lost",
    "test_drills",
    "test_flags_file",
    "test_flags_together",
    "test_found",
    "test_generate",
    "test_generate_tokenizers",
    "test_gpu_packages",
    "test_hostile_lines",
    "test_inside",
    "test_kernels_experts",
    "test_kernels_fit",
    "test_kernels_routing",
    "test_layouts",
    "test_model_class_trains",
    "test_model_folder",
    "test_narrow_dispatch::test_narrow_tokens_change_nothing",
    "test_no_connection",
    "test_older_loop",
    "test_older_releases",
    "test_one_layer_at_a_time",
    "test_optimizers::test_parts_of_a_matrix_become_one_as_megatron_s_do",
    "test_optimizers::test_the_layer_wise_optimizer_changes_nothing_and_resumes",
    "test_optimizers::test_training_is_megatron_s",
    "test_overlap::test_whole_numbers_give_equal_bits",
    "test_padding",
    "test_parity",
    "test_presets_train",
    "test_readme",
    "test_recipes::test_a_run_that_is_asked_to_end_leaves_a_checkpoint_with_its_optimizer",
    "test_recipes::test_megatron_and_the_plugin_take_the_flags",
    "test_releases::test_torchrun_starts_the_oldest_loop",
    "test_report_any",
    "test_resume",
    "test_routing::test_random_cases",
    "test_routing::test_random_token_selection_is_fair_and_seedable",
    "test_routing_flags::test_a_residual_pyramid_trains_alike_on_any_ep_and_resumes",
    "test_same_bytes::test_a_conversion_in_another_process_gives_the_same_bytes",
    "test_served",
    "test_speed_flags",
    "test_symm_mem::test_kernels_equal_their_twins_in_triton_s_interpreter",
    "test_theirs_advice",
    "test_training_settings",
    "test_typed::test_what_is_accepted_builds_a_layer_or_the_layer_refuses_it",
    "test_unbalanced",
    "test_vocabulary",
    "test_vpp",
    "test_watch",
    "test_watch_ends_nothing",
    "test_weights",
    "test_workers_end",
)


def pytest_configure() -> None:
    importlib.import_module("cpu_only")  # of tests/helpers, which is on the path by now


def is_slow(file: str, test: str) -> bool:
    """Return whether a test, without its parameters, is in the list."""
    return file in SLOW or f"{file}::{test}" in SLOW


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path.stem, item.name.partition("[")[0]):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "not slow" in terminalreporter.config.option.markexpr:
        names = ", ".join(SLOW)
        terminalreporter.write_line(f"left out, as they take long (tests/conftest.py): {names}")
