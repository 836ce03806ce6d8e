"""gspn_dit/precision.py: `auto` is bf16 where a device has instructions for it; and what every command does with it."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from made.runs import list_checkpoints, make_run
from made.training import config, losses
from PIL import Image

from gspn_dit import precision
from gspn_dit.commands import EncodeOptions, SampleOptions
from gspn_dit.config import Config
from gspn_dit.data import encode
from gspn_dit.errors import InputError
from gspn_dit.inference.sample import main as sample
from gspn_dit.inference.sample_folder import begin
from gspn_dit.options import command, parse
from gspn_dit.precision import autocast, choose_precision
from gspn_dit.processes import agreed_precision
from gspn_dit.training.loop import train

CPU = torch.device("cpu")
MILAN = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx avx2 fma f16c\n"
GENOA = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\nbugs\t\t: none\n"
SAPPHIRE_RAPIDS = "flags\t\t: avx2 avx512f amx_bf16 amx_tile\n"
SKYLAKE = "flags\t\t: avx2 avx512f avx512bw\n"
GRAVITON_3 = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve svebf16 i8mm bf16\n"
GRAVITON_2 = "Features\t: fp asimd atomics asimddp\n"


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """Makes this CPU one of which Linux says so."""

    def pretend(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")

    return pretend


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        (MILAN, "no", "this CPU has no bfloat16 instructions"),
        (GENOA, "bf16", "this CPU has avx512_bf16"),
        (SAPPHIRE_RAPIDS, "bf16", "this CPU has amx_bf16"),
        (SKYLAKE, "no", "this CPU has no bfloat16 instructions"),
        (GRAVITON_3, "bf16", "this CPU has bf16"),
        (GRAVITON_2, "no", "this CPU has no bfloat16 instructions"),
        ("processor : 0\n", "no", "the CPU's instructions are not known"),
    ],
)
def test_a_cpu_by_its_flags(cpu, text, name, reason):
    cpu(text)
    chosen = choose_precision("auto", CPU)
    assert (chosen.name, chosen.native, chosen.reason) == (name, name == "bf16", reason)


def test_a_cpu_of_a_system_that_does_not_tell_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "none")
    assert choose_precision("auto", CPU).name == "no"


@pytest.mark.parametrize(
    ("device", "capability", "name"),
    [
        ("cuda:0", (7, 0), "no"),
        ("cuda:1", (7, 5), "no"),
        ("cuda:0", (8, 0), "bf16"),
        ("cuda:0", (9, 0), "bf16"),
        ("cuda:0", (12, 0), "bf16"),
        ("mps", None, "no"),
        ("xpu", None, "no"),
    ],
)
def test_another_device_by_its_compute_capability(monkeypatch, device, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device(device): capability}.get)
    chosen = choose_precision("auto", torch.device(device))
    assert chosen.name == name
    assert chosen.reason == (
        f"compute capability {capability[0]}.{capability[1]}" if capability else f"not known of {device}"
    )


@pytest.mark.parametrize("asked", ["no", "bf16", "fp16"])
def test_what_is_asked_for_stays(cpu, asked):
    for text in (MILAN, GENOA):
        cpu(text)
        assert choose_precision(asked, CPU).name == asked


@pytest.mark.usefixtures("as_a_command_says_it")
@pytest.mark.parametrize(
    ("text", "asked", "out", "err"),
    [
        (MILAN, "auto", "computing in float32 (mixed_precision auto: this CPU has no bfloat16 instructions)\n", ""),
        (GENOA, "auto", "computing in bfloat16 (mixed_precision auto: this CPU has avx512_bf16)\n", ""),
        (GENOA, "bf16", "computing in bfloat16 (mixed_precision bf16)\n", ""),
        (GENOA, "no", "computing in float32 (mixed_precision no)\n", ""),
        (
            MILAN,
            "bf16",
            "",
            "warning: mixed_precision=bf16: this CPU has no bfloat16 instructions; `auto` computes in "
            "float32, many times as fast here\n",
        ),
    ],
)
def test_it_is_said_in_one_line(cpu, capsys, text, asked, out, err):
    cpu(text)
    choose_precision(asked, CPU).say()
    assert capsys.readouterr() == (out, err)


@pytest.mark.parametrize(
    ("natives", "name", "reason"),
    [
        ([True, True], "bf16", "r"),
        ([False, False], "no", "r"),
        ([True, False], "no", "process 1: r"),
        ([False, True, False], "no", "process 0: r"),
    ],
)
def test_processes_agree_on_what_all_their_devices_have(monkeypatch, natives, name, reason):
    everyone = [precision.Precision("auto", "bf16" if native else "no", native, "r") for native in natives]
    monkeypatch.setattr("gspn_dit.processes.gather_object", lambda mine: everyone)
    agreed = agreed_precision("auto", CPU)
    assert (agreed.name, agreed.reason) == (name, reason)


@pytest.mark.parametrize(("name", "dtype"), [("no", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_is_in_that_dtype(name, dtype):
    with autocast(CPU, name):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == getattr(torch, dtype)


def test_auto_is_the_default():
    assert parse(Config, []).training.mixed_precision == "auto"
    assert parse(SampleOptions, []).mixed_precision == "auto"


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_run_that_goes_on_elsewhere_says_so_and_goes_on(tmp_path, store, cpu, capsys, fresh_accelerate):
    def steps(last, *changes):
        train(config(tmp_path / "run", store, "--resume", "auto", "--training.max_steps", last, *changes))
        AcceleratorState._reset_state(reset_partial_state=True)
        said = capsys.readouterr().out.splitlines()
        checkpoint = list_checkpoints(tmp_path / "run")[-1]
        computed_in = json.loads((checkpoint / "metadata.json").read_text())["mixed_precision"]
        asked = Config.load(checkpoint / "config.yaml").training.mixed_precision
        return computed_in, asked, [line for line in said if "mixed_precision" in line]

    auto = ("--training.mixed_precision", "auto")
    cpu(GENOA)
    assert steps(1, *auto) == (
        "bf16",
        "auto",
        ["computing in bfloat16 (mixed_precision auto: this CPU has avx512_bf16)"],
    )
    assert steps(2, *auto)[2] == ["computing in bfloat16 (mixed_precision auto: this CPU has avx512_bf16)"]
    cpu(MILAN)
    assert steps(3, *auto) == (
        "no",
        "auto",
        [
            "changed since step-0000002: mixed_precision bf16 → no: this CPU has no bfloat16 instructions",
            "computing in float32 (mixed_precision auto: this CPU has no bfloat16 instructions)",
        ],
    )
    computed_in, asked, said = steps(4, "--training.mixed_precision", "bf16")
    assert (computed_in, asked) == ("bf16", "bf16")
    assert "training.mixed_precision 'auto' → 'bf16'" in said[0]
    assert said[1] == "changed since step-0000003: mixed_precision no → bf16: as asked"
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_checkpoint_from_before_there_was_a_choice(tmp_path, store, capsys, fresh_accelerate):
    train(config(tmp_path / "run", store, "--training.max_steps", 1))
    AcceleratorState._reset_state(reset_partial_state=True)
    path = list_checkpoints(tmp_path / "run")[-1] / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["mixed_precision"]
    path.write_text(json.dumps(metadata))
    train(config(tmp_path / "run", store, "--resume", "auto", "--training.max_steps", 2))
    assert "mixed_precision no →" not in capsys.readouterr().out


def test_a_folder_of_samples_holds_one_precision(tmp_path, cpu, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "samples"

    def draw(count, *more):
        command(
            sample,
            SampleOptions,
            prog="sample.py",
            argv=[
                "--model",
                str(run),
                "--num-images",
                count,
                "--device",
                "cpu",
                "--num-inference-steps",
                "1",
                "--out",
                f"{out}/",
                *more,
            ],
        )
        return json.loads((out / "settings.json").read_text())["mixed_precision"]

    cpu(GENOA)
    assert draw("1") == "bf16"
    assert "computing in bfloat16 (mixed_precision auto: this CPU has avx512_bf16)" in capsys.readouterr().out
    cpu(MILAN)
    with pytest.raises(SystemExit):
        draw("2")
    assert "was begun with mixed_precision='bf16'; run with the same" in capsys.readouterr().err
    assert draw("2", "--mixed-precision", "bf16") == "bf16"
    assert len(list(out.glob("*.png"))) == 2
    assert "warning: mixed_precision=bf16" in capsys.readouterr().err


def test_a_folder_from_before_samples_held_float32_as_null_goes_on_in_float32(tmp_path):
    settings = {"mixed_precision": "no", "seed": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"mixed_precision": None}))
    assert begin(tmp_path, settings, [0, 1]) == [0, 1]
    with pytest.raises(InputError, match=r"^mixed_precision='bf16': .*mixed_precision='no'; run with the same"):
        begin(tmp_path, settings | {"mixed_precision": "bf16"}, [0, 1])


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_store_holds_one_precision_and_one_from_before_goes_on(tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "store"
    (images / "cat").mkdir(parents=True)
    for i in range(2):
        Image.effect_noise((32, 32), 50 + i).convert("RGB").save(images / "cat" / f"{i}.png")

    def make(*more):
        argv = [
            "--data",
            str(images),
            "--vae",
            "digits",
            "--image-size",
            "32",
            "--num-workers",
            "0",
            "--shard-size",
            "1",
            "--device",
            "cpu",
            "--out",
            str(out),
            *more,
        ]
        encode.main(parse(EncodeOptions, argv, exit_on_error=False))
        return json.loads((out / "manifest.json").read_text())["mixed_precision"]

    assert make() == "no"
    assert "computing in float32 (mixed_precision no)" in capsys.readouterr().out
    begun = json.loads((out / "encode.json").read_text())
    del begun["mixed_precision"]
    (out / "encode.json").write_text(json.dumps(begun))
    first, second = sorted(out.glob("shard-*"))
    as_it_was = first.read_bytes()
    second.unlink()
    assert make() == "no"
    assert first.read_bytes() == as_it_was and second.exists()
    with pytest.raises(
        InputError, match=r"^mixed_precision='bf16': .* begun with mixed_precision='no'; run with the same"
    ):
        make("--mixed-precision", "bf16")
