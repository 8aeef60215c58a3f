"""Inspection of a run directory: the spectra of its last snapshot, in the form of a checkpoint's."""

import os
from pathlib import Path

import numpy as np
import torch

from rankdecay.inspection import (
    BALANCE,
    Inspection,
    Row,
    mean_spectrum,
    over_time,
    spectrum_rows,
    untrained_product,
)
from rankdecay.lab.errors import SettingError
from rankdecay.lab.report.chart import evenly_spaced_indices
from rankdecay.lab.store import snapshot_files
from rankdecay.lab.stored import read_config, read_snapshot
from rankdecay.spectrum import Spectrum


def is_run_directory(path: Path) -> bool:
    """Whether a path is a run directory of the lab, rather than a checkpoint."""
    return os.path.isdir(path / "snapshots") and os.path.isfile(path / "config.json")


def inspect_run(path: Path) -> Inspection:
    """Return each head's product W_Kᵀ W_Q in the last snapshot, beside the same shapes at initialisation.

    Args:
        path: the run directory.

    Raises:
        SettingError: If it has no snapshot, or one that cannot be read.
    """
    files = snapshot_files(path)
    if not files:
        raise SettingError(f"{path} has no snapshot yet; wait for the run's first evaluation.")
    rows: list[Row] = []
    for (arm, seed), (width, product) in _products(files[-1]).items():
        for layer, sigma in enumerate(product):  # (heads, head_dim)
            deviation = (3 * width) ** -0.5  # of nn.Linear's uniform initialisation
            shapes = ((width, width), sigma.shape[-1], 1, None, (deviation, deviation))
            untrained = untrained_product("query_key", *shapes) | dict.fromkeys(BALANCE)
            heads = spectrum_rows({"product": "query_key"}, sigma.shape[-1], Spectrum(sigma), untrained)
            rows += [{"layer": layer, "name": f"{arm}, seed {seed}, layer {layer}", **row} for row in heads]
    settings = read_config(path).get("settings", {})
    notes = [f"step {int(files[-1].stem)}"]
    if settings.get("qk_norm", "head") != "none":
        notes.append("queries and keys are normalised: the product is shown for its spectrum, not for its balance")
    return Inspection(str(path), rows, notes)


def run_over_time(path: Path, most: int | None = None) -> str:
    """Return a picture of the spectra of W_Kᵀ W_Q over training, a line per stored step, mean over seeds and heads.

    Args:
        path: the run directory.
        most: stored steps to show, at even distances, the first and the last among them; by default all.

    Returns:
        The picture; empty for a run without snapshots.
    """
    series: dict[str, list[tuple[str, list[float]]]] = {}
    files = snapshot_files(path)
    if most is not None:
        files = [files[i] for i in evenly_spaced_indices(len(files), most)]
    for file in files:
        arms: dict[str, list[list[float | None]]] = {}
        for (arm, _), (_, product) in _products(file).items():
            arms.setdefault(arm, []).extend(product.flatten(0, 1).tolist())
        for arm, spectra in arms.items():
            series.setdefault(f"W_Kᵀ W_Q of {arm}", []).append((f"step {int(file.stem)}", mean_spectrum(spectra)))
    return over_time(series) if series else ""


def _products(file: Path) -> dict[tuple[str, int], tuple[int, torch.Tensor]]:
    """Return for every member the width of the model and the singular values (layers, heads, head_dim)."""
    try:
        arrays = read_snapshot(file)
        members = zip(arrays["arms"].tolist(), arrays["seeds"].tolist(), strict=True)
        width = arrays["singular_values"].shape[-1]
        product = arrays["product"].astype(np.float64)
        if product.ndim != 4 or not 0 < product.shape[-1] <= width:
            raise ValueError(f"product has shape {product.shape}")
        sigma = torch.from_numpy(product)
        return {member: (width, product) for member, product in zip(members, sigma, strict=True)}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{file} cannot be read as a snapshot ({error}); restore it, or remove it") from None
