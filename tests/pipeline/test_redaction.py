"""Secrets are refused where they would be recorded, and hidden in text that leaves; hashes, paths and names stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.redaction import DECLARED_SECRETS, HIDDEN, one_line, public_uri, redact, redact_value, refuse_secrets

KEYS = [
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAY34FZKBOKMUTVV7A",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_11ABCDEFG0abcdefghijkl_" + "mnopqrstuvwxyz" * 4 + "012",
    "glpat-abcdefghijklmnopqrst",
    "sk-proj-" + "abcdefghijklmnopqrstuvwx" * 2,
    "sk-" + "aB3dEfGh" * 6,
    "xoxb-123456789012-abcdefghijkl",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "dapi0123456789abcdef0123456789abcdef",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
]
HARMLESS = [
    "0123456789abcdef" * 4,
    "3b12f1df-5232-4e0c-8f2d-2f8f1e6f0f6a",
    "/home/Some_User/Experiments-2024/MyRun01/checkpoints/step-0000001000-1",
    "s3://My-Bucket-2024/Team7/Datasets/CIFAR10v2Train",
    "my_models.big_net:UNet2DConditionModelV2Large",
    "0.1.0+504fc822fd5fa0d0d09eb4ba7dd7212d1c355e99-dirty",
    "ddpm-pipe train --preset ddpm-cifar10 -s training.steps=100 --data /data/ImageNet2012_Train/n01440764",
    "fid_classifier-a1b2c3d4_5000",
    "mlflow-artifacts:/1/c02237c483154a05b98dacb5b5dc184b/artifacts",
    '{"schedule": "cosine", "num_timesteps": 1000, "key": "value"}',
    "/work/task-ddpm-experiments-2024/runs",
    "/data/hf_abcdefghijklmnopqrstuvwxyzABCDEFGH/train.parquet",
    "/data/AKIAIOSFODNN7EXAMPLE",
    "kQ3vX9bT2mLr7/Wn5cYp8+ZsA1dGh4JfE6uR0iKo",
    "sk-ddpm-experiments-2024",
    "tokens=16",
    "num_tokens: 64",
    "token_mixer: point",
    "https://git@host/x",
]


@pytest.mark.parametrize("secret", KEYS)
def test_keys_of_known_form_are_hidden_and_refused(secret: str) -> None:
    for text in (secret, f"before {secret} after", f"--flag={secret}", f"('{secret}', 1)", f"{secret}."):
        assert secret not in redact(text)
        assert HIDDEN in redact(text)
    assert redact(f"before {secret} after").startswith("before ")
    for content in (secret, {"model": {"arguments": [secret]}}, ["-s", f"name={secret}"]):
        with pytest.raises(UsageError, match="the form of a secret key") as caught:
            refuse_secrets(content, "my.yaml")
        assert secret not in str(caught.value)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_a_record_is_for_stays_and_is_taken(text: str) -> None:
    if "git@" not in text:
        assert redact(text) == text
    refuse_secrets({"a": [text]}, "my.yaml")


@pytest.mark.parametrize(
    "address",
    ["https://user:pa55@host/x", "s3://key:word@bucket/x", "https://b.s3.amazonaws.com/k?X-Amz-Signature=ab12&a=b"],
)
def test_credentials_inside_an_address_are_refused_by_the_name_of_the_setting(address: str) -> None:
    with pytest.raises(UsageError, match=r"^my\.yaml: data\.source: the address contains credentials") as caught:
        refuse_secrets({"data": {"source": address}}, "my.yaml")
    assert address not in str(caught.value)


def test_a_setting_that_equals_a_secret_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse-9")
    monkeypatch.setenv("MY_REGION", "us-east-1-of-mine")
    monkeypatch.setenv(DECLARED_SECRETS, "MY_REGION")
    monkeypatch.setenv("SHORT_TOKEN", "ddpm-user1")
    for value in ("correct-horse-9", "us-east-1-of-mine", "name=correct-horse-9"):
        with pytest.raises(
            UsageError, match=r"the value is that of the variable (DB_PASSWORD|MY_REGION), which is secret"
        ):
            refuse_secrets(["-s", value], "the command line")
    refuse_secrets(["/data/correct-horse-9/x", "ddpm-user1", "correct-horse"], "the command line")


def test_secrets_are_refused_before_anything_is_done(typed, home: Path) -> None:
    (home / "mine.yaml").write_text(f"base: digits\nname: {KEYS[2]}\n")
    for words in (["train", "mine.yaml"], ["train", "-s", f"name={KEYS[2]}"], ["ingest", "s3://key:word@b/x", "out"]):
        code, _, stderr = typed(*words)
        assert code == 2
        assert "runs are recorded with their settings" in stderr
        assert not any(name in stderr for name in (KEYS[2], "word@"))
    assert [path.name for path in home.iterdir()] == ["mine.yaml"]


def test_passwords_in_addresses_are_cut_out() -> None:
    assert redact("got https://user:pa55@host:5000/x and s3://k:s@b/c") == "got https://host:5000/x and s3://b/c"
    assert public_uri("postgresql://u:p%40ss@db/mlflow") == "postgresql://db/mlflow"
    assert "deadbeef" not in redact("https://b.s3.amazonaws.com/k?X-Amz-Signature=deadbeef00&X-Amz-Expires=60")


def test_a_name_that_announces_a_secret_hides_the_value() -> None:
    for name in ("password", "data.api_key", "storage.secret_access_key", "HF_TOKEN", "db.credentials"):
        assert redact_value(name, "short") == HIDDEN
    for name in ("training.steps", "key", "monkey", "data.image_column", "token_mixer", "tokenizer"):
        assert redact_value(name, "short") == "short"
    assert redact_value("max_token", "64") == "64"
    for text in ("password=short", '"api_key": "short"', "token: short", "--secret=short"):
        assert "short" not in redact(text)


def test_values_of_secret_environment_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "tr0ub4dor&3")
    monkeypatch.setenv("AUTH_TOKEN_PATH", "/home/me/token-file")
    monkeypatch.setenv("TOKENIZERS_MODE", "disabled")
    assert redact("connect with tr0ub4dor&3 now") == f"connect with {HIDDEN} now"
    assert redact("read /home/me/token-file, disabled") == "read /home/me/token-file, disabled"


@given(st.text(max_size=200))
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    assert redact(redact(text)) == redact(text)


def test_an_error_becomes_one_line_without_its_secrets() -> None:
    assert one_line(ValueError("cannot reach http://u:p@h/\ntraceback")) == "cannot reach http://h/"
    assert one_line(TimeoutError()) == "TimeoutError"


def test_of_a_failed_request_the_cause_is_said() -> None:
    with pytest.raises(requests.ConnectionError) as caught:
        requests.get("http://127.0.0.1:9/api", timeout=5)
    assert one_line(caught.value) == "NewConnectionError: [Errno 111] Connection refused"
