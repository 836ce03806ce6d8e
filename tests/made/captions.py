"""Captioned pictures, and tokenizers and text encoders of a few kilobytes."""

import json

import torch
from made.images import write_images

WORDS = ("a", "red", "blue", "green", "three", "seven", "left", "of")
CAPTIONS = ("a red three", "a blue seven", "a green three left of a red seven")


def write_captioned(folder, captions=CAPTIONS, how="txt", size=(32, 32)):
    """Pictures 0.png, 1.png, … of noise with those captions, in `.txt` files beside them or in a metadata.jsonl."""
    write_images(folder, len(captions), size)
    if how == "txt":
        for i, caption in enumerate(captions):
            (folder / f"{i}.txt").write_text(f"{caption}\n")
    else:
        rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tokenizer(folder, words=WORDS):
    """A CLIP tokenizer as vocab.json and merges.txt: all bytes, those words, a start and an end."""
    letters = _letters()
    vocabulary, merges = [*letters, *(f"{each}</w>" for each in letters)], []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def write_text_encoder(folder, width=16, seed=0):
    """A CLIPTextModel of one layer in `folder`/text_encoder, and its tokenizer in `folder`/tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    write_tokenizer(folder / "tokenizer")
    size = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder / "text_encoder"


def _letters():
    """CLIP's printable character for each of the 256 bytes, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
