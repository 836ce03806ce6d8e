"""The step knows neither what a condition is nor what is learned: another kind of each goes through it as it is."""

import pytest
import torch
from accelerate import Accelerator
from made.store import make_store
from torch import nn
from torch.nn import functional

from gspn_dit.commands import EncodeOptions as Options
from gspn_dit.conditioning import ClassLabels
from gspn_dit.config import Config, TrainingConfig
from gspn_dit.data import LatentStore, open_images
from gspn_dit.data.encode import encode
from gspn_dit.data.extras import Extra
from gspn_dit.diffusion import create_objective
from gspn_dit.training.checkpoints import State
from gspn_dit.training.diffusion import DiffusionTask, make_batch
from gspn_dit.training.ema import EMA, exponential
from gspn_dit.training.latents import FromMoments
from gspn_dit.training.loop import load_batches
from gspn_dit.training.step import step_seed, take_step
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.stream import TrainingStream

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STATES = "encoder_hidden_states"


def begin(source, model, *, encoder, conditioning, objective, latent_shape, dropout=0.0, rate=1e-2, **options):
    """A run of these parts and its state before the first step."""
    config = Config(training=TrainingConfig(**{"batch_size": 8, "max_steps": 60, **options}))
    config.data.num_workers = 0
    stream = TrainingStream(
        source,
        latent_shape=latent_shape,
        condition_names=conditioning.names,
        dropout=dropout,
        horizontal_flip=False,
        seed=0,
    )
    accelerator = Accelerator(cpu=True)
    parts = (source, stream, encoder, conditioning, objective, lambda: model, None, {}, None)
    run = DiffusionTask(config, accelerator, *parts)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=rate))
    return run, State(model, wrapped, optimizer, EMA(model, exponential(0.9)), {}, "")


def train(run, state, steps):
    """The losses of the first steps."""
    batches, stop = load_batches(run, 0), StopRequest()
    return [take_step(run, state, batches, step, stop, may_skip=False)[0] for step in range(1, steps + 1)]


class Words:
    """Made hidden states of 8 words, 16 numbers each, of every image."""

    def __init__(self):
        self.declared = {STATES: Extra(torch.float16, (8, 16))}

    def __call__(self, indices):
        return {STATES: torch.stack([torch.full((8, 16), 1 + index / 512) for index in indices]).half()}


class HiddenStates:
    """A kind of condition that reads what :class:`Words` stored; its null condition is zero."""

    names = (STATES,)

    def null(self, count):
        return {STATES: torch.zeros(count, 8, 16, dtype=torch.float16)}

    def drop(self, condition, mask):
        return {STATES: condition[STATES].masked_fill(mask[:, None, None], 0)}


class Listener(nn.Module):
    """A model that is told hidden states, and no class."""

    def __init__(self):
        super().__init__()
        self.image, self.words = nn.Conv2d(4, 4, 1), nn.Linear(16, 4, bias=False)

    def forward(self, latents, timesteps, encoder_hidden_states):
        return self.image(latents) + self.words(encoder_hidden_states.float().mean(1))[:, :, None, None]


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """Digits with hidden states beside their latents."""
    out = tmp_path_factory.mktemp("latents") / "worded"
    options = Options("digits", "digits", 32, str(out), split="test", shard_size=200, num_workers=0, device="cpu")
    encode(options, Words())
    return LatentStore(out)


def listening(store, **changes):
    torch.manual_seed(0)
    given = dict(
        encoder=FromMoments(store),
        conditioning=HiddenStates(),
        objective=create_objective("flow"),
        latent_shape=store.latent_shape,
    )
    return begin(store, Listener(), **{**given, **changes})


def test_another_kind_of_condition_reaches_the_model_from_the_store(worded):
    run, state = listening(worded)
    before = state.model.words.weight.detach().clone()
    (loss,) = train(run, state, 1)
    assert loss > 0 and not torch.equal(state.model.words.weight, before), "the words are learned from"
    batch = make_batch(next(load_batches(run, 0)), run.encoder, run.conditioning)
    assert list(batch["condition"]) == [STATES]
    assert batch["condition"][STATES].shape == (8, 8, 16) and batch["condition"][STATES].dtype == torch.float16


def test_a_dropped_condition_is_its_null(worded):
    run, state = listening(worded, dropout=1.0)
    before = state.model.words.weight.detach().clone()
    batch = make_batch(next(load_batches(run, 0)), run.encoder, run.conditioning)
    assert torch.equal(batch["condition"][STATES], run.conditioning.null(8)[STATES])
    train(run, state, 1)
    decayed = before * (1 - 1e-2 * 1e-2)  # AdamW's own
    torch.testing.assert_close(state.model.words.weight, decayed, rtol=0, atol=1e-6)


def test_the_share_that_is_dropped_is_the_streams(worded):
    """Row by row: the mask of the batch says which, and the others keep theirs."""
    run, _ = listening(worded, dropout=0.5, batch_size=64)
    samples = next(load_batches(run, 0))
    batch = make_batch(samples, run.encoder, run.conditioning)
    null = (batch["condition"][STATES] == 0).flatten(1).all(1)
    assert torch.equal(null, samples["drop"]) and 16 < int(null.sum()) < 48
    assert torch.equal(batch["condition"][STATES][~null], samples["condition"][STATES][~null])


class CrossEntropy:
    """A classifier's objective: the model's answer is the logits of the classes."""

    def loss(self, model, batch):
        logits = model(batch["latents"]).float()
        return functional.cross_entropy(logits, batch["known"]["class_labels"], reduction="none")


@pytest.mark.parametrize(("kind", "rate"), [("images", 1e-3), ("latents", 1e-2)])
def test_a_classifier_trains_through_the_same_step(tmp_path, kind, rate):
    if kind == "images":
        source, shape = open_images("digits", 32), (3, 32, 32)

        def encoder(samples):
            return samples["image"].float() / 255
    else:
        source = LatentStore(make_store(tmp_path / "store", images=3))
        encoder, shape = FromMoments(source), source.latent_shape
    torch.manual_seed(0)
    hidden = nn.Linear(torch.Size(shape).numel(), 32)
    model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(32, len(source.class_names)))
    run, state = begin(
        source,
        model,
        encoder=encoder,
        conditioning=ClassLabels(len(source.class_names)),
        objective=CrossEntropy(),
        latent_shape=shape,
        dropout=0.1,  # of the condition; what the objective compares with is never dropped
        rate=rate,
        batch_size=32,
    )
    losses = train(run, state, 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    batch = make_batch(next(load_batches(run, 50)), encoder, run.conditioning)
    with torch.no_grad():
        right = model(batch["latents"]).argmax(1) == batch["known"]["class_labels"]
    assert right.float().mean() > 0.6


def test_a_steps_own_randomness_is_a_function_of_seed_step_and_process():
    seeds = {step_seed(seed, step, process) for seed in range(3) for step in range(20) for process in range(4)}
    assert len(seeds) == 3 * 20 * 4
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)
