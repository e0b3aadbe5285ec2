"""Verticals, Trust-Score and RM-Bench without the study.

Answers come from any program; no model is loaded but entailment and reward models.

``python -m rlhf_trust.score ask ethics > prompts.jsonl``
    a vertical's prompts as published, one a line: ``id`` and ``messages``;
``python -m rlhf_trust.score ethics answers.jsonl``
    its published measures, of one line a prompt: ``id`` and ``answer``, or ``answers``, as many for
    every prompt;
``python -m rlhf_trust.score trust-score output.json --kind short``
    Trust-Score of rows with ``question``, ``docs``, gold answers and ``output`` (a list, or the
    authors' files, which have it under ``data``); which document holds which answer is found by the
    entailment model where ``answers_found`` is missing.

``python -m rlhf_trust.score rm-bench hub:a/reward-model --items path:data``
    RM-Bench of a sequence classifier, of a language model over a ``--reference``, or of one alone;
    scores are kept in ``build/score``, and an interrupted run carries on. Of a generative judge
    ``ask rm-bench`` prints the prompts, and ``rm-bench judgements.jsonl`` reads its verdicts;

``--save table.csv`` writes the table as well. Exit codes: 0 done, 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pandas as pd

from . import ROOT, StudyError, command, require
from .artifacts import atomic_write
from .chat import messages
from .data import choose
from .rag import questions, trust_score
from .rag.entailment import entailment_model
from .rewards import rm_bench
from .sources import HALF_CHARACTER, field, read_json, read_jsonl
from .verticals import HEADLINE, toxicity
from .verticals.common import answers_table, reader_sentence, trust_table
from .verticals.scorers import make_scorer

SCORERS = "of toxicity: local, tox-block, hub:<id>@<revision>, path:<directory>, perspective:<file>"
MODULES = {name: import_module(f".verticals.{name}", __package__) for name in HEADLINE}


def read_answers(path: Path, items: Sequence) -> tuple[list, list[list[str]]]:
    """The items that a file answers, in order, and their answers, [item][sample].

    Raises :class:`StudyError`, with the line, for a row that is none, for an id that is unknown or
    there twice, and where items have different numbers of answers.
    """
    known, found = {item.id for item in items}, {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        key, answers = field(row, "id", where), row.get("answers", [row.get("answer")])
        texts = isinstance(answers, list) and all(isinstance(text, str) for text in answers)
        if not texts or not answers:
            raise StudyError(f"{where}: needs id and answer, a text, or answers, a list of texts")
        if HALF_CHARACTER.search("".join(answers)):
            raise StudyError(f"{where}: an answer holds half a character (a lone surrogate)")
        if key not in known:
            raise StudyError(
                f"{where}: no item has the id {key!r}; give the --items, -n and --seed that its "
                "prompts were asked with"
            )
        require(key not in found, f"{where}: {key!r} is answered twice")
        if found and len(answers) != len(next(iter(found.values()))):
            raise StudyError(f"{where}: every prompt needs as many answers as the first one")
        found[key] = answers
    answered = [item for item in items if item.id in found]
    return answered, [found[item.id] for item in answered]


def vertical_table(vertical: str, path: Path, items: Sequence, scorer: str) -> pd.DataFrame:
    """Rows of ``trust.csv`` for one model's answers."""
    answered, answers = read_answers(path, items)
    if len(answered) < len(items):
        print(f"{len(items) - len(answered)} of {len(items)} prompts are not answered: left out")
    if vertical == "toxicity":
        scores = toxicity.score_answers(answers, make_scorer(scorer))
        return trust_table(vertical, {"model": toxicity.measures(answered, scores)}, 0)
    measures = {"model": MODULES[vertical].measures(answered, answers, "main")}
    table = answers_table(vertical, measures, 0)
    print(reader_sentence(vertical, table))
    return table


def output_table(path: Path, kind: str, judge: str, strict: bool) -> pd.DataFrame:
    """All of Trust-Score's metrics of one model's responses."""
    rows = read_json(path)
    rows = rows.get("data") if isinstance(rows, dict) else rows
    sets = questions.OFFICIAL.items()
    kind = kind or next((of for name, of in sets if name in path.name.lower()), "")
    require(kind, f"{path}: say how its gold answers are matched: --kind short, list or long")
    entails = entailment_model(judge)
    asked = questions.from_rows(rows, path.stem, kind, str(path), entails)
    pairs = []
    for number, (question, row) in enumerate(zip(asked, rows), start=1):
        said = row.get("output")
        said = said[0] if isinstance(said, list) and len(said) == 1 else said
        if not isinstance(said, str) or HALF_CHARACTER.search(said):
            raise StudyError(f"{path}: row {number}: needs output, a text")
        if question:
            pairs.append((question, said))
    require(pairs, f"{path}: no question has a gold answer that can be looked for")
    print(f"entailment model: {entails.name}; scores by different ones are not comparable")
    scores = trust_score.score_responses(*zip(*pairs), entails, strict)
    return trust_score.trust_score(scores, path.stem)


