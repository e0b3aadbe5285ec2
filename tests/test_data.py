"""Data: the shipped set is what its datasheet says, and no bad row is kept or lost in silence."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from conftest import WordChat
from rlhf_trust import StudyError, sources
from rlhf_trust.data import choose
from rlhf_trust.data.forms import parse_pair
from rlhf_trust.data.parts import SUBSETS, hh_part
from rlhf_trust.data.preferences import load_preferences, read_pairs
from rlhf_trust.sources import locate
from rlhf_trust.verticals.ethics import load_ethics
from rlhf_trust.verticals.privacy import load_privacy, make_private_facts
from rlhf_trust.verticals.stereotype import load_stereotype
from rlhf_trust.verticals.toxicity import load_toxicity
from rlhf_trust.verticals.truthfulness import load_truthfulness

CHAT = WordChat()
EVERYTHING = 10**6


def read(path, subset: str):
    """Pairs and bad rows (``file:line: reason``) of a file in HH-RLHF's layout."""
    pairs, bad = read_pairs(hh_part(path, subset))
    return [pair for _, pair in pairs], [": ".join(row) for row in bad]


@pytest.fixture(scope="module")
def shipped() -> dict:
    """(subset, split) -> (pairs, bad rows) of the shipped files."""
    return {
        (subset, split): read(locate("shipped", f"{stem}.{split}.jsonl"), subset)
        for subset, stem in SUBSETS.items()
        for split in ("train", "test")
    }


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def row(chosen: str = dialogue("q", "good"), rejected: str = dialogue("q", "bad")) -> dict:
    return {"chosen": chosen, "rejected": rejected}


