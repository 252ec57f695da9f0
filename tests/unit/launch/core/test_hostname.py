"""The host name that Gloo sees."""

import os
import socket
import subprocess
import sys

import pytest

from launch.core import network


def resolver(*addresses):
    """A getaddrinfo that knows these addresses for every name."""
    kind = socket.SOCK_STREAM
    return lambda *_, **__: [(socket.AF_INET, kind, 0, "", (address, 0)) for address in addresses]


def test_the_first_address_that_can_be_bound_counts(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolver("192.0.2.1", "127.0.1.1", "127.0.0.1"))
    assert network.address_of_own_name() == "127.0.1.1"


def test_names_without_an_address(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolver("192.0.2.1"))
    assert network.address_of_own_name() is None

    def unknown(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert network.address_of_own_name() is None


def test_a_hostname_too_long_to_be_resolved_has_no_address(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "a" * 64)  # Linux's HOST_NAME_MAX
    assert network.address_of_own_name() is None


def test_a_private_hostname_leaves_the_hosts_alone():
    code = (
        "import socket; from launch.core.network import take_hostname; take_hostname('192.0.2.7');"
        "print(socket.gethostname(), socket.gethostbyname(socket.gethostname()))"
    )
    before = socket.gethostname()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "no namespace for a host name of its own" in done.stderr:
        pytest.skip("this system allows ordinary users no namespaces")
    assert done.stdout == "192.0.2.7 192.0.2.7\n"
    assert socket.gethostname() == before


@pytest.fixture
def renamed(monkeypatch):
    """Names taken."""
    names = []
    monkeypatch.setattr(network, "take_hostname", names.append)
    return names


@pytest.mark.parametrize(
    ("own", "several_nodes", "names"),
    [
        ("192.0.2.9", True, []),
        ("127.0.1.1", True, ["192.0.2.9"]),
        ("192.0.2.200", True, ["192.0.2.9"]),  # another network than HOROVOD_GLOO_IFACE
        (None, True, ["192.0.2.9"]),
        ("127.0.1.1", False, []),
        (None, False, ["192.0.2.9"]),
    ],
)
def test_renamed_only_where_the_name_leads_astray(monkeypatch, renamed, own, several_nodes, names):
    monkeypatch.setattr(network, "address_of_own_name", lambda: own)
    network.make_own_name_lead_to("192.0.2.9", "eth0", several_nodes)
    assert renamed == names


def test_without_namespaces_the_line_to_correct_is_named(monkeypatch, renamed, capsys):
    def refuse(name):
        raise OSError("not permitted")

    monkeypatch.setattr(network, "take_hostname", refuse)
    monkeypatch.setattr(network, "address_of_own_name", lambda: "127.0.1.1")
    said = r"leads to 127\.0\.1\.1, not to 192\.0\.2\.9, .* /etc/hosts, or add `192\.0\.2\.9 "
    with pytest.raises(ValueError, match=said):
        network.make_own_name_lead_to("192.0.2.9", "eth0", True)
    monkeypatch.setattr(network, "address_of_own_name", lambda: "192.0.2.200")
    network.make_own_name_lead_to("192.0.2.9", "eth0", True)
    assert "leads to 192.0.2.200, not to 192.0.2.9 on eth0: part of the traffic" in (
        capsys.readouterr().err
    )


NAMELESS = 'hostname nowhere.invalid && exec "$@"'


def test_the_ranks_of_a_host_whose_name_leads_nowhere_have_one_namespace():
    """With one each, those of an ordinary user could not look into each other's /proc."""
    own = ["--map-root-user"] if os.geteuid() else []
    host = ["unshare", "--uts", *own, "sh", "-c", NAMELESS, "sh"]
    ranks = [sys.executable, "-m", "launch", "local", "-n", "2", "--", "sh", "-c"]
    command = [*host, *ranks, "hostname; readlink /proc/self/ns/uts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip("this system allows ordinary users no namespaces")
    said = {line.split("] ")[1] for line in done.stdout.splitlines()}
    assert len(said) == 2, done
    assert "127.0.0.1" in said
