"""The variational autoencoder: its bound against closed forms, and its way through training, sampling and scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.gaussian import discretized_log_likelihood
from pipeline.config.experiment import ModelConfig, SamplingConfig, TrainingConfig, experiment_from
from pipeline.data.images import to_float
from pipeline.data.shards import Dataset
from pipeline.errors import UsageError
from pipeline.sampling.generation import VaeSampler, make_sampler
from pipeline.storage.runs import Run
from pipeline.tracking.text import describe
from pipeline.training.device import serving_compute
from pipeline.training.models import build_diffusion, build_model, build_objective
from pipeline.training.trained import Trained
from pipeline.training.vae import Vae, VaeObjective, elbo
from tests.kit import trainer
from tests.kit.closed_forms import seeded
from tests.kit.commands import Typed
from tests.kit.commands import run_command as run
from tests.kit.experiments import TINY

VAE: dict[str, Any] = {
    "model": {"type": "vae", "channels": 8, "channel_multipliers": [1, 2], "latent_dim": 5, "norm_groups": 4},
    "training": TINY["training"] | {"steps": 8},
    "sampling": {"batch_size": 600},
}


def small(shape: tuple[int, int, int] = (1, 8, 8), **changes: Any) -> Vae:
    torch.manual_seed(0)
    return Vae(shape, **({"channels": 8, "latent_dim": 5, "norm_groups": 4} | changes))


class Fixed(nn.Module):
    """A network whose answer is given."""

    def __init__(self, *answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x0: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return self.answer


def test_the_rate_is_the_divergence_of_two_gaussians() -> None:
    mean, log_variance = torch.randn(3, 5, generator=seeded()), torch.randn(3, 5, generator=seeded(1))
    x0 = torch.zeros(3, 1, 4, 4)
    found = elbo(Fixed(torch.zeros(3, 1, 4, 4), torch.zeros(()), mean, log_variance), x0, x0)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    p = torch.distributions.Normal(torch.zeros(3, 5), torch.ones(3, 5))
    expected = torch.distributions.kl_divergence(q, p).sum(1) / (16 * math.log(2))  # Kingma & Welling 2014, appendix B
    torch.testing.assert_close(found.rate, expected, rtol=1e-5, atol=1e-7)


def test_the_distortion_is_the_mass_of_the_levels() -> None:
    """The masses of all 256 levels add up to 1; the distortion is minus the logarithm of that of the image's own."""
    levels = (torch.arange(256.0) * 2 - 255) / 255
    x0 = levels.view(256, 1, 1, 1)
    mean, log_variance = torch.full((256, 1, 1, 1), 0.3), torch.tensor(-3.0)
    code = torch.zeros(256, 2)
    found = elbo(Fixed(mean, log_variance, code, code), x0, x0)
    assert float((2.0**-found.distortion).double().sum()) == pytest.approx(1, abs=1e-5)
    exact = discretized_log_likelihood(x0, mean, log_variance).view(256)
    torch.testing.assert_close(found.distortion.double(), -exact / math.log(2), rtol=1e-5, atol=1e-6)
    assert not found.rate.any()


def test_the_bound_is_a_bound() -> None:
    """Of a linear-Gaussian model the likelihood is known: no q comes above it, and the true posterior reaches it."""
    # p(z) = N(0, 1), p(x | z) = N(a z, s^2), so p(x) = N(0, a^2 + s^2); levels are so fine that densities will do: p(level) = p(x) 2/255
    a, s2, x = 0.4, 0.09, 0.5019608
    posterior = (a * x / (a * a + s2), s2 / (a * a + s2))
    truth = -(
        torch.distributions.Normal(0, math.sqrt(a * a + s2)).log_prob(torch.tensor(x)) + math.log(2 / 255)
    ) / math.log(2)
    count = 200_000
    noise = torch.randn(count, generator=seeded())
    for (mean, variance), gap in (((posterior), 0.0), ((0.0, 1.0), 1.0), ((posterior[0], 4 * posterior[1]), 0.5)):
        z = mean + math.sqrt(variance) * noise
        shape = (count, 1, 1, 1)
        answer = (
            (a * z).view(shape),
            torch.tensor(math.log(s2)),
            torch.full((count, 1), mean),
            torch.full((count, 1), math.log(variance)),
        )
        found = float(elbo(Fixed(*answer), torch.full(shape, x), noise.view(shape)).total.mean())
        assert found == pytest.approx(float(truth), abs=5e-3) if gap == 0 else found > float(truth) + gap


