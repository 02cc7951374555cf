"""Experiment and profile files: what is read, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import presets
from pipeline.cluster_profile import Profile, load_profile
from pipeline.config import Experiment, differences, experiment_from, load_experiment, with_overrides
from pipeline.errors import UsageError


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
    assert load_profile("local") == Profile()


def test_cifar10_preset_is_the_papers():
    # Ho et al. 2020, appendix B, and their code's warm-up
    experiment = load_experiment(presets.find("experiments", "cifar10"))
    training, model, diffusion = experiment.training, experiment.model, experiment.diffusion
    assert (model.channels, model.channel_multipliers, model.num_res_blocks) == (128, (1, 2, 2, 2), 2)
    assert (model.attention_resolutions, model.dropout) == ((16,), 0.1)
    assert (training.steps, training.batch_size, training.learning_rate) == (800_000, 128, 2e-4)
    assert (training.warmup_steps, training.grad_clip, training.ema_decay) == (5000, 1.0, 0.9999)
    assert (training.adam_betas, training.adam_eps) == ((0.9, 0.999), 1e-8)
    assert (diffusion.schedule, diffusion.num_timesteps, diffusion.variance) == ("linear", 1000, "fixed_large")
    assert experiment.data.horizontal_flip


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
        ("model: {type: os.system}", "expected 'unet' or 'package.module:Class'"),
        ("model: {arguments: {a: 1}}", "belong to a network of your own"),
        ("model: {type: 'a.b:C', channels: 3}", "belong to type 'unet'"),
        ("model: {channel_multipliers: []}", "model.channel_multipliers"),
        ("seed: -1", "seed: got -1"),
        ("name: a/b", "name: got 'a/b'"),
        ("- a\n- b", "expected a mapping"),
        ("a: [1", "line"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system [echo]", "python/object/apply"),
    ],
)
def test_each_mistake_is_told_in_one_line(written, text, told):
    with pytest.raises(UsageError) as caught:
        load_experiment(written(text))
    message = str(caught.value)
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "assignment", ["steps", "=3", "training=5", "seed.x.y=1", "training.steps=[", "training.stepz=3"]
)
def test_bad_overrides_are_told(written, assignment):
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
    assert (
        with_overrides(base, ["training.steps=5", "checkpoint.keep=9", "logging.every_steps=7"]).hash() == base.hash()
    )
    for assignment in ("seed=1", "diffusion.num_timesteps=500", "training.batch_size=64", "data.source=mnist"):
        changed = with_overrides(base, [assignment])
        assert changed.hash() != base.hash()
        assert len(differences(base, changed)) == 1
