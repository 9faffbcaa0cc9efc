"""What callers may write where a model or data is needed."""

import json
import os
from pathlib import Path

import pytest

from opd_mcp.planning.hub_models import hub_data_directory
from opd_mcp.planning.references import columns_of
from opd_mcp.schemas.errors import ArgumentError, DataError, IntegrityError, PathError, UnknownIdError
from opd_mcp.schemas.runs import DataInput


@pytest.fixture
def references(service):
    return service._references


def test_a_model_by_path_has_identity_size_and_no_claim(references, world):
    model = references.model(world.student)
    assert model.input.path == world.student
    assert model.input.identity.name == "student"
    assert model.input.parameters == model.facts.parameters > 100_000
    assert model.input.sft_teacher is None


def test_an_sft_student_is_known_by_path_artifact_and_run(references, service, world, sft_student):
    path = sft_student(world.teacher)
    by_path = references.model(path).input
    assert by_path.artifact_id == Path(path).name
    assert by_path.sft_teacher.basis == "proven"
    run_id = service.list_runs().rows[0].run_id
    for reference in (by_path.artifact_id, run_id):
        assert references.model(reference).input.model_copy(update={"reference": path}) == by_path


def test_a_copied_artifact_keeps_its_proof_and_loses_it_when_changed(references, world, sft_student):
    copy = world.copy_of(sft_student(world.teacher), "copied")
    model = references.model(str(copy)).input
    assert (model.artifact_id, model.sft_teacher.basis) == (None, "proven")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError, match="lineage_mismatch"):
        references.model(str(copy))


def test_an_id_of_another_kind_is_refused_by_name(references, service, world, sft_student):
    sft_student(world.teacher)
    responses = service.store.artifacts.list(kind="responses")[0].artifact_id
    with pytest.raises(ArgumentError, match=r"is a responses artifact, and model is needed.*model-sft-"):
        references.model(responses)


def test_a_run_that_has_not_made_it_says_what_to_wait_for(references, service, world, busy_machine):
    run_id = service.start_distillation(world.start_arguments()).run_id
    with pytest.raises(UnknownIdError, match=r"has made no model yet.*get_run_status"):
        references.model(run_id)
    service.cancel(run_id)


def test_a_hub_id_is_left_for_the_worker(references):
    model = references.model("Qwen/Qwen3-0.6B").input
    assert (model.hub_id, model.path, model.identity) == ("Qwen/Qwen3-0.6B", None, None)


@pytest.mark.parametrize("reference", ["./student", "../student", "~/student", "models/demo/student", "student.jsonl"])
def test_relative_paths_are_refused_with_the_roots(references, world, reference):
    with pytest.raises(PathError, match=r"relative_path.*data"):
        references.model(reference)


def test_a_relative_path_that_looks_like_a_hub_id_is_seen_as_a_path(references, world):
    world.copy_of(world.student, "group").rename(world.root / "data" / "moved")
    (world.root / "data" / "group").mkdir()
    (world.root / "data" / "moved").rename(world.root / "data" / "group" / "student")
    with pytest.raises(PathError, match="relative_path"):
        references.model("group/student")


def test_an_unknown_name_lists_its_neighbours(references, world, sft_student):
    artifact_id = Path(sft_student(world.teacher)).name
    with pytest.raises(UnknownIdError, match=artifact_id):
        references.model(artifact_id[:-1])


def test_paths_outside_the_roots_are_refused_links_included(references, world):
    outside = world.root / "secret.jsonl"
    outside.write_text('{"prompt": "1+1"}\n')
    os.symlink(outside, world.root / "data" / "link.jsonl")
    for path in (outside, world.root / "data" / "link.jsonl", world.root / "data" / ".." / "secret.jsonl"):
        with pytest.raises(PathError, match="outside_roots"):
            references.prompts(str(path))


def test_a_missing_file_names_its_neighbour(references, world):
    world.prompts("prompts")
    with pytest.raises(PathError, match=r"not_found.*prompts\.jsonl"):
        references.prompts(str(world.root / "data" / "promts.jsonl"))


