"""Config loading: all problems at once, and lossless round trips."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid.config import DERIVED, RENAMED, Config, differences, dump, from_dict, load, to_dict
from hybrid.errors import UserError
from hybrid.llm.known import is_path

KEYS = [(section, key) for section, keys in to_dict(Config()).items() for key in keys]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(text) -> a config file of that text."""

    def write(text: str, name: str = "exp.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems(raw: Any) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(raw)
    return str(caught.value)


def test_defaults_are_the_published_recipe() -> None:
    config = Config()
    trm, training = config.trm, config.training
    assert (trm.hidden_size, trm.num_heads, trm.expansion, trm.L_layers) == (512, 8, 4, 2)
    assert (trm.H_cycles, trm.L_cycles, trm.halt_max_steps) == (3, 4, 16)
    assert (trm.halt_exploration_prob, trm.puzzle_emb_ndim, trm.puzzle_emb_len) == (0.1, 512, 16)
    assert (training.batch_size, training.lr, training.puzzle_lr) == (768, 1e-4, 1e-2)
    assert (training.weight_decay, training.puzzle_weight_decay) == (0.1, 0.1)
    assert (training.lr_warmup_steps, training.lr_min_ratio, training.ema_rate) == (2000, 1, 0.999)
    assert (config.data.variants, config.data.max_side) == (1000, 30)
    assert config.evaluation.halt == "published"


def test_all_problems_are_reported_at_once(write: Any) -> None:
    path = write(
        """
        paths: {roots: here}
        data: {training: arc1-training, evaluation: [1], on_overlap: fail}
        trm: {hidden_size: wide, num_heads: 0, seq_len: 5, L_cycle: 4, mlp_t: perhaps}
        training: {lr: [1], steps: 0, epochs: .inf, batch_size: true, weight_decay: .nan}
        evaluation: {halt: fixed, limit: 0}
        clusters: {num_workers: 1}
        logging: loud
        """
    )
    with pytest.raises(UserError) as caught:
        load(path, ["lr=1", "paths.root={", "training.seed=-1", "cluster.num_workers=-2"])
    message = str(caught.value).removeprefix(f"{path}: ").split("; ")
    assert sorted(message) == sorted(
        [
            "override 'lr=1' is not section.key=value",
            "override 'paths.root={': the value is not valid YAML",
            "paths.roots: unknown key, did you mean paths.root?",
            "data.training: input should be a valid list, got 'arc1-training'",
            "data.evaluation.0: input should be a valid string, got 1",
            "data.on_overlap: input should be 'refuse' or 'drop', got 'fail'",
            "trm.hidden_size: input should be a valid integer, unable to parse string as an"
            " integer, got 'wide'",
            "trm.num_heads must be at least 1, got 0",
            "trm.seq_len: derived from data.max_side and cannot be set",
            "trm.L_cycle: unknown key, did you mean trm.L_cycles?",
            "trm.mlp_t: input should be a valid boolean, unable to interpret input, got 'perhaps'",
            "training.lr: input should be a valid number, got [1]",
            "training.steps must be at least 1, got 0",
            "training.epochs must be at most 1e+12, got inf",
            "training.epochs and steps are both given: give one",
            "training.batch_size: must not be a boolean, got True",
            "training.weight_decay must be at least 0, got nan",
            "training.seed must be at least 0, got -1",
            "evaluation.limit must be at least 1, got 0",
            "evaluation.act_steps must be set with halt=fixed, and only then",
            "clusters: unknown key, did you mean cluster?",
            "cluster.num_workers must be at least 0, got -2",
            "logging: must be a section of keys, got 'loud'",
        ]
    )


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_wrong_value_is_reported_with_its_dotted_key(section: str, key: str) -> None:
    wrong = {"a": "mapping"} if key != "space" else {3}
    message = problems({section: {key: wrong}})
    assert message.startswith(f"config: {section}.{key}") and message.endswith(f"got {wrong}")


FLOATS = [(s, k) for s, k in KEYS if isinstance(to_dict(Config())[s][k], float)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("section", "key"), [*FLOATS, ("training", "epochs")])
def test_numbers_are_finite(section: str, key: str, value: float) -> None:
    message = problems({section: {key: value}})
    assert message.startswith(f"config: {section}.{key} must be") and message.endswith(
        f"got {value}"
    )


@pytest.mark.parametrize(("section", "key"), [key for key in KEYS if len(key[1]) > 3])
def test_misspelt_key_error_suggests_the_right_key(section: str, key: str) -> None:
    wrong = key[:2] + "x" + key[2:]
    message = problems({section: {wrong: 1}})
    assert message == f"config: {section}.{wrong}: unknown key, did you mean {section}.{key}?"


def test_wrong_type_does_not_hide_or_add_other_problems() -> None:
    message = problems({"evaluation": {"act_steps": "few", "halt": "fixed", "limit": 0}})
    assert "limit must be at least 1" in message
    assert "with halt=fixed" not in message, "act_steps was given, but with a wrong type"


@pytest.mark.parametrize("dotted", DERIVED)
def test_derived_key_cannot_be_set(dotted: str) -> None:
    section, key = dotted.split(".")
    assert "cannot be set" in problems({section: {key: 1}})
    assert key not in to_dict(Config())[section]
    # It is not suggested as a known key either.
    assert key not in problems({section: {"?": 1}})


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.lr=1e-4", 1e-4),
        ("training.lr=1", 1.0),
        ("training.lr=.5", 0.5),
        ("training.batch_size=12", 12),
        ("training.epochs=null", None),
        ("training.epochs=", None),
        ("training.epochs=2.5", 2.5),
        ("cluster.use_gpu=true", True),
        ("logging.wandb=off", False),
        ("data.training=[a, 'b c']", ("a", "b c")),
        ("data.training=[]", ()),
        ("evaluation.checkpoint=runs/x=y", "runs/x=y"),
        ("evaluation.halt=confident", "confident"),
        ("trm.mlp_t=yes", True),
    ],
)
def test_override_has_the_type_of_its_key(write: Any, override: str, value: Any) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    loaded = getattr(getattr(load(write("training: {epochs: 7}"), [override]), section), key)
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize("text", ["", "training:", "training: {}", "training: {lr: 9}", "{}"])
def test_overrides_replace_file_values_and_the_last_one_wins(write: Any, text: str) -> None:
    config = load(write(text), ["training.lr=1", "training.seed=3", "training.lr=2"])
    assert (config.training.lr, config.training.seed) == (2.0, 3)


