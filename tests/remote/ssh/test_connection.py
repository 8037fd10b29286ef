"""Hosts, connections, setup, GPUs and fetching, against a real sshd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sshd import (
    TRAIN,
    Relay,
    Sshd,
    cmdline,
    free_port,
    laptop,  # noqa: F401
    processes_naming,
    stub_train,
    venv_there,
)
from waiting import until

from remote import setup as setup_room
from remote.agent.machine import parse_smi, smi_gpus
from remote.jobs import follower, launch
from remote.jobs.fetch import fetch
from remote.ssh import connection, fabric_connection, hosts
from remote.ssh.connection import Remote, connect
from remote.ssh.errors import AuthenticationFailed, ChangedHostKey, Unreachable
from remote.ssh.host_keys import UnknownHostKey
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.folder import Run

pytestmark = pytest.mark.slow


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- host keys -------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_shown_and_remembered_when_told(laptop):  # noqa: F811
    laptop.server.known_hosts.unlink()
    shown = subprocess.run(
        ["ssh-keygen", "-lf", laptop.server.root / "host_key.pub"], capture_output=True, text=True
    ).stdout.split()[1]
    with pytest.raises(UnknownHostKey) as refused:
        laptop.connect()
    assert refused.value.fingerprint == shown and shown in one_line(refused.value)
    assert not laptop.server.known_hosts.exists()
    failed = laptop.command("runs", "gpuhost", check=1).stderr
    assert shown in failed and "--accept-new-host-key" in failed and failed.count("\n") == 1
    laptop.json("runs", "gpuhost", "--accept-new-host-key")
    assert laptop.server.known_hosts.read_text().startswith("|1|")  # hashed, as ssh_config asks
    laptop.connect().close()
    words = ["ssh", "-F", laptop.server.config, "-o", "BatchMode=yes", "gpuhost", "true"]
    assert subprocess.run(words).returncode == 0  # OpenSSH reads it too


def test_a_remembered_key_leaves_the_others_as_they_are(laptop):  # noqa: F811
    """known_hosts that an editor left without a newline at its end."""
    other = f"elsewhere {(laptop.server.root / 'host_key.pub').read_text().strip()}"
    laptop.server.known_hosts.write_text(other)
    connect("gpuhost", laptop.workspace, accept_new_host_key=True).close()
    first, second = laptop.server.known_hosts.read_text().splitlines()
    assert first == other and second.startswith("|1|")


def test_a_changed_key_is_refused_always(laptop):  # noqa: F811
    laptop.server.stop()
    laptop.server.new_host_key()
    laptop.server.start()
    with pytest.raises(ChangedHostKey, match="HAS CHANGED"):
        connect("gpuhost", laptop.workspace, accept_new_host_key=True)
    before = laptop.server.known_hosts.read_text()
    assert "CHANGED" in laptop.command("runs", "gpuhost", "--accept-new-host-key", check=1).stderr
    assert laptop.server.known_hosts.read_text() == before


def test_a_known_key_of_another_kind_than_the_host_shows_first(laptop):  # noqa: F811
    """Two host keys there, only the second kind is known here: that one is asked for."""
    rsa = laptop.server.root / "rsa_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsa], check=True)
    laptop.server.stop()
    laptop.server.extra = f"HostKey {rsa}"
    laptop.server.start()
    laptop.server.known_hosts.write_text(f"gpuhost {rsa.with_suffix('.pub').read_text()}")
    laptop.connect().close()


def test_a_revoked_key_is_refused(laptop):  # noqa: F811
    laptop.server.known_hosts.write_text("@revoked " + laptop.server.known_hosts.read_text())
    with pytest.raises(ChangedHostKey, match="revoked"):
        connect("gpuhost", laptop.workspace, accept_new_host_key=True)


# --- ways to a host, and ways to fail --------------------------------------------------------------------------------


def test_a_proxy_jump_is_as_strict_as_the_host(laptop):  # noqa: F811
    """gpuhost is reached through `door`; both keys are checked, each with its own error."""
    door = Sshd(laptop.root / "door", name="door").start()
    try:
        (door.root / "authorized_keys").write_text((laptop.server.root / "user_key.pub").read_text())
        own = laptop.server.config.read_text()
        door_text = own.replace("gpuhost", "door").replace(f"Port {laptop.server.port}", f"Port {door.port}")
        laptop.server.config.write_text(own.rstrip() + "\n ProxyJump door\n" + door_text)
        with pytest.raises(UnknownHostKey, match="via door"):
            laptop.connect()
        connect("gpuhost", laptop.workspace, accept_new_host_key=True).close()
        with laptop.connect() as remote:
            assert remote.call("probe", venv="venv")["workspace"] == str(laptop.there)
        (laptop.workspace / "merged").mkdir()
        (laptop.workspace / "merged" / "config.json").write_text("{}")
        laptop.json("upload", "gpuhost", "--model_name_or_path", "merged")  # OpenSSH's streams take the same way
        assert (laptop.there / "merged" / "config.json").read_text() == "{}"
        door.stop()
        with pytest.raises(Unreachable, match="via door"):
            laptop.connect()
    finally:
        door.stop()


def test_a_proxy_command_runs_in_a_shell_with_ssh_s_tokens(laptop, monkeypatch):  # noqa: F811
    """Another port than 22, ~, a variable and a redirection: as OpenSSH does it; it ends with the connection."""
    relay = laptop.root / "laptop_home" / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        "there = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def copy():\n"
        "    while data := os.read(0, 65536):\n"
        "        there.sendall(data)\n"
        "threading.Thread(target=copy, daemon=True).start()\n"
        "while data := there.recv(65536):\n"
        "    os.write(1, data)\n"
    )
    monkeypatch.setenv("WHERE", str(laptop.root))
    log = laptop.root / "proxy %.log"
    command = f'{sys.executable} ~/relay.py %h %p %r %n >/dev/fd/1 2>"$WHERE/proxy %%.log"'
    laptop.server.write_config(more=f"ProxyCommand {command}")
    with laptop.connect() as remote:
        remote.call("probe", venv="venv")
        (proxy,) = processes_naming(relay)
        assert cmdline(proxy).split(b"\0")[2:6] == [b"127.0.0.1", b"%d" % laptop.server.port, b"root", b"gpuhost"]
    until(lambda: not processes_naming(relay))
    assert log.exists()
    laptop.server.write_config(more="ProxyCommand exit 3")
    began = time.monotonic()
    with pytest.raises(Unreachable):
        laptop.connect()
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("pattern", ["keys/%r@%h", "keys/of_%n", "${KEYS}/100%%"])
def test_identity_files_have_ssh_s_tokens(laptop, monkeypatch, pattern):  # noqa: F811
    keys = laptop.root / "laptop_home" / "keys"
    keys.mkdir()
    monkeypatch.setenv("KEYS", str(keys))
    user = laptop.connect().host.user
    for name in (f"{user}@127.0.0.1", "of_gpuhost", "100%"):
        (keys / name).write_text((laptop.server.root / "user_key").read_text())
        (keys / name).chmod(0o600)
    text = laptop.server.config.read_text()
    pattern = pattern if pattern.startswith("$") else f"~/{pattern}"
    laptop.server.config.write_text(text.replace(str(laptop.server.root / "user_key"), pattern))
    laptop.connect().close()


def test_a_proxy_jump_to_itself_is_one_line(laptop):  # noqa: F811
    """`Host *` with a ProxyJump catches the jump host too."""
    text = laptop.server.config.read_text()
    laptop.server.config.write_text(f"{text}\nHost door\n HostName 127.0.0.1\nHost *\n ProxyJump door\n")
    with pytest.raises(UsageError, match=r"circle.*ProxyJump none"):
        laptop.connect()


@pytest.mark.parametrize(
    ("hop", "address", "port"),
    [
        ("root@[::1]:2222", "::1", 2222),
        ("[fe80::1]", "fe80::1", 22),
        ("ssh://me@10.0.0.1:23/", "10.0.0.1", 23),
        ("me@10.0.0.1", "10.0.0.1", 22),
    ],
)
def test_a_jump_host_may_be_an_ipv6_address(tmp_path, monkeypatch, hop, address, port):
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("SURGVQA_SSH_CONFIG", str(tmp_path / "config"))
    found = fabric_connection.jump_host(hop, "gpuhost")
    assert (found.hostname, found.port) == (address, port)


def test_every_failure_is_one_line_that_says_what_to_do(laptop, monkeypatch):  # noqa: F811
    def failure(kind, name="gpuhost"):
        with pytest.raises(kind) as caught:
            connect(name, laptop.workspace)
        return one_line(caught.value)

    (laptop.server.root / "authorized_keys").write_text("")
    assert "ssh-copy-id" in failure(AuthenticationFailed)
    laptop.server.write_config(port=free_port())
    assert "connection refused" in failure(Unreachable)
    monkeypatch.setattr("remote.ssh.timeouts.CONNECT_TIMEOUT_S", 1)
    laptop.server.config.write_text(laptop.server.config.read_text().replace("127.0.0.1", "192.0.2.1"))
    began = time.monotonic()
    failure(Unreachable)
    assert time.monotonic() - began < 8
    laptop.server.config.write_text(laptop.server.config.read_text().replace("192.0.2.1", "no.such.host.invalid"))
    assert "unknown host" in failure(UsageError)
    assert "cannot start with a dash" in failure(UsageError, "-oProxyCommand=touch pwned")
    laptop.server.config.write_text("Host gpuhost\n Nonsense yes\n")
    assert "ssh does not accept it" in failure(UsageError)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install OpenSSH" in failure(UsageError)


def test_an_encrypted_key_asks_for_the_agent(laptop):  # noqa: F811
    key = laptop.server.root / "user_key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", key], check=True)
    with pytest.raises(AuthenticationFailed, match="ssh-add"):
        laptop.connect()


@pytest.mark.parametrize("late_s", [0.0, 0.7])  # late: the host's shell has ended before it is sent anything
def test_a_host_without_python_says_so(laptop, monkeypatch, late_s):  # noqa: F811
    payload = connection.payload
    monkeypatch.setattr(connection, "payload", lambda request: time.sleep(late_s) or payload(request))
    laptop.host(python="/no where/python3")
    with laptop.connect() as remote, pytest.raises(SurgvqaError, match=r"no /no where/python3 there.*hosts\.toml"):
        remote.call("probe", venv="venv")


def test_a_talkative_login_shell_and_an_old_looking_workspace_name(laptop):  # noqa: F811
    """Output of .bashrc before ours, and a workspace name that no shell should see."""
    laptop.server.stop()
    laptop.server.extra = 'ForceCommand echo welcome; echo $((1+1)); eval "$SSH_ORIGINAL_COMMAND"'
    laptop.server.start()
    laptop.host(workspace="~/it's a $(touch pwned) `x` dir", python=sys.executable)
    with laptop.connect() as remote:
        facts = remote.call("probe", venv="venv")
    assert facts["workspace"] == str(laptop.server.home / "it's a $(touch pwned) `x` dir")
    assert not list(laptop.root.rglob("pwned"))


def test_the_python_of_a_home_and_one_that_is_too_old(laptop):  # noqa: F811
    """~ is the home there; Python 3.6 cannot even read the agent."""
    tools = laptop.server.home / "my tools"
    tools.mkdir()
    (tools / "python3").symlink_to(sys.executable)
    laptop.host(python="~/my tools/python3")
    with laptop.connect() as remote:
        remote.call("probe", venv="venv")
    old = tools / "old"
    shown = "import sys; sys.version_info = (3, 6, 9); sys.version = '3.6.9 (default)'"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{shown}; exec(sys.argv[-1])" "$@"\n')
    old.chmod(0o755)
    laptop.host(python="~/my tools/old")
    with laptop.connect() as remote, pytest.raises(SurgvqaError, match=r"Python 3\.6\.9 is too old.*hosts\.toml"):
        remote.call("probe", venv="venv")


def test_a_silent_host_is_given_up(laptop, monkeypatch):  # noqa: F811
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    monkeypatch.setattr("remote.ssh.timeouts.CHANNEL_TIMEOUT_S", 2)
    with laptop.connect() as remote:
        relay.freeze()
        began = time.monotonic()
        with pytest.raises(Unreachable):
            for _ in remote.stream("probe", silence_s=2.0, venv="venv"):
                pass
        assert time.monotonic() - began < 6
    relay.close()


# --- hosts.toml ------------------------------------------------------------------------------------------------------


def test_hosts_come_from_ssh_and_from_hosts_toml(laptop, tmp_path):  # noqa: F811
    included = tmp_path / "more"
    included.write_text(f"Host other other2 *.wild\n HostName 127.0.0.9\n Port {free_port()}\n")
    laptop.server.config.write_text(f"Include {included}\n" + laptop.server.config.read_text())
    laptop.host(price_per_hour=1.29, gpus="1x A100 40 GB", python=sys.executable)
    listed = {h["name"]: h for h in laptop.json("hosts", "--check")["hosts"]}
    assert list(listed) == ["gpuhost", "other", "other2"]
    assert listed["gpuhost"]["state"] == "reachable" and listed["gpuhost"]["price_per_hour"] == 1.29
    assert listed["gpuhost"]["skew"] and listed["other"]["hostname"] == "127.0.0.9"
    assert listed["other"]["state"] == "unreachable"


def test_host_lines_are_read_as_ssh_reads_them(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text(
        'Host\ta "b c" # not this\nhost=d\n  Host = e f\n#Host g\nHost "h\nInclude\t"more"\nMatch host i\n'
    )
    (tmp_path / "more").write_text("Host j !k *.l\n")
    monkeypatch.setenv("SURGVQA_SSH_CONFIG", str(config))
    assert hosts.ssh_config_names() == ["a", "b c", "d", "e", "f", "j"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]\nworkspce = 'x'", "unknown key workspce; did you mean workspace?"),
        ("[a]\nport = 'x'", "port is 'x', expected int"),
        ("[a]\nenvironment = 1", "expected a table of texts"),
        ("[a]\nlogin_timeout_s = 0", "expected seconds between 1 and 3600"),
        ("a = 1", "expected a table"),
        ("[a", "not valid TOML"),
    ],
)
def test_a_wrong_hosts_toml_is_named(tmp_path, text, said):
    (tmp_path / "hosts.toml").write_text(text)
    with pytest.raises(UsageError, match=r"hosts\.toml") as caught:
        hosts.read_hosts_files(tmp_path)
    assert said in one_line(caught.value)


# --- setup -----------------------------------------------------------------------------------------------------------


def test_setup_installs_our_wheel_and_notices_skew(laptop):  # noqa: F811
    """The venv sees this interpreter's packages, so that nothing is downloaded; our own wheel is installed for real."""
    site = venv_there(laptop, without=("torch", "transformers"))  # importing them is not what is tested here
    first = laptop.json("setup", "gpuhost", "--extra", "")
    assert (
        first["changed"]
        and (site / "surgvqa" / "runs" / "supervisor.py").is_file()
        and (site / "remote" / "agent").is_dir()
    )
    again = laptop.json("setup", "gpuhost", "--extra", "")
    assert not again["changed"] and again["seconds"] < 20
    with laptop.connect() as remote:
        installed = remote.call("probe", venv="venv")["installed"]
    assert setup_room.skew(installed) is None
    record = laptop.there / ".surgvqa" / "installed.json"
    record.write_text(json.dumps({**installed, "version": "0.0.1", "code": "old"}))  # an old version of us
    refused = laptop.command("launch", "gpuhost", "train", check=1).stderr
    assert "version 0.0.1, here" in refused and "surgvqa-remote setup gpuhost" in refused


