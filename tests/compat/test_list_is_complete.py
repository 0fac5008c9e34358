"""The list of foreign names, the register of patches and the source of the packages that know vLLM agree."""

from __future__ import annotations

import ast

from tests.compat.findings import needed_by
from tests.compat.own_patches import PAGE, declared, page, vllm_names
from tests.compat.own_use import PACKAGE, engine_files, file_name, foreign_reads, hidden_writes, reads_in, vllm_imports

# Attributes of built-in types that vLLM hands out; vLLM cannot change them.
BUILT_IN = {"__name__", "__new__", "args", "get", "items", "pop", "removeprefix", "startswith", "update", "values"}
ASYNCIO_AND_ARGPARSE = {"add_subparsers", "call_soon_threadsafe", "get_loop", "is_closed", "parse_args", "put"}
TORCH = {"get_state", "tolist", "type"}
PLAIN = BUILT_IN | ASYNCIO_AND_ARGPARSE | TORCH
OWN = "vllm_steer"  # prefix of the attributes that the plugin adds to vLLM's objects
LISTED = {one.name.rpartition(".")[2] for one in vllm_names()}


def test_every_import_from_vllm_is_on_the_list() -> None:
    listed = {f"{one.module}.{one.name}".rstrip(".") for one in vllm_names()}
    missing = [
        f"{found.file} imports {found.name or found.module} from {found.module}: put it into engine/vllm_api.py"
        for path in engine_files()
        for found in vllm_imports(path)
        if f"{found.module}.{found.name}".rstrip(".") not in listed
    ]
    assert not missing, missing


def test_every_attribute_of_vllms_objects_that_is_used_is_on_the_list() -> None:
    missing = sorted(
        f"{read.file}:{read.line} uses .{read.attribute}: put its class and name into engine/vllm_api.py"
        for path in engine_files()
        for read in foreign_reads(path)
        if read.attribute not in LISTED | PLAIN and not read.attribute.startswith(OWN)
    )
    assert not missing, missing


def test_nothing_is_on_the_list_that_no_file_of_ours_needs() -> None:
    stale = [f"{one.module}:{one.name}: take it off engine/vllm_api.py" for one in vllm_names() if not needed_by(one)]
    assert not stale, stale
    files = {file_name(path) for path in engine_files()}
    assert {one.needed_by for one in vllm_names() if one.needed_by is not None} <= files


def test_nothing_but_a_declared_patch_or_attribute_writes_on_vllms_objects() -> None:
    hidden = [f"{file_name(path)}:{line}" for path in engine_files() for line in hidden_writes(path)]
    assert {line.partition(":")[0] for line in hidden} == {"engine/patching.py"}, hidden
    written = [
        f"{read.file}:{read.line} writes .{read.attribute}: declare it, see engine/patching.py"
        for path in engine_files()
        for read in foreign_reads(path)
        if read.is_written
    ]
    assert not written, written


def test_no_class_of_ours_lacks_what_a_later_vllm_makes_abstract() -> None:
    derived = [
        node.name
        for path in engine_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and {ast.unparse(base) for base in node.bases} & {found.name for found in vllm_imports(path)}
    ]
    # Only ever put before a class of vLLM's own, which has all the methods.
    assert derived == ["SteeringState"], "register it as a subclass, as _OutputWithMarks is"


def test_each_written_attribute_is_the_plugins_own_or_a_field_that_vllm_has() -> None:
    _, attributes = declared()
    assert len({(one.owner, one.name) for one in attributes}) == len(attributes)
    assert not [one.name for one in attributes if not one.name.startswith(OWN) and one.name not in LISTED]


def test_each_function_is_replaced_for_one_reason_by_one_patch_of_a_module() -> None:
    patches, _ = declared()
    made = [(one.wrap.__module__, place) for one in patches for place in one.places]
    assert len(set(made)) == len(made)
    assert all(one.why.endswith(".") and one.gone_when.endswith(".") for one in (*patches, *declared()[1]))


def test_the_page_of_patches_is_that_of_the_declarations() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make patches`"


def test_the_reader_of_our_source_sees_the_room() -> None:
    """The tests above could pass on a reader that sees nothing."""
    reads = {read.attribute for path in engine_files() for read in foreign_reads(path)}
    assert {"num_computed_tokens_cpu", "cache_salt", "is_base_model", "_api_process_count", "subparser_init"} <= reads
    source = "import vllm\n\ndef f(runner: Any) -> None:\n    runner.mark = 1\n    runner.model.mark += 1\n"
    assert [read.attribute for read in reads_in(source) if read.is_written] == ["mark", "mark"]
    others = set(PACKAGE.rglob("*.py")) - set(engine_files())
    assert not [found for path in others for found in vllm_imports(path)]
