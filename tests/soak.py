"""Break a small study on purpose, and hold what it makes against an undisturbed run, byte for byte:
``make soak``, or ``python tests/soak.py --share 0.1`` for about a tenth of the trials.

In a clone of what is committed, with a tiny random model, so that all notebooks run in minutes:
SIGKILLs within stages, two runs at once in one build, power cuts (an unsynced ext4 image is copied,
and the run goes on in the copy), full disks and flipped bits. What mounts needs root, and is
skipped without. Odd rows of data and odd profiles are drawn by hypothesis in tests/faults.

With ``--share`` below 1 a trial does not begin with nothing but with a finished run of which some
late stages are gone, with their products and all kept answers; and bits are flipped in files of
stages that no long chain of others needs. ``--folder`` keeps the clone and its undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
from conftest import save_tiny

ROOT = Path(__file__).resolve().parents[1]
PROFILE = """extends: smoke
all: {model: "path:build/tiny", dtype: float32, max_length: 2000}
"""
LATE = "30", "40", "50"
"""Every share of the trials breaks these."""
UPSTREAM = re.compile("0|1[0-4]|40")
"""What others need: a share of the trials does not run it again."""
KINDS = (
    "models/**/adapter_model.safetensors models/**/head.safetensors models/**/*.json* "
    "generations/cache/* generations/*.jsonl cache/**/* gradients/**/* tables/*.csv "
    "tables/parts/*.csv figures/*.png notebooks/*.ipynb manifests/*.json params/*.yaml"
).split()
"""What bits are flipped in: the kinds of files in a build."""


class Study:
    """A clone of the study and its one build."""

    def __init__(self, folder: Path, given: argparse.Namespace):
        self.folder, self.share, self.limit = folder, given.share, given.limit
        given_up = "DATA=", "SEED=", "SET=", "BEFORE=", "AFTER="
        self.make = ["make", "reproduce", "PROFILE=soak", *given_up, *given.variables]
        self.problems: list[str] = []
        self.build, self.whole = folder / "build" / "soak", folder / "build" / "undisturbed"
        if not (folder / "Makefile").exists():
            run("git", "clone", "--quiet", ROOT, folder)
            (folder / "build").mkdir()
            if (base := ROOT / "build" / "base").is_dir():  # models from packages, fetched already
                (folder / "build" / "base").symlink_to(base.resolve())
            save_tiny("llama", folder / "build" / "tiny", positions=4096)
            (folder / "params" / "soak.yaml").write_text(PROFILE)

    def undisturbed(self) -> None:
        if not self.whole.exists():
            shutil.rmtree(self.build, ignore_errors=True)
            code, said = self.finish(self.start())
            if code != 0:
                raise SystemExit(f"the undisturbed run failed:\n{said}")
            (self.build / "log").write_text(said)
            self.build.rename(self.whole)
        done = re.findall(r"^(\S+): done in (\d+) s", (self.whole / "log").read_text(), re.M)
        self.seconds = {stage: int(seconds) for stage, seconds in done}
        """Of each stage, in the order in which they ended."""
        self.build.mkdir(exist_ok=True)
        print(f"undisturbed, seconds: {self.seconds}", flush=True)

    def start(self, log: str = "log") -> subprocess.Popen:
        """``make reproduce``, the leader of a process group of its own."""
        ours = dict(PYTHON_ENV="active", VIRTUAL_ENV=sys.prefix, OMP_NUM_THREADS="1")
        ours["PYTHONPATH"] = str(self.folder / "lib")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        options = dict(cwd=self.folder, env=inherited | ours, start_new_session=True)
        with (self.folder / log).open("w") as said:
            return subprocess.Popen(self.make, stdout=said, stderr=subprocess.STDOUT, **options)

    def finish(self, make: subprocess.Popen, log: str = "log") -> tuple[int | None, str]:
        """Let make end: its exit code (None: too late, and killed) and what it said."""
        try:
            make.wait(self.limit)
        except subprocess.TimeoutExpired:
            self.kill()
        said = (self.folder / log).read_text(errors="replace")
        if "Traceback" in said or make.returncode and "error: " not in said:
            self.problems.append(f"ended without one line: {said[-2000:]}")
        return make.returncode, said

    def reach(self, make: subprocess.Popen, stage: str) -> bool:
        """Wait until a stage runs, and then for any part of the time that it takes; is make still
        at work?"""
        end = time.monotonic() + self.limit
        while make.poll() is None and f"{stage}: running" not in (self.folder / "log").read_text():
            if time.monotonic() > end:
                return True
            time.sleep(0.2)
        with suppress(subprocess.TimeoutExpired):
            make.wait(random.uniform(0, self.seconds[stage]))
        return make.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Whatever works in the clone: kernels have process groups of their own."""

        def inside(process: psutil.Process) -> bool:
            with suppress(psutil.Error):
                return Path(process.cwd()).is_relative_to(self.folder)
            return False

        return [p for p in psutil.process_iter() if p.pid != os.getpid() and inside(p)]

    def kill(self, make: subprocess.Popen | None = None) -> None:
        """End make's group; without it, all that works in the clone."""
        group = [lambda: os.killpg(make.pid, signal.SIGKILL)]
        for end in group if make else [process.kill for process in self.processes()]:
            with suppress(psutil.Error, ProcessLookupError):
                end()
        time.sleep(0.5)

    def begin(self, lost: list[str], whole: bool = False) -> None:
        """Nothing; or of a share, or ``whole``, the undisturbed build without the stages lost."""
        for path in self.build.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not whole and self.share >= 1:
            return
        shutil.copytree(self.whole, self.build, dirs_exist_ok=True)
        if lost:
            shutil.rmtree(self.build / "generations" / "cache")
        for stage in lost:
            manifest = f"manifests/{stage}.json"
            outputs = json.loads((self.build / manifest).read_text())["outputs"]
            for path in {*outputs, manifest, f"notebooks/{stage}.ipynb"}:
                (self.build / path).unlink()

    def targets(self, count: int) -> list[str]:
        """Stages to break, in the order in which they run."""
        names = random.sample(list(self.seconds), len(self.seconds))
        some = sorted(names, key=lambda stage: stage[:2] not in LATE) * count
        return sorted(some[:count], key=list(self.seconds).index)

    def unmount(self) -> None:
        self.kill()
        while self.build.is_mount():
            run("umount", "--lazy", self.build)

    def outcome(self, tried: int, noticed: int) -> dict[str, int]:
        """Run to the end: either all is as it would have been, or what was tried did harm."""
        code, said = self.finish(self.start())
        problems, self.problems = self.problems, []
        if code != 0:
            problems.append(f"the last run ended with {code}: {said[-2000:]}")
        made, wanted = products(self.build), products(self.whole)
        other = sorted(n for n in made.keys() | wanted.keys() if made.get(n) != wanted.get(n))
        problems += [f"differs: {name}" for name in other]
        empty = [p for p in self.build.rglob("*") if p.is_file() and not p.stat().st_size]
        problems += [f"empty: {path}" for path in empty if path.suffix != ".lock"]
        print("\n".join(problems), flush=True)
        lost = min(tried, len(problems))
        return dict(tried=tried, noticed=noticed, mended=tried - lost, lost=lost)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def products(build: Path) -> dict[str, str]:
    """Tables, models, answers and figures: name → sha256."""
    return {
        path.relative_to(build).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("tables", "models", "generations", "figures")
        for path in (build / folder).rglob("*")
        if path.is_file() and "cache" not in path.parts
    }


