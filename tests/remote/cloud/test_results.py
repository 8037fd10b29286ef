"""Where a machine leaves its results: what is refused beforehand, what is copied, and that every byte is compared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from rclone_fake import GIVEN, SECRET, FakeRclone

from remote.agent import results
from surgvqa.errors import SurgvqaError, UsageError

FILES = {"r/adapter.bin": b"weights", "r/sub/ä b": b"x", "r/new\nline": b"y", "r/bad\udcff": b"z", "r/empty": b""}


@pytest.fixture
def workspace(tmp_path):
    """Results, what must not travel, and `runs` on another disk by a link."""
    place = tmp_path / "ws"
    place.mkdir()
    (tmp_path / "disk").mkdir()
    (place / "runs").symlink_to(tmp_path / "disk")
    for name, content in FILES.items():
        (place / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "runs" / name).write_bytes(content)
    (place / "runs/r/start.json").write_text("secret")
    (place / "runs/r/link").symlink_to("/etc/passwd")
    (place / "out/deep").mkdir(parents=True)
    (place / "out/deep/checkpoint.bin").write_bytes(b"elsewhere")
    return place


@pytest.fixture
def rclone(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    fake = FakeRclone(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    for name in (*results.S3_VARIABLES, "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def contents(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


WHOLE = {f"runs/{name}": content for name, content in FILES.items()} | {"out/deep/checkpoint.bin": b"elsewhere"}


@pytest.mark.parametrize(
    ("target", "kind"),
    [("s3://bucket", "s3"), ("s3://bucket/a/b/", "s3"), ("me@host:x", "rsync"), ("[::1]:x", "rsync"),
     ("/nfs/a:b", "folder")],
)  # fmt: skip
def test_the_form_says_the_kind(target, kind):
    assert results.kind_of(target) == kind


@pytest.mark.parametrize(
    "target",
    ["s3://", "s3://B", "s3://bucket/../x", "s3://bucket//x", "s3://bucket/a\nb", "https://x/y", "-oProxyCommand=x:y",
     "x/y", "", "rsync://host/module", "s3://bucket/./x", "s3://bu cket/x"],
)  # fmt: skip
def test_what_cannot_be_a_target_is_one_line_that_says_what_can(target):
    with pytest.raises(UsageError, match=r"^--results .*; expected s3://BUCKET/PREFIX, USER@HOST:FOLDER") as raised:
        results.kind_of(target)
    assert len(str(raised.value).splitlines()) == 1


def test_a_folder_gets_every_file_and_a_damaged_one_again(workspace, tmp_path):
    target = tmp_path / "there"
    for _ in range(2):
        results.copy(str(workspace), ["runs", "out/deep"], str(target), {})
        assert contents(target) == WHOLE
        (target / "runs/r/adapter.bin").write_bytes(b"WEIGHTS")  # of the same size
    (target / "runs/r/adapter.bin").unlink()
    (target / "runs/r/adapter.bin").mkdir()
    with pytest.raises(SurgvqaError, match=r"adapter\.bin: Is a directory"):
        results.copy(str(workspace), ["runs"], str(target), {})


def test_a_folder_that_goes_with_the_machine_is_refused(workspace, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="lies on this machine's own disk"):
        results.check(str(workspace), str(tmp_path), {})
    with pytest.raises(UsageError, match="lies on this machine's own disk"):
        (tmp_path / "a:b").mkdir()  # with a colon, and no target of rsync
        results.check(str(workspace), str(tmp_path / "a:b"), {})
    with pytest.raises(UsageError, match="no such folder"):
        results.check(str(workspace), "/no/such/folder", {})
    with pytest.raises(UsageError, match="lies in this machine's memory"):
        results.check(str(workspace), "/dev/shm", {})
    monkeypatch.setattr(results, "IN_MEMORY", ())
    results.check(str(workspace), "/dev/shm", {})
    Path("/dev/shm/runs", results.MARK).unlink()


def test_rsync_gets_every_file_and_a_link_to_another_disk_is_followed(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "ssh").write_text('#!/bin/sh\nwhile [ "$1" != there ]; do shift; done; shift; exec sh -c "$*"\n')
    (tmp_path / "ssh").chmod(0o755)
    results.copy(str(workspace), ["runs", "out/deep"], f"there:{tmp_path}/far", {})
    assert contents(tmp_path / "far") == WHOLE
    (tmp_path / "ssh").write_text("#!/bin/sh\necho there: no route >&2; exit 255\n")
    with pytest.raises(SurgvqaError, match=r"^there:.*/far: rsync: "):
        results.copy(str(workspace), ["runs"], f"there:{tmp_path}/far", {})


def test_s3_gets_every_file_read_back_and_no_secret_is_in_arguments_or_messages(workspace, rclone):
    results.check(str(workspace), "s3://bucket/a/b/", GIVEN)
    assert contents(rclone.bucket) == {}  # the probe was removed
    rclone.fails("damages")
    results.copy(str(workspace), ["runs", "out/deep"], "s3://bucket/a/b/", GIVEN)
    assert contents(rclone.bucket) == {f"a/b/{name}": content for name, content in WHOLE.items()}
    assert SECRET not in rclone.asked() and '"RCLONE_S3_PROVIDER": "AWS"' in rclone.asked()
    results.copy(str(workspace), ["runs"], "s3://bucket", GIVEN | {"AWS_ENDPOINT_URL": "https://s3.example"})
    assert '"RCLONE_S3_PROVIDER": "Other"' in rclone.asked()
    assert '"RCLONE_S3_ENDPOINT": "https://s3.example"' in rclone.asked()


@pytest.mark.parametrize(
    ("faults", "given", "target", "match"),
    [
        (["denied"], GIVEN, "s3://bucket/a", "ERROR : runs/x: Failed to copy: AccessDenied: Access Denied$"),
        ([], GIVEN, "s3://nobucket/a", "NoSuchBucket: The specified bucket does not exist$"),
        ([], GIVEN | {"AWS_SECRET_ACCESS_KEY": "wrong_and_secret"}, "s3://bucket/a", "SignatureDoesNotMatch: not …$"),
        (["damages", "damages"], GIVEN, "s3://bucket/a", f"{results.MARK}: differs there$"),
    ],
)
def test_what_s3_refuses_is_one_line_before_anything_starts(workspace, rclone, faults, given, target, match):
    rclone.fails(*faults)
    with pytest.raises(SurgvqaError, match=f"^{target}: rclone: .*{match}"):
        results.check(str(workspace), target, given)


def test_a_missing_tool_is_named_with_how_to_get_it(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SurgvqaError, match="needs rclone on this machine: sudo apt-get install rclone"):
        results.check(str(workspace), "s3://bucket/a", GIVEN)
    with pytest.raises(SurgvqaError, match="needs rsync on this machine"):
        results.check(str(workspace), "me@host:x", {})


@pytest.mark.skipif(not shutil.which("rclone"), reason="rclone is not installed")
def test_the_real_rclone_copies_compares_and_mends(workspace, monkeypatch):
    from s3_fake import FakeS3

    for name in ("AWS_CA_BUNDLE", "AWS_SESSION_TOKEN", *(n for n in os.environ if n.startswith("RCLONE_"))):
        monkeypatch.delenv(name, raising=False)
    server = FakeS3()
    given = GIVEN | {"AWS_ENDPOINT_URL": server.url}
    try:
        results.check(str(workspace), "s3://bucket/a b", given)
        assert server.objects == {}
        results.copy(str(workspace), ["runs", "out/deep"], "s3://bucket/a b", given)
        sent = {name.replace("␊", "\n").replace("‛FF", "\udcff"): content for name, content in server.objects.items()}
        assert sent == {f"bucket/a b/{name}": content for name, content in WHOLE.items()}
        server.objects["bucket/a b/runs/r/adapter.bin"] = b"WEIGHTS"
        results.copy(str(workspace), ["runs"], "s3://bucket/a b", given)
        assert server.objects["bucket/a b/runs/r/adapter.bin"] == b"weights"
        server.damages = True
        with pytest.raises(SurgvqaError, match=r"rclone: r/.*: differs there$"):  # its ETags claim that all is well
            results.copy(str(workspace), ["runs"], "s3://bucket/b", given)
        with pytest.raises(SurgvqaError, match="NoSuchBucket"):
            results.check(str(workspace), "s3://nobucket/b", given)
        assert not any(SECRET in line for line in server.asked)
    finally:
        server.close()
