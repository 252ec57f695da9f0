"""Settings: errors are one line; valid ones survive a round trip through YAML and JSON."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.config import (
    Checkpoint,
    Config,
    Data,
    Evaluate,
    Model,
    Monitor,
    Optimizer,
    Schedule,
    Train,
    all_settings,
    as_yaml,
    differences,
    from_dict,
    load,
    recorded,
    to_dict,
)
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[3]
# A site's file describes a cluster, not a run.
PRESETS = sorted(set((ROOT / "configs").glob("*.yaml")) - set((ROOT / "configs").glob("site*")))


def message(*overrides: str) -> str:
    """The line that a config with these overrides is refused with."""
    with pytest.raises(ConfigError) as raised:
        load(None, overrides)
    text = str(raised.value)
    assert text and "\n" not in text
    return text


FOLDER = ["data.dataset=folder", "data.folder=.", "data.image_size=8"]

# Each: the overrides, then what the line must hold: what was given, what is allowed, the name.
WRONG = {
    "misspelt setting": (["optimizer.learning_rte=1"], ["optimizer.learning_rte"]),
    "misspelt section": (["optimzer.lr=1"], ["optimzer", "did you mean optimizer?"]),
    "section left out": (["lr=1"], ["lr", "did you mean optimizer.lr?"]),
    "one of several leaves": (["batch_size=1"], ["train.global_batch_size", "evaluate.batch_size"]),
    "swapped letters": (["optimizer.momentmu=0.9"], ["did you mean optimizer.momentum?"]),
    "resembles nothing": (["data.zzzz=1"], ["data.zzzz", "pad_crop", "image_size"]),
    "resembles nothing at the top": (["zzzz=1"], ["zzzz", "seed", "optimizer"]),
    "nothing for a list": (["monitor.loggers=null"], ["None; it must be a list of texts", "[]"]),
    "text for a number": (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "a number"]),
    "flag for a number": (["optimizer.lr=true"], ["optimizer.lr", "True", "a number"]),
    "broken number": (["train.epochs=2.5"], ["train.epochs", "2.5", "a whole number"]),
    "flag for a whole number": (["train.epochs=true"], ["train.epochs", "True", "a whole number"]),
    "number for a flag": (["data.flip=1"], ["data.flip", "1", "true or false"]),
    "nothing for a number": (["train.epochs="], ["train.epochs", "None", "a whole number"]),
    "list for a number": (["seed=[1]"], ["seed", "[1]", "a whole number"]),
    "list for a mapping": (["model.arguments=[1]"], ["model.arguments", "[1]", "a mapping"]),
    "below the minimum": (["train.epochs=0"], ["train.epochs", "0", "at least 1"]),
    "not above zero": (["optimizer.lr=0"], ["optimizer.lr", "0", "above 0"]),
    "not below one": (["optimizer.momentum=1"], ["optimizer.momentum", "1", "below 1"]),
    "share above one": (["data.erase=1.5"], ["data.erase", "1.5", "at most 1"]),
    "seed too large": (["seed=2147483648"], ["seed", "2147483648", "below 2147483648"]),
    "infinite": (["optimizer.lr=.inf"], ["optimizer.lr", "inf", "finite"]),
    "infinite, as text": (["optimizer.lr=1e999"], ["optimizer.lr", "finite"]),
    "mean of pixels to 255": (["data.mean=[123.7, 116.8, 103.9]"], ["divide both by 255"]),
    "not a number": (["data.mean=.nan"], ["data.mean", "nan", "finite"]),
    "too large for a float": (["optimizer.lr=1" + "0" * 400], ["optimizer.lr", "finite"]),
    "not a number in a list": (
        ["schedule.name=step", "schedule.milestones=[1, .nan]"],
        ["schedule.milestones", "nan", "finite"],
    ),
    "no such choice": (["device=cuda"], ["device", "'cuda'", "one of auto, cpu, gpu"]),
    "nearly a choice": (["batch_norm=synch"], ["'synch'", "did you mean sync?"]),
    "nearly a data set": (["data.dataset=fashion-mnist"], ["did you mean fashion_mnist?"]),
    "section as a value": (["data=5"], ["data", "5", "section", "pad_crop"]),
    "section as zero": (["data=0"], ["data", "0", "section"]),
    "section as false": (["train=false"], ["train", "False", "section"]),
    "value as a section": (["seed=1", "seed.x=2"], ["seed is a setting, not a section"]),
    "no equals sign": (["optimizer.lr"], ["'optimizer.lr'", "setting=value"]),
    "no name": (["=1"], ["'=1'", "setting=value"]),
    "value is not YAML": (["name=[1"], ["'name=[1'", "not YAML"]),
    "value has a wrong tag": (['seed=!!int ""'], ["not YAML"]),
    "warm-up longer than the run": (
        ["schedule.warmup_epochs=5", "train.epochs=3"],
        ["schedule.warmup_epochs", "5", "train.epochs, 3"],
    ),
    "patience without evaluations": (
        ["train.patience=2", "evaluate.every_epochs=0"],
        ["train.patience is 2", "evaluate.every_epochs=1", "train.patience=null"],
    ),
    "step without milestones": (["schedule.name=step"], ["schedule.milestones"]),
    "milestones without step": (
        ["schedule.milestones=[1, 2]"],
        ["schedule.milestones", "schedule.name=step", "cosine"],
    ),
    "an unknown logger": (
        ["monitor.loggers=[csv, wanda]"],
        ["monitor.loggers is 'wanda'", "tensorboard, csv, wandb, mlflow", "mean wandb"],
    ),
    "a setting that has gone": (
        ["monitor.tensorboard=true"],
        ["monitor.tensorboard", "monitor.loggers=[]"],
    ),
    "plateau without patience": (["schedule.name=plateau"], ["schedule.patience", "e.g. 3"]),
    "patience without plateau": (
        ["schedule.patience=2"],
        ["schedule.patience is 2", "schedule.name=plateau", "cosine"],
    ),
    "plateau without evaluations": (
        ["schedule.name=plateau", "schedule.patience=2", "evaluate.every_epochs=0"],
        ["schedule.patience is 2", "evaluate.every_epochs=1"],
    ),
    "one cycle without a rise": (["schedule.name=one_cycle"], ["schedule.warmup_epochs"]),
    "a factor that is none": (
        ["optimizer.lr_mult={a*: fast}"],
        ["optimizer.lr_mult['a*'] is 'fast'", "a number from 0"],
    ),
    "a negative factor": (["optimizer.lr_mult={a*: -1}"], ["optimizer.lr_mult['a*'] is -1"]),
    "milestones without brackets": (
        ["schedule.name=step", "schedule.milestones=1,2"],
        ["schedule.milestones", "'1,2'", "a list of numbers", "[0.5, 2]"],
    ),
    "means without brackets": (
        ["data.mean=0.5,0.4,0.3"],
        ["data.mean", "'0.5,0.4,0.3'", "a list of numbers"],
    ),
    "milestones that fall": (
        ["schedule.name=step", "schedule.milestones=[2, 1]"],
        ["schedule.milestones", "rise"],
    ),
    "nesterov of adam": (
        ["optimizer.name=adam", "optimizer.nesterov=true"],
        ["nesterov is true", "optimizer.name=sgd, not adam;", "optimizer.nesterov=false"],
    ),
    "momentum of adam": (
        ["optimizer.name=adam", "optimizer.momentum=0.95"],
        ["optimizer.momentum is 0.95", "optimizer.name=sgd or nag, not adam"],
    ),
    "power of a cosine": (
        ["schedule.power=2"],
        ["schedule.power is 2.0", "schedule.name=poly", "cosine", "give schedule.power=1.0"],
    ),
    "factor of a cosine": (["schedule.gamma=0.5"], ["schedule.gamma", "step or plateau"]),
    "end of a constant": (
        ["schedule.name=constant", "schedule.final_lr=0.1"],
        ["schedule.final_lr is 0.1", "cosine or poly or one_cycle or plateau, not", "constant"],
    ),
    "grey arrays": (["data.channels=1"], ["data.channels is 1", "data.dataset=folder or records"]),
    "two channels": ([*FOLDER, "data.channels=2"], ["data.channels is 2", "one of 1, 3"]),
    "part of pictures that are not cut": (
        [*FOLDER, "data.crop_area=[0.5, 1]"],
        ["data.crop_area is [0.5, 1.0]", "data.random_crop=true, not false"],
    ),
    "own data without a folder": (["data.dataset=idx"], ["data.folder"]),
    "factory without a function": (["model.factory=my.nets"], ["'my.nets'", "module:function"]),
    "relative factory": (["model.factory=.nets:make"], ["'.nets:make'", "module:function"]),
    "name with a slash": (["name=a/b"], ["'a/b'", "/"]),
    "name that is the parent": (["name=.."], ["'..'"]),
    "octal": (["train.epochs=010"], ["train.epochs is 010", "reads as 8", "in decimal"]),
    "hexadecimal": (["seed=0x1F"], ["seed is 0x1F", "31"]),
    "binary": (["seed=0b11"], ["seed is 0b11", "3"]),
    "minutes": (["optimizer.lr=1:30"], ["optimizer.lr is 1:30", "90"]),
    "minutes with a fraction": (["optimizer.lr=1:30.5"], ["optimizer.lr is 1:30.5", "90.5"]),
    "minutes in a list": (
        ["schedule.name=step", "schedule.milestones=[1, 1:30]"],
        ["schedule.milestones is 1:30", "90"],
    ),
    "octal in arguments": (["model.arguments={a: [010]}"], ["model.arguments is 010"]),
    "octal of YAML 1.2": (["optimizer.arguments={a: 0o17}"], ["arguments is 0o17", "reads as 15"]),
    "flag or text in arguments": (
        ["model.arguments={activation: on}"],
        ["model.arguments is on", "reads as True", "write true or false, and texts in quotes"],
    ),
    "flag or text as a name": (["optimizer.arguments={no: 1}"], ["arguments is no", "False"]),
    "variable that is not set": (["output=$NO_SUCH/x"], ["output is '$NO_SUCH/x'", "NO_SUCH is"]),
    "variable in braces": (["data.folder=${NO_SUCH}"], ["data.folder", "NO_SUCH is not set"]),
    "variable that is empty": (["output=${EMPTY}/runs"], ["EMPTY is not set or empty"]),
    "nobody's home": (["output=~nobody-here/x"], ["no such home folder", "./~nobody-here/x"]),
    "arguments that JSON does not know": (
        ["model.arguments={since: !!timestamp 2026-11-22}"],
        ["model.arguments", "since"],
    ),
    "arguments with numbers for names": (
        ["model.arguments={widths: {1: 64}}"],
        ["model.arguments", "widths"],
    ),
}


@pytest.mark.parametrize("overrides, expected", WRONG.values(), ids=WRONG.keys())
def test_wrong_config_gives_one_clear_line(overrides, expected, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    text = message(*overrides)
    for part in expected:
        assert part in text


def test_nothing_is_suggested_that_was_not_meant():
    assert message("device=cuda").endswith("one of auto, cpu, gpu")


def test_a_dotted_name_in_a_file_is_corrected():
    with pytest.raises(ConfigError, match=re.escape("it reads `optimizer: {lr: ...}`")):
        from_dict({"optimizer.lr": 0.1})


def test_line_break_in_a_name_stays_on_one_line():
    with pytest.raises(ConfigError) as raised:
        from_dict({"data": {"fl\nip": True}})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: Config(train=Train(epochs=0)), "train.epochs is 0; it must be at least 1"),
        (lambda: Config(optimizer=Optimizer(lr=-1.0)), "optimizer.lr is -1.0"),
        (lambda: Config(device="cuda"), "device is 'cuda'"),
        (lambda: Config(train=Train(epochs="3")), "train.epochs is '3'; it must be a whole number"),
        (lambda: Config(schedule=Schedule(name="step")), "schedule.milestones"),
        (lambda: Config(optimizer={"lr": 1}), "it must be Optimizer(...), or"),
    ],
)
def test_config_made_in_python_is_checked_too(make, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        make()


@pytest.mark.parametrize("given", ["quickstart", None, Config(), [("seed", 1)]])
def test_what_is_no_mapping_is_refused_with_the_way_to_read_files(given):
    with pytest.raises(ConfigError, match="it must be a mapping \\(load reads files\\)"):
        from_dict(given)


def test_paths_and_one_override_alone_are_taken_in_python(tmp_path):
    config = load(ROOT / "configs" / "quickstart.yaml", "optimizer.lr=0.05")
    assert (config.name, config.optimizer.lr) == ("quickstart", 0.05)
    with pytest.raises(ConfigError, match="no config file .*nosuch.yaml"):
        load(tmp_path / "nosuch.yaml")


def test_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1
    with pytest.raises(FrozenInstanceError):
        Config().train.epochs = 1


def test_defaults_are_not_shared_between_configs():
    first, second = Config(), Config()
    first.model.arguments["stem"] = "small"
    assert second.model.arguments == {}


# ---------------------------------------------------------------- files


def test_file_that_is_not_there_names_the_ones_that_are(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError) as raised:
        load(str(tmp_path / "quikstart.yaml"))
    text = str(raised.value)
    assert "quikstart.yaml" in text and "did you mean" in text
    assert str(tmp_path / "quickstart.yaml") in text


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(b"[" * 2000, "not YAML", id="nested too deep"),
        (b"train: {epochs: 3", "not YAML"),
        (b"a: 1\n\tb: 2", "not YAML"),
        (b"- 1\n- 2", "holds a list"),
        (b"word", "holds a str"),
        (b"\xff\xfe\xfa", "not YAML"),
        ("name: 数据".encode("gbk"), "save it as UTF-8"),
        (b'seed: !!timestamp "x"', "not YAML"),
        (b'seed: !!bool "x"', "not YAML"),
        (b"seed: !!python/object/apply:os.system [true]", "not YAML"),
        (b"train: {epochs: 1}\ntrain: {global_batch_size: 8}", "train twice"),
        (b"train:\n  epochs: 1\n  epochs: 2", "epochs twice"),
    ],
)
def test_broken_file_gives_one_line_that_names_it(tmp_path, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load(str(path))
    text = str(raised.value)
    assert str(path) in text and expected in text and "\n" not in text


def test_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path))


def test_arguments_that_hold_themselves_are_refused(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text("model: {arguments: &a {inner: *a}}")
    with pytest.raises(ConfigError, match=r"model\.arguments"):
        load(str(path))


@pytest.mark.parametrize("level", ["[{}]", "{{<<: [{}]}}"])
def test_a_small_file_cannot_stand_for_a_million_values(tmp_path, level):
    """Six times ten of what was before: a page of YAML would fill the memory."""
    lines = ["a0: &a0 {k: x}"]
    lines += [f"a{n + 1}: &a{n + 1} {level.format(', '.join([f'*a{n}'] * 10))}" for n in range(6)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="stands for more than 100,000 values"):
        load(str(path))


def test_aliases_are_read(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text("model: {arguments: {a: &a [1, 2], b: *a}}")
    assert load(str(path)).model.arguments == {"a": [1, 2], "b": [1, 2]}


def test_merged_keys_may_be_overridden_and_are_no_duplicates(tmp_path):
    path = tmp_path / "merged.yaml"
    inner = "{z: {y: &a {<<: {k: 1}, k: 2}}, b: {<<: *a}}"
    path.write_text(f"model: {{arguments: {inner}}}")
    assert load(str(path)).model.arguments == {"z": {"y": {"k": 2}}, "b": {"k": 2}}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_windows_are_read(tmp_path, encoding):
    path = tmp_path / "windows.yaml"
    path.write_bytes("name: 数据\r\ntrain:\r\n  epochs: 3\r\n".encode(encoding))
    config = load(str(path))
    assert (config.name, config.train.epochs) == ("数据", 3)


def test_an_override_changes_nothing_else_that_an_alias_stands_for(tmp_path):
    path = tmp_path / "shared.yaml"
    path.write_text("checkpoint: &often {every_steps: 50}\nmonitor: *often\n")
    config = load(str(path), ["monitor.every_steps=10"])
    assert (config.checkpoint.every_steps, config.monitor.every_steps) == (50, 10)
    every = {"every_steps": 50}
    config = from_dict({"checkpoint": every, "monitor": every}, ["monitor.every_steps=10"])
    assert config.checkpoint.every_steps == every["every_steps"] == 50


def test_empty_file_and_empty_sections_are_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load(str(path)) == Config(name="empty")
    path.write_text("train:\ndata:\n")
    assert load(str(path)) == Config(name="empty")


def test_run_is_named_after_its_file_unless_it_says_otherwise(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1")
    assert load(str(path)).folder == Path("runs/mine")
    assert load(str(path), ["name=2024", "output=elsewhere"]).folder == Path("elsewhere/2024")


@pytest.mark.parametrize(
    "text",
    [
        *("0.10", "1.10", "2026_11_28", "010", "0x1F", "12:30", "1e3", "1.e+3", "yes", "No", "on"),
        *("2026-11-28", "2026-99-99", "2026-11-28 12:30:00", "00", "-1", "+1", "1_000", ".inf"),
    ],
)
def test_texts_keep_what_was_typed(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(f"name: {text}\ndata: {{folder: {text}}}\noutput: {text}\n")
    for config in (load(str(path)), load(None, [f"name={text}", f"data.folder={text}"])):
        assert (config.name, config.data.folder) == (text, text)
    assert load(str(path)).output == text
    assert from_dict(yaml.safe_load(as_yaml(config))) == config


def test_arguments_are_what_they_look_like():
    typed = """{a: 1e-5, b: -1.5E3, c: .5e+1, d: 1_000, e: "0.10", f: 'on', g: TRUE, h: 0.10,
        i: 2026-11-28}"""
    config = load(None, [f"model.arguments={typed}", f"optimizer.arguments={typed}"])
    expected = {"a": 1e-5, "b": -1500.0, "c": 5.0, "d": 1000, "e": "0.10", "f": "on", "g": True}
    expected.update(h=0.1, i="2026-11-28")
    assert config.model.arguments == config.optimizer.arguments == expected
    assert from_dict(yaml.safe_load(as_yaml(config))) == config


@pytest.mark.parametrize("text, flag", [("on", True), ("No", False), ("true", True)])
def test_flags_may_be_on_and_off(text, flag):
    assert load(None, [f"data.flip={text}"]).data.flip is flag


def test_a_float_is_no_name_in_python():
    with pytest.raises(ConfigError, match=r"name is 1\.1; it must be a text"):
        Config(name=1.10)
    assert Config(name=2024).name == "2024"


def test_paths_have_their_variables_expanded(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/somebody")
    config = load(None, ["output=${SCRATCH}/runs", "data.folder=$SCRATCH/data"])
    assert config.folder == Path("/scratch/me/runs/default")
    assert config.data.folder == "/scratch/me/data"
    assert from_dict(to_dict(config)) == config
    assert Data("idx", "~/here").folder == "/somebody/here"
    assert Config(output="/cost/$").output == "/cost/$"


def test_a_date_is_a_name_and_a_tilde_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    config = load(None, ["name=2026-11-23", "output=~/runs"])
    assert config.folder == Path("/somebody/runs/2026-11-23")


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("optimizer: {lr: 0.5, momentum: 0.5}\nevaluate:\n")
    config = load(
        str(path),
        ["optimizer.lr=1", "optimizer.lr=1e-4", "evaluate.batch_size=7", "data.flip = true"],
    )
    assert config.optimizer.lr == 1e-4 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.momentum == 0.5
    assert config.evaluate.batch_size == 7
    assert config.data.flip is True


def test_override_reaches_into_arguments():
    assert load(None, ["model.arguments.stem=small"]).model.arguments == {"stem": "small"}


def test_share_of_one_is_allowed():
    assert load(None, ["data.erase=1"]).data.erase == 1.0


def test_there_are_presets():
    assert "quickstart" in [path.stem for path in PRESETS]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_by_its_path_and_by_its_name_anywhere(path, tmp_path, monkeypatch):
    by_path = load(str(path))
    assert by_path.folder == Path("runs") / path.stem
    monkeypatch.chdir(tmp_path)
    assert load(path.stem) == by_path


def test_a_file_of_a_presets_name_is_meant_only_with_a_folder_or_a_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml"):
        (tmp_path / name).write_text("seed: 77")
    assert load("quickstart").seed != 77
    assert [load(path).seed for path in ("./quickstart", "quickstart.yaml")] == [77, 77]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("quikstart", "no preset 'quikstart'; did you mean quickstart?"),
        ("mine", "no preset 'mine'; did you mean mine.yaml?"),
        ("notes", "no preset 'notes'; did you mean the file ./notes?"),
        (
            "elsewhere",
            "no preset 'elsewhere'; there are: book, fashion_mnist, fashion_mnist_best, folder-",
        ),
        (
            "configs/book.yaml",
            "no config file configs/book.yaml; did you mean book?; presets: book",
        ),
        ("min.yaml", "no config file min.yaml; did you mean mine.yaml?; there are: mine.yaml"),
    ],
)
def test_unknown_preset_or_file_names_the_nearest_and_never_that_of_a_site(
    tmp_path, monkeypatch, given, line
):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "notes", "site.yaml", "site-example.yaml", ".tool.yaml"):
        (tmp_path / name).write_text("seed: 1")
    with pytest.raises(ConfigError) as raised:
        load(given)
    text = str(raised.value)
    assert text.startswith(line) and not re.search("site|tool", text) and "\n" not in text


# ---------------------------------------------------------------- round trips


def flat(values: dict, prefix: str = "") -> dict:
    """A nested config by the dotted names of its settings."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("arguments", "lr_mult"):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def test_numbers_and_arrays_of_numpy_are_taken():
    data = Data(mean=np.array([0.5, 0.4, 0.3]), std=np.float32(0.5))
    config = Config(seed=np.int64(3), data=data)
    assert type(config.seed) is int and config.data.std == 0.5
    assert config.data.mean == (0.5, 0.4, 0.3)
    assert load(None, ["data.mean=ImageNet"]).data.mean == (0.485, 0.456, 0.406)
    assert from_dict(to_dict(config)) == config


