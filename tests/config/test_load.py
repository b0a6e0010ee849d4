"""Configuration: what a file may say, what it means, and that every mistake is named at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mocme_dist.config import Config, dump_config, load_config
from mocme_dist.config.load import parse_config
from mocme_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf8")
    return path


def mistakes(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([], overrides)
    return str(caught.value)


def test_defaults_are_valid():
    assert load_config() == Config()


def test_lambdas_must_rise():
    for weights in ("negatives.weight_easy=1", "negatives.weight_hard=1", "negatives.weight_ambiguous=0.4"):
        assert "expected weight_easy < weight_ambiguous < weight_hard" in mistakes(weights)
    load_config([], ["negatives.weight_easy=0", "negatives.weight_ambiguous=0.1", "negatives.weight_hard=0.2"])


def test_auto_experts_are_as_many_as_modalities():
    def experts(*overrides: str) -> list[int]:
        return [load_config([], [f"experts.{text}" for text in overrides]).experts.count_for(m) for m in (1, 4)]

    assert experts("num_experts=auto") == [1, 4] and experts("num_experts=2") == [2, 2]
    assert experts("num_experts=auto", "kind=identity") == [1, 1]
    assert "set it to 1" in mistakes("experts.kind=identity")
    assert "experts.num_experts" in mistakes("experts.num_experts=0") and "got 'some'" in mistakes(
        "experts.num_experts=some"
    )


def test_files_apply_left_to_right_and_overrides_last(tmp_path):
    first = write(tmp_path / "a.yaml", "train: {epochs: 3, batch_size: 256}\nexperts: {width: 8}\n")
    second = write(tmp_path / "b.yaml", "train:\n  epochs: 4\nmodalities: [structure, text]\n")
    config = load_config([first, second], ["experts.width=16", "train.seed=5", "train.seed=6"])
    assert (config.train.epochs, config.train.batch_size, config.experts.width, config.train.seed) == (4, 256, 16, 6)
    assert config.modalities == ("structure", "text")
    assert load_config([second, first]).train.epochs == 3


def test_empty_files_and_empty_sections_change_nothing(tmp_path):
    assert (
        load_config([write(tmp_path / "a.yaml", ""), write(tmp_path / "b.yaml", "train:\n  # epochs: 3\nrun:\n")])
        == Config()
    )


@pytest.mark.parametrize(
    "text, number",
    [("1e-4", 1e-4), ("1E+2", 100.0), ("1.5e-3", 0.0015), (".5", 0.5), ("2.", 2.0), ("3", 3.0), ("1_000", 1000.0)],
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, number):
    config = load_config(
        [write(tmp_path / "a.yaml", f"train: {{learning_rate: {text}}}\n")], [f"entities.learning_rate={text}"]
    )
    assert (config.train.learning_rate, config.entities.learning_rate) == (number, number)


@pytest.mark.parametrize(
    "text", ["no", "yes", "off", "012", "00.5", "12:30", "12:30:00", "2024-01-01", "0x1f", "1.2.3", "Null", "1e"]
)
def test_what_looks_like_text_stays_text(tmp_path, text):
    file = write(tmp_path / "a.yaml", f"run: {{dir: {text}}}\n")
    assert load_config([file]).run.dir == text
    assert load_config([], [f"run.dir={text}"]).run.dir == text


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "train: {epochs: 3}\nexperts: {width: 8}\ntrain: {seed: 1}\n",
            r"a\.yaml:3: key 'train' is also on line 1",
        ),
        ("train:\n  epochs: 3\n  epochs: 4\n", r"a\.yaml:3: key 'epochs' is also on line 2"),
        ("train: {epochs: 3\n", r"a\.yaml:2: not YAML"),
        ("train: !!python/object/apply:os.system ['true']\n", r"a\.yaml:1: YAML tag '.*os.system' is not accepted"),
        ("- train\n", r"a\.yaml: expected sections of keys, got list"),
        ("? [a, b]\n: 3\n", r"a\.yaml:1: expected a name as the key"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config([write(tmp_path / "a.yaml", text)])


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: configuration file cannot be read: No such file"):
        load_config([tmp_path / "none.yaml"])
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: configuration file is not UTF-8 at byte 14"):
        load_config([tmp_path / "latin.yaml"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.gradient_cliping=1", "train.gradient_cliping: unknown key; did you mean gradient_clipping?"),
        ("trian.epochs=1", "trian: unknown key; did you mean train?"),
        ("encoders.text.modle=x", "encoders.text.modle: unknown key; did you mean model?"),
        ("rotate.zzz=1", "rotate.zzz: unknown key; known keys here: gamma"),
        ("train.epochs=many", "train.epochs: Input should be a valid integer"),
        ("train.epochs=2.5", "train.epochs: Input should be a valid integer"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, got 0"),
        ("train.learning_rate=0", "train.learning_rate: Input should be greater than 0, got 0"),
        ("train.learning_rate=nan", "train.learning_rate: Input should be a finite number"),
        ("train.batch_size=0", "train.batch_size: Input should be greater than or equal to 1, got 0"),
        ("train.batch_size=100", "train.batch_size 100 is not a multiple of negatives.chunk_size 128"),
        ("train.num_to_keep=1", "train.num_to_keep: Input should be greater than or equal to 2, got 1"),
        (
            "launch.workers=0",
            "launch.workers: expected a number from 1 to 65536, or [MIN, MAX] with 1 <= MIN <= MAX <= 65536, got 0",
        ),
        ("launch.workers=[3, 1]", "[MIN, MAX] with 1 <= MIN <= MAX <= 65536, got [3, 1]"),
        (
            "launch.workers=two",
            "launch.workers: expected a number from 1 to 65536, or [MIN, MAX] with 1 <= MIN <= MAX <= 65536, got 'two'",
        ),
        ("fusion.temperature=0", "fusion.temperature: Input should be greater than 0, got 0"),
        ("experts.dropout=1.5", "experts.dropout: Input should be less than 1, got 1.5"),
        ("experts.width=7", "experts.width: Input should be a multiple of 2, got 7"),
        ("deepspeed.stage=4", "deepspeed.stage: Input should be 0, 1, 2 or 3, got 4"),
        (
            "fusion.estimator=magic",
            "fusion.estimator: Input should be 'mine', 'cosine', 'uniform' or 'attention', got 'magic'",
        ),
        ("negatives.easy_below=0.9", "negatives: easy_below 0.9 is above hard_from 0.8"),
        ("data.dev=cut:2", "data.dev: expected 'file' or 'cut:F' with 0 < F < 1, as in cut:0.1, got 'cut:2'"),
        ("run.resume=last", "run.resume: expected auto, none, or the step of a checkpoint"),
        (
            "modalities=[structure, txt]",
            "expected auto or a list of structure, text, image, numeric, audio, video; got 'txt'",
        ),
        ("modalities=[text, text]", "modalities names one twice: text, text"),
        ("modalities=[]", "modalities is empty"),
        ("train=5", "train: Input should be a valid dictionary"),
        ("train", "--set train: expected key.path=value, as in --set experts.width=512"),
        (
            "runs/demo",
            "--set takes every word up to the next option: put other arguments before it",
        ),
        ("modalities=structre", "expected auto or a list of structure, text, image, numeric, audio, video; got"),
        ("train.epochs=[1", "--set train.epochs:1: not YAML"),
    ],
)
def test_every_mistake_says_where_what_and_what_was_expected(override, message):
    text = mistakes(override)
    assert message in text and "\n" not in text


def test_names_may_come_as_plain_text():
    assert load_config([], ["modalities=structure"]).modalities == ("structure",)
    assert load_config([], ["modalities=structure, text"]).modalities == ("structure", "text")
    assert load_config([], ["modalities=auto"]).modalities == "auto"
    assert load_config([], ["data.text_columns=label,note"]).data.text_columns == ("label", "note")


def test_a_setting_that_config_took_for_a_file_is_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*did you mean --set train.epochs=3\?"):
        load_config([tmp_path / "a.yaml", "train.epochs=3"] if write(tmp_path / "a.yaml", "") else [])


def test_all_mistakes_come_in_one_message():
    text = mistakes(
        "train.gradient_cliping=1", "train.epochs=0", "experts.width=7", "modalities=[txt]", "compile=maybe"
    )
    for key in ("train.gradient_cliping", "train.epochs", "experts.width", "modalities", "compile"):
        assert text.count(f"{key}: ") == 1


@pytest.mark.parametrize(
    "name", ["1e3", "012", "no", "true", "null", "~", "12:30", "a: b", "  x ", "é#1", "-", "1_000", "2024-01-01", ".5"]
)
def test_a_dumped_configuration_loads_back_equal(tmp_path, name):
    overrides = [
        "modalities=[text, structure]",
        "train.learning_rate=1e-16",
        "entities.learning_rate=3e20",
        "data.raw='no'",
        "run.resume='0040'",
    ]
    config = load_config([], overrides)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": name})})
    text = dump_config(config)
    assert load_config([write(tmp_path / "c.yaml", text)]) == config
    assert dump_config(load_config([tmp_path / "c.yaml"])) == text
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_dumps(file, tmp_path):
    config = load_config([file])
    assert load_config([write(tmp_path / "c.yaml", dump_config(config))]) == config


def test_every_field_is_documented():
    def fields(model, path):
        for name, field in model.model_fields.items():
            nested = (
                field.annotation
                if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
                else None
            )
            if nested is None:
                yield f"{path}{name}", field.description
            else:
                assert nested.__doc__, name
                yield from fields(nested, f"{path}{name}.")

    assert [name for name, description in fields(Config, "") if not description] == []


def test_a_key_of_another_section_is_pointed_at():
    with pytest.raises(
        ConfigError, match=r"deepspeed.gradient_clipping: unknown key; did you mean train.gradient_clipping\?"
    ):
        load_config([], ["deepspeed.gradient_clipping=1.0"])


def test_two_ways_to_bfloat16_are_one_too_many():
    with pytest.raises(ConfigError, match="set one or the other"):
        load_config([], ["deepspeed.bf16=true", "train.precision=bfloat16"])
    assert not load_config([], ["train.precision=bfloat16"]).deepspeed.bf16


def test_the_precision_of_estimates_is_no_setting_any_more():
    with pytest.raises(ConfigError, match=r"mine.precision: unknown key; did you mean train.precision\?"):
        load_config([], ["mine.precision=bfloat16"])
    with pytest.raises(ConfigError, match=r"train.precision: .*'float32' or 'bfloat16'.*bfloat16x3"):
        load_config([], ["train.precision=bfloat16x3"])


def test_offloading_needs_a_stage_that_partitions():
    with pytest.raises(ConfigError, match="deepspeed: offload_optimizer cpu with stage 0; expected stage 1, 2 or 3"):
        load_config([], ["deepspeed.offload_optimizer=cpu", "deepspeed.stage=0"])
    assert load_config([], ["deepspeed.offload_optimizer=cpu"]).deepspeed.stage == 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("entities.optimizer=adagrad", "optimizer adagrad with sharding zero; expected auto or adam"),
        ("entities.dtype=bfloat16", "dtype bfloat16 with sharding zero; set deepspeed.bf16"),
    ],
)
def test_a_table_in_the_engine_has_the_engine_s_optimizer_and_type(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([], ["entities.sharding=zero", override])


def test_a_step_to_resume_from_is_a_number_or_a_word():
    with pytest.raises(ConfigError, match=r"^run\.resume: expected auto, none, or the step of a checkpoint.*got 'abc'"):
        load_config([], ["run.resume=abc"])
    assert load_config([], ['run.resume="4000"']).run.resume == "4000"


@pytest.mark.parametrize(
    "value, message",
    [
        ("!!int abc", "YAML tag 'tag:yaml.org,2002:int' is not accepted"),
        ("!!timestamp 2001-99-99", "YAML tag .*timestamp' is not accepted"),
        ("!local 3", "YAML tag '!local' is not accepted"),
        ("&a 3", "anchors and aliases are not accepted"),
        ("*a", "anchors and aliases are not accepted"),
        ("9" * 5000, "a number of 5,000 characters"),
        ("[" * 5000, "nested more than 20 levels deep"),
        ("{a: " * 500, "nested more than 20 levels deep"),
        ("\x01", r"character U\+0001 at position"),
        ('"a\\0b"', r"character U\+0000 is not allowed in a value"),
        ('"\\ud800"', r"character U\+D800 is not allowed in a value"),
        ("18446744073709551616", "less than or equal to 9223372036854775807"),
        ("{1: 2}", "expected a name as the key, got 1"),
    ],
)
def test_hostile_values_end_in_one_line(tmp_path, value, message):
    for arguments in (([], [f"train.seed={value}"]), ([write(tmp_path / "a.yaml", f"train:\n  seed: {value}\n")], [])):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(*arguments)
        assert "\n" not in str(caught.value)


def test_a_path_of_many_keys_is_refused():
    assert "101 levels of keys" in mistakes("a." * 100 + "=1")


def numbers(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Settings that hold a number, by their full keys."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers(field.annotation, f"{path}{name}.")
        elif {int, float} & {field.annotation, *get_args(field.annotation)}:
            yield f"{path}{name}", field


@pytest.mark.parametrize("key", [key for key, _ in numbers(Config)])
def test_every_number_has_an_upper_bound(key):
    assert f"{key}: " in mistakes(f"{key}={10**35}")
    assert f"{key}: " in mistakes(f"{key}=-1")
