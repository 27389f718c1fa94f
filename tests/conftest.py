"""What every test starts from: no network, one thread, Triton's interpreter where there is no GPU, Ctrl-C on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for what tests start as well: threads beyond the cores wait for each other

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test module is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine has no GPUs for."""
    num_gpus = torch.cuda.device_count()
    for marker, needed in (("gpu", 1), ("multigpu", 2)):
        skip = pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {num_gpus}")
        for item in items:
            if marker in item.keywords and num_gpus < needed:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's file, fetched into the cache if it is not there."""
    from minillm.model.sources import pull

    return pull("smollm2")


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2: Path) -> torch.nn.Module:
    """The same file as transformers reads it, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()  # type: ignore[no-any-return]
