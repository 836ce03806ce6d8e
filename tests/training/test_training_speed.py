"""What changes only the speed of a training: compiled blocks and CUDA graphs, when they are chosen and what is said."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from made.recorder import FakeRecorder
from made.runs import list_checkpoints
from made.training import config, losses
from safetensors.torch import load_file

from gspn_dit.config import Config, TrainingConfig
from gspn_dit.data.workers import Ahead
from gspn_dit.errors import InputError
from gspn_dit.launches import Work
from gspn_dit.models import create_model
from gspn_dit.options import parse
from gspn_dit.training import compilation, loop, step_graph
from gspn_dit.training.compilation import choose_compile, failure_of, rehearse_blocks, why_no_compile
from gspn_dit.training.loop import train
from gspn_dit.training.step_graph import StepGraph, choose_graph, why_no_graph

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DIGITS = Work(6, 833_000, 64 * 16, training=True)
XL = Work(28, 357_000_000, 64 * 256, training=True)


@pytest.fixture
def compiler(monkeypatch):
    """Says what torch can compile, in place of trying."""

    def pretend(reason):
        monkeypatch.setattr(compilation, "why_no_compile", lambda device: reason)
        monkeypatch.setattr(compilation, "gather_object", lambda mine: mine)

    return pretend


@pytest.mark.parametrize(
    ("asked", "device", "work", "steps", "reason", "on", "said"),
    [
        ("auto", CPU, XL, 400_000, None, False, "on cpu"),
        (True, CPU, DIGITS, 1, None, True, ""),
        (False, CPU, DIGITS, 1, None, False, ""),
        ("auto", CUDA, XL, 400_000, None, True, "400,000 steps save about 5 h, compiling takes about 58 s"),
        ("auto", CUDA, XL, 100, None, False, "100 steps save about 4 s, compiling takes about 58 s"),
        ("auto", CUDA, XL, 400_000, "ImportError: no triton", False, "torch cannot (ImportError: no triton)"),
        (True, CUDA, DIGITS, 1, None, True, ""),
        (False, CUDA, XL, 400_000, None, False, ""),
    ],
)
def test_compiling_is_chosen_by_length_and_by_what_torch_can(compiler, asked, device, work, steps, reason, on, said):
    compiler(reason)
    choice = choose_compile(asked, device, work, steps, graphed=False)
    assert (choice.on, choice.reason) == (on, said)


def test_compiling_that_is_asked_for_and_cannot_be_is_refused(compiler):
    compiler("ImportError: no triton")
    with pytest.raises(InputError, match=r"^training\.compile=True: torch cannot compile here \(.*no triton\)"):
        choose_compile(True, CUDA, DIGITS, 1, graphed=False)


def test_one_process_that_cannot_compile_decides_for_all(monkeypatch):
    monkeypatch.setattr(compilation, "why_no_compile", lambda device: None)
    monkeypatch.setattr(compilation, "gather_object", lambda mine: [*mine, "RuntimeError: a read-only folder"])
    choice = choose_compile("auto", CUDA, XL, 400_000, graphed=False)
    assert not choice.on and "a read-only folder" in choice.reason


def test_torch_is_not_asked_where_it_does_not_matter(monkeypatch):
    def never(device):
        raise AssertionError

    monkeypatch.setattr(compilation, "why_no_compile", never)
    assert not choose_compile("auto", CUDA, DIGITS, 1, graphed=True).on
    assert not choose_compile("auto", CPU, XL, 400_000, graphed=False).on


def test_what_torch_cannot_compile_is_said_in_one_line(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_no_compile(CPU) == "Failed to find C compiler."
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert why_no_compile(CPU) is None


def test_blocks_that_torch_cannot_compile_are_warned_of_and_auto_goes_on(compiler):
    compiler(None)

    def broken():
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match=r"the model's blocks \(PassManager::run failed\); training goes on without"):
        choice = choose_compile("auto", CUDA, XL, 400_000, graphed=False, rehearse=broken)
    assert not choice.on and choice.reason == "torch cannot (PassManager::run failed)"
    assert choose_compile("auto", CUDA, XL, 400_000, graphed=False, rehearse=lambda: None).on


@pytest.mark.parametrize(
    ("name", "options"),
    [("gspn-dit-ti-2", {"depth": 6, "global_layers": [0, 5]}), ("gspn-ti-2", {"depth": 5}), ("dit-ti-2", {})],
)
def test_blocks_are_rehearsed_forward_and_backward_before_a_run(name, options, monkeypatch):
    """On a stand-in of the same kind: the model and torch's draws stay as they are."""
    model = create_model(name, sample_size=8, **options)
    ran = []

    def compile_(block, **_):
        block.register_forward_hook(lambda block, args, y: ran.append("forward"))
        block.register_full_backward_hook(lambda block, *grads: ran.append("backward"))

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    state = torch.get_rng_state()
    rehearse_blocks(model, (2, 4, 8, 8), partial(torch.autocast, "cpu", torch.bfloat16))
    assert ran == ["forward"] * 3 + ["backward"] * 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_failed_inside_a_compiler_is_said(monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("no such operator on this GPU\nand much more")

    def compile_(block, **_):
        block._compiled_call_impl = torch.compile(block._call_impl, backend=broken)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    model = create_model("dit-ti-2", sample_size=8, depth=1)
    said = failure_of(lambda: rehearse_blocks(model, (1, 4, 8, 8), nullcontext))
    assert said == "no such operator on this GPU"


def launched(device="cuda", processes=1, precision="bf16"):
    return SimpleNamespace(device=torch.device(device), num_processes=processes, mixed_precision=precision)


@pytest.mark.parametrize(
    ("accelerator", "options", "reason"),
    [
        (launched(), {}, None),
        (launched("cpu"), {}, "on cpu"),
        (launched(processes=2), {}, "exchange"),
        (launched(precision="fp16"), {}, "fp16"),
        (launched(), {"gradient_accumulation_steps": 2}, "accumulated"),
        (launched(), {"gradient_checkpointing": True}, "checkpointing"),
    ],
)
def test_what_forbids_a_graph_of_a_step(accelerator, options, reason):
    options = TrainingConfig(**options)
    said = why_no_graph(accelerator, options)
    assert said is None if reason is None else reason in said
    choice = choose_graph("auto", accelerator, options, DIGITS)
    assert choice.on == (reason is None)
    assert choice.reason == (said or "launches bind it")
    if reason is not None:
        with pytest.raises(InputError, match=r"^training\.cuda_graph=True: .*; give auto or false"):
            choose_graph(True, accelerator, options, DIGITS)
    assert not choose_graph(False, accelerator, options, DIGITS).on


def test_a_large_model_has_no_graph_unless_it_is_asked_for():
    options = TrainingConfig()
    assert choose_graph("auto", launched(), options, XL).reason == "the model's work outlasts its launches"
    assert not choose_graph("auto", launched(), options, XL).on
    assert choose_graph(True, launched(), options, XL).on


@pytest.mark.parametrize(("option", "default"), [("compile", "auto"), ("cuda_graph", False)])
def test_the_options(tmp_path, option, default):
    assert getattr(parse(Config, []).training, option) == default
    for given, value in (("true", True), ("false", False), ("auto", "auto")):
        loaded = parse(Config, [f"--training.{option}", given])
        loaded.save(tmp_path / "config.yaml")
        assert getattr(Config.load(tmp_path / "config.yaml").training, option) == value
        assert isinstance(getattr(loaded.training, option), type(value))
    with pytest.raises(InputError, match=rf"^--training\.{option.replace('_', '-')}.*wanted true or false or auto"):
        parse(Config, [f"--training.{option}", "often"], exit_on_error=False)


def test_the_mode_is_one_of_two():
    assert parse(Config, []).training.compile_mode == "default"
    assert parse(Config, ["--training.compile_mode", "max-autotune"]).training.compile_mode == "max-autotune"
    with pytest.raises(InputError, match=r"^--training\.compile-mode.*wanted default or max-autotune"):
        parse(Config, ["--training.compile_mode", "reduce-overhead"], exit_on_error=False)


def test_a_mode_that_takes_longer_to_compile_pays_later_and_is_said(compiler):
    compiler(None)

    def choice(asked, steps, mode):
        return choose_compile(asked, CUDA, XL, steps, False, 1, None, mode)

    assert choice("auto", 3_000, "default").on and not choice("auto", 3_000, "max-autotune").on
    assert choice("auto", 400_000, "max-autotune").on
    assert choice(True, 1, "max-autotune").doing == "blocks are compiled with max-autotune"
    assert choice(True, 1, "default").doing == "blocks are compiled"


class Model(torch.nn.Module):
    """Two weights, and a draw of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))

    def forward(self, batch):
        kept = torch.rand(len(batch["latents"]), 1)
        return (kept * (batch["latents"] * self.a + self.b - batch["condition"]["c"])).square().mean()


def batch_of(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(size, 3, generator=generator),
        "condition": {"c": torch.randn(size, 3, generator=generator)},
    }


def finder(model):
    def find(batch):
        loss = model(batch)
        loss.backward()
        return loss.detach()

    return find


def usual(model, batch, seed):
    """Loss and gradients as they are found without a graph."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = finder(model)(batch)
    found = [loss.clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    return found


def test_replays_find_the_loss_and_the_gradients_of_each_batch():
    model, other = Model(), Model()
    parameters = list(model.parameters())
    graph = StepGraph(recorder := FakeRecorder(parameters=parameters), parameters)
    find = finder(model)
    for seed in range(4):
        loss = graph.gradients(batch_of(seed), find, seed)
        for found, wanted in zip(
            [loss, *(p.grad for p in parameters)], usual(other, batch_of(seed), seed), strict=True
        ):
            assert torch.equal(found, wanted)
        with torch.no_grad():  # the weights are trained, and the gradients clipped, in place
            for each in (*parameters, *other.parameters()):
                each.sub_(0.1)
            for p in parameters:
                p.grad.mul_(0.5)
    assert recorder.recordings == 1 and not graph.failed
    with pytest.raises(ValueError, match="other shapes"):
        graph.gradients(batch_of(0, size=1), find, 0)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"error": RuntimeError("operation not permitted when stream is capturing\nmore")}, "not permitted"),
        ({"off_by": 0.5}, "a replay's loss and gradient norm are"),
        ({"off_by": float("nan")}, "a replay's loss and gradient norm are nan and nan"),
    ],
    ids=["refused", "wrong", "nan"],
)
def test_a_graph_that_fails_is_warned_of_once_and_training_goes_on(recwarn, fault, why):
    model, other = Model(), Model()
    parameters = list(model.parameters())
    graph = StepGraph(FakeRecorder(parameters=parameters, **fault), parameters)
    for seed in range(3):
        loss = graph.gradients(batch_of(seed), finder(model), seed)
        for found, wanted in zip(
            [loss, *(p.grad for p in parameters)], usual(other, batch_of(seed), seed), strict=True
        ):
            assert torch.equal(found, wanted)
    (warning,) = recwarn.list
    said = str(warning.message)
    assert said.startswith("no CUDA graph of the training step (") and why in said and "\n" not in said


