"""How commands explain themselves, and how they end when something is wrong."""

import json
import re
import socket
from pathlib import Path

import pytest
from mmubus.cli import main
from mmubus.errors import ConnectionLost

COMMANDS = [
    ["demo"],
    ["replay"],
    ["record"],
    ["mm", "list"],
    ["mm", "maps"],
    ["mm", "pagemap"],
    ["mm", "grants"],
    ["mm", "grant"],
    ["mm", "revoke"],
    ["whoami"],
    ["sessions"],
    ["rounds"],
    ["stats"],
    ["top"],
    ["page"],
    ["console"],
    ["version"],
]


def plain(text: str) -> str:
    """Without colours and frames."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*command, "--help"]) == 0
    out = plain(capsys.readouterr().out)
    assert "Example:" in out
    assert f"mmubus {' '.join(command)}" in out.split("Example:")[1]


def test_help_is_laid_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Whatever the width, a line ends where it is full; brackets are no markup; examples stand at a prompt."""
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["console", "--help"]) == 0
    out = plain(capsys.readouterr().out)
    assert "what this client may see of the server" in out
    assert "Needs the extra [console]." in out
    assert "$ mmubus console --server" in out


def test_serve_shows_the_server_s_own_options(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--help"]) == 0
    out = plain(capsys.readouterr().out)
    assert "Example:" in out
    for option in ("--listen", "--frames-nr", "--ack-budget-s", "--lease-s", "--grace-s", "--config"):
        assert option in out


def test_no_command_shows_all_of_them(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    out = plain(capsys.readouterr().out)
    for name in ("serve", "demo", "replay", "record", "mm", "sessions", "rounds", "stats", "top", "console", "version"):
        assert name in out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contract"] == 1


@pytest.fixture
def nobody(tmp_path: Path) -> str:
    """An address where no server is."""
    return f"unix:{tmp_path}/nobody.sock"


@pytest.mark.parametrize(
    "command", [["mm", "list"], ["mm", "maps", "1"], ["sessions"], ["rounds"], ["stats"]], ids=" ".join
)
def test_no_server_is_one_line_and_1(command: list[str], nobody: str, capsys: pytest.CaptureFixture[str]):
    assert main([*command, "--server", nobody]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmubus: ")
    assert len(err.splitlines()) == 1


def test_the_address_comes_from_the_environment(
    nobody: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MMUBUS_ADDRESS", nobody)
    assert main(["stats"]) == 1
    assert "nobody.sock" in capsys.readouterr().err


def test_whoever_asks_gets_the_whole_story(nobody: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MMUBUS_DEBUG", "1")
    with pytest.raises(ConnectionLost):
        main(["stats", "--server", nobody])


@pytest.mark.parametrize(
    "command",
    [["dance"], ["mm"], ["mm", "maps"], ["mm", "maps", "three"], ["mm", "pagemap", "1", "--start", "x"], ["replay"],
     ["replay", "x", "--drivers", "-1"], ["demo", "--drivers", "x"], ["demo", "--drivers", ","],
     ["rounds", "--ended", "-1"], ["stats", "--nonsense"], ["record"]],
    ids=" ".join,
)  # fmt: skip
def test_misuse_is_2(command: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(command) == 2
    capsys.readouterr()


def test_an_option_of_the_server_that_is_wrong_is_2(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--frames-nr", "-5"]) == 2
    assert "frames" in capsys.readouterr().err


def test_a_program_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["record", "-o", str(tmp_path / "x.gz"), "--", "no-such-program-at-all"]) == 1
    assert "mmubus: " in capsys.readouterr().err
    assert not (tmp_path / "x.gz").exists()


def test_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--listen", f"127.0.0.1:{taken.getsockname()[1]}", "--log-level", "error"]) == 1