def test_round_trip_of_a_config_that_sets_everything():
    config = Config(
        seed=3,
        output="o",
        name="n",
        device="cpu",
        batch_norm="group",
        calibrate_samples=5,
        data=Data(
            "folder",
            folder="f",
            class_names="c",
            validation=0.2,
            bad_samples="skip",
            image_size=96,
            channels=1,
            resize=100,
            random_crop=True,
            crop_area=(0.2, 0.9),
            pad_crop=2,
            flip=True,
            color_jitter=0.3,
            erase=0.25,
            trivial_augment=True,
            mixup=0.2,
            cutmix=1.0,
            mean=(0.1,),
            std=(0.2,),
            workers=3,
            prefetch=9,
        ),
        model=Model("a.b:c", {"x": [1, {"y": None}], "z": "w"}, False, "w"),
        optimizer=Optimizer(
            "nag",
            lr=0.2,
            base_batch_size=8,
            momentum=0.5,
            weight_decay=0.1,
            lr_mult={"a.*": 0.5},
            decay_norm_and_bias=True,
            arguments={"multi_precision": True},
            clip_norm=2.0,
            accumulate=3,
            fp16_allreduce=True,
            bucket_mb=2.0,
            shared_memory=False,
        ),
        schedule=Schedule("poly", 0.5, final_lr=0.3, power=2.0),
        train=Train(4, 7, 5, 3, 0.1, 8.0, "bfloat16", max_minutes=9.0, ema=0.9),
        evaluate=Evaluate(2, 99, flip=True, top_k=3),
        checkpoint=Checkpoint(9, 4),
        monitor=Monitor(3, ("csv",), 2, "json"),
    )
    chosen, default = flat(to_dict(config)), flat(to_dict(Config()))
    left = [name for name in default if chosen[name] == default[name]]
    others = ["schedule.milestones", "schedule.gamma", "schedule.patience"]
    assert left == ["optimizer.nesterov", *others], "not with nag, and with poly"
    assert from_dict(to_dict(config)) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(yaml.safe_load(as_yaml(config))) == config
    assert differences(json.loads(json.dumps(to_dict(config))), to_dict(config)) == []