def kills(study: Study, count: int) -> dict[str, int]:
    """SIGKILL to make and its launchers; every second time to the kernels as well, which else
    notice by themselves."""
    stages, noticed = study.targets(count), 0
    study.begin(stages)
    for number, stage in enumerate(stages):
        make = study.start()
        noticed += study.reach(make, stage)
        study.kill(None if number % 2 else make)
    return study.outcome(count, noticed)


def at_once(study: Study, count: int) -> dict[str, int]:
    """Two runs in one build, which together make what one makes. (Noticed: one has waited.)"""
    noticed = 0
    for _ in range(count):
        study.begin(study.targets(1))
        for make, log in [(study.start(log), log) for log in ("log", "log2")]:
            code, said = study.finish(make, log)
            study.problems += [f"ended with {code}: {said[-2000:]}"] * (code != 0)
            noticed += "made by another run" in said
    return study.outcome(count, min(noticed, count))


def power_cuts(study: Study, count: int) -> dict[str, int]:
    """What had reached an ext4 image when everything stopped; the run goes on from there."""
    image, stages, noticed = study.folder / "image", study.targets(count), 0
    with image.open("wb") as handle:
        handle.truncate(1 << 30)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop,commit=600", image, study.build)
    study.begin(stages)
    run("sync", "-f", study.build)
    for stage in stages:
        noticed += study.reach(study.start(), stage)
        for process in study.processes():
            process.suspend()
        run("cp", "--sparse=always", image, f"{image}.cut")
        study.unmount()
        os.replace(f"{image}.cut", image)
        run("mount", "-o", "loop,commit=600", image, study.build)  # which replays the journal
    return study.outcome(count, noticed)


