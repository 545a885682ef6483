"""Doctor: is this machine fit for the pipeline? Each finding says what to do; no secret is ever printed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from flows.config import Doctor
from flows.results import Diagnosis, Finding

FREE_GB = 2
ANSWER_SECONDS = 10
# Beside what the package requires: bounds whose breach shows only in the middle of the work.
BOUNDS = {
    "fastapi": ("<0.151", "Prefect 3.8's server fails: Body() got an unexpected keyword 'min_items'"),
    "sqlalchemy": ("<2.1", "Prefect 3.8's scheduler fails: Can't evaluate bulk DML statement"),
    "mlflow": (">=3.17.2", "advisories on reading files and running code from afar"),
}
PAIRS = (
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
)


def doctor(config: Doctor) -> Diagnosis:
    """Every check, whatever the others found."""
    checks = (python(), *versions(), torchvision(), device(), root(config.root), prefect(), mlflow())
    return Diagnosis(findings=[*checks, *credentials()])


def python() -> Finding:
    """Python's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    fit = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", fit, found, "" if fit else "use Python 3.11 to 3.13")


def versions() -> Iterator[Finding]:
    """What the package requires, and the bounds that matter most."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wrong = {}
    for line in _requirements():
        requirement = Requirement(line)
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong[requirement.name] = (found, f"{requirement.name}{requirement.specifier}", "")
    for name, (bound, reason) in BOUNDS.items():
        found = _version(name)
        if found is not None and not SpecifierSet(bound).contains(found, prereleases=True):
            wrong[name] = (found, f"{name}{bound}", f" ({reason})")
    for name, (found, wanted, reason) in wrong.items():
        remedy = f"install {wanted!r}, or all of it: make env"
        yield Finding(f"version of {name}", False, f"{found or 'not installed'}{reason}", remedy)
    if not wrong:
        yield Finding("versions", True, "all within bounds")


def _requirements() -> list[str]:
    try:
        return [line for line in requires("vae-flows") or [] if ";" not in line]
    except PackageNotFoundError:  # run from its source
        return []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torchvision() -> Finding:
    """torchvision is built for one torch: another, or another build of it, fails at its import."""
    torch, vision = version("torch"), _version("torchvision")
    if vision is None:
        return Finding("torchvision", True, "not installed: only sources torchvision:NAME need it")
    wanted = [line.split("==")[1] for line in requires("torchvision") or [] if line.startswith("torch==")]
    fit = all(torch.split("+")[0] == one for one in wanted)
    if "+" in vision:
        fit = fit and torch.partition("+")[2] == vision.partition("+")[2]
    remedy = "" if fit else "install torch and torchvision in one command of uv, or leave torchvision out"
    return Finding("torchvision", fit, f"torchvision {vision}, torch {torch}", remedy)


def device() -> Finding:
    """The GPU that torch uses, and whether one is there that it does not."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("device", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if Path("/dev/nvidia0").exists():
        remedy = "install a CUDA build of torch that fits the driver (nvidia-smi shows it)"
        return Finding(
            "device", False, f"a GPU is here, and torch {torch.__version__} does not use it", remedy
        )
    return Finding("device", True, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")


def root(path: Path) -> Finding:
    """The root can be written, and there is room."""
    path = path.resolve()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("root", False, f"{path} can't be written", "give another --root or VAE_FLOWS_ROOT")
    remedy = "" if free > FREE_GB else "make room: vae-flows clean, vae-flows tables gc, or another --root"
    return Finding("root", free > FREE_GB, f"{path}, {free:.0f} GB free", remedy)


def prefect() -> Finding:
    """Prefect's server answers, takes our credentials, and has been set up."""
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    if not api.url:
        return Finding("prefect", True, "no PREFECT_API_URL: each command brings a server of its own")
    secret = api.auth_string.get_secret_value() if api.auth_string else ""
    key = api.key.get_secret_value() if api.key else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    login = tuple(secret.split(":", 1)) if ":" in secret else None
    status, text = _get(f"{api.url}/admin/version", login, headers)
    shown = f"PREFECT_API_URL={plain(api.url)}"
    if status == 401:
        return Finding("prefect", False, f"{shown} refuses us", "set PREFECT_API_AUTH_STRING")
    if status != 200:
        return Finding("prefect", False, f"{shown}: {text}", "start it: prefect server start (deploy/)")
    theirs, ours = text.strip('" \n'), version("prefect")
    if theirs.split(".")[:2] < ours.split(".")[:2]:
        return Finding("prefect", False, f"{shown} is {theirs}, this is {ours}", "upgrade the server first")
    return Finding("prefect", True, f"{shown}, version {theirs}{_unprepared()}")


def _unprepared() -> str:
    from flows.devices import limited

    return "" if limited() else "; not set up yet: vae-flows bootstrap"


def mlflow() -> Finding:
    """MLflow's server answers us, or its database can be written."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    shown = f"MLFLOW_TRACKING_URI={plain(uri)}"
    if not uri.startswith("http"):
        return Finding("mlflow", True, f"{shown}: no server needed")
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get?experiment_id=0"
    status, text = _get(url, (user, password) if user and password else None, headers)
    remedies = {
        401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        403: "name this host to the server: mlflow server --allowed-hosts HOST:*",
    }
    if status in (200, 404):  # 404: somebody has deleted the experiment, so somebody answers
        return Finding("mlflow", True, f"{shown} answers")
    remedy = remedies.get(status, "start it: mlflow server (deploy/)")
    return Finding("mlflow", False, f"{shown}: {text if status == 0 else f'status {status}'}", remedy)


def credentials() -> Iterator[Finding]:
    """Half of a pair is a mistake."""
    for pair in PAIRS:
        given = [name for name in pair if os.environ.get(name)]
        if len(given) == 1:
            (missing,) = set(pair) - set(given)
            yield Finding("credentials", False, f"{given[0]} without {missing}", f"set {missing}")


def _get(url: str, login: tuple[str, ...] | None, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text, or 0 and why there was no answer."""
    import httpx

    auth = httpx.BasicAuth(*login) if login else None
    try:
        answer = httpx.get(url, auth=auth, headers=headers, timeout=ANSWER_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return 0, f"no answer ({type(error).__name__})"
    return answer.status_code, answer.text


def plain(uri: str) -> str:
    """A URI without user, password and query.

    >>> plain("postgresql://user:secret@db:5432/mlflow?sslpassword=x")
    'postgresql://db:5432/mlflow'
    >>> plain("sqlite:////data/mlflow.db")
    'sqlite:////data/mlflow.db'
    """
    return re.sub("//.*@", "//", re.split("[?#]", uri)[0])
