import getpass
import json
import platform

import torch

from secateur.evaluate import Measurement, hardware


def test_the_machine_is_described_without_paths_users_or_hosts():
    found = hardware()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert found["cpu"]
    assert "accelerator" not in found
    text = json.dumps(found).replace("\\/", "/")
    assert "/" not in text.replace(str(found["cpu"]), "")
    host = platform.node()
    assert not host or host not in text
    assert getpass.getuser() not in (str(value) for value in found.values())
    assert Measurement("x", 1, "1", found).conditions == found


def test_another_device_is_named():
    assert hardware("mps")["accelerator"] == "mps"
    assert "accelerator" not in hardware(torch.device("meta"))


def test_a_system_without_proc_is_described_too(monkeypatch, tmp_path):
    monkeypatch.setattr("secateur.evaluate.machine.Path", lambda name: tmp_path / "missing")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "z80")
    assert hardware()["cpu"] == "z80"
