"""Broken and hostile files, Ctrl-C, a full disk, random input: each ends in plain words of ours, runs nothing, loses nothing."""
import importlib
import inspect
import io
import json
import logging
import math
import pickle
import random
import re
import shutil
import signal
import struct
import traceback
import warnings
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from conftest import CFG, ROOT, Evil, command, python, untrained
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_deepdive import explore
from sd_deepdive.drawings import drawings, read_drawings
from sd_deepdive.further.cells import Cells, cells_of, patient, write_cells
from sd_deepdive.further.inside import Look, unet_by_hand
from sd_deepdive.further.many import draw_file, draw_many, number_wishes, read_wishes, write_picture
from sd_deepdive.further.own_pictures import fine_tune, own_pictures, problems, read_captions, save_model
from sd_deepdive.further.speed import Machine, Operation
from sd_deepdive.further.steering import KeepText, inpaint, parse_weights
from sd_deepdive.images import fit_picture, load_picture
from sd_deepdive.img2img import fetch_picture, image_to_image
from sd_deepdive.models import load_pipeline, text_to_image
from sd_deepdive.parts import take_apart
from sd_deepdive.places import PARTS, embedded_folder
from sd_deepdive.sampling import Step, denoise, make_samples
from sd_deepdive.schedulers import with_scheduler
from sd_deepdive.scratch.autoencoder import Attention, Autoencoder
from sd_deepdive.scratch.checkpoints import read_weights, unfilled
from sd_deepdive.scratch.configs import FIELDS
from sd_deepdive.scratch.parts import load_parts as load_by_hand
from sd_deepdive.scratch.samplers import Euler
from sd_deepdive.scratch.text_encoder import TextEncoder
from sd_deepdive.scratch.tokenizer import Tokenizer
from sd_deepdive.scratch.unet import UNet
from sd_deepdive.text import cut_off
from sd_deepdive.training.adapt import add_lora, load_lora
from sd_deepdive.training.clip import load_clip, shrunk
from sd_deepdive.training.data import stack
from sd_deepdive.training.diffusion import prepare, prepared_once
from sd_deepdive.training.loop import Trainer, accelerator, read_state, save_whole
from sd_deepdive.training.quality import load_judge
from sd_deepdive.words import add_words, load_words

PNG = io.BytesIO()
Image.new('RGB', (8, 8), 'red').save(PNG, 'png')
PNG = PNG.getvalue()


def plain(call, *words, kind=ValueError):
    "What a call says that ends in an error of ours, of this kind and with these words."
    with pytest.raises(kind) as e: call()
    said = str(e.value)
    assert Path(e.traceback[-1].path).is_relative_to(CFG.lib_path), f'{said}: from {e.traceback[-1]}'
    assert '\n' not in said and all(word in said for word in words), said
    return said


@pytest.fixture(scope='module')
def pipe(): return untrained()


@pytest.fixture(scope='module')
def parts(pipe): return take_apart(pipe)


# Files --------------------------------------------------------------------------------------------------------------

def layers():
    "A network with changes beside its one layer."
    network = torch.nn.Sequential()
    network.to_q = torch.nn.Linear(4, 4)
    add_lora(network)
    return network


READERS = {   # what reads a file, and the name of that file
    'words': (load_words, 'words.safetensors'), 'words, pickled': (load_words, 'words.bin'), 'drawings': (read_drawings, 'pictures.zip'),
    'network': (lambda f: read_weights(f.parent), 'model.safetensors'), 'pair': (lambda f: load_clip(tower=f), 'tower.safetensors'), 'judge': (load_judge, 'judge.safetensors'),
    'changes': (lambda f: load_lora(layers(), f), 'lora.safetensors'), 'checkpoint': (lambda f: Trainer(torch.nn.Linear(3, 1), 5, .1, f.parent).load(), 'checkpoint.pt'),
    'prepared': (lambda f: prepared_once(f, None, []), 'prepared.pt'), 'model': (load_pipeline, 'single.safetensors'),
    'captions': (lambda f: read_captions(f.parent, f), 'captions.csv'), 'wishes': (read_wishes, 'prompts.csv')}


@pytest.mark.parametrize('held', [b'', b'hello', PNG, b'PK\x03\x04 and no more', b'\xff\xfe\x00\x01', b'x\x00y\n"'], ids=['empty', 'text', 'picture', 'cut zip', 'bytes', 'quote'])
@pytest.mark.parametrize('name', READERS)
def test_another_kind(tmp_path, name, held):
    "A file of another kind under the name that is expected: the error names the file."
    read, file = READERS[name][0], tmp_path/READERS[name][1]
    file.write_bytes(held)
    plain(lambda: read(file), file.name)


@pytest.mark.parametrize('how', [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))], ids=['torch', 'pickle'])
def test_pickles(tmp_path, how):
    "Pickles that would leave a trace leave none, whoever reads them; opened without care, they do."
    trace, file = tmp_path/'ran', tmp_path/'checkpoint.pt'
    how(dict(a=Evil(trace)), file)
    for name in ('words, pickled', 'checkpoint', 'prepared'):
        plain(lambda: READERS[name][0](file), 'checkpoint.pt')
    assert not trace.exists()
    with suppress(RuntimeError): torch.load(file, weights_only=False)
    assert trace.exists()


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bomb(tmp_path, pipe):
    "A picture of 110 million pixels in 14 kB is not unpacked."
    Image.new('1', (10_500, 10_500)).save(file := tmp_path/'bomb.png')
    assert file.stat().st_size < 20_000
    for call in (lambda image: image_to_image(pipe, 'a bell', image, num_inference_steps=2), lambda image: fit_picture(image, 16, 16)):
        with Image.open(file) as image:
            plain(lambda: call(image), '110 million pixels', 'Make it smaller')
            assert image.tile, 'it was read'


@pytest.mark.parametrize('action', ['ignore', 'error'])
@pytest.mark.parametrize('most', [50_000, 20_000], ids=['warned of', 'refused'])
def test_large_picture_is_kept(tmp_path, monkeypatch, most, action):
    "A fetched picture of too many pixels stays on the disk, however Pillow tells of it: once the limit is raised it is opened."
    Image.new('1', (300, 300)).save(there := tmp_path/'a.png')
    fetch = lambda: fetch_picture(there.as_uri(), tmp_path/'kept')
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        patch.setattr(Image, 'MAX_IMAGE_PIXELS', most)
        plain(fetch, 'MAX_IMAGE_PIXELS', there.as_uri())
    there.unlink()
    assert fetch().size == (300, 300)


