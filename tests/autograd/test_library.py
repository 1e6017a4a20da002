"""Loading the compiled kernels, and the choice of the CPU's instruction set."""

from __future__ import annotations

import pathlib

import pytest
import torch

import entrenar
from entrenar.autograd.ops import _library


@pytest.fixture(autouse=True)
def restored():
    before = entrenar.cpu_level()
    yield
    entrenar.set_cpu_level(before)


def test_every_level_up_to_the_machines_can_be_chosen(backend):
    if backend in _library.LEVELS:
        assert entrenar.cpu_level() == backend


def test_environment_chooses_when_the_kernels_are_loaded(monkeypatch):
    monkeypatch.setenv("ENTRENAR_CPU_LEVEL", "base")
    _library.load_kernels()
    assert entrenar.cpu_level() == "base"


def test_unknown_level_is_refused():
    before = entrenar.cpu_level()
    with pytest.raises(ValueError, match=r"unknown CPU level 'sse': choose one of base, avx2, avx512, amx$"):
        entrenar.set_cpu_level("sse")
    assert entrenar.cpu_level() == before


def test_level_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(_library, "LEVELS", (*_library.LEVELS, "avx1024"))
    before = entrenar.cpu_level()
    with pytest.raises(ValueError, match=r"^this machine has no avx1024$"):
        entrenar.set_cpu_level("avx1024")
    assert entrenar.cpu_level() == before


def test_missing_library_says_how_to_build(monkeypatch):
    monkeypatch.setattr(entrenar, "__path__", [])
    with pytest.raises(ImportError, match=r"^libentrenar_cpu\.so is missing: .*pip install --no-build-isolation -e \."):
        _library.load_kernels()


def test_cuda_library_is_loaded_where_torch_has_cuda(monkeypatch, tmp_path):
    cpu, cuda = tmp_path / "libentrenar_cpu.so", tmp_path / "libentrenar_cuda.so"
    cpu.touch()
    cuda.touch()
    monkeypatch.setattr(entrenar, "__path__", [str(tmp_path)])
    for version, expected in [(None, [cpu]), ("13.0", [cpu, cuda])]:
        loaded: list[pathlib.Path] = []
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        _library.load_kernels()
        assert loaded == expected


@pytest.fixture
def namespace(monkeypatch):
    """Have `define` and `load_kernels` see no operators but those of the test, which are gone at its end."""
    with torch.library._scoped_library("entrenar", "FRAGMENT") as library:
        monkeypatch.setattr(_library, "library", library)
        monkeypatch.setattr(_library, "_defined", [])
        yield library


def test_defined_op_has_a_fake_and_is_for_the_compiler(namespace):
    _library.define("doubled(Tensor x) -> Tensor", lambda x: x.new_empty(2 * x.shape[0]))
    assert torch.ops.entrenar.doubled(torch.ones(3, device="meta")).shape == (6,)
    assert torch.Tag.pt2_compliant_tag in torch.ops.entrenar.doubled.default.tags


def test_without_cuda_kernels_the_ops_say_how_to_build(namespace, monkeypatch):
    kernels = {"on_cpu": ["CPU"], "on_both": ["CPU", "CUDA"], "on_any": ["CompositeExplicitAutograd"]}
    for name, keys in kernels.items():
        _library.define(f"{name}(Tensor x) -> Tensor", torch.empty_like)
        for key in keys:
            namespace.impl(name, torch.neg, key)
    is_file = pathlib.Path.is_file
    monkeypatch.setattr(pathlib.Path, "is_file", lambda path: path.name != "libentrenar_cuda.so" and is_file(path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _library.load_kernels()

    x = torch.ones(2, device="cpu")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in ("on_both", "on_any"):
        assert getattr(torch.ops.entrenar, name).default.redispatch(cuda, x).tolist() == [-1, -1]
    assert torch.ops.entrenar.on_cpu(x).tolist() == [-1, -1]
    why = r"^the CUDA kernels were not compiled: install with nvcc on the PATH \(pip install --no-build-isolation -e \."
    with pytest.raises(NotImplementedError, match=why):
        torch.ops.entrenar.on_cpu.default.redispatch(cuda, x)
    other = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    with pytest.raises(NotImplementedError, match="Could not run 'entrenar::on_cpu'"):
        torch.ops.entrenar.on_cpu.default.redispatch(other, x)
