"""What a process and all that it started listen on, as the kernel has it."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

LISTENS = "0A"  # a state in /proc/net/tcp


def listening(pid: int) -> set[str]:
    """Addresses on which a process or one below it listens for TCP."""
    mine = {inode for process in family(pid) for inode in sockets(process)}
    return {
        address(fields[1].partition(":")[0])
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path("/proc/net", table).read_text().splitlines()[1:])
        if fields[3] == LISTENS and fields[9] in mine
    }


def beyond_loopback(pid: int) -> set[str]:
    """Those of these addresses that others can reach."""
    return {one for one in listening(pid) if not ipaddress.ip_address(one).is_loopback}


def address(stored: str) -> str:
    """The kernel's hexadecimal, words of four bytes in the machine's order, as an address.

    >>> address("0100007F"), address("00000000000000000000000000000000")
    ('127.0.0.1', '::')
    """
    words = [bytes.fromhex(stored[at : at + 8])[::-1] for at in range(0, len(stored), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def family(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    return found