def test_to_dict_holds_every_setting():
    assert sorted(flat(to_dict(Config()))) == sorted(all_settings())


def test_every_setting_says_what_it_means():
    import dataclasses

    def undocumented(cls):
        for field in dataclasses.fields(cls):
            if "meaning" in field.metadata:
                if not field.metadata["meaning"].strip():
                    yield field.name
            else:
                yield from undocumented(field.default_factory)

    assert not list(undocumented(Config))


# ---------------------------------------------------------------- differences


def changed(*overrides: str) -> list:
    return differences(to_dict(Config()), to_dict(load(None, overrides)))


def test_differences_name_what_changes_the_result():
    assert changed() == []
    assert changed("optimizer.lr=0.2") == ["optimizer.lr: 0.1 -> 0.2"]
    assert changed("seed=1", "data.flip=true") == ["data.flip: False -> True", "seed: 0 -> 1"]
    assert changed("model.arguments={stem: small}") == ["model.arguments: {} -> {'stem': 'small'}"]
    assert len(changed("train.epochs=3", "train.global_batch_size=3", "batch_norm=sync")) == 3


@pytest.mark.parametrize("given", ["csv,wandb", "[csv, wandb]", "'csv, wandb'"])
def test_several_words_may_be_given_with_commas(given):
    assert load(None, [f"monitor.loggers={given}"]).monitor.loggers == ("csv", "wandb")
    assert load(None, ["monitor.loggers=csv"]).monitor.loggers == ("csv",)
    assert load(None, ["monitor.loggers=[]"]).monitor.loggers == ()