def test_no_memory_for_a_picture(monkeypatch):
    "A picture that does not fit into the memory is no damaged one."
    image = Image.new('RGB', (9, 8))
    def load(self): raise MemoryError
    monkeypatch.setattr(Image.Image, 'load', load)
    plain(lambda: load_picture(image), '9 x 8', 'memory', kind=MemoryError)
    plain(lambda: fit_picture(image, 4, 4), 'width=4', kind=MemoryError)


def test_zip_that_leaves_its_folder(tmp_path, monkeypatch):
    "Members with paths like ../x are read where they are, and nothing is written."
    (inner := tmp_path/'inner').mkdir()
    monkeypatch.chdir(inner)
    with ZipFile('a.zip', 'w') as z:
        z.writestr('../escaped.png', PNG)
        z.writestr('metadata.jsonl', json.dumps(dict(thing='a', style='b', keywords=[], held_out=False, file_name='../escaped.png')))
    assert read_drawings(Path('a.zip'))[0].image.size == (8, 8)
    assert sorted(f.name for f in tmp_path.rglob('*')) == ['a.zip', 'inner']


VECTORS = [(torch.full((16,), torch.nan), 'not finite'), (torch.ones(5), 'width 5, the model 16'), (torch.ones(2, 16), 'shape (2, 16)'), (torch.ones(16, dtype=torch.int64), 'int64')]


@pytest.mark.parametrize('vector, words', VECTORS, ids=['nan', 'width', 'shape', 'type'])
def test_words_that_do_not_fit(tmp_path, parts, vector, words):
    "A file of words with nan, of another model, or of another kind of numbers changes nothing."
    save_file({'<x>': vector}, tmp_path/'a.safetensors')
    before = len(parts.tokenizer)
    plain(lambda: add_words(parts, load_words(tmp_path/'a.safetensors')), words)
    assert len(parts.tokenizer) == before


@pytest.mark.parametrize('part, key', dict(unet='conv_in.weight', vae='encoder.conv_in.weight', text_encoder='embeddings.token_embedding.weight').items())
def test_weights_of_another_part(tmp_path, pipe, part, key):
    "Where a part's weights are those of another, the part and a weight are named: none is left empty, or to chance."
    pipe.save_pretrained(folder := tmp_path/'model')
    of = lambda part: next((folder/part).glob('*.safetensors'))
    of(part).write_bytes(of('vae' if part == 'unet' else 'unet').read_bytes())
    plain(lambda: load_pipeline(folder, 'cpu'), f'{part}: ', f'{key} is missing')


# Faults -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side', [2**23, 2**34, 2**43])
def test_too_large(parts, side):
    "A picture for which no memory is enough, or whose bytes cannot be counted."
    plain(lambda: make_samples(parts, 'a bell', height=side, width=side, num_inference_steps=2), 'Lower batch_size', kind=MemoryError)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('start', [None, Image.new('RGB', (16, 16), 'red')], ids=['text', 'picture'])
def test_no_black_picture(start, pipe):
    "Where the numbers overflow, a picture is refused: neither black nor with a warning of another library."
    call = dict(num_inference_steps=2, guidance_scale=1e30)
    draw = (lambda: text_to_image(pipe, 'a bell', **call)) if start is None else lambda: image_to_image(pipe, 'a bell', start, **call)
    plain(draw, 'guidance_scale=1e+30', 'not finite', 'Lower')


@pytest.mark.parametrize('value, kind', [(None, TypeError), (torch.zeros(1, 4, 8, 8).double(), ValueError), (torch.zeros(1, 4, 16, 8), ValueError)], ids=['none', 'precision', 'shape'])
def test_hook_of_another_kind(parts, value, kind):
    "What a hook leaves in step.latents has to be what was there."
    def hook():
        for step in denoise(parts, torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16), guidance_scale=1., num_inference_steps=3): step.latents = value
    plain(hook, 'step.latents', 'Give', kind=kind)


WISHES = [(dict(num_inference_steps=1001), 'num_inference_steps=1001'), (dict(num_inference_steps=600), 'num_inference_steps=600 would'), (dict(guidance_scale=lambda t: math.inf), 'guidance_scale=inf'), (dict(seeds=-1), 'seeds=-1'), (dict(prompt=3), 'prompt=3'),
          (dict(init_image=Image.new('RGB', (20, 15))), 'init_image is 20 x 15')]


@pytest.mark.parametrize('wish, words', WISHES, ids=lambda x: x if isinstance(x, str) else '')
def test_by_its_own_name(parts, wish, words):
    "What make_samples refuses it calls as its caller does."
    kind = TypeError if 'prompt' in wish else ValueError
    said = plain(lambda: make_samples(parts, **dict(prompt='a bell') | wish), words, kind=kind)
    assert said.startswith(words)


@pytest.mark.parametrize('wish', [dict(num_inference_steps=0), dict(num_inference_steps=2000), dict(guidance_scale='3'), dict(width=31), dict(batch_size=0)], ids=str)
def test_refused_run_claims_nothing(tmp_path, parts, wish):
    "What is refused leaves no folder behind that then holds the run of other settings."
    plain(lambda: draw_many(parts, number_wishes('a bell'), tmp_path/'run', **wish), *wish, kind=(ValueError, TypeError))
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('wish', [dict(steps=0), dict(batch=0), dict(lr=0.), dict(lr=math.nan), dict(rank=-1), dict(every=0), dict(share=2.)], ids=str)
def test_refused_training_claims_nothing(tmp_path, wish):
    "The same for a model of one's own."
    write_cells(tmp_path/'cells', range(3), each=1)
    plain(lambda: own_pictures(tmp_path/'cells', out=tmp_path/'own', **wish), *wish, kind=(ValueError, TypeError))
    assert not (tmp_path/'own').exists()


SPOILED = [('scheduler/scheduler_config.json', dict(beta_start=None)), ('scheduler/scheduler_config.json', dict(_class_name='Foo')), ('vae/config.json', dict(scaling_factor=0)), ('scheduler/scheduler_config.json', dict(num_train_timesteps=0)),
           ('vae/config.json', dict(scaling_factor=None)), ('unet/config.json', dict(layers_per_block=2)), ('unet/config.json', dict(sample_size='8'))]


@pytest.mark.parametrize('file, fields', SPOILED, ids=str)
@pytest.mark.parametrize('load', [load_pipeline, load_by_hand], ids=['library', 'by hand'])
def test_configs_that_draw_something_else(tmp_path, pipe, load, file, fields):
    "A config that lacks what the picture depends on, or belongs to other weights, is refused before anything is drawn."
    pipe.save_pretrained(folder := tmp_path/'model')
    load(folder, 'cpu')
    (folder/file).write_text(json.dumps(json.loads((folder/file).read_text()) | fields))
    plain(lambda: load(folder, 'cpu'), folder.name if load is load_pipeline else file.split('/')[0])


