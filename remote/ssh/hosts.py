"""Hosts: whatever `ssh NAME` would reach, plus what ssh does not know (hosts.toml).

    # hosts.toml, in the workspace or ~/.config/surgvqa/
    [lambda]
    address = "ubuntu@192.0.2.7"      # only when ~/.ssh/config does not know the name
    workspace = "~/surgvqa"
    price_per_hour = 1.29
    [lambda.environment]
    HF_HOME = "/data/hf"

OpenSSH resolves its own configuration (`ssh -G`: Include, Match, tokens), so there is one truth for us and for ssh.
"""

from __future__ import annotations

import getpass
import glob
import math
import os
import re
import shlex
import socket
import subprocess
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from remote.ssh import timeouts
from surgvqa.config.settings import nearest
from surgvqa.errors import UsageError
from surgvqa.files import read_text

HOSTS_FILE = "hosts.toml"
USER_HOSTS_FILE = Path("~/.config/surgvqa") / HOSTS_FILE
SSH_CONFIG_VARIABLE = "SURGVQA_SSH_CONFIG"


@dataclass(frozen=True)
class HostEntry:
    """One table of hosts.toml."""

    address: str | None = None
    """[user@]name-or-address, for a host that ~/.ssh/config does not name."""
    port: int | None = None
    identity_file: str | None = None
    host_key_alias: str | None = None
    """The name under which known_hosts has its key: a rented address is another machine's next."""
    workspace: str = "~/surgvqa"
    """Folder on the host; ~ is the home there."""
    venv: str = "venv"
    """Virtual environment on the host, relative to the workspace unless absolute."""
    python: str = "python3"
    """Interpreter on the host for the agent, and for making the venv (3.11 or newer)."""
    login_timeout_s: float = timeouts.LOGIN_S
    """Seconds that the login shell there may take to start the agent (conda init, module load)."""
    node_address: str | None = None
    """Where other hosts reach this one when they train together; default: whichever of its addresses they do."""
    price_per_hour: float | None = None
    gpus: str | None = None
    """For people: "1x A100 40 GB"."""
    environment: dict[str, str] = field(default_factory=dict)
    """For the jobs there. Not for secrets: this file is not one."""


