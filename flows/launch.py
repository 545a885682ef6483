"""Training on several devices: torch's own launcher begins a process for each, and anew when one is lost.

`flows.rank` is what each process runs. On several machines, start it there with `torchrun` yourself.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from flows.config import Train, narrow, to_toml
from flows.results import Ingested
from flows.watch import Log

if TYPE_CHECKING:
    from vae.progress import Progress

logger = logging.getLogger("vae_flows.train")
RESTARTS = 3  # of all ranks from the last checkpoint, when one is lost


def train_on_ranks(
    config: Train,
    ingested: Ingested,
    stop: Callable[[], bool],
    run: Log,
    progress: Callable[[Progress], None],
) -> None:
    """Train on config.devices processes; returns when they have finished, with the last checkpoint committed.

    Raises Interrupted when asked to stop, after they have saved; RuntimeError when they can't go on.
    """
    from vae.train import Interrupted

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.toml")
        file.write_text(rank_settings(config, ingested))
        command, environment = _command(config.devices, file), os.environ | _meeting(Path(folder))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        step, stopping = 0, False
        for line in _lines(process):
            if not stopping and stop():
                stopping = True
                process.terminate()
            if line is not None:
                step = tell(json.loads(line), run, progress)
        if process.wait() and stopping:
            raise Interrupted(step)
        if process.returncode:
            raise RuntimeError(
                f"training on {config.devices} devices ended with exit code {process.returncode}, begun anew "
                f"{RESTARTS} times at most: the log of its ranks above says why"
            )


def tell(line: dict[str, Any], run: Log, progress: Callable[[Progress], None]) -> int:
    """Log what a rank printed to the run; the step that it is of."""
    from vae.progress import Progress

    if "progress" in line:
        event = Progress(**line["progress"])
        progress(event)
        return event.step
    if "picture" in line:
        run.log_image(line["picture"], base64.b64decode(line["png"]), line["step"])
    else:
        run.log_metrics(line["metrics"], line["step"])
    return int(line["step"])


def rank_settings(config: Train, ingested: Ingested) -> str:
    """The whole configuration as the TOML that a rank reads, with the snapshot as its source."""
    fixed = narrow(
        Train, config, source=f"snapshot:{ingested.snapshot}", limit=None, root=config.root.resolve()
    )
    return to_toml(fixed.model_dump(mode="json"))


def _command(devices: int, file: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
    meeting = ["--rdzv-conf=store_type=file", f"--rdzv-endpoint={file.parent / 'launcher'}"]
    ranks = [f"--nproc-per-node={devices}", f"--max-restarts={RESTARTS}"]
    return [*launcher, *meeting, *ranks, "-m", "flows.rank", str(file)]


def _meeting(folder: Path) -> dict[str, str]:
    """Launcher and ranks find each other by files: torch's store on TCP lets in whoever reaches the machine.

    What ranks then send each other goes through the loopback interface.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "VAE_RANKS_MEET": str(folder / "ranks"),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """What the process prints until it ends, line by line; None where there was nothing for a while."""
    found: Queue[str | None] = Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.put(line)

    reader = Thread(target=read, daemon=True)
    reader.start()
    while reader.is_alive() or not found.empty():
        try:
            yield found.get(timeout=0.2)
        except Empty:
            yield None
