"""The permutohedral lattice in Triton: vertices by sorting keys, splat, blur and slice by gathers.

No hash table and no atomics: the vertices of a whole batch are numbered by the order of their keys, so that the same
input gives the same bits. A vertex's key is a linear function of its coordinates and its image, hence the keys of its
neighbours are known differences away, and a sorted splat list is what the sort itself returns. One number of the device
is read: how many vertices there are.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

COORDINATE_LIMIT = 2**22  # lattice coordinates from here on have no fraction worth the name in float32
NO_KEY = 2**63 - 1  # key of a corner that does not count; the last in the order
PART = 32  # pairs (point, vertex) that a program adds one by one
POINTS = 256  # points, pairs or vertices of one program of the build
# Multiply-adds in the search must round twice, as on a CPU: else points near a face fall into another simplex.
EXACT = {"enable_fp_fusion": False}


def row_width(K: int) -> int:
    """Values a row of K labels takes: whole 32-byte sectors from 8 labels on."""
    return 1 << (K - 1).bit_length() if K <= 4 else -(-K // 8) * 8


def blocks(width: int, most: int = 1024) -> dict[str, int]:
    """Rows and values a program handles of rows of ``width`` values, at most ``most`` values across."""
    across = min(triton.next_power_of_2(width), most)
    return {"BLOCK_N": max(4, min(256, 1024 // across)), "BLOCK_K": across}


def to_rows(planes: Tensor, padding: float) -> Tensor:
    """``(B, K, N)``, any strides and dtype -> float32 :math:`(B N, width)`, with ``padding`` behind the labels."""
    B, K, N = planes.shape
    rows = torch.full((B, N, row_width(K)), padding, dtype=torch.float32, device=planes.device)
    rows[..., :K] = planes.mT
    return rows.flatten(0, 1)


def scales(d: int) -> tuple[float, ...]:
    """What each feature is multiplied by, so that the blur has unit variance (Adams et al., section 3)."""
    step = torch.tensor(math.sqrt(2 / 3) * (d + 1), dtype=torch.float32).item()
    return tuple(step / math.sqrt((j + 1) * (j + 2)) for j in range(d))


@triton.jit
def _elevate(feature_ptr, n, mask, N, D: tl.constexpr, SCALES: tl.constexpr):
    """Points ``n`` of features (D, N) -> D + 1 coordinates on the hyperplane of sum 0."""
    total = tl.zeros(n.shape, tl.float32)
    elevated = ()
    for j in tl.static_range(D, 0, -1):
        scaled = tl.load(feature_ptr + (j - 1) * N + n, mask=mask, other=0.0) * SCALES[j - 1]
        elevated = (total - j * scaled,) + elevated  # type: ignore[assignment] # noqa: RUF005
        total += scaled
    return (total,) + elevated  # noqa: RUF005


@triton.jit(do_not_specialize=["N"])
def _lattice_range_kernel(
    feature_ptr, inside_ptr, range_ptr, N, LIMIT: tl.constexpr, D: tl.constexpr, SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: smallest and largest coordinates of BLOCK points; -inf if one is NaN or not below LIMIT."""
    pid, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = pid * BLOCK + tl.arange(0, BLOCK)
    inside = tl.load(inside_ptr + b * N + n, mask=n < N, other=0) != 0
    elevated = _elevate(feature_ptr + b * D * N, n, inside, N, D, SCALES)
    to_ptr = range_ptr + (b * tl.num_programs(0) + pid) * 2 * (D + 1)
    for j in tl.static_range(D + 1):
        e = tl.where(tl.abs(elevated[j]) < LIMIT, elevated[j], float("-inf"))
        tl.store(to_ptr + j, tl.min(e, 0))
        tl.store(to_ptr + D + 1 + j, tl.max(e, 0))