@dataclass(frozen=True)
class Host:
    """A host as it will be reached."""

    name: str
    entry: HostEntry
    target: str
    """What ssh is called with."""
    options: tuple[str, ...]
    """ssh options that go before the target (-F, -p, -i)."""
    ssh: dict[str, list[str]]
    """`ssh -G`: lower-case keyword -> its values."""
    source: str
    """Where the name was found: hosts.toml, ssh config, or the command line."""

    def setting(self, keyword: str, default: str = "") -> str:
        """The first value of an ssh keyword; "none" counts as unset."""
        value = (self.ssh.get(keyword) or [default])[0]
        return default if value == "none" else value

    @property
    def hostname(self) -> str:
        return self.setting("hostname", self.target)

    @property
    def port(self) -> int:
        return int(self.setting("port", "22"))

    @property
    def user(self) -> str:
        return self.setting("user")

    @property
    def key_name(self) -> str:
        """The host's name in known_hosts: HostKeyAlias, host, or [host]:port."""
        alias = self.setting("hostkeyalias")
        return alias or (self.hostname if self.port == 22 else f"[{self.hostname}]:{self.port}")

    @property
    def known_hosts_files(self) -> list[Path]:
        """The user's files first; new keys go to the first one."""
        words = shlex.split(self.setting("userknownhostsfile")) + shlex.split(self.setting("globalknownhostsfile"))
        return [Path(os.path.expanduser(w)) for w in words if w != "/dev/null"]

    @property
    def jump(self) -> str:
        return self.setting("proxyjump")

    @property
    def proxy_command(self) -> str:
        """The command line for a shell (ssh_config(5)), or ''."""
        return self._with_tokens(self.setting("proxycommand"))

    @property
    def identity_files(self) -> list[str]:
        """The existing key files, private or (for a key in the agent) public."""
        files = [self._path(file) for file in self.ssh.get("identityfile", [])]
        return [file for file in files if os.path.isfile(file) or os.path.isfile(f"{file}.pub")]

    @property
    def certificate_files(self) -> list[str]:
        return [self._path(file) for file in self.ssh.get("certificatefile", [])]

    @property
    def identity_agent(self) -> str:
        """The ssh-agent's socket, or ''."""
        named = (self.ssh.get("identityagent") or ["SSH_AUTH_SOCK"])[0]
        if named.startswith("$") and "{" not in named:  # the name of a variable
            named = os.environ.get(named[1:], "")
        return "" if named == "none" else os.environ.get(named, "") if named == "SSH_AUTH_SOCK" else self._path(named)

    def known_hosts_command(self, **of_key: str) -> list[str]:
        """KnownHostsCommand, for what `of_key` says of a host key (tokens f, I, K, t); [] when there is none."""
        words = shlex.split(self.setting("knownhostscommand"))
        tokens = {"H": self.key_name, "f": "NONE", "K": "NONE", "t": "NONE", "I": "ORDER", **of_key}
        return [self._with_tokens(word, tokens) for word in words]

    def _path(self, text: str) -> str:
        """A path in ssh_config, with its tokens, ~ and ${NAME} expanded."""
        path = os.path.expanduser(self._with_tokens(text))
        return re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], name[0]), path)

    def _with_tokens(self, text: str, more: dict[str, str] | None = None) -> str:
        """`text` with its % tokens expanded (ssh_config(5), TOKENS). `ssh -G` does not expand them in these values."""
        given = self.setting("host") or self.target.rpartition("@")[2]
        tokens = {
            "%": "%",
            "d": os.path.expanduser("~"),
            "h": self.hostname,
            "i": str(os.getuid()),
            "k": self.setting("hostkeyalias") or given,
            "L": socket.gethostname().partition(".")[0],
            "l": socket.gethostname(),
            "n": given,
            "p": str(self.port),
            "r": self.user,
            "u": getpass.getuser(),
            **(more or {}),
        }
        return re.sub("%(.)", lambda token: tokens.get(token[1], token[0]), text)


def ssh_config_option() -> list[str]:
    """-F FILE if the environment names an ssh configuration other than the user's."""
    file = os.environ.get(SSH_CONFIG_VARIABLE)
    return ["-F", file] if file else []


def read_hosts_files(workspace: Path, wrong: dict[str, UsageError] | None = None) -> dict[str, HostEntry]:
    """The tables of ~/.config/surgvqa/hosts.toml and of the workspace's (which wins). Unknown keys are UsageErrors.

    With `wrong` a table that is not as it should be is left out, and its error is put there under its name: one bad
    table does not take the other hosts away.
    """
    found: dict[str, HostEntry] = {}
    for file in (USER_HOSTS_FILE.expanduser(), Path(workspace) / HOSTS_FILE):
        if not file.is_file():
            continue
        try:
            document = tomllib.loads(read_text(file))
        except (ValueError, RecursionError) as error:  # no TOML, or a number of thousands of digits
            raise UsageError(f"{file}: not valid TOML: {error}") from None
        for name, table in document.items():
            try:
                found[name] = _entry(file, name, table)
            except UsageError as error:
                if wrong is None:
                    raise
                found.pop(name, None)
                wrong[name] = error
            else:
                (wrong or {}).pop(name, None)
    return found


