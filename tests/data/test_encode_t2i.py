"""Stores of a teacher's latents and text embeddings: of pictures, and of what it draws itself."""

import json

import numpy as np
import pytest
import torch
from made.captions import CAPTIONS, write_captioned
from made.stable_diffusion import tiny_sd, tiny_sd_pipeline, tiny_sdxl_pipeline
from PIL import Image

from gspn_dit.autoencoder.vae import encode_moments, sample_posterior
from gspn_dit.commands import EncodeTextToImageOptions
from gspn_dit.data import LatentStore, encode_t2i
from gspn_dit.data.captioned_source import CaptionedSource, size_condition
from gspn_dit.data.captions import open_captioned
from gspn_dit.data.encode_t2i import main
from gspn_dit.data.image_folder import centre_crop, crop_corner
from gspn_dit.data.latent_store import verify
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.text.teacher import embed, load_teacher

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
MAKE = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}
PROMPTS = [*CAPTIONS, "a blue three", "a red seven"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with both pipelines, pictures with captions, and a file of prompts."""
    folder = tmp_path_factory.mktemp("made")
    for kind, make in MAKE.items():
        make(folder / kind)
    write_captioned(folder / "pictures", size=(40, 60))
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    return folder


def encode(made, out, kind="sd", **options):
    given = {"image_size": 32, "num_workers": 0, "device": "cpu", "num_inference_steps": 2, **options}
    main(EncodeTextToImageOptions(base=str(made / kind), out=str(out), **given))
    return LatentStore(out)


@pytest.mark.parametrize("kind", MAKE)
def test_a_store_of_pictures_holds_what_the_vae_and_the_text_encoders_make(made, tmp_path, kind):
    store = encode(made, tmp_path / "store", kind, data=str(made / "pictures"), batch_size=2)
    pipe, images = load_teacher(made / kind), open_captioned(made / "pictures", 32)
    assert len(store) == 3 and store.class_names == ["image"] and verify(tmp_path / "store") == 3
    for i, caption in enumerate(CAPTIONS):
        sample = store.sample(i)
        torch.testing.assert_close(
            sample["moments"], encode_moments(pipe.vae, images[i][0][None])[0], atol=2e-3, rtol=2e-3
        )
        for name, tensor in embed(pipe, [caption]).items():
            torch.testing.assert_close(sample[name].float(), tensor[0], atol=2e-3, rtol=2e-3)
    if kind == "sdxl":
        assert store.sample(2)["time_ids"].tolist() == [40, 60, 0, 8, 32, 32]
    else:
        assert store.condition_names == ("class_labels", "encoder_hidden_states")


@pytest.mark.parametrize("kind", MAKE)
def test_drawn_latents_are_those_of_the_pipeline_by_prompt_and_seed(made, tmp_path, kind):
    options = {"prompts": str(made / "prompts.txt"), "guidance_scale": 3.0, "seed": 5}
    store = encode(made, tmp_path / "store", kind, batch_size=3, **options)
    pipe = load_teacher(made / kind)
    assert len(store) == 5 and not store.manifest["skipped"]
    drawn = pipe(
        PROMPTS[3:4], num_inference_steps=2, guidance_scale=3.0, height=32, width=32, output_type="latent",
        generator=[image_generator(5, 3)],
    ).images  # fmt: skip
    kept = sample_posterior(store, store.moments(3), torch.randn(4, 16, 16))  # whatever the noise
    torch.testing.assert_close(kept, drawn[0], atol=2e-3 * float(drawn.abs().max()), rtol=2e-3)
    torch.testing.assert_close(
        store.sample(4)["encoder_hidden_states"].float(),
        embed(pipe, PROMPTS[4:])["encoder_hidden_states"][0],
        atol=2e-3,
        rtol=2e-3,
    )
    if kind == "sdxl":
        assert store.sample(0)["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]


def test_a_store_that_was_interrupted_goes_on_to_the_same_latents(made, tmp_path, monkeypatch):
    options = {"prompts": str(made / "prompts.txt"), "shard_size": 2, "batch_size": 2}
    whole = encode(made, tmp_path / "whole", **options)
    made_before, draw_shard = [], encode_t2i.draw_shard

    def interrupted(*arguments):
        if len(made_before) == 2:
            raise KeyboardInterrupt
        made_before.append(arguments)
        return draw_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encode_t2i, "draw_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode(made, tmp_path / "cut", **options)
    cut = encode(made, tmp_path / "cut", **options)
    hashes = [[shard["sha256"] for shard in store.manifest["shards"]] for store in (cut, whole)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [({"seed": 1}, "seed"), ({"guidance_scale": 2.0}, "guidance_scale"), ({"image_size": 16}, "image_size")],
)
def test_a_store_is_not_continued_with_something_else(made, tmp_path, change, word):
    options = {"prompts": str(made / "prompts.txt")}
    encode(made, tmp_path / "store", **options)
    with pytest.raises(InputError, match=f"{word}="):
        encode(made, tmp_path / "store", **options, **change)


def test_a_store_is_not_continued_with_another_unet_or_other_prompts(made, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\n")
    encode(made, tmp_path / "store", prompts=str(prompts))
    prompts.write_text("a blue three\n")
    with pytest.raises(InputError, match="prompts_sha256"):
        encode(made, tmp_path / "store", prompts=str(prompts))
    prompts.write_text("a red three\n")
    tiny_sd_pipeline(tmp_path / "sd", unet=tiny_sd(seed=9))
    with pytest.raises(InputError, match="drawn_by"):
        encode(tmp_path, tmp_path / "store", prompts=str(prompts))


def test_captions_that_are_cut_are_said(made, tmp_path):
    """Of pictures and of prompts; 77 tokens are read, one for each letter here."""
    long = ["a red seven " * 9, "a blue three"]
    (tmp_path / "prompts.txt").write_text("\n".join(long))
    for given in ({"data": str(write_captioned(tmp_path / "pictures", long))}, {"prompts": f"{tmp_path}/prompts.txt"}):
        with pytest.warns(UserWarning, match="^1 of 2 captions looked at are cut to 77 tokens, .*; shorten them"):
            encode(made, tmp_path / next(iter(given)), **given)


@pytest.mark.parametrize("kind", MAKE)
def test_embeddings_are_computed_in_float32_and_stored_in_float16_whatever_the_precision(made, tmp_path, kind):
    options = {"data": str(made / "pictures")}
    precise, rough = (encode(made, tmp_path / name, kind, mixed_precision=name, **options) for name in ("no", "bf16"))
    told = [name for name in precise.extras if name != "time_ids"]
    assert {precise.extras[name].dtype for name in told} == {torch.float16}
    assert all(torch.equal(rough.sample(i)[name], precise.sample(i)[name]) for i in range(3) for name in told)
    assert not torch.equal(rough.moments(0), precise.moments(0))


def test_captions_are_drawn_as_prompts(made, tmp_path):
    drawn = encode(made, tmp_path / "captions", prompts=str(made / "pictures"))
    (tmp_path / "lines.txt").write_text("\n".join(CAPTIONS))
    as_lines = encode(made, tmp_path / "lines", prompts=str(tmp_path / "lines.txt"))
    for name in ("moments", "encoder_hidden_states"):
        assert torch.equal(drawn.sample(2)[name], as_lines.sample(2)[name])


def test_what_cannot_be_encoded_is_answered_in_a_line(made, tmp_path):
    with pytest.raises(InputError, match="either data, pictures to encode, or prompts to draw"):
        EncodeTextToImageOptions(base="x", out="y")
    with pytest.raises(InputError, match=r"image_size=33: this pipeline wants a multiple of 2"):
        encode(made, tmp_path / "store", data=str(made / "pictures"), image_size=33)
    with pytest.raises(InputError, match=r"prompts=.*cannot be read"):
        encode(made, tmp_path / "store", prompts=str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="has no prompts"):
        encode(made, tmp_path / "store", prompts=str(tmp_path / "empty.txt"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (64, 129), (200, 67), (32, 32)])
def test_the_corner_of_the_crop_is_where_it_begins(size):
    """Of a picture whose every pixel says where it is, as far as resampling keeps it."""
    width, height = size
    across, down = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    places = torch.stack([across / width, down / height, torch.zeros(height, width)], -1) * 255
    square = torch.from_numpy(np.array(centre_crop(Image.fromarray(places.byte().numpy()), 32)))
    top, left = crop_corner(width, height, 32)
    scale = 32 / min(size)
    assert (square[16, 16, 0] / 255 * width * scale - (left + 16)).abs() < 1.5
    assert (square[16, 16, 1] / 255 * height * scale - (top + 16)).abs() < 1.5


def test_captions_and_sizes_come_with_the_picture_that_could_be_read(tmp_path):
    write_captioned(tmp_path / "pictures", size=(40, 60))
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    source = CaptionedSource(open_captioned(tmp_path / "pictures", 32))
    with pytest.warns(UserWarning, match="unreadable"):
        sample = source.sample(0)
    assert sample["caption"] == CAPTIONS[1] and sample["image"].shape == (3, 32, 32)
    assert torch.equal(sample["time_ids"], size_condition(source.images, 1))
    assert torch.equal(source.sample(1, names=("caption", "time_ids"))["time_ids"], sample["time_ids"])
    assert "time_ids" not in source.sample(1, names=("caption",))


def test_the_store_says_how_to_make_it(made, tmp_path):
    encode(made, tmp_path / "store", prompts=str(made / "prompts.txt"), shard_size=2)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["scheduler"] == "DDIMScheduler" and manifest["num_inference_steps"] == 2
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard-00001.*missing"):
        LatentStore(tmp_path / "store")
    assert len(encode(made, tmp_path / "store", prompts=str(made / "prompts.txt"), shard_size=2)) == 5
