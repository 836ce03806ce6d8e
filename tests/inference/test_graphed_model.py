"""gspn_dit/inference/graphed_model.py: the same images from a recording, whatever changes between calls."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from made.recorder import FakeGraphs, FakeRecorder
from made.runs import make_run, pipeline, tiny_model

from gspn_dit.commands import SampleOptions
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference import graphed_model
from gspn_dit.inference.graphed_model import KEPT, GraphedModel, graph_choice, graphed, why_not_graph
from gspn_dit.inference.sample import main as sample
from gspn_dit.launches import calls_before_capture, work_of
from gspn_dit.options import command, parse

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fake_gpu(monkeypatch):
    """The CPU passes for a GPU that records."""
    monkeypatch.setattr(graphed_model, "CudaRecorder", FakeGraphs)
    monkeypatch.setattr(graphed_model, "why_not_graph", lambda model, device: why_not_graph(model, CUDA))
    monkeypatch.setattr(FakeGraphs, "made", None)


def inputs(batch=2, seed=0, side=8):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, side, side, generator=generator),
        torch.rand(batch, generator=generator) * 1000,
        {"class_labels": torch.randint(0, 4, (batch,), generator=generator)},
    )


def call(model, given, **options):
    latents, timesteps, condition = given
    with torch.no_grad():
        return model(latents, timesteps, **condition, **options)


@pytest.mark.parametrize("name", ["gspn-dit-ti-2", "gspn-ti-2", "dit-ti-2"])
def test_a_replay_is_the_model_on_new_inputs(name):
    model = tiny_model(name, "flow")
    graphs = GraphedModel(model, True, recorder := FakeRecorder())
    for seed in range(3):
        torch.testing.assert_close(call(graphs, inputs(seed=seed)), call(model, inputs(seed=seed)), rtol=0, atol=0)
    assert (recorder.recordings, graphs.recordings) == (1, 1)
    assert recorder.replays == 3


def test_what_is_returned_is_the_caller_s():
    graphs = GraphedModel(tiny_model("gspn-dit-ti-2", "flow"), True, FakeRecorder())
    first = call(graphs, inputs(seed=1))
    kept = first.clone()
    call(graphs, inputs(seed=2))
    assert torch.equal(first, kept)


def test_weights_that_change_in_place_are_heeded():
    model = tiny_model("gspn-dit-ti-2", "flow")
    graphs = GraphedModel(model, True, recorder := FakeRecorder())
    call(graphs, inputs())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    graphs.forget_moved()
    assert torch.equal(call(graphs, inputs()), call(model, inputs()))
    assert recorder.recordings == 1


def test_weights_in_another_place_are_recorded_anew():
    model = tiny_model("gspn-dit-ti-2", "flow")
    graphs = GraphedModel(model, True, recorder := FakeRecorder())
    call(graphs, inputs())
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()}, assign=True)
    graphs.forget_moved()
    assert graphs.recordings == 0
    assert torch.equal(call(graphs, inputs()), call(model, inputs()))
    assert recorder.recordings == 2


def test_each_shape_option_and_precision_has_its_recording_and_few_are_kept():
    model = tiny_model("gspn-dit-ti-2", "flow")
    graphs = GraphedModel(model, True, recorder := FakeRecorder())
    variants = [(inputs(2), {}), (inputs(3), {}), (inputs(2, side=16), {}), (inputs(2), {"chunk_scale": 0.125})]
    for given, options in variants * 2:
        assert torch.equal(call(graphs, given, **options), call(model, given, **options))
    assert recorder.recordings == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(graphs, inputs(2)), call(model, inputs(2)))
    assert recorder.recordings == 5 and graphs.recordings == KEPT


def test_a_cast_of_old_weights_is_not_kept():
    model = tiny_model("gspn-dit-ti-2", "flow")
    graphs = GraphedModel(model, True, FakeRecorder())
    with torch.autocast("cpu", torch.bfloat16):  # which keeps casts while it lasts
        call(graphs, inputs())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        replayed = call(graphs, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(replayed, call(model, inputs()))


def test_auto_waits_until_it_pays_for_each_shape():
    model = tiny_model("gspn-dit-ti-2", "flow")
    graphs = GraphedModel(model, "auto", recorder := FakeRecorder())
    wait = calls_before_capture(work_of(model, (2, 4, 8, 8)))
    given, other = inputs(2), inputs(3)
    for _ in range(wait):
        call(graphs, given)
    call(graphs, other)
    assert recorder.recordings == 0
    call(graphs, given)
    assert recorder.recordings == 1


def test_auto_leaves_a_model_that_works_long_as_it_is(monkeypatch):
    monkeypatch.setattr("gspn_dit.launches.OPERATIONS_PER_SECOND", 1e6)
    graphs = GraphedModel(tiny_model("gspn-dit-ti-2", "flow"), "auto", recorder := FakeRecorder())
    for _ in range(3):
        call(graphs, inputs())
    assert recorder.recordings == 0
    graphs._calls.update(dict.fromkeys(graphs._calls, 10**6))
    call(graphs, inputs())
    assert recorder.recordings == 0


@pytest.mark.parametrize(
    ("recorder", "why"),
    [
        (FakeRecorder(error=RuntimeError("operation not permitted when stream is capturing\nmore")), "not permitted"),
        (FakeRecorder(off_by=0.5), "a replay differs from the model by 5.0e-01"),
        (FakeRecorder(off_by=float("nan")), "a replay differs from the model by nan"),
    ],
    ids=["refused", "wrong", "nan"],
)
def test_a_recording_that_fails_is_warned_of_once_and_sampling_goes_on(recwarn, recorder, why):
    model = tiny_model("gspn-dit-ti-2", "flow")
    graphs = GraphedModel(model, True, recorder)
    for given in (inputs(2), inputs(2), inputs(3)):
        assert torch.equal(call(graphs, given), call(model, given))
    (warning,) = recwarn.list
    said = str(warning.message)
    assert why in said and said.startswith("cuda_graph=True: ") and "\n" not in said
    assert said.endswith("; sampling goes on without") and graphs.recordings == 0


def test_bad_input_is_the_model_s_own_error():
    graphs = GraphedModel(tiny_model("gspn-dit-ti-2", "flow"), True, FakeRecorder())
    with pytest.raises(InputError, match=r"^latents: shape"):
        call(graphs, (torch.zeros(2, 3, 8, 8), torch.zeros(2), {"class_labels": torch.zeros(2, dtype=torch.long)}))


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(
    ("objective", "scheduler"), [("flow", None), ("ddpm", None), ("ddpm", DPMSolverMultistepScheduler)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}, {"chunk_scale": 0.25}],
    ids=["plain", "guided", "interval", "chunks"],
)
def test_the_images_are_the_same(objective, scheduler, options):
    pipe = pipeline(objective=objective)
    if scheduler is not None:  # it keeps the predictions of two steps
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

    def draw(count, cuda_graph):
        generators = [image_generator(0, i) for i in range(count)]
        labels = [i % 3 for i in range(count)]
        more = {"num_inference_steps": 6, "output_type": "uint8", "cuda_graph": cuda_graph} | options
        return pipe(labels, generator=generators, **more).images

    for count in (3, 2, 3):  # the last batch is a smaller one
        assert torch.equal(draw(count, True), draw(count, False))
    # off drops what there was: each of the three calls has recorded, with guidance at some steps twice
    assert draw(3, True) is not None and FakeGraphs.made.recordings in (1, 2)


@pytest.mark.usefixtures("fake_gpu")
def test_calls_of_a_pipeline_share_recordings_until_they_are_let_go():
    pipe = pipeline()
    draw = lambda: pipe([0, 1], num_inference_steps=2, cuda_graph=True, output_type="latent")  # noqa: E731
    draw(), draw()
    recorder = FakeGraphs.made
    assert (recorder.recordings, recorder.replays) == (1, 4)
    pipe.free_graphs()
    draw()
    assert FakeGraphs.made is not recorder and FakeGraphs.made.recordings == 1


@pytest.mark.usefixtures("fake_gpu")
def test_another_transformer_is_drawn_with():
    pipe = pipeline()

    def draw(cuda_graph):
        options = {"num_inference_steps": 2, "output_type": "latent", "cuda_graph": cuda_graph}
        return pipe([0], generator=image_generator(0, 0), **options).images

    first = draw(True)
    other = tiny_model("gspn-dit-ti-2", "flow")
    with torch.no_grad():
        other.x_embedder.proj.weight.mul_(3)
    pipe.transformer = other
    second = draw(True)
    assert not torch.equal(first, second) and torch.equal(second, draw(False))


def test_what_a_replay_would_leave_out_forbids_it():
    model = tiny_model("gspn-dit-ti-2", "flow")
    assert why_not_graph(model, CPU) == "the transformer is on cpu"
    assert why_not_graph(model, CUDA) is None
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    assert why_not_graph(model, CUDA) == "a replay would leave out its hooks"
    hook.remove()
    assert why_not_graph(model, CUDA) is None
    model._hf_hook = object()
    assert "CPU offload" in why_not_graph(model, CUDA)
    assert graphed(model, "auto", CUDA) is None and graphed(model, False, CUDA) is None
    with pytest.raises(InputError, match=r"^cuda_graph=True: its weights come and go"):
        graphed(model, True, CUDA)


@pytest.mark.parametrize("value", [1, 0, "yes", None, "True"])
def test_a_pipeline_takes_true_false_and_auto_alone(value):
    with pytest.raises(InputError, match=r"^cuda_graph=.*wanted True, False or 'auto'"):
        pipeline()([0], cuda_graph=value)


def test_on_the_cpu_auto_is_off_and_true_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"^cuda_graph=True: the transformer is on cpu; leave it out"):
        pipeline()([0], cuda_graph=True)
    run = make_run(tmp_path / "run")
    argv = ["--model", str(run), "--num-images", "1", "--device", "cpu", "--num-inference-steps", "1"]
    with pytest.raises(SystemExit):
        command(
            sample,
            SampleOptions,
            prog="sample.py",
            argv=[*argv, "--out", str(tmp_path / "a.png"), "--cuda-graph", "true"],
        )
    assert "--cuda-graph" in capsys.readouterr().err and not (tmp_path / "a.png").exists()
    command(sample, SampleOptions, prog="sample.py", argv=[*argv, "--out", str(tmp_path / "b.png")])
    assert "CUDA graph" not in capsys.readouterr().out and (tmp_path / "b.png").exists()


@pytest.mark.parametrize(("given", "value"), [("true", True), ("false", False), ("auto", "auto")])
def test_the_command_s_option(given, value):
    assert parse(SampleOptions, ["--cuda-graph", given]).cuda_graph is value or value == "auto"
    assert parse(SampleOptions, []).cuda_graph == "auto"
    with pytest.raises(InputError, match="cuda-graph"):
        parse(SampleOptions, ["--cuda-graph", "sometimes"], exit_on_error=False)


def test_the_choice_in_words(monkeypatch):
    model = tiny_model("gspn-dit-ti-2", "flow")
    shape = (2, 4, 8, 8)
    wait = calls_before_capture(work_of(model, shape))
    said = {
        (asked, device.type): (choice.on, choice.reason)
        for asked, device in (("auto", CUDA), (True, CUDA), (False, CUDA), ("auto", CPU))
        for choice in [graph_choice(model, asked, device, shape)]
    }
    assert said == {
        ("auto", "cuda"): (True, f"launches bind it; after the first {wait}"),
        (True, "cuda"): (True, ""),
        (False, "cuda"): (False, ""),
        ("auto", "cpu"): (False, "the transformer is on cpu"),
    }
    monkeypatch.setattr("gspn_dit.launches.OPERATIONS_PER_SECOND", 1e6)
    assert graph_choice(model, "auto", CUDA, shape).on is False


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["gspn-dit-ti-2", "gspn-ti-2", "dit-ti-2"])
def test_images_of_real_graphs(name, precision, recwarn):
    pipe = pipeline(name).to("cuda")

    def draw(count, cuda_graph, **options):
        given = {"num_inference_steps": 6, "guidance_scale": 2.0, "guidance_interval": (0.3, 0.9), "output_type": "np"}
        return pipe(
            [i % 3 for i in range(count)],
            generator=[image_generator(0, i) for i in range(count)],
            mixed_precision=precision,
            cuda_graph=cuda_graph,
            **given | options,
        ).images

    sizes = [(4, {}), (3, {}), (4, {}), (2, {"height": 32, "width": 16})]
    usual = [draw(count, False, **options) for count, options in sizes]
    for (count, options), wanted in zip(sizes, usual, strict=True):
        np.testing.assert_allclose(draw(count, True, **options), wanted, atol=1 / 128)
    assert not [w for w in recwarn.list if "cuda_graph" in str(w.message)]
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.2)  # in place
    replayed = draw(4, True)
    assert not np.allclose(replayed, usual[0], atol=1 / 128)
    np.testing.assert_allclose(replayed, draw(4, False), atol=1 / 128)


@pytest.mark.gpu
def test_memory_of_graphs_is_given_back():
    pipe = pipeline().to("cuda")
    pipe([0], num_inference_steps=2, cuda_graph=False, output_type="latent")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    pipe([0, 1, 2] * 20, num_inference_steps=2, cuda_graph=True, output_type="latent")
    assert pipe._graphed["transformer"].recordings == 1
    pipe.free_graphs()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**24  # libraries keep their working memory


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_cannot_be_recorded_and_is_drawn_with_anyway():
    pipe = pipeline().to("cuda")
    forward = pipe.transformer.forward

    def waiting(latents, *given, **named):
        if latents.sum().item() == 0:
            raise AssertionError
        return forward(latents, *given, **named)

    usual = pipe([0], generator=image_generator(0, 0), num_inference_steps=2, output_type="np").images
    pipe.transformer.forward = waiting
    with pytest.warns(UserWarning, match=r"cuda_graph=True: .*; sampling goes on without"):
        images = pipe(
            [0], generator=image_generator(0, 0), num_inference_steps=2, cuda_graph=True, output_type="np"
        ).images
    np.testing.assert_allclose(images, usual, atol=1 / 128)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
