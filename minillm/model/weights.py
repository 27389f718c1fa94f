"""Fills a model with weights: from safetensors folders, from any stream of stored tensors, or at random.

One tensor is in memory at a time beside the model. Pickled weights are never opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minillm.errors import CheckpointError
from minillm.model.parallel import Linear, Vector
from minillm.model.stored import DENSE, StoredTensor
from minillm.model.transformer import Transformer

__all__ = ["fill_random", "fill_stored", "read_safetensors"]

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"
"""Beside it may lie an adapter, or the same weights in another layout, which are not the model's."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUM_NAMES = 8
"""Most tensor names in one error."""


@torch.inference_mode()
def fill_stored(model: Transformer, tensors: Iterable[StoredTensor], source: str) -> None:
    """Load every tensor into its place, then lay the weights out for the kernels.

    Raises CheckpointError naming tensors that are missing, left over or of another shape.
    """
    targets = model.targets()
    left_over = []
    for stored in tensors:
        target = targets.pop(stored.name, None)
        if target is not None:
            target.take(stored)
        elif not is_spare(stored.name, model.config.tie_word_embeddings):
            left_over.append(stored.name)
    if targets or left_over:
        missing, extra = listed(list(targets)), listed(left_over)
        raise CheckpointError(
            f"{source} does not fit its config"
            + (f"; missing tensors: {missing}" if targets else "")
            + (f"; left-over tensors: {extra}" if left_over else "")
        )
    model.finish_loading()


def is_spare(name: str, is_tied: bool) -> bool:
    """Whether a checkpoint may hold this tensor without need: a tied output head, or an old rotary buffer."""
    return (is_tied and name == "lm_head.weight") or name.endswith(".rotary_emb.inv_freq")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NUM_NAMES
    return ", ".join(names[:NUM_NAMES]) + (f" and {more} more" if more > 0 else "")


@torch.inference_mode()
def fill_random(model: Transformer, seed: int) -> None:
    """Seeded normal weights, made where the model lives: matrices that keep the size of what they multiply, embeddings
    so small that the layers, not the last token alone, decide the next one, and norms of 1.
    """
    generator = torch.Generator(device=model.cos_sin_EH.device).manual_seed(seed)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, Vector):
                weight.fill_(1.0)
            else:
                deviation = weight.shape[-1] ** -0.5 if isinstance(module, Linear) else 0.02
                weight.normal_(0.0, deviation, generator=generator)
    model.finish_loading()


def read_safetensors(folder: Path) -> Iterator[StoredTensor]:
    """Tensors of a folder's safetensors files, one at a time.

    Raises CheckpointError for files that are missing, truncated, or of a dtype that needs scales.
    """
    for path in safetensors_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in DENSE_DTYPES:
                        raise CheckpointError(
                            f"tensor {name} in {path} has dtype {tensor.dtype}; "
                            "use a checkpoint in float32, bfloat16 or float16"
                        )
                    yield StoredTensor(name, DENSE, tuple(tensor.shape), tensor)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or truncated ({error}); download it again") from error


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder: model.safetensors, else those its index names, or all there are."""
    index, whole = folder / INDEX_NAME, folder / WHOLE_NAME
    if whole.is_file():
        paths = [whole]
    elif index.is_file():
        paths = [folder / name for name in indexed_names(index)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        if not os.path.isfile(path):  # False, as Path.is_file is not, for a name that no system takes
            raise CheckpointError(f"{path} is missing, and {index.name} names it; download the model again")
    if not paths:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if pickled:
            raise CheckpointError(
                f"{folder} has only pickled weights ({listed(pickled)}), which can run code and are never loaded; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{folder} has no *.safetensors file; put the model's weights there")
    return paths


def indexed_names(index: Path) -> list[str]:
    """File names in an index, in order of first use."""
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_plain = all(name == Path(name).name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error
    if not is_plain:
        raise CheckpointError(f"{index} names files outside its folder or of another kind; get the model elsewhere")
    return names