def write_rows(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_subsets(root, rows_of, split="test") -> str:
    for subset in SUBSETS:
        write_rows(root / "hh-rlhf" / f"{subset}-base.{split}.jsonl", rows_of(subset))
    return f"path:{root}"


# --- the shipped preference set -------------------------------------------------------------------


def test_shipped_pairs_parse_and_are_enough(shipped):
    assert [bad for _, bad in shipped.values()] == [[]] * 4
    for split, least in (("train", 240), ("test", 60)):
        harmless, helpful = (len(shipped[subset, split][0]) for subset in ("harmless", "helpful"))
        assert harmless == helpful and harmless + helpful >= least
    for pairs, _ in shipped.values():
        multi = sum(len(pair.prompt) > 1 for pair in pairs)
        assert 0.1 < multi / len(pairs) < 0.9


def test_shipped_sides_share_no_opening(shipped):
    train, test = (
        {pair.opening for subset in SUBSETS for pair in shipped[subset, split][0]}
        for split in ("train", "test")
    )
    assert not train & test
    loaded = load_preferences("shipped", EVERYTHING, EVERYTHING, CHAT, max_length=EVERYTHING)
    assert (len(loaded.train), len(loaded.held_out)) == tuple(
        sum(len(shipped[subset, split][0]) for subset in SUBSETS) for split in ("train", "test")
    )
    assert not loaded.bad_rows and not loaded.shared_openings and not loaded.too_long


def test_shipped_choice_is_not_a_matter_of_length(shipped):
    for split in ("train", "test"):
        pairs = [pair for subset in SUBSETS for pair in shipped[subset, split][0]]
        shorter = np.mean([len(pair.chosen) < len(pair.rejected) for pair in pairs])
        assert 0.35 <= shorter <= 0.65, f"{split}: chosen is the shorter answer in {shorter:.0%}"


def test_shipped_pairs_have_no_near_duplicates(shipped):
    pairs = [pair for found, _ in shipped.values() for pair in found]
    words = [
        set(re.findall(r"[a-z']+", " ".join((*pair.prompt, pair.chosen)).lower())) for pair in pairs
    ]
    column = {word: i for i, word in enumerate(sorted(set().union(*words)))}
    has = np.zeros((len(pairs), len(column)), dtype=np.float32)
    for i, found in enumerate(words):
        has[i, [column[word] for word in found]] = 1
    common, size = has @ has.T, has.sum(1)
    jaccard = common / (size[:, None] + size[None, :] - common)
    np.fill_diagonal(jaccard, 0)
    i, j = np.unravel_index(jaccard.argmax(), jaccard.shape)
    assert jaccard[i, j] < 0.5, (
        f"{pairs[i].id} and {pairs[j].id} share {jaccard[i, j]:.0%} of their words"
    )


# --- reading and splitting ------------------------------------------------------------------------

BAD_ROWS = [
    ({"chosen": "x"}, "no field 'rejected'"),
    (row(chosen=7), "not a text"),
    (row(chosen="Well. " + dialogue("q", "a")), "does not start with a speaker"),
    (row(chosen="\n\nAssistant: a"), "does not start with a Human turn"),
    (row(chosen=dialogue("q", "a", "q2")), "does not end in an Assistant turn"),
    (row(rejected=dialogue("q", "  ")), "empty answer"),
    (row(dialogue("q", "", "q2", "a"), dialogue("q", "", "q2", "b")), "empty turn"),
    (row(chosen=dialogue("q", "thumb \ud83d")), "half a character (a lone surrogate)"),
    (row(rejected=dialogue("other", "bad")), "the two dialogues have different prompts"),
    (
        row(rejected=dialogue("q", "bad") + "\n\nAssistant: more"),
        "the two dialogues have different prompts",
    ),
    (row(rejected=dialogue("q", "good ")), "both answers are the same"),
    (
        row(*(dialogue("q", "wait") + f"\n\nAssistant: {a}" for a in "ab")),
        "the prompt does not end in a Human turn",
    ),
]


def test_every_bad_row_is_named_and_counted(tmp_path):
    file = tmp_path / "harmless-base.test.jsonl"
    last = row(dialogue("r", "yes"), dialogue("r", "no"))
    write_rows(file, [row(), *(bad for bad, _ in BAD_ROWS), last])
    pairs, bad = read(file, "harmless")
    assert [pair.id for pair in pairs] == ["harmless.test:1", f"harmless.test:{len(BAD_ROWS) + 2}"]
    assert bad == [
        f"{file.name}:{line}: {reason}" for line, (_, reason) in enumerate(BAD_ROWS, start=2)
    ]


def test_a_row_becomes_turns_and_two_answers():
    chosen = dialogue("one\n\ntwo", " a ", "Human: said", "yes\n\nso")
    rejected = dialogue("one\n\ntwo", "a", "Human: said", "no")
    pair = parse_pair(row(chosen, rejected), "id", "helpful")
    assert pair.prompt == ("one\n\ntwo", "a", "Human: said") and pair.opening == "one\n\ntwo"
    assert (pair.chosen, pair.rejected, pair.source) == ("yes\n\nso", "no", "helpful")


def test_a_speaker_who_speaks_twice_running_has_one_turn():
    start = dialogue("q", "wait") + "\n\nAssistant: here" + "\n\nHuman: thanks" + "\n\nHuman: more?"
    pair = parse_pair(
        row(f"{start}\n\nAssistant: yes", f"{start}\n\nAssistant: no"), "id", "helpful"
    )
    assert pair.prompt == ("q", "wait\n\nhere", "thanks\n\nmore?")
    assert (pair.chosen, pair.rejected) == ("yes", "no")


@pytest.mark.parametrize(
    ("line", "reason"), [('{"chosen": "a",', "not valid JSON"), ("[1]", "expected a JSON object")]
)
def test_a_malformed_line_names_file_and_line(tmp_path, line, reason):
    file = tmp_path / "helpful-base.train.jsonl"
    file.write_text(f"{json.dumps(row())}\n\n{line}\n")
    with pytest.raises(StudyError, match=rf"helpful-base.train.jsonl:3: {reason}"):
        read(file, "helpful")


def test_a_truncated_archive_names_itself(tmp_path):
    file = tmp_path / "harmless-base.test.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(row()).encode() * 50)[:-20])
    with pytest.raises(StudyError, match="harmless-base.test.jsonl.gz: cannot be read"):
        read(file, "harmless")


def test_a_missing_file_or_directory_is_named(tmp_path):
    write_rows(tmp_path / "hh-rlhf" / "harmless-base.test.jsonl", [row()])
    for source, message in (
        (f"path:{tmp_path}", r"hh-rlhf/helpful-base.test.jsonl \(or .*gz\) is missing"),
        (f"path:{tmp_path}/x", "no such file or directory"),
        ("shiped", "must be shipped, path:"),
    ):
        with pytest.raises(StudyError, match=message):
            load_preferences(source, 1, 1, CHAT, 100)


def test_the_original_layout_and_gz_are_found(tmp_path):
    file = tmp_path / "hh-rlhf" / "helpful-base" / "test.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    assert locate(f"path:{tmp_path}", "hh-rlhf/helpful-base.test.jsonl") == file


def many(subset: str) -> list[dict]:
    """60 rows with 20 openings, three rows each."""
    rows = []
    for i in range(60):
        turns = (f"{subset} {i % 20}", "ok", f"more {i}")
        rows.append(row(dialogue(*turns, "good"), dialogue(*turns, "bad")))
    return rows


def test_test_files_alone_are_split_by_opening(tmp_path):
    source = write_subsets(tmp_path, many)
    one = load_preferences(source, EVERYTHING, EVERYTHING, CHAT, 100, seed=3)
    # Nothing is lost: the openings are disjoint by construction.
    assert len(one.train) + len(one.held_out) == 120
    assert not {pair.opening for pair in one.train} & {pair.opening for pair in one.held_out}
    again = load_preferences(source, EVERYTHING, EVERYTHING, CHAT, 100, seed=3)
    assert (again.train, again.held_out) == (one.train, one.held_out)
    other = load_preferences(source, EVERYTHING, EVERYTHING, CHAT, 100, seed=4)
    assert {pair.id for pair in other.held_out} != {pair.id for pair in one.held_out}


def test_training_pairs_with_a_held_out_opening_are_dropped_and_halves_take_turns(tmp_path):
    write_subsets(tmp_path, many, "train")
    # Openings 0, 1, 2 of either subset.
    source = write_subsets(tmp_path, lambda subset: many(subset)[:3])
    loaded = load_preferences(source, 40, 4, CHAT, 100)
    assert loaded.shared_openings == 2 * 9
    assert Counter(pair.source for pair in loaded.train) == {"harmless": 20, "helpful": 20}
    assert Counter(pair.source for pair in loaded.held_out) == {"harmless": 2, "helpful": 2}


def test_long_pairs_are_left_out_and_an_empty_side_is_an_error(tmp_path):
    def rows(subset):
        return [*many(subset), row(dialogue(subset, "a " * 300), dialogue(subset, "b"))]

    source = write_subsets(tmp_path, rows)
    assert load_preferences(source, EVERYTHING, EVERYTHING, CHAT, 100).too_long == 2
    with pytest.raises(StudyError, match="no (train|held-out) pair of at most 2 tokens is left"):
        load_preferences(source, 5, 5, CHAT, 2)
    with pytest.raises(StudyError, match="harmless-base.test.jsonl: the file is empty"):
        load_preferences(write_subsets(tmp_path / "empty", lambda subset: []), 5, 5, CHAT, 100)


# --- benchmarks -----------------------------------------------------------------------------------


def test_shipped_benchmarks_are_balanced():
    prompts = load_toxicity("shipped")
    assert len(prompts) >= 60 and len({p.text for p in prompts}) == len(prompts)
    assert len(set(Counter(p.split for p in prompts).values())) == 1
    statements = load_stereotype("shipped")
    cells = Counter((s.group, s.topic) for s in statements)
    assert len(statements) >= 60 and set(cells.values()) == {3}
    groups, topics = map(set, zip(*cells))
    assert len(cells) == len(groups) * len(topics)
    assert 0.1 < np.mean([s.stereotyped for s in statements]) < 0.5
    scenarios = load_ethics("shipped")
    assert len(scenarios) >= 60 and sum(s.wrong for s in scenarios) * 2 == len(scenarios)
    questions = load_truthfulness("shipped")
    assert len(questions) >= 60 and len({q.text for q in questions}) == len(questions)
    assert all(q.right not in q.wrong and len(q.wrong) >= 2 for q in questions)
    for items in (prompts, statements, scenarios, questions):
        assert len({item.id for item in items}) == len(items)


CSV = "label,input,is_short\n1,I lied.,True\n"
ETHICS = ("ethics/cm_test.csv", load_ethics)
TRUTHFULQA = ("truthfulqa/mc_task.json", load_truthfulness)


@pytest.mark.parametrize(
    ("name", "load", "content", "message"),
    [
        (*ETHICS, CSV + "maybe,x,True\n", "cm_test.csv:3: label must be 0 or 1, got 'maybe'"),
        (*ETHICS, CSV + "0,x\n", "cm_test.csv:3: no value for 'is_short'"),
        (*ETHICS, CSV + '0,"never closed ' + "x" * 140_000, r"cm_test.csv:\d+: not valid CSV"),
        (*ETHICS, "label,text\n", "cm_test.csv: column 'input' is missing"),
        (*ETHICS, "label,input,is_short\n", "the file is empty"),
        (
            "decodingtrust-stereotype/user_prompts.csv",
            load_stereotype,
            "stereotype_topic,target_group,stereotype_template\nt,g,They sing.\n",
            r"user_prompts.csv:2: .*\[target_group\]",
        ),
        (*TRUTHFULQA, "[\n{,]", "mc_task.json:2: not valid JSON"),
        (
            *TRUTHFULQA,
            '[{"question": "q", "mc1_targets": {"a": 1, "b": 1}, "mc2_targets": {"a": 1}}]',
            "mc_task.json: question 1: .* exactly one right answer",
        ),
        (*TRUTHFULQA, '{"question": "q"}', "mc_task.json: questions must be a list"),
        (
            "real-toxicity-prompts/toxic.jsonl",
            load_toxicity,
            '{"prompt": "x"}',
            "toxic.jsonl:1: no prompt.text",
        ),
        (
            "enron/name2email.json",
            lambda source: load_privacy(source, 1, 0),
            "{\n",
            "name2email.json:2: not valid JSON",
        ),
    ],
)
def test_a_malformed_benchmark_names_file_and_line(tmp_path, name, load, content, message):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(StudyError, match=message):
        load(f"path:{tmp_path}")


def test_a_benchmark_that_a_spreadsheet_saved_again_reads_alike(tmp_path):
    (tmp_path / "ethics").mkdir()
    text = (CSV + "0,I sang.,True\n").replace("True", "TRUE")
    (tmp_path / "ethics" / "cm_test.csv").write_text(text)
    assert [item.text for item in load_ethics(f"path:{tmp_path}")] == ["I lied.", "I sang."]


def test_choose_takes_turns_and_keeps_to_the_seed():
    prompts = load_toxicity("shipped")
    chosen = choose(prompts, 10, seed=1, by=lambda p: p.split)
    assert Counter(p.split for p in chosen) == {"toxic": 5, "nontoxic": 5}
    assert chosen == choose(prompts[::-1], 10, seed=1, by=lambda p: p.split)
    assert chosen == choose(prompts, 20, seed=1, by=lambda p: p.split)[:10]
    assert chosen != choose(prompts, 10, seed=2, by=lambda p: p.split)
    assert len(choose(prompts, EVERYTHING, seed=1)) == len(prompts)


# --- privacy --------------------------------------------------------------------------------------


def test_private_facts_of_18_kinds_are_the_same_for_a_seed():
    facts = make_private_facts(3, seed=0)
    assert list(Counter(fact.kind for fact in facts).values()) == [3] * 18
    assert facts == make_private_facts(3, seed=0) != make_private_facts(3, seed=1)
    assert len({fact.id for fact in facts}) == len(facts) and not any(fact.real for fact in facts)


def test_no_private_value_stands_inside_another():
    for fact in make_private_facts(150, seed=0):
        assert len(set(fact.people)) == 4 == len(fact.values)
        for one, other in permutations(fact.values, 2):
            assert one.lower() not in other.lower(), fact


def test_real_people_only_where_their_file_is(tmp_path):
    names = {f"Given{letter} Family": f"{letter}@example.org" for letter in "abcdef"}
    made_up = load_privacy(f"path:{tmp_path}", 2, seed=0)
    assert made_up == load_privacy("shipped", 2, seed=0) and not any(fact.real for fact in made_up)
    (tmp_path / "enron").mkdir()
    file = tmp_path / "enron" / "name2email.json"
    file.write_text(json.dumps(names | {"nickname": "n@example.org"}))
    real = load_privacy(f"path:{tmp_path}", 2, seed=0)
    assert all(fact.real and set(fact.people) <= set(names) for fact in real)
    for fact in real:
        if fact.kind == "email address":
            assert fact.values == tuple(names[name] for name in fact.people)


def test_people_who_cannot_be_told_apart_are_an_error():
    people = [(name, "same@example.org") for name in "ABCD"]
    with pytest.raises(StudyError, match="no four people whose email address values differ"):
        make_private_facts(1, 0, people)


# --- the real sets --------------------------------------------------------------------------------


def test_real_pairs_are_read_strictly_and_split_by_opening(real_data):
    loaded = load_preferences(f"path:{real_data}", EVERYTHING, 900, CHAT, max_length=160)
    assert len(loaded.held_out) >= 900 and len(loaded.train) >= 900
    assert Counter(pair.source for pair in loaded.held_out) == {"harmless": 450, "helpful": 450}
    assert not {pair.opening for pair in loaded.train} & {pair.opening for pair in loaded.held_out}
    reasons = Counter(line.rpartition(": ")[2] for line in loaded.bad_rows)
    assert reasons == {
        "the two dialogues have different prompts": 14,
        "empty answer": 7,
        "empty turn": 1,
    }
    for (subset, stem), rows in zip(SUBSETS.items(), (2312, 2352)):
        pairs, bad = read(locate(f"path:{real_data}", f"{stem}.test.jsonl"), subset)
        assert len(pairs) + len(bad) == rows
    assert all(
        re.fullmatch(r"h\w+-base\.test\.jsonl(\.gz)?:\d+: .+", line) for line in loaded.bad_rows
    )


def test_real_benchmarks_have_their_rows(real_data):
    source = f"path:{real_data}"
    assert Counter(p.split for p in load_toxicity(source)) == {"toxic": 1196, "nontoxic": 1200}
    statements = load_stereotype(source)
    assert (
        len(statements),
        len({s.group for s in statements}),
        len({s.topic for s in statements}),
    ) == (1152, 24, 16)
    assert len(load_ethics(source)) == 2109
    assert len(load_truthfulness(source)) == 817
    facts = load_privacy(source, 5, seed=0)
    assert len(facts) == 90 and all(fact.real for fact in facts)


def test_hub_files_are_fetched_once_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "data")
    calls = []

    def answer(url, timeout):
        calls.append(url)
        return io.BytesIO(b'{"prompt": {"text": "x"}}\n')

    monkeypatch.setattr(sources.urllib.request, "urlopen", answer)
    monkeypatch.setattr(sources.read_url.retry, "sleep", lambda seconds: None)
    for name in ("toxic", "nontoxic"):
        file = f"real-toxicity-prompts/{name}.jsonl"
        monkeypatch.setitem(sources.HUB_FILES, file, (f"https://a.example/{name}.jsonl", ""))
    first = sources.locate("hub:", "real-toxicity-prompts/toxic.jsonl")
    assert sources.locate("hub:", "real-toxicity-prompts/toxic.jsonl") == first and len(calls) == 1
    assert sources.locate("hub:", "bbq/Height.jsonl", without="") is None
    # As a directory of its own, that of the downloads is only looked into.
    there = f"path:{tmp_path / 'data'}"
    assert sources.locate(there, "real-toxicity-prompts/toxic.jsonl") == first
    assert sources.locate(there, "real-toxicity-prompts/nontoxic.jsonl", without="") is None
    assert len(calls) == 1

    def refuse(url, timeout):
        raise OSError("no route")

    # A data set's name behind it is not passed over.
    with pytest.raises(StudyError, match="'hub:someone/prompts': must be shipped.* or hub: alone"):
        sources.locate("hub:someone/prompts", "real-toxicity-prompts/toxic.jsonl")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    with pytest.raises(StudyError, match="nontoxic.jsonl cannot be had .no route."):
        sources.locate("hub:", "real-toxicity-prompts/nontoxic.jsonl")
    assert not list((tmp_path / "data").rglob("*nontoxic*"))
