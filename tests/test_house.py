"""The rules of the house, checked by parsing the code: who may import what, how long a function may be."""

from __future__ import annotations

import ast
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
PACKAGES = ("flows", "vae", "data")
FORBIDDEN = {
    "vae": {"prefect", "mlflow", "pyarrow", "pandas", "pydantic", "data", "flows"},
    "data": {"prefect", "mlflow", "torch", "vae", "flows"},
    "flows": {"pyarrow", "obstore", "torchvision"},
}
VAE_NEEDS = {"torch", "numpy", "safetensors", "vae"}


def modules(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((HOME / package).rglob("*.py")):
        yield path, ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_through_the_wall(package: str) -> None:
    through = {
        f"{path.relative_to(HOME)} imports {name}"
        for path, tree in modules(package)
        for name in imported(tree)
        if name in FORBIDDEN[package]
    }
    assert not through


def test_vae_needs_torch_numpy_and_safetensors_alone() -> None:
    found = {name for _, tree in modules("vae") for name in imported(tree)} - set(sys.stdlib_module_names)
    assert found <= VAE_NEEDS


def test_functions_are_short() -> None:
    lengths = [
        node.end_lineno - node.lineno + 1
        for package in PACKAGES
        for _, tree in modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.median(lengths) <= 10
    assert statistics.quantiles(lengths, n=10)[-1] <= 35
    assert max(lengths) <= 60


def test_no_registry_host_is_named() -> None:
    hosts = ("files." + "pythonhosted", "pypi." + "org", "registry." + "npmjs", "deb." + "debian.org")
    tracked = subprocess.run(
        ["git", "grep", "-lIiF", *(f"-e{host}" for host in hosts)], cwd=HOME, capture_output=True
    )
    assert tracked.stdout == b""


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import data", {"torch", "mlflow", "prefect"}),
        ("import vae, vae.config", {"torch", "mlflow", "prefect", "numpy"}),
        ("import flows.cli", {"torch", "mlflow", "prefect", "pydantic", "pyarrow"}),
        ("import flows.config", {"torch", "mlflow", "prefect"}),
    ],
)
def test_imports_load_nothing_heavy(statement: str, unwanted: set[str]) -> None:
    code = f"import sys; {statement}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True
    )
    assert not unwanted & {name.split(".")[0] for name in loaded.stdout.split()}


def test_help_takes_under_half_a_second_of_cpu() -> None:
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "flows.cli", "--help"], cwd=HOME, capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 0.5
