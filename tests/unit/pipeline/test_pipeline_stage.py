"""The stage skeleton: resuming, refusing, rejecting, sharing the work.

One module, because all of it uses the same two small stages.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.building import folder_bytes

from arf_plugin.errors import PoolError, StageError
from arf_plugin.files import replacing
from arf_plugin.pipeline import bookkeeping
from arf_plugin.pipeline.bookkeeping import Bookkeeping, differences
from arf_plugin.pipeline.execution import Execution, ranks
from arf_plugin.pipeline.runner import describe, run_stage
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.untrusted import printable


class Doubling(Stage):
    """Writes the doubles of the numbers of each shard; rejects negative ones."""

    name = "doubling"
    unit = "numbers"

    def __init__(
        self, out: Path, shards: list[list[int]], factor: int = 2, fail_at: int | None = None
    ) -> None:
        super().__init__(out)
        self.shards, self.factor, self.fail_at = shards, factor, fail_at
        self.processed: list[int] = []

    def config(self) -> dict[str, Any]:
        return {"settings": {"factor": self.factor}, "numbers": self.shards}

    def plan(self) -> list[Shard]:
        return [Shard(i, f"{i:05d}", numbers, len(numbers)) for i, numbers in enumerate(self.shards)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        return [self.out / "doubles" / f"{shard.name}.json" for shard in shards]

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        self.processed.append(shard.index)
        outcome, doubles = Outcome(), []
        with replacing(self.artifacts([shard])[0]) as path:
            for number in shard.source:
                outcome.samples += 1
                if number < 0:
                    outcome.reject(str(number), "is negative")
                    continue
                outcome.kept += 1
                doubles.append(self.factor * number)
            path.write_text(json.dumps(doubles))
            if shard.index == self.fail_at:
                raise KeyboardInterrupt
            advance(len(shard.source))
        return outcome

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        return {"sum": sum(sum(json.loads(path.read_text())) for path in self.artifacts(shards))}


NUMBERS = [[1, 2], [3, 4], [5], [6, 7]]


def test_a_stage_writes_artifacts_and_a_summary(tmp_path: Path):
    summary = run_stage(Doubling(tmp_path, NUMBERS))
    assert summary["finished"] and summary["sum"] == 56
    assert (summary["samples"], summary["kept"], summary["rejected"]) == (7, 7, 0)
    assert json.loads((tmp_path / "doubles/00001.json").read_text()) == [6, 8]


def test_an_interrupted_stage_resumes_and_ends_with_the_same_bytes(tmp_path: Path):
    run_stage(Doubling(tmp_path / "whole", NUMBERS))
    with pytest.raises(KeyboardInterrupt):
        run_stage(Doubling(tmp_path / "cut", NUMBERS, fail_at=2))
    assert not (tmp_path / "cut/doubles/00002.json").exists()
    resumed = Doubling(tmp_path / "cut", NUMBERS)
    summary = run_stage(resumed)
    assert resumed.processed == [2, 3]
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "whole")
    again = Doubling(tmp_path / "cut", NUMBERS)
    assert run_stage(again) == summary
    assert again.processed == []


def test_a_lost_artifact_is_made_again(tmp_path: Path):
    run_stage(Doubling(tmp_path, NUMBERS))
    (tmp_path / "doubles/00001.json").unlink()
    stage = Doubling(tmp_path, NUMBERS)
    assert run_stage(stage)["sum"] == 56
    assert stage.processed == [1]


def test_what_killed_processes_leave_behind_is_removed(tmp_path: Path):
    (tmp_path / "doubles").mkdir()
    (tmp_path / "doubles/.incomplete-1-00000.json").write_text("[")
    run_stage(Doubling(tmp_path, NUMBERS))
    assert sorted(p.name for p in (tmp_path / "doubles").iterdir()) == [f"{i:05d}.json" for i in range(4)]


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path: Path):
    run_stage(Doubling(tmp_path, NUMBERS))
    with pytest.raises(StageError) as caught:
        run_stage(Doubling(tmp_path, NUMBERS, factor=3))
    assert "settings.factor: 2 -> 3" in str(caught.value) and "--restart" in str(caught.value)


def test_restart_leaves_nothing_of_the_earlier_run(tmp_path: Path):
    run_stage(Doubling(tmp_path / "a", NUMBERS))
    run_stage(Doubling(tmp_path / "a", NUMBERS[:2], factor=3), Execution(restart=True))
    run_stage(Doubling(tmp_path / "b", NUMBERS[:2], factor=3))
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_restart_with_several_ranks_is_refused(tmp_path: Path):
    with pytest.raises(StageError, match="--restart with 2 ranks"):
        run_stage(Doubling(tmp_path, NUMBERS), Execution(restart=True, world=2))


def test_rejects_are_listed_and_too_many_stop_the_run(tmp_path: Path):
    numbers = [[1, -2], [3, 4]]
    with pytest.raises(StageError, match=r"rejected 1 of 4 samples \(25\.0%\).*\n  -2: is negative"):
        run_stage(Doubling(tmp_path, numbers))
    stage = Doubling(tmp_path, numbers)
    summary = run_stage(stage, Execution(max_bad_fraction=0.3))
    assert (summary["rejected"], summary["kept"]) == (1, 3)
    assert stage.processed == []
    lines = (tmp_path / "work/doubling/rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"shard": "00000", "id": "-2", "reason": "is negative"}]


def test_a_broken_run_stops_early(tmp_path: Path):
    stage = Doubling(tmp_path, [[-1] * 600, [-1] * 600, [1] * 600])
    with pytest.raises(StageError, match="max-bad-fraction"):
        run_stage(stage)
    assert stage.processed == [0, 1]


def test_a_damaged_shard_is_named_after_the_others_are_done(tmp_path: Path):
    class Damaged(Doubling):
        def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
            if shard.index == 1:
                raise PoolError("pool-01.tar is cut off")
            return super().process(shard, execution, advance)

    stage = Damaged(tmp_path, NUMBERS)
    with pytest.raises(StageError, match=r"1 of 4 shards could not be processed.*\npool-01\.tar is cut off"):
        run_stage(stage)
    assert stage.processed == [0, 2, 3]
    mended = Doubling(tmp_path, NUMBERS)
    assert run_stage(mended)["sum"] == 56
    assert mended.processed == [1]


def test_ranks_share_the_shards_and_the_last_one_finalizes(tmp_path: Path):
    run_stage(Doubling(tmp_path / "one", NUMBERS))
    first = run_stage(Doubling(tmp_path / "two", NUMBERS), Execution(rank=0, world=2))
    assert not first["finished"] and first["shards_missing"] == 2
    second = run_stage(Doubling(tmp_path / "two", NUMBERS), Execution(rank=1, world=2))
    assert second["finished"]
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")


def test_a_rank_that_is_slow_to_start_leaves_the_work_of_the_others(tmp_path: Path, monkeypatch):
    """Two ranks find an empty folder; one of them is held up for as long as the other needs for all its shards."""
    clear, starting = Bookkeeping.clear, threading.Event()

    def slow_clear(book: Bookkeeping) -> None:
        if threading.current_thread() is slow:
            starting.set()
            time.sleep(0.5)
        clear(book)

    monkeypatch.setattr(Bookkeeping, "clear", slow_clear)
    share = (Doubling(tmp_path, NUMBERS), Execution(rank=0, world=2))
    slow = threading.Thread(target=run_stage, args=share)
    slow.start()
    assert starting.wait(10)
    run_stage(Doubling(tmp_path, NUMBERS), Execution(rank=1, world=2))
    slow.join()
    assert len(list((tmp_path / "work/doubling/done").iterdir())) == len(NUMBERS)
    assert (tmp_path / "work/doubling/finished.json").exists()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StageError, match="cannot go on"):
        run_stage(Doubling(tmp_path / "out", NUMBERS))


class PerShard(Doubling):
    """Its configuration has an entry per shard."""

    shard_inputs = "inputs"


def test_inputs_of_shards_that_are_still_to_do_may_change(tmp_path: Path):
    """As when a damaged tar is replaced; those of finished shards may not."""

    def stage(*versions: int) -> PerShard:
        built = PerShard(tmp_path, NUMBERS)
        settings = built.config()
        built.config = lambda: settings | {"inputs": list(versions)}  # type: ignore[method-assign]
        return built

    assert len(NUMBERS) == 4
    run_stage(stage(0, 0, 0, 0), Execution(rank=0, world=2))  # does shards 0 and 2
    with pytest.raises(StageError, match=r"inputs\[2\]: 0 -> 7"):
        run_stage(stage(0, 0, 7, 0), Execution(rank=1, world=2))
    assert run_stage(stage(0, 7, 0, 7), Execution(rank=1, world=2))["finished"]
    with pytest.raises(StageError, match=r"inputs\[1\]: 7 -> 0"):
        run_stage(stage(0, 0, 0, 7))


class Content(Doubling):
    """Its inputs have a time, which may change, and a content, which may not."""

    shard_inputs = "inputs"

    def __init__(self, out: Path, times: list[Any], contents: str = "abcd") -> None:
        super().__init__(out, NUMBERS)
        self.times, self.contents = times, contents

    def config(self) -> dict[str, Any]:
        return {"factor": 2, "inputs": self.times}

    def input_digest(self, shard: Shard) -> str | None:
        return self.contents[shard.index]


def test_inputs_of_finished_shards_may_be_touched_but_not_changed(tmp_path: Path):
    run_stage(Content(tmp_path, [0, 0, 0, 0]))
    touched = Content(tmp_path, [0, 7, 0, 0])
    assert run_stage(touched)["sum"] == 56 and touched.processed == []
    with pytest.raises(StageError, match=r"inputs\[2\]: 0 -> 8 \(the content of shard 00002\)"):
        run_stage(Content(tmp_path, [0, 7, 8, 0], "abXd"))
    assert run_stage(Content(tmp_path, [0, 7, 0, 0]))["sum"] == 56
    copied = Content(tmp_path, [9, 9, 9, 9])
    assert run_stage(copied)["sum"] == 56 and copied.processed == []


def test_markers_and_artifacts_count_for_their_configuration_alone(tmp_path: Path):
    """A marker that a process of another configuration has left behind is nobody's."""
    run_stage(Doubling(tmp_path / "stale", NUMBERS, factor=3))
    with pytest.raises(KeyboardInterrupt):
        run_stage(Doubling(tmp_path / "A", NUMBERS, fail_at=1))
    for name in ("doubles/00003.json", "work/doubling/done/00003.json"):
        (tmp_path / "A" / name).write_bytes((tmp_path / "stale" / name).read_bytes())
    stage = Doubling(tmp_path / "A", NUMBERS)
    assert run_stage(stage)["sum"] == 56
    assert stage.processed == [1, 2, 3]


