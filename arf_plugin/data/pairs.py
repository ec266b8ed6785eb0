"""The loader of pair anchors: WebDataset tars of an anchor set, endless, shuffled, in batches.

All consumers (processes times loader workers) agree on a shuffled order of the shards for each pass and take every
n-th of it, so a pass shows each pair once; open_clip's resampling would show some twice in a batch, and a pair that
is its own negative. Each epoch starts passes of its own. Ours, not the paper's.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import webdataset as wds
from torch.utils.data import default_collate, get_worker_info

from arf_plugin.anchors.features import PairFeatures
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.pairs import RawPair, read_pairs
from arf_plugin.checks.messages import no_features_message
from arf_plugin.data.batch import Batch, Preprocess, Sample
from arf_plugin.errors import AnchorSetError
from arf_plugin.resume.order import Pipeline, SampleOrder, decoded
from arf_plugin.untrusted import utf8

if TYPE_CHECKING:
    from open_clip_train.data import SharedEpoch

Raw = TypeVar("Raw")

SHUFFLE_BUFFER = 2000
FeaturesOf = Callable[[str], PairFeatures]  # of the shard with a URL
NAMED = 10  # pairs that cannot be decoded, in a consumer's warnings; the rest is counted


class PairSamples(torch.utils.data.IterableDataset[Sample]):
    """This consumer's share of the pairs as samples, pass after pass; see `pair_loader` for its arguments.

    Pairs that cannot be decoded are passed over, as open_clip does with its samples, and named once.
    """

    def __init__(
        self,
        shards: list[str],
        preprocess: Preprocess,
        tokenize: Callable[[str], Any],
        seed: int,
        epoch: SharedEpoch,
        rank: int,
        world_size: int,
        order: SampleOrder | None,
        features: FeaturesOf | None,
    ) -> None:
        super().__init__()
        self.shards, self.preprocess, self.tokenize = shards, preprocess, tokenize
        self.seed, self.epoch, self.rank, self.world_size = seed, epoch, rank, world_size
        self.order, self.features = order, features
        self._named: set[tuple[str, str]] = set()
        self._tried = self._bad = 0  # in this pass
        self._reason = ""

    def __iter__(self) -> Iterator[Sample]:
        return decoded(self._raw(), lambda each: self.sample(*each), self.order)

    def _raw(self) -> Iterator[tuple[RawPair, Sample]]:
        """Pairs and their features, shuffled in a pass so that none meets its own copy from the next one.

        Raises:
            AnchorSetError: A whole pass over these shards has given no pair, or none that can be decoded.
        """
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        consumer, consumers = self.rank * workers + worker_id, self.world_size * workers
        for number in itertools.count():
            epoch, urls = self.epoch.get_value(), list(self.shards)
            random.Random(f"{self.seed}/{epoch}/{number}").shuffle(urls)
            urls = urls[consumer::consumers]
            rng = random.Random(f"{self.seed}/{epoch}/{self.rank}/{worker_id}/{number}")
            self._tried = self._bad = read = 0
            for pair in _shuffled(itertools.chain.from_iterable(map(self._shard, urls)), rng):
                read += 1
                yield pair
            self._end_pass(urls, read)

    def _shard(self, url: str) -> Iterator[tuple[RawPair, Sample]]:
        if self.features is None:
            yield from ((pair, {}) for pair in read_pairs(url))
            return
        found = self.features(url)
        rows = {key: row for row, key in enumerate(found.keys)}
        for pair in read_pairs(url):
            row = rows.get(utf8(pair.key))
            towers = {"pair_image_feature": found.image, "pair_text_feature": found.text}
            # Copies: a pair in the buffer would keep the arrays of its whole shard.
            copied = (
                {} if row is None else {name: torch.tensor(of[row]).float() for name, of in towers.items()}
            )
            yield pair, copied

    def sample(self, pair: RawPair, features: Sample) -> Sample | None:
        """Decodes one pair and adds its features; None, with a warning, where it cannot be decoded.

        Raises:
            AnchorSetError: It can be decoded, and has no features where there should be some.
        """
        self._tried += 1
        try:
            image, text = decode_image(pair.image), pair.text.decode("utf-8")
            parts = {"pair_image": self.preprocess(image), "pair_text": self.tokenize(text)[0]}
        except Exception as error:  # as open_clip: whatever a transform or a tokenizer raises
            self._bad += 1
            self._reason = f"{pair.url}, pair {pair.key}: {str(error) or repr(error)}"
            place = (pair.url, pair.key)
            if len(self._named) < NAMED and place not in self._named:
                self._named.add(place)
                logging.warning(f"ARF: skipping a pair anchor that cannot be decoded: {self._reason}")
                if len(self._named) == NAMED:
                    logging.warning("ARF: more pair anchors like these are not named; see: arf check --full")
            return None
        if self.features is not None and not features:
            raise AnchorSetError(no_features_message(f"{pair.url}, pair {pair.key}"))
        return parts | features

    def _end_pass(self, urls: list[str], read: int) -> None:
        where = f"{len(urls)} pair shards ({urls[0]}{', ...' if len(urls) > 1 else ''})"
        if not read:
            raise AnchorSetError(
                f"A whole pass over {where} has given no pair; expected KEY.jpg + KEY.txt. Run `arf pack` again."
            )
        # After a resume some pairs are passed over and not decoded: then the next pass tells.
        if self._tried == self._bad == read:
            raise AnchorSetError(
                f"None of the {read} pairs of a whole pass over {where} can be decoded, the last: {self._reason}.\n"
                "Look at them with `arf check --full`, or run `arf pack` again."
            )


def _shuffled(pairs: Iterator[Raw], rng: random.Random) -> Iterator[Raw]:
    buffer: list[Raw] = []
    for pair in pairs:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(pair)
            continue
        spot = rng.randrange(SHUFFLE_BUFFER)
        buffer[spot], pair = pair, buffer[spot]
        yield pair
    rng.shuffle(buffer)
    yield from buffer


def pair_loader(
    shards: list[str],
    *,
    preprocess: Preprocess,
    tokenize: Callable[[str], Any],
    batch_size: int,
    num_batches: int,
    workers: int,
    seed: int,
    epoch: SharedEpoch,
    rank: int = 0,
    world_size: int = 1,
    order: SampleOrder | None = None,
    features: FeaturesOf | None = None,
) -> Iterable[Batch]:
    """Builds the loader of pair anchors.

    Args:
        shards: URLs of the pair tars, in the same order in every process.
        preprocess: The trainer's image transform: PIL image -> ``[3, H, W]``. For evaluation where there are features.
        tokenize: open_clip's tokenizer: text -> ``[1, L]``.
        batch_size: A, pairs in a batch.
        num_batches: Batches needed in an epoch.
        workers: Loader workers; 0 loads in the main process.
        seed: The run's seed.
        epoch: The current epoch, shared with loader workers.
        rank: This process among all.
        world_size: Number of processes.
        order: Numbers raw samples and seeds their transforms; None where images need not be the same in each run.
        features: Reads the features of a shard's pairs.

    Returns:
        A loader of batches with ``pair_image`` and ``pair_text``, at least ``num_batches`` of them in each iteration.
        With `order` they have the numbers of their raw samples as ``index``, with `features` also
        ``pair_image_feature`` and ``pair_text_feature``.

    Raises:
        AnchorSetError: Fewer shards than consumers. While it is iterated over: a shard that cannot be read, and a whole
            pass of a consumer over its shards that gives nothing.
    """
    consumers = world_size * max(1, workers)
    if len(shards) < consumers:
        raise AnchorSetError(
            f"{len(shards)} pair shards for {consumers} loader workers ({world_size} processes x {max(1, workers)}); "
            "expected at least one shard each.\n"
            f"Use --arf-workers {max(1, len(shards) // world_size)}"
            f"{' and fewer processes' if len(shards) < world_size else ''}, "
            "or write smaller shards with: arf pack --shard-size ..."
        )
    pipeline = Pipeline(
        PairSamples(shards, preprocess, tokenize, seed, epoch, rank, world_size, order, features),
        wds.batched(batch_size, partial=False, collation_fn=default_collate),
        order=order,
    ).with_epoch(math.ceil(num_batches / max(1, workers)))
    loader: Iterable[Batch] = wds.WebLoader(
        pipeline,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return loader