@pytest.mark.parametrize('extra', [True, False], ids=['unexpected', 'missing'])
def test_weights_too_many_or_too_few(tmp_path, pipe, extra):
    "A weight that the network has no place for, and one that is not there."
    pipe.save_pretrained(folder := tmp_path/'model')
    file = next((folder/'unet').glob('*.safetensors'))
    weights = load_file(file)
    if extra: weights['mid_block.more.weight'] = torch.zeros(3)
    else: del weights['conv_out.bias']
    save_file(weights, file)
    for load in (load_pipeline, load_by_hand): plain(lambda: load(folder, 'cpu'), 'mid_block.more.weight is unexpected' if extra else 'conv_out.bias is missing')


def swapped(folder):
    "The ids of two words changed for one another."
    ids = json.loads((file := folder/'vocab.json').read_text())
    file.write_text(json.dumps(ids | {'red</w>': ids['apple</w>'], 'apple</w>': ids['red</w>']}))


def backwards(folder):
    "The merges in the wrong order."
    first, *lines = (file := folder/'merges.txt').read_text().splitlines()
    file.write_text('\n'.join([first, *lines[::-1]]))


def told(**fields): return lambda folder: (folder/'tokenizer_config.json').write_text(json.dumps(json.loads((folder/'tokenizer_config.json').read_text()) | fields))


TOKENIZERS = {'emptied': lambda folder: [file.unlink() for file in folder.iterdir()], 'no config': lambda folder: (folder/'tokenizer_config.json').unlink(), 'swapped': swapped, 'backwards': backwards,
              'length': told(model_max_length=None), 'padding': told(pad_token='!'), 'end': told(eos_token='a</w>'), 'vocabulary': lambda folder: (folder/'vocab.json').write_text('[1, 2]')}


@pytest.mark.parametrize('spoil', TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_read_something_else(tmp_path, pipe, spoil):
    "A tokenizer that would read other tokens, or none, is refused, and the file is named."
    pipe.save_pretrained(folder := tmp_path/'model')
    for file in (embedded_folder()/'tokenizer').iterdir(): (folder/'tokenizer'/file.name).write_bytes(file.read_bytes())     # vocab.json and merges.txt
    (folder/'tokenizer'/'tokenizer.json').unlink(missing_ok=True)
    for load in (load_pipeline, load_by_hand): load(folder, 'cpu')
    spoil(folder/'tokenizer')
    for load in (load_pipeline, load_by_hand): plain(lambda: load(folder, 'cpu'), 'tokenizer', kind=(ValueError, TypeError))


@pytest.mark.parametrize('rows, words', [('file,caption,patient\na.png,one, two,P1\n', 'quotes'), ('file,caption,file,patient\na.png,one,b.png,P1\n', 'two columns')], ids=['comma', 'twice'])
def test_captions_that_slip(tmp_path, rows, words):
    "A comma without quotes would make a part of the caption the patient."
    (tmp_path/'captions.csv').write_text(rows)
    plain(lambda: read_captions(tmp_path, tmp_path/'captions.csv'), 'captions.csv', words)


ODD = {'no picture to start from': (lambda parts: make_samples(parts, 'a bell', init_image=[]), 'init_image'), 'a large scale': (lambda parts: make_samples(parts, 'a bell', guidance_scale=10**400), 'guidance_scale='),
       'another precision': (lambda parts: list(denoise(parts, torch.randn(1, 4, 8, 8), *torch.randn(2, 1, 77, 16), 3., 3, combine=lambda a, b, g: a.half())), 'combine'),
       'a name that safetensors keeps': (lambda parts: add_words(parts, {'__metadata__': torch.ones(16)}), '__metadata__')}


@pytest.mark.parametrize('call, words', ODD.values(), ids=ODD)
def test_odd(parts, call, words):
    "What a stranger tried."
    plain(lambda: call(parts), words)


def test_words_for_networks_by_hand():
    "They take none, and say so."
    plain(lambda: add_words(load_by_hand(device='cpu'), {'<x>': torch.zeros(128)}), 'by hand', 'load_parts', kind=TypeError)


@pytest.mark.parametrize('name', ['init_image', 'mask'])
def test_the_picture_that_is_wrong(parts, name):
    "Of two pictures the wrong one is named."
    bad, good = Image.fromarray(np.full((16, 16), np.nan, np.float32)), Image.new('RGB', (16, 16))
    call = (lambda: make_samples(parts, 'a bell', init_image=bad, start_step=1, num_inference_steps=3)) if name == 'init_image' else lambda: inpaint(with_scheduler(parts, 'DDIM'), good, bad, 'a bell', num_inference_steps=3)
    assert plain(call, 'not finite').startswith(name)


def test_ctrl_c_in_the_loop(parts):
    "After Ctrl-C in the second step the model draws what it drew before."
    call, asked = dict(seeds=3, num_inference_steps=4), []
    before = make_samples(parts, 'a bell', **call)
    def interrupt(*_):
        asked.append(1)
        if len(asked) == 2: raise KeyboardInterrupt
    with parts.unet.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt): make_samples(parts, 'a bell', **call)
    assert len(asked) == 2 and torch.equal(make_samples(parts, 'a bell', **call), before)


def test_ctrl_c_in_a_widget():
    "Ctrl-C while it draws: the old picture stays, and the next turn of the knob draws."
    knob, broken = widgets.IntSlider(0, 0, 9), []
    def draw(knob):
        if broken: raise broken[0]
        return Image.new('RGB', (8, 8), (knob, 0, 0))
    box = explore.explorer(draw, side=8, knob=knob)
    before = explore.still(box).getpixel((0, 0))
    broken.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): knob.value = 3
    assert explore.still(box).getpixel((0, 0)) == before
    broken.clear()
    knob.value = 4
    assert explore.still(box).getpixel((0, 0)) == (4, 0, 0)


def fitted(folder, stop=None, steps=12):
    "The weights that training gives; `stop` is called with each step."
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    def draw(g, step):
        if stop: stop(step)
        return dict(x=torch.randn(4, 3, generator=g))
    Trainer(network, steps, .1, folder, warmup=2).fit(draw, lambda m, x: m(x).square().mean(), every=5)
    return network.weight.detach()


def test_ctrl_c_in_training(tmp_path):
    "The last checkpoint stays, and training that goes on from it ends where it would have."
    def stop(step):
        if step == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fitted(tmp_path, stop)
    assert [f.name for f in tmp_path.iterdir()] == ['checkpoint.pt'] and len(read_state(tmp_path/'checkpoint.pt')['losses']) == 5
    begun = []
    assert torch.equal(fitted(tmp_path, begun.append), fitted(None)) and begun[0] == 5


