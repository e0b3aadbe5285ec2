"""Length-controlled win rates against AlpacaEval's own package on the same made-up annotations:
``make parity``.

The package reads the difficulty of its own instructions from a file on the hub; it is given one
made up here, and its GLM without that file's other rows, which are of its own baseline
(``length_controlled_noreg``). Annotations are as it has them: 1 to 2, where 2 is a win of the
model, with answers that differ in length. With ``--save`` its numbers are kept under
``tests/reference``, where ``tests/test_winrates.py`` reads them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from rlhf_trust import ROOT
from rlhf_trust.rewards.winrates import length_controlled

REFERENCE = ROOT / "tests" / "reference" / "alpaca-eval-lc.csv"
CASES = {
    "graded, longer": (200, 0.8, 60, False),
    "decided, longer": (120, 1.5, 40, True),
    "decided, shorter": (60, 0.5, -30, True),
    "length says nothing": (60, 0.0, 20, False),
    "few": (24, 1.0, 10, True),
}
"""Name → prompts, weight of length for the judge, characters by which the model's answers are
longer, and whether its preferences are 0 or 1."""


def annotations(name: str) -> pd.DataFrame:
    """Columns won (preference for the model, 0 to 1), model and baseline (lengths of the answers in
    characters) and difficulty."""
    n, weight, longer, decided = CASES[name]
    rng = np.random.default_rng([*name.encode()])
    baseline = rng.integers(80, 240, n)
    model = np.maximum(baseline + rng.normal(longer, 60, n).astype(int), 1)
    difficulty = rng.normal(0, 1, n)
    logits = 0.2 + 0.7 * difficulty + weight * np.tanh((model - baseline) / 60)
    chance = 1 / (1 + np.exp(-logits))
    won = (rng.random(n) < chance) if decided else np.clip(chance + rng.normal(0, 0.1, n), 0, 1)
    lengths = {"model": model, "baseline": baseline}
    return pd.DataFrame({"won": np.asarray(won, float), **lengths, "difficulty": difficulty})


def theirs(given: pd.DataFrame) -> float:
    """The package's length-controlled win rate, 0 to 1."""
    from alpaca_eval.metrics import glm_winrate

    with tempfile.TemporaryDirectory() as folder:
        gamed = pd.DataFrame({"index": given.index, "model": "nobody"})
        gamed["instruction_difficulty"] = given["difficulty"]
        path = Path(folder) / "df_gamed.csv"
        gamed.to_csv(path, index=False)
        glm_winrate.hf_hub_download = lambda *_, **__: path
        asked = pd.DataFrame({"index": given.index, "annotator": "made up"})
        asked["generator_1"], asked["generator_2"] = "baseline", "model"
        for side, lengths in (("output_1", given["baseline"]), ("output_2", given["model"])):
            asked[side] = ["x" * length for length in lengths]
        asked["preference"] = given["won"] + 1
        found = glm_winrate.get_length_controlled_winrate(
            asked, "length_controlled_noreg", save_weights_dir=None
        )
    return found["length_controlled_winrate"] / 100


def ours(given: pd.DataFrame) -> float:
    """The same by the study."""
    longer = (given["baseline"] - given["model"]).to_numpy(float)
    with sklearn.config_context(enable_metadata_routing=False):  # which the package switches on
        numbers = given["won"].to_numpy(), longer, given["difficulty"].to_numpy()
        return float(length_controlled(*numbers).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write the package's numbers to {REFERENCE.relative_to(ROOT)}",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of scikit-learn, about the package's call
    rows = []
    for name in CASES:
        given = annotations(name)
        both = {"ours": ours(given), "theirs": theirs(given)}
        rows.append({"case": name, "raw": given["won"].mean(), **both})
        print(
            f"{name}, {len(given)} prompts: raw {rows[-1]['raw']:.4f}, at equal length "
            f"{both['ours']:.5f}, AlpacaEval {both['theirs']:.5f}"
        )
    table = pd.DataFrame(rows)
    if arguments.save:
        saved = table[["case", "theirs"]].rename(columns={"theirs": "win_rate"})
        saved.to_csv(REFERENCE, index=False, float_format="%.6f")
    error = (table["ours"] - table["theirs"]).abs().max()
    print(f"largest difference {error:.1e}")
    return int(error > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
