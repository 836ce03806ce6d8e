"""Post-hoc EMA against the closed forms of power-function averages, and from a run's snapshots to images."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from made.runs import list_checkpoints
from made.store import make_store
from made.training import config
from safetensors.torch import load_file

from gspn_dit.commands import PosthocEMAOptions as Options
from gspn_dit.commands import SampleOptions
from gspn_dit.errors import InputError
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.sample import main as sample
from gspn_dit.storage.run_folder import RunFolder, Snapshot
from gspn_dit.training.ema import EMA, power_function
from gspn_dit.training.loop import train
from gspn_dit.training.posthoc_ema import (
    coefficients,
    gamma_of,
    inner_products,
    main,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STEPS = 2000


def snapshot(step, sigma_rel):
    return Snapshot(None, step, sigma_rel)


def average_of(power, sigma_rel, step):
    """The exact average, over p_γ,step, of a weight that is (τ/STEPS)^power at step τ."""
    gamma = gamma_of(sigma_rel)
    return (gamma + 1) / (gamma + 1 + power) * (step / STEPS) ** power


@pytest.fixture(scope="module")
def averages():
    """For powers 0 to 3 and two widths, what training's own update has at every 100th step: (σ, step) → 4 numbers."""
    found = {}
    for sigma_rel in (0.05, 0.10):
        model = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
        average = EMA(model, power_function(gamma_of(sigma_rel)))
        for step in range(1, STEPS + 1):
            with torch.no_grad():
                model.weight.copy_(torch.tensor([(step / STEPS) ** power for power in range(4)]))
            average.update(model, step)
            if step % 100 == 0:
                found[sigma_rel, step] = average.tensors["weight"][0].clone().numpy()
    return found


def test_gamma_is_that_of_the_width():
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = gamma_of(sigma_rel)
        assert math.isclose(math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)), sigma_rel, rel_tol=1e-9)
        assert gamma > 0
    assert math.isclose(gamma_of(0.05), 16.97, abs_tol=0.01)  # as the paper says
    assert math.isclose(gamma_of(0.10), 6.94, abs_tol=0.01)


def test_inner_products_are_the_integrals():
    taus = (np.arange(200_000) + 0.5) / 1000  # to 200, by the midpoint rule

    def profile(gamma, t):
        return np.where(taus < t, (gamma + 1) * taus**gamma / t ** (gamma + 1), 0)

    for a, ta, b, tb in [(2.0, 100, 6.9, 200), (6.9, 200, 2.0, 100), (17.0, 150, 17.0, 150), (3.5, 50, 17.0, 200)]:
        product = inner_products([a], [ta], [b], [tb]).item()
        assert math.isclose(product, (profile(a, ta) * profile(b, tb)).sum() / 1000, rel_tol=1e-5)


def test_training_keeps_the_power_function_average(averages):
    for (sigma_rel, step), found in averages.items():
        if step >= 500:  # a sum over steps for an integral: off by about (γ + 1) / 2 steps
            exact = [average_of(power, sigma_rel, step) for power in range(4)]
            np.testing.assert_allclose(found, exact, rtol=6 / step)


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.05, 2000), (0.07, 2000), (0.10, 1500), (0.13, 2000), (0.2, 2000)])
def test_any_width_is_reconstructed(averages, sigma_rel, step):
    snapshots = [snapshot(at, sigma) for sigma, at in averages if at <= step]
    weights, rest = coefficients(snapshots, sigma_rel, step)
    assert rest < 0.02
    found = sum(w * averages[s.sigma_rel, s.step] for w, s in zip(weights, snapshots, strict=True))
    exact = [average_of(power, sigma_rel, step) for power in range(4)]
    np.testing.assert_allclose(found, exact, rtol=5e-3)
    # which is far nearer than the wrong width would be
    if sigma_rel not in (0.05, 0.10):
        assert min(abs(average_of(3, wrong, step) - exact[3]) / exact[3] for wrong in (0.05, 0.10)) > 0.02


@pytest.mark.parametrize("sigma_rel", [0.02, 0.07, 0.2, 0.28])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_a_network_that_does_not_change_is_its_own_average(sigma_rel, count):
    """However far the width is out of the snapshots' reach, their weights sum to 1."""
    snapshots = [snapshot(step, sigma) for step in range(100, 100 * count + 1, 100) for sigma in (0.05, 0.10)]
    weights, _ = coefficients(snapshots, sigma_rel, 100 * count)
    assert math.isclose(weights.sum(), 1, abs_tol=1e-9)


