"""A bad network before S3: a real server on loopback behind a proxy."""

from __future__ import annotations

import os
import urllib.request
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tests.faults.proxy import FATES, Proxy
from tests.faults.trials import Experiment, Found, counted, unless

JOBS, IMAGES, SHARE, ATTEMPTS = 3, 25, 0.12, 40  # a batch: encodes, of so many images, faults of requests


def batch(seed: int, folder: Path, shared: Path, jobs: int = JOBS) -> Found:
    """Encodes whose requests fail in every way, each run until it ends; then what is in the table."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"http://{address}/bucket", method="PUT")).read()
    proxy = Proxy(address)
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_address[1]}"
    rng = np.random.default_rng(seed)
    return sum((encoded(proxy, rng, number) for number in range(jobs)), Found(0))


def encoded(proxy: Proxy, rng: np.random.Generator, number: int) -> Found:
    """One encode, from S3 to S3."""
    from obstore.exceptions import BaseError

    from data.store import open_store
    from data.tables import read_latents
    from data.upkeep import verify
    from tests.test_s3 import fill, run

    images, tables = open_store(f"s3://bucket/images-{number}"), open_store(f"s3://bucket/latents-{number}")
    proxy.fate = lambda *_: "pass"
    source, met = fill(images, range(IMAGES)), Counter[str]()

    def fate(method: str, request: int) -> str:
        if rng.random() > SHARE:
            return "pass"
        chosen = str(rng.choice(FATES, p=[0.2, 0.2, 0.2, 0.19, 0.19, 0.02]))
        met[chosen] += 1
        return chosen

    proxy.fate, ended = fate, False
    for _ in range(ATTEMPTS):
        try:
            run(source, tables)
            ended = True
            break
        except (OSError, ValueError, BaseError):
            continue
    proxy.fate = lambda *_: "pass"
    result = run(source, tables)
    verify(result.uri)
    ids, mu = read_latents(result.uri)
    found = counted(ids.tolist(), [f"{value:04d}.png" for value in range(IMAGES)])
    right = np.array_equal(mu[:, 0], [float(key[:4]) for key in ids])
    orphans = unless(result.snapshot == 1 and result.files == 3, f"{result.files} files")
    stuck = unless(ended, f"no end in {ATTEMPTS} attempts")
    return Found(trials=met.total()) + found + orphans + stuck + unless(right, "latents of other images")


EXPERIMENTS = (
    Experiment(
        "S3: cut, half, lost, 5xx, slow",
        "A put that succeeded and whose answer was lost makes no duplicate, one that failed no hole.",
        goal=1000,
        batch=batch,
        few={"jobs": 1},
        lacks=lambda: "" if find_spec("moto") else "moto is not installed",
        imports=("moto.server", "tests.test_s3", "data.upkeep"),
    ),
)
