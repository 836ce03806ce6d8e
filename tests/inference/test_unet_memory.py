"""A UNet that saves memory: the same numbers, its modules as they were, and tensors that are fewer or smaller."""

from contextlib import nullcontext

import pytest
import torch
from made.stable_diffusion import latents_of, tiny_sd, tiny_sd2, tiny_sdxl

from benchmarks.live_tensors import FlashAttention, LiveTensors, park, unpark
from benchmarks.memory import peak_bytes
from gspn_dit import replace_self_attention
from gspn_dit.errors import InputError
from gspn_dit.inference import unet_memory
from gspn_dit.inference.unet_memory import (
    Saving,
    activations_in_place,
    check_unet_memory,
    choose_saving,
    feed_forwards_in_slices,
    from_cpu,
    saving_memory,
    skips_kept,
    to_cpu,
)

UNETS = pytest.mark.parametrize("make", [tiny_sd, tiny_sd2, tiny_sdxl])


def call(unet, inputs):
    with torch.no_grad():
        return unet(**inputs).sample


def hooks(unet):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def forwards(unet):
    return [(module, vars(module).get("forward")) for module in unet.modules()]


@UNETS
@pytest.mark.parametrize("size", [(16, 16), (17, 13)])
def test_each_saving_gives_the_same_numbers_and_leaves_the_unet(make, size, monkeypatch):
    """Slices to the last bits; what is overwritten or waits elsewhere exactly."""
    monkeypatch.setattr(unet_memory, "SLICE_TOKENS", 50)
    unet = make()
    inputs = latents_of(unet, *size)
    before, expected, hooked = forwards(unet), call(unet, inputs), hooks(unet)
    for saving, tolerance in (
        (feed_forwards_in_slices(unet), 1e-5),
        (activations_in_place(unet), 0),
        (skips_kept(unet, torch.clone, lambda kept, device: kept.clone()), 0),
        (saving_memory(unet, Saving(slices=True, skips_on_cpu=True)), 1e-5),
    ):
        with saving:
            torch.testing.assert_close(call(unet, inputs), expected, rtol=0, atol=tolerance)
        assert forwards(unet) == before
        assert hooks(unet) == hooked
    assert torch.equal(call(unet, inputs), expected)


def test_a_call_that_fails_leaves_the_unet_as_it_was():
    unet = tiny_sdxl()
    inputs = latents_of(unet)
    before, expected, hooked = forwards(unet), call(unet, inputs), hooks(unet)
    with pytest.raises(RuntimeError), saving_memory(unet, Saving(slices=True, skips_on_cpu=True)):
        call(unet, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][..., 1:]})
    assert (forwards(unet), hooks(unet)) == (before, hooked)
    assert torch.equal(call(unet, inputs), expected)


def test_a_feed_forward_sees_a_slice_at_a_time(monkeypatch):
    monkeypatch.setattr(unet_memory, "SLICE_TOKENS", 100)
    unet, seen = tiny_sd(), []
    for module in unet.modules():
        if type(module).__name__ == "GEGLU":
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    inputs = latents_of(unet, 16, 16, batch=1)
    call(unet, inputs)
    assert max(seen) == 256
    seen.clear()
    with feed_forwards_in_slices(unet):
        call(unet, inputs)
    assert max(seen) == 100 and seen[:3] == [100, 100, 56]


@UNETS
def test_every_skip_waits_elsewhere_and_comes_back_once(make):
    unet, kept, got = make(), [], []
    inputs = latents_of(unet)

    def put(tensor):
        kept.append(tensor.shape)
        return tensor.clone()

    def get(tensor, device):
        got.append(tensor.shape)
        return tensor.to(device)

    with skips_kept(unet, put, get):
        call(unet, inputs)
    skips = sum(len(block.resnets) for block in unet.up_blocks)
    assert len(kept) == skips and len(got) == skips + 1  # the first layer's is also what the way down begins with
    assert sorted(got[1:]) == sorted(kept)


