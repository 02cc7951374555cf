"""A DDPMPipeline made from our models: diffusers itself loads it and draws the same images from the same noise. And back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm import SCHEDULES, BetaSchedule, GaussianDiffusion, ancestral, normal_noise
from pipeline.errors import UsageError
from pipeline.exchange import diffusers_scheduler, diffusers_weights
from pipeline.exchange.diffusers_folder import read_pipeline, write_pipeline
from pipeline.training.models import build_diffusion, build_model
from pipeline.training.trained import Trained
from tests.kit.closed_forms import exact, seeded
from tests.pipeline.exchange.models import IDDPM, made

UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def their_pipeline(folder: Path) -> Any:
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both_images(trained: Trained, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return two images as ours and as the pipeline draws them, in [0, 1], from the same x_T and the same noise."""
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    T, x_T = trained.diffusion.num_timesteps, normal_noise((2, *trained.shape), seeded(3))
    with torch.no_grad():
        *_, (_, ours) = ancestral(trained.diffusion, trained.model, x_T, generator=seeded())
    noise = seeded()
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: x_T)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: normal_noise(tuple(shape), noise))
    theirs = pipeline(batch_size=2, num_inference_steps=T, output_type="pt").images
    return (ours / 2 + 0.5).clamp(0, 1), theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "variance", "tolerance"),
    [
        ("eps", "fixed_large", 5e-5),  # 1e-4 on [-1, 1]
        ("v", "fixed_small", 5e-5),
        # an untrained network's x0 is far from x_t at the last steps, where their float32 weights of the two are off by 1e-4
        ("x0", "fixed_large", 2e-4),
    ],
)
def test_a_pipeline_of_ours_draws_our_images(
    prediction: str, variance: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = made(prediction=prediction, variance=variance)
    write_pipeline(trained, tmp_path)
    ours, theirs = both_images(trained, their_pipeline(tmp_path), monkeypatch)
    assert float(ours.std()) > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine", "num_timesteps": 60, "prediction": "v", "variance": "fixed_small"},
        {"schedule": "sigmoid", "num_timesteps": 50, "prediction": "x0", "variance": "learned_range"},
        {"schedule": "linear", "num_timesteps": 40, "clip_x0": False, "prediction": "v", "zero_terminal_snr": True},
        {"schedule": "quadratic", "num_timesteps": 70, "model": IDDPM},
        {"schedule": "warmup10_raw", "num_timesteps": 1200, "shape": (3, 8, 4), "steps": 30},
        {"betas": [0.01 * (i + 1) for i in range(30)], "model": {"attention_resolutions": [8, 4], "head_channels": 4}},
    ],
    ids=lambda settings: settings.get("schedule", "table"),
)
def test_with_tables_in_float64_nothing_but_rounding_is_left(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables that diffusers keeps in float32 are all that sets the two apart: any T, schedule, variance and form of network."""
    steps = settings.pop("steps", None)
    trained = made(**settings)
    write_pipeline(trained, tmp_path)
    pipeline = their_pipeline(tmp_path)
    torch.testing.assert_close(
        pipeline.scheduler.betas.double(), trained.diffusion.schedule.betas, rtol=3e-5, atol=1e-7
    )
    if steps is not None:  # the network alone at all of many steps is enough
        t = torch.arange(0, trained.diffusion.num_timesteps, steps)
        x = normal_noise((len(t), *trained.shape), seeded())
        with torch.no_grad():
            torch.testing.assert_close(trained.model(x, t), pipeline.unet(x, t).sample, rtol=1e-5, atol=1e-5)
        return
    exact(pipeline.scheduler, trained.diffusion.schedule)
    ours, theirs = both_images(trained, pipeline, monkeypatch)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prediction": "x_prev"}, "x_prev"),
        ({"model": {"class_conditional": True}}, "labels"),
        ({"model": {"channel_multipliers": [2, 2]}}, "first level"),
        ({"model": {"num_heads": 2, "attention_resolutions": [8, 4]}}, "heads of one width"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_reason(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        write_pipeline(made(**settings), tmp_path)


def test_heads_of_one_width_are_exported(tmp_path: Path) -> None:
    trained = made(model={"num_heads": 2, "attention_resolutions": [4]})  # only where there are 16 channels
    write_pipeline(trained, tmp_path)
    pipeline = their_pipeline(tmp_path)
    x, t = normal_noise((2, *trained.shape), seeded()), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(trained.model(x, t), pipeline.unet(x, t).sample, rtol=1e-5, atol=1e-5)


# -- back


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "cosine", "num_timesteps": 60, "prediction": "v", "variance": "fixed_small", "clip_x0": False},
        {"schedule": "sigmoid", "prediction": "x0", "variance": "learned_range", "model": IDDPM, "shape": (3, 8, 4)},
        {"schedule": "constant_raw", "num_timesteps": 300},
        {"schedule": "linear", "zero_terminal_snr": True, "prediction": "v"},
    ],
)
def test_what_is_written_is_read_back(settings: dict[str, Any], tmp_path: Path) -> None:
    trained = made(**settings)
    write_pipeline(trained, tmp_path)
    found = read_pipeline(tmp_path, "back")
    assert found.shape == trained.shape
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(found.model[name], tensor), name
    diffusion = build_diffusion(found.experiment)
    assert (diffusion.prediction, diffusion.clip_x0) == (trained.diffusion.prediction, trained.diffusion.clip_x0)
    assert diffusion.variance == trained.diffusion.variance
    torch.testing.assert_close(
        diffusion.schedule.alphas_cumprod, trained.diffusion.schedule.alphas_cumprod, rtol=1e-6, atol=1e-12
    )
    model = build_model(found.experiment, found.shape).eval()
    model.load_state_dict(found.model)
    x, t = normal_noise((2, *trained.shape), seeded()), torch.tensor([3, 40])
    with torch.no_grad():
        assert torch.equal(model(x, t), trained.model(x, t))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1000, 250])
def test_every_schedule_is_the_same_there_and_comes_back_by_name(name: str, T: int) -> None:
    from diffusers import DDPMScheduler

    ours = BetaSchedule.named(name, T)
    prediction = "v" if ours.has_zero_terminal_snr else "eps"
    config = diffusers_scheduler.to_their_config(GaussianDiffusion(ours, prediction, "fixed_small"))
    peer = DDPMScheduler.from_config(config)
    torch.testing.assert_close(peer.betas.double(), ours.betas, rtol=2e-5, atol=1e-7)
    back = diffusers_scheduler.from_their_config(json.loads(json.dumps(config)))
    torch.testing.assert_close(BetaSchedule.named(back["schedule"], T).betas, ours.betas, rtol=1e-6, atol=0)


def test_the_prediction_of_old_releases_is_read() -> None:
    for content, ours in (({"predict_epsilon": False}, "x0"), ({"predict_epsilon": True}, "eps"), ({}, "eps")):
        assert diffusers_scheduler.from_their_config(content)["prediction"] == ours
    assert (
        diffusers_scheduler.from_their_config({"predict_epsilon": False, "prediction_type": "v_prediction"})[
            "prediction"
        ]
        == "v"
    )


def test_their_own_schedules_are_read_as_they_are() -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    for kind, options in (
        (DDPMScheduler, {"beta_schedule": "sigmoid", "beta_start": 1e-3, "beta_end": 0.05}),
        (DDPMScheduler, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (DDIMScheduler, {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.03}),
        (DDPMScheduler, {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
    ):
        peer = kind(**options)
        settings = diffusers_scheduler.from_their_config(
            {"_class_name": kind.__name__, **json.loads(peer.to_json_string())}
        )
        assert settings["schedule"] == "table"
        torch.testing.assert_close(torch.tensor(settings["betas"]), peer.betas, rtol=2e-5, atol=1e-8)


def peer_folder(folder: Path, *, flat: bool, weights: str, old_names: bool, **changes: Any) -> Any:
    """Let diffusers write a network of its own, in the layout of `google/ddpm-cifar10-32`; return the network."""
    from diffusers import DDPMScheduler, UNet2DModel

    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0,
        "attention_head_dim": None,
    }  # fmt: skip
    torch.manual_seed(0)
    peer = UNet2DModel(**(settings | changes)).eval()
    unet, scheduler = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    peer.save_pretrained(unet, safe_serialization=True)
    DDPMScheduler(variance_type="fixed_large").save_pretrained(scheduler)
    file = unet / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if old_names:  # as files of 2022 have them
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    file.unlink()
    if weights == "bin":
        torch.save(state, unet / "diffusion_pytorch_model.bin")
    else:
        save_file(state, file)
    return peer


@pytest.mark.parametrize(
    ("flat", "weights", "old_names"), [(True, "bin", True), (False, "safetensors", False), (True, "safetensors", True)]
)
def test_a_network_of_theirs_is_ours(flat: bool, weights: str, old_names: bool, tmp_path: Path) -> None:
    peer = peer_folder(tmp_path, flat=flat, weights=weights, old_names=old_names)
    found = read_pipeline(tmp_path, "theirs")
    assert (found.shape, found.experiment.diffusion.variance) == ((3, 8, 8), "fixed_large")
    model = build_model(found.experiment, found.shape).eval()
    model.load_state_dict(found.model)
    x, t = normal_noise((3, 3, 8, 8), seeded()), torch.tensor([0, 17, 999])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), peer(x, t).sample, rtol=1e-5, atol=1e-5)


def test_what_their_file_does_not_say_is_as_in_their_class(tmp_path: Path) -> None:
    """Their defaults are not ours: an epsilon of 1e-5, cosines first, heads of 8 channels, padding on all sides."""
    theirs = {
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "attention_head_dim": 8,
    }
    peer = peer_folder(tmp_path, flat=False, weights="safetensors", old_names=False, **theirs)
    path = tmp_path / UNET
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in theirs}
    path.write_text(json.dumps(kept))
    found = read_pipeline(tmp_path, "theirs")
    model = build_model(found.experiment, found.shape).eval()
    model.load_state_dict(found.model)
    x, t = normal_noise((2, 3, 8, 8), seeded()), torch.tensor([5, 700])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), peer(x, t).sample, rtol=1e-5, atol=1e-5)


def test_averaged_weights_beside_the_others_are_the_averaged_weights(tmp_path: Path) -> None:
    trained = made()
    write_pipeline(trained, tmp_path)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.mul_(0.5)
    write_pipeline(trained, tmp_path / "other")
    (tmp_path / "other" / "unet").rename(tmp_path / "unet_ema")
    config = json.loads((tmp_path / "unet_ema" / "config.json").read_text())
    (tmp_path / "unet_ema" / "config.json").write_text(json.dumps(config | {"decay": 0.9999, "optimization_step": 5}))
    found = read_pipeline(tmp_path, "both")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(found.ema[name], tensor)
        assert torch.equal(found.model[name], 2 * tensor)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (UNET, {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        (UNET, {"time_embedding_type": "fourier"}, "fourier"),
        (UNET, {"act_fn": "gelu"}, "gelu"),
        (UNET, {"num_class_embeds": 10}, "num_class_embeds"),
        (UNET, {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        (UNET, {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "different levels"),
        (UNET, {"block_out_channels": [8, 12]}, "multiples"),
        (UNET, {"block_out_channels": [8, 10**9]}, "4096"),
        (UNET, {"sample_size": None}, "sample_size"),
        (UNET, {"out_channels": 5}, "out_channels"),
        (UNET, {"norm_num_groups": 5}, "norm_num_groups"),
        (UNET, {"time_embedding_dim": 100}, "time_embedding_dim"),
        (UNET, {"attn_norm_num_groups": 2}, "attn_norm_num_groups"),
        (UNET, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}, "attn_norm_num_groups"),
        (SCHEDULER, {"num_train_timesteps": 500}, "time embedding"),
        (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        (SCHEDULER, {"prediction_type": "flow"}, "flow"),
        (SCHEDULER, {"variance_type": "fixed_large_log"}, "fixed_large_log"),
        (SCHEDULER, {"variance_type": "learned_range"}, "out_channels"),
        (SCHEDULER, {"thresholding": True}, "thresholding"),
        (SCHEDULER, {"clip_sample_range": 4.0}, "clip_sample_range"),
        (SCHEDULER, {"beta_schedule": "laplace"}, "laplace"),
        (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas"),
        (SCHEDULER, {"variance_type": []}, "variance_type"),
        (SCHEDULER, {"prediction_type": ["epsilon"]}, "prediction_type"),
        (SCHEDULER, {"beta_end": 10**400}, "beta_end"),
        (SCHEDULER, {"beta_end": 10**25}, "betas"),
        (SCHEDULER, {"trained_betas": [10**400] * 1000}, "trained_betas"),
        (SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
    ],
    ids=lambda value: "-".join(map(str, value.items()))[:60] if isinstance(value, dict) else None,
)
def test_what_has_no_equal_here_is_refused_with_the_reason(
    file: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_pipeline(made(), tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((ValueError, UsageError), match=reason) as told:
        read_pipeline(tmp_path, "odd")
    assert "\n" not in str(told.value)


def test_a_learned_table_of_other_times_is_refused(tmp_path: Path) -> None:
    write_pipeline(made(num_timesteps=60), tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[diffusers_weights.TIME_TABLE] = tensors[diffusers_weights.TIME_TABLE].flip(0).contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match="time embeddings"):
        read_pipeline(tmp_path, "odd")
