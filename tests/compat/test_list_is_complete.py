"""The list of foreign names, the register of patches and the room's own source tell the same."""

from __future__ import annotations

import re

import vllm_steer.engine
from tests.compat.findings import needed_by
from tests.compat.own_use import PACKAGE, engine_files, file_name, foreign_reads, patches, vllm_imports
from vllm_steer.engine.foreign import FOREIGN_NAMES

# Read off values that vLLM hands out, and not vLLM's to change.
BUILT_IN = {"__name__", "__new__", "args", "get", "items", "pop", "removeprefix", "startswith", "update", "values"}
ASYNCIO_AND_ARGPARSE = {"add_subparsers", "call_soon_threadsafe", "get_loop", "is_closed", "parse_args", "put"}
TORCH = {"get_state", "tolist", "type"}
PLAIN = BUILT_IN | ASYNCIO_AND_ARGPARSE | TORCH
OWN = "vllm_steer"  # what the plugin itself hangs on vLLM's objects begins with this
LISTED = {one.name.rpartition(".")[2] for one in FOREIGN_NAMES}


def test_every_import_from_vllm_is_on_the_list() -> None:
    listed = {f"{one.module}.{one.name}".rstrip(".") for one in FOREIGN_NAMES}
    missing = [
        f"{found.file} imports {found.name or found.module} from {found.module}: put it into engine/foreign.py"
        for path in engine_files()
        for found in vllm_imports(path)
        if f"{found.module}.{found.name}".rstrip(".") not in listed
    ]
    assert not missing, missing


def test_every_attribute_of_vllms_objects_that_is_used_is_on_the_list() -> None:
    missing = sorted(
        f"{read.file}:{read.line} uses .{read.attribute}: put its class and name into engine/foreign.py"
        for path in engine_files()
        for read in foreign_reads(path)
        if read.attribute not in LISTED | PLAIN and not read.attribute.startswith(OWN)
    )
    assert not missing, missing


def test_nothing_is_on_the_list_that_no_file_of_ours_needs() -> None:
    stale = [f"{one.module}:{one.name}: take it off engine/foreign.py" for one in FOREIGN_NAMES if not needed_by(one)]
    assert not stale, stale
    files = {file_name(path) for path in engine_files()}
    assert {one.needed_by for one in FOREIGN_NAMES if one.needed_by is not None} <= files


def test_every_patch_is_on_the_list_and_in_the_register() -> None:
    made = {name for path in engine_files() for name in patches(path) if not name.startswith(OWN)}
    assert made == {one.name.rpartition(".")[2] for one in FOREIGN_NAMES if one.is_patched}

    _, _, register = (vllm_steer.engine.__doc__ or "").partition("Patches, each")
    entries = [line.partition("(")[0] for line in register.splitlines() if line.startswith("``")]
    named = {name for line in entries for name in re.findall(r"``(\w+\.\w+)``", line)}
    # A function's entry in the register stands under the module that defines it, a method's under its class.
    wanted = {
        one.name if "." in one.name else f"{one.module.rpartition('.')[2]}.{one.name}"
        for one in FOREIGN_NAMES
        if one.is_patched and one.module not in ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
    }
    assert named == wanted


def test_the_reader_of_our_source_sees_the_room() -> None:
    """The tests above could pass on a reader that sees nothing."""
    reads = {read.attribute for path in engine_files() for read in foreign_reads(path)}
    assert {"num_computed_tokens_cpu", "cache_salt", "is_base_model", "_api_process_count", "subparser_init"} <= reads
    assert {"_prepare_inputs", "load_model", "generate"} <= {name for path in engine_files() for name in patches(path)}
    others = set(PACKAGE.rglob("*.py")) - set(engine_files())
    assert not [found for path in others for found in vllm_imports(path)]
