"""Experiment and profile files: what is read, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline.config import presets
from pipeline.config.cluster_profile import Profile, load_profile, settled
from pipeline.config.experiment import (
    DiffusionConfig,
    Experiment,
    ModelConfig,
    SamplingConfig,
    TrainingConfig,
    differences,
    experiment_from,
    load_experiment,
    with_overrides,
)
from pipeline.errors import UsageError
from pipeline.training.combinations import check_training


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", presets.names("experiments"))
def test_each_preset_reads_and_survives_a_round_trip(name):
    experiment = load_experiment(presets.find("experiments", name))
    assert experiment_from(experiment.to_dict()) == experiment


def test_a_network_of_ones_own_survives_a_round_trip():
    experiment = experiment_from({"model": {"type": "a.b:C", "arguments": {"width": 3}}})
    assert experiment_from(experiment.to_dict()) == experiment


@pytest.mark.parametrize("name", presets.names("cluster"))
def test_each_profile_reads(name):
    assert load_profile(name).name == name


def test_local_profile_holds_the_defaults():
    assert load_profile("local") == settled(Profile())


def test_an_experiment_with_few_timesteps_survives_a_round_trip():
    experiment = experiment_from({"diffusion": {"num_timesteps": 30}})
    assert experiment_from(experiment.to_dict()).sampling.num_steps(30) == 30


def test_numbers_without_a_point_are_numbers(written):
    assert load_experiment(written("training: {learning_rate: 1e-4}")).training.learning_rate == 1e-4


def test_overrides_win_over_the_file_and_data_over_both(written):
    path = written("training: {steps: 10}\ndata: {source: digits}")
    experiment = load_experiment(path, ["training.steps=20", "model.channel_multipliers=[1, 2]"], data="elsewhere: odd")
    assert (experiment.training.steps, experiment.model.channel_multipliers) == (20, (1, 2))
    assert experiment.data.source == "elsewhere: odd"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trainig: {}", "did you mean 'training'"),
        ("training: {learning_rat: 1}", "did you mean 'learning_rate'"),
        ("training: {steps: 0}", "training.steps: got 0"),
        ("training: {learning_rate: .nan}", "training.learning_rate: got a number that is not finite"),
        ("training: {learning_rate: .inf}", "training.learning_rate"),
        ("training: {learning_rate: fast}", "training.learning_rate: got 'fast'"),
        ("seed: 1\nseed: 2", "line 2: key 'seed' appears twice"),
        ("training: {batch_size: 6, num_streams: 4}", "does not divide batch_size 6"),
        ("diffusion: {num_timesteps: 1}", "diffusion.num_timesteps: got 1"),
        ("diffusion: {num_timesteps: 10}\nsampling: {steps: 11}", "more than diffusion.num_timesteps 10"),
        ("model: {type: os.system}", "expected 'unet', 'vae' or 'package.module:Class'"),
        ("model: {arguments: {a: 1}}", "belong to a network of your own"),
        ("model: {type: 'a.b:C', channels: 3}", "belong to type 'unet'"),
        ("model: {channel_multipliers: []}", "model.channel_multipliers"),
        ("training: {ema_decay: 1.0}", "training.ema_decay: got 1.0, expected below 1"),
        ("training: {ema_decay: []}", "training.ema_decay: got []"),
        ("training: {ema_decay: [0.9, 1.5]}", "training.ema_decay.1: got 1.5, expected below 1"),
        ("data: {image_size: 0}", "data.image_size: got 0, expected at least 1"),
        ("data: {image_size: [8, 9000]}", "data.image_size.1: got 9000, expected at most 8192"),
        ("training: {ema_decay: [0.9, 0.99, 0.9]}", "one stands twice"),
        ("training: {ema_widths: [0.05, 0.1]}", "ema_snapshot_every_steps belong together"),
        ("training: {ema_widths: [0.3], ema_snapshot_every_steps: 10}", "training.ema_widths"),
        ("training: {objective: l1}", "training.objective: got 'l1'"),
        ("diffusion: {prediction: epsilon}", "diffusion.prediction: got 'epsilon'"),
        ("diffusion: {schedule: table}", "needs its betas"),
        ("diffusion: {betas: [0.1, 0.2], schedule: linear}", "are both given"),
        ("diffusion: {betas: [0.1, 0.2], num_timesteps: 3}", "the table has 2 betas"),
        ("diffusion: {betas_file: none.txt}", "none.txt cannot be read"),
        ("model: {num_heads: 4, head_channels: 16}", "give one of them"),
        ("seed: -1", "seed: got -1"),
        ("name: a/b", "name: got 'a/b'"),
        ("- a\n- b", "expected a mapping"),
        ("a: [1", "line"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system [echo]", "python/object/apply"),
        ("a: \0", "not valid YAML: unacceptable character #x0000"),
    ],
)
def test_each_mistake_is_reported_in_one_line(written, text, told):
    with pytest.raises(UsageError) as caught:
        load_experiment(written(text))
    message = str(caught.value)
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "assignment", ["steps", "=3", "training=5", "seed.x.y=1", "training.steps=[", "training.stepz=3"]
)
def test_bad_overrides_are_reported(written, assignment):
    with pytest.raises(UsageError):
        load_experiment(written(""), [assignment])


def test_binary_and_oversized_files_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_experiment(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(UsageError, match="too large"):
        load_experiment(tmp_path / "b.yaml")


def test_unknown_presets_and_files_name_what_there_is(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        presets.find("experiments", "digit")
    with pytest.raises(UsageError, match="no such file"):
        presets.find("experiments", str(tmp_path / "none.yaml"))


def test_hash_changes_with_what_decides_the_weights_only():
    base = Experiment()
    assert with_overrides(base, ["training.steps=5", "checkpoint.keep=9", "logging.every_steps=7"]).hash(
        "images"
    ) == base.hash("images")
    for assignment in ("seed=1", "diffusion.num_timesteps=500", "training.batch_size=64"):
        changed = with_overrides(base, [assignment])
        assert changed.hash("images") != base.hash("images")
        assert len(differences(base, changed)) == 1


def test_the_images_are_known_by_their_fingerprint_and_not_by_their_place():
    base = Experiment()
    assert with_overrides(base, ["data.source=/elsewhere"]).hash("a") == base.hash("a") != base.hash("b")


def test_every_setting_that_decides_the_weights_changes_the_hash():
    used = {
        "model": {"num_heads": 2, "scale_shift_norm": True, "freq_shift": 0, "class_conditional": True},
        "diffusion": {"zero_terminal_snr": True, "betas": [0.1, 0.2]},
        "training": {"objective": "vlb", "timestep_sampling": "loss_aware", "label_dropout": 0.2, "weight_decay": 0.1},
    }
    hashes = {Experiment().hash("images")}
    for section, settings in used.items():
        for name, value in settings.items():
            hashes.add(experiment_from({section: {name: value}}).hash("images"))
    assert len(hashes) == 11


def test_a_table_of_betas_travels_with_the_experiment(tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text("# three steps\n0.1, 0.2\n3e-1\n")
    (tmp_path / "e.yaml").write_text("diffusion: {betas_file: my.txt}")
    experiment = load_experiment(tmp_path / "e.yaml")
    diffusion = experiment.diffusion
    assert (diffusion.schedule, diffusion.num_timesteps, diffusion.betas) == ("table", 3, (0.1, 0.2, 0.3))
    assert diffusion.betas_file == "my.txt"
    # its content decides the hash, its name and place do not
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.json").write_text("[0.1, 0.2, 0.3]")
    monkeypatch.chdir(tmp_path / "folder")
    overridden = with_overrides(Experiment(name="e"), ["diffusion.betas_file=other.json"])
    assert overridden.hash("images") == experiment.hash("images")
    (tmp_path / "folder" / "other.json").write_text("[0.1, 0.2, 0.4]")
    other = with_overrides(experiment, ["diffusion.betas_file=other.json"])
    assert other.hash("images") != experiment.hash("images")
    # nothing reads the file again, and a named schedule takes the table's place
    (tmp_path / "my.txt").unlink()
    assert experiment_from(experiment.to_dict()) == experiment
    assert with_overrides(experiment, ["diffusion.schedule=cosine"]).diffusion.betas is None
    given = with_overrides(
        experiment, ["diffusion.schedule=table", "diffusion.num_timesteps=2", "diffusion.betas=[0.3,0.4]"]
    )
    assert (given.diffusion.betas, given.diffusion.betas_file) == ((0.3, 0.4), None)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(experiment.to_dict()))
    (tmp_path / "my.txt").unlink(missing_ok=True)
    assert load_experiment(tmp_path / "resolved.yaml").diffusion == diffusion  # its file is needed no more
    # a tracked parameter is short
    assert len(experiment.flat()["diffusion.betas"]) < 30


@pytest.mark.parametrize(
    ("text", "told"), [("0.1 x", "holds 'x'"), ("0.1", "holds 1 numbers"), ("", "holds 0 numbers")]
)
def test_a_file_that_is_no_table_is_reported(tmp_path, text, told):
    (tmp_path / "betas.txt").write_text(text)
    with pytest.raises(UsageError, match=told):
        with_overrides(Experiment(), [f"diffusion.betas_file={tmp_path / 'betas.txt'}"])


def test_choices_are_those_of_the_core():
    import ddpm

    def choices(section, field):
        return set(get_args(section.model_fields[field].annotation))

    assert choices(DiffusionConfig, "prediction") == {p.value for p in ddpm.Prediction}
    assert choices(DiffusionConfig, "variance") == {v.value for v in ddpm.Variance}
    assert choices(TrainingConfig, "objective") == {o.value for o in ddpm.ObjectiveKind}
    assert choices(SamplingConfig, "spacing") == set(ddpm.TIMESTEP_SPACINGS)


def file_of(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_based_on_a_preset_holds_its_settings_but_for_those_it_names(tmp_path):
    digits = load_experiment(presets.find("experiments", "digits"))
    path = file_of(tmp_path, "mine.yaml", "base: digits\ntraining: {steps: 7}\nsampling: {sampler: ancestral}\n")
    mine = load_experiment(path)
    changed = {"name", "training.steps", "sampling.sampler", "sampling.steps"}
    assert mine.name == "mine"
    assert {key for key, value in mine.flat().items() if value != digits.flat()[key]} <= changed
    again = load_experiment(file_of(tmp_path, "again.yaml", "base: mine.yaml\nseed: 3\n"), ["training.steps=9"])
    assert (again.training.steps, again.seed, again.sampling.sampler) == (9, 3, "ancestral")
    with pytest.raises(UsageError, match="based on itself"):
        load_experiment(file_of(tmp_path, "loop.yaml", "base: loop.yaml\n"))
    with pytest.raises(UsageError, match=r"unknown preset 'digit'.*did you mean 'digits'"):
        load_experiment(file_of(tmp_path, "typo.yaml", "base: digit\n"))


def test_a_base_may_be_changed_to_betas_of_a_file_beside_the_new_one(tmp_path):
    file_of(tmp_path, "betas.txt", "0.1 0.2 0.3\n")
    text = "base: digits\ndiffusion: {betas_file: betas.txt}\nsampling: {steps: 3}\n"
    assert load_experiment(file_of(tmp_path, "mine.yaml", text)).diffusion.betas == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "how",
    [
        "base: digits\nmodel: {type: 'nets:Mine', arguments: {width: 64}}\n",
        None,
    ],
)
def test_a_network_of_ones_own_takes_the_place_of_the_presets(tmp_path, how):
    if how is None:
        found = load_experiment(
            presets.find("experiments", "digits"), ["model.type=nets:Mine", "model.arguments.width=64"]
        )
    else:
        found = load_experiment(file_of(tmp_path, "mine.yaml", how))
    assert found.model == ModelConfig(type="nets:Mine", arguments={"width": 64})
    assert found.training.steps == 2800
    other = with_overrides(found, ["model.type=nets:Other"])
    assert other.model == ModelConfig(type="nets:Other")


def test_the_vae_takes_the_place_of_the_presets_network_and_process():
    digits = presets.find("experiments", "digits")
    found = load_experiment(digits, ["model.type=vae"])
    wanted = load_experiment(presets.find("experiments", "digits-vae"))
    assert (found.model, found.diffusion, found.sampling) == (wanted.model, wanted.diffusion, wanted.sampling)
    check_training(found)
    assert load_experiment(digits, ["model={type: vae}"]).diffusion == DiffusionConfig()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.channel_multipliers=[]", "model.channel_multipliers: got [], expected at least 1 in the list"),
        ("training.steps=0", "training.steps: got 0, expected at least 1"),
        ("training.steps=1.5", "training.steps: got 1.5, expected a whole number"),
        ("training.steps=many", "training.steps: got 'many', expected a whole number"),
        ("training.learning_rate=0", "training.learning_rate: got 0, expected above 0"),
        ("training.compile=perhaps", "training.compile: got 'perhaps', expected true or false"),
        ("training.adam_betas=3", "training.adam_betas: got 3, expected a list, such as [1, 2]"),
        ("sampling.sampler=euler", "sampling.sampler: got 'euler', expected 'ddim', 'ancestral' or 'dpm_solver'"),
        ("training.precision=fp8", "training.precision: got 'fp8', expected 'fp32', 'bf16', 'fp16' or 'mixed'"),
        ("name=a b", "name: got 'a b', expected text of the form"),
        ("data.source=3", "data.source: got 3, expected text"),
        ("training=3", "training: got 3, expected a group of settings"),
    ],
)
def test_a_wrong_setting_is_told_in_plain_words_and_not_blamed_on_the_file(setting, told):
    with pytest.raises(UsageError) as refused:
        load_experiment(presets.find("experiments", "digits"), [setting])
    assert str(refused.value).startswith("-s: " + told)


def test_a_fault_of_the_file_is_the_files_whatever_is_overridden(tmp_path):
    path = file_of(tmp_path, "mine.yaml", "training: {steps: 0}\n")
    with pytest.raises(UsageError, match=r"^mine\.yaml: training\.steps: got 0"):
        load_experiment(path, ["seed=1"])
    assert load_experiment(path, ["training.steps=1"]).training.steps == 1