def test_ctrl_c_loses_no_step(tmp_path):
    "The signal itself, in the middle of a step: the step is ended and kept. The second one ends it at once; the handler is the one from before."
    before = signal.getsignal(signal.SIGINT)
    whole = fitted(None)
    def pressed(step):
        if step == 7: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match='Stopped after step 8'): fitted(tmp_path/'once', pressed)
    assert len(read_state(tmp_path/'once'/'checkpoint.pt')['losses']) == 8
    assert torch.equal(fitted(tmp_path/'once'), whole)
    def twice(step):
        if step == 7: signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): fitted(tmp_path/'twice', twice)
    assert len(read_state(tmp_path/'twice'/'checkpoint.pt')['losses']) == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_pictures_of_science(tmp_path, parts):
    "Different pictures of 16 bits are no copies of each other; those that would be dark, of no range, of one colour or cut in half are named before anything begins."
    rng, table = np.random.default_rng(0), tmp_path/'captions.csv'
    def given(**arrays):
        for file in tmp_path.iterdir(): file.unlink()
        for name, array in arrays.items(): Image.fromarray(array).save(tmp_path/f'{name}.tiff')
        table.write_text('\n'.join(['file, caption', *(f'{name}.tiff, a bell' for name in arrays)]))
        return problems(parts, read_captions(tmp_path, table, ''))
    deep = lambda high, shape=(160, 160): rng.integers(0, high, shape, dtype=np.uint16)
    assert given(a=deep(60000), b=deep(60000), c=deep(9000)) == []
    same = deep(60000)
    assert 'b.tiff is the same picture as a.tiff' in given(a=same, b=same)[0]
    assert 'a.tiff cannot be used: it has 16 bits' in given(a=deep(4096))[0]
    assert 'end at 163' in given(a=deep(16384), b=deep(9000))[0] and 'multiply all by 4' in given(a=deep(16384))[0]
    assert 'mode F' in given(a=rng.uniform(300, 1300, (160, 160)).astype(np.float32))[0]
    assert 'one colour' in given(a=np.zeros((160, 160), np.uint8))[0]
    assert '320 x 160' in given(a=deep(60000, (160, 320)))[0]
    plain(lambda: read_captions(tmp_path, table), "no column 'patient'", "group=''")
    plain(lambda: read_captions(tmp_path/'none', table), 'none', 'folder', kind=FileNotFoundError)
    table.write_text('file;caption\na.tiff;a bell\n')
    plain(lambda: read_captions(tmp_path, table), 'semicolons')
    table.write_text(table.read_text().replace(';', '\t'))
    plain(lambda: read_captions(tmp_path, table), 'tabs')


def test_checkpoint_of_other_pictures(parts, tmp_path):
    "A folder of a run of other pictures, captions or settings is not taken up; at another rate it goes on."
    latents, begun = torch.randn(2, 4, 8, 8), []
    def tune(latents=latents, captions=('a', 'b'), steps=2, **how):
        model = replace(parts, unet=deepcopy(parts.unet), text_encoder=deepcopy(parts.text_encoder))
        return fine_tune(model, latents, captions, steps, batch=2, folder=tmp_path/'run', report=lambda *_: begun.append(1), **how)
    losses = tune()
    for wrong, name in (dict(latents=latents + 1), 'other pictures'), (dict(captions=('a', 'c')), 'captions='), (dict(steps=3), 'steps=2'), (dict(seed=1), 'seed=0'):
        plain(lambda wrong=wrong: tune(**wrong), 'run', name)
    assert tune(lr=5e-4, latents=latents + 1e-6) == losses and begun == [1]       # nothing was left to train


def test_ctrl_c_in_fine_tuning(parts):
    "After Ctrl-C, or a wrong rate, no LoRA is left in the UNet, and its weights are as they were."
    model = replace(parts, unet=deepcopy(parts.unet), text_encoder=deepcopy(parts.text_encoder))
    def interrupt(*_): raise KeyboardInterrupt
    tune = lambda **how: fine_tune(model, torch.randn(2, 4, 8, 8), ['a', 'b'], 4, batch=2, rank=2, every=2, **how)
    with pytest.raises(KeyboardInterrupt): tune(report=interrupt)
    assert not model.unet.training
    plain(lambda: tune(lr=-1.), 'lr=-1')
    before, after = parts.unet.state_dict(), model.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], w) for name, w in before.items())


def test_a_model_that_cannot_be_replaced(tmp_path, parts, monkeypatch):
    "The model that is there stays, and so does a folder beside it whose name ends in .old."
    (tmp_path/'own').mkdir(); (tmp_path/'own.old').mkdir()
    save_model(parts, folder := tmp_path/'own')
    assert len({f.stat().st_mode for f in folder.rglob('*') if f.is_file()}) == 1      # whoever can read one can read all
    (folder/'notes.txt').write_text('mine')
    plain(lambda: save_model(parts, folder), 'something else')     # it would be gone with the model
    plain(lambda: own_pictures(folder, out=folder/'notes.txt'), 'notes.txt', 'is a file')
    (folder/'notes.txt').rename(folder/'.DS_Store')
    move, failed = Path.replace, []
    def fails(self, to):
        if Path(to) != folder or failed: return move(self, to)
        failed.append(self)
        raise OSError(28, 'no space')
    monkeypatch.setattr(Path, 'replace', fails)
    plain(lambda: save_model(parts, folder), 'no space', kind=OSError)
    assert failed and (folder/'.DS_Store').read_text() == 'mine' and sorted(f.name for f in tmp_path.iterdir()) == ['own', 'own.old']
    save_model(parts, folder)
    assert sorted(f.name for f in folder.iterdir()) == ['model_index.json', *sorted(PARTS)]


def test_hidden_files(tmp_path):
    "What a Mac leaves beside files is no part of a model."
    folder = shutil.copytree(embedded_folder(), tmp_path/'model')
    for file in [*folder.rglob('*.json'), *folder.rglob('*.safetensors')]: file.with_name(f'._{file.name}').write_bytes(b'\0\5\26\7')
    (folder/'.DS_Store').write_bytes(b'')
    for load in (load_pipeline, load_by_hand): load(folder)
    plain(lambda: load_pipeline(tmp_path), f'Give {folder}.')      # the folder that it lies in