def test_setup_leaves_an_environment_that_is_there_as_it_is(laptop):  # noqa: F811
    """The user's own, made with --system-site-packages for the host's torch: made again, it would lose that."""
    own = laptop.root / "own"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", own], check=True)
    before = (own / "pyvenv.cfg").read_text()
    assert "include-system-site-packages = true" in before
    laptop.host(python=sys.executable, venv=str(own))
    laptop.command("setup", "gpuhost", "--extra", "", check=None)  # what pip then finds is not what is tested here
    assert (own / "pyvenv.cfg").read_text() == before


def test_setup_wants_a_python_that_is_new_enough(laptop, monkeypatch):  # noqa: F811
    monkeypatch.setattr(setup_room, "MINIMUM", (9, 9))
    with laptop.connect() as remote, pytest.raises(UsageError, match=r"3\.11 or newer.*hosts\.toml"):
        setup_room.setup(remote, Run.create(laptop.workspace / "runs", "setup"))


def test_setup_on_a_full_disk_says_so(laptop):  # noqa: F811
    small = laptop.root / "small"
    small.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        laptop.host(workspace=str(small / "ws"), python=sys.executable)
        said = laptop.command("setup", "gpuhost", "--extra", "", check=1).stderr.splitlines()[-1]
        assert "making the virtual environment failed: disk full" in said and "apt-get" not in said
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- GPUs ------------------------------------------------------------------------------------------------------------