def test_a_loss_that_is_not_finite_is_no_fault_of_the_graph(recwarn):
    model = Model()
    parameters = list(model.parameters())
    graph = StepGraph(FakeRecorder(parameters=parameters), parameters)
    batch = batch_of(0)
    batch["latents"].fill_(float("inf"))
    assert not graph.gradients(batch, finder(model), 0).isfinite()
    assert not graph.failed and not recwarn.list


@pytest.fixture
def fake_graphs(monkeypatch):
    """The CPU passes for a GPU that records steps; the list of what has recorded."""
    made = []

    def step_graph_of(recorder, parameters):
        made.append(FakeRecorder(parameters=parameters))
        return StepGraph(made[-1], parameters)

    monkeypatch.setattr(step_graph, "why_no_graph", lambda accelerator, options: None)
    monkeypatch.setattr(loop, "CudaRecorder", lambda device: None)
    monkeypatch.setattr(loop, "StepGraph", step_graph_of)
    return made


def weights(run):
    tensors = {}
    for path in sorted(list_checkpoints(run)[-1].rglob("*.safetensors")):
        tensors |= {f"{path.name} {key}": value for key, value in load_file(path).items()}
    return tensors


@pytest.mark.parametrize("model", ["gspn-dit", "gspn"])
def test_a_training_by_graph_is_the_same_to_the_bit_and_goes_on_as_the_other(tmp_path, store, fake_graphs, model):
    changes = ["--training.max_grad_norm", 0.5, "--resume", "auto"]
    if model == "gspn":  # draws its own random numbers: stochastic depth
        changes += ["--model.name", "gspn-ti-1", "--model.overrides", "{width: 32, depth: 3, stochastic_depth: 0.9}"]

    def run(name, last, graph):
        given = config(tmp_path / name, store, *changes, "--training.max_steps", last)
        given.training.cuda_graph = graph
        given.evaluation.every = given.training.sample_every = 0
        train(given)
        AcceleratorState._reset_state(reset_partial_state=True)

    run("usual", 8, False)
    assert not fake_graphs
    run("graph", 4, True)
    run("graph", 6, False)
    run("graph", 8, "auto")
    assert [recorder.recordings for recorder in fake_graphs] == [1, 1]
    assert [recorder.replays for recorder in fake_graphs] == [5, 3]  # one more each, to compare
    assert losses(tmp_path / "graph") == losses(tmp_path / "usual")
    one, other = weights(tmp_path / "graph"), weights(tmp_path / "usual")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("as_a_command_says_it")
