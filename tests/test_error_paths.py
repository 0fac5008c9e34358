"""Each function of the engine that refuses or catches something has a test that shows how.

A new ``raise`` or ``except`` there fails this test until its own test is named here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_steer"
MODULES = {
    "engine": "vllm_versions startup_checks layer_classes prefix_cache early_ends",
    "engine/front": "admission hooks entry_limits entry_resolution entry_shapes readout_admission "
    "request_intake async_generate offline",
    "engine/worker": "worker_steering rpc patch_classic_runner patch_v2_runner step_marks hooked_layers "
    "layer_experiment",
    "server": "batch_runner",
}

SHOWN_BY = {
    "worker_steering.WorkerSteering.begin": "engine/worker/test_never_unsteered.py::test_a_spec_that_admission_has_n",
    "worker_steering.WorkerSteering._check_bank": "engine/worker/test_never_unsteered.py::test_a_direction_that_was",
    "patch_classic_runner._prepare_inputs._prepare_inputs": "engine/worker/test_never_unsteered.py::test_a_model_tha",
    "rpc._checked.checked": "engine/worker/test_never_unsteered.py::test_a_runner_that_puts_no_hooks_on_its_m",
    "rpc._of": "engine/worker/test_never_unsteered.py::test_a_worker_without_steering_answers_no_call",
    "hooks.Hooks.index": "engine/front/test_admission.py::test_what_the_engine_cannot_do_is_refused",
    "entry_resolution.EntryResolution._conditional": "engine/front/test_admission.py::test_a_condition_that_cannot_be_",
    "entry_resolution.EntryResolution._with_probes": "engine/front/test_admission.py::test_too_many_probes_and_probes_",
    "entry_resolution.EntryResolution.resolve": "engine/front/test_admission.py::test_a_refused_entry_is_named_by_its_",
    "entry_resolution.EntryResolution._entry": "engine/front/test_admission.py::test_what_the_engine_cannot_do_is_refu",
    "entry_limits.EntryLimits._check_residual_norm": "engine/front/test_never_unsteered.py::test_a_bound_in_residual_n",
    "entry_limits.EntryLimits.check": "engine/front/test_admission.py::test_as_many_entries_as_there_is_room_for",
    "entry_limits.EntryLimits.check_windows": "engine/front/test_admission.py::test_a_request_has_as_many_windows_as_t",
    "admission._check_reach": "engine/front/test_admission.py::test_a_slice_behind_the_last_computed_token_is_refused",
    "entry_limits.EntryLimits._check_alpha": "engine/front/test_admission.py::test_the_largest_alpha_is_one_of_the_req",
    "readout_admission.ReadoutAdmission._check_columns": "engine/front/test_admission.py::test_the_largest_projections",
    "readout_admission.ReadoutAdmission._check_rows": "engine/front/test_admission.py::test_more_rows_than_the_operato",
    "entry_limits.EntryLimits._check_range": "engine/front/test_admission.py::test_what_the_engine_s_dtype_cannot_hold",
    "readout_admission.ReadoutAdmission.resolve": "engine/front/test_admission.py::test_skipping_the_whole_prompt_is_r",
    "readout_admission.ReadoutAdmission._trace": "engine/front/test_admission.py::test_a_trace_that_cannot_be_taken_is",
    "request_intake._check_salt": "engine/test_refusals.py::test_a_cache_salt_cannot_pose_as_that_of_a_steered_request",
    "entry_limits._growth": "engine/front/test_admission.py::test_the_stream_cannot_be_multiplied_beyond_its_range",
    "admission.admission_of": "engine/front/test_never_unsteered.py::test_an_engine_without_hooks_takes_neither",
    "request_intake._process_inputs.process_inputs": "engine/front/test_never_unsteered.py::test_what_would_run_unst",
    "request_intake.asked_of": "engine/front/test_never_unsteered.py::test_what_would_run_unsteered_or_unchecked",
    "request_intake._beam_search.beam_search": "engine/test_default_steering.py::test_beam_search_is_refused",
    "request_intake._assign_request_id.assign_request_id": "engine/front/test_never_unsteered.py::test_a_request_mad",
    "async_generate._generated": "server/test_api_server.py::test_a_bad_spec_is_a_client_error",
    "async_generate._with_asked": "engine/front/test_async_front_end.py::test_a_readout_that_ray_s_stage_would_lose",
    "async_generate._alone": "engine/front/test_async_front_end.py::test_two_readouts_under_one_id_at_once_are_refused",
    "async_generate._check_ends": "engine/front/test_async_front_end.py::test_an_overflow_is_an_error_of_the_plugin",
    "readout_admission.ReadoutAdmission._watched": "engine/front/test_admission.py::test_a_stop_is_refused_across_pipe",
    "batch_runner._answer": "server/test_batch_runner.py::test_a_line_that_cannot_be_honoured_is_an_error_of_that_line",
    "batch_runner._completed": "engine/front/test_async_front_end.py::test_a_line_that_was_answered_unsteered_is_an",
    "offline.steered": "engine/test_front_end.py::test_beam_search_takes_no_spec_and_runs_unsteered",
    "offline._Wanted.results": "engine/test_readouts.py::test_a_trace_for_which_no_column_is_free_fails_with_a_reason",
    "offline._check_synchronous": "engine/front/test_async_front_end.py::test_an_asynchronous_engine_is_told_the_for",
    "offline._registry_of": "engine/front/test_async_front_end.py::test_a_servers_registry_is_not_changed_behind_its",
    "offline.register_directions": "engine/front/test_async_front_end.py::test_offline_too_slots_are_given_back",
    "offline.register_directions_async": "engine/front/test_async_front_end.py::test_slots_are_given_back_where_the",
    "vllm_versions.require": "engine/front/test_never_unsteered.py::test_a_spec_is_not_attached_where_the_plugin_is",
    "vllm_versions.vllm_version": "engine/front/test_never_unsteered.py::test_a_machine_without_vllm_is_told_what_to",
    "startup_checks._check_endpoints": "engine/front/test_never_unsteered.py::test_a_server_whose_endpoints_would_no",
    "startup_checks._create_engine_config.create_engine_config": "compat/test_version_gate.py::test_any_other_releas",
    "startup_checks.check": "engine/test_refusals.py::test_a_layer_that_the_model_lacks_is_refused",
    "startup_checks.refusals": "engine/test_doctor.py::test_every_problem_is_listed_not_only_the_first",
    "layer_classes.refuse_rescaled": "engine/test_doctor.py::test_float16_is_refused_where_the_stream_is_rescaled",
    "layer_classes.refuse_architecture": "engine/test_refusals.py::test_an_architecture_that_cannot_be_exact_is_re",
    "hooked_layers.conventions": "engine/worker/test_layer_experiment.py::test_a_table_that_says_otherwise_is_refused",
    "hooked_layers.put_hooks": "engine/worker/test_never_unsteered.py::test_a_layer_that_the_loaded_model_lacks_is_r",
    "hooked_layers._answered": "engine/worker/test_layer_experiment.py::test_a_layer_of_which_nobody_speaks_is",
    "layer_experiment._find_blocks": "engine/worker/test_layer_experiment.py::test_a_model_whose_layers_are_not_found",
    "layer_experiment._ask": "engine/worker/test_layer_experiment.py::test_a_model_of_which_nothing_can_be_said",
    "layer_experiment._convention": "engine/worker/test_layer_experiment.py::test_a_stream_that_is_neither_is",
    "layer_experiment._refuse_partial_sums": "engine/worker/test_layer_experiment.py::test_a_part_of_a_sum_is_refused",
}


def error_paths(node: ast.AST, qualified: tuple[str, ...]) -> Iterator[str]:
    """Qualified names of the functions below a node that raise or catch."""
    for child in ast.iter_child_nodes(node):
        inner = qualified
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*qualified, child.name)
        elif isinstance(child, ast.Raise | ast.ExceptHandler):
            yield ".".join(qualified)
        yield from error_paths(child, inner)


def test_every_error_path_of_the_engine_has_its_test() -> None:
    files = [PACKAGE / folder / f"{name}.py" for folder, names in MODULES.items() for name in names.split()]
    found = {path for file in files for path in error_paths(ast.parse(file.read_text()), (file.stem,))}
    assert found == set(SHOWN_BY)
    for path, shown in SHOWN_BY.items():
        file, _, name = shown.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(), f"{path}: there is no {shown}"
