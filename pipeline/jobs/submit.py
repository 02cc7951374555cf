"""Send commands to a cluster as Ray jobs: upload parameters, folder and code, follow the log, return the exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pipeline.cluster.token import admission, probe_dashboard, travels_readable
from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.console import Console, duration, size
from pipeline.errors import ClusterError, InterruptedRunError, PipelineError, UsageError
from pipeline.import_path import replacing
from pipeline.jobs import job_secrets, packing
from pipeline.jobs.job_log import LogLines
from pipeline.jobs.sent_jobs import AFTER_STOP_S, PREFIX, SentJobs
from pipeline.redaction import HIDDEN, USERINFO, redact
from pipeline.storage.folder import new_id
from pipeline.storage.next_command import typeable
from pipeline.storage.provenance import CODE_VERSION_VARIABLE, JOB_VARIABLE, LOCK_HASH_VARIABLE, code_version, lock_hash

ENTRY = ("python", "-P", "-m", "pipeline.cli_in_job")  # -P: do not import from the current folder
RECONNECT_S = 300.0
OWN_SIGNALS = {130, 143}  # exit codes above 128 of our own commands
# Ray reads these when it is first imported, in the job possibly before this package is
DRIVER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "PYTHONUNBUFFERED": "1"}


T = TypeVar("T")


class Jobs(SentJobs):
    """The jobs of a profile's Ray cluster."""

    def __init__(self, profile: Profile, console: Console) -> None:
        """Connect. UsageError or ClusterError as in `admission`."""
        address = str(profile.address).rstrip("/")
        token = admission(profile, address, probe_dashboard)
        if token and travels_readable(address):
            console.say(
                f"warning: {address} is plain http to another machine: the token can be intercepted; use https or a tunnel"
            )
        super().__init__(profile, console, address)
        self._client = _client(address, token)

    # -- sending

    def submit(
        self,
        command: str,
        parameters_of: Callable[[Mapping[Path, str]], Mapping[str, Any]],
        typed: Sequence[str],
        files: Sequence[Path] = (),
        module: str | None = None,
    ) -> str:
        """Send a command and return the job's id.

        `files` are those that the command names; `parameters_of` returns its parameters, given the names that the files have in the job.
        `typed` are the words of the command line, `module` is that of the user's own network. UsageError where too much or a secret
        would be sent.
        """
        profile, settings = self._profile, self._profile.runtime_env
        values = forwarded(profile)
        here = Path.cwd()
        work, names = packing.working_folder(here, settings.excludes, files, whole=settings.working_dir)
        if found := replacing(work.files):
            raise UsageError(
                f"{found[0]} in this folder would replace an installed module in the job; rename it, or leave it out with "
                f"runtime_env: {{excludes: [{found[0]}]}}"
            )
        modules = list(settings.py_modules)
        if module and (own := packing.own_module(module, here, work)):
            modules.append(own)
        code = packing.code(modules, settings.excludes)
        for package in (work, code):
            package.require_size(settings.max_mb)
        sent = work.with_code(code, list(names.values()))
        if sent.left_out:
            self._console.say(f"left out, because they look like secrets: {', '.join(sent.left_out[:5])}")
        parameters = parameters_of(names)
        if any(HIDDEN in redact(word) for word in typed):
            raise UsageError(
                "an argument looks like a secret, and a job's command line is shown to everybody who may list jobs; "
                "put it into the environment, and its name into the profile's forward_env"
            )

        job = f"{PREFIX}{new_id()}"
        env = DRIVER | profile.env | self._environment(job, values)
        if values:
            env[job_secrets.PAD_VARIABLE], half = job_secrets.halves(values)
            self._put(job_secrets.store_key(job), half)
        archive = sent.archive()
        line = redact(shlex.join(["ddpm-pipe", *typed]))
        call = json.dumps({"command": command, "parameters": parameters, "typed": list(typed)}, default=str)
        self._console.say(f"sending {line} to {profile.address} ({size(len(archive))} of code and files)")
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "job.zip"  # uploaded by Ray, unless the cluster has one of the same content
                file.write_bytes(archive)
                self._ask(
                    "accept the job",
                    self._client.submit_job,
                    entrypoint=shlex.join([*ENTRY, call]),
                    submission_id=job,
                    runtime_env={"working_dir": str(file), "env_vars": env},
                    metadata={"ddpm_pipe": line, "profile": profile.name},
                )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"stopped while {job} was being sent; see: {typeable('jobs list')}", 130
            ) from None
        return job

    def _environment(self, job: str, values: dict[str, str]) -> dict[str, str]:
        """Return the job's environment; an address with a password is added to the secret `values` instead.

        So is the run that `mlflow run` opened: it belongs to the driver alone, while the job's environment reaches every worker, where each
        trial of a sweep would use it. UsageError if the job could not write to its store.
        """
        env = {
            JOB_VARIABLE: job,
            CODE_VERSION_VARIABLE: code_version(),
            LOCK_HASH_VARIABLE: lock_hash(),
            # Ray kills a job this long after asking it to stop; the default of 3 s is too short to save
            "RAY_JOB_STOP_WAIT_TIME_S": str(round(self._profile.timeouts.stop_s + AFTER_STOP_S)),
        }
        uri, opened = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_RUN_ID")
        if opened:
            if uri and not uri.startswith(("http://", "https://")):
                raise UsageError(
                    f"MLFLOW_RUN_ID names a run in {redact(uri)}, where a job on another machine cannot write; set MLFLOW_TRACKING_URI "
                    "to a server's http(s) address before `mlflow run` (or unset MLFLOW_RUN_ID)"
                )
            values["MLFLOW_RUN_ID"] = opened
        if uri and (opened or self._profile.mlflow.tracking_uri is None):
            (values if USERINFO.search(uri) else env)["MLFLOW_TRACKING_URI"] = uri
        if (name := os.environ.get("MLFLOW_EXPERIMENT_NAME")) and self._profile.mlflow.experiment is None:
            env["MLFLOW_EXPERIMENT_NAME"] = name
        return env

    def _put(self, name: str, content: bytes) -> None:
        """Put bytes into the cluster's store, for which Ray's client has no public call."""
        path = f"/api/packages/gcs/{name}"
        answer = self._ask("take the secret variables", self._client._do_request, "PUT", path, data=content)
        if answer.status_code != 200:
            raise ClusterError(
                f"profile {self._profile.name!r}: the cluster did not take the secret variables: {_reason(answer.text)}"
            )

    def _ask(self, what: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return the result of a call of Ray's client; any exception of the client becomes a ClusterError of one line."""
        from ray.exceptions import RayError

        try:
            return call(*arguments, **options)
        # requests raises OSErrors; an answer that is not Ray's raises ValueErrors
        except (RuntimeError, OSError, ValueError, RayError) as error:
            raise ClusterError(
                f"profile {self._profile.name!r}: the cluster did not {what}: {_reason(error)}; try again, or look: "
                f"{typeable('doctor')}"
            ) from None

    # -- watching

    def follow(self, job: str, out: Callable[[str], None], log: Callable[[str], None]) -> int:
        """Print a job's log from its beginning until it ends, results to `out` and the rest to `log`; return its exit code.

        A lost connection is reported and restored. Raises ClusterError if the cluster no longer knows the job, a
        signal killed it, or it ended without running its command.
        """
        lines = LogLines(out, log)
        lost: float | None = None

        def back() -> None:
            nonlocal lost
            if lost is not None:
                self._console.say(f"following {job} again")
            lost = None

        while True:
            try:
                asyncio.run(self._tail(job, lines, back))
                info = self._client.get_job_info(job)
                if info.status.is_terminal():
                    lines.rewind()
                    lines.write(self._client.get_job_logs(job))
                    lines.close()
                    return self._exit_code(job, info, lines.saved)
                back()
            except PipelineError:
                raise
            except Exception as error:  # network errors of three libraries
                now = time.monotonic()
                if self._is_gone(job):
                    raise ClusterError(
                        f"{self._profile.address} knows no job {job} any more: the cluster was started anew, or forgot it; what the job "
                        f"saved is in the profile's storage: {typeable('runs')}"
                    ) from None
                if lost is None:
                    lost = now
                    self._console.say(
                        f"lost the connection to {job} ({_reason(error)}); trying again for {duration(RECONNECT_S)}; the "
                        "job may still be running"
                    )
                if now - lost > RECONNECT_S:
                    raise ClusterError(
                        f"lost the connection to {job} ({_reason(error)}); it may still be running: {self._how_to_follow(job)}"
                    ) from None
            time.sleep(1.0)

    def _is_gone(self, job: str) -> bool:
        """Whether the cluster itself reports that there is no such job; a 404 of a proxy does not count."""
        try:
            self._client.get_job_info(job)
        except RuntimeError as error:
            return "status code 404" in str(error) and f"Job {job} does not exist" in str(error)
        except Exception:  # network errors
            return False
        return False

    async def _tail(self, job: str, lines: LogLines, back: Callable[[], None]) -> None:
        lines.rewind()
        async for text in self._client.tail_job_logs(job):
            back()  # at the first piece, since the last one comes when the job ends
            lines.write(text)

    def _exit_code(self, job: str, info: Any, saved: bool) -> int:
        status = str(info.status)
        if status == "SUCCEEDED":
            return 0
        if status == "STOPPED":
            return 75 if saved else 143
        if info.driver_exit_code is not None:
            return self._of_driver(job, int(info.driver_exit_code))
        raise ClusterError(
            f"job {job} ended without running its command: {_reason(info.message or info.error_type or 'no reason given')}"
        )

    def _of_driver(self, job: str, code: int) -> int:
        """Return the exit code of a driver; ClusterError if a signal killed it."""
        if 0 <= code < 128 or code in OWN_SIGNALS:
            return code
        number = -code if code < 0 else code - 128  # the shell between Ray and the driver adds 128 to the signal
        known = {each.value: each.name for each in signal.Signals}
        cause = ", as a machine without free memory does" if number == signal.SIGKILL else ""
        raise ClusterError(
            f"the driver of job {job} was killed on the cluster by {known.get(number, f'signal {number}')}{cause}; what it saved is kept: "
            f"{typeable('runs')}, then {typeable('resume RUN')}"
        )

    # -- knowing and stopping

    def listed(self) -> list[dict[str, Any]]:
        """Return this package's jobs, newest first: id, status, start, duration, command."""
        jobs = self._ask("list its jobs", self._client.list_jobs)
        found = [info for info in jobs if (info.submission_id or "").startswith(PREFIX)]
        return [_row(info) for info in sorted(found, key=lambda info: info.start_time or 0, reverse=True)]

    def stop(self, job: str) -> str:
        """Ask a job to stop, wait until it has (training saves first), and return a line about it."""
        info = self._info(job)
        if info.status.is_terminal():
            return f"{job} had ended already: {info.status}"
        self._console.say(f"asked {job} to stop; a training saves first")
        self._ask("stop the job", self._client.stop_job, job)
        deadline = time.monotonic() + self._profile.timeouts.stop_s + 2 * AFTER_STOP_S
        while not (info := self._info(job)).status.is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(f"{job} was asked to stop and has not yet; see: {self._how_to_follow(job)}")
            time.sleep(0.5)
        log = self._ask("show the job's log", self._client.get_job_logs, job)
        said = [line for line in log.splitlines() if line.startswith("ddpm-pipe: ")]
        return f"{job}: {said[-1].removeprefix('ddpm-pipe: ') if said else str(info.status).lower()}"

    def _info(self, job: str) -> Any:
        return self._ask("report the job's state", self._client.get_job_info, job)


def _client(address: str, token: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it logs every closed connection
    # these would override the profile's address
    aside = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except Exception as error:  # RuntimeError, ConnectionError, and those of requests
        raise ClusterError(f"the jobs of {address} cannot be reached: {_reason(error)}") from None
    finally:
        os.environ.update(aside)


def _row(info: Any) -> dict[str, Any]:
    start, end = info.start_time, info.end_time
    return {
        "job": info.submission_id,
        "status": str(info.status),
        "exit": info.driver_exit_code,
        "started": datetime.fromtimestamp(start / 1000).isoformat(" ", "seconds") if start else None,
        "took": duration((end or time.time() * 1000) / 1000 - start / 1000) if start else None,
        "profile": (info.metadata or {}).get("profile"),
        "command": (info.metadata or {}).get("ddpm_pipe"),
    }


def _reason(error: object) -> str:
    """Return the last line with text of an answer, which may be a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" '\".")]
    return redact(lines[-1] if lines else type(error).__name__)[:300]
