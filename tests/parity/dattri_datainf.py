"""DataInf scores against dattri's ``IFAttributorDataInf`` on the same gradients: ``make parity``.

dattri makes its own gradients from a loss, so it is given one whose gradients are ours: a model
whose modules hold one weight a layer, and the loss Σ_l w_lᵀ g_{l,i}, linear in the weights. The
rest of the mapping:

- dattri's ``regularization`` is one λ for all layers, ours a multiple of each layer's mean squared
  gradient entry: each layer is scored by itself, with the multiple that makes it λ;
- its layers are modules, a weight and its bias being one layer; one weight a module makes them
  ours;
- it returns + vᵀ H⁻¹ g_i, [training, evaluation], where ours are − vᵀ H⁻¹ g_i; nothing else
  differs in scale;
- the average inside H⁻¹ is over the batches given to ``cache``: all training examples here.

It computes in torch's default number format, set to float64 here, so what is measured is our own
rounding. With ``--save`` its numbers are kept under ``tests/reference``, where
``tests/test_solvers.py`` reads them.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
import torch
from rlhf_trust import ROOT
from rlhf_trust.attribution.solvers import datainf
from rlhf_trust.attribution.store import InMemory

REFERENCE = ROOT / "tests" / "reference" / "dattri-datainf.csv"
WIDTHS = {"a": 96, "b": 17, "c": 240}
N, M = 24, 5
LAMBDAS = (1e-4, 1e-2, 1.0)
"""Squared gradient entries here are about 1: far below them, as the paper's rule is, and beside
them."""


def gradients() -> tuple[InMemory, InMemory]:
    """Seeded gradients of training examples and evaluation items: a direction in common, norms
    that differ tenfold."""
    rng = np.random.default_rng(20)
    common = {layer: rng.standard_normal(d) for layer, d in WIDTHS.items()}

    def some(count: int, prefix: str) -> InMemory:
        sizes = 10 ** rng.uniform(-0.5, 0.5, (count, 1))
        return InMemory(
            {
                layer: torch.from_numpy(
                    sizes * (0.5 * common[layer] + rng.standard_normal((count, d)))
                ).float()
                for layer, d in WIDTHS.items()
            },
            [f"{prefix}{i}" for i in range(count)],
        )

    return some(N, "e"), some(M, "q")


def whole(some: InMemory) -> torch.Tensor:
    """All layers side by side, [examples, Σ d] float64."""
    return torch.cat(
        [block.double() for layer in some.layers for _, block in some.blocks(layer)], 1
    )


def own_scores(train: InMemory, queries: InMemory, lam: float) -> np.ndarray:
    """Our scores [n, m] with one λ for all layers."""
    found = np.zeros((len(train), len(queries)))
    for index, layer in enumerate(train.layers):
        alone = (InMemory({layer: next(s.blocks(layer))[1]}, s.ids) for s in (train, queries))
        damping = lam * train.width(layer) / train.squares[:, index].mean().item()
        found += datainf(*alone, damping).by_item
    return found


def dattri_scores(train: InMemory, queries: InMemory, lam: float) -> np.ndarray:
    """dattri's own scores [n, m], in its sign."""
    from dattri.algorithm import IFAttributorDataInf
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    model = torch.nn.ModuleDict(
        {layer: torch.nn.Linear(d, 1, bias=False) for layer, d in WIDTHS.items()}
    )

    def loss(weights, data):
        (gradient,) = data
        return (
            torch.cat([weights[f"{layer}.weight"].flatten() for layer in WIDTHS])
            * gradient.flatten()
        ).sum()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = IFAttributorDataInf(task=task, regularization=lam)
    loaders = [
        DataLoader(TensorDataset(whole(some)), batch_size=len(some)) for some in (train, queries)
    ]
    attributor.cache(loaders[0])
    with torch.no_grad():
        return attributor.attribute(*loaders).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write dattri's numbers to {REFERENCE.relative_to(ROOT)}",
    )
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    train, queries = gradients()
    tables, worst = [], 0.0
    for lam in LAMBDAS:
        theirs = dattri_scores(train, queries, lam)
        own = own_scores(train, queries, lam)
        error = np.abs(own + theirs).max() / np.abs(theirs).max()
        worst = max(worst, error)
        print(
            f"DataInf, {N} examples, {M} items, {len(WIDTHS)} layers, λ = {lam:g}: largest score "
            f"{np.abs(theirs).max():.4g}, largest difference from dattri's {error:.1e} of it"
        )
        tables.append(
            pd.DataFrame(theirs, index=pd.Index(train.ids, name="example"), columns=queries.ids)
            .assign(**{"lambda": lam})
            .reset_index()
        )
    if arguments.save:
        REFERENCE.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).set_index("lambda").to_csv(REFERENCE, float_format="%.9g")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
