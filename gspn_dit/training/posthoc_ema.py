"""Post-hoc EMA (EDM2, arXiv 2312.02696, section 3 and appendix C): the average's width is chosen after training.

Training keeps running averages in which the weights at step τ count as τ^γ, for two values of γ, and leaves a snapshot
of each every `training.posthoc_ema_every` steps. Any average of that family, at any step, is then close to a linear
combination of the snapshots:

    gspn-dit posthoc-ema --run runs/NAME --sigma-rel 0.07 --out runs/NAME-0.07
    gspn-dit sample --model runs/NAME-0.07

A profile is p_γ,t(τ) = (γ+1) τ^γ / t^(γ+1) on 0 ≤ τ ≤ t (equation 1). Its width relative to t is its standard deviation
σ_rel = √(γ+1) / ((γ+2) √(γ+3)) (section 3.1), which names it.

:mod:`gspn_dit.storage.run_folder` says where in a run the snapshots lie.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("posthoc-ema", prog="python -m gspn_dit.training.posthoc_ema")
    raise SystemExit

import math
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from gspn_dit.errors import InputError
from gspn_dit.storage.files import new_folder, replacing, require_new, save_tensors, write_json
from gspn_dit.storage.run_folder import Checkpoint, RunFolder, Snapshot
from gspn_dit.training.checkpoints import DiskWork, State, collect

if TYPE_CHECKING:
    from gspn_dit.commands import PosthocEMAOptions as Options


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ of a relative width: the largest root of γ³ + 7γ² + (16 - σ⁻²)γ + 12 - σ⁻².

    That is σ_rel² (γ+2)² (γ+3) = γ+1 multiplied out (appendix C.1). It is positive for σ_rel < 1/√12, the width of a
    plain mean.
    """
    inverse = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def inner_products(gammas_a: np.ndarray, steps_a: np.ndarray, gammas_b: np.ndarray, steps_b: np.ndarray) -> np.ndarray:
    """∫ p_a p_b dτ for every profile a and every profile b, float64 (len a, len b) (appendix C.2).

    Both are powers up to min(t_a, t_b), so the integral is (γ_a+1)(γ_b+1) / (γ_a+γ_b+1) · min^(γ_a+γ_b+1) /
    (t_a^(γ_a+1) t_b^(γ_b+1)). With r = t_a/t_b the powers are those of a ratio below 1 and nothing overflows.
    """
    ga, gb = np.asarray(gammas_a, float)[:, None], np.asarray(gammas_b, float)[None]
    ta, tb = np.asarray(steps_a, float)[:, None], np.asarray(steps_b, float)[None]
    ratio = np.where(ta < tb, (ta / tb) ** gb, (tb / ta) ** ga)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * ratio / np.maximum(ta, tb)


def coefficients(snapshots: list[Snapshot], sigma_rel: float, step: int) -> tuple[np.ndarray, float]:
    """The weights of snapshots whose combined profile is nearest to p_γ,step in least squares (appendix C.2).

    They sum to 1, as profiles do: else a width out of the snapshots' reach would give a network of smaller weights.

    Returns:
        One weight a snapshot, float64, and the distance that remains relative to the length of p_γ,step.
    """
    gammas = np.array([gamma_of(snapshot.sigma_rel) for snapshot in snapshots])
    steps = np.array([snapshot.step for snapshot in snapshots], float)
    gamma, at = np.array([gamma_of(sigma_rel)]), np.array([step], float)
    gram, wanted = inner_products(gammas, steps, gammas, steps), inner_products(gammas, steps, gamma, at)[:, 0]
    ones = np.ones((len(steps), 1))  # with Lagrange's multiplier for the sum; products are of the order of 1 / step
    system = np.block([[step * gram, ones], [ones.T, np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(step * wanted, 1.0), rcond=None)[0][:-1]
    length = inner_products(gamma, at, gamma, at).item()
    rest = length - 2 * weights @ wanted + weights @ gram @ weights
    return weights, math.sqrt(max(0.0, rest) / length)


def save_snapshot(accelerator: Accelerator, run: RunFolder, state: State, step: int) -> None:
    """Write the running averages of a step; every process calls this. Raises as a checkpoint does."""
    writing = DiskWork(accelerator.is_main_process)
    writing.attempt(lambda: _write_config(run.snapshots_config, state.model_config))
    for sigma_rel, average in state.power_emas.items():
        path = run.snapshot(step, sigma_rel).path
        tensors = collect(average.tensors, keep=accelerator.is_main_process)
        writing.attempt(partial(_write, path, tensors))
    writing.settle(f"the post-hoc EMA's snapshot of step {step}", run.path)


def _write_config(path: Path, model_config: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(model_config)


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as temporary:
        save_tensors({name: tensor.half() for name, tensor in tensors.items()}, temporary)


def drop_snapshots(run: RunFolder, step: int) -> None:
    """Remove the snapshots after a step, left by a run that was cut."""
    for snapshot in run.list_snapshots():
        if snapshot.step > step:
            snapshot.path.unlink()


def reconstruct(snapshots: list[Snapshot], weights: np.ndarray) -> dict[str, torch.Tensor]:
    """Σ weight · snapshot, float32, one parameter at a time."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(snapshot.path, framework="pt")) for snapshot in snapshots]
        return {
            name: sum(w * file.get_tensor(name).double() for w, file in zip(weights, files, strict=True)).float()
            for name in files[0].keys()  # noqa: SIM118 (it is no dictionary)
        }


def main(options: Options) -> None:
    """Make the averaged weights of any width from a run's snapshots, as a checkpoint folder to sample from."""
    run, out = RunFolder(Path(options.run)), Path(options.out)
    require_new(out)
    there = run.list_snapshots()
    if not there:
        where = run.snapshots_config.parent.name
        raise InputError(
            f"has no snapshots in {where}/",
            argument="run",
            value=options.run,
            remedy="train with --training.posthoc-ema-every",
        )
    step = there[-1].step if options.step is None else options.step
    snapshots = [snapshot for snapshot in there if snapshot.step <= step]
    if not snapshots or snapshots[-1].step != step:
        steps = sorted({snapshot.step for snapshot in there})
        near = min(steps, key=lambda each: abs(each - step))
        raise InputError(
            "no snapshot of that step",
            argument="step",
            value=step,
            remedy=f"the nearest is {near}, the newest {steps[-1]}",
        )
    for path in (run.config, run.class_names, run.snapshots_config):
        if not path.is_file():
            raise InputError(
                f"has no {path.relative_to(run.path)}", argument="run", value=options.run, remedy="restore it"
            )
    weights, rest = coefficients(snapshots, options.sigma_rel, step)
    with new_folder(out) as folder:
        made = Checkpoint(folder)
        made.ema.mkdir(parents=True)
        try:
            tensors = reconstruct(snapshots, weights)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"a snapshot cannot be read ({error})", argument="run", value=options.run, remedy="remove it"
            ) from error
        save_tensors(tensors, made.ema_weights, {"format": "pt"})
        shutil.copy(run.snapshots_config, made.ema_config)
        shutil.copy(run.config, made.config)
        shutil.copy(run.class_names, made.class_names)
        metadata: dict[str, Any] = {"step": step}
        if newest := run.newest_checkpoint():  # which notes what VAE the latents are of
            metadata["vae"] = newest.read_metadata().get("vae")
        write_json(made.metadata, metadata)
    print(
        f"{out}: step {step}, sigma_rel {options.sigma_rel:g} (γ = {gamma_of(options.sigma_rel):.3f}) from "
        f"{len(snapshots)} snapshots; {rest:.2%} of the profile is out of their reach"
    )
