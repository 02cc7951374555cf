"""The training loop step by step, on four random images: what it computes, by autograd itself, and what it goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddpm import LossAwareTimesteps
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.errors import DivergedError
from pipeline.training.batches import Batch, PlacedBatch
from pipeline.training.device import Compute
from pipeline.training.loop import StepResult, TrainState, _gradients_stay_local, fit
from pipeline.training.models import build_model, build_objective
from tests.pipeline.training.test_combinations import BATCH, SHAPE, batches
from tests.pipeline.worker.test_workers import CPU

T = 4
LOSS_AWARE = {"objective": "vlb", "timestep_sampling": "loss_aware"}


def experiment(dropout: float = 0.0, **training: Any) -> Experiment:
    model = {"channels": 8, "channel_multipliers": [1], "num_res_blocks": 1, "norm_groups": 4, "dropout": dropout}
    shared = {"batch_size": BATCH, "warmup_steps": 0, "learning_rate": 1e-3}
    return experiment_from(
        {
            "model": model | {"attention_resolutions": []},
            "diffusion": {
                "schedule": "cosine",
                "num_timesteps": T,
                "variance": training.pop("variance", "fixed_large"),
            },
            "training": shared | training,
        }
    )


def train_state_of(chosen: Experiment, compute: Compute = CPU) -> TrainState:
    return TrainState.create(compute.place(build_model(chosen, SHAPE)), chosen.training, T, compute)


def steps_of(
    train_state: TrainState, chosen: Experiment, compute: Compute = CPU, **options: Any
) -> Iterator[StepResult]:
    torch.set_num_threads(1)
    ahead = islice(batches(0), train_state.step, None)
    return fit(
        train_state, train_state.model, build_objective(chosen), ahead, chosen.training, compute, seed=0, **options
    )


def everything(train_state: TrainState) -> dict[str, Tensor]:
    return {
        f"{group}/{name}": t.clone() for group, tensors in train_state.tensors().items() for name, t in tensors.items()
    }


@pytest.mark.oracle(11)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [{}, LOSS_AWARE], ids=["uniform", "loss_aware"])
def test_a_restored_train_state_goes_on_bit_for_bit(training: dict[str, Any], channels_last: bool) -> None:
    """With dropout, several averages, and a history of losses that has been in use before; not a tensor is shared."""
    chosen = experiment(0.3, **training, ema_decay=[0.9, 0.5], ema_widths=[0.1], ema_snapshot_every_steps=4)
    compute = replace(CPU, channels_last=channels_last)
    straight, first, second = (train_state_of(chosen, compute) for _ in range(3))
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.fill_(7.0)  # whatever it began with
    expected = [result.losses for result in islice(steps_of(straight, chosen, compute), 24)]
    losses = [result.losses for result in islice(steps_of(first, chosen, compute), 16)]
    saved = {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in first.tensors().items()}
    assert ("timesteps" in saved) == bool(training)
    kept = {group: dict(tensors) for group, tensors in saved.items()}
    second.restore(saved, 16)
    layouts = {name: parameter.stride() for name, parameter in second.model.named_parameters()}
    assert all(
        t.stride() == layouts[name.partition("/")[2]] for name, t in second.tensors()["optimizer"].items() if t.dim()
    )
    losses += [result.losses for result in islice(steps_of(second, chosen, compute), 8)]
    assert straight.step == second.step == 24
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    ended, wanted = everything(second), everything(straight)
    assert ended.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ended[name], wanted[name])] == []
    assert all(
        torch.equal(t, first.tensors()[group][name]) for group, found in kept.items() for name, t in found.items()
    )
    if training:
        assert isinstance(straight.timesteps, LossAwareTimesteps)
        assert bool((straight.timesteps.seen >= 10).all())  # the steps were drawn by the history in the end


def by_autograd(chosen: Experiment, flips: bool) -> tuple[float, dict[str, Tensor], Tensor, Tensor]:
    """Loss, gradient, timesteps and losses of the first step, from the model, the objective and autograd alone."""
    train_state, batch = train_state_of(chosen), next(batches(0))
    drawn = train_state.timesteps.draw(batch.draws.u_t)
    placed = PlacedBatch.of(batch, drawn, CPU, flips, None, 0.0)
    losses = build_objective(chosen)(train_state.model, *placed.part(slice(None), False))
    loss = (losses * drawn.weight).sum() / BATCH
    names, parameters = zip(*train_state.model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), dict(zip(names, gradient, strict=True)), drawn.t, losses.detach()


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 4, 7])
def test_a_step_is_adam_on_the_gradient_of_the_mean_loss(micro_batch_size: int | None, flips: bool) -> None:
    """After one step Adam's first moment is (1 - beta1) times the gradient, its second (1 - beta2) times its square."""
    chosen = experiment(micro_batch_size=micro_batch_size, grad_clip=None, adam_betas=[0.8, 0.9])
    _, gradient, timesteps, losses = by_autograd(chosen, flips)
    train_state = train_state_of(chosen)
    before = {name: p.detach().clone() for name, p in train_state.model.named_parameters()}
    result = next(steps_of(train_state, chosen, horizontal_flip=flips))
    norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.losses, losses, rtol=1e-5, atol=1e-7)
    assert torch.equal(result.timesteps, timesteps)
    assert (result.step, result.learning_rate, train_state.step) == (1, 1e-3, 1)
    moments = train_state.tensors()["optimizer"]
    for name, parameter in train_state.model.named_parameters():
        torch.testing.assert_close(moments[f"exp_avg/{name}"], 0.2 * gradient[name], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(moments[f"exp_avg_sq/{name}"], 0.1 * gradient[name] ** 2, rtol=1e-3, atol=1e-9)
        clear = gradient[name].abs() > 1e-4  # beyond Adam's epsilon and the rounding of micro-batches
        step = (before[name] - parameter.detach())[clear]
        torch.testing.assert_close(step, 1e-3 * gradient[name][clear].sign(), rtol=1e-2, atol=0)
        assert parameter.grad is None
        average = 0.1 * before[name] + 0.9 * parameter.detach()  # the ramp-up's first decay is 1 / 10
        torch.testing.assert_close(train_state.ema.shadow[name], average, rtol=1e-6, atol=1e-8)


def test_the_loss_is_weighed_where_timesteps_are_not_drawn_alike() -> None:
    """The gradient of sum(weight * loss) / b, with weights 1 / (T p_t) that differ."""
    chosen = experiment(**LOSS_AWARE, grad_clip=None, micro_batch_size=3)
    gradients = []
    for through_the_loop in (False, True):
        train_state = train_state_of(chosen)
        for t in range(T):
            train_state.timesteps.update(torch.full((10,), t), torch.full((10,), 4.0**t))
        if through_the_loop:
            result = next(steps_of(train_state, chosen))
            assert len(result.weights.unique()) > 1
            moments = train_state.tensors()["optimizer"]
            gradients.append({n: moments[f"exp_avg/{n}"] / 0.1 for n, _ in train_state.model.named_parameters()})
        else:
            batch = next(batches(0))
            drawn = train_state.timesteps.draw(batch.draws.u_t)
            placed = PlacedBatch.of(batch, drawn, CPU, False, None, 0.0)
            losses = build_objective(chosen)(train_state.model, *placed.part(slice(None), False))
            ((losses * drawn.weight).sum() / BATCH).backward()
            gradients.append({n: p.grad for n, p in train_state.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_the_losses_of_all_workers_are_remembered_those_that_overflow_forgotten() -> None:
    chosen, told = experiment(**LOSS_AWARE), []

    def all_gather(mine: Tensor) -> Tensor:
        told.append(mine)
        others = torch.tensor([[0.0, 8.0], [3.0, float("inf")], [3.0, float("nan")]], dtype=torch.float64)
        return torch.cat([mine, others])

    train_state = train_state_of(chosen)
    result = next(steps_of(train_state, chosen, all_gather=all_gather))
    (rows,) = told
    assert rows.dtype == torch.float64
    assert torch.equal(rows, torch.stack([result.timesteps.double(), result.losses.double()], 1))
    expected = LossAwareTimesteps(T)
    expected.update(result.timesteps, result.losses)
    expected.update(torch.tensor([0]), torch.tensor([8.0]))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(train_state.timesteps.state_dict()[name], tensor), name


class Scale(NamedTuple):
    """A loss scale as torch's scaler shows it."""

    enabled: bool
    scale: float

    def is_enabled(self) -> bool:
        return self.enabled

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.fault(16)
@pytest.mark.parametrize("norm", [float("inf"), float("nan"), 3.0])
@pytest.mark.parametrize(
    ("scaler", "told"),
    [
        (Scale(False, 1.0), r"diverged at step 8: gradient norm is (inf|nan) at learning rate 0.002; lower"),
        (Scale(True, 0.5), "diverged at step 8: the gradient overflows fp16 even with its loss scale down to 0.5"),
        (Scale(True, 1.0), None),
    ],
)
def test_a_gradient_that_is_not_finite_is_divergence_but_for_fp16s_overflows(
    norm: float, scaler: Scale, told: str | None
) -> None:
    empty = torch.empty(0)
    result = StepResult(8, empty, empty, empty, torch.tensor(norm), 0.002, scaler)  # type: ignore[arg-type]
    if told is None or norm == 3.0:
        result.require_finite()
        return
    with pytest.raises(DivergedError, match=told):
        result.require_finite()


@pytest.mark.fault(16)
def test_divergence_is_noticed_a_step_later_and_before_that_step_changes_anything() -> None:
    chosen = experiment()
    train_state = train_state_of(chosen)
    steps = steps_of(train_state, chosen)
    next(steps)
    with torch.no_grad():
        next(iter(train_state.model.parameters())).fill_(float("nan"))
    assert next(steps).step == 2
    before = everything(train_state)
    with pytest.raises(DivergedError, match="diverged at step 2"):
        next(steps)
    assert all(
        torch.equal(t.nan_to_num(9.0), before[name].nan_to_num(9.0)) for name, t in everything(train_state).items()
    )


def test_workers_average_their_gradients_at_the_last_micro_batch_alone() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        compiled = SimpleNamespace(_orig_mod=shared)  # as torch.compile wraps it
        for network in (shared, compiled):
            for stay in (True, False):
                with _gradients_stay_local(network, stay):  # type: ignore[arg-type]
                    assert shared.require_backward_grad_sync is not stay
                assert shared.require_backward_grad_sync
        synchronised: list[bool] = []
        chosen = experiment()
        train_state = train_state_of(chosen)
        network = nn.parallel.DistributedDataParallel(train_state.model)
        network.register_forward_pre_hook(lambda *_: synchronised.append(network.require_backward_grad_sync))
        few = replace(CPU, micro_batch_size=3)
        next(fit(train_state, network, build_objective(chosen), batches(0), chosen.training, few, seed=0))
        assert synchronised == [False, True]  # 3 and 1 of the 4 images
    finally:
        torch.distributed.destroy_process_group()
    with _gradients_stay_local(nn.Linear(2, 2), True):
        pass


def test_the_rate_and_the_seed_decide_a_step_and_the_rank_what_torch_draws() -> None:
    """The warm-up's first rate is 0, so that nothing moves. Torch's generators are for the dropout of users' own networks."""
    still = train_state_of(experiment(warmup_steps=2))
    before = everything(still)
    rates = [result.learning_rate for result in islice(steps_of(still, experiment(warmup_steps=2)), 1)]
    assert rates == [0.0]
    assert all(torch.equal(t, before[name]) for name, t in everything(still).items() if name.startswith("model/"))
    chosen = experiment(0.5)
    ended, drawn = [], []
    for rank in (0, 0, 1):
        train_state = train_state_of(chosen)
        list(islice(steps_of(train_state, chosen, rank=rank), 3))
        ended.append(torch.cat([t.flatten() for t in everything(train_state).values()]))
        drawn.append(torch.rand(3))
    assert torch.equal(ended[0], ended[1])
    assert torch.equal(ended[0], ended[2])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_batches_that_end_end_the_training() -> None:
    chosen = experiment()
    train_state = train_state_of(chosen)
    few: list[Batch] = list(islice(batches(0), 3))
    results = fit(train_state, train_state.model, build_objective(chosen), few, chosen.training, CPU, seed=0)
    assert [result.step for result in results] == [1, 2, 3]