def test_z_is_the_reparameterised_draw() -> None:
    model = small().double()
    x0, noise = (
        torch.randn(2, 1, 8, 8, generator=seeded()).double(),
        torch.randn(2, 1, 8, 8, generator=seeded(1)).double(),
    )
    mean, log_variance = model.encode(x0)
    image, _, z_mean, _ = model(x0, noise)
    z = mean + (0.5 * log_variance).exp() * noise.flatten(1)[:, :5]
    torch.testing.assert_close(image, model.decode(z))
    torch.testing.assert_close(z_mean, mean)


@pytest.mark.parametrize(("shape", "multipliers"), [((1, 8, 8), (1, 2)), ((3, 12, 20), (1, 2, 2)), ((2, 4, 4), (1,))])
def test_any_size_that_fits(shape: tuple[int, int, int], multipliers: tuple[int, ...]) -> None:
    model = small(shape, channel_multipliers=multipliers)
    x0 = torch.rand(2, *shape, generator=seeded()) * 2 - 1
    losses = VaeObjective()(model, x0, torch.zeros(2), torch.randn(2, *shape, generator=seeded()))
    assert losses.shape == (2,)
    losses.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"type": "vae", "num_res_blocks": 3}}, "num_res_blocks belong to type 'unet'"),
        ({"model": {"type": "vae", "arguments": {"a": 1}}}, "'arguments' belong"),
        ({"model": {"latent_dim": 3}}, "latent_dim belong to type 'vae'"),
        ({"model": {"type": "a.b:C", "latent_dim": 3}}, "latent_dim belong to type 'vae'"),
    ],
)
def test_settings_of_the_other_network_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        experiment_from(changes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["diffusion.schedule=cosine"], "diffusion.schedule: got 'cosine', but a vae has no diffusion process"),
        (["training.objective=vlb"], "training.objective"),
        (["sampling.steps=10"], "sampling.steps"),
        (["model.latent_dim=100"], "latent_dim=100 is more than the 64"),
        (["model.channel_multipliers=[1,1,1,1,1]"], "does not fit"),
        (["model.norm_groups=5"], "norm_groups"),
        (["model.class_conditional=true"], "class_conditional"),
    ],
)
def test_what_a_vae_does_not_have_is_refused(
    arguments: list[str], says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for argument in arguments for word in ("-s", argument)]
    assert run(["train", "--preset", "digits-vae", "--dry-run", *settings]) == 2
    assert says in capsys.readouterr().err


def test_the_same_loss_and_gradient_on_any_number_of_workers() -> None:
    """The noise of z is that of the training draws, so that a batch may be cut anywhere."""
    model, losses = small(), build_objective(experiment_from(VAE))
    x0, eps = torch.rand(6, 1, 8, 8, generator=seeded()) * 2 - 1, torch.randn(6, 1, 8, 8, generator=seeded(1))
    t = torch.zeros(6, dtype=torch.int64)
    whole = losses(model, x0, t, eps)
    parts = torch.cat([losses(model, x0[rows], t[rows], eps[rows]) for rows in (slice(0, 2), slice(2, 6))])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)


def test_image_i_is_a_function_of_seed_and_i() -> None:
    experiment = experiment_from(VAE)
    model = build_model(experiment, (1, 8, 8))
    nn.init.normal_(model.conv_out.weight, std=0.3, generator=seeded())  # type: ignore[union-attr, arg-type]
    made = make_sampler(experiment, model, (1, 8, 8), SamplingConfig(batch_size=4), 3, serving_compute())
    assert isinstance(made, VaeSampler)
    six, ten = torch.cat(list(made.generate(6))), torch.cat(list(made.generate(10)))
    assert torch.equal(six, ten[:6])
    assert len({image.numpy().tobytes() for image in ten}) == 10
    identity = made.identity("ema")
    assert (identity.sampler, identity.steps, identity.chunk) == ("vae", 1, 4)