@triton.jit(do_not_specialize=["N"])
def _lattice_search_kernel(
    feature_ptr, inside_ptr, points_ptr, layout_ptr, key_ptr, weight_ptr, N,
    NO_KEY: tl.constexpr, D: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: keys and weights of the simplices of BLOCK points of an image. Point N is pydensecrf's padding.

    The x86 build of pydensecrf fills the last group of four points with zeros, whose vertices enter too.
    """
    n, b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = tl.load(inside_ptr + b * N + n, mask=n < N, other=0) != 0
    there = inside | ((n == N) & (tl.load(points_ptr + b) % 4 != 0))
    elevated = _elevate(feature_ptr + b * D * N, n, inside, N, D, SCALES)

    inverse = 1.0 / (D + 1)
    nearest, remainder, whole = (), (), tl.zeros([BLOCK], tl.int32)
    for j in tl.static_range(D + 1):
        rounded = (elevated[j] * inverse + 12582912.0) - 12582912.0  # half to even
        nearest = nearest + (rounded,)  # type: ignore[assignment] # noqa: RUF005
        remainder = remainder + (elevated[j] - rounded * (D + 1),)  # type: ignore[assignment] # noqa: RUF005
        whole += rounded.to(tl.int32)
    ranks, shares = (), ()
    key = tl.load(layout_ptr + D + 1) + b * tl.load(layout_ptr + D) + tl.zeros([BLOCK], tl.int64)
    ones = tl.zeros([], tl.int64)
    for i in tl.static_range(D + 1):
        rank = whole
        for j in tl.static_range(D + 1):
            if j > i:
                rank += (remainder[i] < remainder[j]).to(tl.int32)
            elif j < i:
                rank += (remainder[j] >= remainder[i]).to(tl.int32)
        wrap = (rank < 0).to(tl.int32) - (rank > D).to(tl.int32)
        base = (nearest[i].to(tl.int32) + wrap) * (D + 1)
        ranks = ranks + (rank + wrap * (D + 1),)  # noqa: RUF005
        shares = shares + ((elevated[i] - base.to(tl.float32)) * inverse,)  # noqa: RUF005
        if i < D:
            stride = tl.load(layout_ptr + i)
            key += base * stride
            ones += stride

    for k in tl.static_range(D + 1):
        weight, corner, last = tl.zeros([BLOCK], tl.float32), key + k * ones, tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(D + 1):
            weight += tl.where(ranks[i] == D - k, shares[i], 0.0)
            if k > 0:
                weight -= tl.where(ranks[i] == D + 1 - k, shares[i], 0.0)
            else:
                last -= tl.where(ranks[i] == 0, shares[i], 0.0)
            if i < D:
                corner -= tl.where(ranks[i] > D - k, (D + 1) * tl.load(layout_ptr + i), 0)
        if k == 0:
            weight += 1.0 + last
        at = (b * (N + 1) + n) * (D + 1) + k
        tl.store(key_ptr + at, tl.where(there, corner, NO_KEY), mask=n <= N)
        tl.store(weight_ptr + (b * N + n) * (D + 1) + k, tl.where(inside, weight, 0.0), mask=n < N)


@triton.jit
def _starts(key_ptr, i, mask, NO_KEY: tl.constexpr, PART: tl.constexpr):
    """Whether sorted pair i begins a vertex, a part of one, and what follows the last pair that counts."""
    key = tl.load(key_ptr + i, mask=mask, other=NO_KEY)
    before = tl.load(key_ptr + i - 1, mask=mask & (i > 0), other=-1)
    vertex = (key != NO_KEY) & (key != before)
    return key, vertex, vertex | ((key != NO_KEY) & (i % PART == 0)), (key == NO_KEY) & (before != NO_KEY)


@triton.jit(do_not_specialize=["S"])
def _lattice_starts_kernel(
    key_ptr, start_ptr, S, NO_KEY: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: of BLOCK sorted pairs, 1 where a vertex begins plus 2**32 where a part begins."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, vertex, part, _ = _starts(key_ptr, i, i < S, NO_KEY, PART)
    tl.store(start_ptr + i, vertex.to(tl.int64) + (part.to(tl.int64) << 32), mask=i < S)


@triton.jit(do_not_specialize=["S", "N"])
def _lattice_number_kernel(
    key_ptr, order_ptr, count_ptr, weight_ptr,
    vertex_ptr, pair_row_ptr, pair_weight_ptr, unique_ptr, vertex_first_ptr, part_first_ptr, S, N,
    NO_KEY: tl.constexpr, PART: tl.constexpr, CORNERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the vertex, point and weight of BLOCK sorted pairs; the key and first part of vertices that begin;
    the first pair of parts that begin."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < S
    key, vertex_starts, part_starts, end = _starts(key_ptr, i, mask, NO_KEY, PART)
    count = tl.load(count_ptr + i, mask=mask, other=0)
    vertex, part = (count & 0xFFFFFFFF) - 1, (count >> 32) - 1
    pair = tl.load(order_ptr + i, mask=mask, other=0)
    point, corner = pair // CORNERS, pair % CORNERS
    b, n = point // (N + 1), point % (N + 1)
    row = b * N + n
    pixel = mask & (n < N)
    there = key != NO_KEY
    tl.store(vertex_ptr + row * CORNERS + corner, tl.where(there, vertex, 0).to(tl.int32), mask=pixel)
    weight = tl.load(weight_ptr + row * CORNERS + corner, mask=pixel, other=0.0)
    tl.store(pair_weight_ptr + i, weight, mask=mask)
    tl.store(pair_row_ptr + i, tl.where(n < N, row, row - 1).to(tl.int32), mask=mask)
    tl.store(unique_ptr + vertex, key, mask=vertex_starts)
    tl.store(vertex_first_ptr + vertex, part.to(tl.int32), mask=vertex_starts)
    tl.store(part_first_ptr + part, i.to(tl.int32), mask=part_starts)
    tl.store(part_first_ptr + part + 1, i.to(tl.int32), mask=mask & end)


@triton.jit(do_not_specialize=["M", "steps"])
def _lattice_neighbours_kernel(
    unique_ptr, layout_ptr, neighbour_ptr, M, steps, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: who is one step forward of BLOCK vertices along an axis, noted on both sides. By binary search."""
    v, axis = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    delta = tl.zeros([], tl.int64)
    for i in tl.static_range(D):
        delta += tl.where(axis == i, D, -1) * tl.load(layout_ptr + i)
    target = tl.load(unique_ptr + v, mask=v < M, other=0) + delta
    low, high = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64) + M
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        below = tl.load(unique_ptr + middle, mask=open, other=0) < target
        low, high = tl.where(open & below, middle + 1, low), tl.where(open & ~below, middle, high)
    found = (v < M) & (low < M)
    found = found & (tl.load(unique_ptr + low, mask=found, other=0) == target)
    to_ptr = neighbour_ptr + axis.to(tl.int64) * 2 * M
    tl.store(to_ptr + v, tl.where(found, low, M).to(tl.int32), mask=v < M)
    tl.store(to_ptr + M + low, v.to(tl.int32), mask=found)  # nobody else has `low` one step forward


