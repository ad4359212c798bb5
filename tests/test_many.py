"""Thousands of pictures: several processes draw those of one, a kill loses nothing, and what does not belong together is refused."""
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import launch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from sd_deepdive.further.many import Wish, draw_many, fingerprint, is_drawn, number_wishes, picture_file, read_wishes, write_picture
from sd_deepdive.images import max_difference
from sd_deepdive.parts import load_parts as load_library_parts
from sd_deepdive.scratch.parts import load_parts

N = 9
COMMAND = ['-m', 'sd_deepdive.further.many', '--num-inference-steps', '3', '--batch-size']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The prompts, and the folder of a run of one process that nothing disturbed."
    root = tmp_path_factory.mktemp('run')
    things = ['red apple', 'rocket', 'pizza', 'umbrella', 'octopus', 'guitar', 'café', 'hamburger', 'sun']
    (root/'captions.txt').write_text('\n'.join(things) + '\n', encoding='utf-8')
    done = start([sys.executable, *COMMAND, '4'], root, root/'one')
    said = done.communicate()[0]
    assert done.returncode == 0 and 'process 1 of 1: 9 drawn' in said, said[-3000:]
    return root


def start(command, root, folder, *more):
    "Begin a run."
    return subprocess.Popen([*command, '--prompts', root/'captions.txt', '--folder', folder, '--seed', '7', *more], cwd=root, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def assert_same(folder, root):
    "The same files with the same words in them, pixels a level of 255 apart at most; nothing else."
    for i in range(N):
        mine, theirs = (Image.open(picture_file(f, i)) for f in (folder, root/'one'))
        assert mine.text == theirs.text and max_difference(mine, theirs) <= 1
    assert {f.name for f in folder.rglob('*') if f.is_file()} == {f.name for f in (root/'one').rglob('*') if f.is_file()}
    assert (folder/'run.json').read_text() == (root/'one'/'run.json').read_text()


def test_pictures(run):
    "A picture for each line, all different, each with its prompt, seed and settings inside."
    texts = [Image.open(picture_file(run/'one', i)).text for i in range(N)]
    assert [t['seed'] for t in texts] == [str(7 + i) for i in range(N)] and texts[6]['prompt'] == 'café'
    assert texts[0]['model'] == 'embedded' and texts[0]['num_inference_steps'] == '3' and texts[0]['guidance_scale'] == '3.0'
    assert max_difference(Image.open(picture_file(run/'one', 0)), Image.open(picture_file(run/'one', 1))) > 50


def test_two_processes(run, tmp_path):
    "Two processes started by `accelerate launch`, and another batch: the pictures of one."
    done = start([*launch(2), *COMMAND, '3'], run, tmp_path/'two')
    said = done.communicate()[0]
    assert done.returncode == 0 and 'process 1 of 2: 5 drawn' in said and 'process 2 of 2: 4 drawn' in said, said[-3000:]
    assert_same(tmp_path/'two', run)


def test_killed(run, tmp_path):
    "Killed with -9 after some pictures: what is there is whole and stays, and the same command ends with the pictures of an unbroken run."
    folder = tmp_path/'killed'
    process = start([sys.executable, *COMMAND, '1'], run, folder)
    while len([*folder.rglob('*.png')]) < 3 and process.poll() is None: time.sleep(.002)
    time.sleep(random.Random(0).random()*.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    there = {f: f.stat().st_mtime_ns for f in folder.rglob('*.png')}
    assert 3 <= len(there) < N
    for file in there: assert is_drawn(file, Image.open(file).text)
    broken = sorted(there)[1]
    broken.write_bytes(broken.read_bytes()[:3000])
    (folder/'000'/f'.{len(there):06d}.png.part').write_bytes(b'half')       # as a kill in the middle of a file leaves it
    again = start([sys.executable, *COMMAND, '2'], run, folder)
    said = again.communicate()[0]
    assert again.returncode == 0 and f'{N - len(there) + 1} drawn' in said, said[-3000:]
    assert {f: f.stat().st_mtime_ns for f in there if f != broken} == {f: t for f, t in there.items() if f != broken}, 'drawn again'
    assert_same(folder, run)


@pytest.fixture(scope='module')
def parts(): return load_parts(device='cpu')


def test_interrupted(parts, tmp_path, monkeypatch):
    "Ctrl-C while a picture is written leaves nothing of it."
    save = Image.Image.save
    def interrupted(image, part, *args, **kw):
        save(image, part, *args, **kw)
        Path(part).write_bytes(Path(part).read_bytes()[:500])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', interrupted)
        with pytest.raises(KeyboardInterrupt): draw_many(parts, number_wishes('sun'), tmp_path/'x', num_inference_steps=2)
    assert [f.name for f in (tmp_path/'x').rglob('*') if f.is_file()] == ['run.json']
    assert len(draw_many(parts, number_wishes('sun'), tmp_path/'x', num_inference_steps=2)) == 1


@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:40], lambda b: b[:len(b)//2], lambda b: b[:-20], lambda b: b[:900] + b'?' + b[901:]],
                         ids=['empty', 'header', 'half', 'end', 'one byte'])
def test_damaged(tmp_path, damage):
    "A file that is not whole does not count."
    file, about = tmp_path/'x'/'000000.png', dict(prompt='crème brûlée 🍮', seed=2**64 - 1, negative_prompt='')
    write_picture(file, Image.effect_noise((64, 64), 50), about)
    assert is_drawn(file, about)
    file.write_bytes(damage(file.read_bytes()))
    assert not is_drawn(file, about)


def test_other_runs(run, parts, tmp_path):
    "Other settings, another list, another model, a folder of something else: refused, and nothing is touched."
    wishes, folder = read_wishes(run/'captions.txt', 7), tmp_path/'one'
    shutil.copytree(run/'one', folder)
    before = {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}
    good = dict(num_inference_steps=3, model='embedded')
    refused = [(wishes, good | dict(num_inference_steps=4), 'num_inference_steps=3, wanted is 4'), (wishes, good | dict(guidance_scale=5), 'guidance_scale=3.0, wanted is 5.0'),
               (wishes, good | dict(width=64), 'width=128, wanted is 64'), (wishes, good | dict(model='mine'), "model='embedded', wanted is 'mine'"),
               (wishes[1:], good, "prompt='red apple', wanted is 'rocket'"), (read_wishes(run/'captions.txt'), good, "seed='7', wanted is '0'")]
    for wanted, options, message in refused:
        with pytest.raises(ValueError, match=message): draw_many(parts, wanted, folder, **options)
    other = load_parts(device='cpu')
    other.vae.decoder.conv_out.bias[0] += .1
    with pytest.raises(ValueError, match='fingerprint='): draw_many(other, wishes, folder, **good)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('')
    for place, message in ((tmp_path/'mine', 'no run.json'), (tmp_path/'mine'/'thesis.txt', 'cannot be used'), (Path('/proc/x'), 'cannot be used')):
        with pytest.raises(ValueError, match=message): draw_many(parts, wishes, place, **good)
    (folder/'run.json').write_text('{"model')
    with pytest.raises(ValueError, match='run.json is damaged'): draw_many(parts, wishes, folder, **good)
    (folder/'run.json').write_bytes(before[folder/'run.json'])
    assert {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()} == before
    assert draw_many(parts, wishes, folder, **good) == []
    (tmp_path/'new').mkdir()
    (tmp_path/'new'/'.DS_Store').write_text('')      # as a Mac leaves it in a folder that was looked at
    assert len(draw_many(parts, number_wishes('sun'), tmp_path/'new', num_inference_steps=2)) == 1
    longer = draw_many(parts, [*wishes, Wish('crown', 3)], folder, **good)
    assert [f.name for f in longer] == ['000009.png']


def test_fingerprint():
    "A pipeline has the same in every process: the order of the sets that the library keeps in a scheduler's config is chance, and does not count; betas do."
    parts = load_library_parts(device='cpu')
    def of(**more):
        parts.scheduler._internal_dict = FrozenDict(DDIMScheduler().config | more)
        return fingerprint(parts)
    assert of(_use_default_values=['beta_end', 'steps_offset']) == of(_use_default_values=['steps_offset', 'beta_end']) != of(beta_end=.013)


WRONG = [('a.txt', 'sun\n\nmoon\n', 'a.txt, line 2: prompt is empty'), ('a.txt', '', 'line 1: prompt is empty'), ('a.txt', 'a\tb', 'control character'),
         ('a.csv', 'prompt,seed\nsun,-1\n', 'line 2: seed'), ('a.csv', 'prompt,seed\nsun,1.5\n', 'line 2: seed'), ('a.csv', 'prompt,prompt\na,b\n', 'line 1: two columns'), ('a.csv', 'prompt;seed\na;1\n', 'line 1: .prompt;seed. is not known'), ('a.csv', 'prompt\n', 'holds no prompts'),
         ('a.csv', 'prompt,text\nsun,x\n', "'text' is not known"), ('a.csv', 'prompt\nsun,3\n', 'line 2: there are more values'), ('a.csv', 'seed\n3\n', 'line 2: prompt is empty'),
         ('a.jsonl', '{"prompt": "sun"}\n["moon"]', 'line 2 is no JSON object'), ('a.jsonl', '{"prompt": 3}', 'prompt=3 is not text'),
         ('a.jsonl', '{"prompt": "sun", "seed": true}', 'seed=True is not a whole number'), ('a.json', '[]', 'ends in none of .txt, .csv, .jsonl')]


@pytest.mark.parametrize('name, text, message', WRONG)
def test_wrong_files(tmp_path, name, text, message):
    "Each is named with its line."
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=message): read_wishes(tmp_path/name)