def test_what_is_chosen_is_said_and_a_resume_may_choose_otherwise(tmp_path, store, monkeypatch, capsys):
    def compile_(self, **options):
        compiled.append((type(self).__name__, options["mode"]))

    def steps(last, on, reason, *changes):
        choice = lambda asked, *_: loop.Choice("compile", asked, on, reason, "compiled", "not compiled")  # noqa: E731
        monkeypatch.setattr(loop, "choose_compile", choice)
        monkeypatch.setattr(torch.nn.Module, "compile", compile_)
        train(config(tmp_path / "run", store, "--resume", "auto", "--training.max_steps", last, *changes))
        AcceleratorState._reset_state(reset_partial_state=True)
        newest = list_checkpoints(tmp_path / "run")[-1]
        assert json.loads((newest / "metadata.json").read_text())["compile"] is on
        said = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
        return said, Config.load(newest / "config.yaml").training.compile

    compiled = []
    assert steps(1, False, "on cpu") == (["not compiled (compile auto: on cpu)"], "auto")
    assert compiled == []
    assert steps(2, True, "it pays") == (
        ["changed since step-0000001: compile off → on: it pays", "compiled (compile auto: it pays)"],
        "auto",
    )
    assert compiled == [("GSPNDiTBlock", "default")] * 2  # the blocks, not the model
    said, kept = steps(3, True, "", "--training.compile", "true")
    assert said[0].endswith("training.compile 'auto' → True") and said[1:] == ["compiled (compile true)"]
    assert kept is True
    compiled.clear()
    said, _ = steps(4, True, "", "--training.compile", "true", "--training.compile_mode", "max-autotune")
    assert "changed since step-0000003: " in said[0] and "compile_mode 'default' → 'max-autotune'" in said[0]
    assert compiled == [("GSPNDiTBlock", "max-autotune-no-cudagraphs")] * 2
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_checkpoint_from_before_there_was_a_choice(tmp_path, store, capsys):
    train(config(tmp_path / "run", store, "--training.max_steps", 1))
    AcceleratorState._reset_state(reset_partial_state=True)
    path = list_checkpoints(tmp_path / "run")[-1]
    metadata = json.loads((path / "metadata.json").read_text())
    del metadata["compile"]
    (path / "metadata.json").write_text(json.dumps(metadata))
    capsys.readouterr()
    train(config(tmp_path / "run", store, "--resume", "auto", "--training.max_steps", 2))
    said = capsys.readouterr().out
    assert "compile off" not in said and "blocks are not compiled (compile auto: on cpu)" in said


