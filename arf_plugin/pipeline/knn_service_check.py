"""Is a clip-retrieval service set up for our queries? Asked once, before the first of them.

The service answers 500 and nothing else to a wrong dimension, a missing image index or short metadata. A few more
questions tell these apart.
"""

from __future__ import annotations

import numpy as np

from arf_plugin.errors import ServiceError
from arf_plugin.pipeline.knn_replies import Hit, PassingFault, ServerFault, names
from arf_plugin.pipeline.knn_service import KnnClient

# Widths of published CLIP models and of the small ones of this project.
DIMENSIONS = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536)


def check_service(client: KnnClient, probe: np.ndarray, k: int) -> list[Hit]:
    """Checks the index's name and asks one query.

    Args:
        client: gets its ``index`` set if there is only one.
        probe: [d], a query like those to come.
        k: neighbours per query.

    Returns:
        The probe's hits.

    Raises:
        ServiceError: saying what to change.
    """
    check_index(client)
    try:
        hits = client.query(probe, k)
    except ServerFault as cause:
        hits = _second_look(client, probe, k, cause)
    client.proven = True
    return hits


def check_index(client: KnnClient) -> None:
    """Checks that the service answers and has the index.

    Args:
        client: gets its ``index`` set if there is only one.

    Raises:
        ServiceError: saying what to change.
    """
    found = client.indices()
    address = client.service.base
    if not found:
        raise ServiceError(
            f"{address} serves no index. Start it with one: scripts/knn_service.sh --index DIR"
        )
    if client.index is None:
        if len(found) > 1:
            raise ServiceError(
                f"{address} serves {len(found)} indices. Choose one with --service-index: {names(found)}"
            )
        client.index = found[0]
    if client.index not in found:
        raise ServiceError(
            f"{address} has no index {client.index!r}. Choose one with --service-index: {names(found)}"
        )


def _second_look(client: KnnClient, probe: np.ndarray, k: int, cause: ServerFault) -> list[Hit]:
    """Finds out why the service answered 500 to the probe; returns its hits if that was a passing fault after all."""
    where = f"Index {client.index!r} of {client.service.base}"
    if _answers(client, probe, 1, "image"):
        if _answers(client, probe, k, "image"):
            client.proven = True
            return client.query(probe, k)
        raise ServiceError(
            f"{where} answers for one neighbour and fails for {k}: its metadata has fewer rows than its index, or {k} "
            "is more than it can do. Build the index folder again (arf index), or ask for fewer with --k."
        ) from cause
    if _answers(client, probe, 1, "text"):
        raise ServiceError(
            f"{where} has a text index and no image index (image.index), so it cannot be asked for images. Build one: "
            "arf index --embeddings POOL --out DIR, and serve that."
        ) from cause
    for dimension in DIMENSIONS:
        if dimension != len(probe) and _answers(client, np.eye(1, dimension)[0], 1, "image"):
            raise ServiceError(
                f"{where} holds vectors of dimension {dimension}, the queries have {len(probe)}. Embed the queries "
                "with the model that the index was built with, or serve an index of this model."
            ) from cause
    raise ServiceError(
        f"{where} fails (500) for a sound query of dimension {len(probe)}: {cause}. Its vectors have another "
        "dimension, its image.index is missing, or its metadata has fewer rows than the index or rows without an "
        "image_path; its log says which."
    ) from cause


def _answers(client: KnnClient, vector: np.ndarray, k: int, modality: str) -> bool:
    """Whether the service answers at all, whatever it says."""
    try:
        client.query(vector, k, modality=modality, tries=2)
    except PassingFault:
        return False
    except ServiceError:  # an answer that is wrong in some other way
        return True
    return True
