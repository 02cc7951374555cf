"""Guidance without a classifier: the same scale on every reading, what a learned variance does, dropped labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, UNet, conditioned, ddim, drop_labels, guided
from tests.kit.closed_forms import as_output, ignorant, randn, seeded


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_the_same_scale_does_the_same_on_every_reading(scale: float) -> None:
    T = 100
    s, t = BetaSchedule.named("linear", T), torch.arange(T)
    x_t, with_label, without = randn(T, 1, 4, 4), randn(T, 1, 4, 4, seed=1) / 3, randn(T, 1, 4, 4, seed=2) / 3
    expected = without + scale * (with_label - without)  # of x0
    abar = s.alphas_cumprod.view(-1, 1, 1, 1)
    for prediction in ("eps", "x0", "v", "x_prev"):
        diffusion = GaussianDiffusion(s, prediction, clip_x0=False)

        def model(x0: Tensor, d: GaussianDiffusion = diffusion) -> Tensor:
            return as_output(d, x0, (x_t - abar.sqrt() * x0) / (1 - abar).sqrt(), x_t, t)

        mixed = guided(lambda *_, m=model: m(with_label), lambda *_, m=model: m(without), scale)
        torch.testing.assert_close(diffusion.denoise(mixed, x_t, t).x0, expected, rtol=0, atol=1e-6)


def test_x0_is_clipped_after_mixing() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 50), "x0")
    x_t, t = randn(2, 1, 4, 4), torch.tensor([3, 30])
    one, two = torch.full_like(x_t, 0.8), torch.full_like(x_t, 1.6)
    mixed = diffusion.denoise(guided(lambda *_: one, lambda *_: two, 2.0), x_t, t)  # 1.6 + 2 (0.8 - 1.6) = 0
    torch.testing.assert_close(mixed.x0, torch.zeros_like(x_t))


def test_a_learned_variance_is_the_conditional_networks() -> None:
    x_t, t = randn(2, 3, 4, 4), torch.tensor([3, 30])
    one, two = ignorant(3, 6, seed=1), ignorant(3, 6, seed=2)
    mixed = guided(one, two, 2.5)(x_t, t)
    assert torch.equal(mixed[:, 3:], one(x_t, t)[:, 3:])
    torch.testing.assert_close(mixed[:, :3], (2.5 * one(x_t, t) - 1.5 * two(x_t, t))[:, :3])


def test_scale_1_costs_one_call_and_others_two() -> None:
    calls: list[str] = []

    def labelled(x: Tensor, t: Tensor) -> Tensor:
        calls.append("labelled")
        return x

    def plain(x: Tensor, t: Tensor) -> Tensor:
        calls.append("plain")
        return x

    x, t = randn(1, 1, 2, 2), torch.tensor([0])
    guided(labelled, plain, 1.0)(x, t)
    assert calls == ["labelled"]
    guided(labelled, plain, 2.0)(x, t)
    assert calls == ["labelled", "labelled", "plain"]


def test_guided_sampling_with_the_unet() -> None:
    torch.manual_seed(0)
    unet = UNet(
        1, image_size=8, channels=16, norm_groups=8, channel_multipliers=(1, 2), attention_resolutions=(), num_classes=4
    ).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(2)))
    diffusion, x_T = GaussianDiffusion(BetaSchedule.named("linear", 50)), randn(3, 1, 8, 8).float()
    y, null = torch.tensor([0, 3, 4]), torch.full((3,), unet.null_class)
    model = guided(conditioned(unet, y), conditioned(unet, null), 4.0)
    *_, (_, x) = ddim(diffusion, model, x_T, timesteps=(9, 29, 49))
    *_, (_, plain) = ddim(diffusion, unet, x_T, timesteps=(9, 29, 49))
    torch.testing.assert_close(x[2], plain[2], rtol=1e-4, atol=1e-5)  # the null class guides nowhere
    assert not torch.allclose(x[:2], plain[:2], atol=1e-3)


def test_dropped_labels() -> None:
    y = torch.arange(10).repeat(5000)
    u = torch.rand(50_000, generator=seeded())
    dropped = drop_labels(y, u, 0.15, 10)
    share = float((dropped == 10).float().mean())
    assert share == pytest.approx(0.15, abs=0.008)  # five standard deviations of 50,000 draws
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(dropped == 10, u < 0.15)
    assert torch.equal(drop_labels(y, u, 0.0, 10), y)
    assert bool((drop_labels(y, u, 1.0, 10) == 10).all())
    with pytest.raises(ValueError, match=r"probability=1.5"):
        drop_labels(y, u, 1.5, 10)
