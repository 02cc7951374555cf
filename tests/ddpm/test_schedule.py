"""Schedules: their tables against closed forms and published values, and what is refused."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from ddpm import SCHEDULES, BetaSchedule, GaussianDiffusion

ALLOWED_TO_END_AT_ONE = {"jsd"}


@pytest.mark.parametrize("T", [21, 100, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_follow_from_betas_alone(name: str, T: int) -> None:
    s = BetaSchedule.named(name, num_timesteps=T)
    betas = s.betas.numpy()
    assert betas.dtype == np.float64
    assert betas.shape == (T,)
    assert (betas > 0).all()
    assert (betas[:-1] < 1).all()
    assert betas[-1] == 1 if name in ALLOWED_TO_END_AT_ONE else betas[-1] < 1
    abar = np.array([math.prod((1 - betas[: t + 1]).tolist()) for t in range(T)])
    before = np.concatenate([[1.0], abar[:-1]])
    expected = {
        "alphas": 1 - betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "snr": abar / (1 - abar),
        "posterior_variance": betas * (1 - before) / (1 - abar),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - abar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - abar),
    }
    for table, values in expected.items():
        np.testing.assert_allclose(getattr(s, table).numpy(), values, rtol=1e-9, atol=1e-300, err_msg=table)
    log = s.posterior_log_variance_clipped.numpy()
    np.testing.assert_allclose(log[1:], np.log(expected["posterior_variance"][1:]), rtol=1e-9)
    assert log[0] == log[1]


@pytest.mark.parametrize(
    ("name", "T", "abar", "rtol"),
    [
        ("linear_raw", 50, 0.60, 0.005),
        ("linear_raw", 100, 0.364, 0.0014),
        ("linear_raw", 250, 0.080, 0.005),
        ("linear_raw", 1000, 4.036e-05, 2e-4),
        ("linear_raw", 4000, 2.7e-18, 0.02),
        ("linear", 1000, 4.036e-05, 2e-4),
        ("cosine", 1000, 2.4e-9, 0.02),
        ("quadratic", 1000, 7.33e-4, 1e-3),
        ("constant", 1000, 1.68e-9, 3e-3),
        ("warmup10", 1000, 4.61e-9, 2e-3),
        ("warmup50", 1000, 2.61e-7, 3e-3),
        ("sigmoid", 1000, 3.00e-7, 3e-3),
        ("jsd", 1000, 0.0, 0.0),
    ],
)
def test_published_abar_at_the_last_step(name: str, T: int, abar: float, rtol: float) -> None:
    assert float(BetaSchedule.named(name, T).alphas_cumprod[-1]) == pytest.approx(abar, rel=rtol, abs=0)


@pytest.mark.parametrize("T", [50, 100, 250, 1000, 4000])
def test_trap_4_scaled_linear_reaches_the_prior_whatever_T(T: int) -> None:
    abar = float(BetaSchedule.named("linear", T).alphas_cumprod[-1])
    assert 7.5e-6 < abar < 4.5e-5  # "between 8e-6 (T = 50) and 4e-5", to one digit


def test_the_curves_themselves() -> None:
    T = 40
    u = np.arange(T + 1) / T
    scaled = 1000 / T
    np.testing.assert_allclose(BetaSchedule.named("linear", T).betas, np.linspace(1e-4, 0.02, T) * scaled, rtol=1e-12)
    np.testing.assert_allclose(BetaSchedule.named("linear_raw", T).betas, np.linspace(1e-4, 0.02, T), rtol=1e-12)
    np.testing.assert_allclose(
        BetaSchedule.named("quadratic", T).betas, np.linspace(1e-4**0.5, 0.02**0.5, T) ** 2 * scaled, rtol=1e-12
    )
    np.testing.assert_allclose(BetaSchedule.named("constant_raw", T).betas, np.full(T, 0.02), rtol=1e-12)
    warm = np.concatenate([np.linspace(1e-4, 0.02, 4), np.full(36, 0.02)])
    np.testing.assert_allclose(BetaSchedule.named("warmup10_raw", T).betas, warm, rtol=1e-12)
    np.testing.assert_allclose(BetaSchedule.named("jsd", T).alphas_cumprod, 1 - u[1:], rtol=1e-12, atol=1e-15)
    cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    # abar telescopes to the curve, over its start, wherever the cap of 0.999 does not act: all but the last step
    np.testing.assert_allclose(
        BetaSchedule.named("cosine", T).alphas_cumprod[:-1], (cosine / cosine[0])[1:-1], rtol=1e-10
    )
    logistic = 1 / (1 + np.exp(-(-3 + 6 * u)))
    sigmoid = (logistic[-1] - logistic) / (logistic[-1] - logistic[0])
    np.testing.assert_allclose(BetaSchedule.named("sigmoid", T).alphas_cumprod[:-1], sigmoid[1:-1], rtol=1e-10)


@pytest.mark.parametrize("T", [1000, 4000, 50])
def test_cosine_equals_a_peers(T: int) -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(BetaSchedule.named("cosine", T).betas.float(), peer, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "T", "says"),
    [
        ("linear", 1, "num_timesteps=1, expected an integer of at least 2"),
        ("linear", 0, "at least 2"),
        ("linear", -3, "at least 2"),
        ("linear", 10.0, "expected an integer"),
        ("linear", True, "expected an integer"),
        (
            "linear",
            20,
            "last beta, 0.02 * 1000 / T = 1, is not below 1; use num_timesteps above 20, or 'cosine', or 'linear_raw'",
        ),
        ("quadratic", 5, "is not below 1"),
        ("constant", 20, "is not below 1"),
        ("warmup10", 19, "is not below 1"),
        ("warmup50", 2, "is not below 1"),
        ("constant_raw", 40_000, "the image is lost long before the end"),
        ("linaer", 100, "unknown schedule 'linaer': did you mean 'linear'?"),
        ("cosine_raw", 100, "unknown schedule 'cosine_raw'"),
    ],
)
def test_refused_names_and_lengths(name: str, T: int, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        BetaSchedule.named(name, T)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("betas", "says"),
    [
        ([0.1], "at least 2"),
        ([0.1, 0.0], "betas[1] = 0, expected every beta inside (0, 1)"),
        ([-0.1, 0.1], "betas[0] = -0.1"),
        ([0.1, 1.0, 0.1], "betas[1] = 1"),
        ([0.1, 1.5], "betas[1] = 1.5"),
        ([0.1, float("nan")], "betas[1] = nan"),
        ([0.1, float("inf")], "betas[1] = inf"),
        ([1e-17, 0.1], "betas[0] = 1e-17"),
        ([0.1, 1e-12], "betas[1] = 1e-12"),
        ([1 - 9.9e-15] * 5, "abar falls below 1e-70 at t=4 of 5"),
        ([[0.1, 0.2]], "one-dimensional"),
    ],
)
def test_refused_tables(betas: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        BetaSchedule.from_betas(betas)
    assert says in str(error.value)


def test_shortest_tables_are_taken() -> None:
    assert BetaSchedule.from_betas([0.1, 1.0]).has_zero_terminal_snr
    assert BetaSchedule.named("linear", 21).num_timesteps == 21
    assert BetaSchedule.named("jsd", 2).betas.tolist() == [0.5, 1.0]
    assert BetaSchedule.named("cosine", 2).betas[-1] == 0.999
    assert BetaSchedule.from_betas([1.1e-12, 0.1]).num_timesteps == 2  # the smallest beta
    assert BetaSchedule.from_betas([1 - 1.01e-14] * 5).num_timesteps == 5  # the smallest abar: 1.05e-70


def test_a_table_of_ones_own_is_copied() -> None:
    mine = torch.tensor([0.1, 0.2, 0.3])
    s = BetaSchedule.from_betas(mine)
    mine[0] = 9
    torch.testing.assert_close(s.betas, torch.tensor([0.1, 0.2, 0.3]).double(), rtol=0, atol=0)


def test_degenerate_warns_and_runs() -> None:
    short = BetaSchedule.named("linear_raw", 100)
    assert short.is_degenerate
    assert "abar_T = 0.364" in short.warnings[0]
    for name in ("linear", "cosine", "quadratic", "sigmoid", "jsd"):
        assert not BetaSchedule.named(name, 100).is_degenerate
        assert BetaSchedule.named(name, 100).warnings == ()
    assert BetaSchedule.from_betas([0.5, 0.97]).is_degenerate  # abar_T = 0.015
    assert not BetaSchedule.from_betas([0.5, 0.99]).is_degenerate  # 0.005


def test_beyond_half_precision_is_a_note_not_a_warning() -> None:
    s = BetaSchedule.named("cosine", 4000)
    assert s.warnings == ()
    assert "81,165" in s.notes[0]
    assert BetaSchedule.named("linear", 1000).notes == ()
    assert "no signal" in BetaSchedule.named("jsd", 100).notes[0]
    for root, num in ((65504.5, 1), (65503.5, 0)):  # 65504 is the largest float16
        assert len(BetaSchedule.from_betas([0.5, 1 - 2 / root**2]).notes) == num


@pytest.mark.parametrize("prediction", ["eps", "x_prev"])
@pytest.mark.parametrize(
    "schedule", [BetaSchedule.named("jsd", 30), BetaSchedule.named("linear", 30).with_zero_terminal_snr()]
)
def test_no_signal_at_the_end_needs_v_or_x0(schedule: BetaSchedule, prediction: str) -> None:
    with pytest.raises(ValueError, match="use prediction 'v' or 'x0'"):
        GaussianDiffusion(schedule, prediction=prediction)
    for fit in ("v", "x0"):
        GaussianDiffusion(schedule, prediction=fit)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "jsd"])
def test_zero_terminal_snr_keeps_the_first_step_and_loses_the_last(name: str) -> None:
    plain, zero = BetaSchedule.named(name, 100), BetaSchedule.named(name, 100).with_zero_terminal_snr()
    assert zero.alphas_cumprod[-1] == 0
    torch.testing.assert_close(zero.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-12, atol=0)
    # an affine map of sqrt(abar): three points on a line
    a, b = plain.sqrt_alphas_cumprod, zero.sqrt_alphas_cumprod
    torch.testing.assert_close(
        (b[:-1] - b[-1]) / (b[0] - b[-1]), (a[:-1] - a[-1]) / (a[0] - a[-1]), rtol=1e-9, atol=1e-12
    )


def test_zero_terminal_snr_equals_a_peers() -> None:
    from diffusers import DDIMScheduler

    peer = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True)
    ours = BetaSchedule.named("linear", 1000).with_zero_terminal_snr()
    torch.testing.assert_close(ours.alphas_cumprod.float(), peer.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.oracle(8)
@pytest.mark.parametrize("kept", [(0, 3, 7, 29), (4, 5, 6), (29,), (11,), tuple(range(30))])
@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_oracle_8_respacing_keeps_abar(name: str, kept: tuple[int, ...]) -> None:
    s = BetaSchedule.named(name, 30)
    torch.testing.assert_close(s.respaced(kept).alphas_cumprod, s.alphas_cumprod[list(kept)], rtol=1e-12, atol=1e-15)


@pytest.mark.oracle(8)
def test_oracle_8_respacing_keeps_abar_over_jumps_that_beta_cannot_tell_from_1() -> None:
    s = BetaSchedule.named("constant", 21)
    for kept in ((20,), (14, 20), (0, 15, 20)):
        again = s.respaced(kept)
        assert not again.has_zero_terminal_snr
        torch.testing.assert_close(again.alphas_cumprod, s.alphas_cumprod[list(kept)], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kept", [(), (3, 3), (5, 4), (-1, 4), (4, 30)])
def test_respacing_refuses_what_is_no_subset(kept: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"strictly ascending code indices inside 0 .. 29"):
        BetaSchedule.named("linear", 30).respaced(kept)


def test_lookup_takes_no_index_from_the_end() -> None:
    s = BetaSchedule.named("linear", 30)
    x = torch.zeros(1, 1, 2, 2)
    for t in (-1, 30):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            s.lookup("betas", torch.tensor([t]), x)


def test_a_schedule_travels_between_processes_without_its_tables() -> None:
    s = BetaSchedule.named("cosine", 30).respaced((1, 5, 29))
    s.lookup("snr", torch.tensor([0]), torch.zeros(1, 1))
    again = pickle.loads(pickle.dumps(s))  # noqa: S301 - our own bytes
    assert torch.equal(again.betas, s.betas)
    assert torch.equal(again.alphas, s.alphas)
    assert (again.name, again.kept) == (s.name, s.kept)
    assert len(pickle.dumps(s)) < 1500
