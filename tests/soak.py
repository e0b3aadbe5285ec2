"""Trouble on purpose, for hours, in a copy of the checkout: kills, two makes at once, power cuts,
full disks, flipped bits. ``python tests/soak.py --profile smoke --kills 30 --flips 200``.

Each kind is tried on a run of the profile; what is right is in the tables of an undisturbed one.
Prints how often a kind was *tried*; how often it was *noticed* (a line named the file or the
trouble); *mended* (the same command, given again, ended in the same tables); *harmless* (nothing
was said and the tables are equal); and *lost* (other tables, a traceback, or a command that does
not mend). Exit code 1 where something was lost. Power cuts and full disks need root, for ``mount``,
and are said to be skipped without.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
from rlhf_trust import ROOT
from rlhf_trust.artifacts import file_sha256

OUTCOMES = ("tried", "noticed", "mended", "harmless", "lost")
GIB = 1 << 30


class Soak:
    """A checkout of its own, its undisturbed tables, and a tally."""

    def __init__(self, profile: str, stages: str, folder: Path, seed: int):
        self.profile, self.stages, self.study = profile, stages, folder / "study"
        self.random, self.tally = random.Random(seed), {}
        if not self.study.exists():
            subprocess.run(["git", "clone", "--quiet", ROOT, self.study], check=True)
            (self.study / ".venv").symlink_to(ROOT / ".venv")
            for name in ("pyproject.toml", "constraints.txt"):  # older than what is installed
                os.utime(self.study / "lib" / name, (0, 0))
            # The models of packages, which need not be fetched again.
            shutil.copytree(ROOT / "build" / "base", self.study / "build" / "base")
        self.build = self.study / "build" / profile
        self.whole = folder / "whole"
        if not self.whole.exists():
            print("an undisturbed run first", flush=True)
            code, said = self.make()
            if code:
                sys.exit(f"error: the undisturbed run failed:\n{said[-2000:]}")
            shutil.copytree(self.build, self.whole)
        self.tables = self.read_tables(self.whole)

    def start(self) -> subprocess.Popen:
        """``make reproduce`` in a process group of its own, as a terminal starts it."""
        # What the checkout's own .venv imports is this copy's library.
        environment = os.environ | {"PYTHONPATH": str(self.study / "lib")}
        command = ["make", "reproduce", f"PROFILE={self.profile}"]
        command += [f"STAGES={self.stages}"] if self.stages else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            command, cwd=self.study, env=environment, start_new_session=True, **pipes
        )

    def make(self, kill_after: float | None = None) -> tuple[int, str]:
        """Its exit code and what it printed; killed with all its children after some seconds."""
        running = self.start()
        try:
            said, _ = running.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            said, _ = running.communicate()
        return running.returncode, said

    @staticmethod
    def read_tables(build: Path) -> dict[str, str]:
        return {path.name: file_sha256(path) for path in sorted(build.glob("tables/*.csv"))}

    def count(self, kind: str, *outcomes: str, about: str = "") -> None:
        self.tally.setdefault(kind, Counter()).update(("tried", *outcomes))
        print(f"{kind}: {', '.join(outcomes)} {about}".rstrip(), flush=True)

    def whole_again(self) -> None:
        """The build as the undisturbed run left it."""
        for part in self.build.iterdir() if self.build.exists() else ():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        shutil.copytree(self.whole, self.build, dirs_exist_ok=True)

    def undo(self, number: int) -> None:
        """Take ``number`` random notebooks away, so that they run again."""
        notebooks = sorted(self.build.glob("notebooks/[0-9]*.ipynb"))
        for notebook in self.random.sample(notebooks, number):
            notebook.unlink()

    def judge(self, kind: str, said: str, noticed: bool, about: str = "") -> None:
        """Count what came of some trouble: is everything as it was once the command ran again?"""
        code, again = self.make()
        equal = code == 0 and self.read_tables(self.build) == self.tables
        broken = "Traceback" in said + again or any(
            not path.stat().st_size for path in self.build.rglob("*.csv")
        )
        if broken or not equal:
            self.count(kind, "lost", about=f"{about}: {(said + again)[-600:]}")
        else:
            self.count(kind, *(("noticed", "mended") if noticed else ("harmless",)), about=about)

    # --- the kinds ------------------------------------------------------------------------------

    def kills(self, number: int) -> None:
        """One run from nothing, killed again and again, and then left to end."""
        shutil.rmtree(self.build)
        for _ in range(number):
            code, said = self.make(self.random.uniform(2, 90))
            if code == 0:
                self.undo(3)
            outcome = "lost" if "Traceback" in said else "noticed"
            self.count("kill", outcome, about=said.strip().rpartition("\n")[2][:100])
        self.judge("after all kills", "", True)

    def two_at_once(self, number: int) -> None:
        for _ in range(number):
            self.whole_again()
            self.undo(4)
            both = [self.start(), self.start()]
            said = "".join(running.communicate()[0] for running in both)
            self.judge("two makes at once", said, any(running.returncode for running in both))

    def flips(self, number: int) -> None:
        """One bit of one file, of every kind of product in turn."""
        self.whole_again()
        kinds: dict[str, list[Path]] = {}
        for path in sorted(self.build.rglob("*")):
            if path.is_file() and path.stat().st_size:
                parts = path.relative_to(self.build).parts
                kinds.setdefault(f"{parts[0]} {path.suffix}", []).append(path)
        for turn in range(number):
            kind = sorted(kinds)[turn % len(kinds)]
            path = self.random.choice(kinds[kind])
            data = bytearray(path.read_bytes())
            place = self.random.randrange(8 * len(data))
            data[place // 8] ^= 1 << place % 8
            path.write_bytes(data)
            self.undo(1)
            _, said = self.make()
            name = path.relative_to(self.build)
            self.judge(f"flipped bit in {kind}", said, path.name in said, f"{name}, bit {place}")
            self.whole_again()

    def mounted(self, kind: str, number: int, trouble: Callable[[Path], None], *options) -> None:
        """The build on a file system of its own, on which ``trouble`` happens."""
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / "image"
            for _ in range(number):
                with image.open("wb") as file:
                    file.truncate(8 * GIB)
                subprocess.run(["mkfs.ext4", "-q", image], check=True)
                shutil.rmtree(self.build, ignore_errors=True)
                self.build.mkdir(parents=True)
                mount = ["mount", "-o", ",".join(("loop", *options)), image, self.build]
                if subprocess.run(mount, capture_output=True).returncode:
                    print(f"{kind}: skipped, mount is not allowed here")
                    return
                try:
                    self.whole_again()
                    os.sync()
                    trouble(image)
                finally:
                    subprocess.run(["umount", "--lazy", self.build], check=True)

    def power_cuts(self, number: int) -> None:
        """What a disk holds at one moment, with everything lost that was not brought to it."""

        def cut(image: Path) -> None:
            self.undo(3)
            os.sync()
            running = self.start()
            time.sleep(self.random.uniform(10, 90))
            frozen = image.with_name("frozen")
            subprocess.run(["cp", "--sparse=always", image, frozen], check=True)
            os.killpg(running.pid, signal.SIGKILL)
            said, _ = running.communicate()
            subprocess.run(["umount", "--lazy", self.build], check=True)
            subprocess.run(["mount", "-o", "loop", frozen, self.build], check=True)
            self.judge("power cut", said.replace("Traceback", ""), True)
            frozen.unlink()

        # Late to the disk, so that only what asks for it is there.
        self.mounted("power cut", number, cut, "commit=600")

    def full_disks(self, number: int) -> None:
        def fill(image: Path) -> None:
            self.undo(3)
            ballast = self.build / "ballast"
            free = shutil.disk_usage(self.build).free - self.random.randrange(1 << 22)
            with suppress(OSError), ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free)
            code, said = self.make()
            ballast.unlink()
            self.judge("full disk", said, bool(code), re.sub(r"\s+", " ", said[-120:]))

        self.mounted("full disk", number, fill)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--stages", default="", help='some notebooks alone: "01-sft 90-report"')
    parser.add_argument("--folder", type=Path, help="kept and used again; by default a new one")
    parser.add_argument("--seed", type=int, default=0)
    kinds = {"kills": 30, "two-at-once": 2, "power-cuts": 3, "full-disks": 10, "flips": 200}
    for kind, number in kinds.items():
        parser.add_argument(f"--{kind}", type=int, default=number)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as new:
        soak = Soak(given.profile, given.stages, (given.folder or Path(new)).resolve(), given.seed)
        for kind in kinds:
            name = kind.replace("-", "_")
            if number := getattr(given, name):
                getattr(soak, name)(number)
    table = pd.DataFrame(soak.tally).T.reindex(columns=OUTCOMES).fillna(0).astype(int)
    print(table.rename_axis("kind").reset_index().to_string(index=False))
    return int(table["lost"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
