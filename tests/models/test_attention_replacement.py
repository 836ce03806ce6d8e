"""Self-attention of Stable Diffusion's U-Nets is replaced, and put back, on real diffusers models of small size."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from made.launched import run_apart
from made.stable_diffusion import latents_of, stirred, tiny_sd, tiny_sd2, tiny_sd_pipeline, tiny_sdxl

from gspn_dit import AttentionReplacement, replace_self_attention
from gspn_dit.errors import InputError
from gspn_dit.models.replaced_attention import GSPNAttention

MIXERS = ("gspn", "fresh", "linear", "window")
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def unet():
    return tiny_sd()


@torch.no_grad()
def noise(unet, *size, **options):
    """The U-Net's output for inputs of this size."""
    return unet(**{**latents_of(unet, *size), **options}).sample


def refuse(*args, **kwargs):
    raise torch.OutOfMemoryError


class TestMounting:
    @pytest.mark.parametrize(
        ("make", "mixer"), [*((tiny_sd, mixer) for mixer in MIXERS), (tiny_sd2, "gspn"), (tiny_sdxl, "gspn")]
    )
    def test_a_mounted_network_is_another_and_an_unmounted_one_the_same(self, make, mixer, tmp_path):
        unet = make()
        before, modules = noise(unet, 13, 17), dict(unet.named_modules())
        replacement = stirred(replace_self_attention(unet, mixer, chunk=4, seed=0))
        assert torch.equal(noise(unet, 13, 17), before)
        replacement.mount(unet)
        mounted = noise(unet, 13, 17)
        assert mounted.isfinite().all() and not torch.allclose(mounted, before, atol=1e-3)
        with replacement.unmounted():
            assert torch.equal(noise(unet, 13, 17), before)
        assert torch.equal(noise(unet, 13, 17), mounted)
        replacement.save_pretrained(tmp_path)
        replacement.unmount()
        assert torch.equal(noise(unet, 13, 17), before)
        assert dict(unet.named_modules()) == modules
        assert not any(module._forward_pre_hooks for module in unet.modules())
        AttentionReplacement.from_pretrained(tmp_path).mount(unet)
        assert torch.equal(noise(unet, 13, 17), mounted)

    def test_an_original_that_cannot_be_moved_leaves_all_layers_in_place(self, unet, monkeypatch):
        replacement = replace_self_attention(unet, seed=0)
        last = unet.get_submodule(replacement.layer_names[-1])
        replacement.mount(unet)
        mounted = noise(unet)
        monkeypatch.setattr(last, "to", refuse)
        with pytest.raises(torch.OutOfMemoryError), replacement.unmounted():
            pass
        assert torch.equal(noise(unet), mounted)
        with pytest.raises(torch.OutOfMemoryError):
            replacement.unmount()
        assert torch.equal(noise(unet), mounted)
        monkeypatch.undo()
        replacement.unmount()
        assert unet.get_submodule(replacement.layer_names[-1]) is last

    def test_turns_of_the_teacher_may_be_nested_fail_or_end_unmounted(self, unet):
        replacement, before = replace_self_attention(unet, seed=0), noise(unet)
        replacement.mount(unet)
        mounted = noise(unet)
        with replacement.unmounted():
            with replacement.unmounted():
                pass
            assert torch.equal(noise(unet), before)
        with pytest.raises(KeyError), replacement.unmounted():
            raise KeyError
        assert torch.equal(noise(unet), mounted)
        with replacement.unmounted():
            replacement.unmount()
        assert torch.equal(noise(unet), before)
        replacement.mount(unet)
        assert torch.equal(noise(unet), mounted)

    def test_it_is_called_as_the_unet_and_trains_its_own_weights_alone(self, unet):
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        unet.requires_grad_(False)
        replacement.requires_grad_(True)
        y = replacement(**latents_of(unet)).sample
        assert torch.equal(y, unet(**latents_of(unet)).sample)
        y.square().mean().backward()
        there = dict(unet.named_parameters())
        for name, parameter in replacement.named_parameters():
            assert parameter is there[name] and parameter.grad is not None and ".attn1." in name
        assert {name for name, parameter in there.items() if parameter.grad is not None} == {
            name for name, _ in replacement.named_parameters()
        }

    def test_projections_are_those_of_the_attention(self, unet):
        places = unet.state_dict()
        for mixer in ("gspn", "linear", "window"):
            own = replace_self_attention(unet, mixer).state_dict()
            kept = [key for key in places if ".attn1." in key]
            assert len(kept) == 5 * 7
            assert all(torch.equal(own[key], places[key]) for key in kept)

    def test_the_same_seed_makes_the_same_layers_and_leaves_torchs_generator(self, unet):
        torch.manual_seed(7)
        first, second = (replace_self_attention(unet, "fresh", seed=3).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
        drawn = torch.rand(1)
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.rand(1))

    def test_a_seed_changes_no_generator_of_a_gpu_and_draws_alike_on_any_device(self, unet, monkeypatch):
        """A GPU's generators are seeded by torch.manual_seed alone, which is not called."""
        seeded = []
        for device in ("cuda", "mps"):
            monkeypatch.setattr(f"torch.{device}.manual_seed{'_all' if device == 'cuda' else ''}", seeded.append)
        replace_self_attention(unet, "fresh", seed=3)
        assert not seeded
        torch.manual_seed(3)
        assert seeded

    @pytest.mark.gpu
    def test_a_seed_leaves_a_gpus_generator_and_draws_what_it_does_on_the_cpu(self, unet):
        on_cpu = replace_self_attention(unet, "fresh", seed=3).state_dict()
        unet.to("cuda")
        before = torch.cuda.get_rng_state()
        on_gpu = replace_self_attention(unet, "fresh", seed=3).state_dict()
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert all(on_gpu[key].is_cuda and torch.equal(on_gpu[key].cpu(), on_cpu[key]) for key in on_cpu)

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    @pytest.mark.filterwarnings("error::FutureWarning")
    def test_the_dtype_may_have_either_name(self, unet, tmp_path, name):
        replace_self_attention(unet, seed=0, layers="mid_block").save_pretrained(tmp_path)
        loaded = AttentionReplacement.from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in AttentionReplacement.from_pretrained(tmp_path).parameters()} == {torch.float32}

    def test_what_was_chosen_is_replaced_and_nothing_else(self, unet):
        replacement = replace_self_attention(
            unet, layers=["levels=0", "mid_block", "down_blocks.1"], keep_attention=["up_blocks.2.attentions.1"]
        )
        assert replacement.layer_names == [
            DOWN,
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
            MID,
            "up_blocks.2.attentions.0.transformer_blocks.0.attn1",
        ]
        replacement.mount(unet)
        there = {name for name, module in unet.named_modules() if isinstance(module, GSPNAttention)}
        assert there == set(replacement.layer_names)
        assert noise(unet).isfinite().all()

    def test_levels_are_those_of_the_maps(self):
        unet = tiny_sdxl()
        assert {
            name.split(".attentions")[0] for name in replace_self_attention(unet, layers="levels=1").layer_names
        } == {
            "down_blocks.1",
            "up_blocks.1",
        }
        assert {
            name.split(".attentions")[0] for name in replace_self_attention(unet, layers="levels=2").layer_names
        } == {
            "down_blocks.2",
            "mid_block",
            "up_blocks.0",
        }

    def test_a_network_without_a_middle_needs_no_other_choice(self):
        unet = tiny_sd(mid_block_type=None)
        replacement = replace_self_attention(unet).mount(unet)
        assert len(replacement.layer_names) == 6 and noise(unet).isfinite().all()

    def test_windows_alternate_within_a_level_and_global_layers_have_none(self):
        layers = {
            layer["name"]: layer["chunk"]
            for layer in replace_self_attention(tiny_sdxl(), chunk=8, global_layers="mid_block").config.layers
        }
        of_a_level = [chunk for name, chunk in layers.items() if name.startswith(("down_blocks.2", "up_blocks.0"))]
        assert [chunk["shifted"] for chunk in of_a_level] == [False, True] * 3
        assert all(chunk["side"] == 8 for name, chunk in layers.items() if not name.startswith("mid_block"))
        assert all(chunk is None for name, chunk in layers.items() if name.startswith("mid_block"))
        lines = replace_self_attention(tiny_sdxl(), chunk=8, windows=None, global_layers=()).config.layers
        assert {layer["chunk"] for layer in lines} == {8}


