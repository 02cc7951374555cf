"""`ddpm-pipe compare`: like with like, the rest refused by name, and noise called noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pipeline.errors import RefusedError, UsageError
from pipeline.metrics.bound import Bound, Curve
from pipeline.metrics.bound_report import Measured, write_measured
from pipeline.metrics.fid import Moments
from pipeline.metrics.metric_identity import BoundIdentity, Generation, MetricIdentity, differing
from pipeline.metrics.scores import Scores, over_seeds, write_scores
from pipeline.runs.compare import compare
from pipeline.runs.evaluation import Evaluation, Scored, write_evaluation
from pipeline.storage.runs import Run
from tests.kit.commands import run_command

IDENTITY = MetricIdentity(
    metric="fid",
    settings="",
    extractor="classifier",
    extractor_sha256="ab" * 32,
    resize="none",
    num_images=559,
    num_reference=559,
    reference="all",
    dataset="cd" * 32,
    generation=Generation("ddim", 50),
)


@pytest.fixture
def new_run(home: Path) -> Callable[[], Run]:
    def make() -> Run:
        about = {"path": "nowhere", "fingerprint": "cd" * 32, "name": "digits"}
        return Run.create(
            home, name="tiny", experiment={}, config_hash="0", dataset=about, profile={}, command=["test"]
        )

    return make


def scored(run: Run, values: float | list[float], identity: MetricIdentity = IDENTITY, step: int = 30) -> None:
    """Leave what an evaluation leaves: a value, or one for each of consecutive seeds."""
    each = []
    for seed, value in enumerate(values if isinstance(values, list) else [values], identity.generation.seed):
        of_seed = replace(identity, generation=replace(identity.generation, seed=seed))
        empty = Moments.empty(2)
        each.append(Scores({of_seed.key: value}, {of_seed.key: of_seed}, {}, {}, {}, {}, empty, empty))
    count = len(list((run.folder / "evaluations").glob("*")))
    write_scores(over_seeds(each), run.folder / "evaluations" / str(count), {"model": {"run": run.id, "step": step}})


def measured(run: Run, bits: np.ndarray[Any, Any], process: str = "T = 20, x0 clipped", seed: int = 0) -> None:
    curve = Curve.of(np.tile(bits[:, None], (1, 3)) / 3)
    bound = Bound(bits * 0, bits / 2, bits / 2, curve, curve)
    identity = BoundIdentity("bits_per_dim", "cd" * 32, "test", len(bits), len(bits), "ema", process, seed, 10)
    write_measured(
        Measured.of(bound, identity), run.folder / "evaluations" / "bound", {"model": {"run": run.id, "step": 30}}
    )


def test_like_values_are_ranked_best_first(new_run):
    runs = [new_run() for _ in range(3)]
    for run, value in zip(runs, (0.7, 0.5, 0.9), strict=True):
        scored(run, value)
        scored(run, 1 - value, replace(IDENTITY, metric="precision"))
    (ranking,) = compare(runs)
    assert [rank.entry.run for rank in ranking.ranks] == [runs[1].id, runs[0].id, runs[2].id]
    assert [rank.behind for rank in ranking.ranks] == pytest.approx([0, 0.2, 0.4])
    assert all(rank.within_noise is None for rank in ranking.ranks)
    assert "--seeds" in ranking.statement
    (higher,) = compare(runs, "precision")
    assert [rank.entry.run for rank in higher.ranks] == [runs[1].id, runs[0].id, runs[2].id]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(IDENTITY, num_images=600), "num_images: 559, 600"),
        (replace(IDENTITY, extractor_sha256="ef" * 32), "extractor_sha256"),
        (replace(IDENTITY, dataset="ef" * 32), "dataset"),
        (replace(IDENTITY, resize="bilinear"), "resize: none, bilinear"),
        (replace(IDENTITY, reference="half"), "reference: all, half"),
        (replace(IDENTITY, split="test"), "split: train, test"),
        (replace(IDENTITY, generation=Generation("ddim", 100)), "generation.steps: 50, 100"),
        (replace(IDENTITY, generation=Generation("ancestral", 50)), "generation.sampler: ddim, ancestral"),
        (replace(IDENTITY, generation=Generation("ddim", 50, weights="raw")), "generation.weights: ema, raw"),
        (replace(IDENTITY, generation=Generation("ddim", 50, guidance_scale=2.0)), "generation.guidance_scale"),
        (replace(IDENTITY, generation=Generation("ddim", 50, precision="bf16")), "generation.precision: fp32, bf16"),
        (replace(IDENTITY, generation=Generation("ddim", 50, compile=True)), "generation.compile: False, True"),
    ],
)
def test_unlike_values_are_refused_by_what_differs(new_run, other, named):
    one, two = new_run(), new_run()
    scored(one, 0.5)
    scored(two, 0.4, other)
    with pytest.raises(RefusedError) as refused:
        compare([one, two], "fid")
    message = str(refused.value)
    assert named in message
    assert message.count(";") == 1  # that one difference alone, and what to do
    assert ("--across" in message) == named.startswith("generation.")
    assert [[rank.entry.run for rank in ranking.ranks] for ranking in compare([one, two])] == [[one.id], [two.id]]
    scored(two, 0.6)  # what is alike is found among the others
    (ranking,) = compare([one, two], "fid")
    assert [rank.entry.value for rank in ranking.ranks] == [0.5, 0.6]


def test_seed_and_chunk_are_chance_and_the_most_seeds_stand_for_a_model(new_run):
    one, two = new_run(), new_run()
    scored(one, [0.5, 0.6, 0.7])
    scored(one, 0.1)
    scored(two, 0.9, replace(IDENTITY, generation=Generation("ddim", 50, seed=7, chunk=10)))
    (ranking,) = compare([one, two])
    assert [rank.entry.value for rank in ranking.ranks] == pytest.approx([0.6, 0.9])


def test_scores_of_two_precisions_are_ranked_together_only_where_asked(new_run):
    one, three = new_run(), new_run()
    scored(one, 0.5)
    scored(three, 0.3, replace(IDENTITY, generation=Generation("ddim", 50, precision="bf16")))
    with pytest.raises(RefusedError, match=r"generation\.precision: fp32, bf16"):
        compare([one, three], "fid")
    (ranking,) = compare([one, three], across=["precision"])
    assert [row["generation.precision"] for row in ranking.to_json()["ranking"]] == ["bf16", "fp32"]


def test_fields_may_be_allowed_to_differ_and_then_stand_in_the_table(new_run):
    one, two = new_run(), new_run()
    scored(one, 0.5)
    scored(two, 0.4, replace(IDENTITY, generation=Generation("vae", 1, "", eta=1.0)))
    with pytest.raises(RefusedError, match=r"generation\.steps: 50, 1"):
        compare([one, two], across=["sampler"])
    (ranking,) = compare([one, two], across=["sampler", "steps"])
    assert [row["generation.sampler"] for row in ranking.to_json()["ranking"]] == ["vae", "ddim"]
    with pytest.raises(UsageError, match="did you mean 'sampler'"):
        compare([one, two], across=["samplr"])


def test_differences_within_the_noise_are_called_so_by_welchs_test(new_run):
    sets = [[0.50, 0.54, 0.55], [0.55, 0.57, 0.53], [0.90, 0.95, 0.85]]
    runs = [new_run() for _ in sets]
    for run, values in zip(runs, sets, strict=True):
        scored(run, values)
    (ranking,) = compare(runs)
    best, second, third = ranking.ranks
    assert (second.within_noise, third.within_noise) == (True, False)
    for rank, values in ((second, sets[1]), (third, sets[2])):
        test = scipy.stats.ttest_ind(sets[0], values, equal_var=False)
        assert rank.behind / rank.standard_error == pytest.approx(abs(test.statistic))
        assert rank.within_noise == (test.pvalue >= 0.05)
    assert best.entry.run == runs[0].id
    assert f"1 ({runs[0].id}) is not shown to be better than 2 ({runs[1].id}):" in ranking.statement
    (clear,) = compare([runs[0], runs[2]])
    assert "better than the others by more than the noise" in clear.statement


def test_bits_of_the_same_images_are_compared_image_by_image(new_run):
    """Images differ by whole bits, models by a hundredth: seen only where each image is its own measure."""
    rng = np.random.default_rng(0)
    hard = rng.normal(4, 1, 200)
    one, two = new_run(), new_run()
    measured(one, hard)
    measured(two, hard + rng.normal(0.01, 0.02, 200), process="T = 4000, x0 clipped", seed=3)
    (ranking,) = compare([one, two])
    assert ranking.metric == "bits_per_dim"
    second = ranking.ranks[1]
    assert second.entry.run == two.id
    assert second.within_noise is False
    assert second.standard_error < 0.002
    assert second.entry.spread.standard_error == pytest.approx(1 / math.sqrt(200), rel=0.2)


def test_checkpoints_of_one_run_have_a_place_each(new_run):
    run = new_run()
    scored(run, 0.9, step=10)
    scored(run, 0.5, step=20)
    scored(run, 0.6, step=30)
    (ranking,) = compare([run])
    assert [rank.entry.step for rank in ranking.ranks] == [20, 30, 10]


def test_settings_of_one_run_are_compared_only_when_that_is_asked_for(new_run):
    run = new_run()
    for steps in (10, 50):
        scored(run, 1 / steps, replace(IDENTITY, generation=Generation("ddim", steps)))
    assert [ranking.common["generation.steps"] for ranking in compare([run])] == [10, 50]
    (ranking,) = compare([run], across=["steps"])
    assert [rank.entry.value for rank in ranking.ranks] == [0.02, 0.1]


def test_each_runs_own_setting_is_ranked_and_other_settings_are_grouped_below(new_run):
    one, two = new_run(), new_run()
    other = replace(IDENTITY, num_images=100)
    for run, value in ((one, 0.5), (two, 0.4)):
        scored(run, value)
    scored(two, 0.1, replace(IDENTITY, generation=Generation("ddim", 100)))
    scored(one, 0.2, other)
    found = compare([one, two])
    assert [[rank.entry.value for rank in ranking.ranks] for ranking in found] == [[0.4, 0.5], [0.2], [0.1]]
    lacking = new_run()
    scored(lacking, 0.3, replace(IDENTITY, metric="kid"))
    assert [ranking.metric for ranking in compare([one, two, lacking])] == ["fid"] * 3  # which most of them have


def test_every_setting_that_all_runs_share_is_a_ranking(new_run):
    one, two = new_run(), new_run()
    faster = replace(IDENTITY, generation=Generation("ddim", 10))
    for run, offset in ((one, 0.0), (two, 0.1)):
        scored(run, 0.5 + offset)
        scored(run, 0.9 - offset, faster)
    scored(one, 0.3, replace(IDENTITY, generation=Generation("ddim", 100)))
    by_steps = {r.common["generation.steps"]: [rank.entry.run for rank in r.ranks] for r in compare([one, two], "fid")}
    assert by_steps == {50: [one.id, two.id], 10: [two.id, one.id]}


def test_the_command_tells_and_refuses_with_its_code(new_run, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert run_command(["compare"]) == 2
    assert "has been evaluated" in capsys.readouterr().err
    one, two, three = new_run(), new_run(), new_run()
    scored(one, [0.5, 0.55])
    scored(two, [0.8, 0.85])
    assert run_command(["compare", "--json"]) == 0  # the third has no scores, and is not asked for
    (ranking,) = json.loads(capsys.readouterr().out)["rankings"]
    assert [row["run"] for row in ranking["ranking"]] == [one.id, two.id]
    assert ranking["common"]["extractor_sha256"] == "ab" * 32
    assert run_command(["compare", one.id, two.id]) == 0
    out = capsys.readouterr().out
    assert out.index(one.id) < out.index(two.id)
    assert "0.525 ± 0.035" in out
    assert run_command(["compare", one.id, three.id]) == 2
    assert f"ddpm-pipe evaluate {three.id}" in capsys.readouterr().err
    assert run_command(["compare", one.id, two.id, "--metric", "fidd"]) == 2
    assert "did you mean 'fid'" in capsys.readouterr().err
    scored(three, 0.1, replace(IDENTITY, num_images=100))
    assert run_command(["compare", one.id, three.id]) == 0
    assert "the only model with a value of this kind" in capsys.readouterr().out
    assert run_command(["compare", one.id, three.id, "--metric", "fid"]) == 10
    assert "num_images: 559, 100" in capsys.readouterr().err
    (one.folder / "evaluations" / "0" / "scores.json").write_text("{")
    assert run_command(["compare", two.id, one.id]) == 2  # a damaged file is no score


def test_a_best_of_many_ranks_beside_a_last_one_only_if_asked(new_run: Callable[[], Run]) -> None:
    one, two = new_run(), new_run()
    best = replace(IDENTITY, generation=replace(IDENTITY.generation, selection="best of 9 by kid_classifier_n256"))
    scored(one, 0.4, best)
    scored(two, 0.5)
    assert [len(ranking.ranks) for ranking in compare([one, two])] == [1, 1]
    with pytest.raises(RefusedError, match=r"selection: best of 9 by kid_classifier_n256, last\).*--across selection"):
        compare([one, two], "fid")
    (ranking,) = compare([one, two], "fid", ["selection"])
    assert [rank.entry.run for rank in ranking.ranks] == [one.id, two.id]
    assert "best of 9 by kid_classifier_n256" in "\n".join(ranking.lines())


def test_an_evaluation_by_fewer_metrics_leaves_the_values_of_one_by_more(new_run: Callable[[], Run]) -> None:
    one, two = new_run(), new_run()

    def evaluated(run: Run, values: dict[str, float]) -> None:
        identities = [replace(IDENTITY, metric=metric) for metric in values]
        keyed = {identity.key: identity for identity in identities}
        figures = {identity.key: values[identity.metric] for identity in identities}
        empty = Moments.empty(2)
        scored = Scored(Scores(figures, keyed, {}, {}, {}, {}, empty, empty), np.zeros((1, 1, 8, 8), np.uint8))
        write_evaluation(Evaluation(run.id, 30, scored), run.folder / "evaluations")

    for run, fid in ((one, 0.5), (two, 0.4)):
        evaluated(run, {"fid": fid, "kid": fid / 10})
        evaluated(run, {"fid": fid})
        evaluated(run, {"fid": fid, "kid": fid / 10})  # the same again is no third folder
        assert len(list((run.folder / "evaluations").iterdir())) == 2
    for metric, values in (("fid", [0.4, 0.5]), ("kid", [0.04, 0.05])):
        (ranking,) = compare([one, two], metric)
        assert [rank.entry.value for rank in ranking.ranks] == values


def test_a_bound_given_the_labels_is_not_compared_with_one_that_is_not():
    plain = BoundIdentity("bits_per_dim", "cd" * 32, "test", 9, 9, "ema", "T = 20, x0 clipped", 0, 10)
    told = replace(plain, labels="of the images")
    assert differing(plain.to_json(), told.to_json()) == ["labels: None, of the images"]
    assert "labels" not in plain.to_json()
