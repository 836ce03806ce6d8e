"""A file of prompts means the same to every command."""

from gspn_dit.commands import SampleOptions
from gspn_dit.data.encode_t2i import read_prompts as prompts_to_draw
from gspn_dit.inference.prompts import read_prompts


def test_every_command_reads_the_same_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# colours\na réd 3\r\n\n  a blue 7  \n".encode())
    wanted = ["a réd 3", "a blue 7"]
    assert read_prompts(str(path)) == prompts_to_draw(str(path), "train", 64) == wanted
    assert SampleOptions(prompts=str(path)).prompt_list == wanted
