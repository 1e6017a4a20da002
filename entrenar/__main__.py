"""`python -m entrenar` is the same program as `entrenar`."""

from __future__ import annotations

from entrenar.cli import main

main()
