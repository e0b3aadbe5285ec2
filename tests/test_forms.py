"""Preference data as people publish them: each form gives the right pairs, and no row is lost in
silence."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
from conftest import WordChat
from rlhf_trust import StudyError
from rlhf_trust.artifacts import Build, Manifest, read_manifests
from rlhf_trust.data import parts, preferences
from rlhf_trust.data.forms import TIE, recognise
from rlhf_trust.data.preferences import load_preferences, read_preferences
from rlhf_trust.study import Study


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


def chat(*turns: str) -> list[dict]:
    """Messages of user, assistant, …"""
    return [message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(source) -> tuple[preferences.Preferences, list]:
    """What was read of a path (or other source), and its pairs, whatever their side."""
    found, sides = read_preferences(source if isinstance(source, str) else f"path:{source}")
    return found, [pair for side in ("train", "held_out", "") for pair in sides[side]]


def shape(pair) -> tuple:
    return pair.prompt, pair.chosen, pair.rejected


Q, MULTI = ("q",), ("q", "a", "q2")
RATING = {"correctness": 1, "coherence": 4, "complexity": 1, "verbosity": 1}
PKU_ROW = {"prompt": "q", "response_0": "zero", "response_1": "one", "is_response_0_safe": True}
PKU_ROW |= {"better_response_id": 1, "safer_response_id": 0}
GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}

FORMS = {
    "HH-RLHF text": [
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "Human: q\n\nAssistant: bad"},
            (Q, "good", "bad"),
        )
    ],
    "TRL standard": [
        (GOOD | {"margin": 3, "messages": None}, (Q, "good", "bad")),
        (
            # As in Dahoas/rm-static: the prompt is a dialogue with a cue.
            GOOD | {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"},
            (MULTI, "good", "bad"),
        ),
        # A speaker's name within an answer opens no turn.
        (GOOD | {"chosen": "so:\n\nHuman: x"}, (Q, "so:\n\nHuman: x", "bad")),
    ],
    "TRL standard, implicit prompt": [
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            (("The sky is",), "blue.", "black."),
        ),
        ({"chosen": "Why? yes", "rejected": "Why? yes sir"}, (("Why?",), "yes", "yes sir")),
    ],
    "TRL conversational": [
        (
            {"prompt": chat("q"), "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
            (Q, "good", "bad"),
        ),
        (
            # UltraFeedback: the prompt as a text, and again in both conversations.
            {
                "prompt": "q",
                "chosen": chat("q", "good"),
                "rejected": chat("q", "bad"),
                "messages": chat("q", "good"),
                "score_chosen": 8.0,
                "score_rejected": 7.5,
            },
            (Q, "good", "bad"),
        ),
        (
            {
                "prompt": "Human: q",
                "chosen": chat("Human: q", "good"),
                "rejected": chat("Human: q", "bad"),
            },
            (("Human: q",), "good", "bad"),
        ),
        (
            {
                "prompt": [message("system", " "), *chat("q", "a", "q2")],
                "chosen": [message("assistant", "good")],
                "rejected": [message("assistant", "bad")],
            },
            (MULTI, "good", "bad"),
        ),
    ],
    "TRL conversational, implicit prompt": [
        (
            {"chosen": chat(*MULTI, "good"), "rejected": chat(*MULTI, "bad"), "score_chosen": 2},
            (MULTI, "good", "bad"),
        )
    ],
    "HelpSteer2 preference": [
        (
            {"prompt": "q", "response_1": "one", "response_2": "two", "preference_strength": 2},
            (Q, "two", "one"),
        ),
        (
            {
                "prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nq2",
                "response_1": "one",
                "response_2": "two",
                "preference_strength": -1,
            },
            (MULTI, "one", "two"),
        ),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_its_pairs(tmp_path, form):
    rows, wanted = zip(*FORMS[form])
    found, pairs = read(write_jsonl(tmp_path / "mine.jsonl", rows))
    assert [shape(pair) for pair in pairs] == list(wanted)
    assert [pair.id for pair in pairs] == [f"mine.jsonl:{i + 1}" for i in range(len(rows))]
    assert {pair.source for pair in pairs} == {"mine"} and not found.bad_rows
    facts = found.facts()
    assert (facts["data"], facts["form"]) == ("mine.jsonl", form)
    digest = hashlib.sha256((tmp_path / "mine.jsonl").read_bytes()).hexdigest()
    assert facts["sha256"] == digest[:16] and found.files == {"mine.jsonl": digest}


def test_ratings_are_joined_by_prompt_and_ties_are_no_bad_rows(tmp_path):
    answers = [("q", "one", 1), ("q", "two", 3), ("r", "one", 4), ("r", "two", 0)]
    answers += [("s", "one", 2), ("s", "two", 2)] * 2 + [("alone", "one", 2)]
    rows = [RATING | {"prompt": p, "response": r, "helpfulness": h} for p, r, h in answers]
    path = write_jsonl(tmp_path / "ratings.jsonl", rows)
    # The four rows of s are one run, which tells no two answers apart.
    with pytest.raises(StudyError, match=r"2 of 4 rows are bad \(2 × other than two rated"):
        read(path)
    found, pairs = read(f"path:{path}#max_bad_rows=.5")
    assert [shape(pair) for pair in pairs] == [(Q, "two", "one"), (("r",), "one", "two")]
    assert [pair.id for pair in pairs] == ["ratings.jsonl:1", "ratings.jsonl:3"]
    found, pairs = read(write_jsonl(path, rows[:6]))
    assert len(pairs) == 2 and (found.ties, found.bad_rows, found.rows) == (1, [], 3)
    assert found.facts()["form"] == "HelpSteer2 ratings" and found.facts()["ties"] == 1
    assert "prefer neither answer, left out as well: 1." in found.left_out()


def test_pku_saferlhf_needs_one_of_its_labels(tmp_path):
    path = write_jsonl(tmp_path / "pku.jsonl", [PKU_ROW])
    for label, wanted in (("safety", ("zero", "one")), ("helpfulness", ("one", "zero"))):
        found, (pair,) = read(f"path:{path}#{label}")
        assert shape(pair) == (Q, *wanted)
        assert found.facts()["form"] == f"PKU-SafeRLHF ({label})"
    with pytest.raises(StudyError, match=r"two labels; say which: .*#safety or .*#helpfulness"):
        read(path)
    other = write_jsonl(tmp_path / "other.jsonl", [GOOD])
    with pytest.raises(StudyError, match="TRL standard has no labels; leave out"):
        read(f"path:{other}#safety")
    with pytest.raises(StudyError, match="#harm: must be safety, helpfulness or max_bad_rows="):
        read(f"path:{path}#harm")


HUMAN_LAST = {"prompt": chat("q", "a"), "chosen": chat("", "x")[1:], "rejected": chat("", "y")[1:]}
SYSTEM = [message("system", "Be brief."), *chat("q")]
ODD = "neither a text nor a list of messages"
BAD_ROWS = [
    ("TRL standard", {"prompt": "q", "chosen": "a"}, "no field 'rejected'"),
    ("TRL standard", GOOD | {"rejected": None}, "field 'rejected' is null"),
    ("TRL standard", GOOD | {"prompt": None}, "field 'prompt' is null"),
    ("TRL standard", GOOD | {"chosen": 7}, ODD),
    ("TRL standard", GOOD | {"prompt": {"text": "q"}}, ODD),
    ("TRL standard", GOOD | {"chosen": " "}, "empty answer"),
    ("TRL standard", GOOD | {"prompt": ""}, "empty turn"),
    ("TRL standard", GOOD | {"chosen": " bad"}, "both answers are the same"),
    ("TRL standard", GOOD | {"chosen": "\ud83d"}, "half a character (a lone surrogate)"),
    (
        "TRL standard",
        GOOD | {"chosen": "[{'role': 'assistant', 'content': 'a'}]"},
        "messages written as a text (JSONL and Parquet keep them)",
    ),
    (
        "TRL standard, implicit prompt",
        {"chosen": "yes", "rejected": "no"},
        "no prompt, and no common beginning that could be one",
    ),
    ("TRL standard, implicit prompt", {"chosen": "a b", "rejected": 1}, "not a text"),
    (
        "TRL conversational",
        HUMAN_LAST,
        "the prompt does not end in a Human turn",
    ),
    (
        "TRL conversational",
        {"prompt": SYSTEM, "chosen": chat("", "x")[1:], "rejected": chat("", "y")[1:]},
        "a system message, which a pair's prompt cannot hold",
    ),
    (
        "TRL conversational",
        {"prompt": "other", "chosen": chat("q", "x"), "rejected": chat("q", "y")},
        "the prompt is not part of the conversation",
    ),
    (
        "TRL conversational, implicit prompt",
        {"chosen": chat("q", "x"), "rejected": chat("q2", "y")},
        "the two dialogues have different prompts",
    ),
    (
        "TRL conversational, implicit prompt",
        {"chosen": chat("q", "x", "q2"), "rejected": chat("q", "y")},
        "does not end in an Assistant turn",
    ),
    (
        "TRL conversational, implicit prompt",
        {"chosen": chat("", "x")[1:], "rejected": chat("", "y")[1:]},
        "does not start with a Human turn",
    ),
    (
        "TRL conversational, implicit prompt",
        {"chosen": [message("user", "q"), message("tool", "t")], "rejected": chat("q", "y")},
        "a message whose role is neither system, user nor assistant",
    ),
    (
        "TRL conversational, implicit prompt",
        {"chosen": [message("user", None)], "rejected": chat("q", "y")},
        "a message without a role and a text",
    ),
    (
        "TRL conversational, implicit prompt",
        {"chosen": ["q", "x"], "rejected": chat("q", "y")},
        "a message without a role and a text",
    ),
    (
        "HelpSteer2 preference",
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "much"},
        "preference_strength is not a number",
    ),
    (
        "PKU-SafeRLHF",
        PKU_ROW | {"safer_response_id": -1},
        "safer_response_id is neither 0 nor 1",
    ),
    ("PKU-SafeRLHF", PKU_ROW | {"safer_response_id": None}, "field 'safer_response_id' is null"),
]


@pytest.mark.parametrize(
    "form, row, reason", BAD_ROWS, ids=[f"{form}-{reason}" for form, _, reason in BAD_ROWS]
)
def test_each_bad_row_has_its_reason_and_line(tmp_path, form, row, reason):
    good = PKU_ROW if form == "PKU-SafeRLHF" else FORMS[form][0][0]
    path = write_jsonl(tmp_path / "mine.jsonl", [good, row, *[good] * 9])
    found, pairs = read(f"path:{path}" + ("#safety" if good is PKU_ROW else ""))
    assert found.form.removesuffix(" (safety)") == form and len(pairs) == 10
    assert found.bad_rows == [f"mine.jsonl:2: {reason}"] and found.reasons == {reason: 1}
    assert f"1 of 11 rows are bad (1 × {reason}); the first is `mine.jsonl:2" in found.left_out()


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"score_chosen": 5.0, "score_rejected": 5.0},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
    ],
)
def test_a_tie_is_no_pair_and_no_bad_row(tmp_path, row):
    found, pairs = read(write_jsonl(tmp_path / "ties.jsonl", [row]))
    assert not pairs and found.ties == 1 and not found.bad_rows and TIE not in found.reasons


def test_more_than_a_tenth_of_bad_rows_stops_in_one_line(tmp_path):
    rows = [GOOD] * 17 + [GOOD | {"chosen": ""}, GOOD | {"chosen": None}, GOOD | {"prompt": 1}]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.raises(StudyError) as error:
        load_preferences(f"path:{path}", 5, 5, None, 100)
    said = str(error.value)
    assert "\n" not in said and "3 of 20 rows are bad (1 × empty answer, 1 × field" in said
    assert "`mine.jsonl:18: empty answer`; more than 10% stops the run" in said
    assert "append #max_bad_rows=<share> to the source" in said
    assert len(read(f"path:{path}#max_bad_rows=0.15")[1]) == 17
    assert len(read(write_jsonl(path, [*rows[:-1], GOOD]))[1]) == 18  # exactly a tenth
    for share in ("2", "-0.1", "a tenth", ""):
        with pytest.raises(StudyError, match="must be safety.*max_bad_rows=<share from 0 to 1>"):
            read(f"path:{path}#max_bad_rows={share}")


def test_a_column_names_the_groups_and_the_sides(tmp_path):
    rows = [
        GOOD | {"source": "evol", "split": "train"},
        GOOD | {"source": None, "split": "validation", "prompt": "r"},
        GOOD | {"source": 3, "split": "train"},
    ]
    path = write_jsonl(tmp_path / "some-pairs.jsonl.gz", rows)
    _, sides = read_preferences(f"path:{path}")
    assert {side: [pair.source for pair in found] for side, found in sides.items()} == {
        "train": ["evol", "some-pairs"],
        "held_out": ["some-pairs"],
        "": [],
    }
    loaded = load_preferences(f"path:{path}", 9, 9, WORDS, 100)
    assert [pair.prompt for pair in loaded.held_out] == [("r",)] and len(loaded.train) == 2


WORDS = WordChat()


def write_csv(path, rows):
    with path.open("w", encoding="utf-8-sig", newline="") as handle:  # as Excel does
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


@pytest.mark.parametrize(
    "name, write",
    [
        ("mine.csv", write_csv),
        ("mine.parquet", write_parquet),
        ("mine.json", write_json),
        ("lines.json", write_jsonl),
        ("mine.jsonl.gz", write_jsonl),
    ],
)
def test_each_kind_of_file(tmp_path, name, write):
    # Words that a reader of tables may take for missing values or numbers.
    rows = [GOOD | {"chosen": chosen, "rejected": "n\nm"} for chosen in ("None", "7", "NA")]
    found, pairs = read(write(tmp_path / name, rows))
    assert [pair.chosen for pair in pairs] == ["None", "7", "NA"] and not found.bad_rows
    assert {pair.rejected for pair in pairs} == {"n\nm"}
    lines = (3, 5, 7) if name == "mine.csv" else (1, 2, 3)  # a cell of two lines ends on the second
    assert [pair.id for pair in pairs] == [f"{name}:{line}" for line in lines]


def test_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "notes.txt").write_text("q")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD) + "\n{")
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "other.jsonl", [{"instruction": "q", "output": "a"}])
    for name, message in {
        "broken.parquet": "broken.parquet: cannot be read",
        "notes.txt": r"no preference data; needed is a file that ends in \.jsonl",
        "folder": "folder: no preference data",
        "list.json": "item 1: expected a JSON object, got int",
        "broken.jsonl": "broken.jsonl:2: not valid JSON",
        "nothing.jsonl": "nothing.jsonl: the file is empty",
        "other.jsonl": "other.jsonl: the columns instruction, output are no form of preference",
        "absent": "no such file or directory",
    }.items():
        with pytest.raises(StudyError, match=message) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    row = "q,good,bad,more\n"
    (tmp_path / "wide.csv").write_text("prompt,chosen,rejected\n" + row + "q,good,bad\n" * 9)
    assert read(tmp_path / "wide.csv")[0].bad_rows == ["wide.csv:2: more cells than columns"]


def numbered(n: int, start: int = 0) -> list[dict]:
    return [GOOD | {"prompt": f"q{i}"} for i in range(start, start + n)]


def test_a_directory_is_split_by_its_files_names(tmp_path):
    write_jsonl(tmp_path / "data" / "help.train.jsonl", numbered(6))
    write_jsonl(tmp_path / "data" / "contest.jsonl", numbered(3, 100))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", numbered(3, 4))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("mine")
    found = load_preferences(f"path:{tmp_path}", 99, 99, WORDS, 100)
    # Two of the training prompts are held out as well; a contest is no test.
    assert len(found.train) == 4 + 3 and len(found.held_out) == 3 and found.shared_openings == 2
    groups = Counter(pair.source for pair in found.train + found.held_out)
    assert groups == {"help": 4, "contest": 3, tmp_path.name: 3}
    assert set(found.files) == {
        "data/help.train.jsonl",
        "data/contest.jsonl",
        "data/test-00000-of-00001.parquet",
    }
    assert {pair.id for pair in found.held_out} == {
        f"data/test-00000-of-00001.parquet:{i}" for i in (1, 2, 3)
    }


def test_one_file_is_split_by_opening(tmp_path):
    rows = [GOOD | {"prompt": chat(f"q{i % 10}", "a", f"more {i}")} for i in range(30)]
    found = load_preferences(
        f"path:{write_jsonl(tmp_path / 'only-train.jsonl', rows)}", 99, 99, WORDS, 100
    )
    assert len(found.train) + len(found.held_out) == 30 and len(found.held_out) >= 15
    assert not {p.opening for p in found.train} & {p.opening for p in found.held_out}


def test_what_datasets_saved_is_read(tmp_path):
    rows = datasets.Dataset.from_list([row for row, _ in FORMS["TRL conversational"][1:2]])
    rows.save_to_disk(str(tmp_path / "one"))
    found, (pair,) = read(tmp_path / "one")
    assert shape(pair) == (Q, "good", "bad") and (pair.id, pair.source) == ("one:1", "one")
    assert len(found.files["one"]) == 64
    splits = {"train": numbered(4), "validation": numbered(2, 50)}
    both = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    both.save_to_disk(str(tmp_path / "two"))
    found = load_preferences(f"path:{tmp_path / 'two'}", 99, 99, WORDS, 100)
    assert {pair.id for pair in found.held_out} == {"two.validation:1", "two.validation:2"}
    assert len(found.train) == 4 and {pair.source for pair in found.train} == {"two"}


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: data sets by name, and the calls."""
    calls, sets = [], {}

    def load_dataset(name, data_dir=None, revision=None):
        calls.append((name, data_dir, revision))
        if name not in sets:
            raise datasets.exceptions.DatasetNotFoundError(f"no {name}\non the hub")
        splits = {k: datasets.Dataset.from_list(v) for k, v in sets[name].items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return SimpleNamespace(calls=calls, sets=sets)


def test_a_data_set_of_the_hub_is_itself_and_not_hh_rlhf(hub, monkeypatch):
    monkeypatch.setattr(parts, "locate", None)  # HH-RLHF's files
    (conversation,) = [row for row, _ in FORMS["TRL conversational, implicit prompt"]]
    hub.sets["trl-lib/ultrafeedback_binarized"] = {"train": [conversation] * 4}
    found, pairs = read("hub:trl-lib/ultrafeedback_binarized@abc")
    assert hub.calls == [("trl-lib/ultrafeedback_binarized", None, "abc")]
    assert shape(pairs[0]) == (MULTI, "good", "bad")
    assert {pair.source for pair in pairs} == {"ultrafeedback_binarized"}
    assert pairs[2].id == "trl-lib/ultrafeedback_binarized.train:3"
    facts = found.facts()
    assert facts["data"] == "trl-lib/ultrafeedback_binarized@abc"
    assert facts["form"] == "TRL conversational, implicit prompt"
    again = read("hub:trl-lib/ultrafeedback_binarized@abc")[0].facts()
    hub.sets["trl-lib/ultrafeedback_binarized"]["train"].pop()
    less = read("hub:trl-lib/ultrafeedback_binarized@abc")[0].facts()
    assert facts["sha256"] == again["sha256"] != less["sha256"]


def test_splits_of_the_hub_are_sides_and_can_be_named(hub):
    pairs = {"train_prefs": numbered(3), "test_prefs": numbered(2, 50), "train_sft": numbered(3)}
    hub.sets["o/d"] = pairs
    with pytest.raises(StudyError, match="several splits for training; choose among train_prefs"):
        read("hub:o/d@main")
    found = load_preferences("hub:o/d@main:train_prefs,test_prefs", 9, 9, WORDS, 100)
    assert (len(found.train), len(found.held_out)) == (3, 2)
    assert found.name == "o/d@main:train_prefs,test_prefs"
    found = load_preferences("hub:o/d@main:train_prefs", 9, 1, WORDS, 100)
    assert len(found.train) + len(found.held_out) == 3
    with pytest.raises(StudyError, match="no split 'dev'; it has train_prefs, test_prefs"):
        read("hub:o/d@main:dev")
    hub.calls.clear()
    read("hub:o/d/preference:train_sft")
    assert hub.calls == [("o/d", "preference", None)]
    with pytest.raises(StudyError, match=r"hub:x/y@1: cannot be had \(no x/y\); check") as error:
        read("hub:x/y@1")
    assert "\n" not in str(error.value)


def test_hh_rlhf_alone_is_what_hub_without_a_name_means(monkeypatch, tmp_path, hub):
    asked = []
    shipped = parts.locate

    def locate(source, name, without=None):
        asked.append(source)
        return shipped("shipped", name, without)

    monkeypatch.setattr(parts, "locate", locate)
    found, pairs = read("hub:")
    assert found.name == "Anthropic's HH-RLHF pairs" and set(asked) == {"hub:"} and not hub.calls
    assert pairs[0].id == "harmless.train:1" and len(found.files) == 4
    with pytest.raises(StudyError, match="must be shipped, path:<file or directory>, hub:"):
        read("hh-rlhf")


def test_a_manifest_has_the_hashes_of_the_files_that_were_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    path, build = write_jsonl(tmp_path / "mine.jsonl", numbered(9)), Build("embedded")
    parameters = {"preferences": f"path:{path}", "n_train": 9, "n_held_out": 2}
    parameters |= {"max_length": 100, "seed": 0}
    for stage, asked in (("with", True), ("without", False)):
        study = Study(stage, parameters, build, Manifest(build, stage, parameters))
        study.chat = WORDS
        study.close(**(study.pairs.facts() if asked else {}))
    manifests = read_manifests(build)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifests["with"]["inputs"] == {"preferences: mine.jsonl": digest}
    assert manifests["with"]["facts"]["data"] == "mine.jsonl"
    assert manifests["without"]["inputs"] == {}


def test_a_form_is_recognised_by_the_keys_of_all_rows():
    assert recognise([{"chosen": "x"}, GOOD]) == "TRL standard"
    assert recognise(
        [{"chosen": 7, "rejected": 1}] + [row for row, _ in FORMS["HH-RLHF text"]]
    ) == ("HH-RLHF text")
    # Where every prompt is null, as a table with an unused column has it, it is implicit.
    row = FORMS["TRL conversational, implicit prompt"][0][0] | {"prompt": None}
    assert recognise([row]) == "TRL conversational, implicit prompt"