def test_gpus_of_a_host_without_a_driver(laptop):  # noqa: F811
    answer = laptop.json("gpus", "gpuhost")
    assert answer["gpus"] == [] or "memory_total_bytes" in answer["gpus"][0]


def test_gpus_fall_back_to_nvidia_smi(laptop):  # noqa: F811
    """A host without our package: nvidia-smi's rows, once and as a stream."""
    laptop.host(python=sys.executable)
    tools = laptop.server.home / "bin"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "0, NVIDIA A100-SXM4-40GB, GPU-1, 1234, 40960, 87, 250.11, [N/A]"\n')
    smi.chmod(0o755)
    laptop.server.stop()
    laptop.server.environment = f"PATH={tools}:/usr/bin:/bin"
    laptop.server.start()
    with laptop.connect() as remote:
        gpu = remote.call("gpus", venv="venv", watch=None)["gpus"][0]
        stream = remote.stream("gpus", venv="venv", watch=0.1)
        assert [next(stream)["gpus"][0]["index"] for _ in range(3)] == [0, 0, 0]
        stream.close()
    assert gpu["memory_used_bytes"] == 1234 * 2**20 and gpu["utilization_percent"] == 87
    assert "temperature_c" not in gpu


LOST = "Unable to determine the device handle for GPU0000:82:00.0: GPU is lost.  Reboot the system to recover this GPU"
ROW = "0, H100, GPU-1, 1, 2, 3, 4, 5"