@pytest.mark.oracle(11)
@pytest.mark.promise("P1", "P2")
def test_training_goes_through_the_worker_and_resumes_bit_for_bit(home: Path) -> None:
    whole, broken = trainer.make_run(home, **VAE), trainer.make_run(home, **VAE)
    assert trainer.train(str(whole.folder)) == "finished"
    assert trainer.train(str(broken.folder), stop_after=3) == "stopped"
    assert trainer.verified_step(broken) == 3
    assert trainer.train(str(broken.folder)) == "finished"
    assert trainer.final_digests(whole) == trainer.final_digests(broken)
    losses = trainer.logged_losses(whole)
    assert all(math.isfinite(loss) for loss in losses.values())


@pytest.mark.slow
def test_it_learns(home: Path) -> None:
    settings = VAE["training"] | {"steps": 200, "learning_rate": 3e-3, "batch_size": 64}
    made = trainer.make_run(
        home, **(VAE | {"training": settings, "logging": {"every_steps": 20, "grid_every_steps": None}})
    )
    trainer.train(str(made.folder))
    losses = trainer.logged_losses(made)
    assert losses[200] < losses[20] - 0.5


@pytest.fixture
def vae_run(home: Path) -> Run:
    return trainer.trained_run(home, **VAE)


@pytest.mark.slow
def test_it_is_sampled_scored_and_listed_by_the_same_commands(typed: Typed, home: Path, vae_run: Run) -> None:
    code, out, err = typed("sample", vae_run.id, "-n", "3", "--out", "images", "--format", "png", "--json")
    assert code == 0, err
    assert (json.loads(out)["sampler"], json.loads(out)["steps"]) == ("vae", 1)
    code, out, err = typed("evaluate", vae_run.id, "-n", "130", "--json")
    assert code == 0, err
    assert json.loads(out)["values"]["fid_classifier_n130"] > 1
    (row,) = json.loads(typed("runs", "--json")[1])
    assert (row["schedule"], row["T"]) == (None, None)
    code, _, err = typed("sample", vae_run.id, "--steps", "10")
    assert (code, "one call" in err) == (2, True)
    code, _, err = typed("sample", vae_run.id, "--format", "strip")
    assert (code, "one call" in err) == (2, True)
    code, _, err = typed("sample", vae_run.id, "--interpolate", "1", "2")
    assert (code, "diffusion model" in err, "spacing" in err) == (2, True, False)
    code, _, err = typed("export", vae_run.id, "out")
    assert (code, "a vae" in err) == (2, True)


@pytest.mark.slow
def test_its_bound_is_measured_beside_those_of_diffusion_models(typed: Typed, home: Path, vae_run: Run) -> None:
    code, out, err = typed("evaluate", vae_run.id, "--metrics", "bpd", "--json")
    assert code == 0, err
    values = json.loads(out)["values"]
    total, prior, steps, decoder = (
        values[f"bits_per_dim{part}_train_n1797"] for part in ("", "_prior", "_divergences", "_decoder")
    )
    assert steps == 0
    assert total == pytest.approx(prior + decoder, abs=1e-9)
    dataset = Dataset.open(vae_run.record.dataset["path"])
    x0 = to_float(torch.from_numpy(dataset.read(np.arange(1797))))
    with torch.no_grad():  # other draws of the codes, the same mean within its error
        found = elbo(Trained.from_run(vae_run).model, x0, torch.randn(1797, 5, generator=seeded()))
    assert prior == pytest.approx(float(found.rate.mean()), rel=1e-4)  # no draw is in it
    assert decoder == pytest.approx(float(found.distortion.mean()), rel=0.02)


@pytest.mark.slow
def test_it_travels_as_safetensors(typed: Typed, home: Path, vae_run: Run) -> None:
    assert typed("export", vae_run.id, "model", "--format", "safetensors")[0] == 0
    code, out, err = typed("import", "model", "--json")
    assert code == 0, err
    assert not {"schedule", "prediction", "variance"} & json.loads(out).keys()
    imported = Run.find(home, json.loads(out)["run"])
    assert "a variational autoencoder that was trained elsewhere" in describe(imported, {})
    back = Trained.from_run(imported).model.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in Trained.from_run(vae_run).model.state_dict().items())


def test_there_is_no_process_to_ask_for() -> None:
    experiment = experiment_from(VAE)
    assert isinstance(experiment.model, ModelConfig)
    assert isinstance(experiment.training, TrainingConfig)
    with pytest.raises(UsageError, match="no diffusion process"):
        build_diffusion(experiment)