def test_a_truncated_artifact_is_made_again(tmp_path: Path):
    run_stage(Doubling(tmp_path, NUMBERS))
    (tmp_path / "doubles/00001.json").write_text("")
    stage = Doubling(tmp_path, NUMBERS)
    assert run_stage(stage)["sum"] == 56
    assert stage.processed == [1]


@pytest.mark.parametrize("how", ["restart", "removed"])
def test_a_process_that_has_lost_its_folder_writes_nothing_more(tmp_path: Path, monkeypatch, how: str):
    """As on a file system without locks, where nobody can tell that it is still at work."""

    class Losing(Doubling):
        def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
            if shard.index == 2 and how == "removed":
                shutil.rmtree(tmp_path / "A")
            elif shard.index == 2:
                taking = (Doubling(tmp_path / "A", NUMBERS, factor=5), Execution(restart=True))
                other = threading.Thread(target=run_stage, args=taking)
                other.start()
                other.join()
            return super().process(shard, execution, advance)

    monkeypatch.setattr(bookkeeping, "_lock_all", lambda files, kind: True)
    stale = Losing(tmp_path / "A", NUMBERS)
    with pytest.raises(StageError, match=r"A is no longer this command's.* another --out"):
        run_stage(stale)
    assert stale.processed == [0, 1, 2]
    if how == "restart":
        run_stage(Doubling(tmp_path / "B", NUMBERS, factor=5))
        assert folder_bytes(tmp_path / "A") == folder_bytes(tmp_path / "B")


