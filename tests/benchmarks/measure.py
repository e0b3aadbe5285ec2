"""What several benchmarks measure."""

from __future__ import annotations

import resource
import time
from pathlib import Path


def peak_mb() -> float:
    """Most resident memory so far; from Linux's own count, where ru_maxrss starts at the
    parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def timed(work) -> float:
    """Seconds that ``work()`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
