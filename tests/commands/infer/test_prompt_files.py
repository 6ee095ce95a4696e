"""Prompt files of every kind, as editors and spreadsheets write them; a broken row is named by its line."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffengine_sdxl import limits
from diffengine_sdxl.commands.infer.prompt_files import Row, read_prompts
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.request import Request


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def broken(rows: list[Row]) -> dict[int, str]:
    return {row.number: row.error for row in rows if row.error is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images, and an image outside of it."""
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    for name in ('in/a.png', 'in/b.png', 'in/sub/c.png', 'out.png', 'in/x.safetensors'):
        Image.new('RGB', (4, 4)).save(tmp_path / name, format='PNG')
    return tmp_path / 'in'


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    """With a BOM, CRLF, and a line separator inside a prompt, at which no editor breaks the line."""
    path = write(tmp_path / 'p.txt', '\ufeffa castle\r\n\r\n# a note\r\n  a "b", c\u2028d\x0b \r\n'.encode())
    assert read_prompts(path) == [Row(1, Request(prompt='a castle')), Row(4, Request(prompt='a "b", c\u2028d'))]


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_tables_and_json_lines_are_equal(folder: Path, end: str, mark: str) -> None:
    """With every key of a Request."""
    wanted: list[dict[str, Any]] = [
        {'prompt': 'a castle, "old"', 'negative_prompt': 'bad\nworse', 'seed': 7, 'guidance_scale': 7.5,
         'original_size': [1024, 768], 'crops_coords_top_left': [0, 8], 'timesteps': [999, 500], 'height': 64,
         'scales': {'style': 0.5, 'other': -1}, 'active_ranges': {'style': [0, 0.5]}, 'name': 'a',
         'prompt_syntax': 'compel',
         'image': 'a.png', 'strength': 0.4, 'conditions': {'depth': 'sub/c.png', 'face': ['a.png', 'sub/../b.png']},
         'refiner': {'strength': 0.2, 'prompt': '12', 'original_size': [64, 64]}},
        {'prompt': '42', 'sigmas': [1.5, 0.0], 'latents': 'x.safetensors', 'target_size': 512,
         'conditions': {'depth': 'http://x.org/a.png', 'face': {'image': 'a.png', 'mask': 'b.png'}}},
    ]
    cells = ('prompt,negative_prompt,seed,guidance_scale,original_size,crops_coords_top_left,timesteps,height,'
             'scales.style,scales.other,active_ranges.style,name,prompt_syntax,image,strength,conditions.depth,conditions.face,'
             'refiner.strength,refiner.prompt,refiner.original_size,sigmas,latents,target_size\n'
             '"a castle, ""old""","bad\nworse",7,7.5,"1024,768","[0, 8]","999,500",64,0.5,-1,"0,0.5",a,compel,a.png,'
             '0.4,sub/c.png,a.png | sub/../b.png,0.2,12,"64,64",,,\n\n'
             '42,,,,,,,,,,,,,,, http://x.org/a.png,"{""image"": ""a.png"", ""mask"": ""b.png""}",,,,'
             '"1.5,0.0",x.safetensors,512\n')
    table = read_prompts(write(folder / 'p.csv', mark + cells.replace('\n', end)))
    lines = read_prompts(write(folder / 'p.jsonl', mark + (end + end).join(json.dumps(w) for w in wanted)))
    assert [row.number for row in table] == [2, 5] and [row.number for row in lines] == [1, 3]
    assert not broken([*table, *lines])
    assert [row.request for row in table] == [row.request for row in lines]
    first, second = (row.request for row in table)
    assert first is not None and second is not None
    assert first.negative_prompt == 'bad\nworse' and first.original_size == (1024, 768) and first.seed == 7
    assert first.image == str(folder / 'a.png') and second.latents == str(folder / 'x.safetensors')
    assert first.conditions == {'depth': str(folder / 'sub/c.png'),
                                'face': [str(folder / 'a.png'), str(folder / 'b.png')]}
    assert second.conditions == {'depth': 'http://x.org/a.png', 'face': {
        'image': str(folder / 'a.png'), 'mask': str(folder / 'b.png')}}
    assert second.sigmas == (1.5, 0.0) and second.target_size == (512, 512) and second.prompt == '42'


