"""The training loop."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env
from diffusers import AutoencoderKL
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from tqdm import tqdm

from gspn_dit.config import Config, TrainingConfig
from gspn_dit.data import encode_moments, sample_posterior
from gspn_dit.data.vae import LatentScaling
from gspn_dit.errors import InputError
from gspn_dit.pipeline import GSPNDiTPipeline
from gspn_dit.training.checkpoints import (
    CheckpointNotWritten,
    TrainingState,
    find_checkpoint,
    last_good,
    load_checkpoint,
    save_checkpoint,
)
from gspn_dit.training.ema import Average, exponential, power_function
from gspn_dit.training.evaluation import EVALUATION, attempt, create_pipeline, draw_samples
from gspn_dit.training.posthoc_ema import drop_snapshots, gamma_of, list_snapshots, save_snapshot
from gspn_dit.training.processes import EveryonesError, StopRequest, claimed, heed_only_the_parent, on_main, together
from gspn_dit.training.record import Record, read_metrics
from gspn_dit.training.setup import Parts, check_launch, check_options, open_parts, start_from
from gspn_dit.training.sharding import whole

MOST_OVERFLOWS = 100  # steps in a row that fp16 may skip: from 2^16 its scale has then come to nothing
LONGEST_PAUSE = timedelta(hours=1)  # of processes that wait while one draws, saves or scores


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not a number; the message names the step and the last good checkpoint."""