def test_differences_take_patterns_for_no_settings():
    changed_ = changed("optimizer.lr_mult={a.b: 2}")
    assert changed_ == ["optimizer.lr_mult: {} -> {'a.b': 2}"]
    before = to_dict(Config())
    del before["optimizer"]["lr_mult"]  # as an older version wrote it
    assert differences(before, to_dict(Config())) == []


def test_differences_leave_out_what_does_not():
    assert not changed(
        "output=x",
        "name=x",
        "device=cpu",
        "evaluate.batch_size=3",
        "evaluate.every_epochs=3",
        "checkpoint.keep=3",
        "monitor.loggers=[]",
        "data.folder=x",
        "data.prefetch=9",
        "train.max_steps=1",
        "train.max_minutes=1",
        "train.patience=1",
        "train.watchdog_seconds=9",
    )


@pytest.mark.parametrize("schedule", ["constant", "step", "plateau", "cosine", "poly"])
def test_a_longer_run_is_the_same_one_where_its_schedule_does_not_depend_on_the_length(schedule):
    more = {"step": ["schedule.milestones=[1]"], "plateau": ["schedule.patience=1"]}
    both = [f"schedule.name={schedule}", *more.get(schedule, [])]
    before = to_dict(load(None, [*both, "train.epochs=1"]))
    found = differences(before, to_dict(load(None, [*both, "train.epochs=2"])))
    assert found == (["train.epochs: 1 -> 2"] if schedule in ("cosine", "poly") else [])
    other = differences(before, to_dict(load(None, ["schedule.name=one_cycle", *WARM])))
    assert "train.epochs: 1 -> 10" in other


