"""The training loop: a run from its first step or its newest checkpoint to its last step."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run as run_command

    run_command("train", prog="python -m gspn_dit.training.loop")
    raise SystemExit

import dataclasses
import json
import logging
import math
import os
import time
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from gspn_dit.config import Config, TrainingConfig
from gspn_dit.cuda_graphs import CudaRecorder
from gspn_dit.data.workers import Ahead, is_of_a_dead_worker, load
from gspn_dit.errors import InputError, Stopped, not_none
from gspn_dit.inference.loading import pipeline_of
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.run_description import RunDescription
from gspn_dit.launches import Choice, work_of
from gspn_dit.models.compiled_blocks import compile_blocks
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.processes import SharedInputError, agreed_precision, on_every_process, on_main_process
from gspn_dit.progress import figure, progress
from gspn_dit.storage.run_folder import Checkpoint, RunFolder
from gspn_dit.training.checkpoints import (
    CheckpointNotWritten,
    State,
    checkpoint_to_resume,
    last_good,
    load_checkpoint,
    save_checkpoint,
    say_compile,
)
from gspn_dit.training.compilation import choose_compile, rehearse_blocks
from gspn_dit.training.ema import EMA, exponential, power_function
from gspn_dit.training.evaluator import draw_samples
from gspn_dit.training.parts import Run, check_launch, check_options, open_run, start_from, steps_from
from gspn_dit.training.posthoc_ema import drop_snapshots, gamma_of, save_snapshot
from gspn_dit.training.record import Record, note, read_metrics, redrawn_at_an_error
from gspn_dit.training.sharding import full_tensor
from gspn_dit.training.step import NonFiniteLoss, take_step
from gspn_dit.training.step_graph import StepGraph, choose_graph
from gspn_dit.training.stop_request import CTRL_C, StoppedByCtrlC, StopRequest
from gspn_dit.training.trackers import start_trackers, track_samples

logger = logging.getLogger(__name__)
MOST_OVERFLOWS = 100  # steps in a row that fp16 may skip: from 2^16 its scale has then come to nothing
LONGEST_PAUSE = timedelta(hours=1)  # of processes that wait while one draws, saves or scores


def main(config: Config) -> None:
    """Train a class-conditional latent diffusion transformer, on its own or under `accelerate launch`."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        train(config)
    except (NonFiniteLoss, CheckpointNotWritten) as error:  # of all processes together: one of them says so
        raise (Stopped(f"stopped: {error}", 1) if first else SystemExit(1)) from None
    except RuntimeError as error:
        if not is_of_a_dead_worker(error):
            raise
        what = f"a process that reads data died ({' '.join(str(error).split())}); {last_good(config.output_dir)}"
        raise Stopped(f"stopped: {what}. Fewer data.num_workers need less memory", 1) from None
    except KeyboardInterrupt as error:
        if not first or isinstance(error, StoppedByCtrlC):
            raise SystemExit(130) from None
        raise Stopped(f"interrupted; {last_good(config.output_dir)}", 130) from None
    except SharedInputError:
        if first:
            raise
        raise SystemExit(2) from None
    except InputError as error:  # this process's own, in the middle of training
        raise Stopped(f"error: {error}", 2) from None


