"""What `vae/constants.py` is for: torch's log1p and expm1 while a page of the library is not in memory.

    OMP_NUM_THREADS=1 python benchmarks/pages.py

Microseconds for 128 x 784 numbers, the median of 100 calls: as a process finds them, after the library's
constants have left its memory (as they do, or never come, where memory is short), and after `touch`.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from pathlib import Path

import torch
from training import machine

from vae import constants

FUNCTIONS = (torch.exp, torch.sigmoid, torch.log1p, torch.expm1, torch.nn.functional.softplus)
MADV_DONTNEED = 4  # of <sys/mman.h>: drop the pages of this process; those of a file are read again


def forget() -> None:
    """The constants of torch's library leave this process's memory; they stay in the kernel's cache."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for start, end in _constants():
        if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")


def _constants() -> list[tuple[int, int]]:
    """Addresses of the library that are read only and as they are in its file."""
    text = Path("/proc/self/smaps").read_text()
    areas = re.findall(
        r"^(\w+)-(\w+) r--p .*libtorch_cpu\.so\n(?:(?!^\w+-).*\n)*?Private_Dirty: +0 kB", text, re.M
    )
    return [(int(start, 16), int(end, 16)) for start, end in areas]


def microseconds() -> list[float]:
    return [_median(function) for function in FUNCTIONS]


def _median(function: object) -> float:
    x, found = torch.rand(128, 784) + 0.5, []
    for _ in range(100):
        began = time.perf_counter()
        function(x)  # type: ignore[operator]
        found.append((time.perf_counter() - began) * 1e6)
    return statistics.median(found)


def main() -> None:
    as_found = microseconds()
    forget()
    forgotten = microseconds()
    constants.touch()
    rows = zip(FUNCTIONS, as_found, forgotten, microseconds(), strict=True)
    print(f"{machine()}\n\n| function | as found | constants not in memory | after touch |")
    print("| --- | ---: | ---: | ---: |")
    for function, *times in rows:
        print(f"| {function.__name__} | {' | '.join(f'{us:,.0f}' for us in times)} |")


if __name__ == "__main__":
    main()
