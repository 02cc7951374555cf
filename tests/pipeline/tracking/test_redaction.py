"""What looks like a secret is hidden; what a record is for (hashes, paths, names) stays."""

from __future__ import annotations

import base64
import random
import string

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.redaction import DECLARED_SECRETS, HIDDEN, one_line, public_uri, redact, redact_tree, redact_value


@pytest.mark.parametrize(
    "secret",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAY34FZKBOKMUTVV7A",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
        "glpat-abcdefghijklmnopqrst",
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "xoxb-123456789012-abcdefghijkl",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        "dapi0123456789abcdef0123456789abcdef",
        "kQ3vX9bT2mLr7/Wn5cYp8+ZsA1dGh4JfE6uR0iKo",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_known_kinds_of_secrets_are_hidden_anywhere(secret: str) -> None:
    for text in (secret, f"before {secret} after", f"--flag={secret}", f"('{secret}', 1)"):
        assert secret not in redact(text)
        assert HIDDEN in redact(text)
    assert redact(f"before {secret} after").startswith("before ")


def test_passwords_in_addresses_are_cut_out() -> None:
    assert redact("got https://user:pa55@host:5000/x and s3://k:s@b/c") == "got https://host:5000/x and s3://b/c"
    assert public_uri("postgresql://u:p%40ss@db/mlflow") == "postgresql://db/mlflow"
    assert "deadbeef" not in redact("https://b.s3.amazonaws.com/k?X-Amz-Signature=deadbeef00&X-Amz-Expires=60")


def test_a_name_that_announces_a_secret_hides_the_value() -> None:
    for name in ("password", "data.api_key", "storage.secret_access_key", "HF_TOKEN", "db.credentials"):
        assert redact_value(name, "short") == HIDDEN
    for name in ("training.steps", "key", "monkey", "data.image_column"):
        assert redact_value(name, "short") == "short"
    for text in ("password=short", '"api_key": "short"', "token: short", "--secret=short"):
        assert "short" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
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
    ],
)
def test_what_a_record_is_for_stays(text: str) -> None:
    assert redact(text) == text


def test_generated_tokens_of_unknown_kinds_are_mostly_caught() -> None:
    source = random.Random(0)
    tokens = [base64.urlsafe_b64encode(source.randbytes(32)).decode() for _ in range(500)]
    tokens += ["".join(source.choices(string.ascii_letters + string.digits, k=40)) for _ in range(500)]
    assert sum(HIDDEN in redact(token) for token in tokens) > 950


def test_pictures_in_base64_are_left_alone() -> None:
    picture = base64.b64encode(random.Random(0).randbytes(3000)).decode()
    assert redact(f'<img src="data:image/png;base64,{picture}">') == f'<img src="data:image/png;base64,{picture}">'


def test_values_of_secret_environment_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "tr0ub4dor&3")
    monkeypatch.setenv("AUTH_TOKEN_PATH", "/home/me/token-file")
    monkeypatch.setenv("TOKENIZERS_MODE", "disabled")
    assert redact("connect with tr0ub4dor&3 now") == f"connect with {HIDDEN} now"
    assert redact("read /home/me/token-file, disabled") == "read /home/me/token-file, disabled"


SHORT = {"AWS_ACCESS_KEY_ID": "ddpm", "AWS_DEFAULT_REGION": "us-east-1", "NUMBER": "1", "AWS_SESSION_TOKEN": "ddpm"}
SECRET = {"MY_KEY": "x9Kq-40staple", "DB_PASSWORD": "correct-horse", "THE_SECRET": "tr0ub4dor&3"}


def declare(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set variables, and name them in a profile's `forward_env`."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(DECLARED_SECRETS, ",".join(variables))


def test_what_is_read_back_is_recorded_whole_though_forwarded_values_stand_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declare(monkeypatch, SHORT | {"AWS_ACCESS_KEY_ID": "ddpm-user"})
    storage = "s3://ddpm-user/store?region=us-east-1"
    record = {"dataset": {"path": f"{storage}/d", "fingerprint": "a1" * 32}, "profile": {"storage": storage}}
    assert redact_tree(record) == record
    assert redact_tree({"path": "s3://u:pass@b/c"}) == {"path": "s3://b/c"}
    assert (
        redact("image 11, by ddpm-user") == f"image 11, by {HIDDEN}"
    )  # which elsewhere is a secret as it was declared


@pytest.mark.parametrize("name", list(SECRET))
@pytest.mark.parametrize("field", ["storage", "path"])
def test_a_secret_in_what_is_read_back_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, field: str) -> None:
    declare(monkeypatch, SECRET)
    with pytest.raises(UsageError, match=rf"^{field}: holds the value of the variable {name}, which is secret") as told:
        redact_tree({"profile": {field: f"/data/{SECRET[name]}/here"}})
    assert SECRET[name] not in str(told.value)


def test_nested_content_keeps_its_shape_and_its_numbers() -> None:
    content = {"a": [1, 2.5, None, True, {"password": "x", "n": 3}], "url": "http://u:p@h/"}
    assert redact_tree(content) == {"a": [1, 2.5, None, True, {"password": HIDDEN, "n": 3}], "url": "http://h/"}


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