def _entry(file: Path, name: str, table: Any) -> HostEntry:
    if not isinstance(table, dict):
        raise UsageError(f"{file}: {name} is {table!r}, expected a table: [{name}]")
    kinds = {f.name: (float if "float" in f.type else int if "int" in f.type else str) for f in fields(HostEntry)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in kinds:
            raise UsageError(f"{file}: [{name}] unknown key {key}{nearest(key, kinds)}")
        if key == "environment":
            if not isinstance(value, dict) or not all(isinstance(v, (str, int, float)) for v in value.values()):
                raise UsageError(f"{file}: [{name}] environment is {value!r}, expected a table of texts")
            values[key] = {k: str(v) for k, v in value.items()}
            if wrong := next((k for k, v in values[key].items() if not k or "=" in k or "\0" in k + v), None):
                raise UsageError(f"{file}: [{name}] environment: {wrong!r} cannot be a variable of a process")
            continue
        accepted = (int, float) if kinds[key] is float else kinds[key]
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise UsageError(f"{file}: [{name}] {key} is {value!r}, expected {kinds[key].__name__}")
        if isinstance(value, str) and (not value or "\0" in value):
            raise UsageError(f"{file}: [{name}] {key} is {value!r}, expected text")
        if key == "port" and not 1 <= int(value) <= 65535:
            raise UsageError(f"{file}: [{name}] port is {value}, expected 1 to 65535")
        if key == "price_per_hour" and not 0 <= float(value) < math.inf:
            raise UsageError(f"{file}: [{name}] price_per_hour is {value}, expected a price")
        if key == "login_timeout_s" and not 1 <= float(value) <= 3600:
            raise UsageError(f"{file}: [{name}] {key} is {value!r}, expected seconds between 1 and 3600")
        values[key] = value
    return HostEntry(**values)


def ssh_settings(target: str, options: list[str]) -> dict[str, list[str]]:
    """`ssh -G`: the settings that OpenSSH will use for `target`."""
    if target.startswith("-"):
        raise UsageError(f"host {target!r}: a host name cannot start with a dash")
    # With a command, or ssh refuses ForkAfterAuthentication and SessionType subsystem of its configuration.
    words = ["ssh", *options, "-o", "RemoteCommand=none", "-G", "--", target, "true"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UsageError("ssh: not installed here; install OpenSSH's client (openssh-client)") from None
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise UsageError(f"host {target!r}: ssh -G failed: {error}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"host {target!r}: ssh does not accept it: {reason}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        keyword, _, value = line.partition(" ")
        found.setdefault(keyword.lower(), []).append(value)
    return found


def resolve(name: str, workspace: Path) -> Host:
    """The host that `name` means: a table of hosts.toml, a name of ~/.ssh/config, or [user@]address."""
    wrong: dict[str, UsageError] = {}
    entries = read_hosts_files(workspace, wrong)
    if name in wrong:
        raise wrong[name]
    entry = entries.get(name, HostEntry())
    options = ssh_config_option()
    if entry.port:
        options += ["-p", str(entry.port)]
    if entry.identity_file:
        options += ["-i", os.path.expanduser(entry.identity_file)]
    if entry.host_key_alias:
        options += ["-o", f"HostKeyAlias={entry.host_key_alias}"]
    target = entry.address or name
    source = HOSTS_FILE if name in entries else "ssh config" if name in ssh_config_names() else "command line"
    return Host(name, entry, target, tuple(options), ssh_settings(target, options), source)


def ssh_config_names() -> list[str]:
    """The plain names (no wildcards) of the user's ssh configuration and what it includes."""
    start = Path(os.environ.get(SSH_CONFIG_VARIABLE) or "~/.ssh/config").expanduser()
    names: list[str] = []
    seen: set[Path] = set()

    def read(file: Path) -> None:
        if file in seen or not file.is_file():
            return
        seen.add(file)
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            keyword, *words = _words(line) or [""]
            if keyword.lower() == "include":
                for pattern in words:
                    path = Path(os.path.expanduser(pattern))
                    for found in sorted(glob.glob(str(path if path.is_absolute() else start.parent / path))):
                        read(Path(found))
            elif keyword.lower() == "host":
                names.extend(n for n in words if not set(n) & set("*?!") and n not in names)

    read(start)
    return names


def _words(line: str) -> list[str]:
    """A line of ssh_config: keyword and arguments, "=" or blanks between them, quoted or not, without the comment."""
    match = re.fullmatch(r"\s*(\w*)\s*=?(.*)", line)
    if match is None:  # only a line that has a line break in it
        return []
    keyword, rest = match.groups()
    try:
        return [keyword, *shlex.split(rest, comments=True)]
    except ValueError:  # a quote that is not closed: ssh refuses the file, and says so when it is asked
        return [keyword]