@pytest.mark.gpu
def test_skips_on_the_cpu_are_exact_on_a_gpu_and_take_no_memory_there():
    unet = tiny_sdxl().cuda()
    inputs = {
        name: each.cuda() if isinstance(each, torch.Tensor) else {key: value.cuda() for key, value in each.items()}
        for name, each in latents_of(unet, 128, 128).items()
    }
    expected = call(unet, inputs)
    peaks = []
    for saving in (nullcontext(), skips_kept(unet, to_cpu, from_cpu)):
        with saving:
            assert torch.equal(call(unet, inputs), expected)
            peaks.append(peak_bytes("cuda", lambda: call(unet, inputs)))
    assert peaks[1] < peaks[0]


def live_peak(unet, size, saving, batch=1, dtype=torch.bfloat16):
    """Bytes at the peak of a call on the meta device."""
    with torch.device("meta"):
        inputs = {
            name: torch.empty(each.shape, dtype=dtype)
            if isinstance(each, torch.Tensor)
            else {key: torch.empty(value.shape, dtype=dtype) for key, value in each.items()}
            for name, each in latents_of(unet, 1, 1, batch).items()
        }
        inputs["sample"] = torch.empty(batch, 4, *size, dtype=dtype)
        with torch.no_grad(), saving, FlashAttention(), LiveTensors() as tensors:
            unet(**inputs)
    return tensors.peak


def test_memory_is_linear_in_pixels_with_replaced_layers(monkeypatch):
    """Computed: doubled sides need four times as much, and skips that wait elsewhere make it less."""
    monkeypatch.setattr(unet_memory, "SLICE_TOKENS", 1000)
    unet = tiny_sdxl()
    replace_self_attention(unet).mount(unet)
    unet.to("meta", torch.bfloat16)
    for saved in (Saving(False, False), Saving(True, False)):
        small, large = (live_peak(unet, (side, side), saving_memory(unet, saved)) for side in (128, 256))
        assert 3.8 < large / small < 4.1
    parked = live_peak(unet, (128, 128), skips_kept(unet, park, unpark))
    assert parked < live_peak(unet, (128, 128), nullcontext())


@pytest.mark.slow
def test_measured_memory_is_linear_in_pixels_with_replaced_layers():
    """On the CPU, where the reference of the scans is run."""
    unet = tiny_sd()
    replace_self_attention(unet).mount(unet)
    peaks = []
    for side in (64, 128):
        inputs = latents_of(unet, side, side, batch=1)
        call(unet, inputs)
        with saving_memory(unet, Saving(True, True)):
            peaks.append(peak_bytes("cpu", lambda inputs=inputs: call(unet, inputs)))
    assert 3 < peaks[1] / peaks[0] < 5


def test_what_is_saved_goes_by_the_size():
    assert choose_saving("auto", (128, 128)) == Saving(False, False)
    assert choose_saving("auto", (256, 256)) == Saving(True, False)
    assert choose_saving("auto", (1024, 2048)) == choose_saving("on", (8, 8)) == Saving(True, True)
    assert choose_saving("off", (2048, 2048)) == Saving(False, False)


def test_a_size_that_no_device_has_memory_for_is_refused(monkeypatch):
    monkeypatch.setattr(unet_memory, "memory_of", lambda device: 10**6)
    unet = tiny_sd()
    channels = unet.up_blocks[-1].resnets[0].in_channels
    assert channels == 96
    check_unet_memory(unet, (1, 32, 32), torch.device("cpu"))  # 2 · 96 · 32² · 4 bytes
    with pytest.raises(InputError, match=r"over 1\.6 MB, and the memory of cpu is 1\.0 MB"):
        check_unet_memory(unet, (2, 32, 32), torch.device("cpu"))


def test_tensors_that_are_too_large_for_cuda_are_said(monkeypatch):
    monkeypatch.setattr(unet_memory, "memory_of", lambda device: 10**15)
    unet, cuda = tiny_sd(), torch.device("cuda")
    with pytest.warns(UserWarning, match=r"2\.\d·2³⁰ elements at 1×5000×5000 latents"):
        check_unet_memory(unet, (1, 5000, 5000), cuda)
