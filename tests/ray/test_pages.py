"""MLflow's pages as a user sees them, in headless Chromium, over a store with a real sweep and its trainings."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from tests.kit.browser import chromium
from tests.kit.commands import Shell
from tests.kit.ports import free_port
from tests.kit.tracking import answers
from tests.kit.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.all, pytest.mark.timeout(1800)]
WAIT_S = 90


class Pages:
    """A browser on the pages that `ddpm-pipe ui` serves."""

    def __init__(self, driver: Any, address: str, pictures: Path) -> None:
        self.driver, self.address, self.pictures = driver, address, pictures
        self.root = address.partition("#")[0] + "#"

    def text(self) -> str:
        return str(self.driver.find_element("tag name", "body").text)

    def wait_for(self, condition: Any, timeout_s: float = WAIT_S) -> None:
        wait_for(condition, timeout_s, pause_s=0.3, explain=self.text)

    def open(self, name: str, address: str, *texts: str) -> str:
        """Open a page, wait until it shows all the texts, keep a picture of it, and return what it shows."""
        self.driver.get("about:blank")
        self.driver.get(address)
        self.wait_for(lambda: all(text in self.text() for text in texts))
        self.driver.save_screenshot(str(self.pictures / f"{name}.png"))
        return self.text()


def widest_picture(pages: Pages) -> int:
    widths: list[int] = pages.driver.execute_script("return [...document.images].map(i => i.naturalWidth)")
    return max(widths, default=0)


def scroll_on(pages: Pages) -> None:
    """Scroll on: charts are drawn as they come into view, those of other samplers first."""
    pages.driver.execute_script(
        "for (const e of document.querySelectorAll('*')) if (e.scrollHeight > e.clientHeight + 50) e.scrollTop += 300"
    )


@pytest.fixture(scope="module")
def pages(swept_shell: Shell, swept: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    with chromium() as driver, swept_shell.start("ui", "--port", str(free_port())) as server:
        address = server.wait_for(lambda: re.search(r"http://\S+(?=\s)", server.stdout))
        yield Pages(driver, address[0], tmp_path_factory.mktemp("pictures"))
        server.send(signal.SIGINT)
        server.end(60)


@pytest.fixture(scope="module")
def ids(swept_shell: Shell, swept: dict[str, Any], winner: dict[str, Any]) -> dict[str, str]:
    """MLflow's ids of the sweep's run, of its best trial's, and of the training of its best point."""
    client = MlflowClient(f"sqlite:///{swept_shell.home}/mlflow.db")
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    (parent,) = client.search_runs([experiment], "tags.kind = 'sweep'")
    (best,) = client.search_runs([experiment], "attributes.run_name LIKE '%best FID%'")
    (trained,) = client.search_runs([experiment], f"tags.`ddpm_pipe.run_id` = '{winner['run']}'")
    found = {"parent": parent, "best": best, "trained": trained}
    return {"experiment": experiment, **{name: run.info.run_id for name, run in found.items()}}


def test_the_list_shows_what_matters_and_trials_under_their_sweep(pages: Pages, swept: dict[str, Any]) -> None:
    columns = ("diffusion.schedule", "diffusion.num_timesteps", swept["metric"])
    pages.open("list", pages.address, "sweep grid", *columns)
    (row,) = (row for row in pages.driver.find_elements("css selector", "[role=row]") if "sweep grid" in row.text)
    row.find_element("css selector", "button").click()
    titles = [point["title"] for point in swept["points"]]
    pages.wait_for(lambda: all(title in pages.text() for title in titles))
    pages.driver.save_screenshot(str(pages.pictures / "nested.png"))
    assert f"{swept['best']['title']}, best FID, seed 0" in pages.text()


def test_the_best_trial_is_found_by_its_words(pages: Pages, ids: dict[str, str], swept: dict[str, Any]) -> None:
    words = quote(f"attributes.run_name LIKE '%{swept['best']['title']}, best FID%'")
    address = f"{pages.root}/experiments/{ids['experiment']}/runs?workflowType=machine_learning&searchFilter={words}"
    pages.open("search", address, "2 matching runs")  # it, under its sweep


