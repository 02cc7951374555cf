"""Masks of dropout: the right rate, independent of each other, and a function of (key, layer, element) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm import UNet
from ddpm.dropout import GAMMA, Dropout, mixed, random_bits

SHAPE = torch.Size((8, 16, 16, 16))


def keys(seed: int, count: int = 8) -> Tensor:
    return torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))


def splitmix64(state: int) -> int:
    """Steele, Lea & Flood 2014, on Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    # the first outputs of the published generator from seed 0: its state grows by the golden ratio before each
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64((n * 0x9E3779B97F4A7C15) % 2**64) for n in (1, 2, 3)] == published
    states = keys(0, 1000)
    ours = mixed(states.clone()).numpy().view(np.uint64).tolist()
    assert ours == [splitmix64(state) for state in states.numpy().view(np.uint64).tolist()]


@pytest.mark.parametrize("layer", [0, 1, 2, 7])
def test_the_bits_of_an_image_are_four_to_each_output_of_splitmix64(layer: int) -> None:
    C, H, W = 3, 2, 5
    of_images = keys(4, 3)
    expected = []
    for key in of_images.tolist():
        start = splitmix64((key + layer * GAMMA) % 2**64)
        outputs = [splitmix64((start + n * GAMMA) % 2**64) for n in range((C * H * W + 3) // 4)]
        expected.append([output >> shift & 0xFFFF for output in outputs for shift in (0, 16, 32, 48)][: C * H * W])
    ours = random_bits(of_images, layer, torch.Size((3, C, H, W))).permute(0, 2, 3, 1).reshape(3, -1)
    assert ours.numpy().view(np.uint16).tolist() == expected


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 1e-3])
def test_the_rate_and_the_scale(probability: float) -> None:
    layer = Dropout(probability, layer=3)
    dropped, count = 0, 0
    for seed in range(20):
        out = layer(torch.ones(SHAPE, dtype=torch.float64), keys(seed))
        dropped, count = dropped + int((out == 0).sum()), count + out.numel()
        torch.testing.assert_close(
            out[out != 0].unique(), torch.tensor([1 / (1 - probability)]).double(), rtol=2e-4, atol=0
        )
    assert stats.binomtest(dropped, count, round(probability * 2**16) / 2**16).pvalue > 1e-3
    assert torch.equal(layer.eval()(torch.ones(SHAPE), keys(0)), torch.ones(SHAPE))


def test_bits_are_uniform() -> None:
    bits = random_bits(keys(1, 64), 0, torch.Size((64, 16, 32, 32))).contiguous()
    counts = np.bincount(bits.flatten().numpy().view(np.uint8))
    assert stats.chisquare(counts).pvalue > 1e-3


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of two masks in standard deviations of what chance alone gives."""
    a, b = (m.double().flatten() - m.double().mean() for m in (a, b))
    return float((a @ b) / (a.norm() * b.norm()) * len(a) ** 0.5)


def test_masks_of_layers_images_and_neighbouring_elements_are_independent() -> None:
    """Also where keys and layers differ by one: 2,000 correlations of 4,096 elements and more, none of which chance does not give."""
    masks = [random_bits(torch.arange(8) * step, layer, SHAPE) >= 0 for step in (0, 1) for layer in range(23)]
    different = masks[23:]
    images = [mask[i] for mask in different for i in range(8)]
    found = [correlation(a, b) for n, a in enumerate(images) for b in images[n + 1 : n + 12]]
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert max(map(abs, found)) < 5
    assert all(torch.equal(mask[0], mask[i]) for mask in masks[:23] for i in range(8))  # equal keys, equal masks
    flat = torch.cat([mask.permute(0, 2, 3, 1).flatten() for mask in different])
    shifted = [correlation(flat[:-lag], flat[lag:]) for lag in range(1, 200)]
    assert stats.kstest(shifted, "norm").pvalue > 1e-3


def test_masks_do_not_depend_on_batch_or_memory_format() -> None:
    layer, x = Dropout(0.3, layer=1), torch.ones(SHAPE)
    whole = layer(x, keys(0))
    parts = torch.cat([layer(x[rows], keys(0)[rows]) for rows in (slice(0, 3), slice(3, 8))])
    assert torch.equal(whole, parts)
    assert torch.equal(whole, layer(x.contiguous(memory_format=torch.channels_last), keys(0)))
    odd = Dropout(0.3, layer=1)(torch.ones(2, 3, 3, 5), keys(0, 2))  # elements that are no multiple of four
    assert odd.shape == (2, 3, 3, 5)


def test_each_layer_of_a_network_has_masks_of_its_own_and_without_keys_torch_draws() -> None:
    small = {"image_size": 8, "channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
    model = UNet(1, attention_resolutions=(), dropout=0.5, **small)
    layers = sorted(module.layer for module in model.modules() if isinstance(module, Dropout))
    assert layers == list(range(len(layers)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    x, t = torch.ones(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    first = model(x, t, keys=keys(0, 4))
    assert torch.equal(first, model(x, t, keys=keys(0, 4)))
    assert not torch.allclose(first, model(x, t, keys=keys(1, 4)))
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(model(x, t), model(x, t))
