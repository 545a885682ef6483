"""Nothing let in, nothing let out: no code is loaded, servers listen on loopback, damage is refused."""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from sockets import beyond_loopback, listening

HOME = Path(__file__).parents[1]
PACKAGES = ("flows", "vae", "data")
# Modules that build objects from what they read, and calls that run what they are given.
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "cpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"extractall", "extract", "load_model", "unsafe_load", "full_load", "system", "popen"}


def offences(tree: ast.Module) -> Iterator[str]:
    """What must not be in a module, as `line: what`."""
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Import):
            found = next((a.name for a in node.names if a.name.split(".")[0] in MODULES), None)
        elif isinstance(node, ast.ImportFrom):
            found = node.module if (node.module or "").split(".")[0] in MODULES else None
        elif isinstance(node, ast.Call):
            found = _call(node)
        if found:
            yield f"{node.lineno}: {found}"


def _call(node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
    bare = isinstance(node.func, ast.Name) and name in CALLS
    method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
    torch_load = name == "torch.load" and options.get("weights_only") != "True"
    yaml_load = name in ("yaml.load", "yaml.load_all")
    unsafe_numpy = options.get("allow_pickle", "False") != "False"
    shell = options.get("shell", "False") != "False"
    return name if bare or method or torch_load or yaml_load or unsafe_numpy or shell else None


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_that_executes_what_it_reads(package: str) -> None:
    found = {
        f"{path.relative_to(HOME)}:{offence}"
        for path in (HOME / package).rglob("*.py")
        for offence in offences(ast.parse(path.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "archive.extractall(folder)",
        "yaml.load(text, Loader=loader)",
        "eval(text)",
        "exec(text)",
        "os.system(line)",
        "numpy.load(file, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "mlflow.pyfunc.load_model(uri)",
    ],
)
def test_the_check_sees(line: str) -> None:
    assert list(offences(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "yaml.safe_load(text)",
        "torch.load(file, weights_only=True)",
        "numpy.load(file)",
        "model.eval()",
        "re.compile(x)",
    ],
)
def test_the_check_lets_through(line: str) -> None:
    assert not list(offences(ast.parse(line)))


def test_the_server_of_a_command_listens_on_loopback_alone(prefect_server: str) -> None:
    """What the kernel says of this process and of the server that it has started."""
    assert "127.0.0.1" in listening(os.getpid())
    assert beyond_loopback(os.getpid()) == set()


def test_a_socket_that_others_can_reach_is_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert beyond_loopback(os.getpid()) == {"0.0.0.0"}
    with socket.create_server(("::", 0), family=socket.AF_INET6):
        assert beyond_loopback(os.getpid()) == {"::"}
