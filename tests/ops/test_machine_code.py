"""The CUDA kernels as nvcc compiles them, for GPUs that are not here: what is spilled, and instructions."""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gspn_dit.ops.build import CSRC, cuda_home

# An instruction's results are its first operands: after a register, if it has one of those, up to two predicates. What
# follows the second is an operand, so a vote of one predicate is not meant.
TWO_RESULTS_IN_ONE_PREDICATE = re.compile(r"[A-Z][\w.]* +(?:U?R\w+, )?(U?P\d), \1, .*;")


def test_an_instruction_with_two_results_in_one_predicate_is_found():
    assert TWO_RESULTS_IN_ONE_PREDICATE.search("VIMNMX.RELU R39, P5, P5, R53, 0x2, PT ;")
    assert TWO_RESULTS_IN_ONE_PREDICATE.search("/*01a0*/  @!UP1 UISETP.GE.AND UP0, UP0, UR4, 0x1, UPT ;")
    right = """
        /*0100*/                   VIMNMX.RELU R39, P5, P4, R53, 0x2, PT ;
        /*0110*/                   VIMNMX R39, PT, PT, R53, 0x2, PT ;
        /*0120*/               @P5 ISETP.GE.AND P5, PT, R53, R39, P5 ;
        /*0130*/                   PLOP3.LUT P5, PT, P5, P5, PT, 0x80, 0x0 ;
        /*0140*/                   IADD3.X R2, P5, PT, R3, R4, R5, P5, P5 ;
        /*0150*/                   VOTE.ANY R9, P5, P5 ;
    """
    assert not TWO_RESULTS_IN_ONE_PREDICATE.search(right)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """For every source, its kernels compiled for the targets, and what ptxas says of them."""
    nvcc = cuda_home() and cuda_home() / "bin" / "nvcc"
    if nvcc is None or not nvcc.exists():
        pytest.skip("no nvcc")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: it takes minutes, and these tests may be on several
    folder = folder / "compiled"
    folder.mkdir(exist_ok=True)
    results = {}
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        report = folder / f"{source.stem}.txt"
        with open(folder / f"{source.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not report.exists():
                report.write_text(compile_for_every_target(nvcc, source, folder))
        kernels = [folder / f"{source.stem}-{target}.cubin" for target in LEFT_OUT]
        results[source.stem] = kernels, report.read_text()
    return results


# The 16-bit type that a target's kernels are not compiled for. So both targets and both types are, of every kernel, but
# not each with each, which would take twice as long: the types differ in conversions and in a letter of one product.
LEFT_OUT = {80: "BFloat16", 90: "Float16"}


def compile_for_every_target(nvcc, source, folder):
    """Machine code for the targets that are looked at. Of the newest, PTX, which shows that nvcc takes the source."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    newest = max(int(arch.removeprefix("compute_")) for arch in known)
    common = [nvcc, "-std=c++17", "-Werror", "all-warnings", f"-I{CSRC}"]
    commands = []
    for target, left_out in LEFT_OUT.items():
        instances = f"\nGSPN_INSTANTIATE({left_out})\n"
        assert source.read_text().count(instances) == 1
        part = folder / f"{source.stem}-{target}.cu"
        part.write_text(source.read_text().replace(instances, "\n"))
        kernels = ["-cubin", "-o", part.with_suffix(".cubin")]
        commands.append([*common, part, f"-arch=sm_{target}", "-O3", "-Xptxas", "-v", *kernels])
    # All of the source, with what runs on the CPU. Nobody looks at this PTX, so it is not optimised, which takes as
    # long as that of the other two.
    ptx = [f"-gencode=arch=compute_{newest},code=compute_{newest}", "-Xcicc", "-O0"]
    commands.append([*common, source, *ptx, "-c", "-o", folder / f"{source.stem}.o"])
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands))
    for result in results:
        assert result.returncode == 0, result.stderr
    return "".join(result.stderr for result in results)


@pytest.fixture(scope="module")
def machine_code(compiled):
    """For every source, the machine code of its kernels on all targets: name and text of each."""
    folders = [cuda_home() / "bin"]
    if triton := importlib.util.find_spec("triton"):  # the wheel brings one
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if cuobjdump is None:
        pytest.skip(f"no cuobjdump in {' or '.join(map(str, folders))}, nor on PATH")
    results = {}
    for source, (kernels, report) in compiled.items():
        functions = []
        for binary in kernels:
            code = subprocess.run([cuobjdump, "-sass", binary], capture_output=True, text=True, check=True).stdout
            functions += re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL)
        assert len(functions) == report.count("Compiling entry function") > 0  # all of it was really read
        results[source] = functions
    return results


@pytest.mark.slow
def test_compiles_for_every_target_without_spills_in_a_loop(compiled):
    """Forward for whole maps and tiles may leave an address in memory from one half of a scan to the other, once."""
    for _, report in compiled.values():
        found = re.findall(
            r"entry function '(\S+)' for '(\S+)'\n.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            report,
        )
        assert len(found) == report.count("Compiling entry function")  # it was really read
        for target, left_out in LEFT_OUT.items():
            names = [name for name, of, *_ in found if of == f"sm_{target}"]
            assert len(names) >= 12 and not [name for name in names if f"{len(left_out)}{left_out}" in name]
        for name, target, *spilled in found:
            if spilled != ["0", "0", "0"]:
                assert "tensor_forward" in name and (target, spilled) == ("sm_90", ["8", "4", "4"]), name


@pytest.mark.slow
def test_no_instruction_puts_two_results_into_one_predicate(machine_code):
    """As ptxas 13.0 does for sm_90 of a clamp whose result is compared with its bounds: one comparison is lost."""
    for functions in machine_code.values():
        for name, code in functions:
            assert [found[0] for found in TWO_RESULTS_IN_ONE_PREDICATE.finditer(code)] == [], name


@pytest.mark.slow
def test_forward_on_tensor_cores_multiplies_there_and_moves_16_bytes_at_a_time(machine_code):
    kernels = [(name, code) for name, code in machine_code["tensor"] if "tensor_forward" in name]
    assert len(kernels) == 2 * 3 * 3  # targets, sizes of a group, modes
    for name, code in kernels:
        steps = 2 * 2 * 16  # parts of a line, senses, lines; for sm_80 ptxas writes some of them twice
        within, across, driven = (
            len(re.findall(rf"HMMA\.{what} ", code))
            for what in (r"1688\.F32\.TF32", r"1684\.F32\.TF32", r"1688\.F32(?:\.BF16)?")
        )
        assert within >= steps and driven >= steps, name
        assert across in (within, 2 * within), name  # where parts meet, and tiles
        assert re.search(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", code), name  # x
        assert re.search(r"STG\.E\.128", code), name  # y


@pytest.mark.slow
def test_wide_forward_on_tensor_cores_multiplies_there_and_moves_16_bytes_at_a_time(machine_code):
    kernels = [(name, code) for name, code in machine_code["tensor"] if "tensor_wide" in name]
    assert len(kernels) == 2 * 3 * 2  # targets, sizes of a group, with an output gate or without
    for name, code in kernels:
        for depth in ("1688.F32.TF32", "1684.F32.TF32", r"1688.F32(.BF16)? "):  # W d, its borders; λ x
            assert re.search(rf"HMMA\.{depth}", code), name
        assert re.search(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", code), name  # x
        assert re.search(r"STG\.E\.128", code), name  # y
        assert not re.search(r"\b(ATOM|RED)", code), name


@pytest.mark.slow
def test_backward_on_tensor_cores_multiplies_there_and_moves_16_bytes_at_a_time(machine_code):
    kernels = [(name, code) for name, code in machine_code["tensor"] if "tensor_backward" in name]
    assert len(kernels) == 2 * 3 * 3  # targets, sizes of a group, modes
    for name, code in kernels:
        for depth in ("1688.F32.TF32", "1684.F32.TF32", "16816.F32"):  # W d, its borders; sums over channels
            assert f"HMMA.{depth}" in code, name
        assert "MOVM" in code and "LDSM" in code, name
        assert re.search(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", code), name  # x and dy
        assert re.search(r"STG\.E\.128", code), name  # dx
        assert not re.search(r"\b(ATOM|RED)", code), name
