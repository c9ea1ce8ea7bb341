"""Where settings come from, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmubusd.rpc.config import ConfigError, Settings, default_socket, is_public, load


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MMUBUS_"):
            monkeypatch.delenv(name)


def test_default_is_this_users_socket_and_loopback() -> None:
    settings = load()
    assert settings.listen == (default_socket(), "127.0.0.1:50551")
    assert not any(map(is_public, settings.listen))


def test_flags_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mmubus.toml"
    file.write_text('lease_s = 1.5\ngrace_s = 2.5\ndrain_s = 3.5\nlisten = ["127.0.0.1:0"]\n')
    monkeypatch.setenv("MMUBUS_GRACE_S", "20")
    monkeypatch.setenv("MMUBUS_DRAIN_S", "30")
    settings = load(["--config", str(file), "--drain-s", "300"])
    assert (settings.lease_s, settings.grace_s, settings.drain_s) == (1.5, 20, 300)
    assert settings.listen == ("127.0.0.1:0",)


def test_file_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mmubus.toml"
    file.write_text("lease_s = 1.5\n")
    monkeypatch.setenv("MMUBUS_CONFIG", str(file))
    assert load().lease_s == 1.5


@pytest.mark.parametrize(
    "argv", [["--listen", "127.0.0.1:0,unix:/tmp/x"], ["--listen", "127.0.0.1:0", "--listen", "unix:/tmp/x"]]
)
def test_several_addresses(argv: list[str]) -> None:
    assert load(argv).listen == ("127.0.0.1:0", "unix:/tmp/x")


def test_addresses_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMUBUS_LISTEN", "127.0.0.1:0, unix:/tmp/x")
    assert load().listen == ("127.0.0.1:0", "unix:/tmp/x")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--listen", "nowhere"], "host:port"),
        (["--listen", "unix:relative"], "unix:/absolute/path"),
        (["--listen", "localhost:70000"], "0 to 65535"),
        (["--listen", ""], "listen"),
        (["--frames-nr", "many"], "frames_nr"),
        (["--frames-nr", "0"], "frames_nr"),
        (["--ack-budget-s", "100"], "ack_budget_max_s"),
        (["--ack-budget-s", "-1"], "ack_budget_s"),
        (["--lease-s", "nan"], "lease_s"),
        (["--config", "/nowhere/at/all"], "there is no file"),
        (["--listen", "0.0.0.0:0"], "no TLS"),
        (["--listen", "[::]:0"], "no TLS"),
        (["--listen", "somewhere.example:0"], "no TLS"),
    ],
)
def test_refused(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_option_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mmubus.toml"
    file.write_text("frames = 3\n")
    with pytest.raises(ConfigError, match="frames"):
        load(["--config", str(file)])


def test_broken_file(tmp_path: Path) -> None:
    file = tmp_path / "mmubus.toml"
    file.write_text("frames_nr = \n")
    with pytest.raises(ConfigError):
        load(["--config", str(file)])


def test_public_when_asked_for_by_name() -> None:
    assert load(["--listen", "0.0.0.0:0", "--insecure-public"]).listen == ("0.0.0.0:0",)


@pytest.mark.parametrize(
    ("address", "public"),
    [("unix:/x", False), ("localhost:1", False), ("127.0.0.2:1", False), ("[::1]:1", False), ("10.0.0.1:1", True)],
)
def test_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
