"""Wrong input to the real jobs: one error line that names the place, exit code 2, no files changed.

Each case breaks one thing in a copy of a small finished experiment, and runs one job.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import EVALUATED, TRAINED, write_tasks

from hybrid.arc import Task
from hybrid.dataset import store

JOBS = Path(__file__).parents[1] / "jobs"
EXPERIMENT = """\
paths: {root: .}
data: {training: [tasks/training], evaluation: [tasks/evaluation], variants: 2, max_side: 5}
trm: {hidden_size: 16, num_heads: 2, expansion: 1, L_layers: 1, H_cycles: 1, L_cycles: 1,
      halt_max_steps: 2, puzzle_emb_ndim: 16, puzzle_emb_len: 1}
training: {batch_size: 6, steps: 1, train_accuracy_pairs: 0}
cluster: {num_workers: 0}
logging: {wandb: false}
"""
FIRST = TRAINED[0]
TASK = f"tasks/training/{FIRST}.json"
DATA = "arc/processed"
RUN = "runs/exp"
STEP = f"{RUN}/checkpoints/step_00000001"
TINY = "llama.model=tiny-random"
HYBRID = ("logging.run=hybrid", TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    """exp.yaml with tasks, dataset, and a TRM and a hybrid run of one step; paths are relative."""
    root = tmp_path_factory.mktemp("finished")
    write_tasks(root / "tasks/training", [arc1[task] for task in TRAINED])
    write_tasks(root / "tasks/evaluation", [arc1[task] for task in EVALUATED])
    (root / "exp.yaml").write_text(EXPERIMENT)
    with contextlib.chdir(root):
        assert [call("prepare"), call("pretrain")] == [0, 0]
        assert call("joint", *HYBRID, "training.max_attempts=2", "trm.init_from=exp") == 0
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the finished experiment, set as the working directory."""
    copy = tmp_path / "root"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


def command_line(job: str, arguments: Sequence[str]) -> list[str]:
    given = () if "--config" in arguments else ("--config", "exp.yaml")
    return [str(JOBS / f"{job}.py"), *given, *arguments]


