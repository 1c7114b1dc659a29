"""Real ZooKeeper servers for tests: an ensemble of Java processes on this machine, to kill, pause, stop and start.

Owns the processes, their ports and their directories. Blocking: async tests call it in a worker thread. Every wait has an end.
The servers are Debian's (package ``libzookeeper-java``, with any Java runtime). Where they are missing, `require_zookeeper`
skips the test and says what to install.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

JAR = Path("/usr/share/java/zookeeper.jar")  # its manifest names the jars that it needs
MORE_JARS = (  # that it does not name: without the first the servers log nothing, without the others they have no TLS
    "slf4j-simple.jar",
    "netty-codec.jar",
    "netty-resolver.jar",
    "netty-transport-native-unix-common.jar",
)
MAIN_CLASS = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
READY_TIMEOUT = 30.0  # seconds; a loaded machine takes its time
STOP_TIMEOUT = 10.0
TICK_MS = 100  # the unit of ZooKeeper's other times: sessions may be as short as two ticks
SESSION_TIMEOUT_MS_MAX = 60_000
ANSWER_TIMEOUT = 1.0
PORTS = range(20_000, 32_000)


@functools.cache
def missing() -> str:
    """What keeps ZooKeeper from running here; empty when nothing does."""
    if not JAR.exists():
        return f"{JAR} is not here: ZooKeeper is not installed (Debian packages libzookeeper-java default-jre-headless)"
    if shutil.which("java") is None:
        return "java is not in PATH: ZooKeeper can't run (Debian package default-jre-headless)"
    return ""


def require_zookeeper() -> None:
    """Skip the test, loudly, where ZooKeeper can't run."""
    if missing():
        pytest.skip(f"NO ZOOKEEPER: {missing()}")


class Server:
    """One server of an ensemble: a process and its directory, which outlives the process."""

    def __init__(
        self, number: int, directory: Path, host: str, ports: tuple[int, int, int], prefix: Sequence[str]
    ) -> None:
        self.number = number
        self.directory = directory
        self.host = host
        self.client_port, self.quorum_port, self.election_port = ports
        self._prefix = tuple(prefix)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_paused = False

    @property
    def address(self) -> str:
        return f"{self.host}:{self.client_port}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def configure(self, members: Sequence[Server], settings: Mapping[str, object]) -> None:
        """Write its configuration file; `settings` may replace and add lines."""
        data = self.directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        (data / "myid").write_text(f"{self.number}\n")
        lines: dict[str, object] = {
            "tickTime": TICK_MS,
            "initLimit": 100,
            "syncLimit": 20,  # two seconds until a silent member is given up
            "minSessionTimeout": 2 * TICK_MS,
            "maxSessionTimeout": SESSION_TIMEOUT_MS_MAX,
            "dataDir": data,
            "clientPort": self.client_port,
            "clientPortAddress": self.host,
            "maxClientCnxns": 0,
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "*",
        }
        if len(members) > 1:
            for member in members:
                lines[f"server.{member.number}"] = f"{member.host}:{member.quorum_port}:{member.election_port}"
        lines.update(settings)
        (self.directory / "zoo.cfg").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))

    def launch(self, java_options: Sequence[str] = ()) -> None:
        """Start the process, without waiting for it to serve."""
        assert not self.is_running
        command = [*self._prefix, "java", "-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
        command += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dzookeeper.preAllocSize=64"]
        command += ["-Djava.net.preferIPv4Stack=true", *java_options]
        class_path = ":".join([str(JAR), *(str(JAR.with_name(name)) for name in MORE_JARS)])
        command += ["-cp", class_path, MAIN_CLASS, str(self.directory / "zoo.cfg")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._is_paused = False

    def kill(self) -> None:
        """kill -9. What it had synced is on disk when it comes back."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that does not help."""
        self.resume()
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and nobody answers. Returns when all its threads have stopped."""
        if not self.is_running:
            return
        self._signal(signal.SIGSTOP)
        self._is_paused = True
        deadline = time.monotonic() + STOP_TIMEOUT
        while not self._has_stopped() and time.monotonic() < deadline:
            time.sleep(0.002)

    def resume(self) -> None:
        """SIGCONT."""
        if self.is_running and self._is_paused:
            self._signal(signal.SIGCONT)
            self._is_paused = False

    def wipe(self) -> None:
        """Remove its data (but not its number). Only when it does not run."""
        assert not self.is_running
        shutil.rmtree(self.directory / "data")

    def ask(self, word: str) -> str:
        """The answer to one of ZooKeeper's four-letter words; empty when there is none."""
        host, port = self.host, self.client_port
        if self._prefix:  # another network namespace: ask from inside it
            script = f"exec 3<>/dev/tcp/{host}/{port}; printf {word} >&3; cat <&3"
            command = [*self._prefix, "timeout", str(ANSWER_TIMEOUT), "bash", "-c", script]
            return subprocess.run(command, capture_output=True, check=False).stdout.decode(errors="replace")
        answer = b""
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, port), timeout=ANSWER_TIMEOUT) as connection,
        ):
            connection.sendall(word.encode())
            while chunk := connection.recv(65536):
                answer += chunk
        return answer.decode(errors="replace")

    def mode(self) -> str:
        """``standalone``, ``leader``, ``follower``; empty while it serves nobody."""
        for line in self.ask("srvr").splitlines():
            if line.startswith("Mode: "):
                return line.removeprefix("Mode: ")
        return ""

    def log_text(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _has_stopped(self) -> bool:
        assert self._process is not None
        for status in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # a thread may end
                if status.read_text().rpartition(")")[2].split()[0] != "T":
                    return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)  # ip netns exec and taskset become the program: it is the server's own

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        if self.is_running:
            self._signal(number)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT)
        self._process = None
        self._is_paused = False


