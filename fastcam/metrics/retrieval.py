"""Scores of rankings: average precision as Oxford5k and Paris6k count it, recall at k, UKBench's N-S.

J. Philbin, O. Chum, M. Isard, J. Sivic, A. Zisserman, "Object retrieval with large vocabularies and fast spatial
matching", CVPR 2007 (good, ok, junk). H. Jegou, M. Douze, C. Schmid, "Hamming embedding and weak geometric consistency
for large scale image search", ECCV 2008 (Holidays). D. Nister, H. Stewenius, "Scalable recognition with a vocabulary
tree", CVPR 2006 (N-S).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence


def ranking_average_precision(
    ranked: Iterable[Hashable], positives: Collection[Hashable], junk: Collection[Hashable] = ()
) -> float:
    r"""Area under the precision-recall curve of one ranking, by trapezoids.

    .. math:: \mathrm{AP} = \sum_i (r_i - r_{i-1}) \frac{p_{i-1} + p_i}{2}, \quad r_0 = 0, \; p_0 = 1

    over the ranking without its junk; r and p are recall and precision behind the i-th image.

    Oxford5k and Paris6k: positives are good and ok images, the query's own among them. Holidays: positives are the rest
    of the group and the query's image is junk; its official formula gives the same number.

    Args:
        ranked: images, best first. Those that are missing count as never found.
        positives: images to find.
        junk: images that count neither way, also where they are among the positives.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: nothing to find, or an image that is ranked twice.

    Example:
        >>> ranking_average_precision(["a", "junk", "b", "c"], {"a", "c"}, {"junk"})
        0.7916666666666666
    """
    wanted, ignored = set(positives) - set(junk), set(junk)
    if not wanted:
        raise ValueError("ranking_average_precision: expected at least one positive, got none")
    seen: set[Hashable] = set()
    hits, area, before = 0, 0.0, 1.0
    for image in ranked:
        if image in ignored:
            continue
        if image in seen:
            raise ValueError(f"ranking_average_precision: expected every image once, got {image!r} twice")
        seen.add(image)
        hits += image in wanted
        precision = hits / len(seen)
        if image in wanted:
            area += (before + precision) / 2
        before = precision
    return area / len(wanted)


def recall_at(
    ranked: Iterable[Hashable], positives: Collection[Hashable], k: int, junk: Collection[Hashable] = ()
) -> float:
    """1 if a positive is among the first ``k`` images that are not junk, else 0: the recall@k of place recognition.

    Raises:
        ValueError: ``k`` below 1, or nothing to find.
    """
    wanted, ignored = set(positives) - set(junk), set(junk)
    if k < 1 or not wanted:
        raise ValueError(f"recall_at: expected k >= 1 and a positive, got k = {k} and {len(wanted)} positives")
    kept = 0
    for image in ranked:
        if image in ignored:
            continue
        if image in wanted:
            return 1.0
        kept += 1
        if kept == k:
            break
    return 0.0


def ukbench_hits(rankings: Mapping[str, Sequence[str]], groups: Mapping[str, Hashable]) -> dict[str, int]:
    """Of every query, how many of its first four images are of its group; their mean is UKBench's N-S, at most 4.

    Args:
        rankings: query -> images, best first, the query's own among them.
        groups: image -> group, of queries and images.

    Raises:
        ValueError: there are no queries, or an image has no group.
    """
    if not rankings:
        raise ValueError("ukbench_hits: expected at least one query, got none")
    unknown = [image for query, ranked in rankings.items() for image in (query, *ranked[:4]) if image not in groups]
    if unknown:
        raise ValueError(f"ukbench_hits: expected a group for every image, got none for {unknown[0]!r}")
    return {query: sum(groups[image] == groups[query] for image in ranked[:4]) for query, ranked in rankings.items()}