WARM = ["schedule.warmup_epochs=1"]


def test_initial_weights_may_be_moved_as_their_content_is_compared(monkeypatch):
    def of(weights: str) -> dict:
        return to_dict(load(None, [f"model.weights={weights}"]))

    monkeypatch.setenv("HOME", "/home/me")
    assert of("~/w.params")["model"]["weights"] == "/home/me/w.params"
    assert differences(of("~/w.params"), of("/scratch/w.params")) == []
    assert len(differences(of("a/w.params"), of("a/v.params"))) == 1
    assert len(differences(of("w.params"), to_dict(Config()))) == 1
    assert len(differences(to_dict(Config()), of("w.params"))) == 1


@pytest.mark.parametrize("text", ["1e-5", "0o17", "on", "1:30", "010", "2026-01-01", "null", "~"])
def test_texts_like_numbers_come_back_as_texts(tmp_path, text):
    config = Config(model=Model(arguments={"a": text, "b": [text]}))
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert load(str(tmp_path / "config.yaml")).model == config.model


def test_setting_that_an_older_checkpoint_does_not_know_counts_when_it_is_not_the_default():
    old = to_dict(Config())
    del old["data"]["erase"]
    assert differences(old, to_dict(load(None, ["data.erase=0.5"]))) == ["data.erase: 0.0 -> 0.5"]
    assert differences(old, to_dict(Config())) == []


