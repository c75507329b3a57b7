"""Reconstructed pictures: PSNR, SSIM, LPIPS where it can be had, and a Fréchet distance of a local network's features.

Nothing is downloaded. What could not be measured is said in a note, never left out silently. The Fréchet distance is
FID's formula (Heusel et al., 2017) on another network's features: it is named for that network and must not be compared
with FID, which is defined by one Inception network.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.evaluate.measure import Figures, share
from fourmill.evaluate.tokens.measure import Fidelity, Setting, same_shape

_LEAST_ERROR = 1e-4  # of squared grey levels: a perfect copy has 88 dB
_ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file, which `lpips` would download


class RgbFidelity(Fidelity):
    """uint8 (S, S, 3)."""

    protocol = "PSNR and SSIM (Gaussian window of 11, Wang et al. 2004): means over pictures"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sums: dict[str, float] = {}
        self._pictures = 0
        self._notes: list[str] = []
        self._lpips = self._load_lpips()
        self._frechet: FrechetDistance | None = None
        if setting.rfid_network is None:
            self._notes.append("rFID-like distance not measured: no local network was given (--rfid-network)")
        else:
            self._frechet = FrechetDistance(setting.rfid_network)

    def add(self, restored: np.ndarray, label: np.ndarray) -> float:
        same_shape(restored, label)
        values = {"psnr_db": psnr(restored, label), "ssim": ssim(restored, label)}
        if self._lpips is not None:
            values["lpips"] = self._lpips(restored, label)
        if self._frechet is not None:
            self._frechet.add(restored, label)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._pictures += 1
        return float(255 * 10 ** (-values["psnr_db"] / 20))  # root mean square error in grey levels

    def figures(self) -> Figures:
        found = {name: share(total, self._pictures) for name, total in self._sums.items()}
        if self._frechet is not None:
            found[self._frechet.name] = self._frechet.distance()
        return found

    def notes(self) -> list[str]:
        return [*self._notes, *(self._frechet.notes() if self._frechet else [])]

    def _load_lpips(self) -> Callable[[np.ndarray, np.ndarray], float] | None:
        """LPIPS by the `lpips` package, if it and AlexNet's weights are on this machine."""
        import torch

        if importlib.util.find_spec("lpips") is None:
            self._notes.append("LPIPS not measured: the package `lpips` is not installed")
            return None
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
        if not weights.is_file():
            self._notes.append(f"LPIPS not measured: {weights} is not there, and nothing is downloaded")
            return None
        lpips = importlib.import_module("lpips")
        return functools.partial(_lpips, lpips.LPIPS(net="alex", verbose=False).eval())


def _lpips(network: Any, restored: np.ndarray, label: np.ndarray) -> float:
    import torch

    pair = torch.from_numpy(np.stack([restored, label])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        return float(network(pair[:1], pair[1:]))


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 pictures in dB, at most 88."""
    error = float(np.mean((picture.astype(np.float64) - truth) ** 2))
    return float(10 * np.log10(255**2 / max(error, _LEAST_ERROR)))


def ssim(picture: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of uint8 (S, S, 3) pictures."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = torch.from_numpy(np.stack([picture, truth])).permute(0, 3, 1, 2).double()
    return float(structural_similarity_index_measure(pair[:1], pair[1:], data_range=255.0))


class FrechetDistance:
    """Between the Gaussians of two sets of pictures' features, by a timm network in a local folder.

    Sums and products of features are kept, not the features: 8 (d + d^2) bytes a set.
    """

    def __init__(self, folder: str) -> None:
        import timm
        import torch

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"no timm network at {folder!r}: config.json and its weights are needed in a local folder")
        self.network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        self._torch = torch
        config = self.network.pretrained_cfg
        self._size = int(config["input_size"][-1])
        self._mean, self._std = (np.array(config[name], np.float32) for name in ("mean", "std"))
        self.name = f"frechet_{config['architecture']}"
        self._sets = (_Moments(), _Moments())

    def add(self, restored: np.ndarray, label: np.ndarray) -> None:
        """One picture of each set."""
        pixels = np.stack([self._prepared(restored), self._prepared(label)])
        with self._torch.inference_mode():
            features = self.network(self._torch.from_numpy(pixels)).double().numpy()
        for moments, row in zip(self._sets, features, strict=True):
            moments.add(row)

    def _prepared(self, picture: np.ndarray) -> np.ndarray:
        size = (self._size, self._size)
        resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
        return ((resized - self._mean) / self._std).transpose(2, 0, 1)

    def distance(self) -> float:
        """The squared Fréchet distance; NaN for fewer than two pictures."""
        first, second = self._sets
        if first.count < 2:
            return float("nan")
        return frechet(first.mean, first.covariance, second.mean, second.covariance)

    def notes(self) -> list[str]:
        count, width = self._sets[0].count, len(np.atleast_1d(self._sets[0].mean))
        if not 2 <= count <= width:
            return []
        return [f"{self.name}: {count} pictures for features of {width} numbers: too high, compare equal counts only"]


class _Moments:
    """Running mean and covariance."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._products: Any = 0.0

    def add(self, row: np.ndarray) -> None:
        self.count += 1
        self._sum = self._sum + row
        self._products = self._products + np.outer(row, row)

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self._sum) / max(self.count, 1)

    @property
    def covariance(self) -> np.ndarray:
        return np.asarray((self._products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1))


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2), by the eigenvalues of A^1/2 B A^1/2, which is symmetric."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)