def test_models_without_safe_weights_are_refused_unread(references, world):
    copy = world.copy_of(world.student, "student")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(PathError, match=r"unsafe_weights.*pytorch_model\.bin"):
        references.model(str(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(PathError, match=r"not_a_model.*safetensors"):
        references.model(str(copy))


@pytest.mark.parametrize("reference", ["openai/gsm8k", "openai/gsm8k:main@train", "org/set@test"])
def test_data_of_the_hub_is_left_for_the_worker(references, reference):
    columns = {"prompt": "question"}
    resolved = references.prompts(reference, columns)
    expected = DataInput(reference=reference, hub_id=reference, columns=columns)
    assert (resolved.input, resolved.scan.rows) == (expected, 0)
    assert references.responses(reference, "Qwen3-8B").input.sft_teacher.name == "Qwen3-8B"


def test_fetched_data_of_the_hub_is_read_where_it_is(references, world):
    directory = hub_data_directory(references.workspace, "openai/gsm8k:main@train")
    directory.mkdir(parents=True)
    (directory / "data.jsonl").write_text('{"question": "1+1=?", "answer": "#### 2"}\n')
    found = references.prompts("openai/gsm8k:main@train").input
    assert (found.rows, found.path, found.hub_id) == (1, str(directory), "openai/gsm8k:main@train")
    assert references.prompts("openai/gsm8k:main@test").input.path is None


def test_a_data_sets_columns_are_resolved_and_recorded(references, world):
    file = world.file("own.jsonl", '{"q": "1+1=?", "gold": {"value": 2}}\n')
    with pytest.raises(DataError, match=r'Nearest: columns=\{"prompt": "q"'):
        references.prompts(file)
    columns = {"prompt": "q", "answer": "gold.value"}
    found = references.prompts(file, columns)
    assert (found.input.columns, found.input.rows_with_answer) == (columns, 1)
    assert found.input.understood.columns == columns
    assert found.scan.first[0].answer == "2"
    copy = world.file("copy.jsonl", '{"prompt": "1+1=?", "answer": "2"}\n')
    assert references.prompts(copy).input.sha256 == found.input.sha256


def test_a_pattern_reads_all_it_matches_below_the_roots(references, world):
    for number in range(2):
        world.file(f"part-{number}.jsonl", json.dumps({"prompt": f"{number}+1=?"}) + "\n")
    pattern = str(world.root / "data" / "part-*.jsonl")
    assert references.prompts(pattern).input.rows == 2
    outside = world.root / "secret.jsonl"
    outside.write_text('{"prompt": "1+1"}\n')
    os.symlink(outside, world.root / "data" / "part-9.jsonl")
    for reference in (pattern, str(world.root / "*.jsonl")):
        with pytest.raises(PathError, match="outside_roots"):
            references.prompts(reference)


def test_columns_are_for_all_arguments_or_for_one():
    columns = {"prompt": "q", "answer": "a", "eval_prompts.prompt": "problem"}
    assert columns_of(columns, "prompts") == {"prompt": "q", "answer": "a"}
    assert columns_of(columns, "eval_prompts") == {"prompt": "problem"}
    assert columns_of({"eval_prompts.prompt": "problem"}, "prompts") is None
    assert columns_of(None, "prompts") is None
    with pytest.raises(ArgumentError, match=r"Nearest: .*eval_prompts"):
        columns_of({"eval_promts.prompt": "q"}, "prompts")


def test_prompts_are_counted_and_hashed_by_content(references, world):
    prompts = references.prompts(world.prompts(count=4)).input
    assert (prompts.rows, prompts.rows_with_answer) == (4, 4)
    copy = references.prompts(world.file("copy.jsonl", Path(prompts.path).read_text())).input
    assert copy.sha256 == prompts.sha256


def test_the_same_inline_prompts_are_the_same_artifact(references):
    first = references.prompts(["1+1=?", "2+2=?"]).input
    again = references.prompts(["1+1=?", "2+2=?"]).input
    other = references.prompts(["1+1=?"]).input
    assert first == again
    assert first.artifact_id != other.artifact_id
    assert references.prompts(first.artifact_id).scan.first == references.prompts(["1+1=?", "2+2=?"]).scan.first


@pytest.mark.parametrize(("prompts", "code"), [([], "empty_data"), (["1+1=?", " "], "missing_field")])
def test_inline_prompts_must_hold_something(references, prompts, code):
    with pytest.raises(DataError, match=code):
        references.prompts(prompts)


def test_responses_are_declared_by_name_or_by_model(references, world):
    file = world.file("responses.jsonl", '{"prompt": "1+1=?", "response": "#2"}\n')
    assert references.responses(file, None).input.sft_teacher is None
    by_name = references.responses(file, "Qwen3-8B").input.sft_teacher
    assert (by_name.basis, by_name.name, by_name.identity) == ("asserted", "Qwen3-8B", None)
    by_model = references.responses(file, world.teacher).input.sft_teacher
    assert by_model.identity == references.model(world.teacher).input.identity


def test_something_else_is_not_a_cache(references, world):
    with pytest.raises(PathError, match="not_a_cache"):
        references.cache(world.student)


@pytest.mark.parametrize(
    "reference", ["a/..", "a/b..c", "a--b/c", "a/b--c", "..--..", "ä/b", "a/ö", "a/" + "b" * 97, "a/b/c"]
)
def test_what_breaks_the_hubs_rules_is_no_hub_id(references, reference):
    with pytest.raises((PathError, UnknownIdError)):
        references.model(reference)
