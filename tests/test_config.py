"""The table of fields, configuration files and saved configurations: mistakes are named before anything runs."""

import json
import pathlib
import tarfile

import pytest

from deco_jax.config import (
    CONFIG_VERSION,
    FIELDS,
    build_model,
    check_config,
    default_config,
    flatten,
    load_config,
    restore_config,
    save_config,
    saved,
)
from deco_jax.errors import UsageError
from deco_jax.models.build import KINDS, network_fields
from tests.helpers import GOLDEN

QUICKSTART = str(pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py")
BOUNDED = [name for name, field in FIELDS.items() if field.low is not None]


def with_value(name, value):
    """The default configuration with one other value."""
    config = default_config()
    config.update_from_flattened_dict({name: value})
    return config


def test_the_tree_is_the_table():
    """The same fields, each with its default, of its type; locked; and it passes its own checks."""
    config = default_config()
    flat = flatten(config)
    assert flat == {name: field.default for name, field in FIELDS.items()}
    assert all(type(flat[name]) is type(field.default) for name, field in FIELDS.items())
    with pytest.raises(AttributeError, match='Did you mean "width" instead of "widht"'):
        config.model.widht = 1
    check_config(config)


def test_every_field_says_what_it_means():
    for name, field in FIELDS.items():
        assert len(field.meaning) >= 5 and not field.meaning.endswith("."), name
    meanings = [field.meaning for field in FIELDS.values()]
    assert sorted(set(meanings)) == sorted(meanings), "two fields cannot mean the same"


def test_every_field_of_a_network_is_in_the_table():
    """A new one touches two places: the module and the table. Modules' defaults are for tests, the table's for runs."""
    assert {f"model.{field}" for kind in KINDS for field in network_fields(kind)} <= FIELDS.keys()
    assert all(FIELDS[f"model.{field}"].resume == "fixed" for kind in KINDS for field in network_fields(kind))


@pytest.mark.parametrize("name", BOUNDED)
def test_a_value_beyond_its_range_is_refused(name):
    """Below and above, and what is no number; the bounds themselves are allowed unless other fields forbid them."""
    field = FIELDS[name]
    whole = isinstance(field.default, int)
    wrong = [field.low - 1] if whole else [-1e-9, float("-inf"), float("nan"), float("inf")]
    if field.high < 1e300:
        wrong.append(field.high + (1 if whole else 1e-9))
    for value in wrong:
        with pytest.raises(UsageError) as error:
            kinds = [kind for kind in KINDS if name.removeprefix("model.") in network_fields(kind)]
            config = with_value(name, value)
            config.model.kind = kinds[0] if kinds else "deco"
            check_config(config)
        assert str(error.value).startswith(f"{name}={value} must be "), error.value
    for value in (field.low, field.high) if field.high < 1e300 else (field.low,):
        field.check(name, value)


def test_a_number_without_a_range_is_finite():
    for value in (float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"loss.frequency_gamma={value} must be a finite number"):
            check_config(with_value("loss.frequency_gamma", value))


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.choices])
def test_an_unknown_choice_is_refused(name):
    with pytest.raises(UsageError) as error:
        check_config(with_value(name, "unheard-of"))
    assert str(error.value) == f"{name}='unheard-of' is not known; allowed: {', '.join(FIELDS[name].choices)}."


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("guidance", float("inf")), ("shift", 0.0), ("last", 1.0), ("last", -0.1), ("solver", "magic")],
)
def test_the_samplers_settings_are_checked_with_the_rest(name, value):
    with pytest.raises(UsageError, match=rf"^(sample\.)?{name}="):
        check_config(with_value(f"sample.{name}", value))


def test_a_network_ignores_the_fields_of_others():
    config = default_config()
    config.model.update(kind="baseline", decoder_width=0, decoder_patch=5)
    network = build_model(config.model)
    assert {field: getattr(network, field) for field in network_fields("baseline")} == {
        field: config.model[field] for field in network_fields("baseline")
    }


# Saved configurations


def saved_values(**changes):
    return {"config": save_config(default_config())["config"] | changes, "config_version": CONFIG_VERSION}


def test_what_is_saved_comes_back_whole():
    """Tuples, which JSON has not, and floats that somebody wrote without a point."""
    config = load_config(QUICKSTART, ["--config.sample.guidance_interval=(0.25, 1.0)", "--config.sample.last=0.01"])
    values = save_config(config)
    assert values["config"]["sample"]["guidance_interval"] == [0.25, 1.0] and values["config_version"] == CONFIG_VERSION
    values["config"]["optimizer"]["lr"] = 1
    restored = restore_config(values)
    config.optimizer.lr = 1.0
    assert flatten(restored) == flatten(config) and type(restored.optimizer.lr) is float
    assert restored.is_locked


