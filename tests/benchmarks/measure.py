"""What several benchmarks share."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf_trust.models import Base, LoRA, new_adapter, restore, snapshot


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


def fresh_adapters(base: Base, names: Sequence[str], lora: LoRA, seed: int):
    """The backbone with fresh adapters of these names, all with the same weights (they change
    nothing yet)."""
    network = new_adapter(base, lora, seed)
    start = snapshot(network, "default")
    for name in names:
        network.add_adapter(name, network.peft_config["default"])
        restore(network, name, start)
    network.delete_adapter("default")
    network.set_adapter(names[0])
    return network.eval()
