"""Nothing outside of the allowed roots is read."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mcp.schemas.errors import PathError
from opd_mcp.store.roots import AllowedRoots


@pytest.fixture
def tree(tmp_path):
    """root/model/config.json inside, secret/key outside."""
    (tmp_path / "root" / "model").mkdir(parents=True)
    (tmp_path / "root" / "model" / "config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("key")
    return tmp_path


@pytest.fixture
def roots(tree):
    return AllowedRoots([tree / "root"])


def code_of(roots, reference):
    with pytest.raises(PathError) as caught:
        roots.resolve(reference)
    return caught.value.code


@pytest.mark.parametrize("name", ["lineage.key", "http.token", "http.sessions"])
def test_the_workspaces_own_secrets_are_not_read_though_they_lie_below_a_root(roots, tree, name):
    (tree / "root" / name).write_text("secret")
    (tree / "root" / "prompts.jsonl").symlink_to(tree / "root" / name)
    for reference in (name, "prompts.jsonl", f"model/../{name}"):
        assert code_of(roots, tree / "root" / reference) == "outside_roots"


def test_paths_below_a_root_are_resolved(roots, tree):
    model = tree / "root" / "model"
    assert roots.resolve(str(model)) == model
    assert roots.resolve(model / ".." / "model" / "config.json") == model / "config.json"
    assert roots.resolve(tree / "root") == tree / "root"


@pytest.mark.parametrize("reference", ["model", "./model", "../root/model", "~/model", ""])
def test_a_relative_path_is_refused_and_the_roots_named(roots, tree, reference):
    with pytest.raises(PathError, match=str(tree / "root")) as caught:
        roots.resolve(reference)
    assert caught.value.code == "relative_path"


def test_outside_is_refused_whether_it_exists_or_not(roots, tree):
    assert code_of(roots, tree / "secret" / "key") == "outside_roots"
    assert code_of(roots, tree / "secret" / "nothing") == "outside_roots"
    assert code_of(roots, tree / "root" / ".." / "secret" / "key") == "outside_roots"
    assert code_of(roots, "/") == "outside_roots"


def test_a_root_is_no_prefix_of_names(roots, tree):
    (tree / "root-2").mkdir()
    assert code_of(roots, tree / "root-2") == "outside_roots"


def test_links_that_lead_out_are_refused(roots, tree):
    (tree / "root" / "link").symlink_to(tree / "secret")
    assert code_of(roots, tree / "root" / "link") == "outside_roots"
    assert code_of(roots, tree / "root" / "link" / "key") == "outside_roots"


@pytest.mark.parametrize("place", ["config.json.link", "shards/deep.parquet"])
def test_a_directory_with_a_link_that_leads_out_is_refused(roots, tree, place):
    link = tree / "root" / "model" / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tree / "secret" / "key")
    with pytest.raises(PathError, match="link") as caught:
        roots.resolve(tree / "root" / "model")
    assert caught.value.value == str(link)


def test_links_within_the_roots_are_followed(roots, tree):
    (tree / "root" / "link").symlink_to(tree / "root" / "model")
    assert roots.resolve(tree / "root" / "link") == tree / "root" / "model"


def test_a_root_that_is_a_link_is_its_target(tree):
    (tree / "alias").symlink_to(tree / "root")
    assert AllowedRoots([tree / "alias"]).resolve(tree / "alias" / "model") == tree / "root" / "model"


def test_a_missing_path_names_its_nearest_neighbour(roots, tree):
    with pytest.raises(PathError) as caught:
        roots.resolve(tree / "root" / "modle")
    assert caught.value.code == "not_found"
    assert caught.value.nearest == [str(tree / "root" / "model")]
    with pytest.raises(PathError) as caught:
        roots.resolve(tree / "root" / "modle" / "config.json")
    assert caught.value.nearest == [str(tree / "root" / "model")]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_what_cannot_be_a_path_is_not_found(roots, tree, name):
    assert code_of(roots, f"{tree}/root/{name}") == "not_found"


def test_a_loop_of_links_is_not_found(roots, tree):
    (tree / "root" / "a").symlink_to(tree / "root" / "b")
    (tree / "root" / "b").symlink_to(tree / "root" / "a")
    assert code_of(roots, tree / "root" / "a") == "not_found"


@settings(max_examples=100)
@given(
    parts=st.lists(st.sampled_from(["..", ".", "root", "model", "secret", "key", "link", "", "ä", "a\0"]), max_size=7)
)
def test_no_path_leads_out(roots, tree, parts):
    link = tree / "root" / "link"
    if not link.is_symlink():
        link.symlink_to(tree / "secret")
    try:
        real = roots.resolve("/".join([str(tree), *parts]))
    except PathError:
        return
    assert real == tree / "root" or tree / "root" in real.parents


def test_pipes_devices_and_loops_are_refused_without_being_opened(roots, tree):
    model = tree / "root" / "model"
    os.mkfifo(tree / "root" / "prompts.jsonl")
    assert code_of(roots, tree / "root" / "prompts.jsonl") == "special_file"
    os.mkfifo(model / "tokenizer.json")
    assert code_of(roots, model) == "special_file"
    (tree / "root" / "loop").symlink_to(tree / "root" / "loop")
    assert code_of(roots, tree / "root" / "loop") in ("not_found", "special_file")


@pytest.mark.parametrize(
    "path", ["/proc/self/root/etc/passwd", "/dev/fd/0", "/dev/zero", "//host/share/x", "\\\\host\\share", "/a\0b"]
)
def test_other_names_for_other_places_are_refused(roots, path):
    assert code_of(roots, path) in ("outside_roots", "relative_path", "not_found")


def test_a_very_long_name_is_not_found(roots, tree):
    assert code_of(roots, tree / "root" / ("x" * 5000)) in ("not_found", "outside_roots")
