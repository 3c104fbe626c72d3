"""Do the real SAELens and circuit-tracer read our exports, and compute with them what we compute?

In: nothing. Out: a table of the largest differences; exit status 1 where one is too large or a loader fails, 0
otherwise, also where a package cannot be installed. From the root of the repository:
`python -m tests.compatibility.check_exports`.

The two libraries pin other versions of transformers and TransformerLens than ours, so each gets an environment of its
own, around our build of torch, in which `load_*.py` next to this file runs. The environments are kept for the next
time, one for each version (1.5 GB in all).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from tests.compatibility.prepared import prepare

KEPT = Path(__file__).parents[2] / ".venv-compatibility"
"""Where the environments are made, or found from last time."""
PACKAGES = {"sae-lens==6.54.12": "load_saelens.py", "circuit-tracer==0.5.0": "load_circuit_tracer.py"}
TOLERANCE = 1e-5


def main() -> int:
    """Prepares the exports, runs every package on them, prints the table; returns the exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "exports"
        ours = prepare(folder)
        passed = [check(package, environment_of(package), folder, ours) for package in PACKAGES]
    return 0 if all(passed) else 1


def environment_of(name: str) -> Path:
    """The folder of an environment for this Python and this torch."""
    return KEPT / f"{name}-python{sys.version_info.major}.{sys.version_info.minor}-torch{version('torch')}"


def check(package: str, environment: Path, folder: Path, ours: dict[str, Tensor]) -> bool:
    """Installs `package`, lets it read the exports and prints a line a loader; False where one gives wrong results."""
    problem = install(package, environment)
    if problem:
        print(f"{package}: could not be installed: {problem}")
        return True
    script = Path(__file__).with_name(PACKAGES[package])
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "TQDM_DISABLE": "1"}
    run = subprocess.run(
        [str(environment / "bin" / "python"), "-I", str(script), str(folder)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        print(f"{package}: FAIL, its loaders raised:\n{run.stderr.strip()}")
        return False
    differences: dict[str, list[float]] = {}
    for name, theirs in load_file(folder / f"{package.partition('==')[0]}.safetensors").items():
        how, _, what = name.partition(":")
        differences.setdefault(how, []).append(difference(what, theirs, ours[what]))
    passed = True
    for how, found in differences.items():
        close = all(one <= TOLERANCE for one in found)  # False for NaN too
        label = f"{package.partition('==')[0]} {run.stdout.split()[-1]}, {how}"
        verdict = "pass" if close else "FAIL"
        print(f"{label}: {len(found)} compared, max abs difference {max(found):.1e}: {verdict}", flush=True)
        passed &= close
    return passed


def install(package: str, environment: Path) -> str | None:
    """Makes `environment` with `package` and our own torch; returns why it could not, or None."""
    done = environment / "installed"
    if done.is_file():
        return None
    problem = _run([sys.executable, "-m", "venv", str(environment)])
    if problem is None:
        _link_torch(environment)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # Compiled are the modules that are imported, and those then.
        problem = _run([*pip, "--no-compile", package, f"torch=={version('torch')}"])
    if problem is None:
        done.touch()
    return problem


def _run(command: list[str]) -> str | None:
    """Why the command failed, in a line, or None."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit status {run.returncode}"]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])


def _link_torch(environment: Path) -> None:
    """Puts links to our torch where pip finds it installed: it is the largest package, and the same in all of them."""
    ours = distribution("torch")
    (packages,) = environment.glob("lib/python*/site-packages")
    for name in {path.parts[0] for path in ours.files or []} - {".."}:  # a program or two, which are not needed
        (packages / name).symlink_to(str(ours.locate_file(name)))


def difference(what: str, theirs: Tensor, ours: Tensor) -> float:
    """Largest absolute difference.

    Features that theirs has beyond ours are padding and must be 0. Activations are compared after BOS, which
    circuit-tracer leaves out as we do.
    """
    if "acts" in what:
        theirs, ours = theirs[1:], ours[1:]
    return (theirs - pad(ours, (0, theirs.shape[-1] - ours.shape[-1]))).abs().max().item()


if __name__ == "__main__":
    sys.exit(main())