class TestSizes:
    @pytest.mark.parametrize("size", [(16, 16), (13, 17), (18, 7)])
    def test_layers_know_their_maps(self, unet, size):
        maps = {}
        for name, module in unet.named_modules():
            if isinstance(module, Transformer2DModel):
                module.register_forward_hook(lambda _, __, y, name=name: maps.__setitem__(name, tuple(y[0].shape[-2:])))
        replacement = replace_self_attention(unet).mount(unet)
        noise(unet, *size)
        assert set(replacement.sizes.values()) == set(maps.values())
        for name, there in replacement.sizes.items():
            assert there == maps[name.split(".transformer_blocks")[0]]

    def test_a_wide_map_is_not_read_as_a_tall_one(self, unet):
        """Turned latents give the turned result, where the same pixels lie in another order."""
        for module in unet.modules():  # turned convolutions, too
            if isinstance(module, torch.nn.Conv2d):
                with torch.no_grad():
                    module.weight.copy_((module.weight + module.weight.transpose(-1, -2)) / 2)
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        for name in replacement.layer_names:  # gates that are the same in all directions
            torch.nn.init.zeros_(replacement.layer(name).mixing.gates[1].weight)
        inputs = latents_of(unet, 8, 24)
        wide = noise(unet, **inputs)
        tall = noise(unet, **{**inputs, "sample": inputs["sample"].transpose(-1, -2)})
        torch.testing.assert_close(tall.transpose(-1, -2), wide, atol=1e-4, rtol=1e-4)

    def test_networks_do_not_share_sizes(self):
        unets = [tiny_sd(0), tiny_sd(1)]
        alone = []
        for unet, size in zip(unets, ((8, 16), (16, 8)), strict=True):
            replace_self_attention(unet, seed=0).mount(unet)
            alone.append(noise(unet, *size))
        for unet, size, before in zip(unets, ((8, 16), (16, 8)), alone, strict=True):
            assert torch.equal(noise(unet, *size), before)

    def test_recomputed_blocks_have_the_size_of_their_forward(self, unet):
        """Two maps of as many tokens, one wide and one tall, wait for one backward pass."""
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        grads = []
        for recomputes in (False, True):
            if recomputes:
                unet.enable_gradient_checkpointing()
            replacement.zero_grad()
            unet.train()
            loss = sum(unet(**latents_of(unet, *size)).sample.square().mean() for size in ((8, 16), (16, 8)))
            loss.backward()
            grads.append([parameter.grad.clone() for parameter in replacement.parameters()])
        for plain, recomputed in zip(*grads, strict=True):
            torch.testing.assert_close(plain, recomputed)

    @pytest.mark.slow
    def test_compiled_it_takes_any_size(self):
        unet = tiny_sd(
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
        )
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
        for size in (8, 16), (16, 8), (12, 20):
            before = noise(unet, *size)
            replacement.layer(DOWN).size = None
            with torch.no_grad():
                torch.testing.assert_close(compiled(**latents_of(unet, *size)).sample, before, atol=1e-4, rtol=1e-4)
            assert replacement.sizes[DOWN] == size

    def test_a_layer_alone_is_told_its_size(self, unet):
        layer = replace_self_attention(unet).layer(DOWN)
        with pytest.raises(InputError, match=r"size=None: tokens of shape \(1, 12, 32\); wanted \(H, W\)"):
            layer(torch.zeros(1, 12, 32))
        layer.size = (3, 4)
        assert layer(torch.zeros(1, 12, 32)).shape == (1, 12, 32)
        with pytest.raises(InputError, match="size"):
            layer(torch.zeros(1, 16, 32))

    def test_the_teachers_turn_notes_sizes_too(self, unet):
        replacement = replace_self_attention(unet).mount(unet)
        with replacement.unmounted():
            noise(unet, 10, 12)
        assert replacement.sizes[DOWN] == (10, 12)


