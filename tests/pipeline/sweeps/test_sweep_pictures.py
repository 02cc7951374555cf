"""The pictures of a sweep: what they name, what they leave out, and that they say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from pipeline.pictures.pictures import save_grid
from pipeline.storage.runs import Run
from pipeline.sweeps import pictures
from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.report import _caption
from pipeline.sweeps.result import Result, result_of, within_noise
from tests.kit.drawings import holds, points_of
from tests.pipeline.sweeps.swept_entries import entry

SCHEDULES = ("sigmoid", "linear", "cosine")  # as listed: neither by the alphabet nor by rank


def swept(
    seeds: int = 2, num_timesteps: tuple[int, ...] = (100, 250, 1000), time_noise: float = 1.0, **more: Any
) -> Result:
    """A result over schedules and T: cosine is best, and longer T take longer."""
    generator = np.random.default_rng(0)
    entries = []
    for s in range(seeds):
        for i, schedule in enumerate(SCHEDULES):
            for j, T in enumerate(num_timesteps):
                value = 3.0 - i + 0.005 * j + 0.01 * float(generator.normal())
                time = 60.0 + 5 * j + time_noise * float(generator.normal())
                point = {"diffusion.schedule": schedule, "diffusion.num_timesteps": T}
                entries.append(entry(point, s, value, curve={10: 2 * value, 50: value}, training_s=time, **more))
    return result_of("s", "s", "fid", entries, listed={"diffusion.schedule": SCHEDULES})


def with_a_failed_seed(result: Result) -> Result:
    """The same, but that the second seed of the best point failed."""
    assert result.best is not None
    lost = result.best.entries[1]
    entries = [e for point in result.points for e in point.entries if e is not lost]
    return result_of("s", "s", "fid", [*entries, entry(lost.point, lost.seed, None)])


def texts(figure: Any) -> list[str]:
    """Every name in the legends of a figure."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.mark.parametrize("draw", [pictures._nfe, pictures._training_time])
def test_every_point_has_a_name_and_looks_like_no_other(draw: Any) -> None:
    result = swept()
    figure = draw(result)
    assert {point.title for point in result.points} <= set(texts(figure))
    (axes,) = figure.axes
    lines = [bars[0] for bars in axes.containers]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == len(lines) == 9


@pytest.mark.parametrize("draw", [pictures._ranking, pictures._nfe, pictures._training_time])
def test_points_that_are_left_out_are_counted(draw: Any) -> None:
    assert "(the best 24 of 30 points)" in draw(swept(num_timesteps=tuple(range(100, 110)))).axes[0].get_title("left")
    assert "the best" not in draw(swept()).axes[0].get_title("left")


def test_schedules_stand_as_they_were_listed() -> None:
    figure = pictures._heat_map(swept())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(SCHEDULES)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["100", "250", "1000"]


def test_the_ranking_tells_what_its_colours_mean() -> None:
    result = swept()
    assert result.best is not None
    figure = pictures._ranking(with_a_failed_seed(result))
    names = texts(figure)
    assert {"best", "within its noise (95%)", "worse than the best", "a seed failed: not compared"} <= set(names)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-1] == f"{result.best.title} (seed 1 failed)"


def test_a_single_seed_has_no_bar_of_width_zero() -> None:
    figure = pictures._ranking(swept(seeds=1))
    assert not figure.axes[0].collections  # where bars are
    assert "one seed each" in figure.axes[0].get_title("left")
    spread = pictures._ranking(swept(seeds=1, std=0.2, std_over="100 subsets of 279"))
    assert "deviation over 100 subsets of 279, not over seeds" in texts(spread)
    assert len(spread.axes[0].collections) == 9


def test_the_picture_of_times_says_when_they_tell_nothing() -> None:
    said = [pictures._training_time(swept(time_noise=noise)).axes[0].get_title("left") for noise in (0.1, 50.0)]
    assert ["Times differ between seeds" in title for title in said] == [False, True]
    assert "One seed each" in pictures._training_time(swept(seeds=1)).axes[0].get_title("left")


