"""`ddpm-pipe report` and `ddpm-pipe curves`: the numbers are the recorded ones, and the page stands alone."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.metrics.fid import Moments
from pipeline.metrics.metric_identity import Generation, MetricIdentity
from pipeline.metrics.scores import Scores, Spread, write_scores
from pipeline.pictures.line_chart import MOST_POINTS, Line, line_chart
from pipeline.pictures.pictures import save_grid
from pipeline.runs.compare import compare
from pipeline.runs.report import REPORT_FILE, write_report
from pipeline.storage.runs import Run
from pipeline.tracking.curves import curves, recorded
from pipeline.tracking.tracker import Tracker, TrackingSettings
from tests.kit import trainer
from tests.kit.browser import chromium

NOBODY = TrackingSettings("http://127.0.0.1:9")
IDENTITY = MetricIdentity(
    "fid", "", "classifier", "ab" * 32, "none", 559, 559, "all", "cd" * 32, Generation("ddim", 50)
)
OUTSIDE = re.compile(r"""https?:|//[a-z]|src=(?!'data:image/png;base64,)|href=|url\(|@import|<script|<link""")


def finished(home: Path, worse: float = 1.0, **changes: Any) -> Run:
    """Return a run with what a training of 30 steps leaves: curves, previews and a score, all larger by a factor."""
    run = trainer.make_run(home, **changes)
    tracker = Tracker(run.folder, NOBODY, later=True)
    for step in range(3, 31, 3):
        quartiles = {f"loss_t_quartile_{i}": worse * i / step for i in range(1, 5)}
        tracker.metrics(step, {"loss": worse / step, "learning_rate": 1e-4} | quartiles)
        tracker.metrics(step, {"images_per_s": 100.0, "gpu_0_power_usage_watts": 60.0}, "system")
        tracker.metrics(
            step,
            {"loss": worse / step, "train_loss": 0.9 * worse / step, "loss_t_62": worse, "loss_t_187": worse},
            "val",
        )
        tracker.metrics(step, {"bound_estimate": worse, "bound_estimate_error": 0.1}, "val")
    for step in (10, 20):
        tracker.metrics(step, {"kid_classifier_n64": worse / step, "kid_std_classifier_n64": 0.01}, "score")
    tracker.metrics(30, {"training_s": 120.0}, "system")
    (run.folder / "pictures").mkdir()
    for step in (0, 15, 30):
        picture = run.folder / "pictures" / f"samples-step-{step:010d}.png"
        save_grid(np.full((64, 1, 8, 8), 8 * step, np.uint8), picture)
    scores = Scores(
        {IDENTITY.key: worse * 4.321},
        {IDENTITY.key: IDENTITY},
        {IDENTITY.key: Spread(0.25, "3 seeds", (worse * 4.3, worse * 4.342), 0.1)},
        {"real_half": {"fid": 0.2936}, "uniform_noise": {"fid": 60.28}},
        *({}, {}, Moments.empty(2), Moments.empty(2)),
    )
    write_scores(scores, run.folder / "evaluations" / "first", {"model": {"run": run.id, "step": 30}})
    run.update(step=30, summary=scores.values)
    return run