class TestCopies:
    def test_a_copy_of_the_network_is_one_of_its_own(self, unet):
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        before = noise(unet, 8, 16)
        twin = copy.deepcopy(unet)
        assert torch.equal(noise(twin, 16, 8), noise(unet, 16, 8))
        noise(unet, 8, 8)
        assert torch.equal(noise(twin, 8, 16), before) and replacement.sizes[DOWN] == (8, 8)
        stirred(replacement)
        assert torch.equal(noise(twin, 8, 16), before)

    def test_a_copy_of_the_replacement_is_not_mounted(self, unet):
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        twin = copy.deepcopy(replacement)
        assert twin.unet is None and replacement.unet is unet
        replacement.unmount()
        before = noise(unet)
        twin.mount(unet)
        assert not torch.equal(noise(unet), before)


class TestFiles:
    def test_they_hold_the_layers_and_name_the_model(self, unet, tmp_path):
        replacement = replace_self_attention(unet, layers="mid_block", base_model="some/base")
        replacement.mount(unet).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["base_model"] == "some/base" and config["version"]
        assert config["layers"] == [
            {
                "name": MID,
                "mixer": "gspn",
                "channels": 64,
                "heads": 4,
                "chunk": None,
                "bias": False,
                "out_bias": True,
                "dropout": 0.0,
            }
        ]
        loaded = AttentionReplacement.from_pretrained(tmp_path)
        assert all(key.startswith(f"{MID}.") for key in loaded.state_dict())
        assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < 4.5 * 64 * 64 * 4 + 20_000

    def test_a_pipelines_name_is_the_models(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path / "base")
        assert pipe.unet.config["_name_or_path"] == str(tmp_path / "base" / "unet")  # of a hub's, a folder of its cache
        assert replace_self_attention(pipe).config.base_model == str(tmp_path / "base")
        assert replace_self_attention(pipe, base_model="some/base").config.base_model == "some/base"
        assert replace_self_attention(pipe.unet).config.base_model == str(tmp_path / "base" / "unet")

    @pytest.mark.slow
    def test_another_process_mounts_them(self, unet, tmp_path):
        stirred(replace_self_attention(unet, seed=0)).mount(unet).save_pretrained(tmp_path / "layers")
        mounted = noise(unet)
        unet_folder = tmp_path / "unet"
        tiny_sd().save_pretrained(unet_folder)
        torch.save(latents_of(unet), tmp_path / "inputs.pt")
        script = f"""if True:
            import torch
            from diffusers import UNet2DConditionModel
            from gspn_dit import AttentionReplacement
            unet = UNet2DConditionModel.from_pretrained({str(unet_folder)!r})
            AttentionReplacement.from_pretrained({str(tmp_path / "layers")!r}).mount(unet)
            with torch.no_grad():
                y = unet(**torch.load({str(tmp_path / "inputs.pt")!r})).sample
            torch.save(y, {str(tmp_path / "y.pt")!r})
        """
        run_apart(script, tmp_path)
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), mounted)