def test_ctrl_c_while_saving(tmp_path, monkeypatch):
    "Ctrl-C in the middle of a checkpoint: the one before stays, and nothing half-written."
    save = torch.save
    def interrupted(state, part):
        save(state, part)
        if len(state['losses']) == 10:
            Path(part).write_bytes(Path(part).read_bytes()[:99])
            raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt): fitted(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ['checkpoint.pt'] and len(read_state(tmp_path/'checkpoint.pt')['losses']) == 5


# What is saved, each over a file that is there; run in a process of its own, where files cannot grow over 2 kB, as on a full disk.
WRITERS = '''
import json, resource, sys, torch
from pathlib import Path
from PIL import Image
from sd_deepdive.drawings import drawings, write_drawings
from sd_deepdive.further.many import write_picture
from sd_deepdive.training.adapt import add_lora, save_lora
from sd_deepdive.training.clip import Clip, save_tower
from sd_deepdive.training.loop import Trainer, save_record, save_sheet, save_whole
from sd_deepdive.words import save_words
network = torch.nn.Sequential()
network.to_q = torch.nn.Linear(999, 999)
add_lora(network)
class Tower(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(9999))
writers = {
    'a.safetensors': lambda file: save_words(file, {'<x>': torch.ones(9999)}), 'a.png': lambda file: write_picture(file, Image.effect_noise((99, 99), 50), {}),
    'a.zip': lambda file: write_drawings(drawings('red apple'), file), 'a.pt': lambda file: save_whole(file, dict(a=torch.ones(9999))),
    'a.json': lambda file: save_record(file, a=[1]*9999), 'sheet.png': lambda file: save_sheet(torch.rand(4, 3, 64, 64), 2, file),
    'lora.safetensors': lambda file: save_lora(network, file), 'tower.safetensors': lambda file: save_tower(Tower(), file),
    'checkpoint.pt': lambda file: Trainer(torch.nn.Linear(999, 1), 1, .1, file.parent).save()}
folder, said = Path(sys.argv[1]), {}
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for name, write in writers.items():
    (folder/name).write_text('old')
    for place in (folder/name, folder/name/name):      # the second: a file where the folder should be
        try: write(place)
        except (ValueError, OSError) as e: said[str(place.relative_to(folder))] = str(e)
print(json.dumps(said))
'''


def test_full_disk(tmp_path):
    "Where files cannot grow, and where the folder is a file: plain words, the old file whole, nothing half-written; the same for all that is saved."
    said = json.loads(python(WRITERS, tmp_path).splitlines()[-1])
    names = sorted(f.name for f in tmp_path.iterdir())
    assert len(names) == 9 and not [n for n in names if n.endswith('.part')] and {f.read_text() for f in tmp_path.iterdir()} == {'old'}
    assert set(said) == {*names, *(f'{name}/{name}' for name in names)}
    for place, words in said.items(): assert Path(place).name in words and '\n' not in words, words
    assert all(('Make room' in words) == ('/' not in place) for place, words in said.items()), said      # room does not make a folder of a file


# Random input -------------------------------------------------------------------------------------------------------

def bounded(n): return settings(derandomize=True, max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))


ANY_TEXT = st.text(st.characters(), max_size=200) | st.text(st.sampled_from('a é\u0301\u200d\U0001f9d1(:1.5),<|endoftext|>\n'), max_size=400).map(lambda s: s*9)


@pytest.fixture(scope='module')
def by_hand(parts): return Tokenizer.from_pretrained(embedded_folder()/'tokenizer')


@bounded(60)
@given(prompt=ANY_TEXT)
@example(prompt='a \ud83d')
@pytest.mark.filterwarnings('ignore:The prompt has more than')
def test_prompts(parts, by_hand, prompt):
    "Any text is drawn, and cut off at the same place by both tokenizers; half of a character is refused."
    if any('\ud800' <= c <= '\udfff' for c in prompt):
        plain(lambda: make_samples(parts, prompt, num_inference_steps=2), 'half of a character')
        return plain(lambda: cut_off(by_hand, prompt), 'half of a character')
    assert make_samples(parts, prompt, num_inference_steps=2).isfinite().all()
    assert cut_off(by_hand, prompt) == cut_off(parts.tokenizer, prompt)


@pytest.mark.parametrize('draw', [lambda pipe, **texts: make_samples(pipe, texts.pop('prompt'), num_inference_steps=2, **texts),
                                  lambda pipe, **texts: text_to_image(pipe, num_inference_steps=2, **texts)], ids=['parts', 'pipeline'])
def test_told_of_cut(draw, pipe, caplog):
    "Whoever draws, and whichever prompt is too long: the course says so, and the libraries add nothing."
    for library in ('diffusers', 'transformers'): logging.getLogger(library).addHandler(caplog.handler)
    pipe.tokenizer.deprecation_warnings.clear()
    with pytest.warns(UserWarning) as said: draw(pipe, prompt='red apple '*60, negative_prompt='blue bell '*60)
    for library in ('diffusers', 'transformers'): logging.getLogger(library).removeHandler(caplog.handler)
    assert [str(w.message).split(' has more')[0] for w in said] == ['The prompt', 'The negative prompt'] and not caplog.records


def test_long_prompt(by_hand, parts):
    "Twenty thousand letters are cut off where the library cuts them."
    prompt = 'red apple '*2_000
    assert len(cut_off(by_hand, prompt)) > 19_000 and cut_off(by_hand, prompt) == cut_off(parts.tokenizer, prompt)


@bounded(100)
@given(caption=ANY_TEXT | st.lists(st.sampled_from('one two ten long round pink brown cell cells, dividing one'.split())).map(' '.join))
@example(caption='two long pink cells')
@example(caption='three round pink cells, one dividing')
@example(caption='octopus, (3d:1.3) style')
@example(caption='(a:' + '9'*400 + ')')
def test_captions(caption):
    "A caption of cells is understood or refused; one with weights has finite ones, inside of the text."
    try: assert cells_of(caption).caption == caption
    except ValueError as e: assert 'caption=' in str(e)
    try: text, spans = parse_weights(caption)
    except ValueError as e: assert 'weight=' in str(e)
    else: assert all(0 <= a < b <= len(text) and math.isfinite(w) for a, b, w in spans)


@bounded(60)
@given(held=st.binary(max_size=200) | ANY_TEXT.map(lambda s: ('file,caption,prompt\n' + s).encode(errors='replace')), end=st.sampled_from(['.csv', '.txt', '.jsonl']))
def test_tables(tmp_path_factory, held, end):
    "A table of anything is read or refused by name."
    (file := tmp_path_factory.getbasetemp()/f'table{end}').write_bytes(held)
    for read in (read_wishes, lambda f: read_captions(f.parent, f)):
        try: assert read(file)
        except ValueError as e: assert file.name in str(e)


