"""The arrows between the layers, proven by what is written (every import, lazy ones too) and by what gets loaded."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "opd_mcp"
ALLOWED = {
    "schemas": set(),
    "identity": {"schemas"},
    "grading": {"schemas"},
    "engine": {"schemas", "identity", "grading"},
    "store": {"schemas", "identity"},
    "devices": {"schemas", "identity", "store"},
    "planning": {"schemas", "identity", "grading", "store", "devices"},
    "tracking": {"schemas", "identity", "store", "devices"},
    "supervisor": {"schemas", "identity", "store", "devices", "planning", "tracking"},
    "worker": {"schemas", "identity", "grading", "store", "devices", "planning"},
    "views": {"schemas", "identity", "grading", "store", "devices", "planning", "supervisor"},
    "service": {"schemas", "identity", "store", "devices", "planning", "supervisor", "views"},
    "maintenance": {"schemas", "identity", "store", "devices", "planning", "tracking", "views", "service"},
    "server": {"schemas", "store", "planning", "views", "service"},
}
# The files that may name the engine: at its start a worker makes the inputs of the stages, which need no torch.
STARTED = ("main.py", "stage_calls.py", "held_engine.py", "teams/rank_process.py", "teams/helper_process.py")
LOADS_ENGINE = {PACKAGE / "worker" / name for name in STARTED}
MACHINE_LEARNING = {"torch", "transformers", "datasets"}
# Foreign packages that loading every module of a layer must not load.
FORBIDDEN = {
    "schemas": {*MACHINE_LEARNING, "mcp", "pyarrow", "huggingface_hub", "numpy"},
    "identity": {*MACHINE_LEARNING, "mcp", "pyarrow", "huggingface_hub", "numpy"},
    "grading": {*MACHINE_LEARNING, "mcp", "pyarrow", "huggingface_hub", "numpy", "sympy", "math_verify"},
    "engine": {"mcp", "typer", "math_verify"},
    "store": {*MACHINE_LEARNING, "mcp", "pyarrow", "numpy"},
    **{
        layer: {*MACHINE_LEARNING, "mcp", "pyarrow", "huggingface_hub", "numpy"}
        for layer in ("devices", "planning", "tracking", "supervisor", "worker", "views", "service", "maintenance")
    },
    "server": {*MACHINE_LEARNING, "pyarrow", "huggingface_hub", "numpy"},
}
LOAD = """
import importlib, json, pkgutil, sys
package = importlib.import_module("opd_mcp." + sys.argv[1])
for module in pkgutil.walk_packages(getattr(package, "__path__", ()), package.__name__ + "."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in ("torchao", "triton", "evaluate", "lm_eval"):  # extras
            raise
print(json.dumps(sorted(sys.modules)))
"""


def written_imports(file: Path) -> set[str]:
    """The layers that a source file imports anywhere, for type checking too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, f"{file}: relative import"
    return {name.split(".")[1] for name in modules if name.startswith("opd_mcp.")} & set(ALLOWED)


def below(layer: str) -> set[str]:
    """The layer and all that its arrows lead to."""
    return {layer}.union(*(below(other) for other in ALLOWED[layer]))


def loaded_modules(layer: str) -> set[str]:
    """Everything a fresh interpreter holds after importing every module of a layer."""
    command = [sys.executable, "-c", LOAD, layer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


UNSAFE_CALLS = {
    ("os", "system"),
    ("os", "popen"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("torch", "load"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_uses_a_shell_a_pickle_or_remote_code(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not {alias.name for alias in node.names} & {"pickle", "dill", "joblib", "cloudpickle"}
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in UNSAFE_CALLS
        if isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")
        for keyword in node.keywords:
            if keyword.arg in ("shell", "trust_remote_code"):
                assert isinstance(keyword.value, ast.Constant)
                assert keyword.value.value is False


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_names_only_the_layers_below_it(layer):
    for file in [*(PACKAGE / layer).rglob("*.py"), *PACKAGE.glob(f"{layer}.py")]:
        allowed = ALLOWED[layer] | {layer} | ({"engine"} if file in LOADS_ENGINE else set())
        assert written_imports(file) <= allowed, file


@pytest.mark.parametrize("layer", ALLOWED)
def test_loading_a_layer_loads_nothing_that_it_must_not_have(layer):
    loaded = loaded_modules(layer)
    assert not loaded & FORBIDDEN[layer]
    modules = {name for name in loaded if name.startswith("opd_mcp.")}
    if layer == "worker":
        modules -= {"opd_mcp.engine", "opd_mcp.engine.context"}
    layers = {name.split(".")[1] for name in modules} & set(ALLOWED)
    assert layers <= below(layer)


def test_the_command_line_loads_next_to_nothing():
    code = "import json, sys, opd_mcp.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {*MACHINE_LEARNING, "mcp", "pydantic", "numpy"}
    assert {".".join(name.split(".")[:2]) for name in loaded if name.startswith("opd_mcp")} == {
        "opd_mcp",
        "opd_mcp.cli",
    }


SESSION = Path(__file__).resolve().parent / "server" / "every_tool_once.py"


def test_a_server_whose_every_tool_was_called_has_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SESSION), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["called"] == answer["listed"]
    assert not set(answer["modules"]) & MACHINE_LEARNING
    assert not any(name.startswith("opd_mcp.engine") for name in answer["modules"])
