"""What attention is on CUDA, as far as a CPU goes: flex_attention compiled, its forward pass beside ours.

PyTorch has no backward pass of it for CPUs: that one was not tried anywhere.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepstep.llama.attention import attend
from keepstep.llama.microbatch import Rotation, Sequences, Share, _block_mask, micro_batches, targets_of
from keepstep.llama.shape import ModelShape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here"),
]
SHAPE = ModelShape(layers=1, dim=64, ffn_dim=64, heads=4, kv_heads=2, vocabulary=64, max_seq=256)
CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [Share(), Share(size=2, rank=0), Share(size=2, rank=1)], ids=str)
def test_documents_are_masked_as_without_it(
    share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a context parallel rank, whose queries are a chunk of the head and one of the tail."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    generator = torch.Generator().manual_seed(1)
    documents = torch.tensor([[0] * 100 + [1] * 28 + [2] * 128, [0] * 256], dtype=torch.int32)
    sequences = Sequences(
        tokens=torch.randint(0, 64, (2, 257), generator=generator),
        documents=documents,
        positions=torch.arange(256).expand(2, 256),
    )
    (batch,) = micro_batches(
        sequences, targets_of(sequences), size=2, scale=1.0, rotation=Rotation(SHAPE, CPU),
        dtype=torch.float32, share=share,
    )  # fmt: skip
    mine = share.tokens(2, 256)
    q = torch.randn(len(mine), 4, 16, generator=generator)
    k, v = (torch.randn(512, 2, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        plain = attend(q, k, v, batch)
        flex = attend(q, k, v, replace(batch, mask=_block_mask(documents, mine, CPU)))
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-6)
