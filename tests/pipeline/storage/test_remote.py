"""A folder in a real object store: what is written is read back, faults that pass are survived, others told in one line."""

from __future__ import annotations

import hashlib

import pytest

from pipeline.errors import StorageError, UsageError
from pipeline.storage.remote import REQUESTS, TRIES, RemoteFolder


def test_what_is_written_is_read_back_listed_and_removed(bucket, tmp_path):
    folder = RemoteFolder(f"{bucket}/a/b")
    assert folder.objects() == []
    assert folder.read("x") is None
    assert folder.stat("x") is None
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
    with pytest.raises(StorageError, match=r"s3://.*/x: the store says SERVICE_UNAVAILABLE \(made to fail\)") as told:
        RemoteFolder(bucket).write("x", b"never")
    assert "\n" not in str(told.value)
    assert object_store.count("PUT", "/x") == REQUESTS * TRIES


def test_a_bucket_that_is_not_there_is_reported(object_store):
    with pytest.raises(StorageError, match=r"NO_SUCH_BUCKET.*make the bucket"):
        RemoteFolder("s3://nobody-made-this/runs").write("x", b"")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/x", "s3://bucket/folder"),
        ("s3:///x", "s3://bucket/folder"),
        ("s3://key:very-secret@bucket/x", "credentials do not belong"),
        ("s3://bucket/x?access_key=very-secret", "option 'access_key' is unknown"),
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
    with pytest.raises(StorageError, match=r"/large: the store says SERVICE_UNAVAILABLE"):
        folder.upload("large", large)
    assert folder.stat("large") is None
    parts.clear()
    object_store.refuse = lambda method, path: refuse_from_the_third_on(method, path) and len(parts) < 6
    assert folder.upload("large", large) == hashlib.sha256(large.read_bytes()).hexdigest()
    assert folder.read("large") == large.read_bytes()
