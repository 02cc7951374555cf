"""The U-Net: sizes, counts, and equality with diffusers' network on the same weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import UNet
from pipeline.exchange.diffusers_weights import to_their_tensors
from tests.kit.closed_forms import randn

SMALL: dict[str, Any] = {"image_size": 16, "channels": 32, "channel_multipliers": (1, 2), "attention_resolutions": (8,)}
IDDPM: dict[str, Any] = {
    "num_heads": 4,
    "scale_shift_norm": True,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
}


def small(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(3, **(SMALL | {"dropout": 0.0} | changes))


def randomised(model: nn.Module) -> nn.Module:
    """Weights that hide nothing: the zero-initialised layers too."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=g) * scale + (1.0 if re.search(r"norm\w*\.weight", name) else 0.0))
    return model.eval()


def copy_into_peer(ours: UNet, peer: nn.Module, num_res_blocks: int) -> None:
    peer.load_state_dict(to_their_tensors(ours, num_res_blocks, 1000))  # strict: every parameter of theirs is given


def peer_for(
    size: int | tuple[int, int], channels: tuple[int, ...], attends: tuple[bool, ...], **kwargs: Any
) -> nn.Module:
    from diffusers import UNet2DModel

    fixed = {
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
    }
    down = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    up = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    peer: nn.Module = UNet2DModel(
        sample_size=size, block_out_channels=channels, down_block_types=down, up_block_types=up, **(fixed | kwargs)
    )
    return peer.eval()


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (40, 8)])
def test_equals_diffusers_on_copied_weights(size: tuple[int, int]) -> None:
    resolution = max(size) // 2
    ours = small(image_size=size, attention_resolutions=(resolution,))
    randomised(ours)
    peer = peer_for(size, (32, 64), (False, True))
    copy_into_peer(ours, peer, 2)
    x, t = randn(3, 3, *size).float(), torch.tensor([0, 17, 999])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), peer(x, t).sample, rtol=1e-5, atol=1e-5)


def test_the_papers_cifar_network_equals_diffusers() -> None:
    ours = UNet()
    randomised(ours)
    peer = peer_for(32, (128, 256, 256, 256), (False, True, False, False))
    copy_into_peer(ours, peer, 2)
    x, t = randn(2, 3, 32, 32).float(), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), peer(x, t).sample, rtol=1e-5, atol=1e-5)


def test_nichol_and_dhariwals_network_equals_diffusers() -> None:
    ours = small(out_channels=6, num_res_blocks=3, attention_resolutions=(8, 16), **IDDPM)
    randomised(ours)
    peer = peer_for(
        16, (32, 64), (True, True), layers_per_block=3, out_channels=6, norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0,
        downsample_padding=1, resnet_time_scale_shift="scale_shift", attention_head_dim=8, attn_norm_num_groups=32,
    )  # fmt: skip
    copy_into_peer(ours, peer, 3)
    x, t = randn(2, 3, 16, 16).float(), torch.tensor([3, 900])
    # theirs has heads of 8 channels everywhere, so 4 at the first level and 8 at the second; ours 4 at both
    narrow = small(out_channels=6, num_res_blocks=3, attention_resolutions=(8, 16), **(IDDPM | {"head_channels": 8}))
    narrow.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(narrow.eval()(x, t), peer(x, t).sample, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(x, t), narrow(x, t), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 35_746_307),
        ({"image_size": 256, "channel_multipliers": (1, 1, 2, 2, 4, 4), "dropout": 0.0}, 113_673_219),
        (
            {"out_channels": 6, "num_res_blocks": 3, "attention_resolutions": (16, 8), "num_timesteps": 4000, **IDDPM},
            52_546_438,
        ),
    ],
)
def test_published_parameter_counts(arguments: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(3, **arguments).parameters()) == count


def test_starts_as_the_paper_does() -> None:
    torch.manual_seed(0)
    model = UNet(3, image_size=32, channels=64, norm_groups=32)
    for name, parameter in model.named_parameters():
        p = parameter.detach()
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert bool((p == 1).all()), name
        else:
            parts = p.chunk(3) if "qkv" in name else (p,)
            for part in parts:
                spatial = part[0, 0].numel() if part.dim() == 4 else 1
                fan = (part.shape[0] + part.shape[1]) * spatial
                zero = "conv2" in name or "attention.out" in name or name == "conv_out.weight"
                limit = (6 / fan) ** 0.5 * (1e-5 if zero else 1)  # Glorot-uniform; scale 1e-10 is of the variance
                assert 0.95 * limit < float(part.abs().max()) <= limit, name
    x = randn(2, 3, 32, 32).float()
    assert float(model(x, torch.tensor([5, 7])).detach().abs().max()) < 1e-3