def test_a_run_tells_what_it_was_and_how_to_do_it_again(
    pages: Pages, ids: dict[str, str], swept: dict[str, Any]
) -> None:
    run = f"{pages.root}/experiments/{ids['experiment']}/runs/{ids['best']}"
    said = pages.open("run", run, "best FID", "Description", swept["metric"])
    assert str(min(swept["best"]["values"].values()))[:8] in said
    parent = f"{pages.root}/experiments/{ids['experiment']}/runs/{ids['parent']}"
    assert "digits" in pages.open("sweep", parent, "sweep grid", "Description", "ranked by fid")
    pages.open("charts", f"{run}/model-metrics", "Model metrics", "Step")

    def found_further_down() -> bool:
        scroll_on(pages)
        return "train/loss_t_quartile_1" in pages.text()

    pages.wait_for(found_further_down)
    pages.wait_for(lambda: len(pages.driver.find_elements("css selector", ".js-plotly-plot")) >= 2)
    pages.driver.save_screenshot(str(pages.pictures / "charts.png"))


def test_pictures_and_reports_are_shown_beside_the_scores(pages: Pages, ids: dict[str, str]) -> None:
    artifacts = f"{pages.root}/experiments/{ids['experiment']}/runs/{{}}/artifacts/{{}}"
    pages.open(
        "report", artifacts.format(ids["parent"], "report/sweep-report.html"), "heatmap.png", "sweep-report.html"
    )
    pages.wait_for(lambda: pages.driver.find_elements("tag name", "iframe"))
    pages.driver.switch_to.frame(pages.driver.find_element("tag name", "iframe"))
    pages.wait_for(lambda: "Points, best first" in pages.text())
    assert len(pages.driver.find_elements("tag name", "img")) == 6
    pages.driver.switch_to.default_content()
    pages.open(
        "samples", artifacts.format(ids["best"], "pictures/samples.png"), "pictures", "evaluations", "samples.png"
    )
    pages.wait_for(lambda: widest_picture(pages) > 200)
    pages.driver.save_screenshot(str(pages.pictures / "samples.png"))


def test_a_training_shows_its_dataset_schedule_and_scored_images(
    pages: Pages, ids: dict[str, str], swept_shell: Shell, winner: dict[str, Any]
) -> None:
    run = f"{pages.root}/experiments/{ids['experiment']}/runs/{ids['trained']}"
    pages.open("training", run, "Description", "Datasets", "digits (")
    pages.open("schedule", f"{run}/artifacts/pictures/schedule.png", "schedule.png")
    pages.wait_for(lambda: widest_picture(pages) > 400)
    (scores,) = (swept_shell.home / "runs" / winner["run"] / "evaluations").glob("fid_*/scores.json")
    folder = f"{run}/artifacts/evaluations/{scores.parent.name}"
    value = json.loads(scores.read_text())["values"]["fid_classifier_n128"]
    pages.open("scores", f"{folder}/scores.json", "scores.json", str(value)[:8])
    pages.open("scored images", f"{folder}/grid.png", "grid.png", "moments.safetensors")
    pages.wait_for(lambda: widest_picture(pages) > 200)