# ---------------------------------------------------------------- fuzzing

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**308),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.dates(),
    st.sampled_from(["sync", "step", "sgd", "1e-3", "a:b", "..", "gpu", "1e999"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(scalars, inner, max_size=3)
    ),
    max_leaves=6,
)
sections = sorted({name.split(".")[0] for name in all_settings()})
leaves = sorted({name.split(".")[-1] for name in all_settings()})
keys = st.one_of(st.sampled_from(sections + leaves), scalars)
nested = st.dictionaries(
    keys, st.one_of(values, st.dictionaries(keys, values, max_size=4)), max_size=4
)


def accepted_or_refused(make) -> None:
    """Whatever was given: a Config that survives JSON, or one line."""
    try:
        config = make()
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert isinstance(config, Config)
    again = from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert differences(to_dict(again), to_dict(config)) == []
    assert from_dict(yaml.safe_load(as_yaml(config))) == config


@given(nested)
def test_any_mapping_is_a_config_or_a_line(mapping):
    accepted_or_refused(lambda: from_dict(mapping))


@given(st.sampled_from(all_settings()), values)
def test_any_value_of_any_setting_is_a_config_or_a_line(name, value):
    *section, leaf = name.split(".")
    mapping = {leaf: value}
    accepted_or_refused(lambda: from_dict({section[0]: mapping} if section else mapping))