def test_the_page_of_a_run_holds_its_recorded_numbers_and_needs_nothing_from_elsewhere(home: Path) -> None:
    run = finished(home)
    page = write_report([run], home / "page.html").read_text()
    assert not OUTSIDE.search(re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", page))
    for title in (
        "Scores",
        "Curves",
        "Samples by step",
        "Settings that differ",
        "Images trained on",
        "Cost",
        "Repeat it",
    ):
        assert f"<h2>{title}" in page
    for part in (
        "<td>4.321 ± 0.25</td><td>0.2936</td><td>60.28</td>",
        "<h3>train/loss</h3>", f"last: {1 / 30:.4g} at step 30",
        "<h3>train/loss_t_quartile</h3>", f"4: {4 / 30:.4g} at step 30",
        "<h3>val/loss</h3>", f"validation images: {1 / 30:.4g} at step 30", f"training images: {0.9 / 30:.4g} at step 30",
        "<h3>val/loss_t</h3>", "62: 1 at step 30", "187: 1 at step 30", "<h3>val/bound_estimate</h3>",
        "<h3>score/kid_classifier_n64</h3>", f"last: {1 / 20:.4g} at step 20",
        "step 15</figcaption>", "images       1,797 of 8x8, grey",
        "<td>images seen</td><td>480 (0.3 epochs)</td>", "<td>training time</td><td>2 min 00 s</td>",
        "2 Wh (mean of 10 readings: 60 W)", "<td>model.channels</td><td>16</td><td>128</td>", "ddpm-pipe test",
    ):  # fmt: skip
        assert part in page, part
    assert page.count("<svg") == 7
    assert page.count("stroke-opacity") == 2 + 10  # an error bar for each KID and each bound
    assert "kid_std" not in page
    assert "bound_estimate_error" not in page
    assert "system/" not in page


def test_runs_side_by_side_have_the_verdict_of_compare_and_the_settings_that_differ(home: Path, typed: Any) -> None:
    runs = [finished(home), finished(home, worse=2.0, training={"steps": 30, "batch_size": 32})]
    code, out, err = typed("report", *(run.id for run in runs), "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made == {"runs": [run.id for run in runs], "report": str(Path.cwd() / REPORT_FILE)}
    page = Path(made["report"]).read_text()
    (ranking,) = compare(runs)
    assert f"<div class=answer>{ranking.statement}</div>" in page
    assert "is better than the others" in ranking.statement
    assert "<td>training.batch_size</td><td>16</td><td>32</td>" in page
    assert "model.channels" not in page.partition("Images trained on")[0]
    for run, worse in zip(runs, (1.0, 2.0), strict=True):
        assert f"tiny {run.id}: {worse / 30:.4g} at step 30" in page
    assert typed("report", runs[0].id)[1].strip() == str(runs[0].folder / REPORT_FILE)


def test_a_name_cannot_bring_a_script_into_the_page_and_a_run_of_which_little_is_left_has_one(home: Path) -> None:
    run = trainer.make_run(home)
    record = run.folder / "run.json"
    content = json.loads(record.read_text())
    content["name"] = content["dataset"]["name"] = "<script>alert('1')</script>"
    content["dataset"]["path"] = "nowhere"
    record.write_text(json.dumps(content))
    (run.folder / "pictures").mkdir()
    (run.folder / "pictures" / "samples-step-0000000000.png").write_bytes(b"damaged")
    page = write_report([Run(run.folder)], home / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in page
    assert "Not scored yet." in page
    assert "<h2>Curves" not in page


def test_curves_are_the_recorded_values_as_csv_and_as_a_data_frame(home: Path, typed: Any) -> None:
    run = trainer.make_run(home)
    first = Tracker(run.folder, NOBODY, later=True)
    for step in (1, 2, 3):
        first.metrics(step, {"loss": 1 / 3 / step})
    resumed = Tracker(run.folder, NOBODY, later=True)
    for step in (2, 3, 4):  # from the checkpoint of step 1
        resumed.metrics(step, {"loss": 1 / 3 / step if step < 4 else math.nan})
    for value in (2.0, 2.0, 3.0):
        resumed.metrics(4, {"fid_x": value}, "score")

    found = [(point.metric, point.step, point.value) for point in recorded(run)]
    assert found[:3] == [("train/loss", step, 1 / 3 / step) for step in (1, 2, 3)]
    assert math.isnan(found[3][2])
    assert found[4:] == [("score/fid_x", 4, 2.0), ("score/fid_x", 4, 3.0)]

    code, out, err = typed("curves", run.id, "--csv")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["run", "metric", "step", "value", "time"]
    assert [float(row["value"]) for row in rows[:3]] == [1 / 3, 1 / 6, 1 / 9]
    frame = curves(run.id, home=home)
    assert list(frame.columns) == list(rows[0])
    assert frame.value.dropna().tolist() == [1 / 3, 1 / 6, 1 / 9, 2.0, 3.0]
    assert str(frame.time.dt.tz) == "UTC"
    table = typed("curves", run.id)[1].splitlines()
    assert table[1].split() == ["score/fid_x", run.id, "2", "2", "3", "2", "4"]

    code, _, err = typed("curves", trainer.make_run(home).id)
    assert code == 2
    assert "no metrics recorded" in err


def test_a_chart_has_a_logarithmic_axis_for_values_that_span_much_and_means_of_long_curves() -> None:
    def heights(*values: float) -> list[float]:
        (path,) = re.findall(
            r"<path d='M([^']*)' fill='none'", line_chart("x", [Line("a", range(len(values)), values)])
        )
        return [float(point.split()[1]) for point in path.split("L")]

    decades = heights(1.0, 10.0, 100.0, 1000.0)
    assert np.diff(decades) == pytest.approx(np.full(3, np.diff(decades)[0]), abs=0.11)
    even = heights(-1.0, 0.0, 1.0)
    assert np.diff(even) == pytest.approx(np.full(2, np.diff(even)[0]), abs=0.11)
    assert len(heights(*range(1, 2 * MOST_POINTS + 1))) == MOST_POINTS
    assert len(heights(1.0, math.nan, 2.0)) == 2
    assert line_chart("x", [Line("a", [1], [math.inf])]) == ""
    assert "1.5</text>" in line_chart("x", [Line("a", [1, 2], [1.5, 1.5])])


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_the_page_fits_a_desktop_a_tablet_and_a_phone(home: Path, tmp_path: Path, count: int) -> None:
    runs = [finished(home, worse=k + 1.0, training={"steps": 30, "batch_size": 16 + 16 * k}) for k in range(count)]
    page = write_report(runs, home / "page.html")
    with chromium() as driver:
        for width in (1400, 800, 390):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get(page.as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            wide = "[...document.querySelectorAll('figure, svg, img, pre')].filter(e => e.getBoundingClientRect().right > innerWidth)"
            assert driver.execute_script(f"return {wide}.length") == 0
            assert driver.execute_script("return [...document.images].every(i => i.naturalWidth > 0)")
            fetched = "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
            assert driver.execute_script(f"return {fetched}") == 0
            driver.save_screenshot(str(tmp_path / f"{count}-{width}.png"))
