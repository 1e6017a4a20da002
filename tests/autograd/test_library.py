"""Loading the compiled kernels, and the choice of the CPU's instruction set."""

from __future__ import annotations

import pytest

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
    with pytest.raises(ValueError, match="unknown CPU level 'sse': choose one of base, avx2, avx512"):
        entrenar.set_cpu_level("sse")
    assert entrenar.cpu_level() == before


def test_level_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(_library, "LEVELS", (*_library.LEVELS, "avx1024"))
    before = entrenar.cpu_level()
    with pytest.raises(ValueError, match="this machine has no avx1024"):
        entrenar.set_cpu_level("avx1024")
    assert entrenar.cpu_level() == before


def test_missing_library_says_how_to_build(monkeypatch):
    monkeypatch.setattr(entrenar, "__path__", [])
    with pytest.raises(ImportError, match=r"^libentrenar_cpu\.so is missing: .*pip install --no-build-isolation -e \."):
        _library.load_kernels()