@given(st.lists(st.text(max_size=12), max_size=3))
@example(['seed=!!int ""'])
@example(['seed=!!float "_"'])
@example(['seed=!!timestamp "x"'])
@example(['seed=!!bool "x"'])
@example(["seed=!!set {1, 2}"])
@example(["model.arguments=!!omap [a: 1]"])
@example(["model.arguments={a: !!binary YQ==}"])
@example(["a..b=1", ".=1"])
@example(["data.=1"])
@example(["seed=" + "[" * 2000])
@example(["seed=&a [*a]"])
@example(["model.arguments=&a {b: *a}"])
@example(["model.arguments={a: .nan}"])
@example(["data=1", "data.flip=true"])
def test_any_overrides_are_a_config_or_a_line(overrides):
    accepted_or_refused(lambda: load(None, overrides))


@given(
    st.lists(
        st.tuples(st.sampled_from([*all_settings(), *sections]), st.text("0123456789-+.e[]{}:, tf"))
    )
)
def test_any_value_typed_for_a_setting_is_a_config_or_a_line(pairs):
    accepted_or_refused(lambda: load(None, [f"{name}={text}" for name, text in pairs]))


def test_a_setting_that_is_gone_is_refused_with_what_took_its_place():
    with pytest.raises(ConfigError, match=r"no setting optimizer\.groups any more: .*bucket_mb"):
        from_dict({"optimizer": {"groups": 1}})
    with pytest.raises(ConfigError, match=r"no setting optimizer\.groups any more"):
        load(None, ["optimizer.groups=0"])


def test_what_does_nothing_beside_the_others_is_left_out_of_an_older_checkpoint():
    assert load(None, ["optimizer.name=Adam", "optimizer.momentum=0"]).optimizer.momentum == 0
    before = to_dict(Config(optimizer=Optimizer("adam")))
    before["optimizer"]["momentum"] = 0.95
    before["schedule"].update(name="step", milestones=[1], gamma=0.5, final_lr=0.1, power=2.0)
    config = from_dict(recorded(before))
    assert (config.optimizer.momentum, config.schedule.final_lr, config.schedule.power) == (
        *(0.9, 0.0),
        1.0,
    )
    assert config.schedule.gamma == 0.5
    assert before["optimizer"]["momentum"] == 0.95


def test_a_checkpoint_with_a_setting_that_is_gone_still_serves():
    before = to_dict(Config())
    before["optimizer"] = {**before["optimizer"], "groups": 1}
    del before["optimizer"]["bucket_mb"]
    assert differences(before, to_dict(Config())) == []
    assert from_dict(recorded(before)) == Config()
    assert before["optimizer"]["groups"] == 1