def train(config: Config) -> None:
    """Train a model from its first step or its newest whole checkpoint to `training.max_steps`.

    The run's folder gets config.yaml, metrics.csv, loss.png, samples/, checkpoints/ and the trackers' logs. At SIGTERM
    or a first Ctrl-C the step is finished and a checkpoint written; after SIGTERM the function then returns.

    Raises:
        InputError: If the configuration asks for what cannot be, before any step.
        NonFiniteLoss: At the first step whose loss or gradient is not finite; that step is not taken.
        CheckpointNotWritten: If the disk did not take a checkpoint.
        StoppedByCtrlC: When what Ctrl-C stopped is saved.
    """
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_PAUSE)  # the processes meet
    on_every_process(lambda: check_options(config))
    folder = RunFolder(Path(config.output_dir))
    precision = agreed_precision(config.training.mixed_precision, PartialState().device)
    # A view of DDP's buckets for gradients saves a copy of them.
    accelerator = Accelerator(
        mixed_precision=precision.name,
        log_with=config.training.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder.logs)),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # ours, whatever the environment says
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    on_every_process(lambda: check_launch(accelerator))
    if accelerator.is_fsdp2:
        # accelerate's own policy would round weights, gradients and the timesteps to bf16; autocast casts what may be
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        run, model = on_every_process(lambda: open_run(config, accelerator))

        def claim() -> Checkpoint | None:
            stack.enter_context(folder.locked("output_dir"))
            checkpoint = checkpoint_to_resume(config, run.source, run.vae_record, precision)
            if checkpoint is None:
                check_nothing_lost(folder)
            return checkpoint

        checkpoint = on_main_process(claim, accelerator.is_main_process)
        stopped_by = None
        if checkpoint is None or checkpoint.step < config.training.max_steps:
            if accelerator.is_main_process:
                precision.say()
            stopped_by = take_steps(run, model, checkpoint, stop)
        elif accelerator.is_main_process:
            has = f"{folder} is at step {checkpoint.step} of training.max_steps={config.training.max_steps}"
            logger.info(f"{has} already: nothing to do; a larger training.max_steps goes on")
    accelerator.end_training()
    if stopped_by == CTRL_C:
        raise StoppedByCtrlC


def check_nothing_lost(folder: RunFolder) -> None:
    """Raise :class:`InputError` if a run without a checkpoint has been where it must have had one.

    Its checkpoints were taken away, and from its first step on it would write over its snapshots and metrics.
    """
    steps = [row["step"] for row in read_metrics(folder.metrics)]
    last = max(steps + [snapshot.step for snapshot in folder.list_snapshots()], default=0)
    if last > (Config.load(folder.config).training.checkpoint_every if folder.config.is_file() else 0):
        raise InputError(
            f"holds metrics or averages up to step {last} and no checkpoint",
            argument="output_dir",
            value=str(folder),
            remedy="bring its checkpoints/ back, or name another folder",
        )


def take_steps(run: Run, model: LatentModel, checkpoint: Checkpoint | None, stop: StopRequest) -> str | None:
    """Train from a checkpoint, or None for the first step, to the last step or a request to stop; what made it."""
    config, accelerator, options = run.config, run.accelerator, run.config.training
    folder = RunFolder(Path(config.output_dir))
    compiling, graph = choose_speed(run, model, checkpoint)
    state = prepare(run, model, is_new=checkpoint is None, compiled=compiling.on, graphed=graph.on)
    done: dict[str, Any] = {"step": 0, "loss_sum": 0.0, "loss_count": 0}
    if checkpoint:
        done = load_checkpoint(accelerator, checkpoint, state)
    step, loss_sum, loss_count = done["step"], done["loss_sum"], done["loss_count"]
    record, scores = open_records(run, state, step, checkpoint)
    logged_step, logged_time, overflows = step, time.perf_counter(), 0
    batches = load_batches(run, step)
    stopping, stop.training = False, True
    with (
        redrawn_at_an_error(record),
        progress(
            total=options.max_steps,
            initial=step,
            desc=folder.path.name,
            unit="step",
            by_hand=True,
            disable=not accelerator.is_main_process,
        ) as bar,
    ):
        while step < options.max_steps and not stopping:
            step += 1
            learning_rate = learning_rate_at(step, options)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate
            may_skip = accelerator.mixed_precision == "fp16" and overflows < MOST_OVERFLOWS
            loss, grad_norm, stopping = take_step(run, state, batches, step, stop, may_skip)
            overflows = 0 if math.isfinite(grad_norm) else overflows + 1

            loss_sum, loss_count = loss_sum + loss, loss_count + 1
            mean = loss_sum / loss_count  # since the last line
            speed = options.batch_size * (step - logged_step) / (time.perf_counter() - logged_time)
            bar.update()
            bar.set_postfix_str(
                f"loss {figure(mean)}, lr {learning_rate:.4g}, grad {figure(grad_norm)}, {figure(speed)} images/s",
                refresh=False,
            )
            if step % options.log_every == 0 or step == options.max_steps:
                bar.line()
                metrics = {
                    "loss": mean,
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm,
                    "images_per_second": speed,
                }
                note(f"the trackers have no step {step}", accelerator.log, metrics, step)
                if record:
                    note(f"metrics.csv has no step {step}", record.append, {"step": step, **metrics})
                logged_step, logged_time, loss_sum, loss_count = step, time.perf_counter(), 0.0, 0
            pause = time.perf_counter()
            if _due(step, options.posthoc_ema_every, options):
                save_snapshot(accelerator, folder, state, step)
            if stopping or _due(step, options.checkpoint_every, options):
                metadata = {
                    "step": step,
                    "loss_sum": loss_sum,
                    "loss_count": loss_count,
                    "num_images": len(run.source),
                    "mixed_precision": accelerator.mixed_precision,
                    "compile": compiling.on,
                    "vae": run.vae_record,
                }
                checkpoint = save_checkpoint(accelerator, config, state, run.source.class_names, metadata)
                if record:
                    record.draw()
            if not stopping:
                draw_and_score(run, state, step, record, scores, stop)
            logged_time += time.perf_counter() - pause  # images/s is of training alone
    stopped_by = next(filter(None, gather_object([stop.by])), None)
    if record and stopping:
        logger.info(f"{stopped_by}: stopped after step {step}, saved as {checkpoint}; --resume auto continues it")
    elif record:
        logger.info(f"loss curve  {folder.loss_picture}")
        logger.info(f"checkpoint  {checkpoint}")
    return stopped_by


