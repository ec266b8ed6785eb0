"""Every row of the table against the installed open_clip, generated from the table itself."""

from __future__ import annotations

import importlib
import inspect

import pytest

from arf_plugin.hooks.engine import Engine
from arf_plugin.hooks.table import PACKAGE, ROWS
from arf_plugin.hooks.versions import upstream_version


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row_fits_the_installed_release(row):
    assert Engine(PACKAGE).check(row, upstream_version()) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_wrapper_exists_and_takes_the_original(row):
    module, name = row.wrapper.split(":")
    wrapper = getattr(importlib.import_module(module), name)
    assert len(inspect.signature(wrapper).parameters) == (1 if row.when == "start-up" else 2)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
@pytest.mark.parametrize("version", ["2.24.0", "2.28.0", "4.0.0"])
def test_row_refuses_other_releases(row, version):
    problem = Engine(PACKAGE).check(row, version)
    assert problem is not None and f"{PACKAGE} {version} is installed" in problem and row.versions in problem


def test_ids_are_unique():
    assert len({row.id for row in ROWS}) == len(ROWS)
