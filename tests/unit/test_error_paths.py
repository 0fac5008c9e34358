"""Each function of the runner room that refuses or catches something has a test that shows how.

A new ``raise`` or ``except`` there fails this test until its own is named here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "vllm_steer" / "engine"
MODULES = (
    "worker_steering", "runner_v1", "runner_v2", "worker_rpc", "admission", "requests", "prefix_cache",
    "async_readouts", "offline", "plugin", "config", "decoder_layers", "stream_overflow", "batch_runner",
)  # fmt: skip

SHOWN_BY = {
    "worker_steering.WorkerSteering.begin": "unit/test_runner_room.py::test_a_spec_that_admission_has_not_resolved",
    "worker_steering.WorkerSteering._check_bank": "unit/test_runner_room.py::test_a_direction_that_was_booked_and",
    "runner_v1._prepare_inputs._prepare_inputs": "unit/test_runner_room.py::test_a_model_that_was_put_in_the_place_of",
    "worker_rpc._checked.checked": "unit/test_runner_room.py::test_a_runner_that_puts_no_hooks_on_its_model",
    "worker_rpc._of": "unit/test_runner_room.py::test_a_worker_without_steering_answers_no_call",
    "admission.Admission._hooked": "unit/test_admission.py::test_what_the_engine_cannot_do_is_refused",
    "admission.Admission._entry": "unit/test_admission.py::test_what_the_engine_cannot_do_is_refused",
    "admission.Admission._check_residual_norm": "unit/test_front_end_room.py::test_a_bound_in_residual_norms_is_kept",
    "admission.Admission._check_bounds": "unit/test_admission.py::test_as_many_entries_as_there_is_room_for_count",
    "admission.Admission._check_alpha": "unit/test_admission.py::test_the_largest_alpha_is_one_of_the_request",
    "admission.Admission._check_range": "unit/test_admission.py::test_what_the_engine_s_dtype_cannot_hold_is_refused",
    "admission.Admission._readout": "unit/test_admission.py::test_skipping_the_whole_prompt_is_refused",
    "admission.Admission._trace": "unit/test_admission.py::test_a_trace_that_cannot_be_taken_is_refused",
    "requests._check_salt": "engine/test_refusals.py::test_a_cache_salt_cannot_pose_as_that_of_a_steered_request",
    "admission.admission_of": "unit/test_front_end_room.py::test_an_engine_without_hooks_takes_neither",
    "requests._process_inputs.process_inputs": "unit/test_front_end_room.py::test_what_would_run_unsteered_or",
    "requests.asked_of": "unit/test_front_end_room.py::test_what_would_run_unsteered_or_unchecked",
    "requests._beam_search.beam_search": "engine/test_default_steering.py::test_beam_search_is_refused",
    "requests._assign_request_id.assign_request_id": "unit/test_front_end_room.py::test_a_request_made_by_hand_with",
    "async_readouts._generated": "server/test_api_server.py::test_a_bad_spec_is_a_client_error",
    "async_readouts._with_asked": "unit/test_async_front_end.py::test_a_readout_that_ray_s_stage_would_lose_is_refused",
    "async_readouts._alone": "unit/test_async_front_end.py::test_two_readouts_under_one_id_at_once_are_refused",
    "async_readouts._check_overflow": "unit/test_async_front_end.py::test_an_overflow_is_an_error_of_the_plugins_own",
    "batch_runner._answer": "server/test_batch_runner.py::test_a_line_that_cannot_be_honoured_is_an_error_of_that_line",
    "batch_runner._completed": "unit/test_async_front_end.py::test_a_line_that_was_answered_unsteered_is_an_error",
    "offline.steered": "engine/test_front_end.py::test_beam_search_takes_no_spec_and_runs_unsteered",
    "offline._Wanted.results": "engine/test_readouts.py::test_a_trace_for_which_no_column_is_free_fails_with_a_reason",
    "offline._check_synchronous": "unit/test_async_front_end.py::test_an_asynchronous_engine_is_told_the_form_for_it",
    "offline._registry_of": "unit/test_async_front_end.py::test_a_servers_registry_is_not_changed_behind_its_back",
    "offline.register_directions_async": "unit/test_async_front_end.py::test_slots_are_given_back_where_the_workers",
    "plugin.require": "unit/test_front_end_room.py::test_a_spec_is_not_attached_where_the_plugin_is_filtered_out",
    "plugin.vllm_version": "unit/test_front_end_room.py::test_a_machine_without_vllm_is_told_what_to_install",
    "config._check_endpoints": "unit/test_front_end_room.py::test_a_server_whose_endpoints_would_not_load_is_refused",
    "config._create_engine_config.create_engine_config": "compat/test_version_gate.py::test_any_other_release_is",
    "config.check": "engine/test_refusals.py::test_a_layer_that_the_model_lacks_is_refused",
    "config.refusals": "engine/test_doctor.py::test_every_problem_is_listed_not_only_the_first",
    "decoder_layers.Family.check_dtype": "engine/test_doctor.py::test_float16_is_refused_where_the_stream_is_rescaled",
    "decoder_layers.family_of": "engine/test_refusals.py::test_an_unsupported_family_is_refused_by_name",
    "decoder_layers.attach": "unit/test_runner_room.py::test_layers_of_another_class_are_not_hooked_by_guess",
    "decoder_layers.decoder_blocks": "unit/test_runner_room.py::test_a_model_without_layers_is_refused",
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


def test_every_error_path_of_the_runner_room_has_its_test() -> None:
    sources = {module: (ROOM / f"{module}.py").read_text() for module in MODULES}
    found = {path for module, source in sources.items() for path in error_paths(ast.parse(source), (module,))}
    assert found == set(SHOWN_BY)
    for path, shown in SHOWN_BY.items():
        file, _, name = shown.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(), f"{path}: there is no {shown}"
