"""Rules about the anchor set alone."""

from __future__ import annotations

from collections.abc import Iterator

from arf_plugin.anchors.manifest import problems_of
from arf_plugin.anchors.scan import ShardScan, require_unique_keys
from arf_plugin.anchors.tars import is_remote
from arf_plugin.checks.finding import Finding
from arf_plugin.checks.inputs import Inputs
from arf_plugin.checks.messages import BUILD
from arf_plugin.errors import AnchorSetError


def anchor_set(inputs: Inputs) -> Iterator[Finding]:
    """There is an anchor set with a half that is used."""
    yield from ()
    if inputs.anchors is None:
        return
    import fsspec

    name = f"--arf-anchors {inputs.anchors}" if inputs.training else inputs.anchors
    try:
        fs, root = fsspec.core.url_to_fs(inputs.anchors)
        is_folder = fs.isdir(root)
        found = "is a file" if not is_folder and fs.exists(root) else "does not exist"
    except (OSError, ImportError, ValueError) as cause:
        raise AnchorSetError(f"{name} cannot be opened: {cause}") from cause
    if not is_folder:
        raise AnchorSetError(
            f"{name} {found}; it is not a folder. Expected one with captions/*.parquet, pairs/*.tar or both.\n{BUILD}"
        )
    halves = {
        "captions/*.parquet": (bool(inputs.caption_files), inputs.caption_weight),
        "pairs/*.tar": (bool(inputs.pair_shards), inputs.pair_weight),
    }
    if not any(there for there, _ in halves.values()):
        listed = sorted(path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False))
        raise AnchorSetError(
            f"{name} is empty: no captions/*.parquet and no pairs/*.tar (found: "
            f"{', '.join(listed[:8]) or 'nothing'}).\n"
            f"{BUILD}"
        )
    if not any(there and weight for there, weight in halves.values()):
        only = next(half for half, (there, _) in halves.items() if there)
        raise AnchorSetError(f"{name} has {only} alone, and its weight is 0: no anchors are left.")


def whole(inputs: Inputs) -> Iterator[Finding]:
    """The manifest is known, and what it tells of is there."""
    if inputs.anchors is None:
        return
    weights = {"captions": inputs.caption_weight, "pairs": inputs.pair_weight}
    for problem in problems_of(inputs.anchors, [half for half, weight in weights.items() if weight]):
        yield Finding("error", problem)


def captions(inputs: Inputs) -> Iterator[Finding]:
    """The captions can be read."""
    if not inputs.joins:
        return
    captions = inputs.captions
    if not captions.rows:
        raise AnchorSetError(
            f"The {len(inputs.caption_files)} files in {inputs.anchors}/captions hold no rows. Build them "
            "with: arf caption"
        )
    if captions.repeated:
        yield Finding("warning", f"{captions.repeated} captions repeat another one of the same sample")


def pairs(inputs: Inputs) -> Iterator[Finding]:
    """Every pair has an image and a text."""
    if not inputs.pair_shards or inputs.pair_weight == 0:
        return
    if inputs.training and any(map(is_remote, inputs.pair_shards)):
        yield Finding(
            "warning",
            "the pair anchors are remote, so they are not checked before the first step; see `arf check`.",
        )
    count, images = 0, 0
    digests: set[str] = set()
    bad = False
    for url, scan in inputs.pairs:
        if not isinstance(scan, ShardScan):
            bad = True
            yield Finding("error", str(scan))
            continue
        count += len(scan.keys)
        digests.update(scan.digests)
        images += len(scan.digests)
        try:
            require_unique_keys(scan, AnchorSetError)
        except AnchorSetError as cause:
            yield Finding("error", str(cause))
        problems = list(scan.unreadable.items()) + list(scan.bad_texts.items())
        problems += [(key, "has no image (KEY.jpg, .jpeg, .png or .webp)") for key in scan.without_image]
        for key, reason in problems:
            if key in scan.repeated:
                continue
            bad = True
            yield Finding(
                "error",
                f"{url}, pair {key}: {reason}.\nExpected a whole image and a UTF-8 text per pair: remove or "
                "replace the "
                "pair, or run `arf pack` again. `arf check` lists all of them.",
            )
    if inputs.pairs and not count and not bad:
        raise AnchorSetError(
            f"The {len(inputs.pair_shards)} tars in {inputs.anchors}/pairs hold no pair; expected KEY.jpg + KEY.txt. "
            "Build them with: arf pack"
        )
    if images > len(digests):
        yield Finding(
            "warning",
            f"{images - len(digests)} pairs repeat the image of another pair, so that pairs may be their own "
            "negatives",
        )
    run = inputs.run
    if (
        run is not None
        and len(inputs.pairs) == len(inputs.pair_shards)
        and count < run.pair_batch * run.world_size
    ):
        yield Finding(
            "warning",
            f"{count} pairs for batches of {run.pair_batch * run.world_size}: pairs will meet their own copies as "
            "negatives.",
        )


def pair_workers(inputs: Inputs) -> Iterator[Finding]:
    """Every loader worker of the pairs gets a shard."""
    run = inputs.run
    if run is None or not inputs.pair_shards or inputs.pair_weight == 0:
        return
    consumers = run.world_size * max(1, run.pair_workers)
    if len(inputs.pair_shards) < consumers:
        shards, world = len(inputs.pair_shards), run.world_size
        raise AnchorSetError(
            f"{shards} pair shards for {consumers} loader workers ({world} processes x {max(1, run.pair_workers)}); "
            "expected at least one shard each.\n"
            f"Use --arf-workers {max(1, shards // world)}{' and fewer processes' if shards < world else ''}, "
            "or write smaller shards with: arf pack --shard-size ..."
        )
    yield from ()