def test_duplicate_key_is_rejected(write: Any) -> None:
    with pytest.raises(UserError, match=r"duplicate key training.*line 3"):
        load(write("training: {lr: 1}\ntrm: {}\ntraining: {seed: 1}\n"))


def test_config_is_immutable() -> None:
    config = Config()
    for section in fields(Config):
        part = getattr(config, section.name)
        for key in fields(part):
            with pytest.raises(FrozenInstanceError):
                setattr(part, key.name, getattr(part, key.name))
    with pytest.raises(FrozenInstanceError):
        config.trm = config.trm  # type: ignore[misc]


def test_paths_are_absolute_and_default_to_folders_below_root(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(write("paths: {root: here}"))
    assert config.paths.root == str(tmp_path / "here")
    assert config.data_folder == tmp_path / "here/arc/processed"
    assert config.run_folder == tmp_path / "here/runs/exp"
    assert load(write("")).paths.root == "/data"
    assert load(write("paths: {root: ~/arc}")).paths.root == "/home/somebody/arc"
    apart = load(write("paths: {root: /a, data: d, runs: ~/r}"))
    assert apart.data_folder == tmp_path / "d"
    assert apart.run_folder == Path("/home/somebody/r/exp")


@pytest.mark.parametrize(
    ("dotted", "name", "path"),
    [
        ("trm.init_from", "there", "there"),
        ("trm.init_from", "./there", "CWD/there"),
        ("trm.init_from", "runs/there", "CWD/runs/there"),
        ("trm.init_from", "~/there", "/home/somebody/there"),
        ("trm.init_from", "/there", "/there"),
        ("trm.init_from", "s3://there/x?y=1", "s3://there/x?y=1"),
        ("llama.model", "owner/there", "owner/there"),
        ("llama.model", "there", "there"),
        ("llama.model", "./there", "CWD/there"),
        ("llama.model", "~/there", "/home/somebody/there"),
        ("llama.model", "there.gguf", "CWD/there.gguf"),
    ],
)
def test_folder_is_recognized_by_its_name_alone(
    dotted: str, name: str, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The content of the working directory is ignored, because a worker has another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    section, key = dotted.split(".")
    for _ in range(2):
        config = from_dict({section: {key: name}})
        assert getattr(getattr(config, section), key) == path.replace("CWD", str(tmp_path))
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "owner" / "there").mkdir(exist_ok=True, parents=True)
        (tmp_path / "there.gguf").touch()


def test_run_name_defaults_to_the_config_file_name(write: Any) -> None:
    assert load(write("", "trm_arc9.yaml")).logging.run == "trm_arc9"
    assert load(write("logging: {run: mine}", "trm_arc9.yaml")).logging.run == "mine"


@pytest.mark.parametrize("name", ["a/b", "..", ".", "/", "../a", "a\0b"])
def test_run_name_cannot_leave_the_run_folder(name: str) -> None:
    assert "logging.run must be a plain name" in problems({"logging": {"run": name}})


def test_differences_are_listed_by_key() -> None:
    old, new = (
        to_dict(Config()),
        to_dict(from_dict({"training": {"lr": 2}, "trm": {"mlp_t": True}})),
    )
    assert differences(old, new, ["training", "trm"]) == [
        "training.lr: 0.0001 -> 2.0",
        "trm.mlp_t: False -> True",
    ]
    assert differences(old, new, ["data"]) == []
    del old["training"]["lr"]
    assert differences(old, new, ["training"]) == ["training.lr: None -> 2.0"]


NAMES = st.text(max_size=8)
COUNTS = st.integers(1, 10**12)
POSITIVE = st.floats(0, 1e300)
SHARES = st.floats(0, 1)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def both(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda pair: pair[0] | pair[1])


def keys(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(values)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).map(
    lambda n: {
        "num_heads": n[0],
        "hidden_size": 2 * n[0] * n[1],
        "puzzle_emb_ndim": n[0] * n[2],
        "puzzle_emb_len": n[2],
    }
)
LENGTH = keys(steps=COUNTS, epochs=st.none()) | keys(steps=st.none(), epochs=st.floats(0, 1e12))
HALT = keys(halt=st.sampled_from(["published", "confident"]), act_steps=st.none()) | keys(
    halt=st.just("fixed"), act_steps=COUNTS
)
READS = keys(
    frozen=st.booleans(),
    prompt_cache=st.just(False),
    prefix=st.sampled_from(["attempt", "problem"]),
) | keys(frozen=st.just(True), prompt_cache=st.booleans(), prefix=st.just("attempt"))
VALID = {
    "paths": keys(
        root=NAMES,
        **dict.fromkeys(("data", "runs", "models", "prompt_cache"), maybe(NAMES)),
    ),
    "data": both(
        keys(evaluation=st.lists(NAMES), hold_out_tasks=st.just(0))
        | keys(evaluation=st.just([]), hold_out_tasks=COUNTS),
        keys(
            training=st.lists(NAMES, min_size=1),
            variants=st.integers(0, 10**6),
            max_side=st.integers(1, 30),
            canvas=st.sampled_from(["full", "bucketed"]),
            on_overlap=st.sampled_from(["refuse", "drop"]),
            hold_out_demos=st.integers(0, 10),
            seed=st.integers(0, 2**63),
        ),
    ),
    "trm": both(
        SIZES,
        keys(
            expansion=st.floats(1e-6, 1e6),
            L_layers=COUNTS,
            H_cycles=COUNTS,
            L_cycles=COUNTS,
            halt_max_steps=COUNTS,
            halt_exploration_prob=SHARES,
            pos_encodings=st.sampled_from(["rope", "learned", "none"]),
            rope_theta=st.floats(1, 1e9),
            rms_norm_eps=SHARES,
            mlp_t=st.booleans(),
            init_from=maybe(NAMES.filter(lambda name: "/" not in name)),
            forward_dtype=st.sampled_from(["auto", "float32", "bfloat16", "float64"]),
        ),
    ),
    "training": both(
        LENGTH,
        keys(
            batch_size=COUNTS,
            lr=POSITIVE,
            puzzle_lr=POSITIVE,
            weight_decay=POSITIVE,
            puzzle_weight_decay=POSITIVE,
            beta1=st.floats(0, 0.999),
            beta2=st.floats(0, 0.999),
            lr_warmup_steps=COUNTS,
            lr_min_ratio=SHARES,
            ema_rate=st.floats(0, 0.9999),
            seed=st.integers(0, 2**63),
            save_every=COUNTS,
            keep_checkpoints=COUNTS,
            train_accuracy_pairs=COUNTS,
            variants=maybe(COUNTS),
            freeze_weights_fraction=SHARES,
            micro_batch_size=maybe(st.integers(1, 10**6)),
            clip_norm=maybe(st.floats(1e-9, 1e9)),
            blank_puzzle_prob=SHARES,
            max_attempts=COUNTS,
            act_steps=COUNTS,
            bptt_attempts=COUNTS,
            recompute=st.booleans(),
        ),
    ),
    "llama": both(
        READS,
        keys(
            model=st.text(min_size=1, max_size=8).filter(lambda name: not is_path(name)),
            revision=maybe(NAMES),
            lr=POSITIVE,
            dtype=st.sampled_from(["auto", "float32", "bfloat16", "float64"]),
            max_prompt_tokens=st.integers(16, 10**6),
            max_new_tokens=st.integers(0, 10**6),
            batch_size=COUNTS,
        ),
    ),
    "adapter": keys(
        hidden=COUNTS,
        layers=st.integers(2, 8),
        prefix_tokens=st.integers(1, 256),
        inject=st.sampled_from(["none", "carry", "input", "both"]),
        lr=POSITIVE,
    ),
    "feedback": keys(
        source=st.sampled_from(["none", "confidence", "vote", "demos", "oracle"]),
        threshold=SHARES,
        history=st.integers(0, 99),
        cells=st.integers(0, 5),
    ),
    "evaluation": both(
        HALT,
        keys(
            checkpoint=maybe(NAMES),
            variants=maybe(COUNTS),
            batch_size=COUNTS,
            limit=maybe(COUNTS),
            max_attempts=maybe(COUNTS),
            puzzle_ids=st.sampled_from(["trained", "blank"]),
            text=st.sampled_from(["own", "shuffled"]),
            baseline=st.booleans(),
            compare_to=st.lists(NAMES),
        ),
    ),
    "cluster": both(
        st.tuples(st.integers(1, 99), st.integers(0, 99)).map(
            lambda n: {"num_workers": n[0] + n[1], "min_workers": n[0]}
        )
        | keys(num_workers=st.integers(0, 99), min_workers=st.none()),
        keys(
            use_gpu=st.booleans(),
            compile=maybe(st.booleans()),
            cpus_per_worker=st.floats(0.01, 99),
            max_failures=st.integers(-1, 99),
        ),
    ),
    "sweep": keys(
        space=st.just({}) | st.just({"adapter.lr": {"loguniform": [1e-4, 1e-2]}}),
        num_samples=st.integers(1, 10**6),
        hold_out_tasks=COUNTS,
        search=st.sampled_from(["random", "optuna"]),
        scheduler=st.sampled_from(["asha", "none"]),
        grace_period=maybe(COUNTS),
        reduction_factor=st.integers(2, 99),
        max_concurrent_trials=maybe(COUNTS),
        seed=st.integers(0, 2**32 - 1),
    ),
    "logging": keys(
        run=st.text("abc.-_ é", max_size=8).filter(lambda name: name not in (".", "..")),
        every=COUNTS,
        wandb=st.booleans(),
    ),
}


@settings(max_examples=100, deadline=None)
@given(raw=keys(**VALID))
def test_config_round_trip_is_lossless(raw: dict[str, dict[str, Any]]) -> None:
    assert {(section, key) for section in raw for key in raw[section]} == set(KEYS), "see VALID"
    config = from_dict(raw)
    assert {**to_dict(config), "paths": raw["paths"]} == raw
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(dump(config))) == config
    # As in state.json.
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=4)
    | st.sampled_from([key for _, key in KEYS])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
