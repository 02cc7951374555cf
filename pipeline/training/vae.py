"""A variational autoencoder (Kingma & Welling 2014): the model that a DDPM is compared with, on the same data, steps and scores.

The encoder gives q(z | x) = N(mean, variance), the prior is p(z) = N(0, I), and the decoder p(x | z) is a Gaussian around an image, its
one variance learned for all pixels (Rybkin et al. 2021), read as the mass of each of the 256 levels: what the bound of a DDPM uses at
t = 0. Bits/dim of both are therefore bounds on the same likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm import BitsPerDim
from ddpm.gaussian import discretized_log_likelihood, normal_kl
from ddpm.layers import ZERO_GAIN, Downsample, Upsample, conv, linear

NORM_EPS = 1e-6


class Elbo(NamedTuple):
    """The negative evidence lower bound of each image, in bits/dim: total = rate + distortion, each [B].

    `rate` is KL(q(z | x) || p(z)), what the code costs; `distortion` is -E log p(x | z), what the pixels cost once the code is known.
    """

    rate: Tensor
    distortion: Tensor

    @property
    def total(self) -> Tensor:
        """Kingma & Welling 2014, eq. 3, with its sign turned."""
        return self.rate + self.distortion


class Vae(nn.Module):
    """A small convolutional VAE for images (C, H, W): levels halve the resolution, as in the U-Net, and end in a vector.

    `latent_dim` numbers describe an image, at most as many as it has pixels times channels. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2),
        latent_dim: int = 16,
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        _check(shape, channels, channel_multipliers, latent_dim, norm_groups)
        self.latent_dim = latent_dim
        widths = [channels * m for m in channel_multipliers]
        halvings = len(widths) - 1
        self.inner = (widths[-1], shape[1] >> halvings, shape[2] >> halvings)
        size = math.prod(self.inner)

        encoder: list[nn.Module] = [conv(shape[0], widths[0])]
        for level, width in enumerate(widths):
            encoder.append(_Block(widths[max(level - 1, 0)], width, norm_groups))
            if level < halvings:
                encoder.append(Downsample(width, 0))
        self.encoder = nn.Sequential(*encoder, nn.GroupNorm(norm_groups, widths[-1], NORM_EPS), nn.SiLU())
        self.to_code = linear(size, latent_dim, parts=2)

        self.from_code = linear(latent_dim, size)
        decoder: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            decoder.append(_Block(widths[min(level + 1, halvings)], widths[level], norm_groups))
            if level > 0:
                decoder.append(Upsample(widths[level]))
        self.decoder = nn.Sequential(*decoder, nn.GroupNorm(norm_groups, widths[0], NORM_EPS), nn.SiLU())
        self.conv_out = conv(widths[0], shape[0])
        self.log_variance = nn.Parameter(torch.zeros(()))  # of a pixel, given the code

    def encode(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x0 [B,C,H,W] in [-1, 1] -> mean and log variance of q(z | x0), each [B,latent_dim]."""
        mean, log_variance = self.to_code(self.encoder(x0).flatten(1)).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """z [B,latent_dim] -> the mean of p(x | z) [B,C,H,W]."""
        image: Tensor = self.conv_out(self.decoder(self.from_code(z).unflatten(1, self.inner)))
        return image

    def forward(self, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0 [B,C,H,W] and noise [B,...] of at least latent_dim numbers an image -> mean of p(x | z), its log variance, q(z | x0).

        z is the mean of q plus its deviation times the first numbers of the noise (the reparameterisation, eq. 4).
        """
        mean, log_variance = self.encode(x0)
        z = mean + (0.5 * log_variance).exp() * noise.flatten(1)[:, : self.latent_dim]
        return self.decode(z), self.log_variance, mean, log_variance


class VaeObjective:
    """The loss of a VAE with the interface of a diffusion objective: objective(model, x0, t, eps) -> [B], bits/dim; t is ignored."""

    num_timesteps = 1

    def __call__(self, model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The negative ELBO of each image [B]; eps [B,C,H,W] is the noise of the training draws."""
        return elbo(model, x0, eps).total


def elbo(model: nn.Module, x0: Tensor, noise: Tensor) -> Elbo:
    """The bound of images x0 [B,C,H,W] on the 256 levels of [-1, 1], with one draw of z for each: float32 in any precision."""
    image, log_variance, z_mean, z_log_variance = model(x0, noise)
    bits = math.log(2) * math.prod(x0.shape[1:])
    zero = torch.zeros((), device=x0.device)
    kl = normal_kl(z_mean.float(), z_log_variance.float(), zero, zero).sum(1)
    likelihood = discretized_log_likelihood(x0.float(), image.float(), log_variance.float()).flatten(1).sum(1)
    return Elbo(kl / bits, -likelihood.float() / bits)


@torch.no_grad()
def bits_per_dim(model: Vae, x0: Tensor, generator: Sequence[torch.Generator]) -> BitsPerDim:
    """The bound of images x0 [B,C,H,W] as that of a diffusion model: the rate is the prior, the distortion the decoder, without steps.

    One code is drawn for each image, from its own generator.
    """
    noise = torch.stack([torch.randn(model.latent_dim, generator=g) for g in generator]).to(x0.device)
    found, image = elbo(model, x0, noise), model(x0, noise)[0]
    error = (image - x0).square().flatten(1).mean(1)
    return BitsPerDim(found.rate, found.distortion[:, None], error[:, None], (0,))


class _Block(nn.Module):
    """norm, swish, convolution, twice; plus the input."""

    def __init__(self, n_in: int, n_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, n_in, NORM_EPS)
        self.conv1 = conv(n_in, n_out)
        self.norm2 = nn.GroupNorm(groups, n_out, NORM_EPS)
        self.conv2 = conv(n_out, n_out, gain=ZERO_GAIN)
        self.shortcut = conv(n_in, n_out, 1, padding=0) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B,n_in,H,W] -> [B,n_out,H,W]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        out: Tensor = self.shortcut(x) + self.conv2(functional.silu(self.norm2(h)))
        return out


def _check(
    shape: tuple[int, int, int], channels: int, multipliers: Sequence[int], latent_dim: int, norm_groups: int
) -> None:
    if channels % norm_groups:
        raise ValueError(
            f"channels={channels} is no multiple of norm_groups={norm_groups}; use other channels or groups"
        )
    halved = 2 ** (len(multipliers) - 1)
    if shape[1] % halved or shape[2] % halved:
        raise ValueError(
            f"image size {shape[1]}x{shape[2]} does not fit a VAE whose levels halve it to 1/{halved}: both sides must be multiples "
            f"of {halved}; use fewer channel_multipliers, or images of another size"
        )
    if latent_dim > math.prod(shape):
        raise ValueError(
            f"latent_dim={latent_dim} is more than the {math.prod(shape)} numbers of an image; a code is to be shorter"
        )