JSONL = {
    2: ('{"prompt": "a"', 'not JSON'),
    3: ('["a"]', 'a list where an object'),
    4: ('{"prmpt": "a"}', "Unknown setting 'prmpt'. Did you mean 'prompt'"),
    5: ('{"prompt": 3}', 'prompt=3 must be a text'),
    6: ('{"seed": 1, "seed": 2}', "the key 'seed' is repeated"),
    7: ('{"guidance_scale": NaN}', 'guidance_scale=nan must be a number'),
    8: ('[' * 100000, ''),
    9: ('{"seed": ' + '1' * 5000 + '}', ''),
    10: ('{"image": "../out.png"}', "image='../out.png' leads out of the file's folder"),
    11: ('{"image": "OUT"}', 'leads out'),
    12: ('{"image": "none.png"}', 'there is no file'),
    13: ('{"image": "a.png", "mask_image": "sub"}', "mask_image='sub': there is no file"),
    14: ('{"conditions": {"face": ["a.png", "/etc/passwd"]}}', "conditions.face.1='/etc/passwd' leads out"),
    15: ('{"conditions": {"face": {"mask": "sub/../../out.png"}}}', 'conditions.face.mask='),
    16: ('{"latents": "file:///etc/passwd"}', 'only http and https'),
    17: ('{"image": 3}', 'image=3 must be a path'),
    18: ('{"mask_image": "a.png"}', 'needs an `image` to repaint'),
    19: ('{"refiner": {"seed": 1}}', "Unknown refiner setting 'seed'"),
    20: ('{"image": "zip://a.png::b.zip"}', 'only http and https'),
    21: ('{"conditions": "a.png"}', 'conditions='),
    22: ('{"image": [["a.png"]]}', 'image.0='),
}


def test_broken_lines_are_named_and_the_others_read(folder: Path) -> None:
    outside = str(folder.parent / 'out.png')
    lines = ['{"prompt": "first"}', *(text.replace('OUT', outside) for text, _ in JSONL.values()), '{"prompt": "last"}']
    rows = read_prompts(write(folder / 'p.jsonl', '\n'.join(lines)))
    errors = broken(rows)
    assert errors.keys() == JSONL.keys() and len(rows) == len(JSONL) + 2
    for number, (_, words) in JSONL.items():
        assert errors[number].startswith(f"line {number} of '{folder / 'p.jsonl'}': ") and words in errors[number]
    assert rows[0].request == Request(prompt='first') and rows[-1].request == Request(prompt='last')
    assert all(row.request is None for row in rows if row.error)


def test_broken_rows_of_a_table(folder: Path) -> None:
    """Line numbers are an editor's, also after cells of several lines and after an unclosed quote."""
    rows = read_prompts(write(folder / 'p.csv', 'prompt,seed,image\n"two\nlines",1,\na castle, old,2,\n"ab"c,3,\n'
                              'good,x,\nfine,7,\n"never closed,8,\ngood,9,\ngood,10,../out.png\n,11,a.png\nlast,,'))
    errors = broken(rows)
    assert {n: next(w for w in ('4 cells under 3 columns', 'expected after', "seed='x' must be a whole number",
                                'unexpected end of data', 'leads out') if w in e) for n, e in errors.items()} == {
        4: '4 cells under 3 columns', 5: 'expected after', 6: "seed='x' must be a whole number",
        8: 'unexpected end of data', 10: 'leads out'}
    assert [(r.number, r.request.prompt, r.request.seed) for r in rows if r.request] == [
        (2, 'two\nlines', 1), (7, 'fine', 7), (9, 'good', 9), (11, '', 11), (12, 'last', 0)]


@pytest.mark.parametrize(('name', 'text', 'words'), [
    ('p.yaml', 'a', '.jsonl or .csv'), ('p', 'a', '.jsonl or .csv'), ('p.txt', '', 'holds no prompts'),
    ('p.txt', '# only\n\n', 'holds no prompts'), ('p.jsonl', '\n', 'holds no prompts'),
    ('p.csv', 'prompt,seed\n', 'holds no prompts'), ('p.txt', b'a\nb\xff\n', 'not in UTF-8 .line 2'),
    ('p.txt', 'a\n'.encode('utf-16'), 'not in UTF-8 .line 1'),
    ('p.csv', 'prompt,sed\na,1\n', "column 'sed' .*Did you mean 'seed'"),
    ('p.csv', 'prompt;seed\na;1\n', "separated by ';'"),
    ('p.csv', 'a castle\n', "Unknown column 'a castle'"), ('p.csv', 'prompt,seed.x\na,1\n', "Unknown column 'seed.x'"),
    ('p.csv', 'prompt,scales.\na,1\n', 'lacks a name'), ('p.csv', 'prompt,\na,1\n', "Unknown column ''"),
    ('p.csv', 'prompt,refiner.strenght\na,1\n', "Did you mean 'strength'"),
    ('p.csv', 'prompt,prompt\na,b\n', "Column 'prompt' .*keep one"), ('p.csv', '"prompt\na\n', 'header'),
    ('p.csv', 'scales,scales.a\n,1\n', "Column 'scales' .*keep one"),
])
def test_invalid_files_are_refused(tmp_path: Path, name: str, text: str | bytes,
                                                      words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(write(tmp_path / name, text))
    assert str(tmp_path / name) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / 'folder.txt').mkdir()
    for name in ('none.txt', 'folder.txt'):
        with pytest.raises(UserError, match=f"no prompt file '.*{name}'"):
            read_prompts(tmp_path / name)