def test_a_snapshot_is_its_own_reconstruction():
    snapshots = [snapshot(step, sigma) for step in range(100, 1001, 100) for sigma in (0.05, 0.10)]
    weights, rest = coefficients(snapshots, 0.10, 600)
    expected = [float((s.step, s.sigma_rel) == (600, 0.10)) for s in snapshots]
    np.testing.assert_allclose(weights, expected, atol=1e-4)
    assert rest < 1e-5


def test_from_a_run_to_images(tmp_path, capsys):
    store = make_store(tmp_path / "store")
    every = ["--training.posthoc_ema_every", 3, "--training.max_steps", 12, "--training.checkpoint_every", 5]
    run = tmp_path / "run"
    train(config(run, store, *every))
    assert [(s.step, s.sigma_rel) for s in RunFolder(run).list_snapshots()] == [
        (n, s) for n in (3, 6, 9, 12) for s in (0.05, 0.1)
    ]

    main(Options(run=str(run), sigma_rel=0.10, out=str(tmp_path / "same"), step=9))
    same = load_file(tmp_path / "same" / "ema" / "diffusion_pytorch_model.safetensors")
    kept = load_file(run / "posthoc-ema" / "step-0000009-sigma-0.1.safetensors")
    for name, tensor in kept.items():
        torch.testing.assert_close(same[name], tensor.float(), rtol=1e-3, atol=1e-4)

    capsys.readouterr()
    main(Options(run=str(run), sigma_rel=0.15, out=str(tmp_path / "wide")))
    assert "step 12" in capsys.readouterr().out
    sample(SampleOptions(model=str(tmp_path / "wide"), num_images=2, out=str(tmp_path / "grid.png"), batch_size=2))
    assert (tmp_path / "grid.png").is_file()
    metadata = json.loads((tmp_path / "wide" / "metadata.json").read_text())
    assert (metadata["step"], metadata["vae"]["scaling_factor"]) == (12, 1 / 12)
    weights = load_pipeline(tmp_path / "wide").transformer.state_dict()
    assert not any(torch.equal(weights[name], same[name]) for name in ("x_embedder.proj.weight", "modulation.1.weight"))


def test_a_resumed_run_leaves_the_same_snapshots(tmp_path):
    store = make_store(tmp_path / "store")
    every = ["--training.posthoc_ema_every", 3, "--training.checkpoint_every", 4, "--resume", "auto"]
    train(config(tmp_path / "whole", store, *every, "--training.max_steps", 12))
    train(config(tmp_path / "cut", store, *every, "--training.max_steps", 10))
    shutil.rmtree(list_checkpoints(tmp_path / "cut")[-1])  # back to step 8; the snapshots of 9 and 10 are of no run now
    train(config(tmp_path / "cut", store, *every, "--training.max_steps", 12))
    whole, cut = (RunFolder(tmp_path / name).list_snapshots() for name in ("whole", "cut"))
    assert [s.path.name for s in cut] == [s.path.name for s in whole]
    assert all(a.path.read_bytes() == b.path.read_bytes() for a, b in zip(cut, whole, strict=True))
    with pytest.raises(InputError, match=r"posthoc_ema_sigma_rels.*0\.07.*\[0\.05, 0\.1\]"):
        train(config(tmp_path / "cut", store, *every, "--training.posthoc_ema_sigma_rels", "[0.05,0.07]"))


def test_bad_input_is_named(tmp_path):
    store = make_store(tmp_path / "store")
    train(config(tmp_path / "run", store, "--training.max_steps", 4))
    assert not (tmp_path / "run" / "posthoc-ema").exists()  # off by default
    wanted = Options(run=str(tmp_path / "run"), sigma_rel=0.1, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"^run=.*posthoc-ema-every"):
        main(wanted)
    train(config(tmp_path / "other", store, "--training.max_steps", 4, "--training.posthoc_ema_every", 2))
    with pytest.raises(InputError, match=r"^step=3: .*nearest is 2, the newest 4"):
        main(Options(run=str(tmp_path / "other"), sigma_rel=0.1, out=str(tmp_path / "out"), step=3))
    (tmp_path / "other" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"^run=.*has no config\.yaml"):
        main(Options(run=str(tmp_path / "other"), sigma_rel=0.1, out=str(tmp_path / "out")))
    with pytest.raises(InputError, match=r"^sigma_rel=0\.3"):
        Options(run="run", sigma_rel=0.3, out="out")
    assert not (tmp_path / "out").exists()
