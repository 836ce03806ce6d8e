"""Further tensors in a latent store: what a writer declares is what a reader gets, row by row, whatever was cut."""

import json
import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gspn_dit.commands import EncodeOptions as Options
from gspn_dit.data import LatentStore
from gspn_dit.data.encode import encode
from gspn_dit.data.extras import Extra, check_extras, to_json
from gspn_dit.data.latent_store import verify
from gspn_dit.errors import InputError

STATES = "encoder_hidden_states"


class Words:
    """Hidden states of 8 words, 16 numbers each, which say what image they are of; and how many words count."""

    def __init__(self, made_by="words 1", dtype=torch.float16):
        self.declared = {STATES: Extra(dtype, (8, 16), made_by), "length": Extra(torch.int64, ())}

    def __call__(self, indices):
        states = torch.stack([torch.full((8, 16), index / 4) for index in indices])
        return {STATES: states.to(self.declared[STATES].dtype), "length": torch.tensor(indices) % 8}


def encode_digits(out, extras, **changes):
    """The 500 held-out digits, in three shards."""
    options = dict(split="test", shard_size=200, batch_size=50, num_workers=0, device="cpu", horizontal_flip=True)
    encode(Options("digits", "digits", 32, str(out), **options | changes), extras)


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "worded"
    encode_digits(out, Words())
    return out


@pytest.fixture
def copied(worded, tmp_path):
    """A copy to damage."""
    for path in worded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_what_was_declared_is_read_with_each_image_and_its_mirror_image(worded):
    store, plain = LatentStore(worded), Words()
    assert store.extras == plain.declared
    assert store.condition_names == ("class_labels", STATES, "length")
    for index in (0, 199, 200, 499):  # both ends of shards
        expected = plain([index])
        for flip in (False, True):
            sample = store.sample(index, flip)
            assert set(sample) == {"moments", "class_labels", STATES, "length"}
            assert torch.equal(sample["moments"], store.moments(index, flip))
            assert int(sample["class_labels"]) == store.label(index)
            for name in store.extras:
                assert sample[name].dtype == store.extras[name].dtype
                assert torch.equal(sample[name], expected[name][0])


class Samples(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return self.store.sample(index)


def test_workers_and_copies_read_the_same(worded):
    store = LatentStore(worded)
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.sample(321)[STATES], store.sample(321)[STATES])
    batches = list(DataLoader(Samples(store), batch_size=250, num_workers=2))
    assert torch.equal(torch.cat([batch["length"] for batch in batches]), torch.arange(500) % 8)


def test_the_latents_are_those_of_a_store_without(worded, tmp_path):
    encode_digits(tmp_path / "plain", None)
    plain, store = LatentStore(tmp_path / "plain"), LatentStore(worded)
    assert plain.extras == {} and plain.condition_names == ("class_labels",)
    assert set(plain.sample(0)) == {"moments", "class_labels"}
    assert all(torch.equal(plain.moments(i), store.moments(i)) for i in range(0, 500, 50))


def test_an_encoding_that_was_cut_ends_with_the_same_bytes(worded, copied):
    path, before = copied / "shard-00001.safetensors", {p.name: p.read_bytes() for p in worded.iterdir()}
    path.unlink()
    (copied / "manifest.json").unlink()
    encode_digits(copied, Words())
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    assert verify(copied) == 500


@pytest.mark.parametrize("extras", [None, Words("words 2"), Words(dtype=torch.float32)], ids=["none", "other", "type"])
def test_an_encoding_is_not_continued_with_other_extras(copied, extras):
    with pytest.raises(InputError, match=r"^extras=.* was begun with extras=\{'encoder_hidden_states'"):
        encode_digits(copied, extras)
    assert verify(copied) == 500


def test_extras_are_not_added_to_a_store_that_was_begun_without(tmp_path):
    encode_digits(tmp_path / "plain", None)
    with pytest.raises(InputError, match=r"^extras=.* was begun with extras=None"):
        encode_digits(tmp_path / "plain", Words())


