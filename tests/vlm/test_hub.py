"""Is a model that nobody can fetch told of at once, and one that is here never asked for?"""

import socket

import pytest
from huggingface_hub import constants

from vlm import hub
from vlm.cli import main


@pytest.fixture
def tried(monkeypatch):
    """What was connected to; there is no network."""
    tried = []

    def connect(address, timeout):
        tried.append(address)
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


def test_no_network_is_told_in_one_sentence(tried, capsys):
    assert main(["chat", "nosuch/model", "--prompt", "hi"]) == 2
    told = capsys.readouterr()
    sentence = "vlm chat: nosuch/model is neither a folder here nor a model that can be fetched"
    assert told.err == f"{sentence} from the Hub\n" and not told.out
    assert tried == [("huggingface.co", 443)]


def test_what_is_here_or_behind_a_proxy_or_no_name_is_not_tried(tried, tmp_path, monkeypatch):
    cached = tmp_path / "models--some--model"
    for file, text in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(text)
    cache = hub.try_to_load_from_cache
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda name, file: cache(name, file, cache_dir=tmp_path)
    )
    hub.check_reach(tmp_path)
    hub.check_reach("some/model")
    hub.check_reach("runs/mine/model")  # which no model on the Hub is called
    assert not tried
    with pytest.raises(OSError, match="no route"):
        hub.check_reach("runs/model")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    hub.check_reach("runs/model")
    assert len(tried) == 1