def test_a_row_is_checked_together_with_the_defaults(folder: Path) -> None:
    path = write(folder / 'p.jsonl', '{"mask_image": "a.png"}\n{"timesteps": [9], "sigmas": [1.0, 0.0]}')
    assert broken(read_prompts(path)).keys() == {1, 2}
    assert broken(read_prompts(path, {'image': 'anything.png'})).keys() == {2}


def test_a_row_replaces_the_steps_of_the_defaults(folder: Path) -> None:
    """Number, timesteps and sigmas exclude each other; the row's wins."""
    path = write(folder / 'p.jsonl', '{"timesteps": [9]}')
    asked = {'num_inference_steps': 4, 'sigmas': [1.0, 0.0]}
    row, = read_prompts(path, asked)
    request = row.request
    assert request is not None
    assert (request.timesteps, request.sigmas, request.num_inference_steps) == ((9,), None, None)


def test_links_in_the_folder_are_followed_and_the_folder_may_be_one(folder: Path) -> None:
    """A folder that is a link itself, a link in it to a disk elsewhere, a relative path to the file."""
    (folder / 'link.png').symlink_to(folder.parent / 'out.png')
    (folder.parent / 'other').symlink_to(folder)
    path = write(folder.parent / 'other' / 'p.jsonl', '{"image": "link.png"}')
    assert read_prompts(path)[0].request == Request(image=str(folder.parent / 'other' / 'link.png'))


def test_a_relative_name_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / 'p.csv', 'image\na.png\n')
    monkeypatch.chdir(folder)
    assert read_prompts('p.csv')[0].request == Request(image=str(folder / 'a.png'))


def test_what_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, a device, and files of more bytes, rows or columns than `limits` has."""
    os.mkfifo(tmp_path / 'pipe.txt')
    (tmp_path / 'zero.txt').symlink_to('/dev/zero')
    for name in ('pipe', 'zero'):
        with pytest.raises(UserError, match='no prompt file.*a pipe or a device is not read'):
            read_prompts(tmp_path / f'{name}.txt')
    columns = ','.join(f'scales.a{i}' for i in range(257))
    with pytest.raises(UserError, match='has 257 columns; at most 256'):
        read_prompts(write(tmp_path / 'wide.csv', f'{columns}\n'))
    monkeypatch.setattr(limits, 'CURRENT', limits.Limits(prompt_file_rows=2, prompt_file_bytes=9))
    assert len(read_prompts(write(tmp_path / 'rows.txt', 'a\n\nb\n'))) == 2
    with pytest.raises(UserError, match='more than 2 rows.*limits.prompt_file_rows'):
        read_prompts(write(tmp_path / 'rows.txt', 'a\nb\n\nc'))
    with pytest.raises(UserError, match='more than 9 bytes.*limits.prompt_file_bytes'):
        read_prompts(write(tmp_path / 'bytes.txt', 'a' * 10))


@pytest.mark.parametrize(('row', 'words'), [
    ({'num_images_per_prompt': 10**8}, "'num_images_per_prompt' asks for 100000000; a row may ask for at most 10000"),
    ({'num_inference_steps': 10**9}, "'num_inference_steps' asks for"), ({'pag_scale': 1e5}, "'pag_scale' asks for"),
    ({'height': 80_000, 'width': 80_000}, '80000 x 80000 pixels'), ({'prompt': 'a' * 20_001}, '20001 characters'),
    ({'timesteps': list(range(10_001))[::-1]}, 'has 10001 entries')])
def test_a_row_asks_for_no_more_than_a_png_may(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    rows = read_prompts(write(tmp_path / 'p.jsonl', json.dumps({'prompt': 'a', **row}) + '\n{"prompt": "b"}'))
    assert words in str(rows[0].error) and rows[1].request == Request(prompt='b')


def test_many_broken_rows_take_no_longer_than_others(tmp_path: Path) -> None:
    """Time grows with the rows, not with their square: a minute for these."""
    begin = time.process_time()
    rows = read_prompts(write(tmp_path / 'p.csv', 'prompt\n' + '"a"b\n' * 20_000))
    repeated = ', '.join(f'"a{i}": 1' for i in range(20_000)) + ', "z": 1, "z": 2'
    rows += read_prompts(write(tmp_path / 'p.jsonl', f'{{{repeated}}}'))
    assert len(broken(rows)) == 20_001 and "'z' is repeated" in str(rows[-1].error)
    assert time.process_time() - begin < 5