@pytest.mark.parametrize(
    ("out", "code", "states", "note"),
    [
        (ROW, 0, [None], None),
        (f"{ROW}\n{LOST}", 15, [None, "lost"], None),
        (LOST, 15, ["lost"], None),
        (f"{ROW}\n1, [GPU is lost], [GPU is lost], " + ", ".join(["[GPU is lost]"] * 5), 0, [None, "lost"], None),
        (f"1, H100, GPU-2{', [Unknown Error]' * 5}", 0, ["failed"], None),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            9,
            [],
            "couldn't communicate",
        ),
        ("", 3, [], "exit code 3"),
    ],
)
def test_nvidia_smi_on_a_broken_machine(tmp_path, monkeypatch, out, code, states, note):
    (tmp_path / "said").write_text(out)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/said\nexit {code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = smi_gpus()
    assert [gpu.get("state") for gpu in answer["gpus"]] == states
    assert all(gpu["problem"] for gpu in answer["gpus"] if "state" in gpu)
    assert (note or "") in answer.get("note", "") and ("note" in answer) == bool(note)


def test_nvidia_smi_rows_are_read():
    row = ["1", "H100", "GPU-2", "1", "2", "[N/A]", "[Not Supported]", "40"]
    assert parse_smi(row) == {
        "index": 1, "name": "H100", "uuid": "GPU-2", "memory_used_bytes": 2**20, "memory_total_bytes": 2**21,
        "temperature_c": 40,
    }  # fmt: skip


# --- fetching --------------------------------------------------------------------------------------------------------


def test_a_run_comes_home_verified_and_resumed(laptop):  # noqa: F811
    stub_train(laptop)
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    target = laptop.workspace / "home"
    with laptop.connect() as remote:
        command, *argv = [*TRAIN, "--max_steps", "2"]
        run = launch.launch(remote, command, argv, needs=[])["run"]
        list(follower.Follower(remote, run))
        big = laptop.there / "runs" / run / "adapter" / "adapter_model.safetensors"
        big.write_bytes(os.urandom(30_000_000))
        progress = Run.create(laptop.workspace / "runs", "fetch")
        emit, cuts = progress.progress, []

        def cut(phase, done, total, unit, **more):
            emit(phase, done, total, unit, **more)
            if done > 10_000_000 and not cuts:
                cuts.append(done)
                relay.cut()

        progress.progress = cut
        answer = fetch(remote, f"runs/{run}", target / run, progress)
    assert cuts and answer["received_bytes"] < 31_000_000 + 2_000_000
    assert (target / run / "adapter" / big.name).read_bytes() == big.read_bytes()
    assert not (target / run / ".partial").exists() and not (target / run / "adapter" / "optimizer.pt").exists()
    relay.close()
    laptop.server.write_config()
    again = laptop.json("fetch", "gpuhost", "last", "--to", str(target))
    assert again["received_bytes"] == 0 and again["files"] == answer["files"]
    everything = laptop.json("fetch", "gpuhost", "last", "--to", str(target), "--all")
    assert everything["files"] > again["files"] and (target / run / "adapter" / "optimizer.pt").exists()


@pytest.mark.parametrize("banner", ["printf no-newline", "seq 200000"])
def test_a_run_comes_home_past_a_talkative_login_shell(laptop, banner):  # noqa: F811
    laptop.server.stop()
    laptop.server.extra = f'ForceCommand {banner}; eval "$SSH_ORIGINAL_COMMAND"'
    laptop.server.start()
    folder = laptop.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "started": 1}))
    assert laptop.json("fetch", "gpuhost", "last")["files"] == 1


