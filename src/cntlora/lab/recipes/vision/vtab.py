"""VTAB-1K: 1,000 training images a task, scored on the official test images (Zhai et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from .images import LabelledImages

CLASSES = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""The 19 tasks by the names of their folders, and how many classes each has."""

TABLE_5 = {
    "Cifar100": "cifar",
    "Caltech101": "caltech101",
    "DTD": "dtd",
    "Pets": "oxford_iiit_pet",
    "NHAS": "svhn",
    "Sun397": "sun397",
    "EuroSAT": "eurosat",
    "Retinopathy": "diabetic_retinopathy",
    "CLEVR-Count": "clevr_count",
    "CLEVR-Dist": "clevr_dist",
    "DMLab": "dmlab",
    "KITTI-Dist": "kitti",
    "dSpr-Ori": "dsprites_ori",
    "sNORB-Ele": "smallnorb_ele",
}
"""The 14 columns of the paper's table 5 and their folders; NHAS, "SHVN" read backwards, can only be SVHN."""

PARTS = {"test": ("train800val200.txt", "test.txt"), "val": ("train800.txt", "val200.txt")}
"""The lists of training and of held-out images: "test" for results, "val" to choose a learning rate."""


def read_vtab(data: str, dataset: str, part: str = "test") -> tuple[LabelledImages, LabelledImages]:
    """Training and held-out images of a task from the folder layout in which VTAB-1K is passed on.

    `data/dataset/` holds the images and lists such as `train800val200.txt`, `train800.txt`, `val200.txt` and
    `test.txt`, one image a line: a file relative to `data/dataset/`, a blank, a class index.

    Args:
        data: folder of all tasks.
        dataset: a key of `CLASSES`.
        part: a key of `PARTS`.

    Raises:
        ValueError: if a folder, list or image is missing or a line is not as expected; names file and line.
    """
    root = Path(data).expanduser() / dataset
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder; expected {data} to hold a folder for each task of VTAB-1K")
    train, held_out = (_listed(root, name, CLASSES[dataset]) for name in PARTS[part])
    return train, held_out


def _listed(root: Path, name: str, classes: int) -> LabelledImages:
    """The images of one list."""
    path = root / name
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; expected lines such as 'images/train800/0001.jpg 12'")
    sources, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal() or int(label) >= classes:
            raise ValueError(
                f"{path}: line {number}: expected a file and a class below {classes}, got {line.strip()!r}"
            )
        if not (root / file).is_file():
            raise ValueError(f"{path}: line {number}: there is no file {root / file}")
        sources.append(root / file)
        labels.append(int(label))
    if not sources:
        raise ValueError(f"{path}: the list is empty")
    return LabelledImages(sources, labels, tuple(map(str, range(classes))), str(path))
