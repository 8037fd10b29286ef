"""Two hosts with sshds in network namespaces, which reach each other by another address than the laptop reaches them,
and do not see each other's files.

laptop 10.213.A.1 ── 10.213.A.2 one 10.213.9.1 ── 10.213.9.2 two 10.213.B.2 ── 10.213.B.1 laptop
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
from places import ROOT
from sshd import Laptop, Sshd, end_processes_below, why_not

NAMES = ("one", "two")
IMPATIENT_S = 6
"""Seconds of silence after which a machine counts as lost here."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class TwoHosts(Laptop):
    """`Laptop`, whose server is the first host; `servers` has both."""

    servers: list[Sshd]
    spaces: list[str]

    @property
    def theres(self) -> list[Path]:
        """The workspaces on the hosts."""
        return [server.home / "surgvqa" for server in self.servers]

    def cut(self) -> None:
        """The link between the hosts goes; ssh stays. Nobody is told: what is sent gets lost."""
        ip("-n", self.spaces[0], "link", "set", "between0", "down")


def _link(spaces: list[str], subnets: tuple[int, int]) -> None:
    """Both namespaces, a link between them and one from each to ours."""
    for number, (space, subnet) in enumerate(zip(spaces, subnets)):
        ours = f"sv{os.getpid() % 100000}-{number}"
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
        ip("link", "add", ours, "type", "veth", "peer", "name", "laptop0", "netns", space)
        ip("addr", "add", f"10.213.{subnet}.1/30", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", space, "addr", "add", f"10.213.{subnet}.2/30", "dev", "laptop0")
        ip("-n", space, "link", "set", "laptop0", "up")
    between = ["link", "add", "between0", "type", "veth", "peer", "name", "between0", "netns", spaces[1]]
    ip("-n", spaces[0], *between)
    for number, space in enumerate(spaces):
        ip("-n", space, "addr", "add", f"10.213.9.{number + 1}/30", "dev", "between0")
        ip("-n", space, "link", "set", "between0", "up")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """`TwoHosts` with the small world in the workspace of each; everything ends with the tests."""
    if reason := why_not():
        pytest.skip(f"no sshd: {reason}")
    if not shutil.which("ip") or os.getuid():
        pytest.skip("network namespaces need root and iproute2")
    root = tmp_path_factory.mktemp("hosts")
    spaces, subnet = [f"surgvqa-{os.getpid()}-{name}" for name in NAMES], 20 + 2 * (os.getpid() % 100)
    servers: list[Sshd] = []
    with pytest.MonkeyPatch.context() as patched:
        try:
            try:
                _link(spaces, (subnet, subnet + 1))
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces: {error.stderr.decode().strip()}")
            patched.setenv("XDG_CACHE_HOME", str(root / "cache"))
            patched.setenv("HOME", str(root))
            patched.setenv("TMPDIR", str(root))
            patched.setenv("PYTHONPATH", str(ROOT))
            patched.setenv("OMP_NUM_THREADS", "1")
            for number, name in enumerate(NAMES):
                server = Sshd(root / name, name, f"10.213.{subnet + number}.2")
                server.environment = f"PYTHONPATH={root / 'site'}:{ROOT} OMP_NUM_THREADS=1"
                servers.append(server)
                server.trust()
            for server, other, space in zip(servers, reversed(servers), spaces):
                hidden = f'mount -t tmpfs none {other.root} && exec "$@"'  # a disk of its own, as a host has
                server.start(["ip", "netns", "exec", space, "unshare", "--mount", "sh", "-c", hidden, "sh"])
            (root / "ssh_config").write_text("".join(server.config.read_text() for server in servers))
            patched.setenv("SURGVQA_SSH_CONFIG", str(root / "ssh_config"))
            (root / "site").mkdir()
            (root / "site" / "sitecustomize.py").write_text(
                f"from surgvqa.machine import heartbeat\nheartbeat.SILENT_S, heartbeat.BEAT_S = {IMPATIENT_S}, 0.5\n"
            )
            workspace = root / "ws"
            workspace.mkdir()
            found = TwoHosts(root, servers[0], workspace)
            found.servers, found.spaces = servers, spaces
            venv = f'venv = "{sys.prefix}"\npython = "{sys.executable}"\n'
            (workspace / "hosts.toml").write_text("".join(f"[{name}]\n{venv}" for name in NAMES))
            small.build(found.theres[0], samples=7)
            shutil.copytree(found.theres[0], found.theres[1])
            yield found
        finally:
            for server in servers:
                server.stop()
            end_processes_below(root)
            for space in spaces:
                subprocess.run(["ip", "netns", "del", space], capture_output=True)