class TestDevicesAndDtypes:
    def test_layers_take_the_networks_dtype_or_keep_another(self, unet):
        replacement = replace_self_attention(unet, seed=0)
        exact = noise(unet)
        unet.to(torch.bfloat16)
        replacement.mount(unet)
        half = {key: value.to(torch.bfloat16) for key, value in latents_of(unet).items() if value.is_floating_point()}
        assert {parameter.dtype for parameter in replacement.parameters()} == {torch.bfloat16}
        y = noise(unet, **half)
        assert y.dtype == torch.bfloat16 and (y.float() - exact).norm() < 0.5 * exact.norm()
        replacement.unmount()
        replacement.mount(unet, dtype=torch.float32)
        assert {parameter.dtype for parameter in replacement.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            assert noise(unet, **half).isfinite().all()
        replacement.unmount()
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}

    def test_a_network_that_moves_takes_them_along(self, unet):
        replacement = replace_self_attention(unet).mount(unet)
        unet.to(torch.float64)
        assert {parameter.dtype for parameter in replacement.parameters()} == {torch.float64}
        replacement.unmount()
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.float64}

    def test_model_offload_moves_them(self, unet):
        replacement = replace_self_attention(unet).mount(unet)
        _, hook = cpu_offload_with_hook(unet, "meta")  # stands for an accelerator: it can be moved to
        hook.hook.pre_forward(unet)
        assert all(parameter.is_meta for parameter in replacement.parameters())

    def test_sequential_offload_begins_after_mount(self, unet, tmp_path):
        replacement = replace_self_attention(unet, seed=0).mount(unet)
        before = noise(unet)
        cpu_offload(unet, "cpu")
        assert torch.equal(noise(unet), before)
        with pytest.raises(InputError, match="hooks"):
            replacement.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="remove_all_hooks"):
            replacement.unmount()
        remove_hook_from_module(unet, recurse=True)
        assert torch.equal(noise(unet), before)
        replacement.unmount()
        cpu_offload(unet, "cpu")
        with pytest.raises(InputError, match="enable_sequential_cpu_offload"):
            replacement.mount(unet)

    def test_layers_with_weights_do_not_go_where_there_are_none(self, unet):
        replacement = replace_self_attention(unet)
        with pytest.raises(InputError, match="meta"):
            replacement.mount(unet.to("meta"))
        assert not any(parameter.is_meta for parameter in replacement.parameters())


def with_another_attention():
    unet = tiny_sd()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1 = Attention(32, heads=3, dim_head=10)
    return unet


