"""Self-attention of Stable Diffusion's U-Nets is replaced, and put back, on real diffusers models of small size."""

import pytest
import torch
from made.stable_diffusion import latents_of, tiny_sd, tiny_sd2, tiny_sdxl

from gspn_dit import AttentionReplacement, replace_self_attention

MIXERS = ("gspn", "fresh", "linear", "window")


@torch.no_grad()
def noise(unet, **inputs):
    return unet(**inputs).sample


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("make", [tiny_sd, tiny_sd2, tiny_sdxl])
def test_a_mounted_network_is_another_and_an_unmounted_one_the_same(make, mixer, tmp_path):
    unet = make()
    inputs = latents_of(unet, 13, 17)
    before, modules = noise(unet, **inputs), dict(unet.named_modules())
    replacement = replace_self_attention(unet, mixer, chunk=4, seed=0)
    assert torch.equal(noise(unet, **inputs), before)
    replacement.mount(unet)
    mounted = noise(unet, **inputs)
    assert mounted.isfinite().all() and not torch.allclose(mounted, before, atol=1e-3)
    with replacement.unmounted():
        assert torch.equal(noise(unet, **inputs), before)
    assert torch.equal(noise(unet, **inputs), mounted)
    replacement.save_pretrained(tmp_path)
    replacement.unmount()
    assert torch.equal(noise(unet, **inputs), before)
    assert dict(unet.named_modules()) == modules
    AttentionReplacement.from_pretrained(tmp_path).mount(unet)
    assert torch.equal(noise(unet, **inputs), mounted)
