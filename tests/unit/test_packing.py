"""Images of another size in the rows of a batch."""

from __future__ import annotations

import pytest
import torch

from arf_plugin.data.batch import BatchLayout, DeviceConcat
from arf_plugin.data.packing import packed_rows, unpack


@pytest.mark.parametrize(
    ("count", "size", "rows"), [(4, 16, 1), (5, 16, 2), (3, 24, 2), (1, 8, 1), (7, 32, 7)]
)
def test_images_come_out_as_they_went_in(count, size, rows):
    large, small = torch.randn(6, 3, 32, 32), torch.randn(count, 3, size, size)
    joined = DeviceConcat(large, small).to(torch.float32)
    layout = BatchLayout(6, pairs=count, pair_rows=packed_rows(count, size, 32))
    assert joined.shape == (layout.rows, 3, 32, 32) and layout.rows == 6 + rows
    assert layout.images == 6 + count
    assert torch.equal(joined[:6], large)
    assert torch.equal(unpack(joined[6:], count, size), small)