def main(config: Config) -> None:
    """Train a class-conditional latent diffusion transformer, on its own or under `accelerate launch`."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        train(config)
    except (NonFiniteLoss, CheckpointNotWritten) as error:  # of all processes together: one of them says so
        if first:
            print(f"train_dit.py: stopped: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except EveryonesError:
        if first:
            raise
        raise SystemExit(2) from None
    except InputError as error:  # this process's own, in the middle of training
        print(f"train_dit.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train(config: Config) -> None:
    """Train a model from its first step or its newest whole checkpoint to `training.max_steps`.

    The run's folder gets config.yaml, metrics.csv, loss.png, samples/, checkpoints/ and the trackers' logs. At SIGTERM
    the step is finished, a checkpoint written, and the function returns.

    Raises:
        InputError: If the configuration asks for what cannot be, before any step.
        NonFiniteLoss: At the first step whose loss or gradient is not finite; that step is not taken.
        CheckpointNotWritten: If the disk did not take a checkpoint.
    """
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_PAUSE)  # the processes meet
    together(lambda: check_options(config))
    run = Path(config.output_dir)
    # A view of DDP's buckets for gradients saves a copy of them.
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        log_with=config.training.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "logs")),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # ours, whatever the environment says
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    together(lambda: check_launch(accelerator))
    if accelerator.is_fsdp2:
        # accelerate's own policy would round weights, gradients and the timesteps to bf16; autocast casts what may be
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        parts = together(lambda: open_parts(config, accelerator))

        def claim() -> Path | None:
            stack.enter_context(claimed(run))
            checkpoint = find_checkpoint(config, parts.source)
            if checkpoint is None:
                check_nothing_lost(run)
            return checkpoint

        checkpoint = on_main(claim, accelerator.is_main_process)
        _train(config, accelerator, parts, checkpoint, stop)
    accelerator.end_training()


def check_nothing_lost(run: Path) -> None:
    """Raise :class:`InputError` if a run without a checkpoint has been where it must have had one.

    Its checkpoints were taken away, and from its first step on it would write over its snapshots and metrics.
    """
    steps = [row["step"] for row in read_metrics(run / "metrics.csv")]
    last = max(steps + [snapshot.step for snapshot in list_snapshots(run)], default=0)
    config = run / "config.yaml"
    if last > (Config.load(config).training.checkpoint_every if config.is_file() else 0):
        raise InputError(
            f"output_dir={str(run)!r}: holds metrics or averages up to step {last} and no checkpoint; bring its "
            "checkpoints/ back, or name another folder"
        )


def _train(config: Config, accelerator: Accelerator, parts: Parts, checkpoint: Path | None, stop: StopRequest) -> None:
    options, run, class_names = config.training, Path(config.output_dir), parts.source.class_names
    if config.model.init_from and checkpoint is None:
        together(lambda: start_from(parts.model, config.model.init_from))
    if options.gradient_checkpointing:
        parts.model.enable_gradient_checkpointing()
    if options.compile:
        parts.model.compile()
    optimizer = torch.optim.AdamW(
        [p for p in parts.model.parameters() if p.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
    )
    # FSDP2 warns that nobody may change the model's output in place; nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model_config = parts.model.to_json_string()
    model, optimizer = accelerator.prepare(parts.model, optimizer)
    state = TrainingState(
        parts.model,
        optimizer,
        Average(parts.model, exponential(options.ema_decay)),
        {sigma: Average(parts.model, power_function(gamma_of(sigma))) for sigma in options.sigma_rels},
        model_config,
    )
    done = {"step": 0, "loss_sum": 0.0, "loss_count": 0}
    if checkpoint:
        done = load_checkpoint(accelerator, checkpoint, state)
    step, loss_sum, loss_count = done["step"], done["loss_sum"], done["loss_count"]
    parts.steps.first = step
    batches = DataLoader(
        parts.stream,
        batch_sampler=parts.steps,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=heed_only_the_parent,
        generator=torch.Generator(),  # its own: a loader draws a seed, and the model's random state must not feel that
    )

    accelerator.init_trackers("gspn-dit")
    record = scores = None
    if accelerator.is_main_process:
        config.save(run / "config.yaml")
        (run / "class_names.json").write_text(json.dumps(class_names))
        record = Record(run / "metrics.csv", step)
        if parts.evaluator:
            scores = Record(run / EVALUATION, step, parts.evaluator.columns)
        drop_snapshots(run, step)
        where = f"step {step}, {checkpoint}" if checkpoint else "step 0"
        weights = sum(p.numel() for p in parts.model.parameters())
        print(
            f"{config.model.name}: {weights / 1e6:.1f} M parameters; {len(parts.source):,} images of "
            f"{len(class_names)} classes; {accelerator.num_processes} × {accelerator.device.type}; from {where}"
        )

    model.train()
    logged_step, logged_time, overflows = step, time.perf_counter(), 0
    micro_batches = iter(batches)
    stopping = False
    with tqdm(
        total=options.max_steps, initial=step, desc=run.name, unit="step", disable=not accelerator.is_main_process
    ) as bar:
        while step < options.max_steps and not stopping:
            step += 1
            learning_rate = learning_rate_at(step, options)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            torch.manual_seed(step_seed(config.seed, step, accelerator.process_index))  # for what a model draws itself
            losses, finite = [], True
            for micro in range(options.gradient_accumulation_steps):
                batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(micro_batches).items()}
                latents = clean_latents(batch, parts.vae, parts.scaling)
                last = micro + 1 == options.gradient_accumulation_steps
                with nullcontext() if last else accelerator.no_sync(model):  # gradients meet once a step
                    with accelerator.autocast():
                        times = parts.objective.times(batch["u"])
                        loss = parts.objective.loss(model, latents, batch["class_label"], times, batch["noise"]).mean()
                    accelerator.backward(loss / options.gradient_accumulation_steps)
                losses.append(loss.detach())
                finite = latents.isfinite().all() & finite
            # One exchange a step: the loss, whether its data were numbers, and whether any process is asked to stop.
            told = torch.stack([torch.stack(losses).mean(), finite.float(), loss.new_tensor(float(stop.requested))])
            loss, finite, stopping = accelerator.reduce(told, "mean").tolist()
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf))
            # fp16's loss scaling skips steps whose gradients overflow, and halves its scale until they do not
            overflows = 0 if math.isfinite(grad_norm) else overflows + 1
            if not math.isfinite(loss) or overflows > (MOST_OVERFLOWS if options.mixed_precision == "fp16" else 0):
                raise NonFiniteLoss(_non_finite(loss, grad_norm, finite == 1, step, config))
            optimizer.step()
            optimizer.zero_grad()
            for average in (state.ema, *state.power_emas.values()):
                average.update(parts.model, step)

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
                note("the trackers have no", step, accelerator.log, metrics, step)
                if record:
                    note("metrics.csv has no", step, record.append, {"step": step, **metrics})
                logged_step, logged_time, loss_sum, loss_count = step, time.perf_counter(), 0.0, 0
            pause = time.perf_counter()
            if _due(step, options.posthoc_ema_every, options):
                save_snapshot(accelerator, run, state, step)
            if stopping or _due(step, options.checkpoint_every, options):
                metadata = {
                    "step": step,
                    "loss_sum": loss_sum,
                    "loss_count": loss_count,
                    "num_images": len(parts.source),
                }
                checkpoint = save_checkpoint(accelerator, config, state, class_names, metadata)
            drawn, scored = _due(step, options.sample_every, options), _due(step, config.evaluation.every, options)
            if (drawn or scored) and not stopping:
                pipeline = averaged_pipeline(config, parts, state.ema, class_names)
                if drawn and record:
                    note("loss.png is without", step, record.draw)
                    draw_samples(pipeline, config, run / "samples" / f"step-{step:07d}.png")
                accelerator.wait_for_everyone()
                if scored and (row := parts.evaluator.score(pipeline, step, stop)):
                    note(f"{EVALUATION} has no", step, scores.append, row)
                    named = {f"evaluation/{name}": row[name] for name in row if name != "step"}
                    note("the trackers have no", step, accelerator.log, named, step)
                del pipeline
            logged_time += time.perf_counter() - pause  # images/s is of training alone
    if record and stopping:
        print(f"SIGTERM: stopped after step {step}, saved as {checkpoint}; --resume auto continues it")
    elif record:
        note("loss.png is without", step, lambda: print(f"loss curve  {record.draw()}"))
        print(f"checkpoint  {checkpoint}")


def note(what: str, step: int, work: Callable[..., object], *arguments: object) -> None:
    """Do what a run can go on without; if it fails, say so."""
    if problem := attempt(lambda: work(*arguments))[1]:
        print(f"train_dit.py: warning: {what} step {step} ({problem}); training goes on", file=sys.stderr)


def learning_rate_at(step: int, options: TrainingConfig) -> float:
    """The learning rate of step 1, 2, …: a linear warm-up, then constant, or a cosine that ends at 0 with the run."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of what a model draws itself (stochastic depth) in one step of one process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def clean_latents(batch: dict[str, Tensor], vae: AutoencoderKL | None, scaling: LatentScaling) -> Tensor:
    """Normalised latents (B, C, h, w) of a batch of moments or of images."""
    moments = batch["moments"] if "moments" in batch else encode_moments(vae, batch["image"])
    return sample_posterior(scaling, moments, batch["posterior_noise"])


def averaged_pipeline(config: Config, parts: Parts, ema: Average, class_names: list[str]) -> GSPNDiTPipeline:
    """The pipeline of the averaged weights, which it shares memory with unless FSDP has split them.

    Every process calls this: what is split comes together on all of them.
    """
    with torch.device("meta"):
        model = parts.build().eval()
    model.load_state_dict({name: whole(tensor) for name, tensor in ema.tensors.items()}, assign=True)
    return create_pipeline(model.requires_grad_(False), parts.vae, config, class_names)


def _due(step: int, every: int, options: TrainingConfig) -> bool:
    """Whether something done every so many steps (0 is never), and at the last, is to be done now."""
    return bool(every) and (step % every == 0 or step == options.max_steps)


def _non_finite(loss: float, grad_norm: float, finite: bool, step: int, config: Config) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
    remedy = "A lower training.learning_rate or clipping may help"
    if not finite:
        what += f", as are latents of its batch from data.source={config.data.source!r},"
        remedy = "Check the data: for a store, `python -m gspn_dit.data.encode --verify STORE`"
    return f"{what} at step {step}, which was not taken; {last_good(config.output_dir)}. {remedy}"
