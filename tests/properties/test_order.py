"""Going on in the middle of an epoch gives what was left of it: for any workers, dropped samples, epochs and places."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data import image
from support.tars import write_tar

from arf_plugin.checks.inputs import Run
from arf_plugin.config import ArfConfig
from arf_plugin.data.loader import TrainingLoader, training_loader
from arf_plugin.resume.checkpoint import ResumePoint
from arf_plugin.resume.order import SampleOrder, ShardStream
from arf_plugin.resume.rng import preserved_rng

SHARDS, PER_SHARD, BATCH = 4, 6, 2


class Worker:
    """A worker's pipeline in this process: numbered raw samples, some of which cannot be decoded.

    Args:
        order: Of the stream; it thinks that it is in this worker.
        raw: Raw samples of a pass.
        dropped: Those that cannot be decoded.
    """

    def __init__(self, order: SampleOrder, raw: int, dropped: set[int]) -> None:
        self.order, self.raw, self.dropped = order, raw, dropped

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.order.begin()
        kept: list[tuple[int, float]] = []
        while True:
            samples = list(range(self.raw))
            self.order.shuffling().shuffle(samples)
            kept.clear()  # what fills no batch is left out at the end of a pass
            for number, sample in self.order.number(iter(samples)):
                drawn = torch.rand(()).item()  # as an augmentation draws
                if sample not in self.dropped:
                    kept.append((number, sample + drawn))
                if len(kept) == BATCH:
                    numbers, values = zip(*kept, strict=True)
                    yield {"index": torch.tensor(numbers), "image": torch.tensor(values)}
                    kept.clear()


class InTurn:
    """What a loader with several workers yields: their batches in turn."""

    def __init__(self, order: SampleOrder, workers: int, raw: int, dropped: set[int], batches: int) -> None:
        self.order, self.workers, self.raw = order, workers, raw
        self.dropped, self.batches = dropped, batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        streams = []
        for number in range(self.workers):
            order = copy.copy(self.order)
            order.worker = lambda number=number: number
            streams.append(iter(Worker(order, self.raw, self.dropped)))
        for batch in range(self.batches):
            yield next(streams[batch % self.workers])


@given(st.data())
def test_a_stream_goes_on_where_it_was(data):
    workers = data.draw(st.integers(1, 4), "workers")
    raw = data.draw(st.integers(2 * BATCH, 9), "raw samples of a pass")
    dropped = data.draw(st.sets(st.integers(0, raw - 1), max_size=raw - BATCH), "dropped")
    batches = workers * data.draw(st.integers(1, 6), "rounds")
    stop = data.draw(st.integers(0, batches), "stop")
    epoch = data.draw(st.integers(0, 3), "epoch")

    def stream() -> ShardStream:
        order = SampleOrder("task", 3, lambda: epoch, 0)
        return ShardStream(InTurn(order, workers, raw, dropped, batches), workers, order)

    whole, states = stream(), []
    whole.set_epoch(epoch)
    with preserved_rng():
        expected = []
        iterator = iter(whole)
        for _ in range(batches):
            states.append(whole.state_dict())
            expected.append(next(iterator)["image"].tolist())
        states.append(whole.state_dict())
    resumed = stream()
    resumed.load_state_dict(states[stop], epoch, stop)
    with preserved_rng():
        found = [batch["image"].tolist() for batch in resumed]
    assert found[: batches - stop] == expected[stop:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task tars and pair tars, each with a sample that cannot be decoded."""
    path = tmp_path_factory.mktemp("order")
    for name, offset in (("task", 0), ("pairs", 500)):
        (path / name).mkdir()
        for shard in range(SHARDS):
            members = {}
            for n in range(PER_SHARD):
                number = offset + PER_SHARD * shard + n
                broken = (shard, n) == (1, 2)
                members |= {
                    f"{n}.png": b"broken" if broken else image(number),
                    f"{n}.txt": f"text {number}".encode(),
                }
            write_tar(path / name / f"{shard}.tar", members)
    return path


def loader(folder, workers: int, every: int, accum_freq: int) -> TrainingLoader:
    """A deterministic loader of task data and pairs as a run has it."""
    args = SimpleNamespace(
        train_data=f"{folder}/task/{{0..{SHARDS - 1}}}.tar",
        **{"dataset_type": "webdataset", "train_num_samples": 16, "dataset_resampled": False},
        **{"train_data_upsampling_factors": None, "seed": 1, "batch_size": BATCH, "accum_freq": accum_freq},
        **{"rank": 0, "world_size": 1, "distributed": False},
    )
    return training_loader(
        args,
        ArfConfig(anchors=str(folder), deterministic=True, every=every),
        Run(BATCH, task_workers=workers, pair_workers=workers, pair_batch=BATCH),
        (lambda picture: torch.tensor(picture.getpixel((3, 4))).float() + torch.rand(3), None),
        lambda texts: torch.tensor(
            [[int(t.split()[1])] for t in ([texts] if isinstance(texts, str) else texts)]
        ),
    )


def tensors(batch: Any) -> list[Any]:
    return [part.to("cpu").tolist() for part in batch]


@settings(max_examples=8)
@given(
    st.sampled_from([0, 1, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.integers(0, 1),
    st.integers(0, 4),
)
def test_seek_equals_skip(folder, workers, every, accum_freq, epoch, steps):
    """The real loaders with their workers; torch's own random numbers at the same place, too."""
    whole, stop = loader(folder, workers, every, accum_freq), accum_freq * (steps // accum_freq)
    states: dict[int, Any] = {0: None}
    whole.after_batch.append(lambda batches: states.update({batches: whole.state_dict()}))
    with preserved_rng():
        for each in range(epoch + 1):
            whole.set_epoch(each)
            expected = []
            for batch in whole:
                expected.append((tensors(batch), torch.rand(()).item()))  # as a model draws
    resumed = loader(folder, workers, every, accum_freq)
    resumed.resume = ResumePoint(epoch, stop, states[stop])
    with preserved_rng():
        resumed.set_epoch(epoch)
        found = [(tensors(batch), torch.rand(()).item()) for batch in resumed]
    assert len(expected) == 8 and found == expected[stop:]
