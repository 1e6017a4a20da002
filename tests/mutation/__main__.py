"""Mutation testing in a time box: `python tests/mutation entrenar/optim entrenar/lora --minutes 20`.

Each mutant runs in a fork of this process, which has imported torch and the peers but nothing of the package. There an
import hook gives the tests the mutant in place of its file, which stays as it is, and an editable install makes no
difference. A mutant meets the tests that reach its statement (one that runs at import: those that reach the file), the
fastest file of tests first, until one fails. Mutants come in a seeded random order; each file gets a share of the time
that goes with its number of mutants.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import itertools
import json
import math
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import pytest
from mutants import Mutant, mutants
from report import render

RESULTS = Path("benchmarks/results/mutants.json")
REPORT = RESULTS.with_suffix(".md")
JUDGED = Path(__file__).with_name("judged.json")
# The tests of each folder's files; of folders within one another the inner one comes first.
TESTS = {
    "entrenar/optim": ["tests/optim"],
    "entrenar/lora": ["tests/lora"],
    "entrenar/fusion": ["tests/fusion"],
    "entrenar/autograd/ops": ["tests/autograd"],
    "entrenar/autograd": [
        "tests/autograd/test_gradcheck.py",
        "tests/autograd/test_gradcheck_settings.py",
        "tests/autograd/test_recompute.py",
        "tests/autograd/test_route.py",
        "tests/autograd/test_tape.py",
        "tests/autograd/test_tape_export.py",
        "tests/autograd/test_tape_text.py",
        "tests/autograd/test_tensor.py",
        "tests/autograd/test_walk.py",
    ],
}
PRELOAD = (
    "torch._dynamo",
    "torch.testing._internal.common_methods_invocations",
    "hypothesis.extra.numpy",
    "matplotlib.backends.backend_agg",
    "peft",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
)
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"
POLL = 0.005  # seconds
# No test is collected from a file where the mutant gives all of them other names.
NONE_FAILED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
BROKEN = 70  # the exit status of a fork in which this program failed, and not a test


class Finder:
    """Has the import system find the module `name` in another file."""

    def __init__(self, name: str, original: Path, mutant: Path) -> None:
        self.name, self.mutant = name, mutant
        self.package = [str(original.parent.absolute())] if original.name == "__init__.py" else None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return spec_from_file_location(name, self.mutant, submodule_search_locations=self.package)


class Selection:
    """A pytest plugin that runs the tests named, in that order."""

    def __init__(self, names: list[str]) -> None:
        self.order = {name: i for i, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])


class Reach:
    """A pytest plugin that finds which lines each test reaches, and how long each takes."""

    def __init__(self) -> None:
        self.coverage = coverage.Coverage(
            data_file=None, include=[f"{folder}/*" for folder in TESTS], config_file=False
        )
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - start
        return result

    def lines(self) -> dict[str, dict[int, list[str]]]:
        data = self.coverage.get_data()
        return {path: data.contexts_by_lineno(path) for path in data.measured_files()}


def forked(task: Callable[[], Any], limit: float) -> Any:
    """What `task` returns in a fork of this process; None if it dies there, and TIMEOUT if it takes too long."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer"
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                silence = os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
                os.environ["TMPDIR"] = tempfile.tempdir = scratch
                answer.write_bytes(pickle.dumps(task()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(BROKEN)
        left = limit
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if left < 0:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return TIMEOUT
            time.sleep(POLL)
            left -= POLL  # not by the clock, which runs on while this program is stopped
        if os.waitstatus_to_exitcode(ended[1]) == BROKEN:
            raise SystemExit("this program failed in its fork; MUTATION_LOG=<file> says how")
        return pickle.loads(answer.read_bytes()) if answer.exists() else None


def run_pytest(arguments: list[str], plugin: object) -> int:
    # pytest's own plugins are imported before it could rewrite their assertions.
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


def file_of(test: str) -> str:
    return test.partition("::")[0]


@functools.cache
def baseline(*tests: str) -> tuple[dict[str, dict[int, list[str]]], dict[str, float]]:
    """For each file the tests that reach each line ("" is the import), and every test's seconds, without a mutant."""

    def task() -> Any:
        reach = Reach()
        reach.coverage.start()
        code = run_pytest([*tests], reach)
        reach.coverage.stop()
        return code, reach.lines(), reach.seconds

    answer = forked(task, 1200)
    if not isinstance(answer, tuple) or answer[0]:
        raise SystemExit(f"{' '.join(tests)} fails before anything is changed")
    return answer[1:]


def outcome(path: Path, mutant: Mutant, names: list[str], limit: float) -> str:
    """Runs the tests named on the mutant; those of a file stand together."""
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")

    def task() -> Any:
        if "entrenar" in sys.modules:
            raise RuntimeError("the package is imported already")
        copy = Path(tempfile.gettempdir()) / path.name
        copy.write_text(mutant.source, encoding="utf-8")
        sys.meta_path.insert(0, Finder(module, path, copy))  # type: ignore[arg-type]
        for tests, selected in itertools.groupby(names, key=file_of):
            if run_pytest([tests], Selection([*selected])) not in NONE_FAILED:
                return KILLED
        if sys.modules[module].__file__ != str(copy):
            raise ImportError(f"{module} was not imported from the mutant")
        return SURVIVED

    return forked(task, limit) or KILLED


def examine(path: Path, share: float, seed: int, only: set[tuple[str, str]] | None) -> dict[str, Any]:
    """Runs the mutants of one file (or those in `only`) in a seeded order, for `share` seconds times their number."""
    source = path.read_text(encoding="utf-8")
    everything = mutants(source)
    chosen = [m for m in everything if only is None or (m.before, m.after) in only]
    random.Random(f"{seed} {path}").shuffle(chosen)
    tests = next(tests for folder, tests in TESTS.items() if path.is_relative_to(folder))
    files, seconds = baseline(*tests)
    reached = files.get(str(path.absolute()), {})
    elsewhere = {name for line in reached.values() for name in line} - {""}
    if outcome(path, Mutant(source, "", "", range(0)), [min(seconds, key=seconds.__getitem__)], 60) != SURVIVED:
        raise SystemExit(f"{path} does not pass its tests through the import hook")
    counts, survivors = {KILLED: 0, SURVIVED: 0, TIMEOUT: 0}, []
    deadline = time.monotonic() + share * len(everything)
    for mutant in chosen:
        if time.monotonic() > deadline:
            break
        names = {name for line in mutant.lines for name in reached.get(line, [])}
        if "" in names or not names:  # it runs at import, or in what torch.compile traces, which coverage does not see
            names = elsewhere or {*seconds}
        whole: dict[str, float] = defaultdict(float)
        for name in names:
            whole[file_of(name)] += seconds[name]
        names = sorted(names, key=lambda name: (whole[file_of(name)], file_of(name), seconds[name]))
        limit = 20 + 5 * sum(seconds[name] for name in names)
        result = outcome(path, mutant, names, limit) if names else SURVIVED
        counts[result] += 1
        if result == SURVIVED:
            survivors.append({"line": mutant.lines.start, "before": mutant.before, "after": mutant.after})
    survivors.sort(key=lambda survivor: survivor["line"])
    return {"mutants": len(everything), **counts, "survivors": survivors}


def again(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Runs the survivors of an earlier run only: those that die now are moved to the killed.

    Those whose line has changed since are dropped.
    """
    there = {(mutant.before, mutant.after) for mutant in mutants(path.read_text(encoding="utf-8"))}
    left = [(s["before"], s["after"]) for s in known["survivors"] if (s["before"], s["after"]) in there]
    fresh = examine(path, math.inf, 0, {*left})
    died = len(left) - fresh[SURVIVED]
    return {**known, KILLED: known[KILLED] + died, SURVIVED: fresh[SURVIVED], "survivors": fresh["survivors"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="Python files, or folders of them, of the package")
    parser.add_argument("--minutes", type=float, default=20, help="the time for all mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which mutants come")
    parser.add_argument("--again", action="store_true", help="run only the survivors in the results")
    arguments = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    hypothesis.settings.register_profile("mutation", derandomize=True, max_examples=20, deadline=None, database=None)
    hypothesis.settings.load_profile("mutation")
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        for name in PRELOAD:
            importlib.import_module(name)
    gc.freeze()  # pytest collects garbage at its end: not what every fork has in common

    files = [file for path in arguments.paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    numbers = {file: len(mutants(file.read_text(encoding="utf-8"))) for file in files}
    files = [file for file in files if numbers[file]]
    share = 60 * arguments.minutes / sum(numbers.values())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for file in files:
        if arguments.again:
            if str(file) not in results:
                continue
            results[str(file)] = again(file, results[str(file)])
        else:
            results[str(file)] = examine(file, share, arguments.seed, None)
        row = results[str(file)]
        run = row[KILLED] + row[TIMEOUT] + row[SURVIVED]
        print(f"{file}: {run} of {row['mutants']} mutants run, {row[SURVIVED]} survive", flush=True)
        results = dict(sorted(results.items()))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        REPORT.write_text(render(results, JUDGED), encoding="utf-8")


if __name__ == "__main__":
    main()