def test_ranks_of_one_configuration_work_together_and_others_wait(tmp_path: Path):
    seen = []

    class Watched(Doubling):
        def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
            if shard.index == 0:
                assert not run_stage(Doubling(tmp_path, NUMBERS), Execution(rank=1, world=2))["finished"]
                for other, options in (
                    (Doubling(tmp_path, NUMBERS, factor=3), Execution()),
                    (Doubling(tmp_path, NUMBERS), Execution(restart=True)),
                ):
                    with pytest.raises(StageError) as caught:
                        run_stage(other, options)
                    seen.append(str(caught.value))
            return super().process(shard, execution, advance)

    run_stage(Watched(tmp_path, NUMBERS), Execution(rank=0, world=2))
    assert all("Another arf command is at work in" in message for message in seen)
    assert "settings.factor: 2 -> 3" in seen[0]
    assert json.loads((tmp_path / "work/doubling/finished.json").read_text())["sum"] == 56


def test_names_that_cannot_be_shown_or_encoded(tmp_path: Path):
    """A rejected sample may be called anything: the list of them stays text of UTF-8 that a console can show."""

    class Named(Doubling):
        def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
            outcome = super().process(shard, execution, advance)
            outcome.reject("a\x1b[31m\x9b\u202e\udcdf 東京", "is not\u2028one line")
            return outcome

    options = Execution(max_bad_fraction=1)
    summary = run_stage(Named(tmp_path, [[1]]), options)
    again = Named(tmp_path, [[1]])
    assert run_stage(again, options) == summary and again.processed == [], "its own marker can be read"
    text = (tmp_path / "work/doubling/rejects.jsonl").read_text()
    assert printable(text) == text and "東京" in text and len(text.splitlines()) == 1
    assert json.loads(text)["id"] == "a\x1b[31m\x9b\u202e\\xdf 東京"