class Ensemble:
    """`count` servers. `start` them, and `close` them in a finally (or use `ensemble`).

    hosts         bind address of each server, default 127.0.0.1
    prefixes      words before each server's command, such as ``["ip", "netns", "exec", "ns1"]``
    settings      lines of the configuration file, by name, that replace or add to those of `Server.configure`
    java_options  for the Java machine
    """

    def __init__(
        self,
        count: int = 1,
        *,
        hosts: Sequence[str] = (),
        prefixes: Sequence[Sequence[str]] = (),
        settings: Mapping[str, object] | None = None,
        java_options: Sequence[str] = (),
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="zookeeper-")
        self._settings = dict(settings or {})
        self._java_options = tuple(java_options)
        hosts = hosts or ["127.0.0.1"] * count
        prefixes = prefixes or [()] * count
        ports = free_ports(3 * count)
        self.servers = [
            Server(
                number + 1,
                Path(self._directory.name) / str(number + 1),
                hosts[number],
                (ports[3 * number], ports[3 * number + 1], ports[3 * number + 2]),
                prefixes[number],
            )
            for number in range(count)
        ]

    @property
    def addresses(self) -> str:
        """The servers as a client names them: ``HOST:PORT,HOST:PORT``."""
        return ",".join(server.address for server in self.servers)

    def start(self) -> Ensemble:
        """Start all servers that do not run, and return when the ensemble serves."""
        for server in self.servers:
            if not server.is_running:
                self.launch(server)
        self.wait_ready()
        return self

    def launch(self, server: Server) -> None:
        """Start one server, without waiting."""
        server.configure(self.servers, self._settings)
        server.launch(self._java_options)

    def wait_ready(self, servers: Sequence[Server] | None = None) -> None:
        """Return when each of the servers (default: all that run) serves clients."""
        wanted = list(servers if servers is not None else (server for server in self.servers if server.is_running))
        deadline = time.monotonic() + READY_TIMEOUT
        while wanted:
            wanted = [server for server in wanted if not server.mode()]
            if not wanted:
                return
            for server in wanted:
                if not server.is_running:
                    raise RuntimeError(f"ZooKeeper server {server.number} ended:\n{server.log_text()[-4000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"ZooKeeper does not serve:\n{wanted[0].log_text()[-4000:]}")
            time.sleep(0.05)

    def leader(self) -> Server:
        """The server that leads now (or the only one)."""
        deadline = time.monotonic() + READY_TIMEOUT
        while time.monotonic() < deadline:
            for server in self.servers:
                if server.is_running and server.mode() in ("leader", "standalone"):
                    return server
            time.sleep(0.05)
        raise TimeoutError("no ZooKeeper server leads")

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def pause(self) -> None:
        for server in self.servers:
            server.pause()

    def resume(self) -> None:
        for server in self.servers:
            server.resume()

    def wipe(self) -> None:
        for server in self.servers:
            server.wipe()

    def close(self) -> None:
        """End all servers and remove their directories."""
        self.kill()
        self._directory.cleanup()


@contextmanager
def ensemble(count: int = 1, **options: object) -> Iterator[Ensemble]:
    """An `Ensemble` that serves, for the length of the block. Skips the test where ZooKeeper can't run."""
    require_zookeeper()
    servers = Ensemble(count, **options)  # type: ignore[arg-type]
    try:
        yield servers.start()
    finally:
        servers.close()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now. Below the range that the kernel gives to others before the servers bind them."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(PORTS, len(PORTS)):
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise OSError("no free ports")
