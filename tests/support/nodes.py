"""Machines of their own, as far as the network goes: namespaces with a cable between them, on one machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ETC = Path("/etc/netns")


def missing() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "the command `ip` is missing (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"arf-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=False)
    return None


class Node:
    """One namespace; what runs in it sees its own loopback and one cable."""

    def __init__(self, name: str, address: str, device: str) -> None:
        self.name, self.address, self.device = name, address, device

    def start(self, argv: list[str], env: dict[str, str], output: Path) -> subprocess.Popen:
        """Starts a command; what it prints is appended to a file."""
        with output.open("a") as stream:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *argv], env=env, stdout=stream, stderr=subprocess.STDOUT
            )

    def cut_power(self) -> int:
        """Kills everything in the namespace at once; returns how many processes that were."""
        killed = 0
        for _ in range(50):
            listed = subprocess.run(
                ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
            )
            alive = [int(pid) for pid in listed.stdout.split()]
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            if not alive:
                return killed
            time.sleep(0.1)
        raise RuntimeError(f"processes in {self.name} do not end")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two namespaces with a cable between them; they, and all that runs in them, are gone afterwards."""
    own = os.getpid() % 100000
    nodes = tuple(Node(f"arf-{own}-{side}", f"10.213.77.{side}", f"arf{own}v{side}") for side in (1, 2))
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
            _names(node, nodes)
        _ip("link", "add", nodes[0].device, "type", "veth", "peer", "name", nodes[1].device)
        for node in nodes:
            _ip("link", "set", node.device, "netns", node.name)
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.device)
            _ip("-n", node.name, "link", "set", node.device, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                node.cut_power()
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True, check=False)
            shutil.rmtree(ETC / node.name, ignore_errors=True)
        subprocess.run(["ip", "link", "delete", nodes[0].device], capture_output=True, check=False)


def _names(node: Node, nodes: tuple[Node, ...]) -> None:
    """Host names inside the namespace, which `ip netns exec` puts over those of /etc; nobody else is asked."""
    folder = ETC / node.name
    folder.mkdir(parents=True)
    others = [f"{other.address} {other.name}" for other in nodes if other is not node]
    own = f"{node.address} {node.name} {socket.gethostname()}"
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", own, *others]) + "\n")
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")


def _ip(*argv: str) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(argv)}: {done.stderr}"