VALUES = st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=5) | st.lists(st.integers(-1, 40) | st.text(max_size=3), max_size=5) | st.just({})
SMALL = {UNet: dict(sample_size=8, block_out_channels=[8, 16], cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4, layers_per_block=1,
                    down_block_types=['CrossAttnDownBlock2D', 'DownBlock2D'], up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D']),
         Autoencoder: dict(block_out_channels=[8, 8], norm_num_groups=4, sample_size=16), TextEncoder: dict(hidden_size=16, intermediate_size=16, num_attention_heads=2),
         Euler: {}}


@pytest.mark.parametrize('kind', SMALL, ids=lambda k: k.__name__)
def test_configs(kind):
    "A config with any value in any field is refused, the field named, or a network is built."
    fields = [*FIELDS[getattr(kind, 'kind', 'SchedulerMixin')], 'norm_type', 'class_embed_type']
    @bounded(100)
    @given(changed=st.dictionaries(st.sampled_from(fields), VALUES, min_size=1, max_size=2))
    @example(changed={})
    def check(changed):
        config = SMALL[kind] | changed
        try:
            with nullcontext() if kind is Euler else unfilled(): kind(**config) if kind is Euler else kind(config)     # a sampler computes its levels
        except (ValueError, TypeError) as e: assert any(name in str(e) for name in config), e
    check()


@bounded(100)
@given(header=st.dictionaries(st.sampled_from(['a.weight', 'query.weight', 'to_q.weight', '__metadata__', '']), st.fixed_dictionaries({}, optional=dict(
           dtype=st.sampled_from(['F32', 'F16', 'F8_E4M3', 'I64', 'BOOL', 'X', 3]), shape=st.lists(st.integers(-2, 2**62), max_size=3) | st.just('2'),
           data_offsets=st.lists(st.integers(-1, 2**40) | st.just(8), max_size=3))), max_size=3) | st.just([]),
       rest=st.binary(max_size=16), length=st.none() | st.integers(0, 2**64 - 1), raw=st.none() | st.binary(max_size=60))
@example(header={'a.weight': dict(dtype='F32', shape=[2], data_offsets=[0, 8])}, rest=struct.pack('<2f', 1, 2), length=None, raw=None)
def test_checkpoint_headers(tmp_path_factory, header, rest, length, raw):
    "Random bytes, and headers with wrong shapes, types and places: read, or a ValueError that names the file."
    text = json.dumps(header).encode()
    held = struct.pack('<Q', len(text) if length is None else length) + text + rest if raw is None else raw
    (folder := tmp_path_factory.getbasetemp()/'headers').mkdir(exist_ok=True)
    (folder/'model.safetensors').write_bytes(held)
    try: assert all(isinstance(w, torch.Tensor) for w in read_weights(folder).values())
    except ValueError as e: assert 'model.safetensors' in str(e)


def test_rounded_weights(tmp_path, pipe):
    "Weights saved as whole numbers, which the library would take and draw something else, are refused by both."
    pipe.save_pretrained(tmp_path)
    weights = load_file(file := tmp_path/'unet'/'diffusion_pytorch_model.safetensors')
    save_file(weights | {'conv_in.weight': (100*weights['conv_in.weight']).to(torch.int8)}, file)
    for load in (load_pipeline, load_by_hand): plain(lambda load=load: load(tmp_path, 'cpu'), 'unet', 'conv_in.weight', 'I8')


# Every public function, with each argument wrong once -----------------------------------------------------------------

def good_values(pipe, folder):
    "What can be given for a parameter, by its name; then, by function, where a name means something else."
    parts, g = with_scheduler(pipe, 'DDIM'), torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    latents, text, red, some = rand(1, 4, 8, 8), rand(1, 77, 16), Image.new('RGB', (16, 16), 'red'), drawings('red apple')[:2]
    pixels, hand = rand(2, 3, 16, 16).clamp(-1, 1), unet_by_hand(parts)
    (folder/'list.txt').write_text('a\n')
    (folder/'captions.csv').write_text('file,caption\na.png,b\n')
    step = Step(0, torch.tensor(500), torch.tensor(.3), *(rand(1, 4, 8, 8) for _ in range(4)))
    look = [Look(0, 'a', torch.rand(1, 2, 4, 4, 16))]
    write_cells(folder/'set', [0, 1, 2, 3, 4], each=1)
    clip, examples = load_clip(), read_captions(folder/'set', folder/'set'/'captions.csv')
    ready, small = prepare(parts, some, white=1, captions=1), shrunk(stack(some), 32)
    by_name = dict(
        **dict.fromkeys(['parts', 'pipe', 'model'], parts), **dict.fromkeys(['latents', 'noise', 'x', 'x_t', 'x0', 'init', 'like'], latents), uncond=text, text=text,
        **dict.fromkeys(['prompt', 'prompts', 'negative_prompt'], 'a bell'), **dict.fromkeys(['seed', 'seeds', 'start_step', 'rows', 'gap', 'scale', 'every', 'number'], 1),
        **dict.fromkeys(['num_inference_steps', 'steps', 'cols', 'batch', 'batch_size', 'count', 'n'], 2), **dict.fromkeys(['guidance_scale', 'g'], 3.),
        **dict.fromkeys(['height', 'width'], 16), **dict.fromkeys(['image', 'init_image', 'a', 'b', 'picture'], red), **dict.fromkeys(['images', 'frames'], [red, red]),
        **dict.fromkeys(['alpha_bar', 'share', 'phi', 'strength', 'seconds', 'opacity'], .5), t=500, scheduler=parts.scheduler, colour='white', background='white', titles=['a', 'b'],
        pixels=pixels, y=pixels, word='blue', words={'<x>': rand(16)}, name='DDIM', device='cpu', dtype=torch.float32, mask=torch.eye(16), rgba=torch.full((2, 4, 16, 16), 200, dtype=torch.uint8),
        colours=torch.rand(2, 3), matrix=torch.eye(2, 3).repeat(2, 1, 1), captions=['a bell'], texts=['a bell'], drawings=some, drawing=some[0], side=32, folder=folder, thing='red apple',
        style='noto', tokenizer=parts.tokenizer, generator=g, network=deepcopy(parts.unet), vae=parts.vae, unet=parts.unet, alphas_cumprod=parts.scheduler.alphas_cumprod, times=[100, 500],
        made=rand(2, 5), known=rand(2, 5), max_length=77, low=1., high=2., timesteps=torch.tensor([900, 1]), file=folder/'x.safetensors', path=folder/'x.pt', caption='two long pink cells',
        group='p1', zoom=(.9, 1.1), turn=.1, shift=.1, first='a', second='b', lr=1e-3, drop=.1, hold=1., ready=ready, among=[0, 1], rng=np.random.default_rng(0),
        examples=examples, judge=load_judge(), acc=accelerator())
    either = dict(sigma=2., sigma_next=1., fresh=latents, noise_next=latents, noises=[latents], sigmas=[2.], x0s=[latents])
    of_words, ops = replace(parts, tokenizer=deepcopy(parts.tokenizer), text_encoder=deepcopy(parts.text_encoder)), [Operation('addmm', 3, 4)]
    changed = replace(parts, unet=deepcopy(parts.unet))
    add_lora(changed.unet)
    save_whole(folder/'state.pt', dict(a=1)), write_picture(folder/'q.png', red, dict(a='b'))
    return by_name, {
        'many.is_drawn': dict(file=folder/'q.png', about=dict(a='b')), 'many.draw_many': dict(wishes=number_wishes(['a']), folder=folder/'many', model='m'), 'images.check_colour': dict(value='white'),
        'own_pictures.copies': dict(made=rand(2, 5), train=rand(3, 5), held=rand(2, 5)), 'own_pictures.save_model': dict(folder=folder/'saved'), 'own_pictures.split': dict(share=.5),
        'cells.draw_cells': dict(cells=Cells(2), patient=patient(1)), 'cells.parts_right': dict(images=[Image.new('RGB', (128, 128))], captions=['two long pink cells']),
        'speed.seconds_by_kind': dict(call=lambda: torch.ones(3) + 1), 'speed.operations': dict(call=lambda: torch.ones(3) + 1), 'speed.flops': dict(ops=ops),
        'speed.least_seconds': dict(ops=ops, machine=Machine(1., 1.)), 'steering.loss_gradient': dict(step=step, loss=lambda p: p.mean((1, 2, 3))), 'steering.caption_loss': dict(clip=clip),
        'steering.rescale_x0': dict(kept=KeepText()), 'clip.contrastive_loss': dict(logits=rand(2, 2)), 'clip.save_tower': dict(model=clip, path=folder/'t.safetensors'),
        'clip.seen': dict(blur=torch.rand(2)), 'clip.caption_hits': dict(model=clip, rgba=small), 'clip.clip_scores': dict(model=clip, captions=['a', 'b']),
        'adapt.train_lora': dict(parts=changed), 'clip.zero_unused': dict(text=deepcopy(clip.text)), 'adapt.train_word': dict(token='blue</w>', captions=['a blue bell']), 'diffusion.placed_latents': dict(names=['white'], g=g), 'diffusion.caption_gap': dict(n=2, times=[500]),
        'diffusion.diffusion_batches': dict(stages=[(24, 5)], times=1000), 'loop.share': dict(batch=dict(a=rand(2))), 'loop.read_state': dict(path=folder/'state.pt'),
        'quality.named_right': dict(wanted=some), 'quality.resampled': dict(measure=lambda a, b: 0., a=rand(5, 3), b=rand(5, 3), times=2), 'quality.quality_rows': dict(made=pixels, back=pixels, wanted=some),
        'words.add_words': dict(model=of_words, name=None),
        'many.read_wishes': dict(file=folder/'list.txt'), 'many.write_picture': dict(file=folder/'p.png', about=dict(a='b')), 'many.picture_file': dict(i=3),
        'models.text_to_image': dict(pipe=pipe), 'img2img.image_to_image': dict(pipe=pipe, strength=.8), 'img2img.img2img_pipeline': dict(pipe=pipe), 'latents.make_img': dict(pixels=pixels[0]),
        'sampling.make_samples': dict(prompt=['a', 'b'], height=None, width=None), 'sampling.denoise': dict(start_step=0), 'own_pictures.read_captions': dict(captions=folder/'captions.csv', group=None), 'loop.same_run': dict(record=folder/'settings.json', settings=dict(lr=.1)),
        'inside.walk': dict(a=latents, b=rand(1, 4, 8, 8)), 'inside.watch_attention': dict(parts=hand, to='words', layers=''),
        'inside.token_maps': dict(looks=look, pictures=1), 'inside.place_map': dict(looks=look, row=1, column=1, picture=-1), 'inside.lay_over': dict(heat=torch.rand(4, 4)), 'inside.ddim_move': dict(now=.5, then=.6),
        'inside.among_words': dict(maps=torch.rand(1, 6, 4, 4), words=2), 'inside.mark': dict(row=1, column=1, size=(4, 4)), 'inside.invert': dict(guidance_scale=1., uncond=None),
        'speed.in_turn': dict(arms=dict(a=lambda: 0), rounds=2), 'speed.paired': dict(took=dict(a=[1., 2.]), base='a'), 'speed.fit_preview': dict(latents=rand(2, 4, 8, 8)), 'speed.preview': dict(weights=rand(3, 5)),
        'speed.fastest': dict(call=lambda: 0, tries=2), 'speed.kind_of': dict(name='addmm'), 'steering.colour_loss': dict(colour=(.1, .2, .3)), 'steering.steer': dict(step=step, loss=lambda p: p.mean((1, 2, 3))),
        'steering.mask2latent': dict(mask=Image.new('L', (16, 16), 255)), 'steering.inpaint': dict(mask=Image.new('L', (16, 16), 255)), 'steering.wider': dict(width=32, height=32),
        'steering.token_weights': dict(plain='a bell', spans=[(2, 6, 1.3)], length=77), 'guidance.guide': dict(uncond=latents, text=latents), 'models.load_pipeline': dict(name='embedded'),
        'parts.load_parts': dict(name='embedded'), 'parts.latents_callback': dict(frames=[]), 'places.find_model': dict(name='embedded', parts=None), 'sampling.ask_unet': dict(words=None), 'drawings.write_drawings': dict(path=folder/'d.zip'),
        'drawings.read_drawings': dict(path=CFG.lib_path/'data'/'pictures.zip'), 'autoencoder.psnr_of': dict(x=pixels), 'autoencoder.edges': dict(x=pixels), 'autoencoder.reconstruction_loss': dict(x=pixels),
        'autoencoder.autoencoder_batches': dict(crop_steps=1), 'autoencoder.kl_divergence': dict(mean=latents, logvar=latents), 'data.caption': dict(background='red', rng=random.Random(0)),
        'quality.frechet_distance': dict(a=rand(5, 3), b=rand(5, 3)), 'adapt.picture_batches': dict(latents=rand(2, 4, 8, 8), times=1000), 'loop.save_sheet': dict(cols=1, path=folder/'s.png'),
        'loop.save_whole': dict(state={}), 'loop.step_generator': dict(step=1), 'diffusion.things_at': dict(step=1, stages=[(2, 5)]), 'diffusion.prepare': dict(white=1, captions=1), 'data.distances': {},
        'diffusion.min_snr': dict(gamma=5.), 'explore.explorer': dict(draw=lambda: red), 'samplers.lms_weights': dict(sigmas=[2., 3.], sigma_next=1.), 'samplers.spaced': dict(spacing='leading'),
        'samplers.karras': dict(largest=9., smallest=.1), 'seeds.generators': dict(seeds=[1]), 'checkpoints.read_weights': dict(folder=embedded_folder()/'unet'), 'cells.look': dict(image=Image.new('RGB', (128, 128))), 'cells.cell': dict(at=(64., 64.), shape='long', dividing=False, radius=14., rng=np.random.default_rng(0)),
        'cells.scatter': dict(count=2, reach=14., rng=np.random.default_rng(0)), 'cells.write_cells': dict(folder=folder/'cells', patients=[1], each=1),
        'text.unknown_words': dict(prompt='a bell'), 'inside.attention_weights': dict(layer=next(m for m in hand.unet.modules() if isinstance(m, Attention)), x=rand(1, 4, 8), text=None), 'inside.slerp': dict(a=latents, b=rand(1, 4, 8, 8)),
        'configs.read_json': dict(file=embedded_folder()/'unet'/'config.json'), 'text_encoder.quick_gelu': {}, 'tokenizer.clean': dict(text='a'), 'unet.time_waves': dict(t=torch.tensor([5]), width=4),
        **{f'samplers.{name}_step': either for name in ('euler', 'ancestral', 'heun', 'pndm', 'lms', 'dpm')}}


def wrong_values(good, may_be_none):
    "What is plainly no such value."
    kinds = {torch.Tensor: ['text', [1, 2], torch.zeros(2, 2, 2, 2, 2), torch.tensor(1.)], bool: ['yes'], int: ['x', math.nan, -10**9, 2.5, True, 2**70, {1}, [], torch.ones(3)],
             float: ['x', math.nan, math.inf, True, 1j, [1.], torch.ones(3)], str: [3, b'x', ['a', 3], 'a \ud83d', 'nonsense', {'a'}, ''], Path: [3, 'a\0b', ''],
             Image.Image: ['x.png', torch.zeros(3, 4, 4), np.zeros((4, 4, 3), np.uint8), Image.new('RGB', (0, 5))], list: [3, [], [None], 'abc', set(), [[1]]], tuple: [3, [], [None]], dict: [3, {}, {1: 2}]}
    wrong = next((values for kind, values in kinds.items() if isinstance(good, kind)), ['x', 3])
    if isinstance(good, torch.Tensor):
        other = [good*math.nan, good/0, good.half(), good.double(), good.to('meta')] if good.is_floating_point() else []
        wrong = [*wrong, *other, good.long(), good > 0, good[:0]]
    return wrong + [object()] + [None]*(not may_be_none)


def functions():
    "The public functions whose arguments are all known here: module, name, function."
    for file in sorted(CFG.lib_path.rglob('*.py')):
        if file.stem in ('__init__', '_modidx', 'checks', 'sources', 'hub'): continue      # checks are what is tested; sources and hub speak with the network
        module = importlib.import_module('.'.join(file.relative_to(ROOT).with_suffix('').parts))
        for name in module.__all__:
            function = inspect.unwrap(getattr(module, name))
            if inspect.isfunction(function) and function.__module__ == module.__name__: yield f'{file.stem}.{name}', getattr(module, name)


def finish(result):
    "Let it do its work, if it does so only when asked."
    if inspect.isgenerator(result): list(result)
    elif hasattr(result, '__enter__') and not isinstance(result, Image.Image): result.__exit__(None, None, None) if result.__enter__() else None


# Those for which there are no good values here, by module: pieces of the networks by hand, which see what those hand them, and commands
LEFT_OUT = dict(explore='still knobs', cells='soft', many='draw_file', own_pictures='own_pictures', speed='fused_attention_flops', img2img='fetch_picture',
                models='draw_in_batches', places='check_folder check_file', autoencoder='levels autoencoder_loss train_autoencoder',
                checkpoints='name_today weight_files field_behind read_merges', configs='check_field check_sizes read_config refuse', parts='load_sampler',
                samplers='betas_of', text_encoder='attend', tokenizer='join merge split fill_up as_asked', unet='pointwise run plan',
                adapt='train_course_word', clip='load_clip clip_loss save_text train_text', diffusion='prepared_once diffusion_report train_diffusion',
                loop='kept', quality='load_judge quality measure_quality')


@pytest.mark.filterwarnings('ignore')
def test_sweep(pipe, tmp_path, monkeypatch):
    "No wrong argument of a public function ends inside another library, or in an error that is none of ours."
    monkeypatch.chdir(tmp_path)     # for paths such as ''
    by_name, by_function = good_values(pipe, tmp_path)
    swept, left_out, foreign = set(), {}, {}
    known = {f'{module}.{name}' for module, names in LEFT_OUT.items() for name in names.split()}
    assert not known & set(by_function)
    for name, function in functions():
        if name in known: continue
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        values = by_name | by_function.get(name, {})
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in values]
        if missing: left_out[name] = missing
        if missing or not parameters: continue
        good = {p.name: values[p.name] for p in parameters if p.name in values}
        try: finish(function(**good))
        except Exception as e:
            left_out[name] = repr(e)      # a name that means something else there
            continue
        swept.add(name)
        for p in parameters:
            may_be_none = p.default is None or 'None' in str(p.annotation)
            for wrong in wrong_values(good[p.name], may_be_none) if p.name in good else []:
                try: finish(function(**good | {p.name: wrong}))
                except Exception as e:
                    ours = Path(traceback.extract_tb(e.__traceback__)[-1].filename).is_relative_to(CFG.lib_path)
                    if not ours or not isinstance(e, ValueError | TypeError | OSError | MemoryError | FloatingPointError): foreign.setdefault(name, []).append(f'{p.name}={wrong!r:.20}: {e!r:.60}')
    assert left_out == {}, 'they fell out: good_values() has not all that they want'
    assert len(swept) >= 176
    assert foreign == {}


COMMANDS = [('further.many', ['--prompts', 'nothing.txt'], 'nothing.txt cannot be read'), ('training.diffusion', ['--stages', 'soon'], "stages='soon'"),
            ('training.quality', ['--folder', 'nowhere'], 'nowhere')]


@pytest.mark.parametrize('module, options, words', COMMANDS)
def test_command(tmp_path, module, options, words):
    "A command that is given something wrong ends on one line."
    process = command(f'sd_deepdive.{module}', *options, cwd=tmp_path, out=tmp_path/'said')
    process.start(), process.join()
    said = [line for line in (tmp_path/'said').read_text().splitlines() if 'Loading weights' not in line]
    assert process.exitcode == 1 and len(said) == 1 and words in said[0] and re.match(r'\w*Error: ', said[0]), said


def test_command_in_python(tmp_path):
    "Called in Python it raises."
    with pytest.raises(ValueError, match='nothing.txt'): draw_file(tmp_path/'nothing.txt')