def test_files(tmp_path):
    "Three kinds, the same wishes; a file that is not there, or not text, is named."
    rows = [dict(prompt='a "red", old apple', seed=3, negative_prompt='blue'), dict(prompt='café'), dict(prompt='sun', seed=0)]
    (tmp_path/'a.csv').write_text('\ufeffprompt,seed,negative_prompt\r\n"a ""red"", old apple",3,blue\r\ncafé,,\r\nsun,0,\r\n', encoding='utf-8')
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
    wanted = [Wish('a "red", old apple', 3, 'blue'), Wish('café', 101), Wish('sun', 0)]
    assert read_wishes(tmp_path/'a.csv', 100) == read_wishes(tmp_path/'a.jsonl', 100) == wanted
    with pytest.raises(ValueError, match='b.txt cannot be read: No such file'): read_wishes(tmp_path/'b.txt')
    (tmp_path/'c.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='c.txt is not text in UTF-8'): read_wishes(tmp_path/'c.txt')


def test_wrong_arguments(parts, tmp_path):
    "Named before anything is drawn."
    for wrong, kind, message in ((dict(wishes=['sun']), TypeError, 'number_wishes'), (dict(batch_size=0), ValueError, 'batch_size=0'),
                                 (dict(num_inference_steps=0), ValueError, 'num_inference_steps=0'), (dict(guidance_scale='3'), TypeError, "guidance_scale='3'")):
        with pytest.raises(kind, match=message): draw_many(parts, **dict(wishes=number_wishes('sun'), folder=tmp_path/'x') | wrong)
    with pytest.raises(ValueError, match='width=100'): draw_many(parts, number_wishes('sun'), tmp_path/'y', width=100, num_inference_steps=2)
