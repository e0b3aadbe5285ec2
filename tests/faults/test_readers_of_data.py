"""Data half read, and people named: a file that is there yields rows or one line that names it and
the place; what is read honestly is read whole; what is done instead of something is said."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import time
from pathlib import Path

import pytest
from conftest import WordChat
from hypothesis import HealthCheck, given, settings, strategies as st
from rlhf_trust import StudyError, artifacts, lineage, score
from rlhf_trust.data.preferences import load_pairs, load_preferences, read_preferences
from rlhf_trust.masking import Masker
from rlhf_trust.rag.questions import load_cited, load_questions
from rlhf_trust.render import conversation, samples
from rlhf_trust.rewards.rm_bench import load_rm_bench
from rlhf_trust.verticals.bbq import load_bbq
from rlhf_trust.verticals.ethics import load_ethics
from rlhf_trust.verticals.privacy import load_privacy
from rlhf_trust.verticals.stereotype import load_stereotype
from rlhf_trust.verticals.toxicity import load_toxicity
from rlhf_trust.verticals.truthfulness import load_truthfulness


def hh(n: int, say: str = "good") -> str:
    start = [f"\n\nHuman: q{i}\n\nAssistant: " for i in range(n)]
    return jsonl(*({"chosen": s + say, "rejected": s + "bad"} for s in start))


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


BBQ_ROW = {
    "example_id": 1,
    "question_index": "1",
    "question_polarity": "neg",
    "context_condition": "ambig",
    "context": "Two people met.",
    "question": "Who was rude?",
    "answer_info": {"ans0": ["a", "old"], "ans1": ["b", "young"], "ans2": ["c", "unknown"]},
    "additional_metadata": {"stereotyped_groups": ["old"]},
    "ans0": "Ann",
    "ans1": "Bob",
    "ans2": "Not known",
}
BITS = [{"title": "T", "text": "Ida built it.", "answers_found": [1]}]
ASKED = {"question": "Who?", "docs": BITS}
TRUTH = {"question": "Q?", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}
MATRIX = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
ETHICS = "label,input,is_short\n1,I lied.,True\n0,I sang.,True\n0,I read.,False\n"
STEREOTYPE = (
    "stereotype_topic,target_group,stereotype_template,stereotyped\n"
    "art,men,[target_group] sing.,1\nart,women,[target_group] paint.,0\n"
)
TOXIC = jsonl({"prompt": {"text": "You are"}}, {"prompt": {"text": "They are"}})
PEOPLE = {f"{first} Dorset": f"{first.lower()}@corp.com" for first in ("Jane", "Jim", "Joe", "Jo")}


def preferences(source: str):
    return read_preferences(source)[1]


LOADERS = {
    # name -> how it is read; its files: path -> content
    "hh": (
        preferences,
        {
            f"hh-rlhf/{subset}-base.{split}.jsonl": hh(3)
            for subset in ("harmless", "helpful")
            for split in ("train", "test")
        },
    ),
    "pairs": (
        lambda source: preferences(f"{source}/mine"),
        {"mine/train.jsonl": jsonl({"prompt": "q", "chosen": "a", "rejected": "b"})},
    ),
    "table": (
        lambda source: preferences(f"{source}/mine"),
        {"mine/pairs.csv": 'prompt,chosen,rejected\nq,"a, b",c\nr,a,"c\nd"\n'},
    ),
    "toxicity": (
        load_toxicity,
        {f"real-toxicity-prompts/{split}.jsonl": TOXIC for split in ("toxic", "nontoxic")},
    ),
    "stereotype": (load_stereotype, {"decodingtrust-stereotype/user_prompts.csv": STEREOTYPE}),
    "ethics": (load_ethics, {"ethics/cm_test.csv": ETHICS}),
    "truthfulness": (load_truthfulness, {"truthfulqa/mc_task.json": json.dumps([TRUTH] * 2)}),
    "privacy": (
        lambda source: load_privacy(source, 1, 0),
        {"enron/name2email.json": json.dumps(PEOPLE)},
    ),
    "bbq": (load_bbq, {"bbq/Age.jsonl": jsonl(BBQ_ROW, BBQ_ROW | {"example_id": 2})}),
    "questions": (
        load_questions,
        {
            "trust-score/asqa_eval_top100_calibrated.json": json.dumps(
                [ASKED | {"qa_pairs": [{"short_answers": ["Ida"]}]}]
            ),
            "trust-score/eli5_eval_top100_calibrated.json": json.dumps(
                [ASKED | {"answers": [["Ida did."]]}]
            ),
        },
    ),
    "cited": (
        load_cited,
        {
            "alce/eli5_default.json": json.dumps(
                {"demos": [{"question": "Who?", "answer": "Ida [1].", "docs": BITS}]}
            )
        },
    ),
    "rm-bench": (load_rm_bench, {"rm-bench/code_filtered.json": json.dumps([MATRIX] * 2)}),
    "lineage": (
        lambda source: lineage.load_statements(source, 200),
        {"reef/truthfulqa.csv": "statement,label\nQ: a A: b,1\nQ: a A: c,0\n"},
    ),
}
FILES = [(name, file) for name, (_, files) in LOADERS.items() for file in files]


def lay(root: Path, name: str, file: str = "", content: str | bytes | None = None):
    """A loader's files, one of them with another content; what it then reads."""
    load, files = LOADERS[name]
    for path, text in files.items():
        text = content if path == file and content is not None else text
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        (root / path).write_bytes(data)
    return load(f"path:{root}")


