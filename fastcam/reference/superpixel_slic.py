"""SLIC in plain PyTorch, on whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._lab import rgb_to_lab, to_bytes
from fastcam._slic import FARTHEST, Grid, crossing_cost, grid, spread

BASE = 65536  # above all distances and numbers of centres


def superpixel_slic_fwd(
    image: Tensor, contour: Tensor | None, n_segments: int, compactness: float, contour_weight: float, iterations: int,
    connect: bool,
) -> Tensor:  # fmt: skip
    """RGB ``(B, 3, H, W)``, contour ``(B, H, W)`` -> superpixels int32 ``(B, H, W)``."""
    B, _, H, W = image.shape
    if image.numel() == 0:
        return torch.zeros(B, H, W, dtype=torch.int32, device=image.device)
    lab = rgb_to_lab(to_bytes("superpixel_slic", image))
    cost = [None] * B if contour is None else list(crossing_cost(contour, contour_weight).long())
    plan = grid(H, W, n_segments)
    out = []
    for one, crossing in zip(lab, cost, strict=True):
        labels, colours = _cluster(one, crossing, plan, compactness, iterations)
        out.append(join_small(labels, colours) if connect else labels)
    return torch.stack(out).to(torch.int32)


def _cluster(
    lab: Tensor, cost: Tensor | None, plan: Grid, compactness: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Lab ``(3, H, W)``, costs of crossing ``(H, W)`` -> each pixel's centre, int64 ``(H, W)``, and the centres'
    colours ``(3, K)``."""
    H, W = lab.shape[1:]
    rows, columns, reach, stride = plan
    K = rows * columns
    y = (2 * torch.arange(rows, device=lab.device) + 1) * H // (2 * rows)
    x = (2 * torch.arange(columns, device=lab.device) + 1) * W // (2 * columns)
    of_row = torch.arange(H, device=lab.device) * rows // H
    of_column = torch.arange(W, device=lab.device) * columns // W
    labels = of_row[:, None] * columns + of_column
    centres = torch.stack([y[:, None].expand(rows, columns), x.expand(rows, columns)]).reshape(2, K)
    centres = _to_lowest_gradient(lab, centres)
    colours = lab[:, centres[0], centres[1]].long()

    offsets = torch.arange(-reach, reach + 1, device=lab.device)
    steps = (offsets.abs()[:, None] + offsets.abs()).double()
    place = (spread(H, W, K, compactness) * steps + 0.5).floor().clamp(max=FARTHEST).long()
    number = torch.arange(K, device=lab.device)[:, None, None]
    for t in range(iterations + 1):
        last = t == iterations
        wy, wx = centres[0][:, None, None] + offsets[:, None], centres[1][:, None, None] + offsets  # windows
        inside = (wy >= 0) & (wy < H) & (wx >= 0) & (wx < W)
        if not last:
            inside = inside & (wy % stride == t % stride)
        at = wy.clamp(0, H - 1) * W + wx.clamp(0, W - 1)
        seen = lab.flatten(1)[:, at]
        way = place if cost is None else (place + _worst_crossing(cost, centres, offsets)).clamp(max=FARTHEST)
        distance = (seen - colours[:, :, None, None]).abs().sum(0) + way
        key = torch.where(inside, distance * BASE + number, BASE * BASE)
        nearest = labels.new_full((H * W,), BASE * BASE).scatter_reduce_(0, at.flatten(), key.flatten(), "amin")
        labels = torch.where(nearest < BASE * BASE, nearest % BASE, labels.flatten()).view(H, W)
        if last:
            break
        mine = (inside & (labels.flatten()[at] == number)).long()
        count = mine.sum((1, 2))
        parts = [wy.expand_as(at), wx.expand_as(at), *seen]
        means = [((part * mine).sum((1, 2)) + count // 2) // count.clamp(min=1) for part in parts]
        moved = torch.where(count > 0, torch.stack(means), torch.cat([centres, colours]))
        centres, colours = moved[:2], moved[2:]
    return labels, colours


def _worst_crossing(cost: Tensor, centres: Tensor, offsets: Tensor) -> Tensor:
    """Largest cost on the straight line from each centre to every pixel of its window, both included ``(K, n, n)``.

    Step s of n, the larger of both distances, is at ``round(s d / n)`` of each distance d, halves away from the centre.
    """
    H, W = cost.shape
    d = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"))
    n = d.abs().amax(0).clamp(min=1)
    worst = cost.new_zeros(centres.shape[1], len(offsets), len(offsets))
    for s in range(int(offsets.max()) + 1):
        y, x = d.sign() * ((2 * d.abs() * n.clamp(max=s) + n) // (2 * n))
        y, x = (centres[0][:, None, None] + y).clamp(0, H - 1), (centres[1][:, None, None] + x).clamp(0, W - 1)
        worst = torch.maximum(worst, cost[y, x])
    return worst


def _to_lowest_gradient(lab: Tensor, centres: Tensor) -> Tensor:
    """Centres ``(2, K)`` moved to the first pixel around them whose colours change less than there and least."""
    H, W = lab.shape[1:]
    rows, columns = torch.arange(H, device=lab.device), torch.arange(W, device=lab.device)
    down, up = (rows + 1).clamp(max=H - 1), (rows - 1).clamp(min=0)
    right, left = (columns + 1).clamp(max=W - 1), (columns - 1).clamp(min=0)
    change = (lab[:, down] - lab[:, up]).abs() + (lab[:, :, right] - lab[:, :, left]).abs()
    around = [(0, 0)] + [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    dy, dx = torch.tensor(around, device=lab.device).T
    y, x = (centres[0][:, None] + dy).clamp(0, H - 1), (centres[1][:, None] + dx).clamp(0, W - 1)
    best = change.sum(0)[y, x].argmin(1, keepdim=True)
    return torch.cat([y.gather(1, best), x.gather(1, best)], 1).T


def join_small(labels: Tensor, colours: Tensor) -> Tensor:
    """The 4-connected pieces of labels ``(H, W)``, small ones joined to others, numbered in scan order.

    Small is less than a quarter of what a centre has on average. Such a piece joins the large one beside it whose
    centre's colour, of ``colours (3, K)``, is nearest, the earlier of two; or, beside small ones only, the piece above
    its first pixel, in the top row the one to the left.
    """
    H, W = labels.shape
    N, K = H * W, colours.shape[1]
    root = pieces(labels).flatten()
    pixel = torch.arange(N, device=labels.device)
    small = (root.bincount(minlength=N) * 4 * K < N)[root]

    grid_of = pixel.view(H, W)
    first = torch.cat([grid_of[:, :-1].flatten(), grid_of[:-1].flatten()])
    second = torch.cat([grid_of[:, 1:].flatten(), grid_of[1:].flatten()])
    a, b = torch.cat([first, second]), torch.cat([second, first])
    beside = small[a] & ~small[b]
    a, b = a[beside], b[beside]
    flat = labels.flatten()
    distance = (colours[:, flat[a]] - colours[:, flat[b]]).abs().sum(0)
    nearest = pixel.new_full((N,), 2**62).scatter_reduce_(0, root[a], distance * N + root[b], "amin")

    before = torch.where(pixel >= W, pixel - W, (pixel - 1).clamp(min=0))
    joined = torch.where(nearest < 2**62, nearest % N, root[before])
    parent = torch.where(small & (root == pixel), joined, root)
    while not torch.equal(parent, further := parent[parent]):
        parent = further
    # Numbers in the order of the first pixels, which may lie in a piece that joined.
    start = pixel.new_full((N,), N).scatter_reduce_(0, parent, pixel, "amin")
    new = start[parent] == pixel
    return (new.cumsum(0) - 1)[start[parent]].view(H, W)


def pieces(labels: Tensor) -> Tensor:
    """For every pixel of labels ``(H, W)`` the first pixel, in scan order, of its 4-connected piece."""
    H, W = labels.shape
    root = torch.arange(H * W, device=labels.device).view(H, W)
    vertical, horizontal = labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]
    while True:
        before = root.clone()
        for same, a, b in (
            (vertical, (slice(1, None),), (slice(None, -1),)),
            (horizontal, (slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ):
            least = torch.minimum(root[a], root[b])
            root[a] = torch.where(same, least, root[a])
            root[b] = torch.where(same, torch.minimum(least, root[b]), root[b])
        root = root.flatten()[root]
        if torch.equal(root, before):
            return root
