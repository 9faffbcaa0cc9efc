"""What no source file does: start a shell, evaluate text as code, load a pickle, or run a model's own code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for folder in ("opd_mcp", "examples", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pty", "commands"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("os.system", "os.popen", "os.execl", "os.execv", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "np.load", "numpy.load", "asyncio.create_subprocess_shell", "yaml.load"),
    *("anyio.run_process", "pd.read_pickle", "torch.hub.load"),
}
STARTERS = {"run", "Popen", "call", "check_call", "check_output"}


def faults(tree: ast.AST) -> list[str]:
    """What is wrong in a source file, with the line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in CALLS or called in NAMES:
            found.append(f"{node.lineno}: calls {called}")
        if "shell" in keywords or any(name in keywords for name in ("allow_pickle", "weights_only")):
            found.append(f"{node.lineno}: {called} with {', '.join(map(str, keywords))}")
        trusts = keywords.get("trust_remote_code")
        if trusts is not None and ast.unparse(trusts) != "False":
            found.append(f"{node.lineno}: trusts remote code")
        if called.endswith("from_pretrained") and "Auto" in called and trusts is None:
            found.append(f"{node.lineno}: {called} does not refuse remote code")
        if called.split(".")[0] == "subprocess" and called.split(".")[-1] in STARTERS:
            command = node.args[0] if node.args else keywords.get("args")
            if command is None or isinstance(command, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append(f"{node.lineno}: {called} without a list of arguments")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_shell_no_evaluation_no_pickle_and_no_remote_code(file):
    assert faults(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "os.system('ls')",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {x}')",
        "subprocess.run(['ls'], shell=True)",
        "eval(x)",
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "AutoModelForCausalLM.from_pretrained(x)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=y)",
    ],
)
def test_each_fault_would_be_seen(line):
    assert faults(ast.parse(line))