def refused(load, message: str, name: str = "") -> None:
    with pytest.raises(StudyError, match=message) as error:
        load()
    assert "\n" not in str(error.value) and name in str(error.value)


# --- what can be read is read alike ---------------------------------------------------------------

HONEST = {
    "a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "gzip under a plain name": lambda text: gzip.compress(text.encode()),
    "blank lines at the end": lambda text: text.encode() + b"\n\n",
}


@pytest.mark.parametrize("saved", HONEST)
@pytest.mark.parametrize(("name", "file"), FILES)
def test_the_same_rows_saved_in_another_way(tmp_path, name, file, saved):
    wanted = lay(tmp_path / "a", name)
    content = HONEST[saved](LOADERS[name][1][file])
    assert str(lay(tmp_path / "b", name, file, content)) == str(wanted)


def delimited(text: str, delimiter: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(csv.reader(io.StringIO(text)))
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize(("name", "file"), [(n, f) for n, f in FILES if f.endswith(".csv")])
def test_a_table_of_another_spreadsheet(tmp_path, name, file, delimiter):
    content = delimited(LOADERS[name][1][file], delimiter)
    found = lay(tmp_path / "b", name, file, content)
    assert str(found) == str(lay(tmp_path / "a", name))


@pytest.mark.parametrize("yes, no", [("TRUE", "FALSE"), ("True", "False"), ("1.0", "0.0"), (1, 0)])
def test_truths_as_spreadsheets_write_them(tmp_path, yes, no):
    text = f"label,input,is_short\n{yes},I lied.,{yes}\n{no},I sang.,{yes}\n{no},I read.,{no}\n"
    found = lay(tmp_path, "ethics", "ethics/cm_test.csv", text)
    assert [(item.text, item.wrong) for item in found] == [("I lied.", True), ("I sang.", False)]


@pytest.mark.parametrize("spelled", [str.upper, str.lower])
def test_real_names_in_other_letters_stay_real(tmp_path, spelled):
    people = json.dumps({spelled(name): address for name, address in PEOPLE.items()})
    facts = lay(tmp_path, "privacy", "enron/name2email.json", people)
    assert all(fact.real and set(fact.people) <= set(PEOPLE) for fact in facts)
    assert not artifacts.NOTES


@pytest.fixture(autouse=True)
def no_notes(monkeypatch):
    monkeypatch.setattr(artifacts, "NOTES", [])


# --- what cannot be read is one line --------------------------------------------------------------

DAMAGED = {
    "empty": (lambda data: b"", "empty|not valid JSON|is missing"),
    "blank": (lambda data: b"\n \n", "empty|not valid JSON|is missing"),
    "Latin-1": (lambda data: data + b"Jos\xe9\n", r":\d+: not UTF-8"),
    "UTF-16 without a mark": (lambda data: data.decode().encode("utf-16-le"), ":1: zero bytes"),
    "zeros": (lambda data: data + b"\0" * 64, r":\d+: zero bytes"),
    "gzip cut": (lambda data: gzip.compress(data * 30)[:-9], "cannot be read"),
    "gzip flipped": (lambda data: gzip.compress(data)[:12] + b"\xff\xff\xff", "cannot be read"),
    "gzip cut early": (lambda data: gzip.compress(data)[:9], "cannot be read"),
    "a page instead": (lambda data: b"<html>404</html>", "not valid JSON|is missing|empty"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_damaged_file_is_named(tmp_path, name, file, damage):
    harm, message = DAMAGED[damage]
    content = harm(LOADERS[name][1][file].encode())
    refused(lambda: lay(tmp_path, name, file, content), message, Path(file).name)


@pytest.mark.parametrize("kind", ["folder", "broken link", "loop"])
@pytest.mark.parametrize(("name", "file"), [f for f in FILES if f[0] not in ("pairs", "table")])
def test_what_is_no_file_is_not_passed_over(tmp_path, name, file, kind):
    lay(tmp_path, name)
    path = tmp_path / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nothing")
    refused(lambda: LOADERS[name][0](f"path:{tmp_path}"), "cannot be read", path.name)


JSON_FAULTS = {
    "deep": ("[" * 200_000, "nested too deeply"),
    "long number": ('{"a": ' + "9" * 9_000 + "}", "not valid JSON"),
    "key twice": ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
    "half": ('{"a": ', "not valid JSON"),
    "null": ("null", "expected|no "),
    "number": ("7", "expected|must be"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
@pytest.mark.parametrize(("name", "file"), [(n, f) for n, f in FILES if "json" in f])
def test_a_json_file_of_another_shape(tmp_path, name, file, fault):
    content, message = JSON_FAULTS[fault]
    refused(lambda: lay(tmp_path, name, file, content), message, Path(file).name)


A_PAIR = {"prompt": [{"role": "user", "content": "hi"}]}
A_PAIR |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
HALF = {"chosen": "\n\nHuman: what is this\n\nAssistant: a thumb \ud83d"}
HALF["rejected"] = "\n\nHuman: what is this\n\nAssistant: no"
HARMLESS = "hh-rlhf/harmless-base.train.jsonl"
TEMPLATE = "decodingtrust-stereotype/user_prompts.csv"
CM, MC, ENRON = "ethics/cm_test.csv", "truthfulqa/mc_task.json", "enron/name2email.json"
RM, AGE, DEMOS = "rm-bench/code_filtered.json", "bbq/Age.jsonl", "alce/eli5_default.json"
TS, TOXIC_FILE = "trust-score/asqa_eval_top100_calibrated.json", "real-toxicity-prompts/toxic.jsonl"
HEAD = "label,input,is_short\n"


def changed(row: dict, **values) -> str:
    return json.dumps([row | values])


WRONG_ROWS = [
    # loader, file, content, what is said
    ("hh", HARMLESS, jsonl(A_PAIR), r"train.jsonl: 1 of 1 rows are bad \(1 × not a text\)"),
    ("hh", HARMLESS, jsonl(HALF), r"1 of 1 rows are bad \(1 × half a character"),
    ("hh", HARMLESS, hh(2, "bad"), "2 of 2 rows are bad .*both answers are the same"),
    ("hh", HARMLESS, hh(3) + hh(1, ""), "train.jsonl: 1 of 4 rows are bad .*more than 10%"),
    ("hh", HARMLESS, hh(3)[:-20], "train.jsonl:3: not valid JSON"),
    (
        "pairs",
        "mine/train.jsonl",
        jsonl({"prompt": "q", "chosen": 1, "rejected": 2}),
        "1 of 1 rows",
    ),
    (
        "pairs",
        "mine/train.jsonl",
        jsonl({"prompt": "q", "chosen": "a", "rejected": "b", "source": "\ud83d"}),
        r"lone surrogate\) in source",
    ),
    (
        "table",
        "mine/pairs.csv",
        'prompt,chosen,rejected\nq,"a,b\nr,a,b\n',
        "pairs.csv:2: not valid",
    ),
    ("table", "mine/pairs.csv", "prompt,chosen,chosen\nq,a,b\n", "'chosen' is there twice"),
    ("ethics", CM, HEAD + "1,I lied.,True\n1,I stole.,True\n", "label 1 and with label 0"),
    ("ethics", CM, HEAD + "1,I lied.,False\n0,I sang.,False\n", "needs short acts"),
    ("ethics", CM, HEAD + "1,I lied.,yes\n", "cm_test.csv:2: is_short must be 0 or 1, got 'yes'"),
    ("ethics", CM, HEAD + "2,I lied.,True\n", "cm_test.csv:2: label must be 0 or 1"),
    ("ethics", CM, HEAD + "1, ,True\n", "cm_test.csv:2: no input"),
    ("ethics", CM, HEAD + "1,I lied, twice.,True\n", "cm_test.csv:2: more cells than columns"),
    ("ethics", CM, HEAD + "1,I lied.\n", "cm_test.csv:2: no value for 'is_short'"),
    ("ethics", CM, HEAD + '1,"I lied.,True\n0,I sang.,True\n', "cm_test.csv:2: not valid CSV"),
    ("ethics", CM, HEAD + '1,"I lied.,True\n0,"I sang.",True\n', "cm_test.csv:2: not valid CSV"),
    # The mark that closes it stands where one may: 50" is the end of a cell.
    (
        "ethics",
        CM,
        HEAD + '0,I sang.,True\n1,"I lied.,True\n1,I stole.,True\n0,I saw 50",True\n',
        "cm_test.csv:3: this row runs on to line 5",
    ),
    ("ethics", CM, HEAD + "1,I lied.,True\n0,a\0b,True\n", "cm_test.csv:3: zero bytes"),
    ("ethics", CM, "label,input,label,is_short\n1,a,0,True\n", "'label' is there twice"),
    ("ethics", CM, "label|input|is_short\n1|a|True\n", "column 'input' is missing"),
    (
        "stereotype",
        TEMPLATE,
        STEREOTYPE.replace(",0", ",1"),
        "stereotyped is the same in every row",
    ),
    ("stereotype", TEMPLATE, STEREOTYPE.replace("men,", ",", 1), "csv:2: no target_group"),
    (
        "stereotype",
        TEMPLATE,
        'stereotype_topic,target_group,stereotype_template\na,b,"[target_group] x\n'
        'a,c,[target_group] y "\n',
        "not valid CSV|runs on to line 3",
    ),
    ("toxicity", TOXIC_FILE, jsonl({"prompt": {"text": 7}}), "jsonl:1: prompt.text must be a text"),
    ("toxicity", TOXIC_FILE, jsonl({"prompt": {"text": "\ud83d"}}), "jsonl:1: .*half a character"),
    ("toxicity", TOXIC_FILE, jsonl({"prompt": {"text": None}}), "jsonl:1: no prompt.text"),
    ("truthfulness", MC, changed(TRUTH, mc1_targets={"a": 1, "b": "0"}), "question 1: mc1_targets"),
    ("truthfulness", MC, '[{"question": "Q?", "mc1_targets": {"a": NaN}}]', "question 1: mc1_tar"),
    ("truthfulness", MC, changed(TRUTH, mc1_targets={"a": 1, " ": 0}), "question 1: no answer in"),
    ("truthfulness", MC, changed(TRUTH, mc2_targets={"a": 1}), "question 1: needs exactly one"),
    ("truthfulness", MC, changed(TRUTH, mc1_targets=None), "question 1: no mc1_targets"),
    ("truthfulness", MC, changed(TRUTH, question="\ud83d"), "question 1: question holds half a"),
    ("truthfulness", MC, "[]", "no questions"),
    ("truthfulness", MC, "[1]", r"questions\[0\] must be an object"),
    ("privacy", ENRON, "{}", "expected an object, name: e-mail address"),
    ("privacy", ENRON, json.dumps({"Jane Dorset": "j@a.com"}), "at least four names"),
    ("privacy", ENRON, json.dumps(PEOPLE | {"Al Po": None}), "entry 5: no e-mail address"),
    ("privacy", ENRON, json.dumps(PEOPLE | {"Al Po": "al"}), "entry 5: no e-mail address"),
    ("privacy", ENRON, json.dumps(PEOPLE | {"Al Po": ["al@b.c"]}), "entry 5: e-mail address must"),
    ("bbq", AGE, jsonl(BBQ_ROW, BBQ_ROW), "Age.jsonl:2: example_id 1 is there twice"),
    ("bbq", AGE, jsonl(BBQ_ROW | {"ans1": "Ann"}), "Age.jsonl:1: ans0, ans1 and ans2 must differ"),
    ("bbq", AGE, jsonl(BBQ_ROW | {"example_id": True}), "jsonl:1: example_id must be a whole numb"),
    ("bbq", AGE, jsonl(BBQ_ROW | {"context": 3}), "Age.jsonl:1: context must be a text, got 3"),
    ("bbq", AGE, jsonl(BBQ_ROW | {"answer_info": []}), "Age.jsonl:1: no answer_info.ans0"),
    ("rm-bench", RM, changed(MATRIX, chosen=["a", None, "c"]), r"item 1: no chosen\[1\]"),
    ("rm-bench", RM, changed(MATRIX, chosen="abc"), "item 1: chosen must be a list, got 'abc'"),
    ("rm-bench", RM, changed(MATRIX, prompt="\ud83d"), "item 1: prompt holds half a character"),
    (
        "questions",
        TS,
        json.dumps([ASKED | {"qa_pairs": "Ida"}]),
        "question 1: qa_pairs must be a l",
    ),
    ("questions", TS, json.dumps([ASKED | {"qa_pairs": ["Ida"]}]), r"qa_pairs\[0\] must be an obj"),
    ("questions", TS, json.dumps([ASKED | {"docs": "Ida"}]), "question 1: "),
    ("questions", TS, json.dumps([ASKED | {"docs": None, "answers": []}]), "question 1: no docs"),
    ("questions", TS, json.dumps([ASKED | {"answers": ["Ida"]}]), r"answers\[0\] must be a list"),
    ("questions", TS, json.dumps([ASKED | {"answers": [[]]}]), r"question 1: no answers\[0\]"),
    ("cited", DEMOS, json.dumps({"demos": [7]}), r"demos\[0\] must be an object"),
    ("cited", DEMOS, "[]", "no demos"),
    ("lineage", "reef/truthfulqa.csv", "statement\n  \n", "truthfulqa.csv:2: no statement"),
    (
        "lineage",
        "reef/truthfulqa.csv",
        'statement,label\n"a,1\nb,0\nc",1\n',
        "csv:2: this row runs",
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), WRONG_ROWS)
def test_a_wrong_row_is_named(tmp_path, name, file, content, message):
    refused(lambda: lay(tmp_path, name, file, content), message)


def test_a_table_with_long_cells_and_lines_in_them_is_read(tmp_path):
    long = (
        HEAD + '1,"I lied, and\n\nthen, ""twice"",\nmore",False\n1,I stole.,True\n0,I sang.,True\n'
    )
    found = lay(tmp_path, "ethics", CM, long)
    assert [item.id for item in found] == ["scenario:6", "scenario:7"]
    cell = "word " * 40_000
    table = f'prompt,chosen,rejected\nq,"{cell}",c\n'
    ((pair,),) = filter(None, lay(tmp_path, "table", "mine/pairs.csv", table).values())
    assert pair.chosen == cell.strip()


def test_half_of_hh_alone_is_not_trained_on(tmp_path):
    lay(tmp_path, "hh")
    (tmp_path / HARMLESS).unlink()
    refused(lambda: preferences(f"path:{tmp_path}"), "harmless-base.train.jsonl .* is missing")


def test_training_rows_of_which_none_is_good_are_not_replaced_by_test_rows(tmp_path):
    lay(tmp_path, "hh")
    (tmp_path / HARMLESS).write_text(hh(3, "bad"))
    source = f"path:{tmp_path}#max_bad_rows=1"
    refused(lambda: load_preferences(source, 2, 2, WordChat(), 99), "none is good: mend the file")


def test_what_is_done_instead_is_said(tmp_path, capsys, monkeypatch):
    lay(tmp_path, "hh")
    for subset in ("harmless", "helpful"):
        (tmp_path / f"hh-rlhf/{subset}-base.train.jsonl").unlink()
    load_preferences(f"path:{tmp_path}", 2, 2, WordChat(), 99)
    for load in (
        load_bbq,
        lambda s: load_privacy(s, 1, 0),
        lambda s: lineage.load_statements(s, 1),
    ):
        load(f"path:{tmp_path}")
    notes = artifacts.NOTES
    assert any("no training files: their test pairs are split" in said for said in notes)
    assert any("the data lack BBQ's categories Age, Disability_status," in said for said in notes)
    for name in ("enron/name2email.json", "reef/truthfulqa.csv"):
        assert any(f"the data have no {name}: " in said for said in notes)
    said = capsys.readouterr().out
    assert all(f"note: {one}\n" in said and str(tmp_path) not in one for one in notes)
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    build, before = artifacts.Build("x"), list(notes)
    artifacts.Manifest(build, "some", {}).write()
    assert artifacts.read_manifests(build)["some"]["facts"]["notes"] == before
    load_privacy("shipped", 1, 0)  # made up by design
    assert notes == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": ["ID"], "answer": "x"}, "answers.jsonl:1: id must be a text"),
        ({"id": None, "answer": "x"}, "answers.jsonl:1: no id"),
        ({"id": "ID", "answer": "\ud83d"}, "answers.jsonl:1: an answer holds half a character"),
        ({"id": "ID", "answer": None}, "answers.jsonl:1: needs id and answer"),
        ({"id": "ID", "answers": [1]}, "answers.jsonl:1: needs id and answer"),
    ],
)
def test_answers_to_score(tmp_path, row, message, capsys):
    items, path = score.MODULES["ethics"].chosen_items("shipped", 2, 0), tmp_path / "answers.jsonl"
    path.write_text(jsonl(row).replace('"ID"', json.dumps(items[0].id)))
    assert score.main(["ethics", str(path), "-n", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_pairs_of_inpo_that_are_damaged(tmp_path):
    for text, message in (("{}\n", "pairs.jsonl:1: no pair"), ("x", ":1: not valid JSON")):
        (tmp_path / "pairs.jsonl").write_text(text)
        refused(lambda: load_pairs(tmp_path), message)


# --- any bytes, any change ------------------------------------------------------------------------

JUNK = st.sampled_from(
    [b'"', b"'", b",", b";", b"\n", b"\r", b"\0", b"\xff", b"[", b"]", b"{", b"}", b":", b"null"]
    + [
        b"NaN",
        b"1e999",
        b"7",
        b"true",
        b'""',
        b"\\ud800",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"[]",
        b"{}",
    ]
)
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(JUNK, st.binary(max_size=6))),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes) -> bytes:
    for place, length, put in changes:
        start = int(place * len(data))
        data = data[:start] + put + data[start + length :]
    return data


@pytest.mark.parametrize(("name", "file"), FILES)
@settings(
    max_examples=25,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=CHANGES, everything=st.one_of(st.none(), st.binary(max_size=40)))
def test_any_change_gives_rows_or_one_line(tmp_path, name, file, changes, everything):
    data = LOADERS[name][1][file].encode()
    data = mutated(data, changes) if everything is None else everything
    try:
        found = lay(tmp_path, name, file, data)
    except StudyError as error:
        assert "\n" not in str(error)
    else:
        assert found
        str(found).encode()  # nothing that a file could not hold


ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


def replaced(value, path, odd):
    if not path:
        return odd
    items = value.items() if isinstance(value, dict) else enumerate(value)
    made = {key: replaced(one, path[1:], odd) if key == path[0] else one for key, one in items}
    return made if isinstance(value, dict) else list(made.values())


@pytest.mark.parametrize(("name", "file"), [(n, f) for n, f in FILES if "json" in f])
@settings(
    max_examples=25,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), odd=ODD)
def test_any_value_in_any_place_gives_rows_or_one_line(tmp_path, name, file, data, odd):
    content = LOADERS[name][1][file]
    rows = content.splitlines() if file.endswith("l") else [content]
    first = json.loads(rows[0])
    rows[0] = json.dumps(replaced(first, data.draw(st.sampled_from(places(first))), odd))
    try:
        str(lay(tmp_path, name, file, "\n".join(rows))).encode()
    except StudyError as error:
        assert "\n" not in str(error)


# --- people ---------------------------------------------------------------------------------------

MASK = Masker(["Jane Q. Dorset", "Bo Li", "Don Black", "Se\u00e1n O'Neill", "Mary-Ann Lee"])
NAME, MAIL = "[name]", "[e-mail]"
MASKED = [
    *((text, NAME) for text in ("Jane Q. Dorset", "JANE  Q.\nDORSET", "JaneQDorset", "jane")),
    *(
        (text, NAME)
        for text in ("\uff2a\uff41\uff4e\uff45", "J\u200bane", "Ja\u00adne", "Jan\u00e9")
    ),
    *(
        (text, NAME)
        for text in ("J\u0430n\u0435", "D\u03bfrset", "\U0001d409ane", "D0rset", "J a n e")
    ),
    *(
        (text, NAME)
        for text in ("Bo Li", "BoLi", "Bo_Li", "bo.li", "Bo-Li", "Bo\u00a0Li", "Li, Bo")
    ),
    *(
        (text, NAME)
        for text in ("Sean O\u2019Neill", "O`NEILL", "oneill", "mary ann lee", "Maryann")
    ),
    ("jane_dorset", "[name]_[name]"),
    ("Jane\u2019s dog", "[name]\u2019s dog"),
    ("I don't know Don. Don\u2019t ask don", "I don't know [name]. Don\u2019t ask [name]"),
    ("DON\uff07T", "DON\uff07T"),
    *((text, text) for text in ("ja ne", "do n", "bold", "Bo and Li", "donor")),
    *((text, MAIL) for text in ("xa@corp.com", "x.y-z+1@sub.corp.com", "xa @ corp.com", "xa@corp")),
    *((text, MAIL) for text in ("xa [at] corp [dot] com", "xa(at)corp.com", "xa at corp dot com")),
    *((text, MAIL) for text in ("xa%40corp.com", "xa\uff20corp.com", "x\u200ba@co\u200brp.com")),
    *((text, MAIL) for text in ("XA AT CORP DOT CO DOT UK", "x dot y at corp dot com", "o'x@a.de")),
    ("(xa@corp.com).", "([e-mail])."),
    ("a@b@corp.com", "a@[e-mail]"),
    ("xa@example.com.evil.io", MAIL),
    *((text, text) for text in ("xa@example.com", "x at example dot org", "x @ Example.NET")),
    *((text, text) for text in ("meet @ noon", "sh@t, b@stard", "5 lbs @ 3.50", "at the dot com")),
    *((text, text) for text in ("Look at corp.com.", "see @someone", "it is 3 @ 5")),
]


@pytest.mark.parametrize(("text", "wanted"), MASKED)
def test_names_and_addresses_however_written(text, wanted):
    assert MASK(text) == wanted
    assert MASK(f"so, {text} went") == f"so, {wanted} went"


@pytest.mark.parametrize(
    "text",
    ["a", "a.", "a@", "a ", " ", "dot ", "a dot ", "at ", "a'", "x@x.", "jane ", "j ", "[ ", "a-"],
)
def test_masking_takes_time_in_proportion_to_length(text):
    def seconds(length):
        whole = text * (length // len(text))
        begun = time.process_time()
        MASK(whole)
        return time.process_time() - begun

    assert seconds(200_000) < 3  # half a second where nothing else runs; once it was a minute


def test_only_what_may_be_shown_is_masked(monkeypatch):
    read = []
    mask = Masker()
    monkeypatch.setattr(Masker, "__call__", lambda self, text: read.append(len(text)) or text)
    conversation(("a" * 10**6,), mask)
    samples([("asked", {"start": "a" * 10**6})], mask)
    assert read == [20_000] * 2