def test_the_front_of_times_is_that_of_the_means() -> None:
    def a(i: int, seed: int, value: float, time: float) -> LedgerEntry:
        return entry({"a": i}, seed, value, training_s=time)

    # the second point has the fastest single trial; on average the first beats it in both
    result = result_of(
        "s",
        "s",
        "fid",
        [a(1, 0, 1.0, 10), a(1, 1, 1.1, 12), a(2, 0, 2.0, 5), a(2, 1, 2.1, 30), a(3, 0, 9.0, 1), a(3, 1, 9.1, 2)],
    )
    (axes,) = pictures._training_time(result).axes
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    np.testing.assert_allclose(front.get_xydata(), [[1.5, 9.05], [11, 1.05]])


def test_a_column_of_the_sheet_is_one_noise_and_a_point_without_that_seed_is_left_out(tmp_path: Path) -> None:
    runs = {}
    for schedule in SCHEDULES:
        for seed in range(2):  # an image of the seed's own grey stands for its noise
            run = runs[f"{schedule}{seed}"] = Run(tmp_path / f"{schedule}{seed}")
            (run.folder / "pictures").mkdir(parents=True)
            (run.folder / "model").mkdir()
            (run.folder / "model" / "experiment.json").write_text('{"shape": [1, 8, 8]}')
            save_grid(np.full((16, 1, 8, 8), 100 * seed, np.uint8), run.folder / "pictures" / "samples.png")

    def drawn(failed: dict[str, int]) -> Any:
        entries = [
            replace(entry({"a": name}, s, None if failed.get(name) == s else i + 0.1 * s), run=f"{name}{s}")
            for i, name in enumerate(SCHEDULES)
            for s in range(2)
        ]
        return pictures._samples(result_of("s", "s", "fid", entries), runs)

    def seeds(figure: Any) -> list[int]:
        noises = []
        for axes in figure.axes:
            strip = np.asarray(axes.images[0].get_array())
            places = strip[10::66, 10::66, 0]  # inside each image of 64 x 64, which two white pixels keep apart
            assert places.shape == (1, 12)
            (grey,) = set(places.ravel().tolist())
            noises.append(grey // 100)
        return noises

    sheet = drawn({SCHEDULES[1]: 0})
    assert seeds(sheet) == [1, 1, 1]  # the one that all have
    assert "(seed 1)" in sheet.get_suptitle()
    sheet = drawn({SCHEDULES[1]: 0, SCHEDULES[2]: 1})
    assert seeds(sheet) == [0, 0]
    assert "(seed 0; 1 without images of it)" in sheet.get_suptitle()
    assert seeds(drawn({})) == [0, 0, 0]


def test_all_pictures_are_drawn_of_a_sweep_with_troubles(tmp_path: Path) -> None:
    result = with_a_failed_seed(swept())
    found = pictures.draw_all(result, {}, tmp_path)
    drawings = {
        "ranking": pictures._ranking,
        "heatmap": pictures._heat_map,
        "network_calls": pictures._nfe,
        "training_time": pictures._training_time,
        "parallel_coordinates": pictures._parallel_coordinates,
    }
    assert list(found) == list(drawings)
    for name, path in found.items():
        assert holds(path, drawings[name](result)), name


def test_the_ranking_shows_each_mean_with_its_error_and_its_seeds() -> None:
    result = swept()
    (axes,) = pictures._ranking(result).axes
    assert len(result.ranked) == 9
    looks = (("o", 7), ("|", 9))  # the ends of an error bar are smaller
    dots, seeds = ([line for line in axes.lines if (line.get_marker(), line.get_ms()) == look] for look in looks)
    np.testing.assert_allclose([points_of(dot)[0] for dot in dots], [(p.mean, y) for y, p in enumerate(result.ranked)])
    for y, (point, line) in enumerate(zip(result.ranked, seeds, strict=True)):
        np.testing.assert_allclose(points_of(line), [(value, y) for value in point.values])
    for y, (point, bars) in enumerate(zip(result.ranked, axes.containers, strict=True)):
        (ends,) = bars[2][0].get_segments()
        error = np.std(point.values, ddof=1) / np.sqrt(2)
        np.testing.assert_allclose(ends, [(point.mean - error, y), (point.mean + error, y)])
    assert [label.get_text() for label in axes.get_yticklabels()] == [point.title for point in result.ranked]
    alike = within_noise(result)
    wanted = [pictures.GOOD] + [pictures.NOISE if point in alike else pictures.REST for point in result.ranked[1:]]
    assert [dot.get_color() for dot in dots] == wanted
    assert len(set(wanted)) == 3


def test_a_cell_of_the_heat_map_is_the_mean_of_its_point_and_the_best_is_framed() -> None:
    result = swept(num_timesteps=(100, 250))
    (axes,) = pictures._heat_map(result).axes
    cells = {(p.point["diffusion.schedule"], p.point["diffusion.num_timesteps"]): p for p in result.points}
    texts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    shown = np.asarray(axes.images[0].get_array())
    assert len(texts) == shown.size == 6
    for y, schedule in enumerate(SCHEDULES):
        for x, T in enumerate((100, 250)):
            point = cells[schedule, T]
            assert shown[y, x] == point.mean
            assert texts[y, x] == f"{point.mean:.4g}\n± {point.standard_error:.2g}"
    assert result.best is not None
    (frame,) = axes.patches
    y, x = (
        SCHEDULES.index(result.best.point["diffusion.schedule"]),
        (100, 250).index(result.best.point["diffusion.num_timesteps"]),
    )
    assert (round(frame.get_x() + frame.get_width() / 2), round(frame.get_y() + frame.get_height() / 2)) == (x, y)


def test_lines_and_points_stand_where_their_numbers_are() -> None:
    result = swept()
    lines = {bars.get_label(): points_of(bars[0]) for bars in pictures._nfe(result).axes[0].containers}
    (axes,) = pictures._training_time(result).axes
    places = {bars.get_label(): bars for bars in axes.containers}
    for point in result.ranked:
        np.testing.assert_allclose(lines[point.title], [(calls, value) for calls, value in point.curve.items()])
        bars, times, values = places[point.title], point.training_times, point.values
        np.testing.assert_allclose(points_of(bars[0]), [(np.mean(times), np.mean(values))])
        ends = np.array(
            [collection.get_segments()[0] for collection in bars[2]]
        )  # of the bar across, of the one upright
        np.testing.assert_allclose(ends[0, :, 0], [min(times), max(times)])
        np.testing.assert_allclose(ends[1, :, 1], [min(values), max(values)])


def test_parallel_coordinates_lead_every_point_through_its_settings_to_its_value() -> None:
    result = swept()
    (axes,) = pictures._parallel_coordinates(result).axes
    lines = [points_of(line) for line in axes.lines if len(line.get_xdata()) == 3]
    means = np.array([point.mean for point in result.ranked])
    wanted = [
        (
            SCHEDULES.index(point.point["diffusion.schedule"]) / 2,
            (100, 250, 1000).index(point.point["diffusion.num_timesteps"]) / 2,
            (point.mean - means.min()) / (means.max() - means.min()),
        )
        for point in reversed(result.ranked)  # the best is drawn last, above the others
    ]
    np.testing.assert_allclose([line[:, 1] for line in lines], wanted, atol=1e-12)


def test_a_colour_means_the_same_in_all_pictures_and_captions_say_what_is_drawn() -> None:
    result = swept()
    assert result.best is not None
    for draw in (pictures._nfe, pictures._training_time):
        colours = {bars.get_label(): bars[0].get_color() for bars in draw(result).axes[0].containers}
        for point in result.ranked:
            assert colours[point.title] == pictures._colour(result, point)
    assert pictures._colour(result, result.best) == pictures.GOOD
    (thick,) = [line for line in pictures._parallel_coordinates(result).axes[0].lines if line.get_linewidth() == 3.0]
    frame = pictures._heat_map(result).axes[0].patches[0].get_edgecolor()
    assert thick.get_color() == to_hex(frame).upper() == pictures.GOOD
    single = swept(seeds=1)
    assert "Tukey" in _caption("ranking", result)
    assert "Tukey" not in _caption("ranking", single)
    for draw in (pictures._ranking, pictures._heat_map, pictures._nfe, pictures._training_time):
        assert "means over seeds" in draw(result).axes[0].get_title("left")
        assert "one seed each" in draw(single).axes[0].get_title("left")