def test_a_run_that_goes_on_comes_home_as_it_was_listed(laptop):  # noqa: F811
    """While files come, one grows and a checkpoint is rotated away; the next fetch brings what was added."""
    folder = laptop.there / "runs" / "20260101-000000-train-abc"
    (folder / "checkpoint-10").mkdir(parents=True)
    for name in ("checkpoint-10/adapter.bin", "events.jsonl", "run.json", "start.json"):
        (folder / name).write_text("{}\n")
    target = laptop.workspace / "home"
    progress = Run.create(laptop.workspace / "runs", "fetch")
    with laptop.connect() as remote:
        call = remote.call

        def then_it_goes_on(op, **params):
            answer = call(op, **params)
            (folder / "checkpoint-10" / "adapter.bin").unlink()
            (folder / "events.jsonl").write_text("{}\n{}\n")
            return answer

        remote.call = then_it_goes_on
        fetch(remote, f"runs/{folder.name}", target, progress, everything=True)
    assert sorted(f.name for f in target.rglob("*") if f.is_file()) == ["events.jsonl", "run.json"]
    assert (target / "events.jsonl").read_text() == "{}\n"
    assert "checkpoint-10/adapter.bin is gone there meanwhile" in (progress.folder / "events.jsonl").read_text()
    with laptop.connect() as remote:
        fetch(remote, f"runs/{folder.name}", target, progress, everything=True)
    assert (target / "events.jsonl").read_text() == "{}\n{}\n"


