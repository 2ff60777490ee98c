"""Writes scikit_image.json: PSNR and SSIM of scikit-image on pairs of images that a seed makes again.

python tests/golden/make_scikit_image.py        needs scikit-image (0.26.0 made the file)
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SHAPES = ((28, 28, 1), (32, 24, 3), (11, 11, 1))


def pair(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Two images in [-1, 1] that are alike: smooth waves, and the same with noise."""
    h, w, c = SHAPES[index]
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(x * rng.uniform(0.1, 0.6) + y * rng.uniform(0.1, 0.6)) for _ in range(c)]
    a = np.stack(waves, -1) * 0.9
    return a, np.clip(a + 0.2 * rng.standard_normal(a.shape), -1, 1)


def main() -> None:
    import skimage
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    rows = []
    for index in range(len(SHAPES)):
        a, b = pair(index)
        settings = dict(data_range=2.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        rows.append(
            {
                "psnr": float(peak_signal_noise_ratio(a, b, data_range=2.0)),
                "ssim": float(structural_similarity(a, b, **settings)),
            }
        )
    found = {"scikit-image": skimage.__version__, "rows": rows}
    Path(__file__).with_name("scikit_image.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
