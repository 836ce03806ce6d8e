"""The training loop."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from gspn_dit.config import Config, TrainingConfig
from gspn_dit.data import LatentStore, downsampling, encode_moments, load_vae, sample_posterior
from gspn_dit.data.vae import LatentScaling
from gspn_dit.diffusion import create_objective, create_scheduler, image_generator
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.errors import InputError, renamed
from gspn_dit.models import create_model
from gspn_dit.pictures import save_grid
from gspn_dit.pipeline import GSPNDiTPipeline
from gspn_dit.runs import checkpoint_step, list_checkpoints
from gspn_dit.training.checkpoints import check_resumable, load_checkpoint, save_checkpoint
from gspn_dit.training.ema import EMA
from gspn_dit.training.record import Record
from gspn_dit.training.stream import StepSampler, TrainingStream, open_source


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not a number; the message names the step and the last good checkpoint."""


def main(config: Config) -> None:
    """Train a class-conditional latent diffusion transformer, on its own or under `accelerate launch`."""
    try:
        train(config)
    except NonFiniteLoss as error:
        if PartialState().is_main_process:
            print(f"train_dit.py: stopped: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def train(config: Config) -> None:
    """Train a model from its first step or its newest checkpoint to `training.max_steps`.

    The run's folder gets config.yaml, metrics.csv, loss.png, samples/, checkpoints/ and the trackers' logs.

    Raises:
        InputError: If the configuration asks for what cannot be, before any step.
        NonFiniteLoss: At the first step whose loss or gradient is not finite; that step is not taken.
    """
    options = config.training
    run = Path(config.output_dir)
    check_options(config)
    objective = create_objective(config.diffusion.objective, time_sampling=config.diffusion.time_sampling)
    with renamed(source="data.source", image_size="data.image_size", vae="data.vae"):
        source = open_source(config.data, config.seed)
    checkpoints = list_checkpoints(run)
    if checkpoints:
        check_resumable(checkpoints[-1], config, source)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "logs")),
    )
    steps = StepSampler(
        checkpoint_step(checkpoints[-1]) if checkpoints else 0,
        options.max_steps,
        batch_size=options.batch_size,
        accumulation=options.gradient_accumulation_steps,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    with renamed(vae="data.vae"):
        vae, scaling, latent_shape = open_latents(config, source, accelerator.device)

    set_seed(config.seed)
    model = create_model(
        config.model.name,
        sample_size=latent_shape[1:],
        in_channels=latent_shape[0],
        out_channels=objective.out_channels(latent_shape[0]),
        num_classes=len(source.class_names),
        **config.model.overrides,
    ).to(accelerator.device)
    ema = EMA(model, options.ema_decay)
    null_class, weights = model.null_class, sum(p.numel() for p in model.parameters())
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.compile:
        model.compile()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(config.seed, device_specific=True)  # what a model draws itself (stochastic depth) differs by process

    done = {"step": 0, "loss_sum": 0.0, "loss_count": 0}
    if checkpoints:
        done = load_checkpoint(accelerator, checkpoints[-1], ema)
    step, loss_sum, loss_count = done["step"], done["loss_sum"], done["loss_count"]
    stream = TrainingStream(
        source,
        latent_shape=latent_shape,
        null_class=null_class,
        class_dropout=config.diffusion.class_dropout,
        horizontal_flip=config.data.horizontal_flip,
        seed=config.seed,
    )
    batches = DataLoader(
        stream,
        batch_sampler=steps,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # its own: a loader draws a seed, and the model's random state must not feel that
    )

    accelerator.init_trackers("gspn-dit")
    record = None
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        config.save(run / "config.yaml")
        (run / "class_names.json").write_text(json.dumps(source.class_names))
        record = Record(run, step)
        where = f"step {step}, {checkpoints[-1]}" if checkpoints else "step 0"
        print(
            f"{config.model.name}: {weights / 1e6:.1f} M parameters; {len(source):,} images of "
            f"{len(source.class_names)} classes; {accelerator.num_processes} × {accelerator.device.type}; from {where}"
        )

    bar = tqdm(
        total=options.max_steps, initial=step, desc=run.name, unit="step", disable=not accelerator.is_main_process
    )
    model.train()
    logged_step, logged_time = step, time.perf_counter()
    micro_batches = iter(batches)
    while step < options.max_steps:
        step += 1
        learning_rate = learning_rate_at(step, options)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for micro in range(options.gradient_accumulation_steps):
            batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(micro_batches).items()}
            latents = clean_latents(batch, vae, scaling)
            last = micro + 1 == options.gradient_accumulation_steps
            with nullcontext() if last else accelerator.no_sync(model):  # gradients meet once a step
                with accelerator.autocast():
                    times = objective.times(batch["u"])
                    loss = objective.loss(model, latents, batch["class_label"], times, batch["noise"]).mean()
                accelerator.backward(loss / options.gradient_accumulation_steps)
            losses.append(loss.detach())
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf))
        # fp16's loss scaling expects gradients that overflow now and then, and skips those steps itself
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or options.mixed_precision == "fp16"):
            raise NonFiniteLoss(_non_finite(loss, grad_norm, step, run))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(accelerator.unwrap_model(model), step)

        loss_sum, loss_count = loss_sum + loss, loss_count + 1
        bar.update()
        speed = options.batch_size * (step - logged_step) / (time.perf_counter() - logged_time)
        bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.1e}, grad {grad_norm:.2f}, {speed:.0f} images/s", refresh=False
        )
        if step % options.log_every == 0 or step == options.max_steps:
            metrics = {
                "loss": loss_sum / loss_count,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "images_per_second": speed,
            }
            accelerator.log(metrics, step=step)
            if record:
                record.append({"step": step, **metrics})
            logged_step, logged_time, loss_sum, loss_count = step, time.perf_counter(), 0.0, 0
        pause = time.perf_counter()
        if step % options.checkpoint_every == 0 or step == options.max_steps:
            state = {"step": step, "loss_sum": loss_sum, "loss_count": loss_count, "num_images": len(source)}
            save_checkpoint(accelerator, config, ema, source.class_names, state)
        if options.sample_every and (step % options.sample_every == 0 or step == options.max_steps):
            if record:
                record.draw()
                draw_samples(ema.model, vae, config, source.class_names, run / "samples" / f"step-{step:07d}.png")
            accelerator.wait_for_everyone()
        logged_time += time.perf_counter() - pause  # images/s is of training alone
    bar.close()
    accelerator.end_training()
    if record:
        print(f"loss curve  {record.draw()}\ncheckpoint  {list_checkpoints(run)[-1]}")


