import numpy as np
import pytest
import torch
from PIL import Image

from fastcam.errors import FastcamError
from fastcam.io import load_tree, read_region_png, save_tree, write_region_png
from fastcam.methods.region_growing import Config, grow_regions
from fastcam.ops.region_merge import MergeTree


def tree_of(n=12):
    image = torch.randint(0, 256, (1, 3, 20, 24), generator=torch.Generator().manual_seed(0)).byte()
    return grow_regions(image, Config(superpixels=n))[0]


class TestRegionPng:
    def test_round_trip_of_all_16_bits(self, tmp_path):
        labels = torch.tensor([[0, 1, 255], [256, 40_000, 65_535]])
        write_region_png(tmp_path / "a.png", labels)
        assert torch.equal(read_region_png(tmp_path / "a.png").long(), labels)
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == "I;16"  # other programs read it so
            assert image.size == (3, 2)

    def test_grey_png_of_8_bits_reads_too(self, tmp_path):
        Image.fromarray(np.array([[7, 200]], np.uint8)).save(tmp_path / "a.png")
        assert read_region_png(tmp_path / "a.png").tolist() == [[7, 200]]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([[65_536]]), "from 0 to 65535, got 65536 to 65536"),
            (torch.tensor([[-1, 3]]), "from 0 to 65535, got -1 to 3"),
            (torch.zeros(2, 2), r"integers \(H, W\), got torch.float32"),
            (torch.zeros(0, 2, dtype=torch.int32), r"integers \(H, W\), got torch.int32 \(0, 2\)"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, labels, message, tmp_path):
        with pytest.raises(ValueError, match=f"^write_region_png: expected .*{message}"):
            write_region_png(tmp_path / "a.png", labels)
        assert not list(tmp_path.iterdir())

    def test_missing_damaged_and_coloured_files_are_named(self, tmp_path):
        with pytest.raises(FastcamError, match=r"a\.png do not exist"):
            read_region_png(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
        with pytest.raises(FastcamError, match=r"a\.png do not decode"):
            read_region_png(tmp_path / "a.png")
        Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
        with pytest.raises(FastcamError, match=r"b\.png store RGB colours"):
            read_region_png(tmp_path / "b.png")


class TestTree:
    def test_round_trip_bit_for_bit_and_every_cut_alike(self, tmp_path):
        tree = tree_of()
        save_tree(tmp_path / "a.npz", tree)
        back = load_tree(tmp_path / "a.npz")
        for name in ("labels", "merges", "values", "thresholds", "rounds"):
            assert torch.equal(getattr(back, name), getattr(tree, name)), name
        assert (back.regions, back.stop) == (tree.regions, tree.stop)
        for count in range(tree.regions - len(tree.merges), tree.regions + 1):
            assert torch.equal(back.cut(count=count), tree.cut(count=count))
        assert torch.equal(back.cut(1.0), tree.cut(1.0))

    def test_tree_without_merges(self, tmp_path):
        save_tree(tmp_path / "a.npz", tree_of(1))
        assert load_tree(tmp_path / "a.npz").cut().unique().tolist() == [0]

    def test_equal_trees_give_equal_files(self, tmp_path):
        for name in ("a.npz", "b.npz"):
            save_tree(tmp_path / name, tree_of())
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(FastcamError, match=r"a\.npz does not exist; run regions first"):
            load_tree(tmp_path / "a.npz")

    def test_damaged_file_is_named(self, tmp_path):
        save_tree(tmp_path / "a.npz", tree_of())
        whole = (tmp_path / "a.npz").read_bytes()
        for broken in (b"", whole[: len(whole) // 2], b"PK\x03\x04" + whole[40:]):
            (tmp_path / "a.npz").write_bytes(broken)
            with pytest.raises(FastcamError, match=r"a\.npz is damaged or not made by regions"):
                load_tree(tmp_path / "a.npz")

    @pytest.mark.parametrize(
        "change",
        [
            {"merges": torch.tensor([[0, 99]])},
            {"merges": torch.tensor([[3, 1]])},
            {"merges": torch.tensor([[-1, 1]])},
            {"rounds": torch.zeros(5, dtype=torch.int64)},
            {"regions": 0},
            {"labels": torch.full((2, 2), -1)},
        ],
    )
    def test_arrays_that_do_not_fit_together_are_refused(self, change, tmp_path):
        fields = {
            "labels": torch.tensor([[0, 1], [2, 3]]),
            "merges": torch.tensor([[0, 1]]),
            "values": torch.ones(1),
            "thresholds": torch.ones(1),
            "rounds": torch.zeros(1, dtype=torch.int64),
            "regions": 4,
            "stop": 0.0,
        }
        save_tree(tmp_path / "a.npz", MergeTree(**fields))
        load_tree(tmp_path / "a.npz")
        save_tree(tmp_path / "a.npz", MergeTree(**{**fields, **change}))
        with pytest.raises(FastcamError, match="damaged or not made by regions"):
            load_tree(tmp_path / "a.npz")
