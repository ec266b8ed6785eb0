"""Fixtures of the tests that run whole commands."""

from support.building_fixtures import arf, inputs  # noqa: F401 - pytest finds fixtures here
