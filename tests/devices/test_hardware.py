"""Devices without torch: a stand-in `nvidia-smi` on PATH, or none."""

import os

import pytest

from opd_mcp.devices import hardware as devices
from opd_mcp.devices.hardware import gpus, parse_gpus, target_of
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import RuntimeRecipe

ANSWER = "GPU-1a, NVIDIA H200, 143771, 143000\nGPU-2b, NVIDIA H200, 143771, 1000\n"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """`tool(script)`: puts an executable `nvidia-smi` on PATH, with a torch that could use its GPUs."""

    def install(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(devices, "version", lambda name: "2.13.0")

    return install


def test_gpus_are_what_the_driver_lists(tool):
    tool(f"printf '{ANSWER}'".replace("\n", "\\n"))
    assert [(gpu.uuid, gpu.free_memory >> 20) for gpu in gpus()] == [("GPU-1a", 143000), ("GPU-2b", 1000)]
    target = target_of(RuntimeRecipe())
    assert (target.kind, target.memory) == ("cuda", 143000 << 20)


def test_the_capacity_is_all_memory_of_the_smallest_gpu_whatever_is_free(tool):
    tool(f"printf '{ANSWER}GPU-3c, NVIDIA H100, 81559, 5\n'".replace("\n", "\\n"))
    assert target_of(RuntimeRecipe()).capacity == 81559 << 20


def test_the_capacity_of_the_cpu_is_the_container_s_limit(monkeypatch):
    monkeypatch.setattr(devices, "container_limit", lambda: 1 << 30)
    assert target_of(RuntimeRecipe(device="cpu")).capacity == 1 << 30
    monkeypatch.setattr(devices, "container_limit", lambda: None)
    assert target_of(RuntimeRecipe(device="cpu")).capacity > 1 << 30


def test_a_leased_gpu_counts_as_free_for_whoever_comes_after_its_holder(tool):
    tool(f"printf '{ANSWER}'".replace("\n", "\\n"))
    assert target_of(RuntimeRecipe(), lambda slots: ["gpu-GPU-2b"]).memory == 143771 << 20


def test_several_gpus_have_the_memory_of_the_fullest_that_is_taken(tool):
    tool(f"printf '{ANSWER}'".replace("\n", "\\n"))
    both = target_of(RuntimeRecipe(devices="all"))
    assert (both.devices, both.memory, both.name) == (2, 1000 << 20, "each of 2 x NVIDIA H200")
    with pytest.raises(ResourceError, match="asks for 3 GPUs, and 2 are visible"):
        target_of(RuntimeRecipe(devices=3))
    assert target_of(RuntimeRecipe(device="cpu", devices=3)).devices == 3


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo 'GPU-1, X, [N/A], [N/A]'"])
def test_a_driver_that_does_not_answer_means_no_gpu(tool, script):
    tool(script)
    assert gpus() == []
    assert target_of(RuntimeRecipe()).kind == "cpu"


def test_a_driver_that_hangs_is_left_alone(tool, monkeypatch):
    monkeypatch.setattr(devices, "NVIDIA_SMI_SECONDS", 0.2)
    tool("exec sleep 30")
    assert gpus() == []


def test_a_cpu_build_of_torch_uses_no_gpu(tool, monkeypatch):
    tool(f"printf '{ANSWER}'".replace("\n", "\\n"))
    monkeypatch.setattr(devices, "version", lambda name: "2.13.0+cpu")
    assert gpus() == []


def test_asking_for_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError, match=r"device_unavailable.*'auto'"):
        target_of(RuntimeRecipe(device="cuda"))


def test_lines_of_another_form_are_left_out():
    assert parse_gpus("\nweird\nGPU-1, X, 10, 5, 3\n") == []
