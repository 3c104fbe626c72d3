"""Trains base and delta transcoders in whatever process group it finds itself in.

In: a folder. Out: in it `INDEX_of_COUNT.safetensors`, what this process has learned, and figures.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sites import Site
from trainers.activations import Pairs
from trainers.base_transcoder import BaseSettings, train_bases
from trainers.delta_data import DeltaData
from trainers.delta_transcoder import DeltaSettings, train_deltas
from trainers.distributed import processes

D_MODEL, DIRECTIONS = 12, 3


def made(tokens: int, seed: int) -> Pairs:
    """Tokens whose outputs follow from a few directions of the inputs."""
    weights, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    reads, writes = (torch.randn(D_MODEL, DIRECTIONS, generator=weights) for _ in range(2))
    x = torch.randn(tokens, D_MODEL, generator=generator)
    y = torch.relu(x @ reads - 1) @ writes.T + 0.1 * torch.randn(tokens, D_MODEL, generator=generator)
    return Pairs([(x, y)])


def main(folder: Path, device: str) -> None:
    group = processes(device)
    train, validation = made(1501, 1), made(400, 2)
    found: dict[str, torch.Tensor] = {}
    # More activations in a batch than the sample that a cut is found from, and fewer.
    for name, width in (("many", 700), ("few", 40)):
        settings = BaseSettings([2.0, 6.0], width=width, epochs=2, batch_size=101, seed=1)
        for number, one in enumerate(train_bases(train, validation, settings, site=Site(0), device=device)):
            found[f"{name}/{number}/W_enc"] = one.transcoder.W_enc
            found[f"{name}/{number}/W_dec"] = one.transcoder.W_dec
            found[f"{name}/{number}/threshold"] = one.transcoder.threshold
            found[f"{name}/{number}/figures"] = torch.tensor([one.facts["val_fvu"], one.facts["val_l0"]])
    unit = sum(y.square().mean().item() for _, y in validation.shards)
    data = DeltaData(train, validation, unit, 1.0, Site(0), "change")
    same = {"d_new": 8, "epochs": 6, "batch_size": 101, "l0_budget": 3.0, "replicas": 2, "patience": 99}
    for threshold in ("calibrated", "learned"):
        asked = [DeltaSettings(lr=lr, sparsity=1e-4, threshold=threshold, **same) for lr in (1e-2, 3e-3)]
        for number, one in enumerate(train_deltas(data, asked, device=device)):
            for replica, delta in enumerate(one.deltas):
                found[f"{threshold}/{number}/{replica}/W_enc"] = delta.W_enc
                found[f"{threshold}/{number}/{replica}/W_dec"] = delta.W_dec
            found[f"{threshold}/{number}/figures"] = torch.tensor(
                [one.figures["val_unexplained"], one.figures["val_l0_delta"]]
            )
    save_file(
        {name: one.contiguous().cpu() for name, one in found.items()},
        folder / f"{group.index}_of_{group.count}.safetensors",
    )
    if group.count > 1:
        torch.distributed.destroy_process_group()


def two(folder: Path, device: str) -> None:
    """Runs `main` in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.trainers.two_processes", str(folder), device],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_two_are_one(folder: Path, device: str) -> None:
    """Both processes learn the same, and within rounding what one does."""
    main(folder, device)
    two(folder, device)
    alone = load_file(folder / "0_of_1.safetensors")
    first, second = (load_file(folder / f"{index}_of_2.safetensors") for index in range(2))
    assert set(first) == set(second) == set(alone)
    for name, one in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], one, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
