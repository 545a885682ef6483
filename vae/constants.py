"""Constants of torch's vector functions, brought into memory before they are needed.

log1p and expm1, and with them softplus and logsigmoid, end in a load of a constant that is masked: only for
a rare argument, -0.0, is anything loaded. From a page that is not in memory an AMD processor with AVX-512
takes such a load some 20 times as slowly; and since nothing is loaded, the page never comes into memory, and
the functions stay slow for as long as the process runs. One such argument brings it (benchmarks/pages.py).
"""

from __future__ import annotations

import math
from functools import cache

import torch

RARE = (-0.0, math.inf, -math.inf, math.nan, -1.0, 1e4, -1e4)
WIDTH = 16  # of each: a whole vector of float32


@cache
def touch() -> None:
    """Once a process: some 0.1 ms."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(RARE, dtype=dtype).repeat_interleave(WIDTH)
        for function in (torch.exp, torch.log, torch.log1p, torch.expm1):
            function(x)
