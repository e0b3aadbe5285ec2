"""Answers from elsewhere, scored without a model: verticals and Trust-Score on the command line."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from rlhf_trust import StudyError, score
from rlhf_trust.rag import questions as rag, trust_align, trust_score as ts
from rlhf_trust.rag.entailment import LexicalEntailment
from rlhf_trust.rewards import rm_bench
from rlhf_trust.sources import SHIPPED


def ideal(vertical, item) -> str:
    """An answer for which the published measure is 1."""
    if vertical == "ethics":
        return "not wrong"
    if vertical == "truthfulness":
        return f"{item.options.index(item.right) + 1}. {item.right}"
    if vertical == "sycophancy":
        return item.answers[item.held]
    if vertical == "refusal":
        return "I can't help with that."
    return f"It is {item.value}." if vertical == "privacy" else "I agree."


@pytest.mark.parametrize(
    ("vertical", "metric"),
    [
        ("stereotype", "agreement_rate"),
        ("ethics", "false_negative_rate"),
        ("truthfulness", "accuracy"),
        ("privacy", "leak_rate"),
        ("sycophancy", "agreement_with_user"),
        ("refusal", "over_refusal_rate"),
    ],
)
def test_answers_of_another_program_are_scored(tmp_path, capsys, vertical, metric):
    path, table = tmp_path / "answers.jsonl", tmp_path / "table.csv"
    assert score.main(["ask", vertical, "-n", "36", "--seed", "3"]) == 0
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    items = {item.id: item for item in score.MODULES[vertical].chosen_items("shipped", 36, 3)}
    assert [row["id"] for row in asked] == list(items) and len(asked) == 36
    assert all(row["messages"][-1]["role"] == "user" for row in asked)
    answered = asked[:4:-1]  # in another order, and not all
    rows = [{"id": r["id"], "answer": ideal(vertical, items[r["id"]])} for r in answered]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = [vertical, str(path), "-n", "36", "--seed", "3", "--save", str(table)]
    assert score.main(given) == 0
    assert "5 of 36 prompts are not answered" in capsys.readouterr().out
    (found,) = (
        pd.read_csv(table).query(f"metric == '{metric}' and condition == 'main'").itertuples()
    )
    of = {"ethics": lambda item: item.wrong, "refusal": lambda item: not item.harmful}
    counted = of.get(vertical, lambda item: True)
    assert found.value == 1 and found.n == sum(counted(items[r["id"]]) for r in answered)


def test_toxicity_needs_a_scorer_alone(tmp_path, capsys):
    items = score.MODULES["toxicity"].chosen_items("shipped", 8, 0)
    path = tmp_path / "answers.jsonl"
    rows = [{"id": item.id, "answers": ["How kind of you.", "You stupid idiot."]} for item in items]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert score.main(["toxicity", str(path), "-n", "8"]) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "toxicity_probability" in line
    ]
    assert line.split()[2] == "1.000"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"id": "act:1"}'], "answers.jsonl:1: needs id and answer"),
        (['{"id": "act:1", "answers": []}'], "answers.jsonl:1: needs id and answer"),
        (['{"id": "act:0", "answer": "x"}'], "answers.jsonl:1: no item has the id 'act:0'"),
        (['{"id": ID, "answer": "x"}'] * 2, "answers.jsonl:2: .* is answered twice"),
        (
            ['{"id": ID, "answer": "x"}', '{"id": OTHER, "answers": ["x", "y"]}'],
            "answers.jsonl:2: every prompt needs as many answers as the first one",
        ),
        (["[1]"], "answers.jsonl:1: expected a JSON object"),
        ([], "the file is empty"),
    ],
)
def test_bad_answers_name_the_line(tmp_path, rows, message):
    items, path = score.MODULES["ethics"].chosen_items("shipped", 4, 0), tmp_path / "answers.jsonl"
    first, second = (json.dumps(item.id) for item in items[:2])
    path.write_text("\n".join(rows).replace("ID", first).replace("OTHER", second))
    with pytest.raises(StudyError, match=message):
        score.read_answers(path, items)


# --- Trust-Score ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ts.KINDS)
def test_responses_of_the_authors_files_are_scored(tmp_path, kind, capsys):
    rows = json.loads((SHIPPED / "trust-score" / f"{kind}.json").read_text())[:12]
    asked = [q for q in rag.from_rows(rows, kind, kind, "rows") if q]
    outputs = [trust_align.positive(q) for q in asked]
    path, table = tmp_path / "output.json", tmp_path / "table.csv"
    written = [row | {"output": said} for row, said in zip(rows, outputs)]
    path.write_text(json.dumps({"args": {}, "data": written}))
    given = ["trust-score", str(path), "--kind", kind, "--save", str(table)]
    assert score.main(given) == 0
    wanted = ts.trust_score(ts.score_responses(asked, outputs, LexicalEntailment()))
    found = pd.read_csv(table).set_index("metric")["value"]
    assert found.to_dict() == pytest.approx(wanted.set_index("metric")["value"].to_dict(), abs=1e-5)

    for row in written:
        first, *others = row["docs"]
        first["answers_found"] = None
        for document in others:
            del document["answers_found"]
    path.write_text(json.dumps(written))
    assert score.main(given) == 0  # found by the entailment model instead
    annotated = [q for q in rag.from_rows(written, kind, kind, "rows", LexicalEntailment()) if q]
    found = [
        (a, b) for q, p in zip(annotated, asked) for a, b in zip(q.supported, p.supported) if a
    ]
    assert found and sum(right for _, right in found) >= 0.7 * len(found)  # it knows no meaning


def test_a_short_answer_is_annotated_where_it_stands_and_follows():
    documents = (ts.Document("T", text, (False,)) for text in ("It is 79.", "It is not known."))
    question = ts.Question("q", "short", "How many?", (ts.Claim("", ("79",)),), tuple(documents))
    for says, wanted in ((True, [True, False]), (False, [False, False])):
        asked = []

        def entails(pairs, says=says, asked=asked):
            asked += pairs
            return [says] * len(pairs)

        found = rag.annotate(question, entails).documents
        assert [d.answers_found[0] for d in found] == wanted
        assert asked == [("Title: T\nIt is 79.", "How many? 79")]


def test_official_forms_that_are_odd_are_read(capsys):
    def docs(claims):
        return [{"title": "", "text": "Some text.", "answers_found": [1] * claims}]

    long = {"question": "Why?", "answers": [["It was cheap."], ["It was old."]], "docs": docs(2)}
    (question,) = rag.from_rows([long], "eli5", "long", "f")
    assert [claim.text for claim in question.claims] == ["It was cheap.", "It was old."]
    assert question.documents[0].premise.startswith("Title: \n")
    odd = [
        {"question": "Which?", "answers": [["?"], ["17"]], "docs": docs(2)},
        {"question": "Which groups?", "answers": [["A"], ["B"], ["O"]], "docs": docs(3)},
        {"question": "What?", "answers": [["?!"]], "docs": docs(1)},
    ]
    one, groups, none = rag.from_rows(odd, "qampari", "list", "f")
    assert none is None and [c.aliases for c in one.claims] == [("17",)]
    assert len(one.documents[0].answers_found) == 1
    assert ts.claims_found(groups, "A [1], AB [1], O [1]", None) == [True, False, True]
    assert "f: 2 gold answers without a letter or digit left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ([], [], "say how its gold answers are matched: --kind"),
        ([], ["--kind", "short"], "expected a list of questions"),
        ({"args": 1}, ["--kind", "short"], "expected a list of questions"),
        ([{"question": "Q?"}], ["--kind", "short"], "question 1: no answers"),
    ],
)
def test_a_file_that_is_none_of_the_authors(tmp_path, capsys, content, given, message):
    path = tmp_path / "output.json"
    path.write_text(json.dumps(content))
    assert score.main(["trust-score", str(path), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(("prefers", "rates"), [("right", (1, 1, 1)), ("fancier", (1, 0, 0))])
def test_a_generative_judge_is_scored_by_its_verdicts(tmp_path, capsys, prefers, rates):
    assert score.main(["ask", "rm-bench", "-n", "8", "--seed", "2"]) == 0
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(asked) == 72
    items = {item.id: item for item in rm_bench.load_rm_bench("shipped")}

    def verdict(row):
        item, right, wrong = row["id"].rsplit(":", 2)
        i, j = rm_bench.STYLES.index(right), rm_bench.STYLES.index(wrong)
        if prefers == "fancier" and i == j:
            return "A is good." if i else "\\boxed{A>B}, no: \\boxed{ A = B }"
        text, chosen = row["messages"][0]["content"], items[item].chosen[i]
        first = text.split("[Answer A]\n")[1].startswith(f"{chosen}\n\n[Answer B]")
        better = first if prefers == "right" or i > j else not first
        return f"\\boxed{{A=B}}? No: \\boxed{{{'A>>B' if better else 'B>A'}}}"

    path, table = tmp_path / "judgements.jsonl", tmp_path / "table.csv"
    rows = [json.dumps({"id": row["id"], "answer": verdict(row)}) for row in asked]
    path.write_text("\n".join(rows))
    given = ["rm-bench", str(path), "-n", "8", "--seed", "2"]
    assert score.main([*given, "--save", str(table)]) == 0
    unread = "16 of 72 answers have no verdict" in capsys.readouterr().out
    assert unread == (prefers == "fancier")
    found = pd.read_csv(table).set_index(["domain", "level"])["value"]
    easy, normal, hard = (found["shipped items, 4-domain", level] for level in rm_bench.LEVELS)
    assert (easy, normal, hard) == rates
    path.write_text("\n".join(rows[1:]))
    assert score.main(given) == 2
    assert "needs one answer to each of the 72 prompts" in capsys.readouterr().err
