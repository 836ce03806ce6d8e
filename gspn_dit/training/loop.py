"""The training loop: a run from its first step or its newest checkpoint to its last step."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run as run_command

    run_command("train", prog="python -m gspn_dit.training.loop")
    raise SystemExit

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
from diffusers import ModelMixin
from torch.distributed.fsdp import MixedPrecisionPolicy

from gspn_dit.config import LoopConfig, RunConfig
from gspn_dit.cuda_graphs import CudaRecorder
from gspn_dit.data.workers import Ahead, is_of_a_dead_worker, load
from gspn_dit.errors import InputError, Stopped
from gspn_dit.launches import Choice
from gspn_dit.models.compiled_blocks import compile_blocks
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
from gspn_dit.training.checks import check_launch, check_machine
from gspn_dit.training.compilation import choose_compile
from gspn_dit.training.ema import EMA, exponential, power_function
from gspn_dit.training.posthoc_ema import drop_snapshots, gamma_of, save_snapshot
from gspn_dit.training.record import Record, note, read_metrics, redrawn_at_an_error
from gspn_dit.training.step import NonFiniteLoss, take_step
from gspn_dit.training.step_graph import StepGraph, choose_graph
from gspn_dit.training.stop_request import CTRL_C, StoppedByCtrlC, StopRequest
from gspn_dit.training.task import Task, kind_of, open_task, options_of
from gspn_dit.training.trackers import start_trackers

logger = logging.getLogger(__name__)
MOST_OVERFLOWS = 100  # steps in a row that fp16 may skip: from 2^16 its scale has then come to nothing
LONGEST_PAUSE = timedelta(hours=1)  # of processes that wait while one draws, saves or scores


def main(config: RunConfig) -> None:
    """Train what a configuration describes, on its own or under `accelerate launch`."""
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


def train(config: RunConfig) -> None:
    """Train a model of any task from its first step or its newest whole checkpoint to `training.max_steps`.

    The run's folder gets config.yaml, metrics.csv, loss.png, checkpoints/, what its task adds, and the trackers' logs.
    At SIGTERM or a first Ctrl-C the step is finished and a checkpoint written; after SIGTERM the function then returns.

    Raises:
        InputError: If the configuration asks for what cannot be, before any step.
        NonFiniteLoss: At the first step whose loss or gradient is not finite; that step is not taken.
        CheckpointNotWritten: If the disk did not take a checkpoint.
        StoppedByCtrlC: When what Ctrl-C stopped is saved.
    """
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_PAUSE)  # the processes meet
    kind, options = kind_of(config), options_of(config)
    on_every_process(lambda: kind.check(config))
    on_every_process(lambda: check_machine(options))
    folder = RunFolder(Path(config.output_dir))
    precision = agreed_precision(options.mixed_precision, PartialState().device)
    # A view of DDP's buckets for gradients saves a copy of them.
    accelerator = Accelerator(
        mixed_precision=precision.name,
        log_with=options.trackers or None,
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
        task, model = on_every_process(lambda: open_task(config, accelerator))

        def claim() -> Checkpoint | None:
            stack.enter_context(folder.locked("output_dir"))
            checkpoint = checkpoint_to_resume(task, precision)
            if checkpoint is None:
                check_nothing_lost(folder, type(config))
            return checkpoint

        checkpoint = on_main_process(claim, accelerator.is_main_process)
        stopped_by = None
        if checkpoint is None or checkpoint.step < task.options.max_steps:
            if accelerator.is_main_process:
                precision.say()
            stopped_by = take_steps(task, model, checkpoint, stop)
        elif accelerator.is_main_process:
            has = f"{folder} is at step {checkpoint.step} of training.max_steps={task.options.max_steps}"
            logger.info(f"{has} already: nothing to do; a larger training.max_steps goes on")
    accelerator.end_training()
    if stopped_by == CTRL_C:
        raise StoppedByCtrlC


def check_nothing_lost(folder: RunFolder, kind: type[RunConfig]) -> None:
    """Raise :class:`InputError` if a run without a checkpoint has been where it must have had one.

    Its checkpoints were taken away, and from its first step on it would write over its snapshots and metrics.
    """
    steps = [row["step"] for row in read_metrics(folder.metrics)]
    last = max(steps + [snapshot.step for snapshot in folder.list_snapshots()], default=0)
    if last > (options_of(kind.load(folder.config)).checkpoint_every if folder.config.is_file() else 0):
        raise InputError(
            f"holds metrics or averages up to step {last} and no checkpoint",
            argument="output_dir",
            value=str(folder),
            remedy="bring its checkpoints/ back, or name another folder",
        )


def take_steps(task: Task, model: ModelMixin, checkpoint: Checkpoint | None, stop: StopRequest) -> str | None:
    """Train from a checkpoint, or None for the first step, to the last step or a request to stop; what made it."""
    config, accelerator, options = task.config, task.accelerator, task.options
    folder = RunFolder(Path(config.output_dir))
    compiling, graph = choose_speed(task, model, checkpoint)
    state = prepare(task, model, is_new=checkpoint is None, compiled=compiling.on, graphed=graph.on)
    done: dict[str, Any] = {"step": 0, "loss_sum": 0.0, "loss_count": 0}
    if checkpoint:
        done = load_checkpoint(accelerator, checkpoint, state)
    step, loss_sum, loss_count = done["step"], done["loss_sum"], done["loss_count"]
    record, scores = open_records(task, state, step, checkpoint)
    logged_step, logged_time, overflows = step, time.perf_counter(), 0
    batches = load_batches(task, step)
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
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)
            may_skip = accelerator.mixed_precision == "fp16" and overflows < MOST_OVERFLOWS
            loss, grad_norm, stopping = take_step(task, state, batches, step, stop, may_skip)
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
            if task.due(step, options.posthoc_ema_every):
                save_snapshot(accelerator, folder, state, step)
            if stopping or task.due(step, options.checkpoint_every):
                metadata = {
                    "step": step,
                    "loss_sum": loss_sum,
                    "loss_count": loss_count,
                    "num_images": len(task.images),
                    "mixed_precision": accelerator.mixed_precision,
                    "compile": compiling.on,
                    **task.data_record,
                }
                checkpoint = save_checkpoint(accelerator, config, state, task.images.class_names, metadata)
                if record:
                    record.draw()
            if not stopping:
                task.look(state.ema, step, scores, stop)
            logged_time += time.perf_counter() - pause  # images/s is of training alone
    stopped_by = next(filter(None, gather_object([stop.by])), None)
    if record and stopping:
        logger.info(f"{stopped_by}: stopped after step {step}, saved as {checkpoint}; --resume auto continues it")
    elif record:
        logger.info(f"loss curve  {folder.loss_picture}")
        logger.info(f"checkpoint  {checkpoint}")
    return stopped_by


def choose_speed(task: Task, model: ModelMixin, checkpoint: Checkpoint | None) -> tuple[Choice, Choice]:
    """Whether blocks are compiled and whether a step is a CUDA graph, which is said; every process calls this.

    Raises :class:`InputError` for what is asked for and cannot be.
    """
    accelerator, options = task.accelerator, task.options
    passes = options.gradient_accumulation_steps
    images = options.batch_size // (accelerator.num_processes * passes)
    work = task.work(model, images)
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
            lambda: task.rehearse(model, images, accelerator.autocast),
            options.compile_mode,
        )
    )
    if accelerator.is_main_process:
        if checkpoint:
            say_compile(checkpoint, task.config, compiling)
        compiling.say()
        if accelerator.device.type == "cuda":
            graph.say()
    return compiling, graph


def prepare(task: Task, model: ModelMixin, is_new: bool, compiled: bool | None = None, graphed: bool = False) -> State:
    """What steps change, before the first of them or before it is loaded.

    Args:
        task: What is trained, and how.
        model: Its network, on the device.
        is_new: Whether the run begins, with the weights that `model.init_from` names.
        compiled: Whether blocks are compiled; None takes `training.compile` where that is no `auto`.
        graphed: Whether steps are a CUDA graph.

    Raises :class:`InputError` if a new run cannot start from the weights it names.
    """
    accelerator, options = task.accelerator, task.options
    if is_new:
        said = on_every_process(lambda: task.start(model))
        if said and accelerator.is_main_process:
            logger.info(said)
    if options.gradient_checkpointing:
        task.recompute(model)
    if options.compile is True if compiled is None else compiled:
        compile_blocks(model, options.compile_mode)  # a run's batches are of one shape
    optimizer = torch.optim.AdamW(
        task.parameter_groups(model),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
        fused=accelerator.device.type in ("cpu", "cuda"),
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
    task: Task, state: State, step: int, checkpoint: Checkpoint | None
) -> tuple[Record | None, Record | None]:
    """metrics.csv and evaluation.csv on the main process, which describes the run in its folder; and the trackers.

    What they and the snapshots hold of later steps than `step` goes. None for what there is not here.
    """
    config, accelerator = task.config, task.accelerator
    start_trackers(accelerator, config)
    if not accelerator.is_main_process:
        return None, None
    folder, class_names = RunFolder(Path(config.output_dir)), task.images.class_names
    config.save(folder.config)
    folder.class_names.write_text(json.dumps(class_names))
    record = Record(folder.metrics, step)
    scores = Record(folder.evaluation, step, columns) if (columns := task.score_columns) else None
    drop_snapshots(folder, step)
    where = f"step {step}, {checkpoint}" if checkpoint else "step 0"
    weights = sum(p.numel() for p in state.model.parameters())
    logger.info(
        f"{task.name}: {weights / 1e6:.{1 if weights >= 1e6 else 3}f} M parameters; {len(task.images):,} images of "
        f"{len(class_names)} classes; {accelerator.num_processes} × {accelerator.device.type}; from {where}"
    )
    return record, scores


def load_batches(task: Task, step: int) -> Ahead[Any]:
    """This process's micro-batches of the steps after `step`, in order."""
    batches = load(
        task.samples,
        task.steps_after(step),
        task.num_workers,
        task.collate,
        pin_memory=task.accelerator.device.type == "cuda",
        generator=torch.Generator(),  # its own: a loader draws a seed, which the model's random state must not feel
    )
    return Ahead(batches)


def learning_rate_at(step: int, options: LoopConfig) -> float:
    """The learning rate of step 1, 2, …: a linear warm-up, then constant, or a cosine that ends with the run."""
    if step <= options.warmup_steps:
        start = options.warmup_learning_rate
        return start + (options.learning_rate - start) * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    share, least = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))), options.min_learning_rate
    return least + (options.learning_rate - least) * share