def test_an_unknown_field_is_an_error():
    """Dropped, the run would be taken for another."""
    with pytest.raises(UsageError) as error:
        restore_config(saved_values(model={"kind": "deco", "experts": 8}, novelty={"a": {"b": 1}}), "runs/x")
    assert "runs/x has a configuration with fields that deco_jax" in str(error.value)
    assert "does not know: model.experts, novelty.a.b." in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": "0"}, "seed='0'; it must be of type int"),
        ({"seed": 1.5}, "seed=1.5; it must be of type int"),
        ({"model": 7}, "does not know: model"),
        ({"model": {"scan": 1}}, "model.scan=1; it must be of type bool"),
        ({"optimizer": {"lr": [1]}}, r"optimizer.lr=\[1\]; it must be of type float"),
        ({"sample": {"guidance_interval": 1}}, "sample.guidance_interval=1; it must be of type tuple"),
    ],
)
def test_a_saved_value_of_another_type_is_an_error(changes, message):
    with pytest.raises(UsageError, match=message):
        restore_config(saved_values(**changes))


@pytest.mark.parametrize(
    "name, value", [("train.init_from", None), ("mesh.data", None), ("optimizer.lr", None), ("train.keep_every", True)]
)
def test_what_a_file_could_set_but_no_field_takes(tmp_path, name, value):
    """Such a file is refused; a run that began with it earlier can be read, None being the default."""
    file = tmp_path / "c.py"
    head = "from deco_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    file.write_text(f"{head}    c.{name} = {value}\n    return c\n")
    with pytest.raises(UsageError, match=f"{name}={value} must be of type"):
        load_config(str(file))
    part, field = name.split(".")
    read = restore_config(saved_values(**{part: {field: value}}))
    assert read[part][field] == (1 if value else FIELDS[name].default) and type(read[part][field]) is not bool


@pytest.mark.parametrize("line, says", [("assert 0", "it raises AssertionError"), ("raise SystemExit(3)", "3")])
def test_a_file_that_ends_without_a_word(tmp_path, line, says):
    file = tmp_path / "c.py"
    file.write_text(f"def get_config():\n    {line}\n")
    with pytest.raises(UsageError, match=f"c.py: {says}"):
        load_config(str(file))


@pytest.mark.parametrize("version", [CONFIG_VERSION + 1, 0, "2", None, True])
def test_an_unknown_version_is_an_error(version):
    with pytest.raises(UsageError, match="has a configuration of version .*reads versions 1 to"):
        restore_config(saved_values() | {"config_version": version})
    with pytest.raises(UsageError, match="holds no configuration"):
        restore_config({"config": [version]})


def test_a_field_younger_than_the_file_has_its_default():
    """The first files say no version, and lack fields: the sampler's last step, the choice of what is predicted.

    Where the default is not what these runs did, they have that: pixels were taken as they lay in the file.
    """
    values = save_config(load_config(QUICKSTART))["config"]
    del values["sample"]["last"], values["model"]["prediction"], values["teacher"]
    del values["data"]["orient"], values["data"]["background"], values["train"]["save_minutes"]
    restored = flatten(restore_config({"config": values}))
    decoding = {"data.orient": False, "data.background": ""}
    assert restored == flatten(load_config(QUICKSTART)) | decoding | {"optimizer.gradient_dtype": "float32"}


def test_the_files_of_version_1_are_read_whole():
    """Nothing in them is dropped or changed. A field that is renamed today needs a migration for them."""
    with tarfile.open(GOLDEN / "before_redesign" / "written.tar.xz") as tar:
        written = {name: json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith("meta/metadata")}
        written["folder"] = {"config": json.load(tar.extractfile("folder/config.json"))["training"]}
    assert len(written) == 4
    for name, values in written.items():
        then = flatten(values["config"])
        then["sample.guidance_interval"] = tuple(then["sample.guidance_interval"])
        assert "config_version" not in values and "sample.last" not in then
        younger = {"sample.last": 0.0, "data.max_bad_share": 0.1, "train.save_minutes": 30.0, "train.reschedule": False}
        new = (
            "data.threads",
            "data.min_side",
            "data.crop",
            "data.caption",
            "data.short",
            "model.text",
            "text.",
            "sample.p",
        )
        younger |= {name: field.default for name, field in FIELDS.items() if name.startswith(new)}
        younger |= {name: field.default for name, field in FIELDS.items() if name.startswith("evaluate.")}
        younger |= {"train.evaluate_every": 0, "model.decoder": "auto", "optimizer.accumulate": "part"}
        decoding = {"data.orient": False, "data.background": ""}
        computing = {"optimizer.gradient_dtype": then["model.dtype"], "model.attention": "auto"}
        assert flatten(restore_config(values, name)) == then | younger | decoding | computing


