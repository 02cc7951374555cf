"""Measure in workers that are started as a training's are: by Ray Train, with the profile's resources and placement."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.cluster.attempt_on_ray import start_control, trainer_of
from pipeline.cluster.causes import cause_of
from pipeline.cluster.control_actor import measure_in_worker
from pipeline.cluster.placement import release
from pipeline.config.cluster_profile import Profile
from pipeline.errors import ClusterError
from pipeline.limits import in_thread

LEAVE_S = 60.0  # for Ray Train to notice that its workers are gone: ten seconds, on a busy machine more


def on_workers(
    function: Callable[..., Any], arguments: tuple[Any, ...], profile: Profile, num_workers: int, timeout_s: float
) -> Any:
    """Call `function(team, *arguments)` in all workers at once, and return the result of rank 0.

    Raises a PipelineError of a worker, and ClusterError if the workers fail otherwise or take longer than `timeout_s` with their start.
    """
    import ray

    name = f"probe-{secrets.token_hex(4)}"
    config = {"control": name, "code_folder": os.getcwd(), "function": function, "arguments": arguments,
              "collective_s": profile.timeouts.collective_s}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ddpm-pipe-probe-", ignore_cleanup_errors=True) as folder:
        trainer = trainer_of(
            measure_in_worker,
            config,
            profile,
            num_workers,
            run_id=name,
            name=name,
            storage={"storage_path": folder},
        )
        control = start_control(name, profile)
        fitting = in_thread(trainer.fit, name)
        try:
            result = fitting(timeout_s)
        except Exception as error:  # Ray Train's, which wraps that of a worker
            ours = None
            with suppress(ray.exceptions.RayError):
                ours = ray.get(control.read.remote(), timeout=5)["error"]
            raise ours or ClusterError(cause_of(error)) from None
        finally:
            with suppress(ray.exceptions.RayError):
                release(name)
                ray.kill(control)
            # Ray ends a process that shuts it down while a thread is inside it; an exception of that thread is reported above
            with suppress(Exception):
                fitting(LEAVE_S)
    if result is None:
        raise ClusterError(
            f"the workers did not answer within {timeout_s:g} s; see what else runs on the cluster with: ray status"
        )
    return result.return_value