def rm_bench_table(
    model: str, items: Sequence, source: str, seed: int, reference: str, form: str
) -> pd.DataFrame:
    """RM-Bench's summary of one model, or of a judge's answers in a JSONL file."""
    kept = ROOT / "build" / "score"
    if model.endswith(".jsonl"):
        require(not reference, f"{model}: a judge has no reference; leave --reference out")
        asked = rm_bench.duels(items, seed)
        answered, answers = read_answers(Path(model), asked)
        whole = len(answered) == len(asked) and all(len(some) == 1 for some in answers)
        require(whole, f"{model}: needs one answer to each of the {len(asked)} prompts asked")
        won = rm_bench.judged_wins(asked, [text for (text,) in answers], seed)
    else:
        scores = rm_bench.scores_of(model, rm_bench.dialogues(items), kept, reference, form)
        won = rm_bench.wins(scores.reshape(len(items), 2, 3))
    table = rm_bench.summary(items, won, model, released=source != "shipped")
    for sentence in rm_bench.words(table.assign(model=model)):
        print(sentence)
    return table


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m rlhf_trust.score", description=__doc__.split(":")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--items", default="shipped", help="shipped, hub: or path:<directory>")
    asking.add_argument("-n", type=int, default=0, help="how many; 0: all")
    asking.add_argument("--seed", type=int, default=0, help="of their choice and order")
    saving = argparse.ArgumentParser(add_help=False)
    saving.add_argument("--save", type=Path, help="CSV file for the table")
    ask = commands.add_parser("ask", parents=[asking], help="print a vertical's prompts")
    ask.add_argument("vertical", choices=[*MODULES, "rm-bench"])
    for name in MODULES:
        asked = commands.add_parser(name, parents=[asking, saving], help="score answers to them")
        asked.add_argument("answers", type=Path)
        asked.add_argument("--scorer", default="local", help=SCORERS)
    trust = commands.add_parser("trust-score", parents=[saving], help="score grounded responses")
    trust.add_argument("answers", type=Path)
    trust.add_argument("--kind", choices=trust_score.KINDS, default="")
    trust.add_argument("--strict", action="store_true", help="read responses as trust-eval does")
    trust.add_argument("--judge", default="lexical", help="lexical, hub:<id>@<revision>, path:")
    bench = commands.add_parser("rm-bench", parents=[asking, saving], help="score a reward model")
    known = "hub:<id>@<revision>, path:<directory>, wheel:<package>, or a judge's answers.jsonl"
    bench.add_argument("model", help=known)
    bench.add_argument("--reference", default="", help="of a language model's implicit reward")
    bench.add_argument(
        "--form",
        choices=rm_bench.FORMS,
        default="average",
        help="of log-probabilities, without one",
    )
    given = parser.parse_args(argv)
    about = given.vertical if given.command == "ask" else given.command
    if about == "rm-bench":
        items = rm_bench.load_rm_bench(given.items)
        items = choose(items, given.n or len(items), given.seed, by=lambda item: item.domain)
    elif about in MODULES:
        items = MODULES[about].chosen_items(given.items, given.n, given.seed)
    if given.command == "ask":
        asked = rm_bench.duels(items, given.seed) if about == "rm-bench" else None
        for prompt in asked or MODULES[about].prompts(items):
            row = {"id": prompt.id, "messages": messages(prompt.turns, prompt.system)}
            print(json.dumps(row, ensure_ascii=False))
        return 0
    if about == "trust-score":
        table = output_table(given.answers, given.kind, given.judge, given.strict)
    elif about == "rm-bench":
        how = given.items, given.seed, given.reference, given.form
        table = rm_bench_table(given.model, items, *how)
    else:
        table = vertical_table(about, given.answers, items, given.scorer)
        table = table[["metric", "condition", "value", "ci_low", "ci_high", "n"]]
    print(table.to_string(index=False, float_format="{:.3f}".format))
    if given.save:
        with atomic_write(given.save) as aside:
            table.to_csv(aside, index=False, float_format="%.6g")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… ask ethics | head` ends without a word
    sys.exit(main())