def check_options(config: Config) -> None:
    """Raise :class:`InputError` for what only a later part of the run would stumble over."""
    scheduler = create_scheduler(config.diffusion.objective, config.sampling.sampler)
    check_steps(scheduler, config.sampling.num_inference_steps)
    if taken := sorted({"sample_size", "in_channels", "out_channels", "num_classes"} & config.model.overrides.keys()):
        raise InputError(f"model.overrides.{taken[0]}: the data and the objective set it; leave it out")
    if config.training.mixed_precision == "fp16" and torch.accelerator.current_accelerator() is None:
        raise InputError("training.mixed_precision='fp16': needs an accelerator; on the CPU use 'bf16' or 'no'")
    trackers = [tracker.value for tracker in get_available_trackers()]
    for name in config.training.trackers:
        if name not in trackers:
            raise InputError(f"training.trackers: {name!r} is not installed here; there are {', '.join(trackers)}")


def learning_rate_at(step: int, options: TrainingConfig) -> float:
    """The learning rate of step 1, 2, …: a linear warm-up, then constant, or a cosine that ends at 0 with the run."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def open_latents(
    config: Config, source: LatentStore | torch.utils.data.Dataset, device: torch.device
) -> tuple[AutoencoderKL | None, LatentScaling, tuple[int, int, int]]:
    """The VAE (None where there is nothing to encode or to draw), the latents' scaling and their shape (C, h, w)."""
    if isinstance(source, LatentStore):
        vae = load_vae(config.data.vae).to(device) if config.training.sample_every else None
        return vae, source, (source.latent_channels, *source.latent_size)
    vae = load_vae(config.data.vae).to(device)
    side, rest = divmod(config.data.image_size, downsampling(vae))
    if rest:
        raise InputError(f"data.image_size={config.data.image_size}: this VAE wants a multiple of {downsampling(vae)}")
    return vae, vae.config, (vae.config.latent_channels, side, side)


def clean_latents(batch: dict[str, Tensor], vae: AutoencoderKL | None, scaling: LatentScaling) -> Tensor:
    """Normalised latents (B, C, h, w) of a batch of moments or of images."""
    moments = batch["moments"] if "moments" in batch else encode_moments(vae, batch["image"])
    return sample_posterior(scaling, moments, batch["posterior_noise"])


def draw_samples(model: ModelMixin, vae: AutoencoderKL, config: Config, class_names: list[str], path: Path) -> None:
    """A grid of samples, the classes spread over it; the same noise each time, so that grids of a run compare."""
    sampling = config.sampling
    pipeline = GSPNDiTPipeline(model, vae, create_scheduler(config.diffusion.objective, sampling.sampler), class_names)
    pipeline.set_progress_bar_config(disable=True)
    count = sampling.num_images
    labels = [i * len(class_names) // count if count < len(class_names) else i % len(class_names) for i in range(count)]
    images = pipeline(
        labels,
        guidance_scale=sampling.guidance_scale,
        guidance_interval=sampling.guidance_interval,
        num_inference_steps=sampling.num_inference_steps,
        generator=[image_generator(config.seed, i) for i in range(count)],
        output_type="uint8",
    ).images
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, path)


def _non_finite(loss: float, grad_norm: float, step: int, run: Path) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
    checkpoints = list_checkpoints(run)
    good = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return f"{what} at step {step}, which was not taken; {good}. A lower training.learning_rate or clipping may help"
