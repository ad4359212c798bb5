"""One seed, one picture: to the bit where nothing else changes, one of 255 levels apart at most where the batch or the threads do."""
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from sd_deepdive.models import load_pipeline, text_to_image
from sd_deepdive.sampling import make_noise, make_samples
from sd_deepdive.scratch.parts import load_parts
from sd_deepdive.seeds import generators

PROMPTS = ['red apple', 'rocket, flat style', 'a pizza', 'umbrella, 3d style', 'octopus', 'guitar, noto style', 'a crown', 'sun']
SEEDS, STEPS = list(range(40, 48)), 3
KINDS = ['library', 'by hand']


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def levels(kind, prompts=PROMPTS, seeds=SEEDS, batch_size=8):
    "What the library's pipeline, or our loop with the parts by hand, draws: (n, 128, 128, 3), levels from 0 to 255."
    if kind == 'library':
        images = text_to_image(load_pipeline(device='cpu'), prompts, seeds, STEPS, batch_size=batch_size)
        return np.stack([np.asarray(image) for image in images]).astype(int)
    pixels = make_samples(load_parts(device='cpu'), prompts, seeds=seeds, num_inference_steps=STEPS, batch_size=batch_size)
    return ((pixels/2 + .5).clamp(0, 1)*255).round().permute(0, 2, 3, 1).numpy().astype(int)


def two_seeds(kind):
    "One prompt with two seeds."
    return levels(kind, PROMPTS[:1]*2, SEEDS[:2])


def difference(a, b):
    "The largest difference of two pictures."
    return abs(a - b).max()


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    "What another process draws, on one thread and on two."
    file = tmp_path_factory.mktemp('drawn')/'levels.npz'
    run(sys.executable, '-W', 'error', __file__, file, cwd=ROOT, env=os.environ | dict(PYTHONPATH='.', OMP_NUM_THREADS='2'))
    return np.load(file)


@pytest.mark.parametrize('kind', KINDS)
def test_processes_and_threads(elsewhere, kind):
    "Another process draws the same pictures to the bit, another seed does not; on two threads, sums are taken in another order."
    here = two_seeds(kind)
    assert np.array_equal(here, elsewhere[f'{kind}, 1']) and difference(*here) > 50
    assert difference(here, elsewhere[f'{kind}, 2']) <= 1


@pytest.mark.parametrize('kind', KINDS)
def test_batches(kind):
    "Batches of 1, 3 and 8: eight pictures, all different."
    eight = levels(kind)
    assert max(difference(eight, levels(kind, batch_size=batch_size)) for batch_size in (1, 3)) <= 1
    assert min(difference(a, b) for a, b in zip(eight, eight[1:])) > 50


def test_noise():
    "The noise they begin with is the same to the bit in batches of 1, 3 and 8, by our loop and by the library's pipeline."
    pipe, batches = load_pipeline(device='cpu'), {n: [SEEDS[i:i + n] for i in range(0, 8, n)] for n in (1, 3, 8)}
    ours = {n: torch.cat([make_noise(pipe, seeds) for seeds in batches[n]]) for n in batches}
    begun = lambda seeds: pipe.prepare_latents(len(seeds), 4, 128, 128, torch.float32, torch.device('cpu'), generators(seeds))
    theirs = {n: torch.cat([begun(seeds) for seeds in batches[n]]) for n in batches}
    assert ours[8].std() > .9 and all(torch.equal(noise, ours[8]) for noise in [*ours.values(), *theirs.values()])


if __name__ == '__main__':
    drawn = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        drawn |= {f'{kind}, {threads}': two_seeds(kind) for kind in KINDS}
    np.savez(sys.argv[1], **drawn)
