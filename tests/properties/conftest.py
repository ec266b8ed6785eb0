"""Profiles of the property tests: few and repeatable examples in every run of the tests, many and new ones to fuzz.

``ARF_FUZZ=N`` asks for N new examples of each property; scripts/fuzz.py sets it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("tests", derandomize=True, max_examples=25, database=None, **COMMON)
settings.register_profile("fuzz", max_examples=int(os.environ.get("ARF_FUZZ", "1000")), **COMMON)
settings.load_profile("fuzz" if "ARF_FUZZ" in os.environ else "tests")
