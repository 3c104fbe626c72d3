"""Is this machine ready? Devices and what they compute, versions, the embedded model, storage.

In: a storage root. Out: rows of (name of the check, finding, whether it is good).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from jobs.cluster.connection import REPOSITORY
from jobs.commands import device_checks
from jobs.context.workspace import storage_root
from models.errors import ModelError
from models.gguf_files import PACKAGED
from models.sources import check_source

Finding = tuple[str, str, bool]
OPTIONAL = {"gemma3-270m": "gemma3_270m", "google/gemma-2-2b": "gemma2_2b"}
"""Models that only one preset needs."""


def examine(root: str) -> list[Finding]:
    findings = [("python", platform.python_version(), sys.version_info >= (3, 11))]
    findings += _packages()
    findings += _devices()
    for name in (*PACKAGED, *(name for name in OPTIONAL if name not in PACKAGED)):
        who = f" (only the {OPTIONAL[name]} preset needs it)" if name in OPTIONAL else ""
        findings.append(_source(f"{name}{who}", lambda name=name: check_source(name)))
    folder = storage_root(root)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    findings.append(("storage", f"{folder}, {free / 1e9:.0f} GB free", os.access(parent, os.W_OK) and free > 5e9))
    return findings


def _packages() -> list[Finding]:
    """Compares the installed packages with the pinned ones."""
    wrong, count = [], 0
    for line in (REPOSITORY / "requirements.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        if not pinned or line.startswith("#"):
            continue
        count += 1
        try:
            installed = version(name.partition("[")[0]).partition("+")[0]
        except PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            wrong.append(f"{name} {installed}, pinned {pinned}")
    return [("packages", "; ".join(wrong) or f"{count} as pinned", not wrong)]


def _devices() -> list[Finding]:
    import torch

    from trainers.precision import resolve_precision

    findings: list[Finding] = [("cpu", f"{os.cpu_count()} cores, training in {resolve_precision('auto', 'cpu')}", True)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings.append((f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", True))
        findings.append(summary(f"gpu {index}", list(device_checks.examine(f"cuda:{index}"))))
    if not torch.cuda.is_available():
        findings.append(("gpu", "none; everything runs on the CPU", True))
    return findings


def summary(device: str, results: Sequence[device_checks.Finding]) -> Finding:
    """Whether the device computes the same as the CPU and, if not, what differs."""
    wrong = [
        f"{result.check} in {result.precision} differs by {result.difference:.2g} of its size, "
        f"allowed {result.allowed:g}"
        for result in results
        if not result.agrees
    ]
    return (f"{device} computes", "; ".join(wrong) or f"as the CPU does ({len(results)} checks)", not wrong)


def _source(name: str, check) -> Finding:
    try:
        check()
    except ModelError as error:
        return (name, str(error), False)
    return (name, "available", True)