def test_migrations_run_in_order_from_the_files_version(monkeypatch):
    """Made-up ones: version 4 called the learning rate `rate`, and version 5 doubled it."""

    def rename(flat):
        return {"optimizer.rate" if name == "optimizer.lr" else name: value for name, value in flat.items()}

    def double(flat):
        flat = {**flat, "optimizer.lr": 2 * flat["optimizer.rate"]}
        del flat["optimizer.rate"]
        return flat

    monkeypatch.setattr(saved, "CONFIG_VERSION", 5)
    monkeypatch.setattr(saved, "MIGRATIONS", saved.MIGRATIONS | {3: rename, 4: double})
    old = {"config": {"optimizer": {"lr": 0.5}}}
    for version in ({}, {"config_version": 1}, {"config_version": 2}, {"config_version": 3}):
        assert restore_config(old | version).optimizer.lr == 1.0
    assert restore_config({"config": {"optimizer": {"rate": 0.5}}, "config_version": 4}).optimizer.lr == 1.0
    assert restore_config(old | {"config_version": 5}).optimizer.lr == 0.5


def test_every_version_has_a_way_to_the_next():
    assert sorted(saved.MIGRATIONS) == list(range(1, CONFIG_VERSION))


# Files and overrides


def test_overrides_are_typed():
    c = load_config(
        QUICKSTART,
        ["--config.optimizer.lr=1", "--config.sample.guidance_interval=(0.1, 0.9)", "--config.model.scan=false"],
    )
    assert (c.optimizer.lr, c.sample.guidance_interval, c.model.scan) == (1.0, (0.1, 0.9), False)


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optimizer.lrr=1", "--config.optimizer.lrr does not exist; nearest: --config.optimizer.lr"),
        ("--config.optimiser.lr=1", "nearest: --config.optimizer.lr"),
        ("--config.model.width=wide", "--config.model.width=wide is not of type int; its value now is 128"),
        ("--config.model.width=1.5", "--config.model.width=1.5 is not of type int"),
        ("--config.model.scan=perhaps", "--config.model.scan=perhaps is not of type bool"),
        ("--config.model=1", "--config.model does not exist"),
        ("--lr=1", "--lr=1 is not understood"),
        ("--config.optimizer.lr", "is not understood"),
        (
            "--config.data.image_size=30",
            "data.image_size=30 is not divisible by model.patch_size=4; nearest: 28 and 32",
        ),
        (
            "--config.data.source=imagenet",
            "data.source='imagenet' is not known; "
            "allowed: captions, digits, folder, parquet, prepared, tars, tfds, webdataset",
        ),
        ("--config.data.caption_prefix=photo:", "data.caption_prefix='photo:' is put before captions of fewer words"),
        ("--config.loss.frequency_quality=101", "loss.frequency_quality=101 must be from 1 to 100"),
        ("--config.flow.null_probability=2", "flow.null_probability=2.0 must be from 0 to 1"),
        ("--config.flow.time_shift=0", "flow.time_shift=0.0 must be positive"),
        ("--config.optimizer.accumulation=3", "data.batch_size=32 is not divisible by optimizer.accumulation=3"),
        ("--config.sample.solver=magic", "solver='magic' is not known"),
        ("--config.sample.guidance_interval=(1,)", "guidance_interval="),
        ("--config.train.log_every=0", "train.log_every=0 must be 1 or more"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(UsageError) as error:
        load_config(QUICKSTART, [override])
    assert message in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere.py is no file"):
        load_config("nowhere.py")
    file = tmp_path / "mine.py"
    head = "from deco_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    file.write_text(head + "    c.model.widht = 3\n    return c\n")
    with pytest.raises(UsageError, match='mine.py: Did you mean "width" instead of "widht"'):
        load_config(str(file))
    file.write_text(head + "    c.model.width = 3.5\n    return c\n")
    with pytest.raises(UsageError, match="mine.py: Could not override field 'width'"):
        load_config(str(file))


def test_alignment_needs_a_block_that_exists():
    c = default_config()
    c.loss.update(alignment_weight=0.5, alignment_layer=23)
    with pytest.raises(UsageError, match="loss.alignment_layer=23 does not exist; model.depth=22"):
        check_config(c)


def test_how_a_network_is_computed_is_no_part_of_what_it_is():
    """A field of the model that a resumed run may change must not make another network, and the reverse."""
    made = {f"model.{field}" for kind in KINDS for field in network_fields(kind)} | {"model.kind", "model.dtype"}
    of_model = {name for name in FIELDS if name.startswith("model.")}
    assert made == {name for name in of_model if FIELDS[name].resume == "fixed"}
