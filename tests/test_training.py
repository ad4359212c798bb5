"""The code that makes the embedded model: data, captions, and a loop that survives being broken off."""
import json
import random

import pytest
import torch
from conftest import ROOT
from tools.training import data, fit as fitting

SLICE = ROOT/'sd_deepdive'/'data'/'pictures.zip'


def train(folder, steps, *, stop=None, bad_step=None):
    "Fit a line; `stop` ends with an error after that many steps, as a kill would; `bad_step` gives a loss that is not a number."
    torch.manual_seed(0)
    model, done = torch.nn.Linear(3, 1), []

    def draw(g, step):
        if step == stop: raise KeyboardInterrupt
        return dict(x=torch.randn(8, 3, generator=g), step=torch.full((8,), step))

    def loss(model, x, step):
        done.append(int(step[0]))
        return (model(x) - x.sum(1, keepdim=True)).pow(2).mean() * (float('nan') if step[0] == bad_step else 1)

    try: fitting.fit(model, draw, loss, fitting.accelerator(), steps=steps, lr=.05, folder=folder, warmup=5, save_every=10)
    except KeyboardInterrupt: pass
    return model.state_dict(), done


def test_resumes_bit_for_bit(tmp_path):
    "Broken off between two checkpoints and started again, training ends with the weights of an unbroken run."
    whole, _ = train(tmp_path/'whole', 40)
    _, first = train(tmp_path/'broken', 40, stop=27)
    resumed, second = train(tmp_path/'broken', 40)
    assert first == list(range(27)) and second == list(range(20, 40))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not list(tmp_path.rglob('*.part'))


def test_loss_falls(tmp_path):
    "The loop learns: the line is found."
    weights, _ = train(tmp_path, 200)
    assert (weights['weight'] - 1).abs().max() < .05


def test_not_a_number_stops(tmp_path):
    "A loss that is not finite stops training, names the step, and keeps the batch and the last checkpoint."
    with pytest.raises(FloatingPointError, match='step 13'): train(tmp_path, 40, bad_step=13)
    kept = torch.load(tmp_path/'not_finite.pt', weights_only=True)
    assert kept['step'] == 13 and kept['batch']['x'].shape == (8, 3)
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 10


def test_same_randomness_on_any_number_of_processes():
    "Two processes see together what one sees alone."
    class Process:
        def __init__(self, index, n): self.process_index, self.num_processes, self.device = index, n, 'cpu'
    batch = dict(x=torch.randn(8, 3, generator=fitting.step_generator(0, 5)))
    parts = [fitting.share(batch, Process(i, 2))['x'] for i in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batch['x'])
    assert not torch.equal(batch['x'], torch.randn(8, 3, generator=fitting.step_generator(0, 6)))


def test_slice():
    "The slice in the package holds two dozen things in every style that has them, as premultiplied pictures of the right size."
    entries, rgba = data.unpack(SLICE)
    assert rgba.shape == (len(entries), 4, data.SIZE, data.SIZE) and rgba.dtype == torch.uint8
    assert {e['thing'] for e in entries} == set(data.things(24))
    for style in data.STYLES: assert sum(e['style'] == style for e in entries) == 24
    assert (rgba[:, :3] <= rgba[:, 3:]).all(), 'colour is premultiplied by alpha'
    assert (rgba[:, 3].flatten(1).amax(1) > 200).all(), 'no picture is empty'


def test_held_out():
    "At least 40 pairs of things that are drawn, at least 100 pictures in all; no thing is held out in every style."
    drawn = [p for p in data.held_out() if p[0] in data.things()]
    assert len(drawn) >= 40 and len(data.held_out()) >= 100
    for thing in data.things(): assert sum((thing, s) in data.held_out() for s in data.STYLES) < len(data.STYLES) - 1
    assert {s for _, s in drawn} == set(data.STYLES)


def test_captions():
    "A caption names the thing; the background exactly when it is not white, or else seldom."
    entry = dict(thing='octopus', style='3d', keywords=['sea', 'animal'])
    white = [data.caption(entry, 'white', random.Random(i)) for i in range(300)]
    blue = [data.caption(entry, 'blue', random.Random(i)) for i in range(300)]
    assert all('octopus' in c for c in white + blue)
    assert all(c.endswith('on a blue background') for c in blue)
    assert 0 < sum('background' in c for c in white) < 100
    assert {'an octopus', 'octopus, 3d style', 'a 3d emoji of an octopus'} <= set(white)


def test_compose():
    "Without a matrix a picture is laid on its colour, pixel for pixel."
    rgba = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    rgba[:, 0, :4], rgba[:, 3, :4] = 255, 255
    pixels = data.compose(rgba, torch.tensor([[0., 0., 1.]]))
    assert torch.equal(pixels[0, :, 0, 0], torch.tensor([1., -1., -1.])) and torch.equal(pixels[0, :, 7, 7], torch.tensor([-1., -1., 1.]))


def test_changed_package_is_refused(tmp_path, monkeypatch):
    "A package whose checksum differs from the recorded one is removed, and nothing is built from it."
    monkeypatch.setattr(data, 'WORK', tmp_path)
    folder = tmp_path/'packages'/'some-1.0'
    folder.mkdir(parents=True)
    (folder/'some.tgz').write_bytes(b'not what was recorded')
    with pytest.raises(ValueError, match='checksum'): data.fetch('some', '1.0', 'sha512-' + 'A'*86 + '==')
    assert not list(folder.iterdir())


def test_too_many_things():
    with pytest.raises(ValueError, match='things=100000'): data.things(100000)


def test_held_out_file_is_what_the_rule_gives():
    "The committed file was drawn by the rule in the code, not by hand."
    names = [e for e in json.loads(data.HELD_OUT.read_text())['drawn']]
    assert names == [list(p) for p in data.choose_held_out(
        [dict(thing=f'other {i}', style=s) for i in range(60) for s in data.STYLES])['drawn']]