def call(job: str, *arguments: str) -> Any:
    """Run a job in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command_line(job, arguments))
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(sys.argv[0], run_name="__main__")
    return stopped.value.code


def tree(root: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file, and None for every folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


Spoil = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    job: str
    expected: tuple[str, ...]
    """Substrings of the error line."""
    spoil: Spoil | None = None
    arguments: tuple[str, ...] = ()


def write(path: str, content: str | bytes) -> Spoil:
    def spoil(root: Path) -> None:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(path: str) -> Spoil:
    return lambda root: (root / path).unlink()


def truncate(path: str) -> Spoil:
    return lambda root: os.truncate(root / path, (root / path).stat().st_size // 2)


def flip_bit(path: str) -> Spoil:
    def spoil(root: Path) -> None:
        content = bytearray((root / path).read_bytes())
        content[len(content) // 2] ^= 1
        (root / path).write_bytes(content)

    return spoil


def edit(path: str, change: Callable[[Any], object]) -> Spoil:
    """Edit a JSON file; `change` returns the new value, or None after an in-place change."""

    def spoil(root: Path) -> None:
        value = json.loads((root / path).read_text())
        changed = change(value)
        (root / path).write_text(json.dumps(value if changed is None else changed))

    return spoil


def other_table(root: Path) -> None:
    """Replace a table by one of another schema, with valid digests in dataset.json."""
    path = root / DATA / "variants.parquet"
    pq.write_table(pa.table({"task": [1, 2]}), path)
    meta = store.read_meta(root / DATA)
    meta["files"][path.name] = store.digest(path)
    store.write_meta(root / DATA, meta)


def task_file(*expected: str, change: Callable[[Any], object]) -> Case:
    return Case(job="prepare", expected=(TASK, FIRST, *expected), spoil=edit(TASK, change))


def broken_file(content: str | bytes, *expected: str) -> Case:
    return Case(job="prepare", expected=(TASK, *expected), spoil=write(TASK, content))


TASK_FILES = {
    "ragged": task_file(
        "train[0].input", "ragged", "row 1", change=lambda t: t["train"][0]["input"][1].append(0)
    ),
    "no rows": task_file("test[0].output", change=lambda t: t["test"][0].update(output=[])),
    "an empty row": task_file(
        "train[1].input", "row 0", change=lambda t: t["train"][1].update(input=[[], []])
    ),
    "value 10": task_file(
        "train[0].output", "row 0", "10", change=lambda t: t["train"][0].update(output=[[1, 10]])
    ),
    "value -1": task_file(
        "train[0].output", "-1", change=lambda t: t["train"][0].update(output=[[-1]])
    ),
    "string cell": task_file(
        "train[0].input", "'3'", change=lambda t: t["train"][0].update(input=[["3"]])
    ),
    "float cell": task_file(
        "train[0].input", "1.0", change=lambda t: t["train"][0].update(input=[[1.0]])
    ),
    "boolean cell": task_file(
        "train[0].input", "True", change=lambda t: t["train"][0].update(input=[[True]])
    ),
    "31 rows": task_file(
        "train[0].input", "31 rows", change=lambda t: t["train"][0].update(input=[[0]] * 31)
    ),
    "string grid": task_file("test[0].input", change=lambda t: t["test"][0].update(input="0")),
    "missing key test": task_file("missing key 'test'", change=lambda t: t.pop("test") and None),
    "missing key train": task_file("missing key 'train'", change=lambda t: t.pop("train") and None),
    "no demonstrations": task_file("train", "no demonstr", change=lambda t: t.update(train=[])),
    "no tests": task_file("test", "no tests", change=lambda t: t.update(test=[])),
    "demonstration without output": task_file(
        "train[0]", "'output'", change=lambda t: t["train"][0].pop("output") and None
    ),
    "pair without input": task_file(
        "test[0]", "'input'", change=lambda t: t["test"][0].pop("input") and None
    ),
    "list as a pair": task_file("train[0]", change=lambda t: t.update(train=[[1]])),
    "object as demonstrations": task_file("train", change=lambda t: t.update(train={})),
    "list as a task": task_file("expected a JSON object", change=lambda t: [t]),
    "null": broken_file("null", FIRST),
    "truncated": Case(job="prepare", expected=(TASK, "line 1"), spoil=truncate(TASK)),
    "binary": broken_file(b"\x93NUMPY\xff\x00\x01", "not a JSON text file"),
    "empty file": broken_file("", "not valid JSON"),
    "endless nesting": broken_file("[" * 100_000),
    "NaN": broken_file('{"train": [{"input": [[NaN]]}]}', FIRST),
    "duplicate key": broken_file('{"train": 1, "train": 2}', "'train' appears twice"),
}

KAGGLE = "data.training=[k/x_challenges.json]"


def kaggle(expected: str, challenges: Callable[[Any], object], answers: str | None = None) -> Case:
    """Write a challenges file of one task, and optionally a solutions file."""

    def spoil(root: Path) -> None:
        value = {FIRST: json.loads((root / TASK).read_text())}
        write("k/x_challenges.json", json.dumps(challenges(value) or value))(root)
        if answers is not None:
            write("k/x_solutions.json", answers)(root)

    return Case(job="prepare", expected=("k/x_", expected), spoil=spoil, arguments=(KAGGLE,))


SOURCES = {
    "unknown source": Case(
        job="prepare",
        expected=("'arc1-trainig'", "did you mean 'arc1-training'?"),
        arguments=("data.training=[arc1-trainig]",),
    ),
    "folder without tasks": Case(
        job="prepare", expected=("tasks:", "no task files"), arguments=("data.training=[tasks]",)
    ),
    "two tasks with one id": Case(
        job="prepare",
        expected=("more", f"task {FIRST} differs", "tasks/training"),
        spoil=lambda root: (
            shutil.copytree(root / "tasks/evaluation", root / "more")
            and shutil.move(root / f"more/{EVALUATED[0]}.json", root / f"more/{FIRST}.json")
        ),
        arguments=("data.training=[tasks/training, more]", "data.evaluation=[]"),
    ),
    "training task that is also evaluated": Case(
        job="prepare",
        expected=("data.training", FIRST, "data.on_overlap=drop"),
        arguments=("data.evaluation=[tasks/training]",),
    ),
    "canvas too small": Case(
        job="prepare", expected=("data.max_side=1",), arguments=("data.max_side=1",)
    ),
    "id with a slash": kaggle("'a/b'", lambda tasks: {"a/b": tasks[FIRST]}),
    "no tasks": kaggle("contains no tasks", lambda tasks: tasks.clear()),
    "missing answers": kaggle(f"{FIRST}': no answers", lambda tasks: None, "{}"),
    "too few answers": kaggle("0 answers for", lambda tasks: None, f'{{"{FIRST}": []}}'),
    "answer to an unknown task": kaggle(
        "'x' is not in", lambda tasks: None, f'{{"{FIRST}": [[[1]]], "x": []}}'
    ),
    "contradicting answer": kaggle(
        "test[0]: contradicts", lambda tasks: None, f'{{"{FIRST}": [[[1]]]}}'
    ),
}


def exp(text: str | bytes, *expected: str) -> Case:
    return Case(job="pretrain", expected=("exp.yaml", *expected), spoil=write("exp.yaml", text))


def override(text: str, *expected: str, job: str = "pretrain") -> Case:
    return Case(job=job, expected=expected or (text.partition("=")[0],), arguments=(text,))


CONFIGS = {
    "not YAML": exp("a: [", "not valid YAML", "line 1"),
    "tab": exp("trm:\n\thidden_size: 1", "line 2"),
    "list": exp("[trm]", "list"),
    "word": exp("trm", "str"),
    "binary config": exp(b"\x80\x00\xff", "cannot be read"),
    "unknown section": exp("trms: {}", "trms", "did you mean trm?"),
    "unknown key": exp("trm: {hidden: 8}", "trm.hidden", "did you mean trm.hidden_size?"),
    "number as a section": exp("training: 5", "training: must be a section"),
    "wrong type": exp("training: {lr: fast}", "training.lr", "'fast'"),
    "out of range": exp("data: {max_side: 31}", "data.max_side", "31"),
    "two training lengths": exp("training: {steps: 1, epochs: 1}", "training.epochs and steps"),
    "derived key": exp("trm: {seq_len: 9}", "trm.seq_len", "data.max_side"),
    "duplicate key": exp("trm: {}\ntrm: {}", "duplicate key trm", "line 2"),
    "several problems": exp(
        "trm: {num_heads: 0, x: 1}\ndata: {seed: -1}", "num_heads", "trm.x", "seed"
    ),
    "odd width": exp("trm: {hidden_size: 6, num_heads: 4}", "trm.hidden_size 6"),
    "missing config": Case(
        job="pretrain", expected=("nowhere.yaml",), arguments=("--config", "nowhere.yaml")
    ),
    "folder as a config": Case(
        job="pretrain", expected=("tasks",), arguments=("--config", "tasks")
    ),
    "override without section": override("lr=1", "'lr=1' is not section.key=value"),
    "override without value": override("training.lr", "'training.lr' is not section.key=value"),
    "override that is not YAML": override("training.lr={"),
    "float for an integer": override("training.seed=1.5", "training.seed", "1.5"),
    "infinite value": override("training.lr=.inf"),
    "boolean for a number": override("training.seed=yes"),
    "run outside its folder": override("logging.run=../x"),
    "unknown option": override("--dryrun", "--dryrun"),
}

OUTPUTS = {
    "dataset below a file": override("paths.data=exp.yaml/data", "exp.yaml", job="prepare"),
    "dataset is a file": override("paths.data=exp.yaml", "exp.yaml", job="prepare"),
    "dataset folder has other content": override(
        "paths.data=tasks", "tasks: contains", job="prepare"
    ),
    "dataset in /proc": override("paths.data=/proc/nowhere/x", "/proc/nowhere", job="prepare"),
    "run below a file": override("paths.runs=exp.yaml", "exp.yaml/exp"),
    "run is a file": Case(
        job="pretrain",
        expected=("runs/taken",),
        spoil=write("runs/taken", ""),
        arguments=("logging.run=taken",),
    ),
    "evaluation is a file": Case(
        job="evaluate", expected=(f"{RUN}/evaluation",), spoil=write(f"{RUN}/evaluation", "")
    ),
}


def dataset(name: str, spoil: Spoil, *expected: str, job: str = "pretrain") -> Case:
    return Case(job=job, expected=(f"{DATA}/{name}", *expected), spoil=spoil)


META, TASKS, VARIANTS = (f"{DATA}/{name}" for name in ("dataset.json", *store.TABLES))
DATASETS = {
    "missing dataset in training": override("paths.data=empty", "empty: no dataset here"),
    "missing dataset in evaluation": override(
        "paths.data=empty", "empty: no dataset here", job="evaluate"
    ),
    "dataset.json truncated": dataset("dataset.json", truncate(META), "cannot be read"),
    "dataset.json a list": dataset("dataset.json", write(META, "[]"), "format"),
    "dataset.json nested": dataset("dataset.json", write(META, "[" * 100_000), "cannot be read"),
    "dataset.json of the future": dataset("dataset.json", edit(META, lambda m: m.update(format=9))),
    "dataset.json edited": dataset(
        "dataset.json", edit(META, lambda m: m["config"].update(max_side=6)), "changed"
    ),
    "dataset.json a folder": dataset(
        "dataset.json", lambda root: (root / META).unlink() or (root / META).mkdir()
    ),
    "tasks flipped": dataset("tasks.parquet", flip_bit(TASKS), "changed"),
    "tasks truncated": dataset("tasks.parquet", truncate(TASKS), "changed"),
    "tasks missing": dataset("tasks.parquet", remove(TASKS)),
    "variants flipped": dataset("variants.parquet", flip_bit(VARIANTS), job="evaluate"),
    "variants not Parquet": dataset("variants.parquet", write(VARIANTS, "task,dihedral\n")),
    "variants of another schema": dataset("variants.parquet", other_table, "columns ['task']"),
}


def prepared(*overrides: str) -> Spoil:
    """Prepare another dataset."""

    def spoil(root: Path) -> None:
        assert call("prepare", *overrides) == 0

    return spoil


TRAINING = {
    "no training length": override("training.steps=null", "training.steps or training.epochs"),
    "fewer rows than workers": override(
        "cluster.num_workers=7", "training.batch_size=6", "7 workers"
    ),
    "changed model on resume": override("trm.L_cycles=2", RUN, "trm.L_cycles: 1 -> 2"),
    "changed learning rate on resume": override(
        "training.lr=0.5", RUN, "training.lr: 0.0001 -> 0.5"
    ),
    "data section differs from the dataset": override(
        "data.variants=9", DATA, "data.variants is", "9 here", "prepare another", job="pretrain"
    ),
    "changed data on resume": Case(
        job="pretrain",
        expected=(RUN, "another dataset", "other"),
        spoil=prepared("data.seed=1", "paths.data=other"),
        arguments=("paths.data=other", "data.seed=1"),
    ),
    "only checkpoint is damaged": Case(
        job="pretrain",
        expected=(f"{STEP}/model.safetensors",),
        spoil=flip_bit(f"{STEP}/model.safetensors"),
    ),
}


def checkpoint(name: str, spoil: Spoil, *expected: str) -> Case:
    """Evaluate a damaged checkpoint that the command line names."""
    given = f"evaluation.checkpoint={STEP}"
    return Case(
        job="evaluate", expected=(f"{STEP}/{name}", *expected), spoil=spoil, arguments=(given,)
    )


EVALUATION = {
    "missing checkpoint": override(
        "evaluation.checkpoint=x/y", "x/y: no checkpoint", job="evaluate"
    ),
    "missing run": override("logging.run=other", "runs/other", "no checkpoint", job="evaluate"),
    "folder without a checkpoint": override("evaluation.checkpoint=tasks", "tasks", job="evaluate"),
    "state.json missing": Case(
        job="evaluate",
        expected=(STEP, "state.json is missing"),
        spoil=remove(f"{STEP}/state.json"),
    ),
    "state.json truncated": checkpoint("state.json", truncate(f"{STEP}/state.json")),
    "state.json a list": checkpoint("state.json", write(f"{STEP}/state.json", "[1]")),
    "state.json nested": checkpoint("state.json", write(f"{STEP}/state.json", "[" * 100_000)),
    "state.json edited": checkpoint(
        "state.json", edit(f"{STEP}/state.json", lambda s: s["trm"].update(L_cycles=2)), "damaged"
    ),
    "tensors truncated": checkpoint("model.safetensors", truncate(f"{STEP}/model.safetensors")),
    "tensors flipped": checkpoint("ema.safetensors", flip_bit(f"{STEP}/ema.safetensors")),
    "tensors missing": checkpoint(
        "puzzle_table.safetensors", remove(f"{STEP}/puzzle_table.safetensors")
    ),
    "trained_on.json edited": checkpoint("trained_on.json", write(f"{STEP}/trained_on.json", "[]")),
    "newest checkpoint is damaged and the only one": Case(
        job="evaluate",
        expected=(f"{STEP}/model.safetensors", "damaged"),
        spoil=flip_bit(f"{STEP}/model.safetensors"),
    ),
    "another canvas": Case(
        job="evaluate",
        expected=(STEP, "25 cells", "data.max_side=6"),
        spoil=prepared("data.max_side=6", "paths.data=six"),
        arguments=("paths.data=six", "data.max_side=6"),
    ),
    "no evaluation tasks": Case(
        job="evaluate",
        expected=("none", "no evaluation tasks"),
        spoil=prepared("data.evaluation=[]", "paths.data=none"),
        arguments=("paths.data=none", "data.evaluation=[]"),
    ),
    "data section differs from the dataset": override(
        "data.variants=9", DATA, "data.variants is", "9 here", "prepare another", job="evaluate"
    ),
    "more ACT steps than halt_max_steps": Case(
        job="evaluate",
        expected=("evaluation.act_steps", "3", "2"),
        arguments=("evaluation.halt=fixed", "evaluation.act_steps=3"),
    ),
    "halt=fixed without act_steps": override(
        "evaluation.halt=fixed", "evaluation.act_steps", job="evaluate"
    ),
}


def joint(
    text: str, *expected: str, run: str = "new", job: str = "joint", also: tuple[str, ...] = ()
) -> Case:
    return Case(job=job, expected=expected, arguments=(f"logging.run={run}", TINY, *also, text))


def hybrid(text: str, *expected: str, also: tuple[str, ...] = ()) -> Case:
    return Case(job="evaluate", expected=expected, arguments=(*HYBRID, *also, text))


HYBRIDS = {
    "missing model in training": joint(
        "llama.model=./nowhere", "llama.model", "nowhere: no such file"
    ),
    "unknown LLaMA name": joint(
        "llama.model=meta-llama/Llama-3.2-8B-Instruct", "llama.model", "Llama-3.1-8B-Instruct"
    ),
    "model is neither folder nor GGUF": joint(
        "llama.model=./exp.yaml", "exp.yaml", "folder or a .gguf"
    ),
    "folder that looks like a hub id": joint(
        "llama.model=tasks/training", "llama.model: tasks/training is a folder", "./tasks/training"
    ),
    "folder without a model": joint("llama.model=./tasks", "llama.model", "tasks"),
    "prompt cache of a trained model": joint(
        "llama.prompt_cache=true", "llama.prompt_cache", "frozen", also=("llama.frozen=false",)
    ),
    "adapter with one layer": joint("adapter.layers=1", "adapter.layers", "1"),
    "prompt longer than the positions": joint(
        "llama.max_prompt_tokens=8193", "llama.max_prompt_tokens: 8193", "8192 positions"
    ),
    "prompt and reasoning longer than the positions": hybrid(
        "llama.max_new_tokens=8192", "llama.max_prompt_tokens", "with max_new_tokens", "positions"
    ),
    "halting of the hybrid": hybrid(
        "evaluation.halt=confident", "evaluation.halt=confident", "training.act_steps"
    ),
    "no attempts": joint("training.max_attempts=0", "training.max_attempts", "0"),
    "vote feedback in training": joint(
        "feedback.source=vote", "feedback.source=vote is for evaluation"
    ),
    "demos feedback in training": joint("feedback.source=demos", "feedback.source=demos is for"),
    "unknown feedback": joint("feedback.source=voting", "feedback.source", "'voting'"),
    "missing initial run": joint("trm.init_from=exq", "trm.init_from: exq", "no run with"),
    "initial weights of another size": joint(
        "trm.L_cycles=2",
        "trm.init_from",
        "trm.L_cycles 1 there, 2 here",
        also=("trm.init_from=exp",),
    ),
    "initial weights with another puzzle embedding size": joint(
        "trm.puzzle_emb_ndim=0", "trm.puzzle_emb_ndim 16 there, 0 here", also=("trm.init_from=exp",)
    ),
    "damaged initial checkpoint": Case(
        job="joint",
        expected=(f"{STEP}/ema.safetensors", "damaged"),
        spoil=flip_bit(f"{STEP}/ema.safetensors"),
        arguments=("logging.run=new", TINY, f"trm.init_from={STEP}"),
    ),
    "run of the TRM": joint("training.steps=2", RUN, "kind trm, not hybrid", run="exp"),
    "run of the hybrid": joint(
        "training.steps=2", "runs/hybrid", "kind hybrid, not trm", run="hybrid", job="pretrain"
    ),
    "changed llama section on resume": Case(
        job="joint",
        expected=("runs/hybrid", "llama.prefix: 'attempt' -> 'problem'"),
        arguments=(*HYBRID, "training.max_attempts=2", "llama.prefix=problem"),
    ),
    "prompt cache is disabled": joint(
        "llama.batch_size=2", "llama.prompt_cache is false", job="cache_prompts"
    ),
    "no held-out demonstration": hybrid("feedback.source=demos", "no demonstration was held out"),
    "vote feedback with one variant": hybrid(
        "evaluation.variants=1",
        "feedback.source=vote",
        "one variant",
        also=("feedback.source=vote",),
    ),
    "missing run to compare to": hybrid(
        "evaluation.compare_to=[missing]", "evaluation.compare_to", "runs/missing"
    ),
    "missing model in evaluation": hybrid("llama.model=./nowhere", "llama.model", "nowhere"),
    "too many held-out demonstrations": Case(
        job="prepare",
        expected=("data.hold_out_demos=5", EVALUATED[0]),
        arguments=("data.hold_out_demos=5", "paths.data=held"),
    ),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "task": TASK_FILES,
        "source": SOURCES,
        "config": CONFIGS,
        "output": OUTPUTS,
        "dataset": DATASETS,
        "training": TRAINING,
        "evaluation": EVALUATION,
        "hybrid": HYBRIDS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wrong_input_gives_one_error_line_and_changes_no_file(
    case: Case, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case.spoil:
        case.spoil(root)
    before = tree(root)
    assert call(case.job, *case.arguments) == 2
    check_line(capsys.readouterr().err, case.expected)
    assert tree(root) == before


@pytest.mark.parametrize(
    "name",
    [
        "task: ragged",
        "output: run is a file",
        "evaluation: newest checkpoint is damaged and the only one",
    ],
)
def test_wrong_input_in_a_subprocess_prints_one_line(name: str, root: Path) -> None:
    """A separate process shows output of libraries as well."""
    case = CASES[name]
    assert case.spoil
    case.spoil(root)
    before = tree(root)
    command = [sys.executable, *command_line(case.job, case.arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    check_line(done.stderr, case.expected)
    assert tree(root) == before


def test_missing_config_option_gives_one_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", "training.lr=1"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(JOBS / "prepare.py"), run_name="__main__")
    assert stopped.value.code == 2
    check_line(capsys.readouterr().err, ("--config",))


def test_unmodified_experiment_succeeds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the cases above could fail for another reason."""
    codes = [call(job, "training.steps=2") for job in ("prepare", "pretrain", "evaluate")]
    assert codes == [0, 0, 0]
    assert capsys.readouterr().err == ""


def check_line(text: str, parts: Sequence[str]) -> None:
    assert text.startswith("error: ") and text.endswith("\n"), text
    assert len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text
