"""`ddpm-pipe schedule`: its figures against closed forms and draws, its picture, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm import BetaSchedule, GaussianDiffusion
from ddpm.likelihood import prior_bits
from pipeline.config.experiment import DataConfig
from pipeline.ingest.ingest import ensure_ingested
from pipeline.pictures.schedule_picture import example_digit, example_of, schedules_figure
from pipeline.pictures.schedule_report import curves, facts, most_prior_bits
from tests.kit.commands import Typed
from tests.kit.drawings import holds, points_of


@pytest.mark.parametrize(("name", "T"), [("linear", 1000), ("linear_raw", 50), ("cosine", 30), ("jsd", 40)])
def test_the_prior_term_is_that_of_the_bound_for_black_and_white(name: str, T: int) -> None:
    schedule = BetaSchedule.named(name, T)
    x0 = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0).double().view(1, 1, 8, 8)
    exact = float(prior_bits(GaussianDiffusion(schedule, prediction="x0"), x0))
    assert most_prior_bits(schedule) == pytest.approx(exact, rel=1e-12, abs=1e-15)
    assert float(prior_bits(GaussianDiffusion(schedule, prediction="x0"), 0.5 * x0)) <= exact


def test_known_values_of_abar_T() -> None:  # MATHS: Schedules
    known = {
        ("linear_raw", 50): 0.60, ("linear_raw", 100): 0.364, ("linear_raw", 250): 0.080, ("linear", 1000): 4.036e-05,
        ("quadratic", 1000): 7.33e-4, ("constant", 1000): 1.68e-9, ("warmup10", 1000): 4.61e-9, ("cosine", 1000): 2.4e-9,
        ("warmup50", 1000): 2.61e-7, ("sigmoid", 1000): 3.00e-7,
    }  # fmt: skip
    for (name, T), value in known.items():
        (fact,) = facts([name], [T])
        assert fact.to_dict()["abar_T"] == pytest.approx(value, rel=0.02), name
        assert bool(fact.to_dict()["warnings"]) is (value > 0.01)


def test_curves_are_the_moments_of_what_q_sample_draws() -> None:
    schedule = BetaSchedule.named("cosine", 20)
    s, count = 0.6, 200_000
    g = torch.Generator().manual_seed(0)
    x0 = s * torch.randn(count, generator=g, dtype=torch.float64)
    eps = torch.randn(count, generator=g, dtype=torch.float64)
    drawn = curves(schedule, s**2)
    diffusion = GaussianDiffusion(schedule)
    for t in (0, 9, 19):
        x_t = diffusion.q_sample(x0, torch.full((count,), t), eps)
        assert float(x_t.var()) == pytest.approx(float(drawn.marginal_variance[t]), rel=0.02)
        signal = float((x0 @ x_t) / (x0 @ x0))  # regression on x0: sqrt(abar)
        assert signal**2 == pytest.approx(float(drawn.alphas_cumprod[t]), abs=0.01)
    abar = drawn.alphas_cumprod[9]
    assert float(drawn.log_snr[9]) == pytest.approx(math.log(abar) - math.log(1 - abar), rel=1e-12)
    one, zero = torch.ones(1), torch.zeros(1)
    posterior = diffusion.q_posterior(one.double(), zero.double(), torch.tensor([9]))
    assert float(posterior.mean) == pytest.approx(float(drawn.x0_weight[9]), rel=1e-12)


def test_the_command_prints_figures_and_draws(typed: Typed, home: Path) -> None:
    code, out, err = typed("schedule", "linear", "cosine", "-T", "1000", "-T", "15")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["linear", "1000"], ["cosine", "1000"], ["cosine", "15"]]
    assert "4.036e-05" in lines[1]
    assert any(line.startswith("refused: linear, T = 15") and "linear_raw" in line for line in lines)
    drawn = [BetaSchedule.named("linear", 1000), BetaSchedule.named("cosine", 1000), BetaSchedule.named("cosine", 15)]
    assert holds(home / "schedule.png", schedules_figure(drawn, *example_digit()))


def test_json_has_every_point_and_its_warnings(typed: Typed, home: Path) -> None:
    code, out, _ = typed("schedule", "linear_raw", "linear", "-T", "15", "--json", "-o", "a.png")
    data = json.loads(out)
    raw, refused = data["schedules"]
    assert code == 0
    assert "degenerate" in raw["warnings"][0]
    assert refused["num_timesteps"] == 15
    assert "not below 1" in refused["refused"]
    assert Path(data["picture"]) == home / "a.png"
    assert (home / "a.png").is_file()


def test_a_table_of_betas_and_zero_terminal_snr(typed: Typed, home: Path) -> None:
    (home / "betas.txt").write_text("\n".join(str(b) for b in np.linspace(1e-4, 0.3, 40)))
    code, out, _ = typed("schedule", "--betas", "betas.txt", "--zero-terminal-snr", "--json")
    (fact,) = json.loads(out)["schedules"]
    assert code == 0
    assert (fact["num_timesteps"], fact["abar_T"], fact["prior_bits_per_dim_at_most"]) == (40, 0.0, 0.0)
    assert fact["snr_first"] == pytest.approx(9999)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["linaer"], 2, "did you mean 'linear'"),
        (["linear", "-T", "15"], 2, "use num_timesteps above 20"),
        (["linear", "-T", "1"], 2, "-T"),
        (["--betas", "nothing.txt"], 2, "nothing.txt"),
        (["linear", "-o", "no/such/folder.png"], 6, "no/such/folder.png"),
    ],
)
def test_what_cannot_be_is_reported_in_one_line(
    typed: Typed, home: Path, arguments: list[str], code: int, told: str
) -> None:
    got, out, err = typed("schedule", *arguments)
    assert (got, out) == (code, ""), err
    assert told in err
    assert len(err.splitlines()) == 1
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("lengths", [(50, 50), (50, 30)])
def test_the_picture_shows_the_curves_and_one_image_under_the_same_noise(lengths: tuple[int, int]) -> None:
    schedules = [BetaSchedule.named(name, T) for name, T in zip(("linear_raw", "cosine"), lengths, strict=True)]
    image, variance = example_digit()
    figure = schedules_figure(schedules, image, variance)
    alike = len(set(lengths)) == 1
    names = [s.name if alike else f"{s.name}, T = {s.num_timesteps}" for s in schedules]
    upper, lower = figure.subfigs
    for axes, values in zip(upper.axes, ("alphas_cumprod", "log_snr", "marginal_variance", "x0_weight"), strict=True):
        assert len(axes.lines) == 2
        for line, schedule in zip(axes.lines, schedules, strict=True):
            x, y = points_of(line).T
            T = schedule.num_timesteps
            np.testing.assert_allclose(x, np.arange(T) if alike else np.linspace(0, 1, T), rtol=1e-6)
            wanted = getattr(curves(schedule, variance), values).numpy()
            np.testing.assert_allclose(y, np.where(np.isfinite(wanted) & (wanted != 0), wanted, np.nan))
    assert len({line.get_color() for line in upper.axes[0].lines}) == 2
    assert [text.get_text() for text in upper.legends[0].get_texts()] == names

    x0, eps = image[None] / 127.5 - 1, torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [lower.axes[:11], lower.axes[11:]]
    assert [row[0].get_ylabel() for row in rows] == names
    for row, schedule in zip(rows, schedules, strict=True):
        assert np.array_equal(row[0].images[0].get_array(), image[0])
        last = schedule.num_timesteps - 1
        for k, axes in list(enumerate(row))[1:]:
            abar = float(schedule.alphas_cumprod[round(k * last / 10)])
            x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
            shown = torch.from_numpy(np.asarray(axes.images[0].get_array(), dtype=np.float64))
            torch.testing.assert_close(shown, ((x_t + 1) * 127.5).clamp(0, 255)[0, 0].double(), rtol=0, atol=0.51)
    last_title = rows[0][-1].get_title()
    assert last_title == ("t = 49" if alike else "100% of T")


def test_a_dataset_of_colour_is_drawn_with_its_own_variance(home: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 12, 16, 3), dtype=np.uint8)
    np.savez(home / "images.npz", images=pixels)
    dataset = ensure_ingested(DataConfig(source=str(home / "images.npz")), home / "datasets")
    image, variance = example_of(dataset)
    assert image.shape == (3, 12, 16)
    assert variance == pytest.approx((pixels / 127.5 - 1).var(), rel=1e-6)
    figure = schedules_figure([BetaSchedule.named("jsd", 30)], image, variance)
    _, lower = figure.subfigs
    np.testing.assert_array_equal(lower.axes[0].images[0].get_array(), pixels[0])


def test_the_digit_needs_no_data() -> None:
    image, variance = example_digit()
    assert (image.shape, image.dtype) == ((1, 8, 8), torch.uint8)
    assert 0 < variance < 1


def test_a_picture_of_the_users_is_not_written_over(typed: Typed, home: Path) -> None:
    (home / "schedule.png").write_bytes(b"mine")
    code, stdout, _ = typed("schedule", "cosine", "-T", "20")
    assert code == 0
    assert f"picture: {home}/schedule-2.png" in stdout
    ensure_ingested(DataConfig(), home / "datasets")
    (data,) = home.glob("datasets/digits-*")
    for number in ("", "-2", "-3"):
        code, stdout, _ = typed("inspect", f"datasets/{data.name}")
        assert f"{home}/{data.name}{number}.png" in stdout
    assert (home / "schedule.png").read_bytes() == b"mine"


def test_without_a_home_directory_the_line_names_the_variable(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    code, _, stderr = typed("train")
    assert code == 6
    assert "HOME: not set, and user" in stderr