def test_verify_finds_a_changed_number_of_an_extra(copied):
    path = copied / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin, end = header[f"extra.{STATES}"]["data_offsets"]
    content[8 + int.from_bytes(content[:8], "little") + (begin + end) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00001\.safetensors has changed since it was written"):
        verify(copied)


def test_a_manifest_that_promises_what_a_shard_does_not_hold_is_refused(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["extras"][STATES]["shape"] = [8, 17]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"shard-00000\.safetensors does not hold encoder_hidden_states .*\(8, 17\)"):
        LatentStore(copied)
    manifest["extras"]["pooled"] = manifest["extras"].pop(STATES)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged .*extra\.pooled"):
        LatentStore(copied)


def test_rows_stay_with_their_images_where_a_file_cannot_be_read(tmp_path):
    root = tmp_path / "images"
    (root / "only").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (32, 32), (50 * number,) * 3).save(root / "only" / f"{number}.png")
    for number in (0, 3):
        (root / "only" / f"{number}.png").write_bytes(b"torn")
    out = tmp_path / "store"
    encode(Options(str(root), "digits", 32, str(out), shard_size=2, num_workers=0, device="cpu"), Words())
    assert [int(sample["length"]) for sample in Samples(LatentStore(out))] == [1, 2, 4]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "it is declared and not given"),
        ({"states": torch.zeros(2, 3), "mask": torch.zeros(2)}, "'mask': it is given and not declared"),
        ({"states": torch.zeros(2, 4)}, r"it is torch.float32 \(2, 4\) for 2 images; wanted torch.float32 \(2, 3\)"),
        ({"states": torch.zeros(1, 3)}, r"it is torch.float32 \(1, 3\) for 2 images"),
        ({"states": torch.zeros(2, 3).half()}, "it is torch.float16"),
        ({"states": torch.full((2, 3), float("nan"))}, "it is not finite in torch.float32"),
    ],
)
def test_what_is_not_as_declared_stops_the_encoding(given, says):
    declared = {"states": Extra(torch.float32, (3,))}
    check_extras(declared, {"states": torch.zeros(2, 3)}, 2)
    with pytest.raises(InputError, match=says):
        check_extras(declared, given, 2)


def test_names_and_types_that_cannot_be_stop_before_any_work(tmp_path):
    for name in ("moments", "class_labels", "timesteps", "hidden states"):
        with pytest.raises(InputError, match=f"^extras='{name}': wanted the name of"):
            to_json({name: Extra(torch.float32, (3,))})
    words = Words(dtype=torch.complex64)
    with pytest.raises(InputError, match=r"torch\.complex64 is not stored; wanted one of float16, bfloat16"):
        encode_digits(tmp_path / "store", words)
    assert not (tmp_path / "store").exists()


def test_only_the_extras_that_are_asked_for_are_read(worded):
    assert set(LatentStore(worded).sample(3, names=("class_labels",))) == {"moments", "class_labels"}
    assert set(LatentStore(worded).sample(3, names=("length",))) == {"moments", "class_labels", "length"}


@pytest.mark.parametrize("name", ["chunk_scale", "self", "class", "moments", "two words"])
def test_a_name_that_no_model_can_take_is_refused(name):
    with pytest.raises(InputError, match=r"^extras="):
        to_json({name: Extra(torch.float16, (1,))})


def test_gradients_are_off_while_extras_are_made(tmp_path):
    words, seen = Words(), []

    class Watched:
        declared = words.declared

        def __call__(self, indices):
            seen.append(torch.is_grad_enabled())
            return words(indices)

    encode_digits(tmp_path / "store", Watched())
    assert seen and not any(seen)


def test_a_manifest_of_a_type_that_is_not_known_here_is_refused(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["extras"]["length"]["dtype"] = "float8_e4m3fn"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"float8_e4m3fn.*manifest\.json"):
        LatentStore(copied)