def test_a_graph_on_the_cpu_is_refused(tmp_path, store):
    with pytest.raises(InputError, match=r"^training\.cuda_graph=True: on cpu; give auto or false"):
        train(config(tmp_path / "run", store, "--training.cuda_graph", "true"))
    assert not list_checkpoints(tmp_path / "run")


def test_what_is_fetched_ahead_comes_in_order_and_errors_when_they_are_due():
    def items():
        yield 1
        yield 2
        raise InputError("a torn image")

    fetched = []
    ahead = Ahead(item for item in items() if not fetched.append(item))
    ahead.fetch()
    ahead.fetch()
    assert fetched == [1]
    assert next(ahead) == 1
    ahead.fetch()
    assert (next(ahead), fetched) == (2, [1, 2])
    ahead.fetch()
    with pytest.raises(InputError, match="a torn image"):
        next(ahead)
    assert list(Ahead(iter([1, 2]))) == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", ["gspn-dit", "gspn", "dit"])
def test_a_real_graph_trains_as_launches_do(tmp_path, store, model, precision, recwarn):
    small = {
        "gspn-dit": "{width: 32, depth: 2, num_groups: 2, global_layers: 1, chunk: 2}",
        "gspn": "{width: 32, depth: 3, stochastic_depth: 0.5}",
        "dit": "{width: 32, depth: 2, num_heads: 2}",
    }[model]
    changes = ["--model.name", f"{model}-ti-1", "--model.overrides", small, "--training.mixed_precision", precision]
    for graph in ("false", "true"):
        train(config(tmp_path / graph, store, *changes, "--training.cuda_graph", graph, "--training.max_grad_norm", 1))
        AcceleratorState._reset_state(reset_partial_state=True)
    usual, replayed = (torch.tensor([float(loss) for _, loss in losses(tmp_path / name)]) for name in ("false", "true"))
    torch.testing.assert_close(replayed, usual, rtol=1e-2 if precision == "bf16" else 1e-4, atol=0)
    assert not [w for w in recwarn.list if "CUDA graph" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_blocks_in_a_graph_train_as_launches_do(tmp_path, store, recwarn):
    for on in ("false", "true"):
        changes = ["--training.cuda_graph", on, "--training.compile", on, "--training.sample_every", 4]
        train(config(tmp_path / on, store, *changes))
        AcceleratorState._reset_state(reset_partial_state=True)
    usual, other = (torch.tensor([float(loss) for _, loss in losses(tmp_path / name)]) for name in ("false", "true"))
    torch.testing.assert_close(other, usual, rtol=1e-2, atol=0)
    assert not [w for w in recwarn.list if "graph" in str(w.message)]
    assert (tmp_path / "true" / "samples").is_dir()


@pytest.mark.gpu
@pytest.mark.usefixtures("as_a_command_says_it")
def test_auto_says_what_it_does_on_a_gpu(tmp_path, store, capsys):
    train(config(tmp_path / "run", store, "--training.cuda_graph", "auto"))
    said = capsys.readouterr().out
    assert "training steps are replayed as a CUDA graph (cuda_graph auto: launches bind it)" in said
    assert "blocks are not compiled (compile auto: 8 steps save about" in said