def test_a_name_that_is_too_long(tmp_path: Path):
    with pytest.raises(StageError, match=r"cannot go on: .*File name too long: .*/xxx"):
        run_stage(Doubling(tmp_path / ("x" * 300), NUMBERS))


def test_describe_writes_nothing(tmp_path: Path):
    plan = describe(Doubling(tmp_path / "out", NUMBERS))
    assert (plan["shards"], plan["shards_done"]) == (4, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_ARRAY_TASK_COUNT": "2"}, (3, 8)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # a batch script without srun
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "30",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "10",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
            },
            (5, 8),
        ),
    ],
)
def test_ranks_are_read_from_torchrun_and_slurm(environment: dict[str, str], expected: tuple[int, int]):
    assert ranks(environment) == expected


def test_an_array_with_gaps_is_refused():
    """SLURM tells its tasks of `--array=0,2,3` that there are three, from 0 to 3, with a step of 1."""
    gaps = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3",
            "SLURM_ARRAY_TASK_STEP": "1", "SLURM_ARRAY_TASK_ID": "2"}  # fmt: skip
    with pytest.raises(StageError, match="3 tasks with numbers from 0 to 3"):
        ranks(gaps)
    assert ranks(gaps | {"SLURM_ARRAY_TASK_COUNT": "4"}) == (2, 4)
    alone = {f"SLURM_ARRAY_TASK_{name}": "7" for name in ("ID", "MIN", "MAX")}
    assert ranks(alone | {"SLURM_ARRAY_TASK_COUNT": "1"}) == (0, 1)


def test_ranks_that_make_no_sense_are_refused():
    with pytest.raises(StageError, match="RANK"):
        ranks({"RANK": "x", "WORLD_SIZE": "2"})


def test_differences_name_the_place():
    old = {"a": 1, "b": {"c": [1, 2]}, "d": [1]}
    assert differences(old, {"a": 1, "b": {"c": [1, 3]}, "d": [1, 2]}) == [
        "b.c[1]: 2 -> 3",
        "d: 1 entries -> 2",
    ]
