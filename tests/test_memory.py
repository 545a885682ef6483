"""What training takes of the host's memory, as the kernel counted it for processes of their own.

Not ru_maxrss, which a process has from the one that began it.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

# Images of 12 KiB in blocks of 12 MiB, made when they are read, as the files of a snapshot are.
TRAINING = """
import re, sys
import numpy as np
from vae.config import FlatConfig, TrainConfig
from vae.train import fit

class Made:
    digest = "made"
    def __init__(self, count):
        self.sizes = [1000] * (count // 1000)
    def read(self, block):
        return np.random.default_rng(block).integers(0, 256, (1000, 3, 64, 64), np.uint8)

model = FlatConfig(height=64, width=64, channels=3, network="mlp", hidden=(8,), latent_dim=2)
config = TrainConfig(epochs=1, batch_size=100, shuffle_mib=24, log_every=1000, checkpoint_every=1000)
fit(model, config, Made(int(sys.argv[1])), budget=int(sys.argv[2]))
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""
MIB = 2**20
FEW, MANY = 5000, 13_000  # more than the two windows that a stream holds
GROWTH = (MANY - FEW) * 12_288 // MIB  # MiB of images
SLACK = 40  # MiB: three blocks, and what the allocator keeps


@cache
def peak(images: int, budget: int) -> int:
    """MiB that training on so many images took at most, at a budget for resident ones in bytes.

    The less of two runs: single ones differ by up to 50 MiB, whichever library multiplies.
    """
    line = [sys.executable, "-c", TRAINING, str(images), str(budget)]
    return min(int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) for _ in "12")


def test_streamed_training_does_not_grow_with_the_dataset() -> None:
    assert peak(MANY, 0) - peak(FEW, 0) < SLACK


def test_resident_training_takes_the_dataset_and_a_constant() -> None:
    assert abs(peak(MANY, 1 << 40) - peak(FEW, 1 << 40) - GROWTH) < SLACK
    assert peak(FEW, 1 << 40) - peak(FEW, 0) < FEW * 12_288 // MIB + SLACK