def test_a_disk_that_is_full_here_is_one_line(laptop):  # noqa: F811
    """A limit on the size of files stands in for it."""
    folder = laptop.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "started": 1}))
    (folder / "big").write_bytes(bytes(3_000_000))
    words = f"ulimit -f 1000; exec {sys.executable} -m remote fetch gpuhost last"
    done = subprocess.run(["bash", "-c", words], cwd=laptop.workspace, capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("surgvqa-remote fetch: ") and "File too large" in last and "big" in last


# --- manners ---------------------------------------------------------------------------------------------------------


def test_the_command_line_has_surgvqas_manners(tmp_path):
    def said(*words):
        return subprocess.run([sys.executable, "-m", "remote", *words], capture_output=True, text=True, cwd=tmp_path)

    assert said("--help").returncode == 0 and "example:" in said("upload", "--help").stdout
    wrong = said("runs")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("surgvqa-remote runs: ")
    assert said("launch", "h").returncode == 2


def test_nothing_heavy_is_imported():
    code = (
        "import sys, remote.cli.commands, remote.upload.command, remote.jobs.launch, remote.jobs.fetch, remote.setup; "
        "bad = {'torch', 'numpy', 'transformers', 'textual'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_remote_has_one_owner_but_two_hosts_at_once_work(laptop):  # noqa: F811
    other = Sshd(laptop.root / "other", name="gpuhost").start()
    try:
        first = laptop.connect()
        other.trust()
        second = Remote(hosts.resolve("gpuhost", laptop.workspace))
        assert first.call("probe", venv="v")["workspace"] == str(laptop.there)
        os.environ["SURGVQA_SSH_CONFIG"] = str(other.config)
        second = connect("gpuhost", Path(laptop.workspace))
        assert second.call("probe", venv="v")["workspace"] == str(other.home / "surgvqa")
        assert first.call("probe", venv="v")["workspace"] == str(laptop.there)
        first.close()
        second.close()
    finally:
        other.stop()


# --- login shells and ssh_config -------------------------------------------------------------------------------------


def login_shell(laptop, command):  # noqa: F811
    """`command` runs before what was asked for, as in a ~/.bashrc."""
    laptop.server.stop()
    laptop.server.extra = f'ForceCommand {command}; eval "$SSH_ORIGINAL_COMMAND"'
    laptop.server.start()


def test_a_slow_login_shell_is_waited_for(laptop, monkeypatch):  # noqa: F811
    """For longer than a silence that would end the connection later."""
    login_shell(laptop, "sleep 1.5")
    monkeypatch.setattr("remote.ssh.timeouts.SILENCE_S", 1.0)
    with laptop.connect() as remote:
        assert list(remote.stream("probe", silence_s=1.0, venv="venv"))


@pytest.mark.parametrize(
    "command", ["echo loading modules; sleep 600", "while :; do echo loading modules; sleep 0.2; done"]
)
def test_a_login_shell_that_is_too_slow_is_named(laptop, command):  # noqa: F811
    login_shell(laptop, command)
    laptop.host(python=sys.executable, login_timeout_s=1)
    with laptop.connect() as remote, pytest.raises(Unreachable, match=r"logged in.*loading modules.*login_timeout_s"):
        remote.call("probe", venv="venv")


@pytest.mark.parametrize(
    "line",
    ["SessionType none", "SessionType subsystem", "StdinNull yes", "ForkAfterAuthentication yes", "RemoteCommand ls"],
)
def test_bulk_streams_override_what_would_leave_them_without_a_command(laptop, line):  # noqa: F811
    laptop.server.write_config(more=line)
    (laptop.workspace / "merged").mkdir()
    (laptop.workspace / "merged" / "config.json").write_text("{}")
    laptop.json("upload", "gpuhost", "--model_name_or_path", "merged", "--patience_s", "5")
    assert (laptop.there / "merged" / "config.json").read_text() == "{}"
