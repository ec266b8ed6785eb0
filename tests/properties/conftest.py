"""Profiles of the property tests: few and repeatable examples in every run of the tests, many and new ones to fuzz.

``ARF_FUZZ=N`` asks for N new examples of each property; scripts/fuzz.py sets it, and has them counted in the file that
``ARF_FUZZ_COUNTS`` names, one line of JSON per property.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("tests", derandomize=True, max_examples=15, database=None, **COMMON)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("ARF_FUZZ", "1000")), database=None, **COMMON
)
settings.load_profile("fuzz" if "ARF_FUZZ" in os.environ else "tests")


def pytest_collection_modifyitems(items):
    """While fuzzing, tests of single examples beside the properties are left out."""
    if "ARF_FUZZ" in os.environ:
        items[:] = [item for item in items if getattr(getattr(item, "obj", None), "hypothesis", None)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Counts the calls of a property's own function, shrinking included."""
    file = os.environ.get("ARF_FUZZ_COUNTS")
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if not file or handle is None:
        return (yield)
    count, inner, started = 0, handle.inner_test, time.monotonic()

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return inner(*args, **kwargs)

    handle.inner_test = counted
    try:
        return (yield)
    finally:
        handle.inner_test = inner
        line = {"property": item.nodeid, "examples": count, "seconds": time.monotonic() - started}
        with Path(file).open("a", encoding="utf-8") as counts:
            counts.write(json.dumps(line) + "\n")
