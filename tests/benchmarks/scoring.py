"""Attribution scores against a literal loop over examples and layers, and their cost as n grows.

Part of ``make bench``. Random gradients of SmolLM2-135M's LoRA weights (rank 8 on q and v of all
layers: 120 weights, 460,800 numbers an example), in memory and with norms stored for both sides.
The loop reads as the equations do, one evaluation item at a time; all items of the five verticals
are scored together by ours. Both run in this process in turns, the loop for one item a round, which
counts for all of them; what counts is the ratio, its median over rounds.

Cost by n is measured in a process of its own each, on gradients that are made a block at a time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from measure import peak_mb, timed
from rlhf_trust.attribution.solvers import SOLVERS, datainf
from rlhf_trust.attribution.store import InMemory

WIDTHS = {
    f"{layer:02d}.{name}": width
    for layer in range(30)
    for name, width in {"q.A": 8 * 576, "q.B": 576 * 8, "v.A": 8 * 576, "v.B": 192 * 8}.items()
}
N, ITEMS, ROUNDS, BLOCK, SIZES = 1000, 5 * 8, 3, 250, (250, 1000, 4000)


def random_gradients(n: int) -> dict[str, torch.Tensor]:
    return {layer: torch.randn(n, width) for layer, width in WIDTHS.items()}


class Streamed:
    """``Gradients`` made a block at a time: the same random rows in another order. Costs do not
    depend on the values."""

    def __init__(self, n: int):
        self.layers, self.ids = tuple(sorted(WIDTHS)), tuple(f"e{i}" for i in range(n))
        self.rows = {width: torch.randn(BLOCK, width) for width in set(WIDTHS.values())}
        squares = {width: rows.double().square().sum(1) for width, rows in self.rows.items()}
        self.squares = torch.stack(
            [
                torch.cat([squares[WIDTHS[layer]].roll(i) for i in range(n // BLOCK)])
                for layer in self.layers
            ],
            1,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def width(self, layer: str) -> int:
        return WIDTHS[layer]

    def blocks(self, layer: str):
        for i in range(len(self) // BLOCK):
            yield slice(i * BLOCK, (i + 1) * BLOCK), self.rows[WIDTHS[layer]].roll(i, 0)


def literal_loop(
    train: dict[str, torch.Tensor], squares: dict[str, list[float]], query: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The equations, letter by letter, for one evaluation item: scores [n]."""
    influence = torch.zeros(N)
    for layer, v in query.items():
        g, norm = train[layer], squares[layer]
        lam = 0.1 * sum(norm) / N / g.shape[1]
        r = torch.zeros_like(v)
        for i in range(N):
            r += v - (v @ g[i]) / (lam + norm[i]) * g[i]
        r /= N * lam
        for i in range(N):
            influence[i] -= r @ g[i]
    return influence


def against_the_loop() -> None:
    torch.manual_seed(0)
    tensors, items = random_gradients(N), random_gradients(ITEMS)
    train, queries = InMemory(tensors, range(N)), InMemory(items, range(ITEMS))
    norms = {layer: train.squares[:, i].tolist() for i, layer in enumerate(train.layers)}
    found, rounds = datainf(train, queries).by_item, []
    for item in range(ROUNDS):
        query = {layer: block[item] for layer, block in items.items()}
        start = time.perf_counter()
        plain = literal_loop(tensors, norms, query)
        seconds = time.perf_counter() - start
        error = (plain - torch.from_numpy(found[:, item])).abs().max() / plain.abs().max()
        assert error < 1e-4, f"the two do not agree: {error:.1e}"
        rounds.append((seconds * ITEMS, timed(lambda: datainf(train, queries))))
    loop, ours, ratio = (statistics.median(x) for x in zip(*((p, o, p / o) for p, o in rounds)))
    print(
        f"scoring, n = {N}, {ITEMS} items: loop {loop / ITEMS:.1f} s an item, {loop:.0f} s for "
        f"all; DataInf {ours:.1f} s, ratio {ratio:.0f}",
        flush=True,
    )
    for name, solver in SOLVERS.items():
        print(f"{name:16s} {timed(partial(solver, train, queries)):6.1f} s", flush=True)


def one_size(n: int) -> None:
    torch.manual_seed(0)
    train, queries = Streamed(n), InMemory(random_gradients(ITEMS), range(ITEMS))
    before = peak_mb()
    seconds = timed(lambda: datainf(train, queries))
    print(
        f"{n:6d} {seconds:9.1f} {1e3 * seconds / n:14.2f} {peak_mb():9.0f} "
        f"{peak_mb() - before:14.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--streamed",
        type=int,
        help=f"only DataInf over so many streamed examples, a multiple of {BLOCK}",
    )
    arguments = parser.parse_args()
    if arguments.streamed:
        return one_size(arguments.streamed)
    print(
        f"{len(WIDTHS)} weights, {sum(WIDTHS.values()):,} numbers an example, "
        f"{torch.get_num_threads()} threads, median of {ROUNDS} rounds"
    )
    # First, since a process counts its parent's peak memory as its own.
    print(
        f"streamed in blocks of {BLOCK}:\n     n   seconds  ms an example   peak MB  of it scoring",
        flush=True,
    )
    for n in SIZES:
        subprocess.run([sys.executable, __file__, "--streamed", str(n)], check=True)
    against_the_loop()


if __name__ == "__main__":
    main()