def full_disks(study: Study, count: int) -> dict[str, int]:
    """A disk with 0 to 4 MB left: what stops says so in one line, and goes on with space."""
    stages, noticed = study.targets(count), 0
    run("mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", study.build)
    study.begin(stages)
    for stage in stages:
        make, ballast = study.start(), study.build / ".ballast"
        study.reach(make, stage)
        with ballast.open("wb") as handle:
            free = shutil.disk_usage(study.build).free - random.randrange(4 << 20)
            os.posix_fallocate(handle.fileno(), 0, max(free, 1))
        noticed += study.finish(make)[0] != 0
        ballast.unlink()
    return study.outcome(count, noticed)


def breakable(study: Study, kind: str) -> list[Path]:
    """A kind's files; of a share of the trials, without those of stages that others need."""
    outputs = {p.stem: json.loads(p.read_text()) for p in study.build.glob("manifests/*.json")}
    owners = {study.build / name: stage for stage in outputs for name in outputs[stage]["outputs"]}
    files = [path for path in study.build.glob(kind) if path.is_file() and path.stat().st_size]
    late = [path for path in files if not UPSTREAM.match(owners.get(path, path.stem))]
    return late if study.share < 1 else files


def flips(study: Study, count: int, together: int = 26) -> dict[str, int]:
    """Single bits of a finished build, some ``together``, in each kind of product in turn."""
    study.begin([], whole=True)
    outcomes = []
    for first in range(0, count, together):
        flipped, kinds = [], [files for kind in KINDS if (files := breakable(study, kind))]
        for number in range(count)[first : first + together]:
            path = random.choice(kinds[number % len(kinds)])
            flipped.append(path.relative_to(study.build).as_posix())
            data, state = bytearray(path.read_bytes()), path.stat()
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            path.write_bytes(data)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a disk would
        _, said = study.finish(study.start())
        noticed = [name for name in flipped if f"{name}: " in said]
        print(f"not named: {sorted({*flipped} - {*noticed})}", flush=True)
        outcomes.append(study.outcome(len(flipped), len(noticed)))
    return pd.DataFrame(outcomes).sum().to_dict()


TRIALS = {
    "SIGKILL within a stage": (kills, 30),
    "two runs at once": (at_once, 1),
    "power cut": (power_cuts, 5),
    "full disk": (full_disks, 10),
    "flipped bit": (flips, 200),
}
"""Trial → what makes it, and how many there are of it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("variables", nargs="*", help="for make: JOBS=4, STAGES='01-sft 90-report'")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials, up to 1")
    parser.add_argument("--only", default="", help="trials with this in their names")
    parser.add_argument("--folder", type=Path, help="for the clone, which then stays")
    parser.add_argument("--seed", type=int, default=0, help="of what is broken, and when")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of one run of make")
    given = parser.parse_args()
    random.seed(given.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, rows = given.folder or Path(tempfile.mkdtemp(prefix="soak-")), []
    study = Study(folder.resolve(), given)
    try:
        study.undisturbed()
        for name, (trial, count) in TRIALS.items():
            if os.geteuid() and trial in (power_cuts, full_disks):
                print(f"{name}: skipped, since it mounts a file system, which takes root")
            elif given.only in name:
                rows.append({"trial": name} | trial(study, max(1, round(count * given.share))))
                print(rows[-1], flush=True)
                study.unmount()
    finally:
        study.unmount()
        if not given.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print(pd.DataFrame(rows).to_string(index=False))
    return int(any(row["lost"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
