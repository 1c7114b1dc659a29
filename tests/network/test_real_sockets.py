"""Brokers as a program embeds them, linked over real sockets: TCP and TLS, given addresses and multicast; the commands for it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from click.testing import CliRunner

from pybroker import open_broker
from pybroker.broker import Broker
from pybroker.cli import cli
from pybroker.errors import BrokerError, ConfigurationError

Q = "/queue/q"
TIMEOUT = 20.0
VERIFY_FAILED = "certificate verify failed"


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def linked(broker: Broker) -> set[str]:
    return {peer.name for peer in broker.network_status().peers if peer.state == "linked"}


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def options(name: str, *, listen: str = "pybroker://127.0.0.1:0", **network: Any) -> dict[str, Any]:
    return {"name": name, "listen": [listen], "network": network}


async def check_forwarding(source: Broker, target: Broker, count: int = 100) -> None:
    async with source.connect() as sender, target.connect() as receiver, receiver.subscribe(Q) as messages:
        for number in range(count):
            await sender.send(Q, b"%d" % number, headers={"number": str(number)})
        with trio.fail_after(TIMEOUT):
            for number in range(count):
                message = await messages.receive()
                assert (message.body, message.header("number")) == (b"%d" % number, str(number))
                await message.ack()


async def test_two_brokers_with_given_addresses() -> None:
    async with open_broker(**options("b", secret="s")) as b:
        async with open_broker(**options("a", secret="s", peers=[b.listeners[0]])) as a:
            await until(lambda: linked(a) == {"b"} and linked(b) == {"a"})
            await check_forwarding(a, b)
            await check_forwarding(b, a)
            (seen,) = a.network_status().peers
            assert (seen.forwarded, seen.received, seen.waiting, seen.trouble) == (100, 100, 0, "")
            assert (seen.address, seen.demand_in) == (b.listeners[0], 0)
        await until(lambda: linked(b) == set())


async def test_three_brokers_that_hear_each_other() -> None:
    url = f"multicast://239.255.2.3:{free_port()}?interface=127.0.0.1"
    async with (
        open_broker(**options("a", discovery=url, secret="s")) as a,
        open_broker(**options("b", discovery=url, secret="s")) as b,
        open_broker(**options("c", discovery=url, secret="s")) as c,
        open_broker(**options("d", discovery=url, secret="s", group="others")) as d,
    ):
        await until(lambda: linked(a) == {"b", "c"} and linked(b) == {"a", "c"} and linked(c) == {"a", "b"})
        await check_forwarding(a, c)
        assert linked(d) == set()
        assert a._server.members == {one.config.name: one.listeners for one in (a, b, c)}


@pytest.fixture
def certificates(tmp_path: Path) -> Callable[[trustme.CA, str], dict[str, Path]]:
    def make(authority: trustme.CA, name: str) -> dict[str, Path]:
        files = {field: tmp_path / f"{name}-{field}.pem" for field in ("certificate", "key", "peer_ca")}
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(files["certificate"])
        issued.private_key_pem.write_to_path(files["key"])
        authority.cert_pem.write_to_path(files["peer_ca"])
        return files

    return make


@pytest.mark.parametrize("trusted", [True, False])
async def test_links_over_tls_with_certificates_on_both_sides(certificates: Any, trusted: bool) -> None:
    authority = trustme.CA()
    ours = certificates(authority, "a")
    theirs = certificates(authority if trusted else trustme.CA(), "b")
    listen = "pybroker+ssl://127.0.0.1:0?cert={certificate}&key={key}&client_ca={peer_ca}".format_map(theirs)
    async with open_broker(**options("b", listen=listen)) as b:
        dialling = options("a", peers=[b.listeners[0]], **ours)
        async with open_broker(**dialling) as a:
            if trusted:
                await until(lambda: linked(a) == {"b"} and linked(b) == {"a"})
                await check_forwarding(a, b)
            else:
                await until(lambda: any(VERIFY_FAILED in peer.trouble for peer in a.network_status().peers))
                assert linked(b) == set()


async def test_certificates_that_can_not_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    network = dict.fromkeys(("certificate", "key", "peer_ca"), tmp_path / "none.pem")
    with pytest.raises(ConfigurationError, match=r"network\.certificate .*none\.pem: No such file"):
        async with open_broker(**options("a", **network)):
            pass


async def ask(*arguments: str) -> Any:
    return await trio.to_thread.run_sync(lambda: CliRunner().invoke(cli, arguments))


async def test_the_commands_show_the_network_and_remove_a_peer(tmp_path: Path) -> None:
    data = str(tmp_path / "a")
    async with open_broker(**options("b", secret="s")) as b:
        peers = [b.listeners[0], "pybroker://127.0.0.1:1"]
        async with open_broker(**options("a", secret="s", peers=peers), data_dir=data) as a:
            await until(lambda: linked(a) == {"b"})
            await until(lambda: any(peer.trouble for peer in a.network_status().peers))
            shown = await ask("network", "status", "--data", data)
            assert shown.exit_code == 0
            assert "broker a, group default" in shown.output
            row = next(line for line in shown.output.splitlines() if b.listeners[0] in line)
            assert [cell.strip() for cell in row.strip("│").split("│")][:2] == ["b", "linked"]
            assert "pybroker://127.0.0.1:1: " in shown.output
            refused = await ask("network", "remove", "b", "--data", data)
            assert refused.exit_code != 0
            assert "linked" in refused.output + str(refused.exception)
            async with b.connect() as client, client.subscribe(Q, prefetch=1), a.connect() as sender:
                for number in range(10):
                    await sender.send(Q, b"%d" % number)
                await until(lambda: a.network_status().peers[-1].forwarded == 10)
    async with open_broker(**options("a"), data_dir=data) as a:
        answer = json.loads((await ask("network", "status", "--data", data, "--json")).output)
        assert [(peer["name"], peer["state"]) for peer in answer["peers"]] == [("b", "not linked")]
        with pytest.raises(BrokerError, match="peer x is not known here; known are: b"):
            await a.remove_peer("x")
        removed = await ask("network", "remove", "b", "--data", data)
        assert removed.exit_code == 0
        assert "peer b is forgotten" in removed.output
        assert a.network_status().peers == ()
    async with open_broker(name="a", data_dir=data) as a:  # and it is forgotten on the disk
        assert a.network_status().peers == ()
        assert "in no network" in (await ask("network", "status", "--data", data)).output