@triton.jit(do_not_specialize=["R"])
def _lattice_sum_kernel(
    x_ptr, pair_row_ptr, pair_weight_ptr, first_ptr, out_ptr, R,
    WIDTH: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: sums of BLOCK_N consecutive segments of weighted gathered rows (GATHER), or of plain rows."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.load(first_ptr + r, mask=r < R, other=0)
    end = tl.load(first_ptr + r + 1, mask=r < R, other=0)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in range(0, tl.max(end - begin, 0), 4):
        for ahead in tl.static_range(4):  # four independent loads in flight
            e = begin + step + ahead
            there = e < end
            mask = there[:, None] & (k[None, :] < WIDTH)
            if GATHER:
                row = tl.load(pair_row_ptr + e, mask=there, other=0).to(tl.int64)
                weight = tl.load(pair_weight_ptr + e, mask=there, other=0.0)
                total += weight[:, None] * tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
            else:
                total += tl.load(x_ptr + e.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + r[:, None] * WIDTH + k[None, :], total, mask=(r[:, None] < R) & (k[None, :] < WIDTH))


@triton.jit(do_not_specialize=["M"])
def _lattice_blur_kernel(
    z_ptr, neighbour_ptr, out_ptr, M, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_N vertices plus half of their two neighbours along an axis."""
    v = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (v[:, None] < M) & (k[None, :] < WIDTH)
    forward = tl.load(neighbour_ptr + v, mask=v < M, other=0).to(tl.int64)[:, None]
    back = tl.load(neighbour_ptr + M + v, mask=v < M, other=0).to(tl.int64)[:, None]
    own = tl.load(z_ptr + v[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
    both = tl.load(z_ptr + forward * WIDTH + k[None, :], mask=mask & (forward < M), other=0.0)
    both += tl.load(z_ptr + back * WIDTH + k[None, :], mask=mask & (back < M), other=0.0)
    tl.store(out_ptr + v[:, None] * WIDTH + k[None, :], own + 0.5 * both, mask=mask)


@triton.jit
def gather_corners(z_ptr, vertex_ptr, weight_ptr, n, k, there, CORNERS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``n`` of the slice, values ``k``: weighted sums over the corners of the points' simplices."""
    mask = there[:, None] & (k[None, :] < WIDTH)
    total = tl.zeros(mask.shape, tl.float32)
    for c in tl.static_range(CORNERS):
        vertex = tl.load(vertex_ptr + n * CORNERS + c, mask=there, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + n * CORNERS + c, mask=there, other=0.0)
        total += weight[:, None] * tl.load(z_ptr + vertex[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
    return total


@triton.jit
def store_messages(out_ptr, value, scale_ptr, compat_ptr, n, k, mask, SCALED: tl.constexpr, ADD: tl.constexpr):
    """Store rows ``n``, values ``k``; SCALED: times a number a row and one a label; ADD: to what is there."""
    if SCALED:
        scale = tl.load(scale_ptr + n[:, None], mask=mask, other=0.0)
        value = value * scale * tl.load(compat_ptr + k[None, :], mask=mask, other=0.0)
    if ADD:
        value += tl.load(out_ptr, mask=mask, other=0.0)
    tl.store(out_ptr, value, mask=mask)


@triton.jit(do_not_specialize=["R"])
def _lattice_slice_kernel(
    z_ptr, vertex_ptr, weight_ptr, scale_ptr, compat_ptr, out_ptr, R, alpha,
    SCALED: tl.constexpr, ADD: tl.constexpr, CORNERS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K values of the slice at BLOCK_N points."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    value = alpha * gather_corners(z_ptr, vertex_ptr, weight_ptr, n, k, n < R, CORNERS, WIDTH)
    mask = (n[:, None] < R) & (k[None, :] < WIDTH)
    to_ptr = out_ptr + n[:, None] * WIDTH + k[None, :]
    store_messages(to_ptr, value, scale_ptr, compat_ptr, n, k, mask, SCALED, ADD)


class Lattice:
    """The lattices of the points of B images, as one: B N points, M vertices in the order of images and keys.

    Args:
        features: :math:`(d, N)`, or :math:`(B, d, N)`.
        inside: bool :math:`(B, N)`, the points that take part; ``None`` for all. Others may hold anything.

    Attributes:
        vertex: int32 :math:`(B N, d + 1)`, the vertices of each point's simplex.
        weight: float32 :math:`(B N, d + 1)`, barycentric coordinates, all 0 for points outside.
        neighbour: int32 :math:`(d + 1, 2, M)`, one step forward and back along each axis, ``M`` where there is none.
        alpha: what the slice is multiplied by.
    """

    def __init__(self, features: Tensor, inside: Tensor | None = None) -> None:
        points = (features if features.ndim == 3 else features[None]).float().contiguous()
        B, d, N = points.shape
        corners, pairs = d + 1, B * (N + 1) * (d + 1)
        if d > 15:
            raise ValueError(f"Lattice: expected 1 to 15 features, got {d}")
        if pairs >= 2**31:
            raise ValueError(
                f"Lattice: expected images of less than 2**31 / (d + 1) points together, got {B} of {N} with d = {d}; "
                "pass fewer images at once"
            )
        there = torch.ones((B, N), dtype=torch.bool, device=points.device) if inside is None else inside.contiguous()
        self.alpha = 1 / (1 + 2.0**-d)
        constants = {"D": d, "SCALES": scales(d), "BLOCK": POINTS}

        tiles = triton.cdiv(N, POINTS)
        ranges = points.new_empty((B * tiles, 2, corners))
        _lattice_range_kernel[(tiles, B)](points, there, ranges, N, LIMIT=COORDINATE_LIMIT, **constants, **EXACT)
        lowest, highest = ranges[:, 0].amin(0), ranges[:, 1].amax(0)
        layout, bits = _layout(lowest[:d].double(), highest[:d].double(), B)

        key = torch.empty(pairs, dtype=torch.int64, device=points.device)
        self.weight = points.new_empty((B * N, corners))
        _lattice_search_kernel[(triton.cdiv(N + 1, POINTS), B)](
            points, there, there.sum(1), layout, key, self.weight, N, NO_KEY=NO_KEY, **constants, **EXACT
        )
        key, order = key.sort(stable=True)
        grid = (triton.cdiv(pairs, POINTS),)
        count = torch.empty_like(key)
        _lattice_starts_kernel[grid](key, count, pairs, NO_KEY=NO_KEY, PART=PART, BLOCK=POINTS)
        count = count.cumsum(0)

        known = torch.stack(
            [(count[-1] & 0xFFFFFFFF).double(), (count[-1] >> 32).double(), lowest.amin().double(), bits]
        )
        M, parts, low, width = known.tolist()  # the one synchronisation
        self._check(low, width)
        # Without any point, one vertex without pairs: points that take no part read the first, with weight 0.
        self.vertices, self._parts = max(1, int(M)), int(parts)
        self.vertex = torch.empty((B * N, corners), dtype=torch.int32, device=points.device)
        self._pair_row = torch.empty(pairs, dtype=torch.int32, device=points.device)
        self._pair_weight = points.new_empty(pairs)
        unique = key.new_zeros(self.vertices)
        self._vertex_first = self.vertex.new_full((self.vertices + 1,), self._parts)
        self._part_first = self.vertex.new_full((self._parts + 1,), pairs)
        _lattice_number_kernel[grid](
            key, order, count, self.weight, self.vertex, self._pair_row, self._pair_weight, unique, self._vertex_first,
            self._part_first, pairs, N, NO_KEY=NO_KEY, PART=PART, CORNERS=corners, BLOCK=POINTS,
        )  # fmt: skip
        self.neighbour = self.vertex.new_full((corners, 2, self.vertices), self.vertices)
        _lattice_neighbours_kernel[(triton.cdiv(self.vertices, POINTS), corners)](
            unique, layout, self.neighbour, self.vertices, self.vertices.bit_length(), D=d, BLOCK=POINTS
        )

    @staticmethod
    def _check(lowest: float, bits: float) -> None:
        if lowest == -math.inf:
            raise ValueError(
                "crf_mean_field: expected finite lattice features (coordinates over sxy, image over srgb) of less than "
                "about a million, got larger or NaN"
            )
        if bits >= 63:
            raise ValueError(
                "Lattice: expected features whose lattice coordinates, with the number of images, fit 63 bits in the "
                f"triton backend, got {bits:.1f}; use larger standard deviations or another backend"
            )

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """``vertex (N, d + 1)``, ``weight (N, d + 1)``, ``neighbour (d + 1, M, 2)``."""
        return self.vertex, self.weight, self.neighbour.mT

    def splat_weights(self, scale: Tensor) -> Tensor:
        """Weights of the pairs in the order of their vertices, times a number for each point :math:`(B N,)`."""
        return self._pair_weight * scale.index_select(0, self._pair_row)

    def blurred(self, x: Tensor, weights: Tensor | None = None, reverse: bool = False) -> Tensor:
        """Rows of points :math:`(B N, width)` -> splat and blurred rows of vertices :math:`(M, width)`."""
        width, M, corners = x.shape[1], self.vertices, len(self.neighbour)
        size = blocks(width, most=64)
        across = triton.cdiv(width, size["BLOCK_K"])
        part, z = x.new_empty((self._parts, width)), x.new_empty((M, width))
        pairs = self._pair_row, self._pair_weight if weights is None else weights
        _lattice_sum_kernel[(triton.cdiv(self._parts, size["BLOCK_N"]), across)](
            x, *pairs, self._part_first, part, self._parts, WIDTH=width, GATHER=True, **size
        )
        grid = (triton.cdiv(M, size["BLOCK_N"]), across)
        _lattice_sum_kernel[grid](part, *pairs, self._vertex_first, z, M, WIDTH=width, GATHER=False, **size)
        other = torch.empty_like(z)
        for axis in reversed(range(corners)) if reverse else range(corners):
            _lattice_blur_kernel[grid](z, self.neighbour[axis], other, M, WIDTH=width, **size)
            z, other = other, z
        return z

    def slice(
        self, z: Tensor, out: Tensor, scale: Tensor | None = None, compat: Tensor | None = None, add: bool = False
    ) -> None:
        """Values at the points from :meth:`blurred` rows, into ``out (B N, width)``; times ``scale (B N,)`` and
        ``compat (width,)``; ``add``: to what ``out`` holds."""
        width = z.shape[1]
        size = blocks(width, most=64)
        grid = (triton.cdiv(len(out), size["BLOCK_N"]), triton.cdiv(width, size["BLOCK_K"]))
        _lattice_slice_kernel[grid](
            z, self.vertex, self.weight, scale, compat, out, len(out), self.alpha,
            SCALED=scale is not None, ADD=add, CORNERS=len(self.neighbour), WIDTH=width, **size,
        )  # fmt: skip

    def filter(self, x: Tensor, reverse: bool = False) -> Tensor:
        """``x (V, N)``, float32, of one image -> :math:`(V, N)`: splat, blur, slice."""
        if x.dtype != torch.float32:
            raise TypeError(f"Lattice.filter: the triton backend computes in float32, got {x.dtype}")
        V = len(x)
        if V == 0:
            return torch.empty_like(x)
        rows = to_rows(x[None], 0.0)
        out = torch.empty_like(rows)
        self.slice(self.blurred(rows, reverse=reverse), out)
        return out[:, :V].mT.contiguous()


def _layout(low: Tensor, high: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Ranges of coordinates, double :math:`(d,)` -> what a step along each coordinate, a further image and nothing add
    to a key, int64 :math:`(d + 2,)`; and how many bits keys need."""
    margin = 3 * (len(low) + 2)  # a point's vertices lie within d + 1 of it, and their neighbours within d of them
    low = low.floor() - margin
    span = high.ceil() + margin - low + 1
    stride = torch.cat([torch.ones_like(low[:1], dtype=torch.int64), span.long().cumprod(0)])
    offset = -(stride[:-1] * low.long()).sum(0, keepdim=True)
    return torch.cat([stride, offset]), span.log2().sum() + math.log2(B)