class TestRefusals:
    def test_mounting_twice(self, unet):
        replacement = replace_self_attention(unet).mount(unet)
        with pytest.raises(InputError, match=r"the replacement is mounted; unmount\(\) it first"):
            replacement.mount(tiny_sd())
        with pytest.raises(InputError, match="the U-Net's attention is replaced already"):
            replace_self_attention(tiny_sd()).mount(unet)
        with pytest.raises(InputError, match="replaced already"):
            replace_self_attention(unet)

    def test_what_needs_a_mounted_one(self, unet):
        replacement = replace_self_attention(unet)
        with pytest.raises(InputError, match="not mounted"):
            replacement.unmount()
        with pytest.raises(InputError, match="not mounted"):
            replacement(**latents_of(unet))
        with pytest.raises(InputError, match="not mounted"), replacement.unmounted():
            pass

    def test_another_architecture(self, unet):
        replacement = replace_self_attention(unet, base_model="some/base")
        with pytest.raises(InputError, match=r"the U-Net has no self-attention down_blocks.0.*mount on some/base"):
            replacement.mount(tiny_sdxl())
        with pytest.raises(InputError, match=r"of the U-Net has 64 channels, not 32 and 4 heads, not 4"):
            replacement.mount(tiny_sd(block_out_channels=(64, 64, 64)))
        assert not any(isinstance(module, GSPNAttention) for module in unet.modules())

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            (
                lambda: DiTTransformer2DModel(2, 8, num_layers=1, sample_size=4),
                "a DiTTransformer2DModel is not supported",
            ),
            (lambda: "stabilityai/sdxl", "a str is not supported"),
            (
                lambda: tiny_sd(
                    down_block_types=("DownBlock2D",) * 3,
                    up_block_types=("UpBlock2D",) * 3,
                    mid_block_type=None,
                ),
                r"no self-attention \(attn1\)",
            ),
            (lambda: tiny_sd(only_cross_attention=True), "is not the self-attention of Stable Diffusion"),
            (with_another_attention, "32 channels in 3 heads of 10; wanted heads that divide the channels"),
        ],
    )
    def test_a_model_that_is_not_supported(self, model, said):
        with pytest.raises(InputError, match=said) as refusal:
            replace_self_attention(model())
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"mixer": "mamba"}, "mixer='mamba': give one of gspn, fresh, linear, window"),
            ({"layers": "down_blocks.7"}, "layers='down_blocks.7': no self-attention is in 'down_blocks.7'"),
            (
                {"layers": "levels=0,3"},
                "layers='levels=0,3': no self-attention at level 3; wanted levels among 0, 1, 2",
            ),
            ({"keep_attention": "all"}, "no layer is left"),
            ({"global_layers": [0]}, r"global_layers=\[0\]: no self-attention is in 0"),
            ({"chunk": 0}, "chunk=0"),
            ({"windows": "round"}, "windows='round'"),
        ],
    )
    def test_a_choice_that_there_is_not(self, unet, options, said):
        with pytest.raises(InputError, match=said):
            replace_self_attention(unet, **options)

    def test_masks_and_other_tokens(self, unet):
        replace_self_attention(unet).mount(unet)
        with pytest.raises(InputError, match="attention_mask: a GSPNAttention has no pairs of tokens to mask"):
            noise(unet, attention_mask=torch.ones(2, 256))
        layer = unet.get_submodule(DOWN)
        layer.size = (2, 2)
        with pytest.raises(InputError, match="encoder_hidden_states: a GSPNAttention is self-attention"):
            layer(torch.zeros(1, 4, 32), encoder_hidden_states=torch.zeros(1, 3, 32))


@pytest.mark.parametrize(
    ("architecture", "parameters", "attention", "count", "totals"),
    [
        (
            "sd15",
            859_520_964,
            49_574_080,
            16,
            {"gspn": 50_638_080, "fresh": 25_919_168, "linear": 52_701_320, "window": 49_574_080},
        ),
        (
            "sdxl",
            2_567_463_684,
            409_683_200,
            70,
            {"gspn": 418_723_600, "fresh": 214_568_000, "linear": 435_480_800, "window": 409_683_200},
        ),
    ],
)
def test_counts_of_the_published_networks(architecture, parameters, attention, count, totals):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[architecture])
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert parameters_of(unet) == parameters
    assert len(blocks) == count and sum(parameters_of(block.attn1) for block in blocks) == attention
    made = {mixer: parameters_of(replace_self_attention(unet, mixer)) for mixer in MIXERS}
    assert made == totals


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


PUBLISHED = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