def test_image_grids_have_a_step_slider(pages: Pages, ids: dict[str, str], winner: dict[str, Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    # asked for by name: without words of its own, the page may take those of an earlier search
    words = quote(f"tags.`ddpm_pipe.run_id` = '{winner['run']}'")
    runs = f"{pages.root}/experiments/{ids['experiment']}/runs?workflowType=machine_learning&searchFilter={words}"
    pages.open("charts of runs", f"{runs}&compareRunsMode=CHART", "Run Name", "1 matching run")

    def shows_step(step: int) -> bool:
        sources = pages.driver.execute_script("return [...document.images].map(i => i.naturalWidth > 200 ? i.src : '')")
        return any(f"samples%2Bstep%2B{step}%2B" in source for source in sources)

    def slider_found() -> bool:
        scroll_on(pages)
        return bool(pages.driver.find_elements("css selector", "[role=slider]")) and shows_step(0)

    pages.wait_for(slider_found, 2 * WAIT_S)  # below all the charts
    (slider,) = pages.driver.find_elements("css selector", "[role=slider]")
    assert [slider.get_attribute(f"aria-value{end}") for end in ("min", "max")] == ["0", "60"]
    slider.send_keys(Keys.ARROW_RIGHT)
    pages.wait_for(lambda: shows_step(20))
    pages.driver.save_screenshot(str(pages.pictures / "grids.png"))


def test_the_best_model_has_a_page_with_its_alias(pages: Pages, swept: dict[str, Any]) -> None:
    said = pages.open("model", f"{pages.root}/models/ddpm-digits", "ddpm-digits", "Version 1", "best-fid")
    assert swept["best"]["title"] in said
    assert swept["sweep"] in said


def test_the_best_model_answers_requests_with_pngs(swept_shell: Shell, swept: dict[str, Any]) -> None:
    import urllib.error
    import urllib.request

    (run,) = swept["best"]["runs"].values()
    server = swept_shell.start("serve", run, "--port", "0")
    try:
        address = server.wait_for(lambda: re.search(r"http://127.0.0.1:\d+/", server.stdout))[0]

        def get(path: str) -> bytes:
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                body: bytes = answer.read()
            return body

        found = json.loads(get("images?n=3&seed=5"))
        assert (found["run"], found["seed"], len(found["images"])) == (run, 5, 3)
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in found["images"]]
        assert {picture.shape for picture in pictures} == {(8, 8)}
        alone = np.asarray(Image.open(io.BytesIO(get("images/2.png?seed=5"))))
        np.testing.assert_array_equal(alone, pictures[2])
        assert Image.open(io.BytesIO(get("grid.png?n=9"))).size[0] > 150
        for wrong, told in {"images?n=0": "expected 1", "images?m=1": "unknown", "images?steps=9999": "T ="}.items():
            with pytest.raises(urllib.error.HTTPError) as refusal:
                get(wrong)
            assert refusal.value.code == 400
            assert told in json.loads(refusal.value.read())["error"]
            refusal.value.close()
        for header in ({"Host": "evil.example:80"}, {"Sec-Fetch-Site": "cross-site"}):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(urllib.request.Request(address + "images", headers=header), timeout=60)
            assert refusal.value.code == 403
            refusal.value.close()
        with socket.create_connection(("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))) as leaving:
            leaving.sendall(b"GET /grid.png?n=300&seed=9 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a reset
        assert get("health") == b"ok"
        get("grid.png?n=300&seed=9")  # waits for the model, which the one that left has had before
    finally:
        server.send(signal.SIGINT)
        code, _, stderr = server.end(60)
    assert code == 0
    assert "Traceback" not in stderr


def test_the_logged_model_is_served_by_mlflow_and_answers_with_the_same_pngs(
    swept_shell: Shell, swept: dict[str, Any]
) -> None:
    import urllib.error
    import urllib.request

    client = MlflowClient(f"sqlite:///{swept_shell.home}/mlflow.db")
    (model,) = client.search_registered_models()
    (alias,) = model.aliases
    port = free_port()
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{swept_shell.home}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = (
        "-m",
        "mlflow",
        "models",
        "serve",
        "--env-manager",
        "local",
        "-p",
        str(port),
        "-m",
        f"models:/{model.name}@{alias}",
    )
    with swept_shell.launch(sys.executable, *command, env=environment) as server:
        server.wait_for(lambda: answers(f"http://127.0.0.1:{port}/ping"))

        def ask(**params: int) -> bytes:
            body = json.dumps({"inputs": {"n": [3]}, "params": params}).encode()
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                found: bytes = answer.read()
            return found

        pngs = [base64.b64decode(row["png"]) for row in json.loads(ask(seed=5))["predictions"]]
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(steps=9999)
        assert refusal.value.code == 400
        assert "steps: got 9999; expected 1 to" in json.loads(refusal.value.read())["message"]
        refusal.value.close()
    (run,) = swept["best"]["runs"].values()
    code, _, stderr = swept_shell.type("sample", run, "-n", "3", "--seed", "5", "--format", "png", "--out", "three")
    assert code == 0, stderr
    files = sorted((swept_shell.home / "three").rglob("*.png"))
    for png, file in zip(pngs, files, strict=True):
        served, sampled = (np.asarray(Image.open(source), np.int16) for source in (io.BytesIO(png), file))
        assert np.abs(served - sampled).max() <= 1  # another number of threads rounds otherwise
