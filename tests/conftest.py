"""Which tests are slow, which files come first, and the folder that all processes of a run share."""

import gc
import os
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

LONGEST = (
    *("test_compiled", "test_smollm2", "test_training", "test_causal", "test_families", "test_results"),
    *("test_explorer_pages", "test_gap_map", "test_threads", "test_generation", "test_pieces", "test_hooked"),
    *("test_cases", "test_cases_models", "test_graft", "test_hostile_training", "test_hostile_cli"),
)

DEAR = {"smollm2", "browser", "done", "shipped", "forked", "figures"}
"""Fixtures that read a large model, start a browser, train suites of runs or compile: what asks for one is slow."""


def pytest_configure(config: pytest.Config) -> None:
    """A folder that all processes of a run share, gone when it ends."""
    if not hasattr(config, "workerinput"):
        shared = tempfile.TemporaryDirectory(prefix="lens-positions-tests-")
        os.environ["LENS_POSITIONS_TESTS"] = shared.name  # processes started later inherit it
        config.add_cleanup(shared.cleanup)

    # What a shell runs in the background ignores Ctrl+C, and so does all that it starts; tests send it to commands.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Where workers run the tests, the process that hands them out has no use for the models: ten seconds of imports.
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tiny_models")


def pytest_collection_finish() -> None:
    """Leave the objects of the libraries out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest looks at `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that two processes end together; what is slow is marked as slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one_test in cases.values():
        n = len(of_one_test)
        for i, item in enumerate(of_one_test):
            many = i not in (0, n // 2)  # of sources in their usual order: a static and a learned one
            if many or DEAR.intersection(getattr(item, "fixturenames", ())):
                item.add_marker("slow")

    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