def choose_speed(run: Run, model: LatentModel, checkpoint: Checkpoint | None) -> tuple[Choice, Choice]:
    """Whether blocks are compiled and whether a step is a CUDA graph, which is said; every process calls this.

    Raises :class:`InputError` for what is asked for and cannot be.
    """
    config, accelerator, options = run.config, run.accelerator, run.config.training
    passes = options.gradient_accumulation_steps
    images = options.batch_size // (accelerator.num_processes * passes)
    latents = (images, *run.stream.latent_shape)
    work = work_of(model, latents, training=True)
    graph = on_every_process(lambda: choose_graph(options.cuda_graph, accelerator, options, work))
    steps = options.max_steps - (checkpoint.step if checkpoint else 0)
    compiling = on_every_process(
        lambda: choose_compile(
            options.compile,
            accelerator.device,
            work,
            steps,
            graph.on,
            passes,
            lambda: rehearse_blocks(model, latents, accelerator.autocast, options.compile_mode),
            options.compile_mode,
        )
    )
    if accelerator.is_main_process:
        if checkpoint:
            say_compile(checkpoint, config, compiling)
        compiling.say()
        if accelerator.device.type == "cuda":
            graph.say()
    return compiling, graph


def prepare(run: Run, model: LatentModel, is_new: bool, compiled: bool | None = None, graphed: bool = False) -> State:
    """What steps change, before the first of them or before it is loaded.

    Args:
        run: What is trained, and how.
        model: Its network, on the device.
        is_new: Whether the run begins, with the weights that `model.init_from` names.
        compiled: Whether blocks are compiled; None takes `training.compile` where that is no `auto`.
        graphed: Whether steps are a CUDA graph.

    Raises :class:`InputError` if a new run cannot start from the weights it names.
    """
    config, accelerator, options = run.config, run.accelerator, run.config.training
    if (init_from := config.model.init_from) and is_new:
        said = on_every_process(lambda: start_from(model, init_from, run.source.class_names))
        if said and accelerator.is_main_process:
            logger.info(said)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.compile is True if compiled is None else compiled:
        compile_blocks(model, options.compile_mode)  # a run's batches are of one shape
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    # FSDP2 warns that nobody may change the model's output in place; nobody does. DDP would have the axis of length 1
    # of a depthwise convolution's weight in other strides, of which there is nothing to gain.
    for message in ("FSDP2-wrapped module .* returned a view tensor", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", message=message)
    model_config = model.to_json_string()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    return State(
        model,
        wrapped,
        optimizer,
        EMA(model, exponential(options.ema_decay)),
        {sigma: EMA(model, power_function(gamma_of(sigma))) for sigma in options.sigma_rels},
        model_config,
        StepGraph(CudaRecorder(accelerator.device), list(model.parameters())) if graphed else None,
    )


def open_records(
    run: Run, state: State, step: int, checkpoint: Checkpoint | None
) -> tuple[Record | None, Record | None]:
    """metrics.csv and evaluation.csv on the main process, which describes the run in its folder; and the trackers.

    What they and the snapshots hold of later steps than `step` goes. None for what there is not here.
    """
    config, accelerator = run.config, run.accelerator
    start_trackers(accelerator, config)
    if not accelerator.is_main_process:
        return None, None
    folder, class_names = RunFolder(Path(config.output_dir)), run.source.class_names
    config.save(folder.config)
    folder.class_names.write_text(json.dumps(class_names))
    record = Record(folder.metrics, step)
    scores = Record(folder.evaluation, step, run.evaluator.columns) if run.evaluator else None
    drop_snapshots(folder, step)
    where = f"step {step}, {checkpoint}" if checkpoint else "step 0"
    weights = sum(p.numel() for p in state.model.parameters())
    logger.info(
        f"{config.model.name}: {weights / 1e6:.1f} M parameters; {len(run.source):,} images of "
        f"{len(class_names)} classes; {accelerator.num_processes} × {accelerator.device.type}; from {where}"
    )
    return record, scores


def load_batches(run: Run, step: int) -> Ahead[dict[str, Any]]:
    """This process's micro-batches of the steps after `step`, in order."""
    batches = load(
        run.stream,
        steps_from(step, run.config, run.accelerator),
        run.config.data.num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
        generator=torch.Generator(),  # its own: a loader draws a seed, which the model's random state must not feel
    )
    return Ahead(batches)


def draw_and_score(
    run: Run, state: State, step: int, record: Record | None, scores: Record | None, stop: StopRequest
) -> None:
    """The grid of samples and the evaluation of a step, where they are due; every process calls this.

    A failure is warned of, and training goes on.
    """
    config, accelerator = run.config, run.accelerator
    drawn = _due(step, config.training.sample_every, config.training)
    scored = _due(step, config.evaluation.every, config.training)
    if not drawn and not scored:
        return
    pipeline = averaged_pipeline(run, state.ema)
    if drawn and record:
        path = RunFolder(Path(config.output_dir)).samples(step)
        if draw_samples(pipeline, config, accelerator, path):
            note(f"the trackers have no samples of step {step}", track_samples, accelerator, path, step)
    accelerator.wait_for_everyone()
    if scored and (row := not_none(run.evaluator).score(pipeline, step, stop)):
        table = not_none(scores)  # of the main process, which alone has a row
        note(f"{table.path.name} has no step {step}", table.append, row)
        named = {f"evaluation/{name}": row[name] for name in row if name != "step"}
        note(f"the trackers have no step {step}", accelerator.log, named, step)


def learning_rate_at(step: int, options: TrainingConfig) -> float:
    """The learning rate of step 1, 2, …: a linear warm-up, then constant, or a cosine that ends at 0 with the run."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def averaged_pipeline(run: Run, ema: EMA) -> GSPNDiTPipeline:
    """The pipeline of the averaged weights, silent; it shares memory with them unless FSDP has split them.

    Every process calls this: what is split comes together on all of them.
    """
    with torch.device("meta"):
        model = run.build().eval()
    model.load_state_dict({name: full_tensor(tensor) for name, tensor in ema.tensors.items()}, assign=True)
    described = RunDescription.of(dataclasses.asdict(run.config))
    pipeline = pipeline_of(described, model, run.vae, run.source.class_names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _due(step: int, every: int, options: TrainingConfig) -> bool:
    """Whether something done every so many steps (0 is never), and at the last, is to be done now."""
    return bool(every) and (step % every == 0 or step == options.max_steps)
