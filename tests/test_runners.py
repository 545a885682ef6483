"""Runners: the same table whoever works on it, every row once whoever is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from parts import need
from pipeline import command, environment

import vae
from data.commit import Part, Progress, in_turn
from data.sources import open_source
from data.tables import TableResult, join_encode, open_table, read_latents
from data.upkeep import verify
from flows.config import Encode
from flows.encode import order_of, plan, work
from flows.registry import locate
from vae.bundle import to_files
from vae.model import build

HOME = Path(__file__).parent.parent
ROWS, SHARD_ROWS = 1797, 30
SHARDS = -(-ROWS // SHARD_ROWS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    model = build(vae.FlatConfig(height=8, width=8, channels=1, network="mlp", hidden=(32,), latent_dim=3))
    decode = {"height": 8, "width": 8, "channels": 1}
    extra = {"decode": decode, "dataset": "none", "generative": True}
    for name, content in to_files(model, extra).items():
        (folder / name).write_bytes(content)
    return folder


def configuration(bundle: Path, root: Path, **settings: object) -> Encode:
    return Encode(
        root=root, model=str(bundle), source="digits", shard_rows=SHARD_ROWS, device="cpu", **settings
    )


def encoded(config: Encode, tell: Callable[[Progress], None] = lambda at: None) -> TableResult:
    model = locate(config.model)
    return work(config, model, plan(config, model), tell)


@pytest.fixture(scope="module")
def expected(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What one process makes, by id."""
    found = encoded(configuration(bundle, tmp_path_factory.mktemp("here")))
    return dict(zip(*read_latents(found.uri), strict=True))


def check(found: TableResult, expected: dict[str, np.ndarray]) -> None:
    """Every row once, and the numbers of one process."""
    ids, mu = read_latents(found.uri)
    assert sorted(ids) == sorted(expected)
    np.testing.assert_allclose(mu, np.stack([expected[key] for key in ids]), rtol=1e-5, atol=1e-6)
    assert len(open_table(found.uri).parts) == SHARDS
    verify(found.uri)


@pytest.mark.filterwarnings(
    "ignore:Logger 'vae_flows.encode' attempted to send logs"
)  # no flow is running here
def test_processes_share_a_job_and_one_may_be_killed(
    bundle: Path, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    killed: list[int] = []

    def kill_one(at: Progress) -> None:
        if not killed and 0 < at.shards_done < SHARDS:
            victim = multiprocessing.active_children()[0].pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    found = encoded(configuration(bundle, tmp_path, runner="processes:2"), kill_one)
    assert killed
    assert found.changed
    check(found, expected)
    assert not encoded(configuration(bundle, tmp_path, runner="processes:2")).changed
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:Logger 'vae_flows.encode' attempted to send logs")
def test_a_ray_cluster_shares_a_job_and_a_node_may_be_killed(
    bundle: Path, tmp_path: Path, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    need(find_spec("ray"), "ray (the extra vae-flows[ray])")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        second = cluster.add_node(**size)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        killed: list[int] = []

        def kill_node(at: Progress) -> None:
            if not killed and SHARDS / 3 < at.shards_done < SHARDS:
                cluster.remove_node(second, allow_graceful=False)
                killed.append(at.shards_done)

        found = encoded(configuration(bundle, tmp_path, runner="ray"), kill_node)
        assert killed
        check(found, expected)
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Logger 'vae_flows.encode' attempted to send logs")
def test_a_cluster_elsewhere_is_reached_through_its_client_server(
    bundle: Path, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    need(find_spec("ray"), "ray (the extra vae-flows[ray])")
    client = free_port()
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    line += [f"--port={free_port()}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
    line += ["--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
    line += [f"--temp-dir={tempfile.mkdtemp(prefix='ray-')}"]  # whose path must be short
    # Where gRPC minds forks, the server that Ray starts for a client now and then dies at once.
    quiet = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    head = subprocess.Popen(line, cwd=HOME, env=quiet, stdout=subprocess.PIPE, text=True)
    try:
        assert head.stdout is not None
        assert any("Ray runtime started" in said for said in head.stdout)
        found = encoded(configuration(bundle, tmp_path, runner=f"ray://127.0.0.1:{client}"))
        check(found, expected)
    finally:
        head.terminate()
        head.communicate(timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_the_same_command_three_times_at_once_shares_a_job(
    bundle: Path, tmp_path: Path, expected: dict[str, np.ndarray], prefect_server: str
) -> None:
    encode = ("encode", "--model", bundle, "--source", "digits", "--shard-rows", SHARD_ROWS)
    lines = [command(*encode, "--shard", f"{n}/3", "--json", root=tmp_path) for n in (1, 2, 3)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    commands = [subprocess.Popen(line, **pipes) for line in lines]
    told = [process.communicate() for process in commands]
    assert [process.returncode for process in commands] == [0, 0, 0], told
    tables = [json.loads(result) for result, _ in told]
    (uri,) = {table["uri"] for table in tables}
    assert {table["rows"] for table in tables} == {ROWS}
    ids, mu = read_latents(uri)
    assert sorted(ids) == sorted(expected)
    np.testing.assert_allclose(mu, np.stack([expected[key] for key in ids]), rtol=1e-5, atol=1e-6)
    verify(uri)
    assert len(list(Path(uri).rglob("part-*.parquet"))) == SHARDS == 60


def test_a_part_begins_with_its_own_shards_and_then_helps_the_others(bundle: Path, tmp_path: Path) -> None:
    config = configuration(bundle, tmp_path)
    job = plan(config, locate(str(bundle)))
    first, last = in_turn(job.plan, Part(0, 4))[: SHARDS // 4], in_turn(job.plan, Part(3, 4))[: SHARDS // 4]
    assert {shard.index for shard in first} == set(range(SHARDS // 4))
    assert {shard.index for shard in last} == set(range(SHARDS - SHARDS // 4, SHARDS))
    assert {shard.index for shard in in_turn(job.plan, Part(1, 4))} == set(range(SHARDS))
    done = encoded(configuration(bundle, tmp_path, shard="2/4"))
    assert done.rows == ROWS


def test_a_worker_knows_the_job_from_the_table_alone(bundle: Path, tmp_path: Path) -> None:
    config = configuration(bundle, tmp_path, scores=True)
    model = locate(config.model)
    job = plan(config, model)
    joined = join_encode(job.plan.store, order_of(config, model, job).number, open_source("digits"))
    for name in ("decode", "columns", "plan", "metadata", "limits", "batch_size", "schema"):
        assert getattr(joined, name) == getattr(job, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runner": "processes"}, "runner 'processes' is not here, processes:N, ray or ray://HOST:PORT"),
        ({"runner": "spark://x"}, "runner 'spark://x' is not"),
        ({"shard": "5/4"}, "shard '5/4' is not I/N"),
    ],
)
def test_mistakes_are_refused(bundle: Path, tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration(bundle, tmp_path, **settings)


def test_a_table_in_memory_cannot_be_shared(bundle: Path, tmp_path: Path) -> None:
    config = configuration(bundle, tmp_path, runner="processes:2", out="memory://runners")
    with pytest.raises(ValueError, match="can't share memory://runners"):
        encoded(config)
