"""From a model's name to its files, config and weights: folders, .gguf files, `smollm2`, hub ids and `random:NAME`.

It knows where models come from, not how they run, and imports torch only to load weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minillm.config import Configs, ModelConfig
from minillm.errors import CheckpointError, DownloadError, ModelNotFoundError
from minillm.model.checkpoint_config import config_from_folder, config_from_gguf
from minillm.model.download import SMOLLM2, Progress, cached_path, fetch, is_intact
from minillm.model.gguf import GGUFFile

if TYPE_CHECKING:
    from minillm.model.transformer import Transformer

__all__ = ["DEFAULT_MODEL", "ModelFiles", "default_cache_dir", "load_config", "load_weights", "pull", "resolve"]

DEFAULT_MODEL = "smollm2"
RANDOM = "random:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja")
HUB_IGNORED = ("consolidated*",)
"""The same weights once more, under other names."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model that was found: what kind it is and where it lies."""

    name: str
    kind: Literal["folder", "gguf", "random"]
    path: Path | None = None
    """The folder or file; None for random weights."""

    @cached_property
    def gguf(self) -> GGUFFile:
        """The file with its header read (kind gguf)."""
        assert self.path is not None and self.kind == "gguf"
        return GGUFFile(self.path)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """A GGUF file's metadata, its vocabulary included; empty for other kinds."""
        return self.gguf.metadata if self.kind == "gguf" else {}

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary of a random model, which has no tokeniser of its own; None for other kinds."""
        return load_config(self).vocab_size if self.kind == "random" else None


def default_cache_dir() -> Path:
    """Where downloads are kept unless a caller says otherwise."""
    return Path.home() / ".cache" / "minillm"


def resolve(name: str, *, cache_dir: Path | None = None, progress: Progress | None = None) -> ModelFiles:
    """Find a model by name, downloading it if need be.

    Raises ModelNotFoundError, CheckpointError (a path without a model) or DownloadError.
    """
    if name.startswith(RANDOM):
        if Configs.find(name.removeprefix(RANDOM)) is None:
            raise ModelNotFoundError(f"no shape called {name!r}; known are {', '.join(random_names())}")
        return ModelFiles(name=name, kind="random")
    if name == DEFAULT_MODEL:
        path = pull(name, cache_dir=cache_dir, progress=progress, verify=False)
        return ModelFiles(name=name, kind="gguf", path=path)
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if name and os.path.isdir(path):  # False, as Path.is_dir is not, for a name that no system takes
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json; give a Hugging Face model folder or a .gguf file")
        return ModelFiles(name=name, kind="folder", path=path)
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a .gguf file; give that, or the folder that holds config.json")
        return ModelFiles(name=name, kind="gguf", path=path)
    if path.suffix != ".gguf" and HUB_ID.fullmatch(name):
        return ModelFiles(name=name, kind="folder", path=from_hub(name))
    raise ModelNotFoundError(
        f"no model {name!r}: give {DEFAULT_MODEL}, a folder with config.json and *.safetensors, a .gguf file, "
        f"a hub id (owner/name), or one of {', '.join(random_names())}"
    )


def random_names() -> list[str]:
    """Every `random:NAME`."""
    return [RANDOM + name for name in Configs.names()]


def pull(name: str, *, cache_dir: Path | None = None, progress: Progress | None = None, verify: bool = True) -> Path:
    """Path of a downloadable model in the cache, fetched first if it is absent or damaged.

    `verify` looks at the SHA-256 of what is there; without it, which starts a model sooner, at the size alone.
    Raises ModelNotFoundError for any name but the default model's, and DownloadError.
    """
    if name != DEFAULT_MODEL:
        raise ModelNotFoundError(f"{name!r} cannot be pulled; {DEFAULT_MODEL} can")
    folder = default_cache_dir() if cache_dir is None else cache_dir
    path = cached_path(SMOLLM2, folder)
    is_usable = path is not None and (not verify or is_intact(SMOLLM2, path))
    return path if path is not None and is_usable else fetch(SMOLLM2, folder, progress)


def from_hub(name: str) -> Path:
    """Folder of a hub model in Hugging Face's own cache: safetensors, configs and templates, nothing that is code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(f"no model {name!r} here or on the hub, or it needs a login: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(f"{name!r} is no folder here and the hub did not give it: {error}") from error


def load_config(files: ModelFiles) -> ModelConfig:
    """The model's shape. Raises CheckpointError for models that cannot run exactly."""
    if files.kind == "random":
        config = Configs.find(files.name.removeprefix(RANDOM))
        assert config is not None
        return config
    if files.kind == "gguf":
        return config_from_gguf(files.gguf)
    assert files.path is not None
    return config_from_folder(files.path)


def load_weights(model: Transformer, files: ModelFiles, *, seed: int = 0) -> None:
    """Fill a model that was built from `load_config(files)`; `seed` draws random weights. Raises CheckpointError."""
    from minillm.model.weights import fill_random, fill_stored, read_safetensors

    if files.kind == "random":
        fill_random(model, seed)
    elif files.kind == "gguf":
        fill_stored(model, files.gguf.stored(), str(files.path))
    else:
        assert files.path is not None
        fill_stored(model, read_safetensors(files.path), str(files.path))
