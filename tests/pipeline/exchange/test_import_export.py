"""`ddpm-pipe import` and `export` as they are typed: a model travels there and back, and what is not to be taken is told in a line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from pipeline.config.experiment import DataConfig
from pipeline.errors import CheckpointError
from pipeline.exchange import export_onnx
from pipeline.exchange.diffusers_folder import write_pipeline
from pipeline.runs.import_run import read_folder
from pipeline.storage.folder import RunStatus
from pipeline.storage.runs import Run
from pipeline.training.trained import Trained, experiment_of
from tests.kit.commands import Typed
from tests.pipeline.exchange.models import IDDPM, made
from tests.pipeline.exchange.test_foreign_tensors import Canary


@pytest.fixture
def pipeline(home: Path) -> Path:
    """A folder in diffusers' layout."""
    folder = home / "theirs"
    write_pipeline(made(num_timesteps=50, schedule="cosine"), folder)
    return folder


def test_there_and_back_through_every_format_of_tensors(typed: Typed, home: Path, pipeline: Path) -> None:
    code, out, err = typed("import", "theirs", "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)
    assert (first["images"], first["schedule"]) == ("1x8x8", "cosine, T = 50")
    imported = Run.find(home, first["run"])
    assert imported.state().status is RunStatus.FINISHED
    assert imported.record.imported_from == str(pipeline)

    assert typed("export", first["run"], "again", "--format", "diffusers")[0] == 0
    for file in sorted(pipeline.rglob("*")):
        if file.is_file():
            assert (home / "again" / file.relative_to(pipeline)).read_bytes() == file.read_bytes(), file

    code, out, _ = typed("export", first["run"], "ours", "--format", "safetensors", "--json")
    assert (code, json.loads(out)["files"]) == (0, ["experiment.json", "weights.safetensors"])
    code, out, _ = typed("import", "ours", "--name", "twice", "--json")
    assert code == 0
    second = Run.find(home, json.loads(out)["run"])
    assert second.record.name == "twice"
    one, two = Trained.from_run(imported).model.state_dict(), Trained.from_run(second).model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_imported_run_is_sampled_listed_and_not_resumed(typed: Typed, home: Path, pipeline: Path) -> None:
    typed("import", "theirs")
    code, _, err = typed("sample", "latest", "-n", "2", "--steps", "3", "--out", "images", "--format", "png")
    assert code == 0, err
    assert len(list((home / "images").glob("*.png"))) == 2
    assert "theirs" in typed("runs")[1]
    code, _, err = typed("resume", "latest")
    assert (code, "--fork" in err) == (2, True)
    code, _, err = typed("resume", "latest", "--fork")
    assert (code, "--data" in err) == (3, True)
    code, _, err = typed("evaluate", "latest", "--steps", "2")
    assert (code, "--data" in err) == (3, True)
    code, _, err = typed("resume", "latest", "--data", "digits")
    assert (code, "--fork" in err) == (2, True)


def test_with_images_it_is_scored(typed: Typed, home: Path, pipeline: Path) -> None:
    assert typed("import", "theirs", "--data", "digits")[0] == 0
    code, out, err = typed("evaluate", "latest", "--steps", "2", "-n", "130", "--json")
    assert code == 0, err
    assert json.loads(out)["values"]["fid_classifier_n130"] > 1


def test_it_is_fine_tuned_as_a_new_run(typed: Typed, home: Path, pipeline: Path) -> None:
    assert typed("import", "theirs")[0] == 0
    settings = ["training.steps=2", "training.batch_size=16", "training.warmup_steps=0", "evaluation.enabled=false"]
    changed = [word for setting in settings for word in ("-s", setting)]
    code, stdout, stderr = typed("resume", "latest", "--fork", "--data", "digits", *changed, "--json")
    assert code == 0, stderr
    tuned = Run.find(home, json.loads(stdout[stdout.index("{") :])["run"])
    (imported,) = (run for run in Run.all(home) if run.id != tuned.id)
    tags = MlflowClient(f"sqlite:///{home}/mlflow.db").get_run(str(tuned.mlflow_run_id)).data.tags
    assert (tags["ddpm_pipe.origin"], tags["ddpm_pipe.origin_mlflow_run"]) == (
        f"run {imported.id}",
        imported.mlflow_run_id,
    )
    assert f"from the averaged weights of step 0 of run {imported.id}" in tags["mlflow.note.content"]
    assert tuned.record.dataset["name"] == "digits"
    before = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    after = Trained.from_run(tuned, weights="raw").model.state_dict()["conv_in.weight"]
    assert 0 < float((after - before).abs().max()) < 1e-3  # two steps of Adam from these weights, not from others


def weights_of(reference: str, home: Path) -> dict[str, torch.Tensor]:
    return dict(Trained.from_run(Run.find(home, reference)).model.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_variants_and_shards_are_read(suffix: str, typed: Typed, home: Path, pipeline: Path) -> None:
    assert typed("import", "theirs")[0] == 0
    sound = weights_of("latest", home)
    unet = pipeline / "unet"
    stem, whole = "diffusion_pytorch_model", load_file(unet / "diffusion_pytorch_model.safetensors")
    save = save_file if suffix == "safetensors" else torch.save
    (unet / f"{stem}.safetensors").unlink()

    save({name: tensor.half() for name, tensor in whole.items()}, unet / f"{stem}.fp16.{suffix}")
    code, _, err = typed("import", "theirs")
    assert code == 0, err
    assert all(torch.equal(tensor, sound[name].half().float()) for name, tensor in weights_of("latest", home).items())

    names = sorted(whole)
    parts = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
    for file, inside in parts.items():
        save({name: whole[name] for name in inside}, unet / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (unet / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (unet / f"{stem}.fp16.{suffix}").unlink()
    code, _, err = typed("import", "theirs")
    assert code == 0, err
    assert all(torch.equal(tensor, sound[name]) for name, tensor in weights_of("latest", home).items())

    file = next(iter(parts))
    for changed, message in (
        (index["weight_map"] | {names[0]: "../x.bin"}, "has no weight_map of shards of this folder"),
        (dict.fromkeys(names[1:], file), f"has no {names[0]}"),
        (index["weight_map"] | {"other": file}, "holds other, which this network does not have"),
        (
            {name: part.replace("3-of", "9-of") for name, part in index["weight_map"].items()},
            "has no diffusion_pytorch_model-00009-of-00003",
        ),
    ):
        (unet / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": changed}))
        code, _, err = typed("import", "theirs")
        assert (code, message in err) == (4, True), err
    (unet / f"{stem}.{suffix}.index.json").unlink()
    code, _, err = typed("import", "theirs")
    assert code == 4
    assert f"has no weights: got config.json, {file}, " in err
    assert f"expected {stem}.safetensors or .bin, a variant such as" in err


@pytest.mark.parametrize("kind", ["canary in .bin", "canary in the network's name", "header bomb", "text", "nothing"])
def test_a_folder_that_is_not_to_be_taken_ends_with_4_and_leaves_no_run(
    kind: str, typed: Typed, home: Path, pipeline: Path
) -> None:
    canary, weights = home / "canary", pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "canary in .bin":
        weights.unlink()
        torch.save({"conv_in.weight": Canary(canary)}, weights.with_suffix(".bin"))
    elif kind == "canary in the network's name":
        (home / "canary_module.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
        made().save(home / "own")
        about = json.loads((home / "own" / "experiment.json").read_text())
        about["experiment"]["model"] = {"type": "canary_module:Network"}
        (home / "own" / "experiment.json").write_text(json.dumps(about))
        pipeline = home / "own"
    elif kind == "header bomb":
        weights.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    elif kind == "text":
        (pipeline / "unet" / "config.json").write_text("a model card")
    else:
        pipeline = home / "empty"
        pipeline.mkdir()
    code, out, err = typed("import", str(pipeline))
    assert (code, out) == (4, ""), err
    assert len(err.splitlines()) == 1
    assert not canary.exists()
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"num_res_blocks": 10**9}),
        ("model", {"channel_multipliers": [1] * 1000}),
        ("model", {"channels": 10**7}),
        ("model", {"norm_groups": 10**400}),
        ("diffusion", {"num_timesteps": 10**12}),
    ],
)
def test_an_experiment_that_asks_for_too_much_is_refused_before_it_is_built(
    section: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made(num_timesteps=50).save(tmp_path / "own")
    file = tmp_path / "own" / "experiment.json"
    about = json.loads(file.read_text())
    about["experiment"][section] |= changes
    file.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=f"{section}.{next(iter(changes))}.*: got .*, expected at most") as told:
        read_folder(tmp_path / "own", "own")
    assert "\n" not in str(told.value)


def test_a_network_larger_than_the_memory_is_refused_by_its_file(home: Path, pipeline: Path) -> None:
    """Its numbers would need half a terabyte; the file has none of them."""
    config = pipeline / "unet" / "config.json"
    wide = {"block_out_channels": [4096, 4096], "layers_per_block": 32}
    config.write_text(json.dumps(json.loads(config.read_text()) | wide))
    with pytest.raises(CheckpointError, match=r"lacks \d+ more"):
        read_folder(pipeline, "wide")


def test_images_of_another_shape_are_refused_with_how_to_make_them(typed: Typed, home: Path) -> None:
    write_pipeline(made(shape=(3, 16, 8), num_timesteps=50, model={"attention_resolutions": [8]}), home / "tall")
    code, _, err = typed("import", "tall", "--data", "digits")
    assert code == 3
    assert "--image-size 16x8 --mode RGB" in err
    assert typed("import", "missing")[0] == 2


def test_images_of_classes_that_a_model_does_not_know_are_reported(typed: Typed, home: Path) -> None:
    made(num_timesteps=50, model={"class_conditional": True}).save(home / "labelled")  # of "a", "b", "c"
    code, out, err = typed("import", "labelled", "--data", "digits")
    told = err.splitlines()[-1]  # after that the digits are made
    assert (code, out, "class '0'" in told, "a, b, c" in told) == (2, "", True, True)
    assert not (home / "runs").exists()


def test_of_its_images_an_imported_run_says_what_was_given_here(typed: Typed, home: Path) -> None:
    """What the exporter's run said of its own images would make another set of ours; a place that it names is not opened."""
    own = made(num_timesteps=50)
    data = own.experiment.data.model_copy(
        update={"source": "their/photos", "split": "validation", "image_size": 8, "mode": "L"}
    )
    evaluation = own.experiment.evaluation.model_copy(update={"inception_weights": "/dev/zero", "num_images": 77})
    theirs = own.experiment.model_copy(update={"data": data, "evaluation": evaluation})
    replace(own, experiment=theirs).save(home / "own")
    assert typed("import", "own", "--data", "digits")[0] == 0
    run = Run.find(home, "latest")
    assert run.state().step == Trained.load(str(home / "own")).step > 0
    assert run.mlflow_run_id is not None
    tracked = MlflowClient(f"sqlite:///{home}/mlflow.db").get_run(run.mlflow_run_id)
    assert tracked.info.run_name == f"{run.record.name} {run.id}"
    experiment = experiment_of(run)
    assert experiment.data == DataConfig(source="digits")
    assert (experiment.evaluation.inception_weights, experiment.evaluation.num_images) == (None, 77)
    assert experiment.model == own.experiment.model


def test_an_export_that_cannot_be_leaves_nothing(typed: Typed, home: Path) -> None:
    made(prediction="x_prev", num_timesteps=50).save(home / "mean")
    assert typed("import", "mean")[0] == 0
    code, _, err = typed("export", "latest", "out")
    assert (code, "x_prev" in err) == (2, True)
    assert sorted(p.name for p in home.iterdir() if "out" in p.name) == []
    (home / "full").mkdir()
    (home / "full" / "a").touch()
    code, _, err = typed("export", "latest", "full", "--format", "safetensors")
    assert (code, "not an empty folder" in err) == (2, True)


def test_the_onnx_graph_computes_what_the_network_does(typed: Typed, home: Path) -> None:
    import onnxruntime

    trained = made(
        shape=(3, 8, 4), num_timesteps=50, variance="learned_range", model={**IDDPM, "class_conditional": True}
    )
    trained.save(home / "labelled")
    assert typed("import", "labelled")[0] == 0
    code, out, err = typed("export", "latest", "graph", "--format", "onnx", "--json")
    assert (code, err.count("\n"), err[:11]) == (0, 1, "latest: run")
    assert json.loads(out)["files"] == ["denoiser.onnx", "experiment.json"]
    session = onnxruntime.InferenceSession(str(home / "graph" / "denoiser.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 1, 20, 48, 49]), torch.tensor([0, 1, 2, 3, 0])
    (theirs,) = session.run(["prediction"], {"x_t": x.numpy(), "t": t.numpy(), "y": y.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(theirs), trained.model(x, t, y), rtol=1e-4, atol=1e-5)


def test_without_the_onnx_packages_a_line_says_what_to_install(
    typed: Typed, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("import", "theirs")
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxscript" else os)
    code, _, err = typed("export", "latest", "graph", "--format", "onnx")
    assert code == 2
    assert "pip install 'ddpm-pipe[onnx]'" in err