SECTIONS = st.sampled_from([*VALID, "trms"])
JUNK_KEYS = st.sampled_from([key for _, key in KEYS]) | SCALARS


@settings(max_examples=400, deadline=None)
@given(
    raw=st.dictionaries(SCALARS | SECTIONS, JUNK, max_size=3)
    | st.dictionaries(SECTIONS, st.dictionaries(JUNK_KEYS, JUNK, max_size=4), max_size=3)
)
@example(raw={"paths": {"root": "~nobody\n"}})
@example(raw={"paths\n": 1})
@example(raw={"training": {"steps": 10**400}})
@example(raw={"logging": {"run": "a\u2028b/"}})
def test_junk_gives_one_error_line_and_never_crashes(raw: dict[Any, Any]) -> None:
    try:
        from_dict(raw)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith("config: ")


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text("abc:-{}[]!&*'\"\n 01.x_,?|>%@~<", max_size=30), value=st.text())
@example(text="!!int ''", value="!!bool x")
@example(text="!!timestamp x", value="0x_")
@example(text="[" * 3000, value="{" * 3000)
@example(text="&a [*a]", value="1" * 5000)
@example(text="? [a]\n: b", value="2001-99-99")
@example(text="1: 2", value="\0")
def test_any_file_or_override_text_gives_at_most_one_error_line(
    tmp_path_factory: pytest.TempPathFactory, text: str, value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        load(path, [f"training.lr={value}", value])
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_key_error_names_the_new_key(old: str, new: str) -> None:
    section, key = old.split(".")
    with pytest.raises(UserError) as error:
        from_dict({section: {key: 1}})
    assert str(error.value) == f"config: {old}: renamed, use {new}"
    section, key = new.split(".")
    assert key in to_dict(from_dict({}))[section]
