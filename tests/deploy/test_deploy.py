"""The deployment files, checked as far as they can be without a cloud: schema, names that must agree, a dry parse."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from models.gguf_files import PACKAGED
from search_spaces.load import load

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def pins(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)


PINS = pins("requirements.txt")


@pytest.fixture(scope="module")
def rayjob() -> dict:
    claim, job = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    assert (claim["kind"], job["kind"], job["apiVersion"]) == ("PersistentVolumeClaim", "RayJob", "ray.io/v1")
    return {"claim": claim, **job["spec"]}


def pods(rayjob: dict) -> list[dict]:
    cluster = rayjob["rayClusterSpec"]
    return [one["template"]["spec"] for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def asked(command: str) -> tuple[str, list[str]]:
    """The CONFIG and the overrides of a `python -m jobs sweep` command, without its options."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "jobs", "sweep"], command
    config, *rest = words[4:]
    if "--address" in rest:
        at = rest.index("--address")
        assert rest[at + 1] == "auto"
        del rest[at : at + 2]
    return config, rest


def test_the_cluster_file_is_what_ray_up_takes():
    described = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    # Found, not imported: Ray fixes its authentication when it is imported, and other tests choose that.
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(described, schema)
    with pytest.raises(jsonschema.ValidationError):  # so that the line above can fail
        jsonschema.validate({**described, "max_workers": "eight"}, schema)
    assert described["head_node_type"] in described["available_node_types"]
    (start,) = [line for line in described["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start


def test_the_ray_job_asks_for_a_sweep_that_exists(rayjob):
    config, overrides = asked(rayjob["entrypoint"])
    sweep = load(config, overrides)
    for pod in pods(rayjob):
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount["mountPath"] == sweep.storage.root, "results land on the volume"
        assert volume["name"] == mount["name"]
        assert volume["persistentVolumeClaim"]["claimName"] == rayjob["claim"]["metadata"]["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert rayjob["claim"]["spec"]["accessModes"] == ["ReadWriteMany"], "every node writes"


def test_the_ray_job_is_safe(rayjob):
    assert rayjob["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(rayjob):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for variable in pod["containers"][0]["env"]:
            assert variable["name"] != "HF_TOKEN" or "secretKeyRef" in variable["valueFrom"]


def test_versions_agree(rayjob):
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert rayjob["rayClusterSpec"]["rayVersion"] == PINS["ray[default,tune]"]
    assert "FROM python:3.11-slim" in dockerfile, "the Python of the README"
    makefile = (ROOT / "Makefile").read_text()
    embedded = re.search(r"^EMBEDDED := (\S+)$", makefile, re.MULTILINE)
    assert embedded is not None
    assert embedded[1] in dockerfile
    assert "-t deltascope" in dockerfile
    installed = re.search(
        r"^GEMMA := \$\(foreach part,([\d ]+),(\S+)\$\(part\)==", (ROOT / "Makefile").read_text(), re.M
    )
    assert installed is not None
    modules = [installed[2].replace("-", "_") + part for part in installed[1].split()]
    assert modules == [module for module, _ in PACKAGED["gemma3-270m"].parts]
    assert {pod["containers"][0]["image"] for pod in pods(rayjob)} == {"deltascope:latest"}


def test_the_image_holds_the_repository_and_nothing_private():
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "mlruns/*"} <= set(ignored)
    assert "USER runner" in (DEPLOY / "Dockerfile").read_text()


def test_everything_that_is_installed_has_its_version_fixed():
    """Each package that requirements.txt brings along here is in constraints.txt, with the version that is here."""
    fixed = {canonicalize_name(name): version for name, version in pins("constraints.txt").items()}
    asked, seen = [Requirement(f"{name}=={version}") for name, version in PINS.items()], set()
    while asked:
        one = asked.pop()
        name = canonicalize_name(one.name)
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        package = importlib.metadata.distribution(name)
        assert fixed[name] == package.version.partition("+")[0], f"{name}: make constraints"
        for needed in map(Requirement, package.requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                asked.append(needed)
    assert len(seen) > 2 * len(PINS)


def test_every_installation_is_held_to_the_constraints():
    makefile, dockerfile = (ROOT / "Makefile").read_text(), (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^PIP := (.*\\\n)*.*--constraint constraints\.txt$", makefile, re.MULTILINE)
    assert "$(VENV)/.ready: requirements.txt constraints.txt" in makefile
    assert dockerfile.count("-c constraints.txt") == 2
    assert not [version for version in pins("constraints.txt").values() if "+" in version], "for both builds of torch"
