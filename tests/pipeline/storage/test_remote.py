"""A folder in a real object store: what is written is read back, faults that pass are survived, others told in one line."""

from __future__ import annotations

import hashlib

import pytest

from pipeline.errors import StorageError, UsageError
from pipeline.storage.remote import RETRIES, RemoteFolder


def test_what_is_written_is_read_back_listed_and_removed(bucket, tmp_path):
    folder = RemoteFolder(f"{bucket}/a/b")
    assert folder.objects() == []
    assert folder.read("x") is None
    folder.write("x", b"one")
    folder.write("deep/er/y", b"")
    assert folder.read("x") == b"one"
    assert [(entry.name, entry.num_bytes) for entry in folder.objects()] == [("deep/er/y", 0), ("x", 3)]
    assert folder.folders() == ["deep"]
    assert [entry.name for entry in folder.child("deep").objects()] == ["er/y"]
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 2**17)  # 32 MiB: in several parts
    sha256 = hashlib.sha256(large.read_bytes()).hexdigest()
    assert folder.upload("large", large) == sha256
    assert folder.download("large", tmp_path / "back") == sha256
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    folder.delete("x")
    folder.delete("x")
    folder.delete_all("deep")
    assert [entry.name for entry in folder.objects()] == ["large"]
    assert RemoteFolder(folder.uri).read("large") == large.read_bytes()


def test_a_small_object_is_one_request(bucket, object_store):
    RemoteFolder(bucket).write("manifest", b"{}")
    assert object_store.count("PUT", "manifest") == object_store.count("POST", "") + 1 == 1


def test_faults_that_pass_are_tried_again(bucket, object_store):
    folder, left = RemoteFolder(bucket), [3, 1]

    def refuse(method, path):
        kind = {"PUT": 0, "GET": 1}.get(method)
        if kind is None or not left[kind]:
            return False
        left[kind] -= 1
        return True

    object_store.refuse = refuse
    folder.write("x", b"after all")
    assert folder.read("x") == b"after all"
    assert left == [0, 0]


def test_a_store_that_stays_away_is_reported_in_one_line(bucket, object_store):
    object_store.refuse = lambda method, path: method == "PUT"
    with pytest.raises(StorageError, match=r"s3://.*/x: the store says ServiceUnavailable \(made to fail\)") as told:
        RemoteFolder(bucket).write("x", b"never")
    assert "\n" not in str(told.value)
    assert object_store.count("PUT", "/x") == 1 + RETRIES["max_retries"]


def test_a_bucket_that_is_not_there_is_reported(object_store):
    with pytest.raises(StorageError, match=r"NoSuchBucket.*create the bucket"):
        RemoteFolder("s3://nobody-made-this/runs").write("x", b"")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("400 Bad Request", "ExpiredToken", "the credentials have expired: set new ones"),
        ("403 Forbidden", "AccessDenied", "check the credentials and what they allow"),
        ("403 Forbidden", "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_credentials_that_are_refused_are_named_at_once(bucket, object_store, status, code, said):
    object_store.refuse, object_store.refusal = lambda method, path: True, (status, code)
    with pytest.raises(StorageError, match=rf"the store says {code} \(made to fail\); {said}"):
        RemoteFolder(bucket).write("x", b"")
    assert object_store.count("PUT", "/x") == 1


def test_a_bucket_that_is_not_there_is_not_an_empty_one(object_store):
    folder = RemoteFolder("s3://nobody-made-this/runs")
    for look in (folder.objects, folder.folders, lambda: folder.read("x")):
        with pytest.raises(StorageError, match="NoSuchBucket"):
            look()


def test_a_store_that_cannot_be_reached_is_named(monkeypatch, object_store):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached; check the network and AWS_ENDPOINT_URL"):
        RemoteFolder("s3://elsewhere/x").read("y")


def test_keys_come_from_the_profile_of_the_users_files(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StorageError, match=r"no credentials .*~/\.aws/credentials"):
        RemoteFolder(f"{bucket}/a").write("x", b"")
    monkeypatch.setenv("AWS_PROFILE", "work")
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = test\naws_secret_access_key = test\n")
    RemoteFolder(f"{bucket}/a").write("x", b"there")
    assert RemoteFolder(f"{bucket}/a").read("x") == b"there"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/x", "s3://bucket/folder"),
        ("s3:///x", "s3://bucket/folder"),
        ("s3://key:very-secret@bucket/x", "must not contain credentials"),
        ("s3://bucket/x?access_key=very-secret", "unknown option in an address: got 'access_key'"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_secrets(uri, said):
    with pytest.raises(UsageError, match=said) as told:
        RemoteFolder(uri)
    assert "very-secret" not in str(told.value)


def test_the_address_may_name_the_store(object_store, bucket, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    query = f"endpoint_override={object_store.url.removeprefix('http://')}&scheme=http"
    folder = RemoteFolder(f"{bucket}/a?{query}")
    folder.child("b").write("x", b"there")
    assert RemoteFolder(folder.uri).read("b/x") == b"there"
    assert "endpoint" not in str(folder)


@pytest.mark.fault(24)
def test_an_upload_whose_third_part_fails_leaves_no_object_and_one_that_fails_for_a_while_arrives(
    bucket, object_store, tmp_path
):
    folder, large = RemoteFolder(bucket), tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 2**17)
    parts = []

    def refuse_from_the_third_on(method, path):
        parts.extend([path] if method == "PUT" and path.endswith("/large") else [])
        return method == "PUT" and len(parts) >= 3

    object_store.refuse = refuse_from_the_third_on
    with pytest.raises(StorageError, match=r"/large: the store says ServiceUnavailable"):
        folder.upload("large", large)
    assert folder.read("large") is None
    parts.clear()
    object_store.refuse = lambda method, path: refuse_from_the_third_on(method, path) and len(parts) < 6
    assert folder.upload("large", large) == hashlib.sha256(large.read_bytes()).hexdigest()
    assert folder.read("large") == large.read_bytes()


def test_a_conditional_write_succeeds_for_one_writer_alone(bucket):
    folder = RemoteFolder(bucket)
    assert folder.create("x", b"first")
    assert not folder.create("x", b"second")
    version = folder.version("x")
    assert version.content == b"first"
    assert folder.replace("x", b"third", version)
    assert not folder.replace("x", b"fourth", version)
    assert folder.read("x") == b"third"