@pytest.mark.parametrize("size", [8, 28, (16, 40), (12, 4)])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_size_that_fits_keeps_its_shape(size: int | tuple[int, int], channels: int) -> None:
    model = UNet(
        channels, image_size=size, channels=16, norm_groups=8, channel_multipliers=(1, 2, 3), attention_resolutions=()
    )
    sides = (size, size) if isinstance(size, int) else size
    assert model(torch.zeros(2, channels, *sides), torch.tensor([0, 1])).shape == (2, channels, *sides)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"image_size": 30, "channel_multipliers": (1, 2, 2, 2)},
            "image size 30x30 does not fit .* multiples of 8; use 24x24 or 32x32",
        ),
        ({"image_size": (16, 18), "channel_multipliers": (1, 2, 2)}, "multiples of 4; use 16x16 or 16x20"),
        ({"image_size": 1, "channel_multipliers": (1, 2)}, "use 2x2 or 2x2"),
        ({"channels": 48, "norm_groups": 32}, "use norm_groups=24"),
        ({"channels": 64, "norm_groups": 48}, "use norm_groups=32"),
        ({"channels": 66, "norm_groups": 32}, "use norm_groups=22"),
        ({"channels": 37, "norm_groups": 32}, "use norm_groups=1,"),
        ({"norm_groups": 0}, "use norm_groups=32"),
        ({"channels": 15, "norm_groups": 5}, "channels=15, expected an even number"),
        ({"channels": 2, "norm_groups": 1}, "channels=2, expected an even number above 2"),
        (
            {"attention_resolutions": (16, 7)},
            r"attention_resolutions \[7\] are no level's; the levels' longer sides are \[16, 8\]",
        ),
        ({"num_heads": 5}, "num_heads=5 does not divide the 64 channels"),
        ({"head_channels": 48}, "head_channels=48 does not divide the 64 channels"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers\[1\]=0"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"num_timesteps": 0}, "num_timesteps=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        small(**arguments)
    assert "\n" not in str(error.value)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 16, 16\), expected \[B,3,H,W\]"):
        model(torch.zeros(1, 1, 16, 16), torch.tensor([0]))
    with pytest.raises(ValueError, match="image size 15x16 does not fit"):
        model(torch.zeros(1, 3, 15, 16), torch.tensor([0]))
    with pytest.raises(ValueError, match="labels were given to a UNet without classes"):
        model(torch.zeros(1, 3, 16, 16), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="no null class"):
        _ = model.null_class


def test_the_time_embedding_does_not_depend_on_T() -> None:
    x = randn(2, 3, 16, 16).float()
    long, short = randomised(small(num_timesteps=4000)), randomised(small(num_timesteps=500))
    torch.testing.assert_close(long(x, torch.tensor([1600, 3992])), short(x, torch.tensor([200, 499])))
    assert not torch.allclose(long(x, torch.tensor([1600, 3992])), long(x, torch.tensor([200, 499])))


def test_without_labels_a_conditional_network_takes_the_null_class() -> None:
    model = randomised(small(num_classes=10))
    assert isinstance(model, UNet)
    x, t = randn(2, 3, 16, 16).float(), torch.tensor([3, 4])
    assert model.null_class == 10
    assert torch.equal(model(x, t), model(x, t, torch.tensor([10, 10])))
    labelled = model(x, t, torch.tensor([1, 10]))
    assert not torch.allclose(labelled[0], model(x, t)[0])
    torch.testing.assert_close(labelled[1], model(x, t)[1])


def test_dropout_0_in_train_mode_is_eval_mode_and_dropout_acts() -> None:
    x, t = randn(2, 3, 16, 16).float(), torch.tensor([3, 4])
    still = randomised(small())
    with torch.no_grad():
        assert torch.equal(still.train()(x, t), still.eval()(x, t))
        dropping = randomised(small(dropout=0.5))
        assert torch.equal(dropping.eval()(x, t), still(x, t))
        assert not torch.allclose(dropping.train()(x, t), still(x, t))


def test_every_parameter_gets_a_gradient() -> None:
    model = randomised(small(num_classes=3, scale_shift_norm=True)).train()
    model(randn(2, 3, 16, 16).float(), torch.tensor([3, 4]), torch.tensor([0, 3])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_autocast_is_finite_and_near_fp32() -> None:
    model = randomised(small())
    x, t = randn(4, 3, 16, 16).float(), torch.tensor([0, 1, 998, 999])
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x, t)
            assert model.embedding(t).dtype == torch.float32  # type: ignore[operator]
    assert bool(torch.isfinite(rough).all())
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_large_activations_are_normalised_in_float32(dtype: torch.dtype, error: float) -> None:
    """Their squares, which GroupNorm sums, are beyond float16's 65,504, and bfloat16 keeps 3 of their digits."""
    model = randomised(small())
    x, t = 1e4 * randn(2, 3, 16, 16).float(), torch.tensor([0, 999])
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", dtype=dtype):
            rough = model(x, t)
    assert float((rough.float() - exact).norm() / exact.norm()) < error


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_change_the_result(layout: torch.memory_format) -> None:
    model = randomised(small())
    x, t = randn(2, 3, 16, 16).float(), torch.tensor([3, 4])
    with torch.no_grad():
        expected = model(x, t)
        model.to(memory_format=layout)
        torch.testing.assert_close(model(x.to(memory_format=layout), t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model = randomised(small(num_classes=2))
    x, t, y = randn(2, 3, 16, 16).float(), torch.tensor([3, 4]), torch.tensor([0, 1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        out: Tensor = compiled(x, t, y)
        torch.testing.assert_close(out, model(x, t, y))


def test_float64_throughout() -> None:
    model = randomised(small()).double()
    assert model(randn(1, 3, 16, 16), torch.tensor([3])).dtype == torch.float64
